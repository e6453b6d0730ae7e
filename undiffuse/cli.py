"""The command line: demo, train, sample, edit, tune, evaluate, certify, plan, info.

Exit codes: 0 done, 1 failed check, 2 bad input, 75 try again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

import undiffuse
from undiffuse import bulk as bulk_module
from undiffuse import demo as demo_module
from undiffuse import evaluation, plot
from undiffuse.certify import Certificate
from undiffuse.certify import certify as measure
from undiffuse.classifier_model import ClassifierModel, holds_classifier
from undiffuse.cond import ENCODERS, in_turn
from undiffuse.config import DEFAULTS, KINDS, OF_DENOISERS, TRAINED, Config, fields, parse_overrides
from undiffuse.data.source import digest
from undiffuse.denoise import Counter
from undiffuse.edit import EDITS, Colour, SuperResolution, read_mask, read_pictures, settings
from undiffuse.edit import edit as edit_pictures
from undiffuse.evaluation import report
from undiffuse.evaluation.open import data_of_run, data_of_samples
from undiffuse.fit import check, fit
from undiffuse.guide import Guidance, prepared
from undiffuse.level import Level
from undiffuse.modal import read_plan
from undiffuse.model import Model
from undiffuse.nets import presets
from undiffuse.plans import Kept, check_plan, kept_plan, made_for, own, plan_for
from undiffuse.restore import RESTORERS
from undiffuse.runfolder import comes_along, find_run, nearest_run, run_folder, shipped
from undiffuse.train import Lost, NonFinite, Preempted, Processes, Signals, TrainState, out_of_memory
from undiffuse.tuning import tune_run
from undiffuse.types import InputError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Train, sample and inspect diffusion models. Settings are key=value words, e.g. net.width=96 solver=ddim.",
)
AverageOf = Annotated[
    float | None,
    typer.Option(
        "--ema",
        help="the average of the weights of this length, a share of the run above 0 and up to 0.2887, from a run with "
        "train.snapshots: 16 give 0.03 to 0.2 to within 5 %",
    ),
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="sample by a saved plan (a tableau) instead of solver, grid and steps")
]
Evaluations = Annotated[
    int | None,
    typer.Option("--nfe", help="by the sampler of so many evaluations that suits the model; sought once, then kept"),
]
ToldPictures = Annotated[list[str] | None, typer.Option(help="a picture's file; again: in turn")]
ToldDepths = Annotated[list[str] | None, typer.Option(help="a depth map: a picture, or a .npy; again: in turn")]
ToldLayouts = Annotated[
    list[str] | None, typer.Option(help="a mask of class numbers: a picture, or a .npy; again: in turn")
]
ToldSounds = Annotated[list[str] | None, typer.Option(help="a sound's file, such as a .wav; again: in turn")]
ToldOthers = Annotated[
    list[str] | None, typer.Option(help="NAME=VALUE for a condition of any other name; again: in turn")
]
Weights = Annotated[str | None, typer.Option(help="guidance weights of several conditions, such as depth=1.5,text=4")]
plans = typer.Typer(no_args_is_help=True, help="Saved samplers: tables of coefficients, as `sample --nfe` keeps them.")
app.add_typer(plans, name="plan")
Overrides = Annotated[list[str] | None, typer.Argument(help="settings as key=value; see `undiffuse info config`")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved configuration and stop")]
# typer carries its own copy of click in newer versions: take the class from what typer raises
UsageError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
console, notes = Console(highlight=False), Console(stderr=True)


class Bars:
    """Progress bars with time left, on stderr; nothing is shown before the first step, nor with `quiet`."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.tasks = quiet, dict[str, TaskID]()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
        )
        self.progress = Progress(*columns, console=notes)

    def move(self, what: str, step: int, total: int | None, note: str = "") -> None:
        """Set the bar named `what` to `step` of `total`, which may not be known."""
        if self.quiet:
            return
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=total, note=note)
            self.progress.start()
        self.progress.update(self.tasks[what], completed=step, total=total, note=note)

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self.tasks:
            self.progress.stop()


