"""`Model`: a trained denoiser with all that sampling needs, and its folder in a run."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from undiffuse.classifier_model import ClassifierModel
from undiffuse.classify import Classifier
from undiffuse.cond import Cond, Conditioned, Encoders, Given, Label, in_turn, prompt
from undiffuse.conditions import told, value_of, whole
from undiffuse.config import Config
from undiffuse.data import Data, Statistics
from undiffuse.denoise import Denoiser
from undiffuse.grid import Grid
from undiffuse.guide import CFG, GUIDES, Guidance, guide_of
from undiffuse.modal import Modal
from undiffuse.runfolder import average_file, comes_along, fingerprint, finished, run_folder, take_average
from undiffuse.sample import State, sample
from undiffuse.schedule import Schedule
from undiffuse.solvers import Solver
from undiffuse.spectrum import Spectrum
from undiffuse.tableau import Tableau
from undiffuse.train import commit, load_weights, weights
from undiffuse.tune import Choice, Report, Result, auto, ladder
from undiffuse.types import Denoise, InputError, Plan, did_you_mean


@functools.lru_cache(maxsize=4)
def _loaded(load: Callable[..., Any], run: str, known_by: str, *how: Any) -> Any:
    return load(run, *how)


def _once(load: Callable[..., Any], run: str, *how: Any) -> Any:
    """What `load` reads of a run: once, however often guidance asks for it, until the run is trained again."""
    folder = run_folder(run).resolve()
    return _loaded(load, str(folder), fingerprint(folder) if (folder / "model").is_dir() else "", *how)


@dataclass(frozen=True, eq=False)
class Model:
    """A denoiser (averaged weights, eval mode), the schedule it was trained on, its number of classes (0: none), the
    data's spectrum, its configuration, the classes' `names`, and the channels' `scale` where data were normalised.
    `decode`, of a model of latents, makes samples of the data's kind from them; `ema` is the length of the average,
    where one was rebuilt. `shown_with` are held-out conditions of a model that has them by name: those that samplers
    are chosen and tuned for. `folder` is the run that it was loaded from."""

    denoiser: Denoiser
    schedule: Schedule
    classes: int
    spectrum: Spectrum
    config: Config
    names: tuple[str, ...] = ()
    scale: Statistics | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    ema: float | None = None
    shown_with: Given | None = None
    folder: Path | None = None

    def __repr__(self) -> str:
        told = f"{self.classes} classes" if self.encoders is None else f"told {', '.join(self.encoders.encoders)}"
        return f"Model({self.parameters:,} parameters, shape {self.shape}, {told})"

    @property
    def module(self) -> Denoiser:
        """What is trained."""
        return self.denoiser

    def having(self, module: Any) -> Model:
        """The same with another denoiser."""
        return replace(self, denoiser=module)

    @property
    def average(self) -> str:
        """Whose weights the denoiser has, in words."""
        if self.ema is not None:
            return f"power, length {self.ema:g}, rebuilt"
        return ", ".join(f"{name} {value}" for name, value in self.config.values["ema"].items()).removeprefix("kind ")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.spectrum.shape

    @property
    def device(self) -> torch.device:
        """Where the denoiser's parameters are; the CPU for one without any."""
        first = next(self.denoiser.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def parameters(self) -> int:
        """The number of the network's parameters."""
        return sum(p.numel() for p in self.denoiser.parameters())

    @property
    def encoders(self) -> Encoders | None:
        """The encoders of the network's conditions, for one that has them by name."""
        net = getattr(self.denoiser, "net", None)
        return net.encoders if isinstance(net, Conditioned) else None

    def given(self, n: int, values: Mapping[str, Any]) -> Given:
        """The conditions of n samples by name: a list has one value a sample, all else is one value for all of them.

        Texts are prompts with weights and `--no` (see `undiffuse.prompt`), labels may be classes' names. InputError for
        a model without such conditions, and for lists of other lengths.
        """
        if self.encoders is None:
            raise InputError(f"this model has no conditions by name, and {', '.join(values)} was given")
        every = {}
        for name, value in values.items():
            each = list(value) if isinstance(value, list | tuple) else [value] * n
            if len(each) != n:
                raise InputError(f"{len(each)} values of {name} for {n} samples: give a list of {n}, or one value")
            read = self.number if name == "label" and self.classes else prompt
            every[name] = [read(v) if isinstance(v, str) else v for v in each]
        given: Given = self.encoders(**every)
        return given

    @property
    def conditional(self) -> bool:
        """Whether samples can be given conditions."""
        return bool(self.classes) or self.encoders is not None

    def told(self, data: Data) -> Cond | Given | None:
        """The conditions that belong to samples: `Data.cond`, or their labels of a model with classes.

        InputError where this model has conditions by name, and the data were read without.
        """
        return told(data, self.classes, self.encoders)

    def examples(self, indices: Sequence[int]) -> Cond | Given:
        """Conditions of samples with these numbers: all classes in turn, or the held-out conditions that are kept with
        the model. InputError for a model without any."""
        if self.encoders is None:
            self._needs_classes()
            return self.cond([k % self.classes for k in indices], len(indices))  # type: ignore[return-value]
        if self.shown_with is None:
            raise InputError("no held-out conditions are kept with this model: a trained run's folder has them")
        return in_turn([self.shown_with], indices)

    def words(self, words: Mapping[str, Sequence[str]]) -> list[Given | Cond]:
        """The conditions in words, by name, each read as a whole: what `in_turn` gives samples of. Texts are prompts,
        labels classes, maps and sounds files (see `undiffuse.conditions.value_of`); none without words.

        InputError for conditions that this model does not have, and for values that cannot be read.
        """
        words = {name: each for name, each in words.items() if each}
        if not words:
            return []
        if self.encoders is None:
            if set(words) == {"label"}:
                cycle = self.cycle(",".join(words["label"]))
                return [self.cond(cycle, len(cycle))]  # type: ignore[list-item]
            others = ", ".join(name for name in words if name != "label")
            raise InputError(f"{others} was given, and this model knows {'classes only' if self.classes else 'none'}")
        known = self.encoders.encoders
        for name in words:
            if name not in known:
                there = f"{did_you_mean(name, list(known))} it has {', '.join(known)} (--given NAME=VALUE gives any)"
                raise InputError(f"this model has no condition {name!r}: {there.lstrip()}")
        parts: list[Given | Cond] = []
        for name, each in words.items():
            classes = name == "label" and self.classes > 0
            every = [str(k) for k in self.cycle(",".join(each))] if classes else each
            read = [value_of(name, known[name], word, self.number if classes else whole) for word in every]
            # as a whole, so that sequences have one length, and a sample its bits, whichever are sampled with it
            parts.append(self.given(len(read), {name: read}))
        return parts

    def number(self, name: str) -> int:
        """The label of a class by its name, in small letters or capitals, or number; InputError names the classes."""
        self._needs_classes()
        same = [known for known in self.names if known.casefold() == name.casefold()]
        name = name if name in self.names or len(same) != 1 else same[0]
        known = ", ".join(self.names[:10]) + (f" and {len(self.names) - 10} more" if len(self.names) > 10 else "")
        numbers = f"0 ... {self.classes - 1}"
        if name in self.names:
            return self.names.index(name)
        try:
            number = int(name)
        except ValueError as error:
            classes = f"{did_you_mean(name, self.names)} this model knows the classes {known or numbers}".lstrip()
            raise InputError(f"no class is named {name!r}: {classes}" + (f", or {numbers}" if known else "")) from error
        if not 0 <= number < self.classes:
            raise InputError(f"label {number} is out of range: this model knows the classes {numbers}")
        return number

    def cycle(self, label: str | None) -> tuple[int, ...]:
        """The classes that samples have in turn: of words between commas, which are names, numbers, or `each` for all
        classes; () without a label. InputError for other words, and for a model without classes."""
        if label is None:
            return ()
        self._needs_classes()
        whole = label.casefold() in (name.casefold() for name in self.names)
        words = [label] if whole else [word.strip() for word in label.split(",")]
        every = range(self.classes)
        return tuple(k for word in words for k in (every if word == "each" else (self.number(word),)))

    def _needs_classes(self) -> None:
        if not self.classes:
            raise InputError("this model was trained without labels: leave `label` out")

    def using(self, config: Config) -> Model:
        """The same model, sampled as another configuration says."""
        return replace(self, config=config, schedule=config.build("schedule"))

    def restore(self, x: Tensor) -> Tensor:
        """Samples of the denoiser in the data's own range, decoded where they are latents."""
        x = x if self.scale is None else self.scale.restore(x)
        return x if self.decode is None else self.decode(x)

    def shown(self, x: Tensor) -> Tensor:
        """Samples as pictures in [-1, 1]: as they are, or, of normalised data beyond it, from the data's range."""
        if self.scale is None or (self.scale.low >= -1 and self.scale.high <= 1):
            return x
        low, high = self.scale.low, self.scale.high
        return (x - low) * (2 / (high - low)) - 1

    def cond(self, label: int | str | Sequence[int] | Tensor | None, n: int) -> Cond | Given | None:
        """The condition of n samples: one label (or class name) for all, or n labels; InputError if there is none."""
        if label is None:
            return None
        self._needs_classes()
        labels = torch.as_tensor(self.number(label) if isinstance(label, str) else label)
        labels = labels.expand(n) if labels.ndim == 0 else labels
        if labels.shape != (n,):
            raise InputError(f"{len(labels)} labels for {n} samples: give one label, or one a sample")
        return Label(self.classes)(labels) if self.encoders is None else self.encoders(label=labels)

    def sample(
        self,
        n: int | None = None,
        label: int | str | Sequence[int] | Tensor | None = None,
        *,
        steps: int | None = None,
        solver: Solver | None = None,
        grid: Grid | None = None,
        plan: Plan | None = None,
        guidance: Guidance | float | Mapping[str, float] | None = None,
        given: Mapping[str, Any] | Given | Cond | None = None,
        schedule: Schedule | None = None,
        seed: int | None = None,
        first: int = 0,
        batch: int | None = None,
        rows: int | None = None,
        progress: Callable[[State], None] | None = None,
    ) -> Tensor:
        """n samples (n, *shape) in the data's range; what is not given comes from the configuration.

        `label` conditions (None: unconditional, guidance off), or conditions by name as `given` reads them: `given=
        {"text": "a (red:1.3) car --no wheels", "depth": depth}, guidance={"depth": 1.5, "text": 4}`, or n rows of
        conditions that were read before. `plan` takes the place of schedule, steps, solver and grid; see
        `undiffuse.sample` for the rest.
        """
        use = self.config.section("sample")
        n = use.n if n is None else n
        if label is not None and given:
            raise InputError('give the label among the other conditions: given={"label": ...}')
        if isinstance(given, Mapping):
            given = {name: value for name, value in given.items() if value is not None}
            given = self.given(n, given) if given else None
        cond = self.cond(label, n) if given is None else given
        if isinstance(cond, Given) and self.encoders is not None:
            cond = self._ahead(self.encoders, cond.to(self.device), use.rows if rows is None else rows)
        guide = self.guide_of(cond) if guidance is None else self.guide(guidance)
        if plan is None:
            solver, grid = solver or self.config.build("solver"), grid or self.config.build("grid")
        x = sample(
            self.denoiser,
            (n, *self.shape),
            schedule or self.schedule,
            steps=use.steps if steps is None else steps,
            solver=solver,
            grid=grid,
            plan=plan,
            cond=cond,
            guidance=guide,
            seed=use.seed if seed is None else seed,
            first=first,
            batch=use.batch if batch is None else batch,
            rows=use.rows if rows is None else rows,
            progress=progress,
            device=self.device,
        )
        return self.restore(x)

    def guide(self, guidance: Guidance | float | Mapping[str, float] | None = None) -> Guidance:
        """A guidance, or that of the configuration, with the other networks that it asks: those of runs that it names.

        InputError where there is no such run."""
        guide: Guidance = self.config.build("guidance") if guidance is None else guide_of(guidance)
        found: Callable[[Model], Guidance] | None = getattr(guide, "found", None)
        return guide if found is None else found(self)

    def guide_of(self, cond: Any) -> Guidance:
        """The configured guidance of samples with this condition; without one, none but a kind that needs none."""
        kind = GUIDES[self.config.values["guidance"]["kind"]]
        return self.guide() if cond is not None or getattr(kind, "unconditional", False) else CFG()

    def weaker(self, run: str, ema: float, until: float) -> Denoiser:
        """The denoiser of a run (of "" this one) as it was after the share `until` of its training, with the average of
        length `ema`, or of its own; InputError where it has no such snapshot."""
        if not run and self.folder is None:
            raise InputError(
                "this model is of no run folder, whose snapshots an earlier average is made of: name a run"
            )
        weak: Model = _once(Model.load, run or str(self.folder), ema or None, until)
        return weak.denoiser.to(self.device)

    def classifier(self, run: str) -> Classifier:
        """The classifier of noisy data in a run; InputError where there is none, or one of other data or classes."""
        if not run:
            raise InputError("which classifier: guidance.run=RUN, a run that `undiffuse train kind=classifier` made")
        found: ClassifierModel = _once(ClassifierModel.load, run)
        own, its = (self.shape, self.classes, self.scale), (found.shape, found.classes, found.scale)
        if own != its:
            raise InputError(
                f"the classifier in {run} reads samples of {its[0]} in {its[1]} classes, this model makes "
                f"{own[0]} in {own[1]}: train it with the same data settings"
            )
        return found.classifier.to(self.device)

    @torch.no_grad()
    def _ahead(self, encoders: Encoders, given: Given, rows: int) -> Given:
        """The conditions encoded once, by calls of `rows` rows each, if any, as the network's are (see `FixedRows`)."""
        if not rows:
            return encoders.ahead(given, self.shape[1:])
        index = torch.arange(-(-len(given) // rows) * rows).clamp(max=len(given) - 1)
        parts = [encoders.ahead(given[index[i : i + rows]], self.shape[1:]) for i in range(0, len(index), rows)]
        return Given.cat(parts)[: len(given)]

    def auto(
        self,
        nfe: int,
        *,
        guidance: Guidance | float | None = None,
        noises: int = 32,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Choice:
        """The sampler of `nfe` evaluations that suits this model best: `model.sample(plan=model.auto(6).plan)`.

        Without `guidance` it is chosen for unconditional samples, with it (a weight, 1 being conditional and unguided,
        or a guidance) for `examples`. See `undiffuse.auto` for how, what it costs, and `noises`.
        """
        cond = None if guidance is None or not noises else self.examples(range(noises))
        return auto(
            self.denoiser,
            self.shape,
            self.schedule,
            nfe,
            spectrum=self.spectrum,
            noises=noises,
            cond=cond,
            guidance=CFG() if guidance is None else self.guide(guidance),
            seed=seed,
            batch=self.config.section("sample").batch,
            device=self.device,
            progress=progress,
        )

    def tune(
        self,
        nfe: Sequence[int],
        *,
        guidance: Guidance | float | None = None,
        first: Callable[[int], Tableau | Modal] | None = None,
        seconds: float = 120.0,
        seed: int = 0,
        progress: Callable[[int, Result], None] | None = None,
    ) -> Report:
        """Levels and coefficients tuned for this model, `seconds` for each number of evaluations: `results[6].plan`.

        Guidance is as in `auto`, whose choice (or that of `first`) a plan must beat on noise that it was not tuned on.
        See `undiffuse.tune.ladder`. Raises InputError for bad budgets.
        """
        if guidance is not None:
            self.examples(())

        def bind(indices: Sequence[int]) -> Denoise:
            return self._bound(None if guidance is None else self.examples(indices), guidance)

        return ladder(
            bind,
            self.shape,
            self.schedule,
            nfe,
            self.spectrum,
            first=first or (lambda n: self.auto(n, guidance=guidance, seed=seed).plan),
            seconds=seconds,
            seed=seed,
            dtype=torch.float32,
            device=self.device,
            progress=progress,
        )

    def bind(self, label: int | Sequence[int] | Tensor | None, n: int, guidance: Guidance | float = 1.0) -> Denoise:
        """The denoiser for n samples with label and guidance bound: what `trajectory` and `Tableau.run` take."""
        return self._bound(self.cond(label, n), guidance)

    def _bound(self, cond: Cond | Given | None, guidance: Guidance | float | None) -> Denoise:
        if cond is None or guidance is None:
            return CFG()(self.denoiser, None)
        return self.guide(guidance)(self.denoiser, cond.to(self.device))

    def save(self, folder: Path) -> None:
        """Write a model folder: complete, with hashes, or not at all."""

        def write(aside: Path) -> None:
            (aside / "config.toml").write_text(self.config.toml())
            about = {"classes": self.classes, "shape": self.shape, "names": self.names}
            scale = {} if self.scale is None else {"scale": json.loads(self.scale.to_json())}
            told = {} if self.encoders is None else {"conditions": self.encoders.settings()}
            (aside / "model.json").write_text(json.dumps({**about, **scale, **told}))
            save_file(weights(self.denoiser), aside / average_file(self.config))
            self.spectrum.save(aside / "spectrum.safetensors")
            if self.shown_with is not None:
                save_file(self.shown_with.tensors(), aside / "conditions.safetensors")

        commit(folder, write)

    @staticmethod
    def load(run: str | Path, ema: float | None = None, until: float = 1.0) -> Model:
        """The finished model of a run folder, or of a name (see `find_run`), verified against its hashes.

        `ema` takes the weights' average of that length instead, a share of the run in (0, 0.2887], rebuilt from its
        snapshots (train.snapshots; see `Snapshots` for the lengths that they give), and `until` < 1 the average as it
        was at the nearest snapshot to that share of the training. InputError says what is wrong with the folder or the
        length.
        """
        found, folder = finished(run)
        try:
            config = Config.resolve(Config.read(folder / "config.toml"))
            if config.classifies:
                raise InputError(
                    f"{run} holds a classifier, which guides samples of other runs and has none of its own: "
                    "`undiffuse info` shows it, and undiffuse.ClassifierModel.load reads it"
                )
            about = json.loads((folder / "model.json").read_text())
            spectrum = Spectrum.load(folder / "spectrum.safetensors")
            scale = Statistics.from_json(json.dumps(about["scale"])) if "scale" in about else None
            encoders = Encoders.of(about["conditions"]) if "conditions" in about else None
            model = assemble(config, spectrum, int(about["classes"]), encoders)
            model = replace(model, names=tuple(str(name) for name in about.get("names", ())), scale=scale)
            if (folder / "conditions.safetensors").is_file() and encoders is not None:
                kept = Given.of(load_file(folder / "conditions.safetensors"), encoders.alone)
                model = replace(model, shown_with=kept)
            (average,) = folder.glob("ema-*.safetensors")
            load_weights(model.denoiser, average)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{folder} holds a model that does not fit its configuration: {error}") from error
        if ema is not None or until < 1:
            if comes_along(found):
                raise InputError(
                    f"{found.name} comes along with one set of weights, the average {model.average}: others are made "
                    "of a run's snapshots (train.snapshots=16)"
                )
            ema = take_average(model.denoiser, found, config, ema, until)
            model = replace(model, ema=ema)
        model = replace(model, folder=found)
        model.denoiser.eval().requires_grad_(False)
        return model


def assemble(config: Config, spectrum: Spectrum, classes: int, encoders: Encoders | None = None) -> Model:
    """An untrained model for data of this spectrum (its shape and sigma_data) and number of classes.

    With `encoders` its conditions are theirs; `classes` are then those of the one called label.
    """
    channels, *size = spectrum.shape
    learned = config.build("variance").learned
    net = config.build(
        "net",
        channels=channels,
        dims=len(size),
        **({"vector": classes} if encoders is None else encoders.widths),
        augment=config.build("augment").dim,
        learned_variance=learned,
    )
    if encoders is not None:
        net = Conditioned(net, encoders)
    return Model(Denoiser(net, config.build("head"), learned), config.build("schedule"), classes, spectrum, config)
