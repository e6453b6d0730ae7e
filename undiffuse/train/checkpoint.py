"""Checkpoints that are whole or absent: written aside, flushed, hashed, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from undiffuse.types import InputError

MANIFEST = "manifest.json"
_STEP, _ASIDE = re.compile(r"step-(\d+)"), re.compile(r"\.step-\d+\.(\d+)\.(?:tmp|old)")


def _alive(process: int) -> bool:
    if process == os.getpid():  # in a container every run may have this number: nothing of ours is aside between saves
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def replace_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(text)
        _flush(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def commit(folder: Path, write: Callable[[Path], None]) -> None:
    """Make `folder` from what `write(aside)` puts into a folder aside: complete with its manifest, or not at all.

    An older `folder` is replaced only after the new one is durable.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        write(aside)
        files = sorted(p for p in aside.rglob("*") if p.is_file())
        for path in files:
            _flush(path)
        manifest = {p.relative_to(aside).as_posix(): {"bytes": p.stat().st_size, "sha256": _hash(p)} for p in files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _flush(aside / MANIFEST)
        for path in [*(p for p in aside.rglob("*") if p.is_dir()), aside]:
            _flush(path)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        try:
            aside.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
        _flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def verify(folder: Path) -> None:
    """InputError naming the first file of `folder` that is missing, unlisted or different from its manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        entries = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{folder} has no {MANIFEST}: it is not a finished checkpoint or model folder") from error
    except Exception as error:  # a damaged file may be anything: bad UTF-8, deep nesting, infinite sizes
        raise InputError(f"{folder / MANIFEST} is damaged: {error}") from error
    for name, (size, digest) in entries.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
            raise InputError(f"{path} is missing, though {MANIFEST} lists it")
        try:
            if path.stat().st_size != size:
                raise InputError(f"{path} is truncated or changed: {path.stat().st_size} bytes, {size} expected")
            if _hash(path) != digest:
                raise InputError(f"{path} was changed: its SHA-256 is not the one in {MANIFEST}")
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in {*entries, MANIFEST}:
            raise InputError(f"{path} is not listed in {MANIFEST}: the folder was changed; move that file away")


def is_sound(folder: Path) -> bool:
    """Whether `verify` finds nothing wrong."""
    try:
        verify(folder)
    except InputError:
        return False
    return True


def weights(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module for safetensors: own copies, under the names that it has without `torch.compile`."""
    return {k.replace("_orig_mod.", ""): v.detach().clone().contiguous() for k, v in module.state_dict().items()}


def load_weights(module: nn.Module, path: Path) -> None:
    """Load what `weights` gave, compiled or not; raises RuntimeError where names or shapes differ."""
    stored = load_file(path)
    names = {k.replace("_orig_mod.", ""): k for k in module.state_dict()}
    module.load_state_dict({names.get(k, k): v for k, v in stored.items()})


class Checkpoints:
    """The checkpoints step-N in a folder; `latest` is computed from manifests that verify, never from a pointer."""

    def __init__(self, root: Path, keep: int = 2) -> None:
        self.root, self.keep = root, max(2, keep)

    def steps(self) -> list[int]:
        """The steps for which there is a folder, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted(int(m[1]) for p in self.root.iterdir() if (m := _STEP.fullmatch(p.name)) and p.is_dir())

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Commit step-N, then retire what is older than the newest `keep` that verify."""
        self._sweep()
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

    def _sweep(self) -> None:
        """Remove what killed processes of this machine left aside."""
        for path in self.root.glob(".*") if self.root.is_dir() else ():
            if path.name.startswith(".trash-") or ((m := _ASIDE.fullmatch(path.name)) and not _alive(int(m[1]))):
                shutil.rmtree(path, ignore_errors=True)

    def latest(self) -> tuple[Path, list[str]] | None:
        """The newest checkpoint that verifies, and what was wrong with newer ones; None if there is none."""
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