def _trainer(bars: Bars) -> Callable[[TrainState, int], None]:
    smooth: list[float] = []
    times: list[float] = []

    def on_step(state: TrainState, steps: int) -> None:
        smooth.append(state.loss)
        times.append(time.perf_counter())
        del smooth[:-50], times[:-50]
        speed = len(state.lam) * (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
        loss = f"loss {sum(smooth) / len(smooth):.4f}, gradient {state.grad_norm:.2f}"
        bars.move("training", state.step, steps, f"{loss}, {speed:.0f} samples/s" if speed else loss)

    return on_step


def _say(as_json: bool, data: dict[str, Any], text: str) -> None:
    if as_json:
        print(json.dumps(data))
    else:
        console.print(text, soft_wrap=True)


@app.command()
def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="the run folder; an earlier demo in it is replaced")] = Path("runs/demo"),
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Train on 1,000 real digits, sample, measure, and write samples.png, denoising.gif and report.html."""
    config = demo_module.configure([parse_overrides(overrides or [])], out)
    if dry_run:
        return _dry(config, as_json)
    if not as_json:
        console.print("Training a class-conditional U-Net on real handwritten digits (scikit-learn, 8x8 pixels)")
    with Bars(as_json) as bars:
        result = demo_module.demo(config, _trainer(bars), lambda i, n, name: bars.move("measuring", i, n, name))
    if as_json:
        print(json.dumps(result.json()))
    else:
        _show(result)


def _show(result: demo_module.Result) -> None:
    table = Table(title="Squared error of x0 on held-out digits", title_justify="left")
    for name in ("lam", "network", "best linear denoiser", "ratio"):
        table.add_column(name, justify="right")
    for lam, _, network, linear, ratio in result.level_rows():
        table.add_row(lam, network, linear, ratio)
    console.print(table)
    table = Table(title="Frechet / 1000 x kernel distance to held-out digits (pixels, w = 1)", title_justify="left")
    table.add_column("solver")
    for n in demo_module.STEPS:
        table.add_column(f"{n} steps", justify="right")
    for row in result.distance_rows():
        table.add_row(*row)
    console.print(table)
    for w, share in result.recognised.items():
        console.print(f"{100 * share:.1f} % of {result.samples:,} samples at w = {w:g} are read as their class")
    console.print(f"{100 * result.reader_accuracy:.1f} % of the real digits that the reader has not seen are")
    console.print(f"{1000 * result.seconds_per_image:.1f} ms per guided image at 20 steps")
    console.print(f"{result.train_seconds:.0f} s of training, {result.parameters:,} parameters")
    console.print(f"Open {(result.folder / 'report.html').resolve()}", soft_wrap=True)


def _dry(config: Config, as_json: bool) -> None:
    if as_json:
        print(json.dumps(config.values))
    else:
        print(config.toml(), end="")


@app.command()
def train(
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="a TOML file with settings; words win over it")] = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Train into the run folder `out`, or go on where that run stopped: the same command again.

    In several processes: `torchrun --nproc-per-node 2 -m undiffuse train ...` or `accelerate launch -m undiffuse ...`.
    """
    layers = [Config.read(config)] if config else []
    resolved = Config.resolve(*layers, parse_overrides(overrides or []))
    processes = Processes.start(resolved.section("engine").device)
    if dry_run:
        check(resolved, processes)
        processes.end()
        return _dry(resolved, as_json) if processes.main else None
    started = time.perf_counter()
    last: list[TrainState] = []
    first: list[int] = []
    with Bars(as_json or not processes.main) as bars:
        on_step = _trainer(bars)

        def keep(state: TrainState, steps: int) -> None:
            first.append(state.step) if not first else None
            last[:] = [state]
            on_step(state, steps)

        model, data, _ = fit(resolved, keep, processes=processes)
    processes.end()
    if not processes.main:
        return
    out, seconds = resolved.values["out"], time.perf_counter() - started
    seen = len(last[0].lam) * (last[0].step + 1 - first[0]) if last else 0
    facts = {"out": out, "parameters": model.parameters, "samples": len(data), "seconds": round(seconds, 1)}
    facts["processes"] = processes.world
    facts["steps_run"] = last[0].step + 1 - first[0] if last else 0
    facts["samples_per_second"] = round(seen / seconds, 1)
    many = f" by {processes.world} processes" if processes.world > 1 else ""
    ahead = f"Next: undiffuse {'info' if resolved.classifies else 'sample'} {out}"
    text = f"{model.parameters:,} parameters, {seen:,} samples in {seconds:.0f} s{many}. {ahead}"
    if isinstance(model, ClassifierModel):
        facts["scores"] = model.scores
        if not as_json:
            console.print(_scores(model))
    _say(as_json, facts, text if last else f"{out} is finished, no step was left. {ahead}")


def _scores(model: ClassifierModel) -> Table:
    """What a classifier makes of held-out data at each level."""
    table = Table(title="Held-out samples, at lam = log(alpha / sigma)", title_justify="left")
    for name in ("lam", "accuracy", "loss, nats", "of the prior alone", "calibration error"):
        table.add_column(name, justify="right")
    for row in model.scores:
        numbers = (f"{row[name]:.3f}" for name in ("accuracy", "loss", "prior", "ece"))
        table.add_row(f"{row['lam']:+g}", *numbers)
    return table


