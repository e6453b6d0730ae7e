"""Explicit Runge-Kutta methods as Butcher tableaux (Butcher 1964; Hairer, Norsett, Wanner 1993, section II)."""

from __future__ import annotations

from typing import NamedTuple

from undiffuse.types import InputError


class Butcher(NamedTuple):
    """Stages a (below the diagonal, the first empty), weights b, their order; `low`: weights of one order less."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int
    low: tuple[float, ...] = ()


METHODS: dict[str, Butcher] = {
    "midpoint": Butcher(((), (1 / 2,)), (0, 1), 2, (1, 0)),
    "heun": Butcher(((), (1,)), (1 / 2, 1 / 2), 2, (1, 0)),
    "ralston": Butcher(((), (2 / 3,)), (1 / 4, 3 / 4), 2, (1, 0)),
    "kutta3": Butcher(((), (1 / 2,), (-1, 2)), (1 / 6, 2 / 3, 1 / 6), 3),
    "heun3": Butcher(((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4), 3),
    "ralston3": Butcher(((), (1 / 2,), (0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9), 3),
    "bogacki-shampine": Butcher(
        ((), (1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)), (2 / 9, 1 / 3, 4 / 9, 0), 3, (7 / 24, 1 / 4, 1 / 3, 1 / 8)
    ),
    "rk4": Butcher(((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), 4),
    "three-eighths": Butcher(((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8), 4),
    "dormand-prince": Butcher(
        (
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
        5,
        (5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40),
    ),
}


def method_of(name: str, own: Butcher | None) -> Butcher:
    """`own` if given and consistent, else the named method; InputError otherwise."""
    if own is None and name not in METHODS:
        raise InputError(f"unknown Runge-Kutta method {name!r}: one of {', '.join(METHODS)}, or give `own`")
    found = METHODS[name] if own is None else Butcher(*own)
    n, both = len(found.b), [w for w in (found.b, found.low) if w]
    fits = len(found.a) == n and all(len(row) == i and -1e-12 <= sum(row) <= 1 + 1e-12 for i, row in enumerate(found.a))
    if not (fits and 1 <= found.order <= n and all(len(w) == n and abs(sum(w) - 1) < 1e-12 for w in both)):
        raise InputError(
            "a Butcher tableau needs rows of 0, 1, ... stages with sums in [0, 1], weights that sum to 1, and an "
            f"order of at most the number of stages; got {found}"
        )
    return found
