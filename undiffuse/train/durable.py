"""Files that are whole, durable and under their name, or not there at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import socket
import time
from pathlib import Path
from typing import BinaryIO

from undiffuse.types import InputError


def alive(process: int) -> bool:
    """Whether a process of this machine runs; this one's own number counts as dead, see below."""
    if process == os.getpid():  # in a container every run may have this number: nothing of ours is aside between writes
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def flush(path: Path) -> None:
    """Make a file's content, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The hash of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes, keep: bool = False) -> None:
    """Make a file whole, durable and under its name at once, or not at all; the disk's errors name it.

    With `keep` a file that is there already stays as it is.
    """
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(data)
        flush(aside)
        if not keep or not _link(aside, path):
            aside.replace(path)
        flush(path.parent)
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


def sweep(folder: Path, name: str) -> None:
    """Remove what killed processes left of `replace_bytes` for files whose name matches the pattern `name`: of this
    machine those that are gone, of others after a day."""
    pattern = re.compile(rf"\.(?:{name})\.([^/]+)\.(\d+)\.tmp")
    for path in folder.glob(".*.tmp"):
        if match := pattern.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):
                here = match[1] == socket.gethostname()
                if not alive(int(match[2])) if here else time.time() - path.stat().st_mtime > 86_400:
                    path.unlink()


class Lock:
    """A folder for one process at a time: held from `take` until the `with` block or the process ends.

    A POSIX record lock, which worker processes do not inherit; where there is none, nothing is held.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self.file: BinaryIO | None = None

    def take(self) -> None:
        """Hold it; InputError if another process does."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        if self.file is not None:
            return
        file = open(self.path, "a+b")  # noqa: SIM115 (it is open as long as the lock is held)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise InputError(
                    f"{self.path.parent} is in use by another process: wait for it to end, or give another `out`"
                ) from error
            return  # a file system without locks
        self.file = file

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
