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