@app.command()
def sample(
    run: Annotated[str, typer.Argument(help="a run folder, its name in runs/, or digits, fashion or mnist, built in")],
    overrides: Overrides = None,
    label: Annotated[
        str | None,
        typer.Option("--label", "--class", help="a class: its name or number; several with commas; `each`: all"),
    ] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--text", help='a prompt, such as "a (red:1.3) car --no wheels"; again: in turn')
    ] = None,
    image: ToldPictures = None,
    depth: ToldDepths = None,
    segmentation: ToldLayouts = None,
    audio: ToldSounds = None,
    given: ToldOthers = None,
    weights: Weights = None,
    out: Annotated[
        Path | None, typer.Option(help="a .png (images) or .npy file, or a folder for shards; default RUN/samples/")
    ] = None,
    ema: AverageOf = None,
    number: Annotated[int | None, typer.Option("-n", help="how many; the same as sample.n")] = None,
    nfe: Evaluations = None,
    plan: PlanFile = None,
    shard: Annotated[int, typer.Option(help="samples per shard of a folder")] = 1000,
    form: Annotated[str, typer.Option("--format", help="shards of a folder: safetensors, or png (a .tar each)")] = (
        "safetensors"
    ),
    device: Annotated[str, typer.Option(help="for a folder: cpu, cuda or auto")] = "auto",
    threads: Annotated[int, typer.Option(help="for a folder: CPU threads of each process; bits may depend on it")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="for a folder: spread the shards with Ray Data")] = False,
    workers: Annotated[int | None, typer.Option(help="Ray's workers; default: one for each CPU or GPU")] = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Sample from a finished run, e.g. `undiffuse sample runs/digits --label each solver=ddim sample.steps=10`, or from
    a model that comes along: `undiffuse sample fashion --class sneaker -n 16`. With --nfe nothing else is to be chosen.
    A run with conditions by name: `undiffuse sample RUN --text "a red car" --depth map.png --weights depth=1.5,text=4`.

    Into a folder, as shards: `undiffuse sample runs/digits -n 50000 --label each --out shards/`. The same command goes
    on where it was stopped; torchrun, accelerate or --ray spread it, and the files are the same however it is done.
    """
    model = Model.load(run, ema)
    layer = parse_overrides(overrides or [])
    named = {"text": prompts, "image": image, "depth": depth, "segmentation": segmentation, "audio": audio}
    words = _words(named, given)
    if weights is not None:
        layer["guidance"] = _composed(weights, layer)
    n = _number(number, layer)
    if n is not None and isinstance(layer.setdefault("sample", {}), dict):
        layer["sample"]["n"] = n
    config = bulk_module.configure(model, layer)
    if nfe is not None or plan is not None:
        _no_more_than_a_plan(nfe, plan, layer)
    if dry_run:
        return _dry(config, as_json)
    read = _told(model, words, label)
    guide = _guided(model.using(config), read, layer)
    if out is not None and (out.is_dir() or not out.suffix):
        if nfe is not None and kept_plan(model, run, config, nfe, bool(read)) is None and not own(run_folder(run)):
            raise InputError(
                f"shards need a plan in a file, and {run} has none of {nfe} evaluations: make it with "
                f"`undiffuse tune {run} --nfe {nfe} --out FOLDER`, and give it as --plan"
            )
        kept = _planned(nfe, plan, model, run, config, bool(read), as_json)
        job = bulk_module.plan(
            model,
            run,
            out,
            label,
            settings=layer,
            shard=shard,
            format=form,
            device=device,
            threads=threads,
            table=None if kept is None else kept.path,
            words=words,
        )
        return _shards(job, model, "ray" if ray else "local", workers, as_json)
    if ray or workers is not None or (shard, form, device, threads) != (1000, "safetensors", "auto", 1):
        raise InputError(
            "--shard, --format, --device, --threads, --ray and --workers are for shards: give a folder as --out"
        )
    use = config.section("sample")
    told = in_turn(read, range(use.n)) if read else None
    kept = _planned(nfe, plan, model, run, config, bool(read), as_json)
    named_by = f"seed{use.seed}-{_slug(label, words)}-{_how(config, bool(read), nfe, plan)}"
    out = out or _own_folder(run, "samples") / f"{named_by}{'' if ema is None else f'-ema{ema:g}'}.png"
    if len(model.shape) != 3 and out.suffix == ".png":
        out = out.with_suffix(".npy")
    if out.suffix not in (".png", ".npy"):
        raise InputError(f"samples are written as .png or .npy, or into a folder as shards; got {out.name}")
    _writable(out)
    counter = Counter(model.denoiser)
    started = time.perf_counter()
    chunks = -(-use.n // use.batch)
    levels = config.build("grid")(config.build("schedule"), use.steps) if kept is None else ()
    total = chunks * (len(levels) - 1)
    with Bars(as_json) as bars:
        done: list[int] = []

        def on_state(state: Any) -> None:
            done.append(state.i)
            bars.move("sampling", len(done), total, f"{state.nfe} evaluations")

        x = model.using(config).sample(
            given=told, plan=None if kept is None else kept.plan, guidance=_Counted(guide, counter), progress=on_state
        )
    seconds = time.perf_counter() - started
    if not bool(torch.isfinite(x).all()):
        raise NonFinite(
            "the samples have NaN or infinite values and were not written: try another solver, grid or steps"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        turn = max(map(len, read), default=0)
        plot.save_png(model.shown(x), out, plot.columns_for(use.n, turn))
    else:
        np.save(out, x.numpy())
    facts: dict[str, Any] = {
        "file": str(out),
        "n": use.n,
        "nfe": counter.calls // chunks,
        "rows_per_sample": counter.rows / use.n,
        "seconds": round(seconds, 4),
        "seconds_per_sample": round(seconds / use.n, 6),
    }
    if kept is not None:
        facts["plan"] = {"name": kept.plan.name, "file": kept.path and str(kept.path)}
    if kept is not None and kept.choice is not None:
        facts["plan"]["rows"] = kept.choice.rows
        if not as_json:
            there = f"kept in {kept.path}" if kept.path else f"not kept: {run_folder(run)} is not written to"
            console.print(f"{kept.choice}\n{there}", soft_wrap=True)
    text = f"{out}: {use.n} samples, {facts['nfe']} evaluations, {facts['rows_per_sample']:g} network rows a sample, "
    _say(as_json, facts, text + f"{1000 * seconds / use.n:.1f} ms a sample")


@app.command()
def edit(
    run: Annotated[str, typer.Argument(help="a run folder, its name in runs/, or digits, fashion or mnist, built in")],
    pictures: Annotated[
        list[str], typer.Argument(help="files: pictures of any size, or .npy arrays; and settings as key=value")
    ],
    method: Annotated[str, typer.Option(help=f"how: {', '.join(EDITS)}")] = "img2img",
    strength: Annotated[
        list[float] | None, typer.Option(help="how much is made anew, above 0 and up to 1; again: one more column")
    ] = None,
    mask: Annotated[
        str | None, typer.Option(help="what is made anew: a picture's file, white there, or left,top,right,bottom")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help=f"inpaint: replacement, repaint or net; and in general: {', '.join(RESTORERS)}"),
    ] = None,
    times: Annotated[int | None, typer.Option(help="repaint: how often each part of the way is taken")] = None,
    jump: Annotated[int | None, typer.Option(help="repaint: the steps of a return")] = None,
    factor: Annotated[int | None, typer.Option(help="super-resolution: how many times as large")] = None,
    blur: Annotated[float | None, typer.Option(help="deblur: the std of the blur in pixels")] = None,
    share: Annotated[float | None, typer.Option(help="random-mask: the share of pixels that are known")] = None,
    noise: Annotated[float | None, typer.Option(help="restoration: the std of the noise in what was measured")] = None,
    measure: Annotated[
        bool | None, typer.Option("--measure", help="restoration: pictures are whole, measure them first and compare")
    ] = None,
    cross: Annotated[float | None, typer.Option(help="prompt: share of steps with the attention to words kept")] = None,
    own: Annotated[float | None, typer.Option(help="prompt: share of steps with the self-attention kept")] = None,
    average: Annotated[int | None, typer.Option(help="flowedit: draws of noise at each step")] = None,
    label: Annotated[
        str | None, typer.Option("--label", "--class", help="the class that pictures shall have; several: in turn")
    ] = None,
    from_label: Annotated[str | None, typer.Option("--from-label", "--from-class", help="the class they have")] = None,
    prompts: Annotated[list[str] | None, typer.Option("--text", help="what they shall show; again: in turn")] = None,
    from_text: Annotated[list[str] | None, typer.Option("--from-text", help="what they show; again: in turn")] = None,
    image: ToldPictures = None,
    depth: ToldDepths = None,
    segmentation: ToldLayouts = None,
    audio: ToldSounds = None,
    given: ToldOthers = None,
    from_given: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of what they are; again: in turn")] = None,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="a .png of before and after, or a .npy; default RUN/edits/")] = None,
    ema: AverageOf = None,
    number: Annotated[int | None, typer.Option("-n", help="results of each picture; the same as sample.n")] = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Edit pictures by a finished run: `undiffuse edit fashion shoe.png --strength 0.4 --strength 0.7 --class bag`.

    Other methods: `--method inpaint --mask 4,4,20,20`, `--method invert --from-class sneaker --class "ankle boot"`,
    `--method super-resolution --factor 4`, `--method deblur --blur 1.5 --noise 0.05`; see docs/editing.md.
    """
    model = Model.load(run, ema)
    files = [word for word in pictures if "=" not in word or Path(word).is_file()]
    layer = parse_overrides([word for word in pictures if word not in files])
    if not files:
        raise InputError("no picture was given: undiffuse edit RUN PICTURE, such as shoe.png or samples.npy")
    if weights is not None:
        layer["guidance"] = _composed(weights, layer)
    n = _number(number, layer)
    n = 1 if n is None else n
    config = bulk_module.configure(model, layer)
    options = {
        "strength": strength and tuple(strength), "mask": mask, "by": by, "times": times, "jump": jump,
        "factor": factor, "blur": blur, "share": share, "noise": noise, "measure": measure, "cross": cross,
        "own": own, "average": average,
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}
    how = _method(method, options, model)
    words = _words(
        {"text": prompts, "image": image, "depth": depth, "segmentation": segmentation, "audio": audio}, given
    )
    before = _words({"text": from_text}, from_given)
    told = [_told(model, each, name) for each, name in ((words, label), (before, from_label))]
    if told[1] and not how.paired:
        starting = ", ".join(name for name, kind in EDITS.items() if kind.paired)
        raise InputError(
            f"{method} does not ask what pictures are: --from-class, --from-text, --from-given are for {starting}"
        )
    if dry_run:
        return _dry(config, as_json)
    small = how.factor if isinstance(how, SuperResolution) and not how.measure else 1
    grey = 1 if isinstance(how, Colour) and not how.measure else 0
    x = read_pictures(model, files, small, grey)
    _guided(model.using(config), told[0], layer)
    target, source = (
        in_turn(read, range(rows)) if read else None for read, rows in zip(told, (len(x) * n, len(x)), strict=True)
    )
    asked = json.dumps([files, method, options, words, before, label, from_label, config.values["sample"]], default=str)
    where = f"{Path(files[0]).stem}-{method}-{digest(asked)[:6]}.png"
    out = out or _own_folder(run, "edits") / where
    out = out.with_suffix(".npy") if len(model.shape) != 3 and out.suffix == ".png" else out
    if out.suffix not in (".png", ".npy"):
        raise InputError(f"results are written as .png, with what was before, or as .npy; got {out.name}")
    if any(out.resolve() == Path(file).resolve() for file in files):
        raise InputError(f"--out {out} is the picture that is edited: give another file")
    _writable(out)
    started, calls = time.perf_counter(), [0]
    with Bars(as_json) as bars:

        def on_call(k: int) -> None:
            calls[0] = k
            bars.move("editing", k, None, "evaluations")

        found = _in_memory(
            edit_pictures,
            model.using(config),
            x,
            how,
            target=target,
            source=source,
            n=n,
            steps=config.section("sample").steps if "steps" in layer.get("sample", {}) else None,
            solver=config.build("solver") if "solver" in layer else None,
            seed=config.section("sample").seed,
            progress=on_call,
        )
    results = torch.stack(list(found.results.values()), 1)
    if not bool(torch.isfinite(results).all()):
        raise NonFinite("results have NaN or infinite values and were not written: try other steps, or another method")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        plot.save_sheet({k: model.shown(v) for k, v in {**found.before, **found.results}.items()}, out)
    else:
        np.save(out, results.flatten(0, 1).numpy())
    facts = {"file": str(out), "method": method, "pictures": len(x), "results": len(results) * results.shape[1]}
    facts |= {"evaluations": calls[0], "seconds": round(time.perf_counter() - started, 4), **found.measured}
    told_of = "".join(f", {name} {value:.4g}" for name, value in found.measured.items())
    many = f"{facts['results']} {'result' if facts['results'] == 1 else 'results'}"
    _say(as_json, facts, f"{out}: {many}, {calls[0]} evaluations, {facts['seconds']:.1f} s{told_of}")


