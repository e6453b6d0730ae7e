"""What faults do to checkpoints: kills, power cuts, damaged files, full disks; beside the pattern of accelerate.

`python benchmarks/faults.py` makes 200 kills of each sort (20 of whole training runs); give another number for fewer.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import table, write
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from undiffuse import InputError
from undiffuse.train import Checkpoints, checkpoint, verify

KEEP, LARGE, SMALL = 2, 250_000, 8  # LARGE: numbers in the model, with AdamW's two moments 3 MB
PRELOAD = ["torch", "safetensors.torch", "undiffuse.train"]  # what a process that is to be killed finds imported
BROKEN = (InputError, AssertionError, OSError, SafetensorError, ValueError, KeyError)  # of what cannot be read
Turn = tuple[int, int]  # a step, and how often it was saved before


# --- checkpoints whose every number is known ---------------------------------------------------------------------


def tensors(turn: Turn, size: int) -> dict[str, dict[str, torch.Tensor]]:
    """The files of a model with its optimiser, as a function of the step."""
    base = torch.arange(size) % 97 + float(8 * turn[0] + turn[1])
    return {"model": {"w": base}, "optimiser": {"exp_avg": base + 1, "exp_avg_sq": base + 2}}


def writer(turn: Turn, size: int) -> Callable[[Path], None]:
    """What to give to `Checkpoints.save`."""

    def into(folder: Path) -> None:
        for name, content in tensors(turn, size).items():
            save_file(content, folder / f"{name}.safetensors")
        (folder / "state.json").write_text(json.dumps({"turn": turn, "size": size}))

    return into


def read(folder: Path) -> Turn:
    """The step of a checkpoint, whose every number must be that step's."""
    state = json.loads((folder / "state.json").read_text())
    turn = (state["turn"][0], state["turn"][1])
    for name, content in tensors(turn, state["size"]).items():
        found = load_file(folder / f"{name}.safetensors")
        assert found.keys() == content.keys(), folder
        assert all(torch.equal(found[k], v) for k, v in content.items()), folder
    assert folder.name == f"step-{turn[0]}", folder
    return turn


def newest(root: Path) -> Turn | None:
    """The step that `latest` gives; None where there is none."""
    found = Checkpoints(root, KEEP).latest()
    return found and read(found[0])


# --- kills of saves ----------------------------------------------------------------------------------------------


@dataclass
class Kills:
    """How many kills there were, what the newest checkpoint was after them, and how many fell into a save."""

    asked: int = 0
    bad: int = 0  # the newest reported one, or a newer one, does not load
    fell_back: int = 0  # a newer one was found damaged
    torn: int = 0  # the kill left something behind that is no checkpoint
    nothing: int = 0  # no checkpoint loads
    inexact: int = 0  # it loads without a word, but parts of it are missing
    saves: int = 0


def save_for_ever(root: Path, pipe: Any, again: bool) -> None:
    """Back-to-back saves from where the last process was killed; with `again` each step twice."""
    torch.set_num_threads(1)
    checkpoints, start = Checkpoints(root, KEEP), newest(root)
    pipe.send(None)
    for step in itertools.count(1 + (start[0] if start else 0)):
        for turn in ((step, 0), (step, 1)) if again else ((step, 0),):
            checkpoints.save(step, writer(turn, LARGE))
            pipe.send(turn)


