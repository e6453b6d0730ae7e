"""Linear systems that are known by their products alone, a batch at a time and every sample by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from undiffuse.guide.contrast import dot

Product = Callable[[Tensor], Tensor]


def ridge(forward: Product, adjoint: Product, r: Tensor, damping: Tensor, iterations: int, tol: float = 0.0) -> Tensor:
    """argmin_z |A z - r|^2 + damping |z|^2 = A^T (A A^T + damping)^-1 r, by conjugate gradients on the normal equations
    (CGLS: Paige and Saunders 1982, section 7.1); at damping 0 the pseudo-inverse A^+ r.

    r (b, ...); `damping` >= 0 is one number or (b, 1, ...). A sample stops where its gradient is `tol` times what it
    was at first, or what rounding leaves of it, and is that of its least gradient.
    """
    tol, s = max(tol, torch.finfo(r.dtype).eps ** 0.75), r
    q = adjoint(r)
    z, p, size = torch.zeros_like(q), q, dot(q, q)
    first, least, best, damping = size, size, z, torch.as_tensor(damping, dtype=r.dtype, device=r.device)
    damping = damping.reshape(-1, *(1 for _ in q.shape[1:])) if damping.ndim else damping
    for _ in range(iterations):
        open_ = size > tol**2 * first
        if not bool(open_.any()):
            break
        w = forward(p)
        curve = dot(w, w).reshape(size.shape) + damping * dot(p, p)
        step = torch.where(open_ & (curve > 0), size / torch.where(curve > 0, curve, 1.0), 0.0)
        z = z + step * p
        s = s - step.reshape(-1, *(1 for _ in s.shape[1:])) * w
        q = adjoint(s) - damping * z
        fresh = dot(q, q)
        p = torch.where(open_, q + fresh / torch.where(open_, size, 1.0) * p, p)
        size = torch.where(open_, fresh, size)
        best, least = torch.where(size < least, z, best), torch.minimum(size, least)
    return best


def gmres(product: Product, r: Tensor, iterations: int) -> Tensor:
    """The u with the least |r - M u| among combinations of r, M r ... M^(iterations - 1) r (Saad and Schultz 1986).

    M need not be symmetric nor regular. r (b, ...); `iterations` products.
    """
    size = dot(r, r).sqrt()
    basis, columns = [r / torch.where(size > 0, size, 1.0)], list[Tensor]()
    for k in range(iterations):
        w = product(basis[-1])
        reach, column = dot(w, w).sqrt(), torch.zeros(len(r), iterations + 1, dtype=r.dtype, device=r.device)
        for _ in range(2):  # once more, since rounding leaves what cancels
            for i, v in enumerate(basis):
                c = dot(v, w)
                w, column[:, i] = w - c * v, column[:, i] + c.flatten()
        left = dot(w, w).sqrt()
        more = left > 100 * torch.finfo(r.dtype).eps * reach
        column[:, k + 1] = torch.where(more, left, 0.0).flatten()
        basis.append(torch.where(more, w / torch.where(more, left, 1.0), 0.0))
        columns.append(column)
    hessenberg = torch.stack(columns, 2).double()
    best = torch.linalg.pinv(hessenberg)[:, :, 0].to(r.dtype) * size.reshape(-1, 1)
    out = torch.zeros_like(r)
    for k in range(iterations):
        out = out + best[:, k].reshape(size.shape) * basis[k]
    return out
