"""Checkpoints that are whole or absent: written aside, flushed, hashed, then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from undiffuse.train.durable import alive, flush, sha256
from undiffuse.types import InputError

MANIFEST = "manifest.json"
_STEP = r"step-\d+"


@functools.cache  # once per process: what it made durable stays so
def _anchor(folder: Path) -> None:
    """Make the way to `folder` durable: whoever made its parents may not have flushed their names."""
    for path in folder.parents:
        with contextlib.suppress(OSError):  # a parent that we may not read was not made by this run
            flush(path)


def _exchange(a: Path, b: Path) -> bool:
    """Let two names change places in one step; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)


def _put(aside: Path, folder: Path, old: Path) -> None:
    """Give `aside` the name `folder`; what had it is then at `aside` or at `old`."""
    if not folder.exists():
        aside.rename(folder)
    elif not _exchange(aside, folder):
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)  # a kill before the next line leaves `old` alone, which `_restore` puts back
        try:
            aside.rename(folder)
        except BaseException:
            old.rename(folder)
            raise


def _left(parent: Path, name: str) -> list[re.Match[str]]:
    """What killed processes of this machine left aside in `parent`: name, process, kind; `name` is a pattern."""
    pattern = re.compile(rf"\.({name})\.(\d+)\.(tmp|old)")
    found = [pattern.fullmatch(path.name) for path in parent.glob(".*")] if parent.is_dir() else []
    return [match for match in found if match and not alive(int(match[2]))]


def _restore(parent: Path, name: str) -> None:
    """Put back what a kill between the two renames of `_put` left under no other name."""
    for match in _left(parent, name):
        if match[3] == "old" and not (parent / match[1]).exists():
            with contextlib.suppress(OSError):  # a reader may not be allowed to, or another process was faster
                (parent / match[0]).rename(parent / match[1])
                flush(parent)


def _sweep(parent: Path, name: str) -> None:
    """Put back or remove what killed processes left aside."""
    _restore(parent, name)
    for match in _left(parent, name):
        shutil.rmtree(parent / match[0], ignore_errors=True)


def commit(folder: Path, write: Callable[[Path], None]) -> None:
    """Make `folder` from what `write(aside)` puts into a folder aside: complete with its manifest, or not at all.

    An older `folder` is replaced only after the new one is durable. OSError where the disk is full, whoever wrote.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _anchor(folder.parent.absolute())
    _sweep(folder.parent, re.escape(folder.name))
    aside, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        try:
            write(aside)
        except SafetensorError as error:  # it hides a full disk in its text
            if code := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(code[1]), os.strerror(int(code[1])), str(aside)) from error
            raise
        files = sorted(p for p in aside.rglob("*") if p.is_file())
        for path in files:
            flush(path)
        manifest = {p.relative_to(aside).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        flush(aside / MANIFEST)
        for path in [*(p for p in aside.rglob("*") if p.is_dir()), aside]:
            flush(path)
        _put(aside, folder, old)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    flush(folder.parent)
    for path in (aside, old):  # only now is the new name durable
        shutil.rmtree(path, ignore_errors=True)


def verify(folder: Path) -> None:
    """InputError naming the first file of `folder` that is missing, unlisted or different from its manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        entries = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{folder} has no {MANIFEST}: it is not a finished checkpoint or model folder") from error
    except Exception as error:  # a damaged file may be anything: bad UTF-8, deep nesting, infinite sizes
        raise InputError(f"{folder / MANIFEST} is damaged: {error}") from error
    try:
        for name, (size, digest) in entries.items():
            _check(folder, name, size, digest)
        for path in folder.rglob("*"):
            if path.is_file() and path.relative_to(folder).as_posix() not in {*entries, MANIFEST}:
                raise InputError(f"{path} is not listed in {MANIFEST}: the folder was changed; move that file away")
    except OSError as error:
        raise InputError(f"{error.filename or folder} cannot be read: {error.strerror}") from error


