"""`bulk`: many samples as shards in a folder, by any number of processes or on Ray; the same bytes however it is done.

A job's folder holds `job.json` (what decides the samples), `shard-000012.safetensors` (or `.tar`) with its sidecar
`shard-000012.json`, which appears after the shard is durable, and when all are there `ledger.jsonl` and
`manifest.json`. A shard counts if its sidecar's size and SHA-256 hold, so the same command makes only what is missing
or damaged.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import io
import itertools
import json
import logging
import os
import re
import signal
import socket
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save as serialise
from torch import Tensor

from undiffuse import plot
from undiffuse.config import Config
from undiffuse.model import Model
from undiffuse.sample import State
from undiffuse.train import NonFinite, same_settings
from undiffuse.types import InputError

SETTINGS = ("schedule", "solver", "grid", "guidance", "sample")  # what a job may set; the rest was fixed by training
FORMATS = {"safetensors": ".safetensors", "png": ".tar"}
MISSING = "missing"
JOB, LEDGER, MANIFEST = "job.json", "ledger.jsonl", "manifest.json"
_SHARD = re.compile(r"shard-(\d{6,})\.(json|safetensors|tar)")
_ASIDE = re.compile(r"\.(?:shard-\d{6,}|job|ledger|manifest)\.\w+\.(.+)\.(\d+)\.tmp")
Progress = Callable[[float, int, float], None]  # samples that are there, of how many, and made each second


class Failed(RuntimeError):
    """Another process of the job failed; its message says why."""


class Stopped(BaseException):
    """SIGTERM: what is finished stays, and the same command makes the rest."""


@dataclass(frozen=True)
class Job:
    """What decides the samples (`identity`), and where they come from and go to; plain data, so it can be sent.

    `labels` is the cycle of classes: sample k has labels[k % len(labels)]; empty, it is unconditional.
    """

    run: Path
    out: Path
    model: str
    values: dict[str, Any]
    labels: tuple[int, ...]
    classes: int
    shard: int
    format: str
    device: str
    threads: int

    @property
    def n(self) -> int:
        """The number of samples."""
        return int(self.values["sample"]["n"])

    @property
    def shards(self) -> int:
        """The number of shards."""
        return -(-self.n // self.shard)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings on which the bytes depend; `sample.batch` and guidance without labels are none of them."""
        every = self.labels == tuple(range(self.classes))
        labels = "each" if every else ",".join(map(str, self.labels))
        settings = {k: self.values[k] for k in ("schedule", "solver", "grid")}
        settings["sample"] = {k: v for k, v in self.values["sample"].items() if k in ("n", "steps", "seed", "rows")}
        settings |= {"label": labels, "guidance": self.values["guidance"]} if self.labels else {"label": None}
        fixed = {"shard": self.shard, "format": self.format, "device": self.device, "threads": self.threads}
        return {"model": self.model, **settings, **fixed}

    def path(self, index: int) -> Path:
        """The file of a shard."""
        return self.out / f"shard-{index:06d}{FORMATS[self.format]}"

    def sidecar(self, index: int) -> Path:
        """The file that appears once the shard's is durable."""
        return self.out / f"shard-{index:06d}.json"

    def span(self, index: int) -> range:
        """The numbers of a shard's samples."""
        return range(index * self.shard, min(self.n, (index + 1) * self.shard))


@dataclass(frozen=True)
class Report:
    """What a job did: shards made for the first time, found sound, and made again, with the seconds that it took."""

    out: str
    n: int
    shards: int
    written: int
    kept: int
    remade: int
    damaged: tuple[str, ...]
    seconds: float
    samples_per_second: float