def _in_memory(call: Callable[..., Any], *given: Any, **settings: Any) -> Any:
    """What a call gives; InputError where memory does not suffice."""
    try:
        return call(*given, **settings)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise InputError("so many results at once do not fit in memory: take fewer (-n), or fewer pictures") from error


def _method(name: str, options: dict[str, Any], model: Model) -> Any:
    """The method of `EDITS` with the options that were given; InputError for those of other methods."""
    own = ["mask" if field == "known" else field for field in settings(name)]
    for option in options:
        if option not in own:
            others = [k for k in EDITS if option in ("mask" if f == "known" else f for f in settings(k))]
            raise InputError(
                f"--{option} is for {', '.join(others)}; --method {name} takes {', '.join(f'--{k}' for k in own)}"
            )
    if options.keys() & {"times", "jump"} and options.get("by") != "repaint":
        raise InputError("--times and --jump are for --by repaint")
    if "mask" in own and "mask" not in options:
        raise InputError("inpaint needs --mask: what is made anew, a file with it in white, or left,top,right,bottom")
    if "mask" in options:
        options = {"known" if k == "mask" else k: read_mask(model, v) if k == "mask" else v for k, v in options.items()}
    return EDITS[name](**options)


def _told(model: Model, words: dict[str, list[str]], label: str | None) -> list[Any]:
    """The conditions in words and of --class, each read as a whole."""
    if label is not None and "label" in words:
        raise InputError("label is given by --label and by --given: give all its values by one of them")
    cycle = model.cycle(label)
    return model.words(words | ({"label": [str(k) for k in cycle]} if cycle else {}))


