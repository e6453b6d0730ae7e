"""Transformer blocks: adaLN-zero around self-attention, attention to tokens, and joint attention of two streams."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, rms_norm, silu

from undiffuse.nets.attention import Context, CrossAttention, Rotation, mixed, normed, zero

NORMS: dict[str, Callable[..., Tensor]] = {"layer": layer_norm, "rms": rms_norm}


def modulated(x: Tensor, shift: Tensor, scale: Tensor, norm: str) -> Tensor:
    """The normalised features of x (b, n, width), scaled and shifted: an adaptive norm."""
    return torch.addcmul(shift, NORMS[norm](x, x.shape[-1:]), 1 + scale)


def _split(a: Tensor, parts: int, heads: int) -> list[Tensor]:
    """(b, n, parts width) -> parts times (b, heads, n, width / heads)."""
    return [part.transpose(1, 2) for part in torch.unflatten(a, -1, (parts, heads, -1)).unbind(2)]


class Stream(nn.Module):
    """One sequence's own share of a block: its adaptive norms, queries, keys and values, its two-layer network (SwiGLU
    where `gated`; Shazeer 2020, arXiv 2002.05202), and gates that start shut (Peebles and Xie 2023, adaLN-zero)."""

    def __init__(
        self,
        width: int,
        heads: int,
        expand: int,
        embedding: int,
        dropout: float = 0.0,
        norm: str = "layer",
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.norm, self.gated = heads, norm, gated
        inner = expand * width * 2 // 3 if gated else expand * width  # as many weights with three matrices as with two
        self.modulate = zero(nn.Linear(embedding, 6 * width))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.up, self.down = nn.Linear(width, inner * (1 + gated)), nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def asked(self, x: Tensor, emb: Tensor, rotation: Rotation | None) -> tuple[list[Tensor], list[Tensor]]:
        """Queries, keys and values (b, heads, n, width / heads); and the modulation of what follows."""
        shift, scale, *rest = self.modulate(emb)[:, None].chunk(6, -1)
        q, k, v = _split(self.qkv(modulated(x, shift, scale, self.norm)), 3, self.heads)
        return [normed(q, self.q_norm, rotation), normed(k, self.k_norm, rotation), v], rest

    def heard(self, x: Tensor, h: Tensor, rest: list[Tensor]) -> Tensor:
        """x and, through its gate, what attention (b, heads, n, width / heads) gave."""
        return torch.addcmul(x, rest[0], self.proj(h.transpose(1, 2).flatten(2)))

    def fed(self, x: Tensor, rest: list[Tensor]) -> Tensor:
        """x and, through its gate, the two-layer network's answer."""
        _, shift, scale, gate = rest
        h = self.up(modulated(x, shift, scale, self.norm))
        if self.gated:
            h, open_ = h.chunk(2, -1)
            h = h * silu(open_)
        else:
            h = gelu(h, approximate="tanh")
        return torch.addcmul(x, gate, self.down(self.dropout(h)))


class Block(Stream):
    """Self-attention, attention to the condition's tokens where `tokens` > 0 (Chen et al. 2023, arXiv 2310.00426), and
    a two-layer network."""

    def __init__(
        self,
        width: int,
        heads: int,
        expand: int,
        embedding: int,
        dropout: float = 0.0,
        norm: str = "layer",
        gated: bool = False,
        tokens: int = 0,
    ) -> None:
        super().__init__(width, heads, expand, embedding, dropout, norm, gated)
        self.cross = CrossAttention(width, tokens, heads) if tokens else None

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        context: Context | None = None,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x (b, n, width); `mask` (b, 1, 1, n) is False for what must not be seen."""
        (q, k, v), rest = self.asked(x, emb, rotation)
        x = self.heard(x, mixed(q, k, v, mask), rest)
        if self.cross is not None and context is not None:
            x = x + self.cross(NORMS[self.norm](x, x.shape[-1:]), context)
        return self.fed(x, rest)


class _Told(nn.Module):
    """The tokens' share of the last joint block, in which they are heard and hear nothing: keys and values."""

    def __init__(self, width: int, heads: int, embedding: int, norm: str) -> None:
        super().__init__()
        self.heads, self.norm = heads, norm
        self.modulate, self.kv = zero(nn.Linear(embedding, 2 * width)), nn.Linear(width, 2 * width)
        self.k_norm = nn.RMSNorm(width // heads)

    def forward(self, text: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.modulate(emb)[:, None].chunk(2, -1)
        k, v = _split(self.kv(modulated(text, shift, scale, self.norm)), 2, self.heads)
        return normed(k, self.k_norm), v


class JointBlock(nn.Module):
    """Tokens and patches with weights of their own that attend to all of both (MMDiT; Esser et al. 2024, arXiv
    2403.03206, figure 2b). Nothing comes after the `last` block's tokens, so there they only are heard."""

    def __init__(
        self,
        width: int,
        heads: int,
        expand: int,
        embedding: int,
        dropout: float = 0.0,
        norm: str = "layer",
        gated: bool = False,
        last: bool = False,
    ) -> None:
        super().__init__()
        self.image = Stream(width, heads, expand, embedding, dropout, norm, gated)
        self.text: Stream | _Told
        if last:
            self.text = _Told(width, heads, embedding, norm)
        else:
            self.text = Stream(width, heads, expand, embedding, dropout, norm, gated)

    def forward(
        self, x: Tensor, text: Tensor | None, emb: Tensor, rotation: Rotation | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x (b, m, width) and text (b, n, width), or None for no tokens; `mask` (b, 1, 1, n + m) is False for tokens
        that must not be seen."""
        (q, k, v), rest = self.image.asked(x, emb, rotation)
        if text is None:
            return self.image.fed(self.image.heard(x, mixed(q, k, v), rest), rest), None
        n = text.shape[1]
        if isinstance(self.text, Stream):
            (q_text, k_text, v_text), after = self.text.asked(text, emb, None)
            h = mixed(torch.cat([q_text, q], 2), torch.cat([k_text, k], 2), torch.cat([v_text, v], 2), mask)
            text, h = self.text.fed(self.text.heard(text, h[:, :, :n], after), after), h[:, :, n:]
        else:
            k_text, v_text = self.text(text, emb)
            h = mixed(q, torch.cat([k_text, k], 2), torch.cat([v_text, v], 2), mask)
        return self.image.fed(self.image.heard(x, h, rest), rest), text
