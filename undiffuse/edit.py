"""Editing of pictures by a trained model: what `undiffuse edit` does, as a function on a `Model` and pictures."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from PIL.Image import Resampling
from torch import Tensor

from undiffuse.cond import Cond, Given
from undiffuse.cond.maps import Masked
from undiffuse.data import Prepare, Raw, Unreadable, read_picture
from undiffuse.data.picture import cover, resized, to_float, with_channels
from undiffuse.data.prepare import stored
from undiffuse.grid import Grid
from undiffuse.guide import Guidance, guide_of
from undiffuse.level import Level
from undiffuse.model import Model
from undiffuse.restore import (
    DAPS,
    RESTORERS,
    Blur,
    Downsample,
    Gray,
    Mask,
    Operator,
    Problem,
    Returning,
    check_aligned,
    check_attention,
    check_shares,
    composite,
    flowedit,
    img2img,
    inpaint,
    invert,
    prompt_to_prompt,
    reconstruct,
    restore,
    simulate,
)
from undiffuse.restore.strength import lam_of
from undiffuse.sample import Noise, sample
from undiffuse.seeds import seed_of
from undiffuse.solvers import Solver
from undiffuse.types import Denoise, InputError, one_of, require

Columns = dict[str, Tensor]
# of DAPS's white noise in units of the data's std: pictures that are likely given a noisy one differ in few directions,
# and more noise in all of them leaves the pictures that the model knows
SPREAD = 0.15


class Edited(NamedTuple):
    """Pictures (b, *shape) in the data's range by what they are: those from `before` editing, and the `results`; and
    what was measured, such as the dB of a restoration."""

    before: Columns
    results: Columns
    measured: dict[str, float]


@dataclass(frozen=True, eq=False)
class How:
    """How b pictures are edited `n` times each: conditions of the b * n `target`s and of the b `source`s, and the
    sampler, of which each method has its own where there is none."""

    model: Model
    target: Given | Cond | None
    source: Given | Cond | None
    guidance: Guidance
    solver: Solver | None
    steps: int | None
    grid: Grid
    seed: int
    n: int
    denoiser: Any

    def rows(self, x: Tensor) -> Tensor:
        """Every row `n` times, copies next to each other."""
        return x.repeat_interleave(self.n, 0)

    def bound(
        self, cond: Given | Cond | None, guidance: Guidance | float | Mapping[str, float] | None = None
    ) -> Denoise:
        """The denoiser with a condition, guided as all or by `guidance`."""
        guide = guide_of(self.guidance if guidance is None else guidance)
        return guide(self.denoiser, None if cond is None else cond.to(self.model.device))

    def into(self, x: Tensor) -> Tensor:
        """Pictures of the data's range as the denoiser has them."""
        x = x if self.model.scale is None else self.model.scale.apply(x)
        return x.to(self.model.device)

    def out(self, x: Tensor) -> Tensor:
        """The denoiser's pictures in the data's range."""
        return self.model.restore(x).cpu()

    def columns(self, name: str, x: Tensor) -> Columns:
        """The b * n pictures as n columns."""
        each = torch.unflatten(x, 0, (-1, self.n)).unbind(1)
        return {name if self.n == 1 else f"{name} {k + 1}": part for k, part in enumerate(each)}

    def sampler(self, steps: int = 50) -> dict[str, Any]:
        """What the functions of `undiffuse.restore` take, with their own number of steps."""
        return {"steps": self.steps or steps, "solver": self.solver, "grid": self.grid}

    def std(self, noise: float) -> float:
        """The std of noise in the data's range as the denoiser has it."""
        scale = self.model.scale
        return noise if scale is None else noise / (2 * float(np.mean(scale.std)))

    @cached_property
    def middle(self) -> float:
        """The middle of the data's range: what hidden pixels are shown as."""
        scale = self.model.scale
        return 0.0 if scale is None else (scale.low + scale.high) / 2