def label_cycle(label: str | None, classes: int) -> tuple[int, ...]:
    """The classes that samples have in turn, from "3", "0,1,2" or "each" (all); () without a label.

    Raises InputError for other words, for classes out of range, and for labels of a model without classes.

    >>> label_cycle("each", 3), label_cycle("2,0", 3), label_cycle(None, 3)
    ((0, 1, 2), (2, 0), ())
    """
    if label is None:
        return ()
    if not classes:
        raise InputError(f"--label {label} needs a model with classes; this one was trained without labels")
    if label == "each":
        return tuple(range(classes))
    try:
        words = tuple(int(word) for word in label.split(","))
    except ValueError as error:
        raise InputError(f"--label must be whole numbers such as 3 or 0,1,2, or `each`; got {label!r}") from error
    for word in words:
        if not 0 <= word < classes:
            raise InputError(f"label {word} is out of range: this model knows the classes 0 ... {classes - 1}")
    return words


def plan(
    model: Model,
    run: str | Path,
    out: str | Path,
    label: str | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    shard: int = 1000,
    format: str = "safetensors",
    device: str = "auto",
    threads: int = 1,
) -> Job:
    """The job of these settings, checked; nothing is written. Raises InputError for settings that cannot be."""
    for key in settings or {}:
        if key not in SETTINGS:
            raise InputError(f"{key} was fixed when the run was trained; sampling takes {', '.join(SETTINGS)}")
    config = Config.resolve(model.config.values, settings or {})
    values, use = config.values, config.section("sample")
    config.build("grid")(config.build("schedule"), use.steps)  # not every grid has every number of steps
    cuda = torch.cuda.is_available()
    device = ("cuda" if cuda else "cpu") if device == "auto" else device
    if shard < 1 or threads < 1:
        raise InputError(f"a shard needs >= 1 samples and a process >= 1 threads, got {shard} and {threads}")
    if use.rows < 1:
        raise InputError("sample.rows=0 would make samples depend on the batch: shards need sample.rows >= 1")
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}: shards are written as {' or '.join(FORMATS)}")
    if format == "png" and (len(model.shape) != 3 or model.shape[0] not in (1, 3)):
        raise InputError(f"png needs images of 1 or 3 channels, samples have shape {model.shape}: use safetensors")
    if device not in ("cpu", "cuda") or (device == "cuda" and not cuda):
        raise InputError(f"device {device!r} is not to be had here: give {'cpu or cuda' if cuda else 'cpu'}")
    kept = {key: values[key] for key in SETTINGS}
    where = Path(run).resolve(), Path(out).resolve()
    labels = label_cycle(label, model.classes)
    return Job(*where, _fingerprint(run), kept, labels, model.classes, shard, format, device, threads)


def _fingerprint(run: str | Path) -> str:
    """The hash of a finished model's hashes."""
    manifest = json.loads((Path(run) / "model" / MANIFEST).read_text())
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write(path: Path, data: bytes, replace: bool = True) -> None:
    """Make a file whole, durable and under its name at once, or not at all; the disk's errors name it.

    Without `replace` a file that is there already stays as it is.
    """
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        if replace or not _link(aside, path):
            aside.replace(path)
        _flush(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


def _link(aside: Path, path: Path) -> bool:
    """Give a file a second name unless that name is taken; False where the file system has no links."""
    try:
        os.link(aside, path)
    except FileExistsError:
        return True
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise
    return True


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(value: Any, indent: int | None = None) -> bytes:
    return (json.dumps(value, indent=indent) + "\n").encode()


def _gone(process: int) -> bool:
    if process == os.getpid():  # in a container every command may have this number
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


def _sweep(out: Path) -> None:
    """Remove what killed processes left half-written: of this machine those that are gone, of others after a day."""
    for path in out.glob(".*.tmp"):
        if match := _ASIDE.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):
                here = match[1] == socket.gethostname()
                if _gone(int(match[2])) if here else time.time() - path.stat().st_mtime > 86_400:
                    path.unlink()


