"""Small data sets on disk."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(seed=0, height=12, width=12, channels=3):
    """Random bytes (height, width, channels), or (height, width) for one channel."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def coded(array, format="PNG", **options):
    """A picture's file, as bytes."""
    buffer = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(buffer, format, **options)
    return buffer.getvalue()


def flat(value, side=4):
    """A gray picture that is `value` everywhere."""
    return coded(np.full((side, side), value, np.uint8))


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tree(root: Path) -> dict[str, tuple[str, int]]:
    """Every file below root: its hash and time of change."""
    return {
        str(p.relative_to(root)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in sorted(root.rglob("*"))
        if p.is_file() and not p.is_symlink()
    }


def tar(path: Path, members: dict[str, bytes], extra=()) -> Path:
    """A .tar file of members, then of ready `TarInfo`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in extra:
            archive.addfile(info)
    return path


def values(source):
    """What a source of `flat` pictures holds: the gray value of each sample."""
    from undiffuse.data import Prepare

    prepare = Prepare()
    return [round((float(prepare(source.read(i), 0, 0).x.mean()) + 1) * 127.5) for i in range(len(source))]