class Edit(Protocol):
    """(how, pictures (b, *shape) in the data's range) -> `Edited`; a frozen dataclass of settings. `paired` says
    whether it needs what pictures are (source) and shall become (target)."""

    paired: ClassVar[bool]

    def __call__(self, how: How, x: Tensor, /) -> Edited: ...


def _check_strengths(strengths: Sequence[float]) -> None:
    """InputError for one out of range."""
    for s in strengths:
        lam_of(s)


@dataclass(frozen=True)
class ImageToImage:
    """Noise to a strength and back (SDEdit): the picture again, and otherwise."""

    strength: tuple[float, ...] = (0.6,)
    paired: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_strengths(self.strength)

    def __call__(self, how: How, x: Tensor, /) -> Edited:
        denoise, schedule, results = how.bound(how.target), how.model.schedule, Columns()
        use = how.sampler(20) | {"solver": how.solver or how.model.config.build("solver")}
        for s in self.strength:
            found = img2img(denoise, how.rows(how.into(x)), schedule, s, seed=how.seed, **use)
            results |= how.columns(f"strength {s:g}", how.out(found))
        return Edited({"original": x}, results, {f"lam at {s:g}": lam_of(s) for s in self.strength if s < 1})


@dataclass(frozen=True, eq=False)
class Inpaint:
    """What is not `known` (1, 1, *sides; 1: kept, 0: made anew) filled in: by `replacement`,
    with `times` returns of `jump` steps by `repaint`, by a network that was trained to (`net`, whose encoder is
    `Masked`), or by one of `RESTORERS`. Known pixels are unchanged, unless they have `noise`."""

    known: Tensor
    by: str = "mmps"
    jump: int = 5
    times: int = 5
    noise: float = 0.0
    paired: ClassVar[bool] = False

    def __post_init__(self) -> None:
        ways = ("replacement", "repaint", "net", *RESTORERS)
        if self.by not in ways:
            raise InputError(f"inpaint: by = {self.by!r}: {one_of(self.by, ways)}")
        if self.noise and self.by not in RESTORERS:
            raise InputError(f"inpainting by {self.by} takes what is known to be without noise: take mmps, or noise 0")

    def __call__(self, how: How, x: Tensor, /) -> Edited:
        known = self.known.to(x).expand(len(x), 1, *x.shape[2:])
        each, schedule = how.rows(known), how.model.schedule
        if self.by in RESTORERS:
            mask = (known[0] == 1).to(x).to(how.model.device)
            z = _restored(how, self.by, Problem(Mask(mask), how.rows(how.into(x)), how.std(self.noise)))
        elif self.by == "net":
            z = sample(
                how.denoiser,
                (len(each), *how.model.shape),
                schedule,
                cond=self._told(how, x, known),
                guidance=how.guidance if how.target is not None else 1.0,
                seed=how.seed,
                device=how.model.device,
                **how.sampler(20) | {"solver": how.solver or how.model.config.build("solver")},
            )
        else:
            grid = how.grid if self.by == "replacement" else Returning(how.grid, self.jump, self.times)
            use = how.sampler(20) | {"solver": how.solver or how.model.config.build("solver"), "grid": grid}
            z = inpaint(how.bound(how.target), how.rows(how.into(x)), each, schedule, seed=how.seed, **use)
        found = how.out(z)
        found = found if self.noise else composite(found, how.rows(x), each)
        seen = known if self.by not in RESTORERS else (known == 1).to(x)  # the others take a soft mask
        masked = seen * x + (1 - seen) * how.middle
        return Edited({"original": x, "masked": masked}, how.columns("result", found), {})

    def _told(self, how: How, x: Tensor, known: Tensor) -> Given:
        """The condition of a network that fills in, besides others."""
        encoders = how.model.encoders
        names = [] if encoders is None else [k for k, e in encoders.encoders.items() if isinstance(e, Masked)]
        if encoders is None or not names:
            raise InputError(
                "inpainting by net needs a network that was trained to fill in (see recipes/inpaint.toml): take mmps"
            )
        given: Given = encoders(**{names[0]: how.rows(torch.cat([x, known], 1))})
        others = [how.target] if isinstance(how.target, Given) else []
        return Given.beside([given, *others]).to(how.model.device)