def _inspect(job: Job) -> None:
    """InputError if the folder has files of others, or belongs to a job with other settings; nothing is written."""
    if job.out.exists() and not job.out.is_dir():
        raise InputError(f"{job.out} is a file: shards go into a folder of their own, give another --out")
    about = job.out / JOB
    for path in sorted(job.out.iterdir()) if job.out.is_dir() else ():
        ours = (_SHARD.fullmatch(path.name) or path.name in (JOB, LEDGER, MANIFEST)) and path.is_file()
        if not path.name.startswith(".") and not (ours and about.exists()):
            raise InputError(
                f"{job.out} has {path.name}, which is no file of a sampling job: give an empty or new folder as --out, "
                "or move that file away"
            )
    if not about.exists():
        return
    _compare(job)
    _sweep(job.out)
    for path in sorted(job.out.iterdir()):  # only now is the number of shards known to be right
        match = _SHARD.fullmatch(path.name)
        index = int(match[1]) if match else 0
        if match and (index >= job.shards or path not in (job.path(index), job.sidecar(index))):
            raise InputError(f"{path} is no shard of this job, which has {job.shards}: move that file away")


def _compare(job: Job) -> None:
    """InputError naming the settings in which the folder's job differs from this one."""
    about = job.out / JOB
    try:
        known = dict(json.loads(about.read_text())["identity"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{about} is damaged: whose shards these are is unknown, give another --out") from error
    same_settings(known, json.loads(json.dumps(job.identity)), job.out)


def _claim(job: Job) -> None:
    """Make the folder this job's before its first shard; InputError if another job was faster."""
    about = job.out / JOB
    if not about.exists():
        job.out.mkdir(parents=True, exist_ok=True)
        made_by = {"undiffuse": version("undiffuse"), "torch": torch.__version__}
        _write(about, _json({"identity": job.identity, "made_by": made_by}, 1), replace=False)
    _compare(job)


def _facts(job: Job, index: int) -> dict[str, Any] | None:
    """What a shard's sidecar says; None if there is none. Raises ValueError if it is damaged."""
    try:
        facts: dict[str, Any] = json.loads(job.sidecar(index).read_bytes())
    except FileNotFoundError:
        return None
    span = job.span(index)
    expected = {"file": job.path(index).name, "first": span.start, "n": len(span)}
    good = isinstance(facts, dict) and expected.items() <= facts.items() and {"sha256", "bytes"} <= facts.keys()
    if not good:
        raise ValueError("its sidecar is not of this job")
    return facts


def _trouble(job: Job, index: int) -> str | None:
    """MISSING, what is wrong with a shard, or None if it is sound."""
    try:
        facts = _facts(job, index)
        if facts is None:
            return MISSING
        path = job.path(index)
        if not path.is_file():
            return "the file is gone"
        if path.stat().st_size != facts["bytes"]:
            return f"{path.stat().st_size} bytes instead of {facts['bytes']}"
        with open(path, "rb") as f:
            same = hashlib.file_digest(f, "sha256").hexdigest() == facts["sha256"]
        return None if same else "its SHA-256 is another"
    except ValueError as error:
        return str(error)


def _tar(x: Tensor, labels: Tensor | None, first: int) -> bytes:
    """Images (k, c, h, w) as PNGs named by sample number, each with its label as .cls, as WebDataset reads them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i, pixels in enumerate(plot.to_uint8(x)):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            files = {"png": png.getvalue()} | ({} if labels is None else {"cls": str(int(labels[i])).encode()})
            for suffix, data in files.items():
                about = tarfile.TarInfo(f"{first + i:09d}.{suffix}")  # time 0 and owner 0: the same bytes every time
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))
    return buffer.getvalue()


class Maker:
    """Makes shards of a job: the model is loaded once, here, and put on `device` (default: the job's)."""

    def __init__(self, job: Job, model: Model | None = None, device: str | None = None) -> None:
        model = model or Model.load(job.run)
        if _fingerprint(job.run) != job.model:
            raise InputError(f"{job.run} was trained again since the job began: run the command again")
        torch.set_num_threads(job.threads)  # results may depend on it
        config = Config.resolve(model.config.values, job.values)
        model.denoiser.to(device or job.device)
        schedule, use = config.build("schedule"), config.section("sample")
        self.job, self.model = job, replace(model, config=config, schedule=schedule)
        self.steps = len(config.build("grid")(schedule, use.steps)) - 1

    def make(self, index: int, count: _Count | None = None) -> bool:
        """Make a shard, unless it is sound by now; whether it was made. Raises NonFinite for NaN and infinite values.

        Samples are the same for every order, batch and number of processes: each depends on the seed and its number.
        """
        job, span = self.job, self.job.span(index)
        if _trouble(job, index) is None:  # another command was faster, or a lost block is tried again
            if count is not None:
                count.at(index, 1)
            return False
        labels = torch.tensor([job.labels[k % len(job.labels)] for k in span]) if job.labels else None
        x = self.model.sample(len(span), labels, first=span.start, progress=self._steps(index, count))
        x = x.cpu().contiguous()
        bad = ~torch.isfinite(x.flatten(1)).all(1)
        if bool(bad.any()):
            raise NonFinite(
                f"{int(bad.sum())} samples have NaN or infinite values, the first is {span[int(bad.nonzero()[0])]}, "
                f"and shard {index} was not written: try another solver, grid or steps"
            )
        if job.format == "png":
            data = _tar(x, labels, span.start)
        else:
            data = serialise({"x": x} if labels is None else {"x": x, "label": labels})
        _claim(job)
        _write(job.path(index), data)
        digest = hashlib.sha256(data).hexdigest()
        facts = {"file": job.path(index).name, "first": span.start, "n": len(span)}
        _write(job.sidecar(index), _json({**facts, "bytes": len(data), "sha256": digest}))
        if count is not None:
            count.at(index, 1)
        return True

    def _steps(self, index: int, count: _Count | None) -> Callable[[State], None] | None:
        """What counts a shard's solver steps, of all its batches."""
        if count is None:
            return None
        batches = -(-len(self.job.span(index)) // self.job.values["sample"]["batch"])
        seen = itertools.count(1)
        return lambda _: count.at(index, 0.999 * next(seen) / (batches * self.steps))


class _Count:
    """How many samples are there by now and at what rate; other processes are taken to be as fast as this one."""

    def __init__(self, job: Job, todo: Sequence[int], processes: int, progress: Progress | None) -> None:
        self.job, self.progress, self.processes = job, progress, processes
        self.kept, self.most = job.n - sum(len(job.span(i)) for i in todo), sum(len(job.span(i)) for i in todo)
        self.done, self.started = 0.0, time.perf_counter()

    def at(self, shard: int, share: float) -> None:
        """Say that a share of a shard is there besides the finished ones; a share of 1 finishes it."""
        size = len(self.job.span(shard)) * share
        if share == 1:
            self.done += size
        if self.progress is not None:
            drawn = min(self.most, (self.done + (share < 1) * size) * self.processes)
            self.progress(self.kept + drawn, self.job.n, drawn / (time.perf_counter() - self.started))


@dataclass(frozen=True)
class _Group:
    """The processes of a job: this one's number, how many, its device, and how all tell each other a value."""

    rank: int
    size: int
    device: str
    gather: Callable[[Any], list[Any]]

    def together(self, work: Callable[[], Any], at_once: bool = False) -> list[Any]:
        """Every process's result of its `work`, once all have theirs.

        If it fails in one, that one raises its error and the others `Failed`. With `at_once` the error does not wait
        for the others where a launcher is there to end them.
        """
        value, error = None, None
        try:
            value = work()
        except Exception as raised:
            if at_once and "TORCHELASTIC_RUN_ID" in os.environ:
                raise
            error = raised
        heard = self.gather((value, None if error is None else str(error) or repr(error)))
        if error is not None:
            raise error
        for number, (_, trouble) in enumerate(heard):
            if trouble is not None:
                raise Failed(f"process {number} failed: {trouble}")
        return [value for value, _ in heard]


def rank() -> int:
    """The number of this process among those that torchrun or accelerate started; 0 if it is alone."""
    return int(os.environ.get("RANK", "0")) if _size() > 1 else 0


def _size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def _gather(value: Any) -> list[Any]:
    """Every process's value; raises Failed if one of them ended."""
    from accelerate.utils import gather_object

    try:
        waiting = torch.distributed.barrier(async_op=True)
        while not waiting.is_completed():  # rather than in wait(), where no signal is heard
            time.sleep(0.02)
        waiting.wait()
        return list(gather_object([value]))
    except RuntimeError as error:  # the backends raise nothing more particular
        raise Failed(f"another process ended or cannot be reached: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def _group(device: str) -> Iterator[_Group]:
    """The group that the environment names, or this process alone."""
    if _size() == 1:
        yield _Group(0, 1, device, lambda value: [value])
        return
    from accelerate import PartialState

    # a process that is done waits for the slowest, which may take hours
    state = PartialState(cpu=device == "cpu", timeout=timedelta(days=30))
    own = "cpu" if device == "cpu" else str(state.device)
    yield _Group(state.process_index, state.num_processes, own, _gather)
    state.destroy_process_group()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` at SIGTERM in the main thread; in other threads nothing changes."""

    def stop(*_: object) -> None:
        raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def bulk(
    run: str | Path,
    out: str | Path,
    n: int | None = None,
    label: str | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    shard: int = 1000,
    format: str = "safetensors",
    device: str = "auto",
    threads: int = 1,
    engine: str = "local",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """n samples of a finished run as shards of `shard` samples in the folder `out`; the same call again completes it.

    Files hold x (k, *shape) float32 and label (k,), or PNGs (`format="png"`). `label` is a class, several in turn as
    "0,1,2", or "each"; `settings` such as {"solver": "ddim", "sample": {"steps": 10}} win over the run's. Under
    torchrun or `accelerate launch` the processes share the work; `engine="ray"` spreads it over `workers` actors of
    Ray Data (default: one for each CPU or GPU). Sample k is bit-equal for all of these, on one kind of device with
    `threads` threads a process. Raises InputError for settings that cannot be and for folders that are not this job's,
    NonFinite for samples that are not finite, Failed if another process failed, OSError for a full disk.
    """
    model = Model.load(run)
    settings = dict(settings or {})
    if n is not None:
        settings["sample"] = {**settings.get("sample", {}), "n": n}
    job = plan(model, run, out, label, settings=settings, shard=shard, format=format, device=device, threads=threads)
    return carry_out(job, model, engine=engine, workers=workers, progress=progress)


def carry_out(
    job: Job,
    model: Model | None = None,
    *,
    engine: str = "local",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Do what is left of a job, see `bulk`; `model` is the run's, if it is loaded, and moves to the job's device."""
    if engine not in ("local", "ray"):
        raise InputError(f"unknown engine {engine!r}: local or ray")
    if workers is not None and (workers < 1 or engine != "ray"):
        raise InputError(f"workers are Ray's, and at least 1; got {workers} with engine {engine}")
    if engine == "ray" and _size() > 1:
        raise InputError("Ray spreads the work by itself: leave torchrun or accelerate out, or leave out --ray")
    started, threads = time.perf_counter(), torch.get_num_threads()
    try:
        with _group(job.device) as group:
            found, made = _complete(job, model, group, engine, workers, progress)
    finally:
        torch.set_num_threads(threads)
    seconds = time.perf_counter() - started
    damaged = {index: trouble for index, trouble in found.items() if trouble != MISSING}
    remade, drawn = len(damaged.keys() & set(made)), sum(len(job.span(index)) for index in made)
    return Report(
        out=str(job.out),
        n=job.n,
        shards=job.shards,
        written=len(made) - remade,
        kept=job.shards - len(made),
        remade=remade,
        damaged=tuple(f"{job.path(index).name}: {damaged[index]}" for index in sorted(damaged)),
        seconds=round(seconds, 3),
        samples_per_second=round(drawn / seconds, 3),
    )


def _complete(
    job: Job, model: Model | None, group: _Group, engine: str, workers: int | None, progress: Progress | None
) -> tuple[dict[int, str], list[int]]:
    """What was wrong with which shards, and those that this group made."""

    def search() -> dict[int, str]:
        numbers = range(group.rank, job.shards, group.size)
        return {index: trouble for index in numbers if (trouble := _trouble(job, index)) is not None}

    def make() -> list[int]:
        mine = todo[group.rank :: group.size]
        count = _Count(job, todo, group.size, progress)
        if engine == "ray" and mine:
            return _on_ray(job, mine, workers, count)
        maker = Maker(job, model, group.device) if mine else None
        return [index for index in mine if maker is not None and maker.make(index, count)]

    group.together(lambda: _inspect(job) if group.rank == 0 else None)
    found = {index: trouble for part in group.together(search) for index, trouble in part.items()}
    todo = sorted(found)
    made = sorted({index for part in group.together(make, at_once=True) for index in part})
    group.together(lambda: _finish(job) if group.rank == 0 else None)
    return found, made


def _finish(job: Job) -> None:
    """Write the ledger, a line for each shard, and the manifest, by which `undiffuse.train.verify` knows every file."""
    lines, listed = [], dict[str, dict[str, Any]]()

    def enter(path: Path, data: bytes) -> None:
        listed[path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    enter(job.out / JOB, (job.out / JOB).read_bytes())
    for index in range(job.shards):
        facts = None
        with contextlib.suppress(ValueError):
            facts = _facts(job, index)
        if facts is None:
            raise Failed(f"{job.path(index)} was changed while the job ran: run the command again")
        listed[facts["file"]] = {"bytes": facts["bytes"], "sha256": facts["sha256"]}
        enter(job.sidecar(index), job.sidecar(index).read_bytes())
        lines.append(_json(facts))
    ledger = b"".join(lines)
    enter(job.out / LEDGER, ledger)
    for name, data in ((LEDGER, ledger), (MANIFEST, _json(listed, 1))):
        path = job.out / name
        if not path.is_file() or path.read_bytes() != data:
            _write(path, data)
    _sweep(job.out)


class _Actor:
    """A `Maker` in a process of Ray's; a shard's error is told as data, since Ray would try it again or hide it."""

    def __init__(self, job: Job) -> None:
        self.maker = Maker(job)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {**row, "made": self.maker.make(int(row["index"])), "error": "", "number": 0}
        except Exception as error:
            number = error.errno if isinstance(error, OSError) else 0
            text = f"{type(error).__name__}: {error}"
            return {**row, "made": False, "error": text, "number": number or 0}


def _on_ray(job: Job, todo: Sequence[int], workers: int | None, count: _Count) -> list[int]:
    """Make these shards by actors of Ray Data: on the cluster at hand (RAY_ADDRESS), or one of this machine."""
    try:
        ray: Any = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError as error:
        raise InputError("Ray is not installed: pip install 'undiffuse[scale]'") from error
    with contextlib.redirect_stdout(sys.stderr):  # where Ray tells of workers that died
        return _spread(ray, job, todo, workers, count)


def _spread(ray: Any, job: Job, todo: Sequence[int], workers: int | None, count: _Count) -> list[int]:
    mine = not ray.is_initialized()
    if mine:
        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGTERM) if main else None
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        if before is not None:  # Ray sets its own
            signal.signal(signal.SIGTERM, before)
    try:
        gpu = job.device != "cpu"
        most = int(ray.cluster_resources().get("GPU" if gpu else "CPU", 1))
        workers = min(len(todo), workers or max(1, most))
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        # a lost block is made again, and finds the shards that it finished: many blocks only to spread them evenly
        blocks = min(len(todo), 64 * workers)
        rows = ray.data.from_items([{"index": index} for index in todo], override_num_blocks=blocks).map(
            _Actor, fn_constructor_args=(job,), concurrency=workers, num_cpus=1, num_gpus=1 if gpu else 0
        )
        made = []
        for row in rows.iter_rows():
            if row["error"]:
                raise OSError(row["number"], row["error"]) if row["number"] else Failed(row["error"])
            count.at(row["index"], 1)
            made += [int(row["index"])] if row["made"] else []
        return made
    except ray.exceptions.RayError as error:  # such as a worker that cannot load the model
        raise Failed(f"Ray: {str(error).strip().splitlines()[-1]}") from error
    finally:
        if mine:
            ray.shutdown()