@app.command()
def tune(
    run: Annotated[str, typer.Argument(help="a run folder, its name in runs/, or digits, fashion or mnist, built in")],
    overrides: Overrides = None,
    nfe: Annotated[str, typer.Option(help="numbers of evaluations, with commas")] = "6",
    seconds: Annotated[float, typer.Option(help="of gradient steps for each number of evaluations")] = 120.0,
    unconditional: Annotated[
        bool, typer.Option("--unconditional", help="for samples without a label; else, where there are classes, with")
    ] = False,
    score: Annotated[
        bool, typer.Option("--score", help="then choose noise and guidance interval by distance to held-out data")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="where plans and report go; default: the run's own folder")] = None,
    ema: AverageOf = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Tune levels and coefficients of few evaluations for a run, e.g. `undiffuse tune runs/mine --nfe 4,6,8
    guidance.w=2`.

    Plans are kept as plan-NFE.safetensors, with labels plan-NFE-wW, which `undiffuse sample RUN --nfe NFE` takes: the
    sampler that was there stays where tuning does not beat it on noise that was not tuned on. Each is kept as soon as
    it is found; the same command again goes on from it. report.html in a folder beside compares them.
    """
    model = Model.load(run, ema)
    layer = parse_overrides(overrides or [])
    config = bulk_module.configure(model, layer)
    try:
        budgets = [int(word) for word in nfe.split(",")]
    except ValueError as error:
        raise InputError(f"--nfe must be whole numbers such as 4,6,8, got {nfe!r}") from error
    if dry_run:
        return _dry(config, as_json)
    if out is None and comes_along(run_folder(run)):
        out = _own_folder(run, "tuned")
    labels = model.conditional and not unconditional

    def tell(text: str) -> None:
        notes.print(text, soft_wrap=True, markup=False)

    found = tune_run(
        model, run, config, budgets, labels, seconds=seconds, score=score, out=out, progress=None if as_json else tell
    )
    kept = "".join(f"\n{n} evaluations: {path}" for n, path in found.plans.items())
    use = "" if found.page.is_relative_to(run_folder(run)) else f"\nuse: undiffuse sample {run} --plan FILE"
    _say(as_json, found.facts, f"{found.report.seconds:.0f} s; report: {found.page}{kept}{use}")


def _planned(
    nfe: int | None, plan: Path | None, model: Model, run: str | Path, config: Config, labels: bool, quiet: bool
) -> Kept | None:
    """The plan that --plan gives or --nfe asks for, which is sought with a bar where there is none; None for neither.

    InputError for a file that cannot be used here, and a word on one that was made for something else.
    """
    if plan is not None:
        if word := check_plan(plan, made_for(model, run, config, labels)):
            notes.print(f"warning: {word}", soft_wrap=True, markup=False)
        return Kept(read_plan(plan), plan, None)
    if nfe is None:
        return None
    with Bars(quiet) as bars:
        return plan_for(model, run, config, nfe, labels, lambda i, n: bars.move("choosing a sampler", i, n))


def _words(named: dict[str, list[str] | None], given: list[str] | None) -> dict[str, list[str]]:
    """The values of conditions by name, from the options called like them and from --given NAME=VALUE."""
    words = {name: list(each) for name, each in named.items() if each}
    for word in given or []:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise InputError(f"--given {word!r}: expected NAME=VALUE, such as style=picture.png")
        if named.get(name):
            raise InputError(f"{name} is given by --{name} and by --given: give all its values by one of them")
        words.setdefault(name, []).append(value)
    return words


def _composed(weights: str, layer: dict[str, Any]) -> dict[str, Any]:
    """The settings of guidance that NAME=WEIGHT words between commas mean; InputError beside other ones."""
    if "guidance" in layer:
        raise InputError("--weights has a guidance weight for each condition: leave out guidance, or --weights")
    pairs = [word.partition("=") for word in weights.split(",")]
    try:
        each = {name.strip(): float(w) for name, _, w in pairs}
    except ValueError as error:
        raise InputError(f"--weights {weights!r}: expected NAME=WEIGHT, such as depth=1.5,text=4") from error
    return {"kind": "composed", "names": list(each), "w": list(each.values())}


def _slug(label: str | None, words: dict[str, list[str]]) -> str:
    """What samples were given, in a file's name: the start of each condition, and a hash of all of them."""

    def plain(word: str) -> str:
        return re.sub(r"[^\w-]+", "_", word).strip("_")

    parts = [] if label is None else [plain(label)]
    parts += [f"{name}-{plain(Path(each[0]).name)[:32]}" for name, each in words.items()]
    parts += [digest(json.dumps(words))[:6]] if words else []
    return "-".join(parts) or "any"


def _own_folder(run: str | Path, what: str) -> Path:
    """Where a run's files go unless it is said; what comes with the package is not written to."""
    found = run_folder(run)
    return Path(what) / found.name if comes_along(found) else found / what


def _writable(file: Path) -> None:
    """InputError for a file that could not be written, before it is known what goes into it."""
    path = report.permitted(file)
    if path != file.absolute() and not path.is_dir():
        raise InputError(f"{file} cannot be written: {path} is a file, not a folder")


def _number(number: int | None, layer: dict[str, Any]) -> int | None:
    """How many samples -n or sample.n asks for; None where neither does."""
    given = layer.get("sample")
    asked = given.get("n") if isinstance(given, dict) else None
    if None not in (number, asked) and number != asked:
        raise InputError(f"-n {number} and sample.n={asked} differ: give one of them")
    return asked if number is None else number


def _how(config: Config, guided: bool, nfe: int | None, plan: Path | None) -> str:
    """What tells a sample's file from those of other settings."""
    if plan is not None:
        return plan.stem
    if nfe is not None:
        return f"nfe{nfe}{_weight(config, guided)}"
    values = config.values
    return f"{values['solver']['kind']}-{values['sample']['steps']}{_weight(config, guided)}"


def _weight(config: Config, guided: bool) -> str:
    values = config.values["guidance"]
    if not guided:
        return ""
    if values["kind"] not in ("cfg", "composed"):
        return f"-{values['kind']}-{digest(json.dumps(values, sort_keys=True))[:6]}"
    if "names" in values:
        return "".join(f"-w_{name}{w:g}" for name, w in zip(values["names"], values["w"], strict=True))
    return f"-w{values['w']:g}"


def _no_more_than_a_plan(nfe: int | None, plan: Path | None, layer: dict[str, Any]) -> None:
    """InputError where a plan is asked for together with what it takes the place of."""
    given: list[str] = [key for key in ("solver", "grid") if key in layer]
    given += ["schedule"] if plan is not None and "schedule" in layer else []
    given += ["sample.steps"] if "steps" in layer.get("sample", {}) else []
    if nfe is not None and plan is not None:
        raise InputError("--nfe chooses a plan and --plan gives one: leave one of them out")
    if given:
        raise InputError(f"a plan has its own solver and levels: leave out {', '.join(given)}, or --nfe and --plan")