@dataclass(frozen=True)
class Invert:
    """DDIM inversion with the source's condition, then sampling with the target's, from a strength on."""

    strength: tuple[float, ...] = (1.0,)
    paired: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_strengths(self.strength)

    def __call__(self, how: How, x: Tensor, /) -> Edited:
        schedule, results, z = how.model.schedule, Columns(), how.into(x)
        source, target, off = how.bound(how.source, 1.0), how.bound(how.target), {}
        for s in self.strength:
            use = how.sampler() | {"strength": s}
            noise = invert(source, z, schedule, **use)
            back = reconstruct(source, noise, schedule, **use)
            off[f"round trip from {s:g}, rms"] = float((back - z).square().mean().sqrt())
            found = reconstruct(target, how.rows(noise), schedule, **use)
            results |= how.columns("changed" if s == 1 else f"from {s:g}", how.out(found))
        return Edited({"original": x}, results, off)


def _sources(how: How) -> Given | Cond | None:
    """The condition of the sources, as often as there are targets."""
    return None if how.source is None else how.source[torch.arange(len(how.source)).repeat_interleave(how.n)]


@dataclass(frozen=True)
class PromptToPrompt:
    """Inversion, and attention maps of the source for a share of the steps: to tokens (`cross`) and to itself
    (`own`)."""

    cross: float = 0.8
    own: float = 0.4
    strength: tuple[float, ...] = (1.0,)
    paired: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_strengths(self.strength)
        check_shares(self.cross, self.own)

    def __call__(self, how: How, x: Tensor, /) -> Edited:
        model, z, results, off = how.model, how.into(x), Columns(), {}
        target: Any = how.target
        both = type(target).cat([_sources(how) or target.null(), target]).to(model.device)
        check_attention(model.denoiser)
        check_aligned(model.encoders.encoded(both, model.shape[1:]) if model.encoders else both)
        plain, guided, half = how.bound(both, 1.0), how.bound(both), len(x) * how.n

        def denoise(x: Tensor, level: Level, /) -> Tensor:
            return torch.cat([plain(x, level)[:half], guided(x, level)[half:]])

        for s in self.strength:
            use = how.sampler() | {"strength": s}
            noise = how.rows(invert(how.bound(how.source, 1.0), z, model.schedule, **use))
            use |= {"cross": self.cross, "own": self.own}
            back, found = prompt_to_prompt(denoise, model.denoiser, noise, model.schedule, **use)
            off[f"round trip from {s:g}, rms"] = float((back - how.rows(z)).square().mean().sqrt())
            results |= how.columns("changed" if s == 1 else f"from {s:g}", how.out(found))
        return Edited({"original": x}, results, off)


@dataclass(frozen=True)
class FlowEdit:
    """The difference of the target's and the source's velocities, the mean over `average` draws of noise."""

    strength: tuple[float, ...] = (0.8,)
    average: int = 1
    paired: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_strengths(self.strength)
        require(self.average >= 1, "average", self.average, "a whole number >= 1")

    def __call__(self, how: How, x: Tensor, /) -> Edited:
        results, z = Columns(), how.rows(how.into(x))
        source, target = how.bound(_sources(how), 1.0), how.bound(how.target)
        for s in self.strength:
            use: dict[str, Any] = {"steps": how.steps or 50, "grid": how.grid, "average": self.average}
            found = flowedit(source, target, z, how.model.schedule, s, seed=how.seed, **use)
            results |= how.columns(f"strength {s:g}", how.out(found))
        return Edited({"original": x}, results, {})


