"""Array files: .npy (memory-mapped), .npz and .safetensors, checked before anything is allocated."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from undiffuse.data.source import Arrays, names
from undiffuse.types import InputError

SUFFIXES = (".npy", ".npz", ".safetensors")
_SMALL, _RATIO, _DIRECTORY = 2**26, 200, 2**20  # an archive's member above 64 MiB may not be packed 200 times


def open_arrays(path: Path) -> Arrays:
    """x (n, channels, *size) with optional `labels` (or `label`) and other columns of n rows; never unpickles.

    Raises InputError.
    """
    if not path.is_file():
        raise InputError(f"data file {path} does not exist")
    try:
        arrays = read_tensors(path) if path.suffix == ".safetensors" else read_numpy(path)
        arrays = {key: _native(values) for key, values in arrays.items()}
    except Exception as error:  # damaged archives raise nearly anything: zlib.error, SyntaxError, AttributeError, ...
        raise InputError(f"{path} is not a readable array file (pickled arrays are refused): {error}") from error
    if "x" not in arrays:
        raise InputError(f"{path} has no array named 'x' (and optionally 'labels')")
    x, labels = arrays.pop("x"), arrays.pop("labels", arrays.pop("label", None))
    if labels is not None and np.issubdtype(labels.dtype, np.integer):
        labels = labels.astype(np.int64)
    rows = {key: values for key, values in arrays.items() if values.ndim and len(values) == len(x)}
    return Arrays(x, labels, names(labels), path.stem, rows, where=str(path))


def read_numpy(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npy or .npz file, by content, not by name; a .npy is memory-mapped."""
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            check_zip(path)
            with np.load(path, allow_pickle=False) as archive:
                return {key: np.asarray(archive[key]) for key in archive.files}
    return {"x": np.load(path, mmap_mode="r", allow_pickle=False)}


def check_zip(path: Path) -> None:
    """Refuse an archive with too many entries or one that would grow beyond measure; raises ValueError."""
    if _directory(path) > _DIRECTORY:
        raise ValueError("its list of members is longer than 1 MiB")
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.file_size > _SMALL and member.file_size > _RATIO * max(1, member.compress_size):
                raise ValueError(
                    f"{member.filename} would grow from {member.compress_size} to {member.file_size} bytes: refused as "
                    "a decompression bomb; if it is yours, write it with np.savez, uncompressed"
                )


def _directory(path: Path) -> int:
    """The bytes of a zip file's central directory, from its end records."""
    with open(path, "rb") as file:
        file.seek(0, 2)
        size = file.tell()
        file.seek(max(0, size - 65557 - 76))
        tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        raise ValueError("the end of the archive is missing")
    directory: int = struct.unpack_from("<L", tail, at + 12)[0]
    if (wide := at - 76) >= 0 and tail[wide : wide + 4] == b"PK\x06\x06":
        directory = max(directory if directory != 0xFFFFFFFF else 0, struct.unpack_from("<Q", tail, wide + 40)[0])
    return directory


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors file."""
    from safetensors import safe_open

    out: dict[str, np.ndarray] = {}
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
        if len(keys) > 1000:
            raise ValueError(f"{len(keys)} tensors; expected x, labels and a few columns")
        for key in keys:
            tensor = file.get_tensor(key)
            out[key] = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
    return out


def _native(array: np.ndarray) -> np.ndarray:
    """In native byte order, of a kind that has rows of numbers or texts."""
    if array.dtype.kind not in "biufU":
        raise ValueError(f"an array of type {array.dtype}")
    order: Any = array.dtype.newbyteorder("=")
    return array if array.dtype == order else array.astype(order)
