"""Linear operators A: x0 (b, c, *size) -> y (b, ...), the known part of an inverse problem."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from undiffuse.seeds import seed_of, uniform
from undiffuse.types import InputError, require

Shape = tuple[int, ...]


class Operator(Protocol):
    """A: x0 (b, *data) -> y (b, ...), differentiable; `shape` is that of one x0 (*data), given that of one y."""

    linear: ClassVar[bool]

    def __call__(self, x0: Tensor, /) -> Tensor: ...
    def shape(self, y: Shape, /) -> Shape: ...


@dataclass(frozen=True, eq=False)
class Mask:
    """Inpainting: y = m x0 for a mask of 0 and 1 that broadcasts over samples and, where it is so made, over channels.

    Without a `mask` (*data), each place of the picture, all its channels alike, is known with probability `share`, as
    `seed` decides. InputError for other values in the mask and for shares outside 0 ... 1.

    >>> Mask(torch.tensor([1, 0]))(torch.tensor([[3.0, 4.0]]))
    tensor([[3., 0.]])
    """

    mask: Tensor | None = None
    share: float = 0.5
    seed: int = 0
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 <= self.share <= 1, "Mask: share", self.share, "between 0 and 1")
        if self.mask is not None and not bool(((self.mask == 0) | (self.mask == 1)).all()):
            raise InputError("Mask: a mask has the values 0 (unknown) and 1 (known) alone")

    def known(self, like: Tensor) -> Tensor:
        """The mask as booleans that broadcast against `like` (b, *data)."""
        if self.mask is not None:
            return self.mask.bool().to(like.device)
        size = like.shape[2:] if like.ndim > 2 else like.shape[1:]
        draws = uniform(seed_of(self.seed), torch.arange(math.prod(size))).reshape(size)
        return (draws < self.share).to(like.device)

    def __call__(self, x0: Tensor, /) -> Tensor:
        return torch.where(self.known(x0), x0, 0.0)

    def observed(self, y: Tensor) -> Tensor:
        """y without what stands at unknown places."""
        return self(y)

    def shape(self, y: Shape, /) -> Shape:
        return y


@dataclass(frozen=True)
class Downsample:
    """The mean over blocks of `factor` elements along every dimension of the picture: super-resolution.

    >>> Downsample(2)(torch.tensor([[[1.0, 3.0, 5.0, 7.0]]]))
    tensor([[[2., 6.]]])
    """

    factor: int = 2
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.factor >= 1, "Downsample: factor", self.factor, "a whole number >= 1")

    def __call__(self, x0: Tensor, /) -> Tensor:
        for dim in range(2, x0.ndim):
            if x0.shape[dim] % self.factor:
                raise InputError(f"Downsample({self.factor}) needs sizes that it divides, got {tuple(x0.shape[2:])}")
            shape = (*x0.shape[:dim], -1, self.factor, *x0.shape[dim + 1 :])
            x0 = x0.reshape(shape).mean(dim + 1)
        return x0

    def shape(self, y: Shape, /) -> Shape:
        return (y[0], *(self.factor * n for n in y[1:]))


@dataclass(frozen=True, eq=False)
class Blur:
    """Convolution of every channel with a Gaussian of `std` elements, or with any `kernel` of odd sizes, in 1 to 3
    dimensions; beyond its edges the picture is mirrored ("reflect") or 0 ("zero").

    The Gaussian ends at 3 std and has sum 1. InputError for a picture that is too small to be mirrored so far.

    >>> Blur(kernel=torch.ones(3) / 3, padding="zero")(torch.tensor([[[0.0, 3.0, 0.0]]]))
    tensor([[[1., 1., 1.]]])
    """

    std: float = 1.0
    padding: Literal["reflect", "zero"] = "reflect"
    kernel: Tensor | None = None
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.std > 0, "Blur: std", self.std, "> 0")
        require(self.padding in ("reflect", "zero"), "Blur: padding", self.padding, "'reflect' or 'zero'")
        if self.kernel is not None and not (1 <= self.kernel.ndim <= 3 and all(n % 2 for n in self.kernel.shape)):
            raise InputError(f"Blur: a kernel has 1 to 3 dimensions of odd size, got {tuple(self.kernel.shape)}")

    def weights(self, dims: int) -> Tensor:
        """The kernel, in `dims` dimensions."""
        if self.kernel is not None:
            return self.kernel
        radius = math.ceil(3 * self.std)
        line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / self.std) ** 2)
        kernel = line / line.sum()
        for _ in range(dims - 1):
            kernel = kernel[..., None] * (line / line.sum())
        return kernel

    def __call__(self, x0: Tensor, /) -> Tensor:
        kernel = self.weights(x0.ndim - 2).to(x0)
        if not (kernel.ndim == x0.ndim - 2 and x0.ndim <= 5):
            raise InputError(f"Blur: a kernel of {kernel.ndim} dimensions for samples of shape {tuple(x0.shape[1:])}")
        around = [n // 2 for n in reversed(kernel.shape) for _ in range(2)]
        if self.padding == "reflect" and any(r >= n for r, n in zip(around[::2], reversed(x0.shape), strict=False)):
            raise InputError(
                f"Blur: {tuple(x0.shape[2:])} is too small to mirror {around[::2]} elements: padding='zero'"
            )
        padded = F.pad(x0, around, "reflect" if self.padding == "reflect" else "constant")
        convolve = (F.conv1d, F.conv2d, F.conv3d)[kernel.ndim - 1]
        out: Tensor = convolve(padded, kernel.expand(x0.shape[1], 1, *kernel.shape), groups=x0.shape[1])
        return out

    def shape(self, y: Shape, /) -> Shape:
        return y


@dataclass(frozen=True)
class Gray:
    """The mean of the channels, as one channel: colouring; `channels` is how many x0 has.

    >>> Gray()(torch.tensor([[[1.0], [2.0], [6.0]]]))
    tensor([[[3.]]])
    """

    channels: int = 3
    linear: ClassVar[bool] = True

    def __call__(self, x0: Tensor, /) -> Tensor:
        return x0.mean(1, keepdim=True)

    def shape(self, y: Shape, /) -> Shape:
        return (self.channels, *y[1:])


@dataclass(frozen=True, eq=False)
class Matrix:
    """y = M x0 for a `matrix` (m, d) on the flattened sample; `sample` is x0's shape where it is not (d,).

    >>> Matrix(torch.tensor([[1.0, 1.0]]))(torch.tensor([[2.0, 3.0]]))
    tensor([[5.]])
    """

    matrix: Tensor
    sample: Shape = field(default=())
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        sample = self.sample or tuple(self.matrix.shape[1:])
        if self.matrix.ndim != 2 or math.prod(sample) != self.matrix.shape[1]:
            raise InputError(f"Matrix: {tuple(self.matrix.shape)} does not act on samples of shape {sample}")
        object.__setattr__(self, "sample", sample)

    def __call__(self, x0: Tensor, /) -> Tensor:
        return x0.flatten(1) @ self.matrix.to(x0).T

    def shape(self, y: Shape, /) -> Shape:
        return self.sample


OPERATORS: dict[str, Callable[..., Operator]] = {
    "mask": Mask,
    "downsample": Downsample,
    "blur": Blur,
    "gray": Gray,
    "matrix": Matrix,
}