def _restored(how: How, by: str, problem: Problem) -> Tensor:
    """One sample a row of the problem, in the denoiser's range."""
    if by not in RESTORERS:
        raise InputError(f"by = {by!r}: {one_of(by, RESTORERS)}")
    use = {k: v for k, v in how.sampler().items() if v is not None}
    # all operators here are linear
    method = DAPS(exact=True, prior_std=SPREAD * how.model.spectrum.std) if by == "daps" else RESTORERS[by]()
    return restore(
        how.denoiser,
        problem,
        how.model.schedule,
        method=method,
        cond=None if how.target is None else how.target.to(how.model.device),
        guidance=how.guidance,
        seed=how.seed,
        device=how.model.device,
        **use,
    )


@dataclass(frozen=True)
class _Restoration(ABC):
    """y = A(x0) + noise, where pictures are y, or, with `measure`, x0: these are measured first, and dB tell how near
    results are to them."""

    by: str = "mmps"
    noise: float = 0.0
    measure: bool = False
    paired: ClassVar[bool] = False

    @abstractmethod
    def operator(self, how: How) -> Operator:
        """A."""

    def __call__(self, how: How, x: Tensor, /) -> Edited:
        operator, measured = self.operator(how), dict[str, float]()
        before = {"original": x} if self.measure else {}
        noise = how.std(self.noise)
        z = how.into(x)
        if self.measure:
            shape = (len(x), *operator(z[:1]).shape[1:])
            problem = simulate(operator, z, noise, Noise(shape, seed_of(how.seed, 1))())
        else:
            problem = Problem(operator, z, noise, how.model.shape)
        found = how.out(_restored(how, self.by, problem.repeat(how.n)))
        if self.measure:
            measured["dB"] = float(psnr(found, how.rows(x), how.model).mean())
        return Edited({**before, "measured": self.shown(how, problem.y)}, how.columns("result", found), measured)

    def shown(self, how: How, y: Tensor) -> Tensor:
        """The measurement as a picture in the data's range."""
        return how.out(y)


@dataclass(frozen=True)
class SuperResolution(_Restoration):
    """Pictures `factor` times as large."""

    factor: int = 4

    def operator(self, how: How) -> Operator:
        if self.factor < 2 or any(n % self.factor for n in how.model.shape[1:]):
            raise InputError(f"super-resolution: factor {self.factor} must be >= 2 and divide {how.model.shape[1:]}")
        return Downsample(self.factor)


@dataclass(frozen=True)
class Deblur(_Restoration):
    """Pictures without the blur of a Gaussian of `blur` pixels."""

    blur: float = 1.5

    def operator(self, how: How) -> Operator:
        return Blur(self.blur)


@dataclass(frozen=True)
class RandomMask(_Restoration):
    """Pictures of which a random `share` of pixels is known."""

    share: float = 0.3

    def operator(self, how: How) -> Mask:
        return Mask(share=self.share, seed=how.seed)

    def shown(self, how: How, y: Tensor) -> Tensor:
        known = self.operator(how).known(y)
        return torch.where(known.cpu(), how.out(y), how.middle)


@dataclass(frozen=True)
class Colour(_Restoration):
    """Grey pictures in colour."""

    def operator(self, how: How) -> Operator:
        if how.model.shape[0] != 3 or how.model.scale is not None:
            raise InputError(
                f"colour needs a model of 3 channels in the pictures' own range, this has {how.model.shape}"
            )
        return Gray()


EDITS: dict[str, type[Any]] = {
    "img2img": ImageToImage,
    "inpaint": Inpaint,
    "invert": Invert,
    "prompt": PromptToPrompt,
    "flowedit": FlowEdit,
    "super-resolution": SuperResolution,
    "deblur": Deblur,
    "random-mask": RandomMask,
    "colour": Colour,
}


def settings(method: str) -> tuple[str, ...]:
    """The settings of a method of `EDITS`; InputError for another name."""
    if method not in EDITS:
        raise InputError(f"no method is called {method!r}: {one_of(method, EDITS)}")
    return tuple(field.name for field in dataclasses.fields(EDITS[method]))