def _guided(model: Model, read: list[Any], layer: dict[str, Any]) -> Guidance:
    """The configured guidance; InputError where it was asked for and cannot be bound: without a condition, or to others
    than there are."""
    told = in_turn(read, range(1)) if read else None
    guide = model.guide() if "guidance" in layer else model.guide_of(told)
    guide(model.denoiser, told)
    return guide


@dataclass
class _Counted:
    """A guidance that counts the rows that it asks the model for."""

    guide: Guidance
    counter: Counter

    def prepared(self, levels: Sequence[Level], rows: int) -> Guidance:
        return _Counted(prepared(self.guide, levels, rows), self.counter)

    def __call__(self, denoise: Any, cond: Any) -> Any:
        self.counter.model = denoise
        return self.guide(self.counter, cond)


def _shards(job: bulk_module.Job, model: Model, engine: str, workers: int | None, as_json: bool) -> None:
    """Do a bulk job; the first process alone tells of it."""
    main = _main_process()
    with Signals(at_once=True), Bars(as_json or not main) as bars:

        def move(there: float, n: int, rate: float) -> None:
            bars.move("sampling", int(there), n, f"{rate:.3g} samples/s")

        report = bulk_module.carry_out(job, model, engine=engine, workers=workers, progress=move)
    if not main:
        return
    for name in report.damaged:
        print(f"warning: made again: {name}", file=sys.stderr)
    text = f"{report.out}: {report.n:,} samples in {report.shards} shards, {report.written} new, {report.kept} kept, "
    speed = f", {report.samples_per_second:.4g} samples/s" if report.samples_per_second else ""
    _say(as_json, asdict(report), text + f"{report.remade} made again; {report.seconds:.1f} s{speed}")


def _numbers(words: str | None, option: str, kind: Callable[[str], Any]) -> tuple[Any, ...] | None:
    """The numbers of an option between commas; none for an empty one, None where it was not given."""
    if words is None:
        return None
    try:
        return tuple(kind(word) for word in words.split(",") if word.strip())
    except ValueError as error:
        raise InputError(f"{option} must be numbers such as 1,2, got {words!r}") from error


@app.command()
def evaluate(
    target: Annotated[
        str | None, typer.Argument(help="a run folder, its name in runs/, or samples: anything that data= takes")
    ] = None,
    overrides: Overrides = None,
    ema: AverageOf = None,
    number: Annotated[
        int | None, typer.Option("-n", help="samples; default: as many as are held out, at most 5,000")
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            help="with commas: auto, pca, pixels, digits, mnist, fashion-mnist, emoji, inception=FILE, "
            "transformers=FOLDER (CLIP, DINOv2)"
        ),
    ] = "auto",
    over_steps: Annotated[
        str | None, typer.Option(help="numbers of steps for the curve; empty: none; default 5,10,20,50")
    ] = None,
    over_w: Annotated[
        str | None, typer.Option(help="guidance weights for the curve; empty: none; default 1,1.5,2,3,5")
    ] = None,
    likelihood: Annotated[
        int | None, typer.Option(help="held-out samples for bits per dimension; 0: none; default 64")
    ] = None,
    nfe: Evaluations = None,
    plan: PlanFile = None,
    seed: Annotated[int, typer.Option(help="of metrics and likelihoods; that of samples is sample.seed")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="a folder; default RUN/evaluations/SOLVER-STEPS-W-..., named by all settings")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="two folders or evaluation.json files, nothing is sampled")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "auto",
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Score a run, or samples of any origin, against real data: `undiffuse evaluate runs/digits`, or
    `undiffuse evaluate samples/ data=digits`. Settings are those of sampling, such as solver=ddim sample.steps=10.

    Every score has its 95 % interval and its floor, what real samples score; evaluation.json says what it depends on,
    and --compare refuses scores that were measured differently. In several processes: torchrun -m undiffuse evaluate.
    """
    if compare is not None:
        if target is not None or overrides:
            raise InputError("--compare takes two finished evaluations and nothing else: does a pattern match several?")
        return _compared(compare, as_json)
    if target is None or not target.strip():
        raise InputError("evaluate needs a run folder or samples, such as `undiffuse evaluate runs/digits`")
    layer = parse_overrides(overrides or [])
    n = _number(number, layer) or 0
    steps, ws = _numbers(over_steps, "--over-steps", int), _numbers(over_w, "--over-w", float)
    choices = evaluation.Choices(n, features, steps, ws, likelihood, seed)
    run = find_run(target)
    if run is None:
        if not Path(target).exists() and not re.search(r"://|[*{]", target):
            todo = f"train one with `undiffuse train out=runs/{Path(target).name or 'NAME'}`"
            raise InputError(
                f"{target!r} is neither a run folder, nor the name of one in runs/, nor samples: "
                + f"{nearest_run(target)} {todo}".lstrip()
            )
        if plan is not None or nfe is not None or dry_run or ema is not None:
            raise InputError("--nfe, --plan, --ema and --dry-run are for runs: these samples are made by now")
        folder = out if out is not None else Path(f"{Path(target.rstrip('/')).stem}-evaluation")
        report.writable(folder)
        processes = Processes.start(device)
        samples, train, held_out = data_of_samples(target, layer, n)
        with _not_kept(), Bars(as_json or not processes.main) as bars:
            found = evaluation.evaluate_samples(
                samples, train, held_out, choices, processes=processes, progress=_stages(bars)
            )
        processes.end()
        if processes.main:
            _evaluated(found, folder, as_json)
        return
    model = Model.load(run, ema)
    config = bulk_module.configure(model, layer)
    if dry_run:
        return _dry(config, as_json)
    if nfe is not None or plan is not None:
        _no_more_than_a_plan(nfe, plan, layer)
    kept = _planned(nfe, plan, model, run, config, model.conditional, as_json)
    table, name = None if kept is None else kept.plan, _how(config, model.conditional, nfe, plan)
    settings = [*(config.values[key] for key in bulk_module.SETTINGS), asdict(choices), str(plan), ema]
    settings += [] if nfe is None else [nfe]
    folder = out if out is not None else _own_folder(run, "evaluations") / f"{name}-{digest(json.dumps(settings))[:6]}"
    report.writable(folder)
    processes = Processes.start(device)
    train, held_out = data_of_run(model.config, run, n)
    model.denoiser.to(processes.device)
    values = config.values["train"]
    with _not_kept(), Bars(as_json or not processes.main) as bars:
        found = evaluation.evaluate(
            model.using(config), train, held_out, choices, plan=table, processes=processes, progress=_stages(bars),
            weights=f"average ({model.average}) after {values['steps']:,} steps", run=str(run),
        )  # fmt: skip
    processes.end()
    if processes.main:
        _evaluated(found, folder, as_json)


@contextlib.contextmanager
def _not_kept() -> Iterator[None]:
    """Around what has nothing to go on from when it is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted; an evaluation keeps nothing: start it again", 130))


