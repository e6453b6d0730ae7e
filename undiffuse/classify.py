"""`Classifier`: p(c | x) of noisy x at any level, whose gradient guides samples (Dhariwal and Nichol 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from undiffuse.denoise import Headed
from undiffuse.level import Level
from undiffuse.precond import EDMPrecond
from undiffuse.types import InputError


@dataclass(frozen=True)
class Held:
    """-lam / 4, with lam held within the levels that a network was trained on, from `low` to `high`."""

    low: float
    high: float

    def __call__(self, level: Level) -> Tensor:
        return -level.lam.clamp(self.low, self.high) / 4


class Classifier(Headed):
    """log p(c | x) up to a constant: log p(c) + c_out F(c_in x, time), F being the network's answer (b, classes).

    With D = d (alpha sigma_data / sigma)^2, the signal-to-noise ratio of a whole sample of d elements,
    c_out^2 = D / (1 + D): log-likelihood ratios vanish like sqrt(D) where noise drowns the data, so that at alpha = 0
    it says the `prior` p(c) (classes,) exactly, and F stays of one size. It is a function of c_in x and lam alone,
    the same in VP, flow and VE form. Coefficients are computed in float64. InputError for a prior that is not one.

    >>> from undiffuse import EDMPrecond, Level
    >>> model = Classifier(lambda x, time, cond: torch.cat([x, -x], 1), EDMPrecond(), [0.75, 0.25])
    >>> model(torch.ones(1, 1), Level(0, 1)).softmax(1)
    tensor([[0.7500, 0.2500]])
    """

    head: EDMPrecond
    prior: Tensor

    def __init__(self, net: Any, head: EDMPrecond, prior: Tensor | Sequence[float]) -> None:
        super().__init__(net, head)
        p = torch.as_tensor(prior, dtype=torch.float64)
        if p.ndim != 1 or len(p) < 2 or not bool((p > 0).all()) or not bool(p.isfinite().all()):
            raise InputError(f"a classifier needs a prior of 2 or more numbers > 0, got {p.tolist()}")
        self.register_buffer("prior", (p / p.sum()).log().float())

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.prior)

    def forward(self, x: Tensor, level: Level, cond: Any = None) -> Tensor:
        """Logits (b, classes) in the dtype of x (b, *data), differentiable in x; of `cond`, the network reads what was
        done by augmentation, which is nothing without."""
        answer = self.answer(x, level, cond).to(x.dtype)
        if answer.shape != (len(x), self.classes):
            raise InputError(f"this network answers {tuple(answer.shape)}; expected ({len(x)}, {self.classes})")
        whole = Level(level.alpha, level.sigma / x[0].numel() ** 0.5)  # D is alpha sigma_data / sigma there, squared
        out = level.alpha * self.head.sigma_data * self.head.c_in(whole)
        logits: Tensor = (self.prior + (out.reshape(-1, 1) if out.ndim else out) * answer).to(x.dtype)
        return logits

    def log_p(self, x: Tensor, level: Level, labels: Tensor) -> Tensor:
        """log p(labels | x) (b,) of numbers (b,), or log sum_c w_c p(c | x) of weights w (b, classes) >= 0: several
        ones mean any of these classes, and a row of zeros, the null condition, gives 0.

        Raises InputError for labels of other shapes and for numbers out of range.
        """
        log_p: Tensor = self(x, level).log_softmax(1)
        if labels.shape == log_p.shape:
            nothing = (labels == 0).all(1, keepdim=True)
            weights = torch.where(nothing, 1.0, labels.to(log_p))
            return (log_p + weights.log()).logsumexp(1)
        whole = not labels.is_floating_point() and labels.dtype != torch.bool
        if labels.shape != log_p.shape[:1] or not whole:
            raise InputError(
                f"labels of {labels.dtype} and shape {tuple(labels.shape)}: expected whole numbers ({len(x)},), or "
                f"weights ({len(x)}, {self.classes})"
            )
        if bool(((labels < 0) | (labels >= self.classes)).any()):
            raise InputError(f"labels must be from 0 to {self.classes - 1}, got {labels.tolist()}")
        return log_p.gather(1, labels.long()[:, None])[:, 0]
