"""Random numbers as functions of whole numbers: whatever is drawn depends on its seed and its index alone."""

from __future__ import annotations

from torch import Tensor

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(seed: int) -> int:
    """splitmix64: neighbouring seeds land far apart (Steele et al. 2014)."""
    z = (seed + _GOLDEN) % 2**64
    z = ((z ^ (z >> 30)) * _FIRST) % 2**64
    z = ((z ^ (z >> 27)) * _SECOND) % 2**64
    return z ^ (z >> 31)


def seed_of(*parts: int) -> int:
    """A 63-bit seed from whole numbers: the same numbers, the same seed; others, an unrelated one."""
    value = 0
    for part in parts:
        value = mix(value ^ (part % 2**64))
    return value >> 1


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def uniform(seed: int, indices: Tensor) -> Tensor:
    """float64 draws uniform in (0, 1), of the shape of `indices` (whole numbers): draw k depends on (seed, k) alone.

    >>> import torch
    >>> draws = uniform(7, torch.arange(1000))
    >>> bool((uniform(7, torch.tensor([41, 3])) == draws[[41, 3]]).all()), round(float(draws.mean()), 2)
    (True, 0.5)
    """

    def shift(z: Tensor, bits: int) -> Tensor:  # a logical shift: torch's is arithmetic
        return (z >> bits).bitwise_and(2 ** (64 - bits) - 1)

    z = (indices.long() ^ _signed(mix(seed % 2**64))) + _signed(_GOLDEN)  # `mix`, in 64-bit words that wrap around
    z = (z ^ shift(z, 30)) * _signed(_FIRST)
    z = (z ^ shift(z, 27)) * _signed(_SECOND)
    draws: Tensor = (shift(z ^ shift(z, 31), 12).double() + 0.5) / 2**52
    return draws