def _stages(bars: Bars) -> Callable[[str, int, int], None]:
    return lambda what, done, n: bars.move(what, done, n)


def _evaluated(found: evaluation.Evaluation, folder: Path, as_json: bool) -> None:
    """Write an evaluation and show it."""
    page = evaluation.write(found, folder)
    if as_json:
        return print(json.dumps({"folder": str(folder), **found.json()}))
    groups = {f"features: {name}": scores for name, scores in found.scores.items()}
    for title, scores in {**groups, "as asked": found.adherence, "copies": found.memory}.items():
        if scores:
            table = Table(title=title, title_justify="left")
            for name in report.HEADER:
                table.add_column(name)
            for row in report.rows_of(scores):
                table.add_row(*row)
            console.print(table)
    for name in report.LIKELIHOODS:
        if name in found.likelihood:
            part = found.likelihood[name]
            error = (part["high"] - part["low"]) / 2
            console.print(f"{part['title']}: {part['value']:.4f} ± {error:.4f} {part['note']}", soft_wrap=True)
    for text in found.warnings:
        console.print(f"warning: {text}", soft_wrap=True)
    console.print(f"Open {page.resolve()}", soft_wrap=True)


def _compared(paths: tuple[Path, Path], as_json: bool) -> None:
    """Set two evaluations beside each other."""
    found = evaluation.compare(*(evaluation.read(path) for path in paths))
    if as_json:
        rows = [row._asdict() for row in found.rows]
        different = {where: list(pair) for where, pair in found.differences.items()}
        return print(json.dumps({"scores": rows, "left_out": found.left_out, "differences": different}))
    for where, (a, b) in found.differences.items():
        console.print(f"{where}: {a} | {b}", soft_wrap=True)
    table = Table(title=f"a = {paths[0]}, b = {paths[1]}", title_justify="left")
    for i, name in enumerate(("", "score", "a", "b", "better")):
        table.add_column(name, justify="right" if i in (2, 3) else "left")
    for row in found.rows:
        verdict = {"neither": "not told apart"}.get(row.verdict, row.verdict)
        table.add_row(row.group, row.name, report.number(row.a), report.number(row.b), verdict)
    console.print(table)
    for name, why in found.left_out.items():
        console.print(f"not compared: {name}: {why}", soft_wrap=True)


@plans.command()
def show(
    file: Annotated[Path, typer.Argument(help="a plan, such as RUN/plan-6.safetensors")],
    digits: Annotated[int, typer.Option(min=1, help="decimals")] = 4,
) -> None:
    """Print a saved plan: every evaluation's level, and the coefficients of the point at which it is made."""
    console.print(read_plan(file).show(digits), soft_wrap=True)


