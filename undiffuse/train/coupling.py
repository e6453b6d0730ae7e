"""Which noise of a batch meets which sample: the joint distribution of x0 and eps, whose marginals stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Coupling(Protocol):
    """Maps x0 and eps (b, *data) and their `Cond` of b rows, or None, to eps with its rows in another order."""

    def __call__(self, x0: Tensor, eps: Tensor, cond: Any = None) -> Tensor: ...


@dataclass(frozen=True)
class IndependentCoupling:
    """Noise as it was drawn, independent of the data: what every formula of diffusion assumes."""

    def __call__(self, x0: Tensor, eps: Tensor, cond: Any = None) -> Tensor:
        """eps itself."""
        return eps


@dataclass(frozen=True)
class Immiscible:
    """The batch's noise is assigned to its samples with the least sum of |x0 - eps|^2: minibatch optimal transport
    (Pooladian et al. 2023, arXiv 2304.14772; Tong et al. 2023, arXiv 2302.00482; Li et al. 2024, arXiv 2406.12303).

    The batch's draws stay what they are, so noise is exactly Gaussian, and paths from noise to data are shorter. But
    x_t is no longer alpha x0 plus noise independent of x0: the network learns E[x0 | x_t] of the coupled pair. An ODE
    solver then still carries noise to data (stochastic interpolants, Albergo et al. 2023, arXiv 2303.08797), exactly
    where the schedule ends in pure noise; -eps / sigma is no longer the score, so SDE solvers, and the bounds and
    weights of likelihood, are not exact (section 10 of docs/theory.md).

    With `within_class`, noise moves among samples of one condition only (equal in all its parts, before any is
    dropped). Across conditions, noise of a sample with a given condition would not be Gaussian, and sampling, which
    starts from Gaussian noise whatever the condition, would start where the network was not trained.
    """

    within_class: bool = True

    def __call__(self, x0: Tensor, eps: Tensor, cond: Any = None) -> Tensor:
        """eps (b, *data) with its rows assigned anew."""
        from scipy.optimize import linear_sum_assignment

        # |x0|^2 and |eps|^2 sum to the same in every order; in float64 the answer does not depend on the device
        product = (x0.flatten(1).double() @ eps.flatten(1).double().T).cpu()
        order = torch.arange(len(x0))
        for rows in _groups(cond) if self.within_class and cond is not None else [order.clone()]:
            order[rows] = rows[linear_sum_assignment(product[rows][:, rows].numpy(), maximize=True)[1]]
        return eps[order.to(eps.device)]


def _groups(cond: Any) -> list[Tensor]:
    """The numbers of the rows of each distinct condition."""
    _, member = torch.unique(cond.flat().cpu(), dim=0, return_inverse=True)
    return [(member == group).nonzero().flatten() for group in range(int(member.max()) + 1)]


COUPLINGS: dict[str, Callable[..., Coupling]] = {"independent": IndependentCoupling, "immiscible": Immiscible}