def psnr(x: Tensor, to: Tensor, model: Model | None = None) -> Tensor:
    """(b,) 10 log10(range^2 / mean squared error) in dB, of pictures in [-1, 1] or in the data's range of a model.

    >>> psnr(torch.full((1, 1, 2, 2), 0.2), torch.zeros(1, 1, 2, 2)).round().tolist()
    [20.0]
    """
    scale = None if model is None else model.scale
    wide = 2.0 if scale is None else scale.high - scale.low
    return 10 * torch.log10(wide**2 / (x - to).square().flatten(1).mean(1))


def edit(
    model: Model,
    x: Tensor,
    method: Edit,
    *,
    target: Given | Cond | None = None,
    source: Given | Cond | None = None,
    n: int = 1,
    steps: int | None = None,
    solver: Solver | None = None,
    grid: Grid | None = None,
    guidance: Guidance | float | Mapping[str, float] | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Edited:
    """Pictures x (b, *shape) in the data's range (of a restoration: what was measured of them) edited `n` times each.

    `target` is the condition of the b * n results, `source` that of the b pictures, which `Invert`, `PromptToPrompt`
    and `FlowEdit` start from; both as `model.cond` and `model.given` make them. Result v of picture p is a function of
    seed, p * n + v and the picture, up to rounding by other batches. What is not given comes from the method or the
    model's configuration. `progress` sees the number of evaluations. InputError for a model of latents, for pictures
    and conditions that do not fit, and for what the method says.

    >>> import undiffuse
    >>> model = undiffuse.load("digits")
    >>> eights = model.sample(2, label=8, steps=5)
    >>> found = edit(model, eights, ImageToImage((0.3, 0.6)), target=model.cond(3, 2), steps=5)
    >>> {name: tuple(x.shape) for name, x in found.results.items()}
    {'strength 0.3': (2, 1, 8, 8), 'strength 0.6': (2, 1, 8, 8)}
    """
    if model.decode is not None:
        raise InputError("a model of latents edits latents: bring pictures there, and use undiffuse.restore")
    require(n >= 1, "n", n, "at least 1")
    if x.ndim != 1 + len(model.shape) or (x.shape[1] != model.shape[0] and not isinstance(method, Colour)):
        raise InputError(f"pictures of shape {tuple(x.shape)} for a model of {model.shape}: one row a picture is meant")
    for name, cond, rows in (("target", target, len(x) * n), ("source", source, len(x))):
        if cond is not None and len(cond) != rows:
            raise InputError(f"the {name} condition has {len(cond)} rows, {rows} were expected")
    if method.paired and target is None:
        raise InputError(
            f"{type(method).__name__} needs a target condition, what pictures shall become: --class or --text"
        )
    how = How(
        model,
        target,
        source,
        model.guide_of(target) if guidance is None else model.guide(guidance),
        solver,
        steps,
        grid or model.config.build("grid"),
        seed,
        n,
        model.denoiser if progress is None else _Told(model.denoiser, progress),
    )
    return method(how, x.float().cpu())


class _Told:
    """A model that tells of its calls."""

    def __init__(self, model: Any, progress: Callable[[int], None]) -> None:
        self.model, self.progress, self.calls = model, progress, 0

    def __call__(self, x: Tensor, level: Level, cond: Any = None) -> Tensor:
        self.calls += 1
        self.progress(self.calls)
        out: Tensor = self.model(x, level, cond)
        return out

    def reverse(self, *args: Any) -> Any:
        self.calls += 1
        return self.model.reverse(*args)


def read_pictures(model: Model, files: Sequence[str | Path], factor: int = 1, channels: int = 0) -> Tensor:
    """Pictures (b, *shape) in the data's range from files: of any size, which are brought to the model's as `data.size`
    does (the shorter side resized, the middle kept), or .npy of an array (*shape) or several (n, *shape), as they are.

    With `factor` sides are so many times smaller, and must be so already; `channels` are the model's, or others.
    InputError for files that are missing, cannot be read or do not fit.
    """
    shape = (channels or model.shape[0], *(n // factor for n in model.shape[1:]))
    return torch.cat([_read(Path(file).expanduser(), shape, factor == 1) for file in files])


def _read(path: Path, shape: tuple[int, ...], resize: bool) -> Tensor:
    if not path.is_file():
        raise InputError(f"{str(path)!r} is no file; expected a picture, or a .npy of an array")
    sides = "x".join(map(str, shape[1:]))
    try:
        if path.suffix.lower() == ".npy" or len(shape) != 3:
            array = np.asarray(stored(path, str(path)))
            if array.dtype.kind not in "biuf" or not array.size:
                raise InputError(f"{path} has an array of {array.dtype}, {array.shape}: expected numbers, {shape}")
            x = torch.from_numpy(array)
            x = x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()
            x = x[None] if x.ndim == len(shape) else x
            if x.ndim != 1 + len(shape) or tuple(x.shape[1:]) != shape:
                whole = "" if resize else "; whole pictures are measured first with --measure"
                raise InputError(f"{path} has an array {tuple(x.shape)}; expected {shape}, or several of them{whole}")
        elif resize and shape[1] == shape[2]:
            prepare = Prepare(size=shape[1], channels=shape[0] if shape[0] in (1, 3, 4) else 0)
            x = prepare(Raw(path, where=str(path)), 0, 0).x[None]
        else:
            x = torch.from_numpy(read_picture(path, shape[0]))[None]
    except Unreadable as error:
        raise InputError(str(error)) from error
    if tuple(x.shape[1:]) != shape:
        have = "x".join(map(str, x.shape[2:]))
        raise InputError(
            f"{path} is {have} in {x.shape[1]} channels; expected {sides} in {shape[0]}: "
            + ("resize it first" if resize else "resize it, or give --measure for whole pictures")
        )
    if not bool(x.isfinite().all()):
        raise InputError(f"{path} has NaN or infinite values")
    return x


def _white(path: Path, high: int, wide: int) -> Tensor:
    """How white each pixel of a picture of these sides is (1, 1, high, wide): a mean over areas of a larger one, whose
    middle it is where proportions differ."""
    try:
        x = with_channels(stored(path, str(path)), 1, str(path))
    except Unreadable as error:
        raise InputError(str(error)) from error
    size = cover(x.shape[1], x.shape[2], (high, wide))
    x = resized(x, size, Resampling.BOX)
    top, left = (size[0] - high) // 2, (size[1] - wide) // 2
    white = (to_float(x[:, top : top + high, left : left + wide]) + 1) / 2
    return torch.from_numpy(np.ascontiguousarray(white))[None].clamp(0, 1)


def read_mask(model: Model, word: str) -> Tensor:
    """What is known (1, 1, *sides) where a mask says what is made anew: a picture's file, in which that is white, or a
    box `left,top,right,bottom` in pixels of the samples. InputError for other words."""
    high, wide = model.shape[1:] if len(model.shape) == 3 else (0, 0)
    if not high:
        raise InputError(f"masks are for pictures, and this model makes {model.shape}")
    try:
        left, top, right, bottom = (int(part) for part in word.split(","))
    except ValueError:
        path = Path(word).expanduser()
        if not path.is_file():
            raise InputError(
                f"--mask {word!r} is no file and no box: give left,top,right,bottom in pixels, such as 4,4,20,20"
            ) from None
        return 1 - _white(path, high, wide)
    if not (0 <= left < right <= wide and 0 <= top < bottom <= high):
        raise InputError(f"--mask {word}: a box left,top,right,bottom must lie in 0,0,{wide},{high} and not be empty")
    known = torch.ones(1, 1, high, wide)
    known[..., top:bottom, left:right] = 0
    return known