def kill_in(target: Callable[..., None], args: tuple[Any, ...], moment: float) -> list[Any]:
    """Run `target(args[0], pipe, *args[1:])` in a process, kill it `moment` seconds after it is ready: its reports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(args[0], there, *args[1:]))
    process.start()
    there.close()
    here.recv()
    time.sleep(moment)
    process.kill()
    process.join()
    reports = []
    with contextlib.suppress(EOFError):
        while True:
            reports.append(here.recv())
    return reports


def kill_saves(
    root: Path, n: int, again: bool = False, target: Callable[..., None] = save_for_ever, span: float = 0.2
) -> Kills:
    """Kills at uniformly random moments of the first `span` seconds of back-to-back saves."""
    result, generator, reported = Kills(n), random.Random(0), (0, 0)
    for _ in range(n):
        reports = kill_in(target, (root, again), span * generator.random())
        reported = reports[-1] if reports else reported
        result.saves += len(reports)
        result.torn += any(p.name.startswith(".") for p in root.glob(".*"))
        try:
            found = Checkpoints(root, KEEP).latest()
            result.fell_back += bool(found and found[1])
            result.bad += found is not None and read(found[0]) < reported
            result.bad += found is None and reported > (0, 0)
        except BROKEN:
            result.bad += 1
            shutil.rmtree(root)
            reported = (0, 0)
    return result


# --- the same kills, with accelerate's save_state as in diffusers' example trainers ------------------------------


def accelerated() -> tuple[Any, torch.nn.Module]:
    """An Accelerator with a model of LARGE numbers and an AdamW that has made a step."""
    from accelerate import Accelerator

    torch.set_num_threads(1)
    model = torch.nn.Linear(LARGE // 250 - 1, 250)
    accelerator = Accelerator(cpu=True)
    model, optimiser = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(torch.ones(1, LARGE // 250 - 1)).sum())
    optimiser.step()
    return accelerator, model


def by_name(root: Path) -> list[Path]:
    """The folders checkpoint-N, oldest first."""
    return sorted(root.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))


def save_state_for_ever(root: Path, pipe: Any, rotate: bool, start: int) -> None:
    """The loop of the example trainers with checkpoints_total_limit = 2; without `rotate` into one folder."""
    accelerator, model = accelerated()
    pipe.send(None)
    for step in itertools.count(start):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
        for old in by_name(root)[: 1 - KEEP] if rotate else ():
            shutil.rmtree(old)
        accelerator.save_state(str(root / f"checkpoint-{step if rotate else 0}"))
        pipe.send(step)


def load_state(accelerator: Any, model: torch.nn.Module, folder: Path, step: int | None) -> str:
    """`whole`, `inexact` (loads, but the random state or the step's numbers are missing) or `unloadable`."""
    try:
        accelerator.load_state(str(folder))
    except Exception:  # pickle and zip errors of every kind
        return "unloadable"
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    whole = bool((values == values[0]).all()) and (step is None or float(values[0]) == step)
    return "whole" if whole and (folder / "random_states_0.pkl").exists() else "inexact"


def kill_accelerate(root: Path, n: int, rotate: bool, seed: int = 0, span: float = 0.2) -> Kills:
    """As `kill_saves`; after each kill the newest folder by name is loaded, and removed if it cannot be."""
    logging.disable(logging.WARNING)
    (accelerator, model), result, generator, start = accelerated(), Kills(n), random.Random(seed), 1
    for _ in range(n):
        reports = kill_in(save_state_for_ever, (root, rotate, start), span * generator.random())
        result.saves += len(reports)
        start = max([start, *(r + 1 for r in reports)]) + 1
        folders, found = by_name(root), "unloadable"
        for i, folder in enumerate(reversed(folders)):
            found = load_state(accelerator, model, folder, int(folder.name.split("-")[1]) if rotate else None)
            result.inexact += found == "inexact"
            if found != "unloadable":
                break
            result.bad += i == 0
            shutil.rmtree(folder)
        result.nothing += bool(folders) and found == "unloadable"
    return result


# --- kills of training runs --------------------------------------------------------------------------------------


def command(out: Path, saves: int = 30) -> list[str]:
    """The arguments of a small training run that saves so often."""
    small = ["net.width=8", f"train.steps={2 * saves}", "train.every=2", "train.batch=8", "held_out=1500"]
    return ["train", f"out={out}", *small, "--json"]


def same(a: Path, b: Path) -> bool:
    """Whether two finished runs have the same tensors (weights, average, optimiser) and the same log."""
    names = sorted(p.relative_to(a) for p in a.rglob("*.safetensors"))
    if names != sorted(p.relative_to(b) for p in b.rglob("*.safetensors")) or not names:
        return False
    for name in names:
        x, y = load_file(a / name), load_file(b / name)
        if x.keys() != y.keys() or not all(torch.equal(x[k], y[k]) for k in x):
            return False
    return (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()


def train(out: Path, moment: float | None = None) -> tuple[int, float]:
    """`undiffuse train`, killed `moment` seconds after its first save began: the exit code, the time from there on."""
    with tempfile.TemporaryFile() as text:
        process = subprocess.Popen([sys.executable, "-m", "undiffuse", *command(out)], stdout=text, stderr=text)
        while process.poll() is None and not (out / "checkpoints").is_dir():
            time.sleep(0.002)
        started = time.perf_counter()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        process.kill()
        code = process.wait()
        text.seek(0)
        assert code in (0, -9), text.read().decode()
        return code, time.perf_counter() - started


def kill_training(root: Path, n: int, seed: int = 0) -> Kills:
    """Runs that are killed once at a uniformly random moment between first save and end, and resumed to the end."""
    result, generator = Kills(n), random.Random(seed)
    _, span = train(root / "straight")
    for i in range(n):
        out = root / f"killed-{i}"
        while train(out, span * generator.random())[0] == 0:  # it had finished before its kill
            shutil.rmtree(out)
        result.torn += any(out.rglob(".*"))
        result.fell_back += bool((Checkpoints(out / "checkpoints").latest() or ("", []))[1])
        code, _ = train(out)
        result.bad += code != 0 or not same(root / "straight", out)
        result.inexact += any(out.rglob(".*"))
        shutil.rmtree(out)
    return result


# --- damage ------------------------------------------------------------------------------------------------------


def flips(path: Path, share: float, generator: random.Random) -> Iterator[bytes]:
    """The file with a single bit flipped, for all of its bits or for a share of them."""
    whole = path.read_bytes()
    bits = range(8 * len(whole))
    for bit in bits if share == 1 else sorted(generator.sample(bits, math.ceil(share * len(bits)))):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


def damages(folder: Path, share: float, seed: int = 0) -> Iterator[tuple[str, Path, bytes | None]]:
    """Kind, file and its damaged content (None: deleted); `share` of the flips and of the lengths of truncations."""
    generator = random.Random(seed)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for damaged in flips(path, share, generator):
            yield "one bit flipped", path, damaged
        lengths = range(len(whole))
        ends = {0, 1, len(whole) // 2, len(whole) - 1} & set(lengths)
        for length in sorted(ends | set(generator.sample(lengths, int(share * len(whole))))):
            yield "truncated", path, whole[:length]
        yield "deleted", path, None
        other = (folder.parent / "step-1" / path.name).read_bytes()
        for damaged in {bytes(len(whole)), whole + b"\0", other} - {whole}:
            yield "zeros, longer, another step's", path, damaged
    for name in ("foreign.bin", ".hidden", "within/foreign.bin", "model.safetensors.tmp"):
        for content in (b"", b"x"):
            yield "foreign file", folder / name, content


@dataclass
class Damage:
    """How many damages of a kind there were, were found, were named, and led to the checkpoint before."""

    asked: int = 0
    found: int = 0
    named: int = 0
    fell_back: int = 0


def damage(root: Path, share: float = 1.0) -> dict[str, Damage]:
    """Damage the newer of two checkpoints in every way, one at a time."""
    checkpoints, results = Checkpoints(root, KEEP), dict[str, Damage]()
    for step in (1, 2):
        checkpoints.save(step, writer((step, 0), SMALL))
    folder = root / "step-2"
    for kind, path, content in list(damages(folder, share)):
        result = results.setdefault(kind, Damage())
        with changed(path, content):
            result.asked += 1
            try:
                verify(folder)
            except InputError as error:
                result.found += 1
                result.named += path.name in str(error) or path.name == checkpoint.MANIFEST
            with contextlib.suppress(*BROKEN):
                latest = checkpoints.latest()
                result.fell_back += latest is not None and read(latest[0]) == (1, 0)
    assert newest(root) == (2, 0)
    return results


@contextlib.contextmanager
def changed(path: Path, content: bytes | None) -> Iterator[None]:
    """A file with other content, or absent, for a while."""
    before = path.read_bytes() if path.exists() else None
    folders = [p for p in path.parents if not p.exists()]
    _put(path, content)
    yield
    _put(path, before)
    for made in folders:
        made.rmdir()


def _put(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


# --- power cuts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """A file's new content, or names of a folder that change together (None: the name goes)."""

    target: int
    value: bytes | tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Flushed:
    """All that was done to this file or folder before is durable."""

    target: int


@dataclass(frozen=True)
class Returned:
    """`save` has returned for this step: from here on it must survive."""

    turn: Turn


Event = Effect | Flushed | Returned
Nodes = dict[int, bytes | dict[str, int]]


@dataclass
class Recorder:
    """Records what happens below `root` as effects and flushes, by looking at it around every call that changes it.

    Flushes are recorded and not made. Two looks differ by one call, or by writes of files, whose parts (name, content)
    count as separate effects. Moved names are one effect, as a rename or an exchange is.
    """

    root: Path
    events: list[Event] = field(default_factory=list)
    ids: dict[int, int] = field(default_factory=dict)
    nodes: Nodes = field(default_factory=dict)
    fresh: Iterator[int] = field(default_factory=itertools.count)

    def look(self) -> None:
        """Record what has changed since the last look."""
        before, seen = self.nodes, dict[int, int]()
        self.nodes = {}
        self._scan(self.root, seen)
        self.ids = seen  # a freed inode's number may come again for another file
        for target, now in self.nodes.items():
            if isinstance(now, bytes):
                if now != before.get(target, b""):
                    self.events.append(Effect(target, now))
                continue
            was = before.get(target, {})
            assert isinstance(was, dict)
            names = {n: now.get(n) for n in sorted({*was, *now}) if was.get(n) != now.get(n)}
            moved = {n for n, i in names.items() if i in before or was.get(n) in self.nodes}
            if moved:
                self.events.append(Effect(target, tuple((n, names[n]) for n in names if n in moved)))
            self.events += [Effect(target, ((n, i),)) for n, i in names.items() if n not in moved]

    def _scan(self, path: Path, seen: dict[int, int]) -> int:
        number = os.lstat(path).st_ino
        mine = seen[number] = self.ids[number] if number in self.ids else next(self.fresh)
        if path.is_dir():
            self.nodes[mine] = {p.name: self._scan(p, seen) for p in sorted(path.iterdir())}
        else:
            self.nodes[mine] = path.read_bytes()
        return mine

    def flush(self, descriptor: int) -> None:
        """In place of os.fsync."""
        self.look()
        number = os.fstat(descriptor).st_ino
        if number in self.ids:
            self.events.append(Flushed(self.ids[number]))

    def around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """A call between two looks."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.look()
            try:
                return real(*args, **kwargs)
            finally:
                self.look()

        return call

    @contextlib.contextmanager
    def on(self) -> Iterator[Recorder]:
        """Record until the end of the block."""
        names = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir")
        real = {name: getattr(os, name) for name in (*names, "fsync")}
        self.look()
        self.events.clear()  # what was there before is durable
        self.base = dict(self.nodes)
        try:
            for name in names:
                setattr(os, name, self.around(real[name]))
            os.fsync = self.flush
            yield self
        finally:
            for name, function in real.items():
                setattr(os, name, function)


def reachable(base: Nodes, events: Iterable[Event]) -> set[int]:
    """What may have a name below the root (0) in some state after a power cut."""
    children: dict[int, set[int]] = {i: set(n.values()) for i, n in base.items() if isinstance(n, dict)}
    for event in events:
        if isinstance(event, Effect) and not isinstance(event.value, bytes):
            children.setdefault(event.target, set()).update(i for _, i in event.value if i is not None)
    found, queue = {0}, [0]
    while queue:
        for child in children.get(queue.pop(), ()):
            if child not in found:
                found.add(child)
                queue.append(child)
    return found


def apply(nodes: Nodes, effect: Effect, how: str) -> None:
    """Apply an effect: `all` of it, or of a content the first `half`, or `zeros` of its length."""
    if isinstance(effect.value, bytes):
        size = len(effect.value)
        nodes[effect.target] = {"all": effect.value, "half": effect.value[: size // 2], "zeros": bytes(size)}[how]
        return
    folder = dict(nodes.get(effect.target, {}))  # type: ignore[arg-type]
    for name, child in effect.value:
        folder.pop(name, None)
        if child is not None:
            folder[name] = child
    nodes[effect.target] = folder


def settle(nodes: Nodes, events: list[Event]) -> tuple[Nodes, list[Effect]]:
    """What is durable after these events, and the effects that a power cut may drop."""
    nodes, pending = dict(nodes), list[Effect]()
    for event in events:
        if isinstance(event, Effect):
            pending.append(event)
        elif isinstance(event, Flushed):
            for effect in pending:
                if effect.target == event.target:
                    apply(nodes, effect, "all")
            pending = [e for e in pending if e.target != event.target]
    able = reachable(nodes, pending)
    return nodes, [e for e in pending if e.target in able]


def choices(pending: list[Effect], limit: int, generator: random.Random) -> Iterator[tuple[str, ...]]:
    """Every way in which a power cut may treat the effects; above `limit` ways the extremes and a sample."""
    ways = [("all", "drop", "half", "zeros") if isinstance(e.value, bytes) else ("all", "drop") for e in pending]
    if math.prod(map(len, ways)) <= limit:
        yield from itertools.product(*ways)
        return
    n = len(ways)
    yield from (("all",) * n, ("drop",) * n)
    for i in range(n):
        for way in ways[i][1:]:
            yield ("all",) * i + (way,) + ("all",) * (n - i - 1)
        yield ("drop",) * i + ("all",) + ("drop",) * (n - i - 1)
    for _ in range(limit):
        yield tuple(generator.choice(way) for way in ways)


def frozen(nodes: Nodes, node: int = 0) -> Any:
    """The tree below a node as nested tuples; a named file whose content was dropped is empty."""
    here = nodes.get(node, b"")
    return here if isinstance(here, bytes) else tuple((n, frozen(nodes, i)) for n, i in sorted(here.items()))


def build(tree: Any, at: Path) -> None:
    """Make the files of a frozen tree."""
    if isinstance(tree, bytes):
        at.write_bytes(tree)
        return
    at.mkdir()
    for name, child in tree:
        build(child, at / name)


@dataclass
class PowerCuts:
    """How many cuts (a moment and what was dropped) there were, how many states they left, and which are bad."""

    moments: int = 0
    cuts: int = 0
    states: int = 0
    complete: int = 0  # moments of which every subset was tried
    bad: list[str] = field(default_factory=list)


def fresh_folders(events: Iterable[Event], base: Nodes) -> set[int]:
    """The folders among the nodes."""
    named = {e.target for e in events if isinstance(e, Effect) and not isinstance(e.value, bytes)}
    return named | {i for i, n in base.items() if isinstance(n, dict)}


def survives(tree: Any, returned: list[Turn], at: Path) -> str:
    """What is wrong with a state after a power cut; empty if the newest returned step loads and KEEP are sound."""
    build(tree, at)
    try:
        root, last = at / "out/checkpoints", returned[-1] if returned else (0, 0)
        found = newest(root)
        if (found or (0, 0)) < last:
            return f"{found} loads where {last} was saved"
        sound = sum(checkpoint.is_sound(root / f"step-{n}") for n in Checkpoints(root).steps())
        wanted = min(KEEP, len({step for step, _ in returned}))
        return "" if sound >= wanted else f"{sound} sound checkpoints, {wanted} wanted"
    except BROKEN as error:
        return f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(at)


def record(root: Path) -> Recorder:
    """The events of five saves, one of a step that is there, in a folder that the run has just made."""
    root.mkdir()
    with Recorder(root).on() as recorder:
        (root / "out").mkdir()
        checkpoints = Checkpoints(root / "out/checkpoints", KEEP)
        for turn in ((1, 0), (2, 0), (2, 1), (3, 0), (4, 0)):
            checkpoints.save(turn[0], writer(turn, SMALL))
            recorder.look()
            recorder.events.append(Returned(turn))
    return recorder


def power_cuts(work: Path, limit: int, seed: int = 0, first: bool = False) -> PowerCuts:
    """Cut the power after every event of `record` with every subset (see `choices`) of what was not flushed dropped."""
    recorder, result, seen, generator = record(work / "live"), PowerCuts(), set[Any](), random.Random(seed)
    folders = fresh_folders(recorder.events, recorder.base)
    for moment in range(len(recorder.events) + 1):
        events = recorder.events[:moment]
        returned = [e.turn for e in events if isinstance(e, Returned)]
        durable, pending = settle(recorder.base, events)
        empty: Nodes = {i: {} for i in folders if i not in durable}  # a folder whose entries were all dropped
        result.moments += 1
        ways = list(choices(pending, limit, generator))
        result.complete += len(ways) == math.prod(4 if isinstance(e.value, bytes) else 2 for e in pending)
        for way in ways:
            nodes = {**empty, **durable}
            for effect, how in zip(pending, way, strict=True):
                if how != "drop":
                    apply(nodes, effect, how)
            result.cuts += 1
            state = (frozen(nodes), tuple(returned))
            if state in seen:
                continue
            seen.add(state)
            result.states += 1
            if problem := survives(state[0], returned, work / "cut"):
                result.bad.append(f"after event {moment} of {len(recorder.events)}: {problem}")
                if first:
                    return result
    return result


# --- full disks --------------------------------------------------------------------------------------------------


@dataclass
class Full:
    """What a training run did on a file system with `free` bytes, and after space was made."""

    free: int
    code: int
    said: str
    intact: bool  # no half-written checkpoint, nothing left aside
    resumed: bool  # the same command went on to the end, bit for bit as without the fault
    steps: list[int]


def forked(out: Path, log: Path) -> int:
    """`undiffuse train` in a forked process: its exit code."""
    from undiffuse import cli

    child = os.fork()
    if child == 0:
        with open(log, "wb") as f:
            os.dup2(f.fileno(), 1)
            os.dup2(f.fileno(), 2)
        sys.argv = ["undiffuse", *command(out, saves=4)]
        try:
            cli.main()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        except BaseException:
            import traceback

            traceback.print_exc()
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fill(disk: Path, straight: Path, free: int) -> Full:
    """Train with `free` bytes left on the disk, then again with all of them."""
    out, ballast, log = disk / "run", disk / "ballast", straight.with_name("log")
    space = os.statvfs(disk)
    with open(ballast, "wb") as f:
        os.posix_fallocate(f.fileno(), 0, space.f_bavail * space.f_frsize - free)
    code, said = forked(out, log), ""
    said = log.read_text().strip().splitlines()[-1] if log.stat().st_size else ""
    checkpoints = Checkpoints(out / "checkpoints")
    found = checkpoints.latest()
    aside = [p for p in out.rglob(".*") if p.name != ".lock"]
    intact = (found is None or found[1] == []) and not aside
    steps = checkpoints.steps()
    ballast.unlink()
    resumed = forked(out, log) == 0 and same(straight, out)
    shutil.rmtree(out)
    return Full(free, code, said, intact, resumed, steps)


def fill_all(work: Path, frees: list[int]) -> None:
    """Within a mount namespace of its own: print the results for a tmpfs with so many bytes free."""
    import sklearn.datasets  # noqa: F401 - once for all forks, as the next two
    import torch._dynamo

    import undiffuse.cli  # noqa: F401

    torch.set_num_threads(1)
    disk = work / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=True)
    assert forked(work / "straight", work / "log") == 0, (work / "log").read_text()
    print(json.dumps([vars(fill(disk, work / "straight", free)) for free in frees]))


def disk_full(work: Path, frees: list[int]) -> list[Full] | str:
    """Training runs on a small tmpfs in which so many bytes are free; a reason where none can be mounted."""
    space = ["unshare", "-Urm"]
    try:
        tried = subprocess.run([*space, "mount", "-t", "tmpfs", "tmpfs", str(work)], capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no unshare here"
    if tried.returncode:
        return f"no tmpfs can be mounted here: {tried.stderr.strip()}"
    code = f"import sys; sys.path[:0] = {sys.path!r}; import faults; from pathlib import Path; "
    code += f"faults.fill_all(Path({str(work)!r}), {frees!r})"
    done = subprocess.run(
        [*space, sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return [Full(**row) for row in json.loads(done.stdout.splitlines()[-1])]


# --- the table ---------------------------------------------------------------------------------------------------


def bound(bad: int, n: int) -> float:
    """The share of failures that is excluded with 95 % confidence after `bad` of n; about 3 / n after none."""
    low, high = bad / n, 1.0
    for _ in range(50):
        p = (low + high) / 2
        if sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(bad + 1)) > 0.05:
            low = p
        else:
            high = p
    return low


def rate(bad: int, n: int) -> str:
    """Failures with their bound."""
    return f"{bad} of {n:,} (< {100 * bound(bad, n):.2g} %)"


def kill_rows(work: Path, n: int) -> list[list[str]]:
    """One row for each way to save."""
    rows = []
    for again, name in ((False, "undiffuse, a new step each"), (True, "undiffuse, each step saved twice")):
        r = kill_saves(work / f"again-{again}", n, again)
        rows.append([name, str(r.saves), str(r.torn), rate(r.bad, n), "0", str(r.fell_back)])
    r = kill_training(work / "training", max(1, n // 10))
    rows.append(["undiffuse train, resumed", "-", str(r.torn), rate(r.bad, r.asked), str(r.inexact), str(r.fell_back)])
    for rotate, name in ((True, "accelerate, checkpoint-N, limit 2"), (False, "accelerate, one folder")):
        r = kill_accelerate(work / f"rotate-{rotate}", n, rotate)
        rows.append([name, str(r.saves), "-", rate(r.bad, n), str(r.inexact), f"nothing left: {r.nothing}"])
    return rows


def damage_rows(results: dict[str, Damage]) -> list[list[str]]:
    """One row for each kind of damage."""
    return [
        [kind, f"{r.asked:,}", *(f"{100 * k / r.asked:g} %" for k in (r.found, r.named, r.fell_back))]
        for kind, r in results.items()
    ]


def main() -> None:
    """All faults, into RESULTS.md."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    PRELOAD.extend(("accelerate", "torch._dynamo"))
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        kills = kill_rows(work, n)
        damaged = damage(work / "damage")
        cuts = {}
        for way in ("exchange", "two renames"):
            (work / way).mkdir()
            real = checkpoint._exchange
            if way == "two renames":
                checkpoint._exchange = lambda a, b: False
            cuts[way] = power_cuts(work / way, 4096 if n >= 200 else 64)
            checkpoint._exchange = real
        (work / "disk").mkdir()
        full = disk_full(work / "disk", [4096 * k for k in range(0, 180, 15 if n >= 200 else 60)])
    write("Faults and checkpoints", "python benchmarks/faults.py", report(n, kills, damaged, cuts, full))


def report(
    n: int,
    kills: list[list[str]],
    damaged: dict[str, Damage],
    cuts: dict[str, PowerCuts],
    full: list[Full] | str,
) -> str:
    """The section's text."""
    header = ["SIGKILL at a random moment", "saves", "within a save", "newest does not load", "inexact", "fell back"]
    text = f"{n} kills of back-to-back saves of 3 MB (model and AdamW), two kept. Bounds: 95 %.\n\n"
    text += table(header, kills) + "\n\n"
    text += "Failures of `undiffuse train`: not bit-equal to a run without a kill. accelerate: `save_state` as in "
    text += "diffusers' example trainers, newest by name; inexact: it loads, parts missing, without a word. "
    text += "Shares are of kills during back-to-back saves: a run that trains between them is hit more rarely.\n\n"
    text += table(["damage to the newest", "tried", "found", "file named", "fell back to the one before"],
                  damage_rows(damaged)) + "\n\n"  # fmt: skip
    text += "With a damaged manifest the file named may be one that it lists.\n\n"
    text += "Power cuts: after every operation of five saves, un-flushed effects dropped in every combination "
    text += "(contents also halved or zeros, renames reordered); of too many, the extremes and a sample.\n\n"
    rows = [
        [way, f"{c.moments} ({c.complete} in full)", f"{c.cuts:,}", f"{c.states:,}", str(len(c.bad))]
        for way, c in cuts.items()
    ]
    text += (
        table(["a step saved again by", "moments", "cuts", "states", "newest lost or fewer than two"], rows) + "\n\n"
    )
    if isinstance(full, str):
        return text + f"Full disk: not measured ({full})."
    counts = Counter(r.code for r in full)
    codes = ", ".join(f"{k} x exit {code}" for code, k in sorted(counts.items()))
    good = sum(r.intact and r.resumed for r in full)
    text += f"Full disk (tmpfs with {full[0].free // 1024} to {full[-1].free // 1024} KiB free): `undiffuse train` "
    return text + f"{codes}; {good} of {len(full)} intact, and bit-equal after space was made."


if __name__ == "__main__":
    main()