def _check(folder: Path, name: str, size: int, digest: str) -> None:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
        raise InputError(f"{path} is missing, though {MANIFEST} lists it")
    if path.stat().st_size != size:
        raise InputError(f"{path} is truncated or changed: {path.stat().st_size} bytes, {size} expected")
    if sha256(path) != digest:
        raise InputError(f"{path} was changed: its SHA-256 is not the one in {MANIFEST}")


def is_sound(folder: Path) -> bool:
    """Whether `verify` finds nothing wrong."""
    try:
        verify(folder)
    except InputError:
        return False
    return True


def is_shard(value: Tensor) -> bool:
    """Whether this process holds a part of the tensor only (FSDP2's DTensor, whose import takes most of a second)."""
    return hasattr(value, "full_tensor")


def takes_part(module: nn.Module, main: bool) -> bool:
    """Whether this process is needed to save a module: the main one, and all of them where parameters are shards."""
    return main or any(is_shard(p) for p in module.parameters())


def whole(value: Tensor) -> Tensor:
    """The full tensor on the CPU, gathered from all processes where this one holds a shard of it."""
    full: Tensor = value.full_tensor() if is_shard(value) else value  # type: ignore[attr-defined]
    return full.detach().cpu()


def whole_like(full: Tensor, shard: Tensor) -> Tensor:
    """`full` as `shard` is: on its device, in its layout, and this process's part of it where that is a shard."""
    if not is_shard(shard):
        return torch.empty_like(shard, dtype=full.dtype).copy_(full)  # in its memory layout
    full = full.to(shard.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, shard.device_mesh, shard.placements)  # type: ignore[attr-defined]


def weights(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module for safetensors: own copies, whole, under the names that it has without `torch.compile`."""
    return {k.replace("_orig_mod.", ""): whole(v).clone().contiguous() for k, v in module.state_dict().items()}


def load_weights(module: nn.Module, stored: Path | dict[str, Tensor]) -> None:
    """Load what `weights` gave, or a file of it, compiled, sharded or not; RuntimeError for other names or shapes."""
    stored, own = load_file(stored) if isinstance(stored, Path) else stored, module.state_dict()
    names = {k.replace("_orig_mod.", ""): k for k in own}
    state = {names.get(k, k): v for k, v in stored.items()}
    module.load_state_dict({k: whole_like(v, own[k]) if k in own else v for k, v in state.items()})


class Checkpoints:
    """The checkpoints step-N in a folder; `latest` is computed from manifests that verify, never from a pointer."""

    def __init__(self, root: str | Path, keep: int = 2) -> None:
        self.root, self.keep = Path(root), max(2, keep)

    def steps(self) -> list[int]:
        """The steps for which there is a folder, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted(int(p.name[5:]) for p in self.root.iterdir() if re.fullmatch(_STEP, p.name) and p.is_dir())

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Commit step-N, then retire what is older than the newest `keep` that verify."""
        _sweep(self.root, _STEP)
        for trash in self.root.glob(".trash-*"):
            shutil.rmtree(trash, ignore_errors=True)
        commit(self.root / f"step-{step}", write)
        older = [n for n in self.steps() if n != step]
        sound = 1
        while older and sound < self.keep:
            sound += is_sound(self.root / f"step-{older.pop()}")
        for old in older:
            with contextlib.suppress(OSError):
                trash = self.root / f".trash-{old}"
                shutil.rmtree(trash, ignore_errors=True)
                (self.root / f"step-{old}").rename(trash)
                shutil.rmtree(trash)

    def latest(self) -> tuple[Path, list[str]] | None:
        """The newest checkpoint that verifies, and what was wrong with newer ones; None if there is none."""
        _restore(self.root, _STEP)
        problems = []
        for step in reversed(self.steps()):
            folder = self.root / f"step-{step}"
            try:
                verify(folder)
            except InputError as error:
                problems.append(str(error))
                continue
            return folder, problems
        if problems:
            raise InputError("no checkpoint can be read: " + "; ".join(problems))
        return None