@app.command()
def info(
    what: Annotated[
        str | None, typer.Argument(help="a run folder, `config` for all settings, or `net` for sizes")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what there is: solvers, schedules, heads, grids; all settings; or a run folder."""
    if what == "config":
        _dry(Config.resolve(), as_json)
        if not as_json:
            print("\n# kinds and their settings")
            for family, kinds in {**KINDS, "cond.NAME": ENCODERS}.items():
                for name, kind in kinds.items():
                    settings = {k: d for k, (_, d) in fields(kind).items()}
                    shown = ", ".join(f"{k}={'?' if d is ... else d}" for k, d in settings.items())
                    print(f"# {family}={name}" + (f"  ({shown})" if shown else ""))
            print(f"# kind={' or '.join(TRAINED)}: a classifier of noisy data has no {', '.join(OF_DENOISERS)}")
        return
    if what == "net":
        return _presets(as_json)
    if what is not None and holds_classifier(what):
        reader = ClassifierModel.load(what)
        facts = {
            "run": what,
            "kind": "classifier",
            "parameters": reader.parameters,
            "classes": reader.classes,
            "shape": list(reader.shape),
            "data_std": round(reader.spectrum.std, 4),
            "steps": reader.config.values["train"]["steps"],
        }
        if not as_json:
            console.print(_scores(reader))
        return _say(
            as_json,
            facts | ({"scores": reader.scores} if as_json else {}),
            "\n".join(f"{k:>11}: {v}" for k, v in facts.items()),
        )
    if what is not None:
        model = Model.load(what)
        facts = {
            "run": what,
            "parameters": model.parameters,
            "classes": model.classes,
            "shape": list(model.shape),
            "data_std": round(model.spectrum.std, 4),
            "steps": model.config.values["train"]["steps"],
        }
        facts |= {f"cond.{name}": repr(e) for name, e in model.encoders.encoders.items()} if model.encoders else {}
        return _say(as_json, facts, "\n".join(f"{k:>11}: {v}" for k, v in facts.items()))
    solvers = {
        name: {"order": kind().global_order, "calls_per_step": kind().calls, "class": getattr(kind, "__name__", name)}
        for name, kind in KINDS["solver"].items()
    }
    others = {family: sorted(kinds) for family, kinds in KINDS.items() if family != "solver"}
    others |= {"encoders": sorted(ENCODERS), "models": list(shipped())}
    if as_json:
        print(json.dumps({"version": undiffuse.__version__, "torch": torch.__version__, "solver": solvers, **others}))
        return
    table = Table(title=f"undiffuse {undiffuse.__version__}, torch {torch.__version__}", title_justify="left")
    for name in ("solver", "order", "evaluations a step"):
        table.add_column(name)
    for name, facts in solvers.items():
        table.add_row(name, str(facts["order"]), str(facts["calls_per_step"]))
    console.print(table)
    for family, names in others.items():
        console.print(f"{family}: {', '.join(names)}")


def _presets(as_json: bool) -> None:
    """Networks of usual sizes, with what a sample of theirs costs; 4 bytes an activation, none recomputed."""
    with Bars(as_json) as bars:
        found = []
        for row in presets.rows():
            found.append(row)
            bars.move("counting", len(found), len(presets.PRESETS), row["name"])
    if as_json:
        return print(json.dumps(found))
    table = Table(title="A sample's forward pass, and what it keeps for the backward pass", title_justify="left")
    for name in ("", "of", "M parameters", "GFLOP", "MB"):
        table.add_column(name, justify="right" if len(table.columns) > 1 else "left")
    for row in found:
        sides, numbers = "x".join(map(str, row["shape"])), (row["parameters"] / 1e6, row["flops"] / 1e9)
        table.add_row(row["name"], sides, *(f"{n:.3g}" for n in (*numbers, row["activations"] / 2**20)))
    console.print(table)
    for row in found:
        console.print(f"{row['name']}: {row['words']}", soft_wrap=True)


@app.command()
def certify(
    overrides: Overrides = None,
    std: Annotated[str, typer.Option(help="stds of the data, comma-separated")] = "1,0.5,0.25,0.1,0.05",
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Measure solvers on exact denoisers: their order, their tableau, and the std that they give to data of each std.

    All solvers on the configured schedule, grid and steps, or one: `undiffuse certify solver=unipc sample.steps=8`.
    Exit code 1 if one is not what it promises.
    """
    layer = parse_overrides(overrides or [])
    for key in layer:
        if key in DEFAULTS and key not in ("sample", "solver", "grid", "schedule"):
            raise InputError(f"certify needs no {key}: it takes solver, schedule, grid and sample.steps")
    config = Config.resolve(layer)
    if dry_run:
        return _dry(config, as_json)
    try:
        stds = tuple(float(word) for word in std.split(","))
    except ValueError as error:
        raise InputError(f"--std must be numbers such as 1,0.25, got {std!r}") from error
    levels = config.build("grid")(config.build("schedule"), config.section("sample").steps)
    name = config.values["solver"]["kind"]
    solvers = {name: config.build("solver")} if "solver" in layer else {n: k() for n, k in KINDS["solver"].items()}
    found: list[Certificate] = []
    with Bars(as_json) as bars:
        for i, (name, solver) in enumerate(solvers.items()):
            found.append(measure(name, solver, levels, stds))
            bars.move("certifying", i + 1, len(solvers), name)
    failed = [c.name for c in found if not c.holds]
    if as_json:
        print(
            json.dumps({"stds": stds, "failed": failed, "solvers": [c._asdict() | {"holds": c.holds} for c in found]})
        )
    else:
        steps, kind = config.values["sample"]["steps"], config.values["grid"]["kind"]
        _certificates(found, stds, f"{config.values['schedule']['kind']}, {kind}, {steps} steps")
    if failed:
        raise typer.Exit(1)


def _certificates(found: list[Certificate], stds: tuple[float, ...], where: str) -> None:
    rows = [["solver", "order", "measured", "calls", *(f"{s:g}" for s in stds), ""]]
    for c in found:
        kept = [f"{k:.3f}" for k in c.kept] if c.kept else ["-"] * len(stds)
        order = f"{c.order}{' *' if c.noise else '  '}"
        rows.append([c.name, order, f"{c.measured:.2f}", str(c.calls), *kept, "ok" if c.holds else "FAILS"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines += [
        f"The last columns, on {where}: the std given to Gaussian data of that std,",
        "over it; 1 is right, less is blur. Exact, from the tableau: no network, no samples.",
        "measured: the order on a mixture's probability flow from lam = -0.5 to 1; * with noise:",
        "that of the output's std, where more than promised is fine, and 0 does not converge;",
        "of `adaptive`, the digits of error for digits of tolerance, to within 1.",
    ]
    console.print("\n".join(lines), soft_wrap=True)


GOES_ON = "the same command goes on where this one stopped"


def main() -> None:
    """Entry point: user's mistakes become one line and an exit code, never a traceback."""
    warnings.showwarning, threading.excepthook = _warn, _thread_failed
    try:
        code = app(standalone_mode=False)
        if code == 130:
            code = _fail(f"interrupted; {GOES_ON}", 130)
    except InputError as error:
        code = _fail(str(error), 2)
    except UsageError as error:
        code = _fail(str(error.format_message()), 2)  # type: ignore[attr-defined]
    except NonFinite as error:
        code = _everywhere(str(error), 1)
    except (Preempted, Lost) as error:
        code = _everywhere(f"{error}; {GOES_ON}", 75)
    except (typer.Abort, KeyboardInterrupt):
        code = _fail(f"interrupted; {GOES_ON}", 130)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            code = _fail(f"the disk is full ({error.filename or 'while writing'}): free space and run it again", 75)
        else:
            code = _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 2)
    sys.exit(code if isinstance(code, int) else 0)


def _warn(message: object, *_: object, **__: object) -> None:
    if _main_process():
        _line(f"warning: {message}")


def _line(text: str) -> None:
    """A line on stderr in one write, so that what a thread says at the same time does not run into it."""
    sys.stderr.write(f"{text}\n")


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """A tracker that writes in the background may find the disk full as well: a line, not a traceback."""
    if isinstance(failed.exc_value, OSError):
        _warn(f"what is written in the background failed: {failed.exc_value}")
    else:
        threading.__excepthook__(failed)


def _everywhere(message: str, code: int) -> int:
    """Fail with what happens in all processes of a run: the main one says it."""
    return _fail(message, code) if _main_process() else code


def _main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _fail(message: str, code: int) -> int:
    where = "" if _main_process() else f" (process {os.environ['RANK']})"
    _line(f"error{where}: {message}")
    return code
