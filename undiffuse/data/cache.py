"""A bounded folder of fetched shards: the least recently used go first; safe with several processes."""

from __future__ import annotations

import bisect
import contextlib
import json
import os
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar
from urllib.parse import urlsplit

from undiffuse.data.source import digest
from undiffuse.types import InputError

T = TypeVar("T")
_PIECE, _TRIES, _TIMEOUT = 1 << 20, 4, 60


def default_cache() -> Path:
    """~/.cache/undiffuse/shards, or below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "undiffuse" / "shards"


def is_remote(place: str) -> bool:
    """Whether a shard has an address (http, https, file) and must be fetched."""
    return "://" in place


def suffix(place: str) -> str:
    """The ending of a path or address, without its query."""
    return Path(urlsplit(place).path if is_remote(place) else place).suffix.lower()


@dataclass(frozen=True)
class Cache:
    """Fetched shards in `root`, at most `limit` bytes (each process may hold one more while it fetches)."""

    root: Path
    limit: int

    def open(self, place: str) -> BinaryIO:
        """A shard, open to read: a local path where it lies, an address by way of the cache. Raises InputError.

        What is open can be read to its end even if another process evicts it meanwhile.
        """
        if not is_remote(place):
            try:
                return open(place, "rb")
            except OSError as error:
                raise InputError(f"shard {place} cannot be read: {error.strerror}") from error
        for _ in range(100):
            path = self._fetch(place)
            with contextlib.suppress(FileNotFoundError):
                return open(path, "rb")
        raise InputError(f"{self.root} loses shards as fast as they are fetched: raise the bytes of the cache")

    def path(self, place: str) -> Path:
        """Where a fetched shard lies."""
        return self.root / (digest(place)[:32] + suffix(place))

    def _fetch(self, place: str) -> Path:
        path = self.path(place)
        self.root.mkdir(parents=True, exist_ok=True)
        with _locked(self.root / f".{path.name}.lock"):
            try:
                os.utime(path)
                return path
            except FileNotFoundError:
                pass
            aside = self.root / f".{path.name}.{os.getpid()}.tmp"
            try:
                self._download(place, aside)
                aside.replace(path)
            finally:
                aside.unlink(missing_ok=True)
        return path

    def _download(self, place: str, aside: Path) -> None:
        """Try a few times, with growing pauses; raises InputError."""
        for attempt in range(_TRIES):
            try:
                return self._download_once(place, aside)
            except (OSError, EOFError) as error:
                code = getattr(error, "code", None)
                if attempt == _TRIES - 1 or (isinstance(code, int) and 400 <= code < 500):
                    raise InputError(f"shard {place} cannot be fetched: {error}; check the address") from error
                time.sleep(0.2 * 4**attempt)

    def _download_once(self, place: str, aside: Path) -> None:
        if urlsplit(place).scheme not in ("http", "https", "file"):
            raise InputError(f"shard {place}: expected an address of http, https or file, or a local path")
        request = urllib.request.Request(place, headers={"User-Agent": "undiffuse"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response, open(aside, "wb") as file:
            expected = int(response.headers.get("Content-Length") or -1)
            self._room(place, max(0, expected))
            size = 0
            while piece := response.read(_PIECE):
                size += len(piece)
                if expected < 0 or size > expected:
                    self._room(place, size)
                file.write(piece)
            if 0 <= expected != size:
                raise EOFError(f"{size} of {expected} bytes arrived")

    def _room(self, place: str, size: int) -> None:
        """Evict until `size` bytes fit."""
        if size > self.limit:
            raise InputError(f"shard {place} has {size} bytes, the cache {self.limit}: raise the bytes of the cache")
        with _locked(self.root / ".lock"):
            found = []
            for path in self.root.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if not path.name.startswith(".") and path.is_file():
                        found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            total = sum(bytes_ for _, bytes_, _ in found)
            for _, bytes_, path in sorted(found):
                if total + size <= self.limit:
                    break
                path.unlink(missing_ok=True)
                total -= bytes_

    def index(self, place: str, make: Callable[[BinaryIO], dict[str, Any]]) -> dict[str, Any]:
        """What `make` found in a shard: made once, kept as JSON in root/index until a local shard changes."""
        stamp = [0, 0]
        if not is_remote(place):
            with contextlib.suppress(OSError):
                stat = os.stat(place)
                stamp = [stat.st_size, stat.st_mtime_ns]
        key = place if is_remote(place) else os.path.abspath(place)
        path = self.root / "index" / f"{digest(key, make.__name__)[:32]}.index.json"
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            known: dict[str, Any] = json.loads(path.read_text())
            if known["stamp"] == stamp and known["place"] == key and known["version"] == 1:
                return known
        with self.open(place) as file:
            found = {"version": 1, "place": key, "stamp": stamp, **make(file)}
        with contextlib.suppress(OSError):  # without it, the next run makes it again
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            aside.write_text(json.dumps(found))
            aside.replace(path)
        return found


class Shards:
    """What sources of shards share: finding a sample's shard, and the fingerprint."""

    places: tuple[str, ...]
    _starts: list[int]

    def _stamps(self) -> Iterable[tuple[Any, Any]]:
        """Each shard's size and time, and its samples as they were found."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self._starts[-1]

    def _find(self, i: int) -> tuple[int, int]:
        """The shard of sample i, and its place there."""
        shard = bisect.bisect_right(self._starts, i) - 1
        return shard, i - self._starts[shard]

    def fingerprint(self) -> str:
        """SHA-256 over the shards' names, sizes and times (of remote ones their names) and their numbers of samples."""
        stamps = zip(self.places, self._stamps(), strict=True)
        return digest(*(json.dumps([Path(place).name, *stamp]) for place, stamp in stamps))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among processes, where the system has file locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Recent(Generic[T]):
    """The most recently used values by key, at most `keep` of them and `limit` bytes; empty after pickling."""

    def __init__(self, keep: int, limit: int = 1 << 62) -> None:
        self.keep, self.limit = keep, limit
        self.kept: OrderedDict[Any, tuple[T, int]] = OrderedDict()

    def __reduce__(self) -> tuple[type[Recent[T]], tuple[int, int]]:
        return type(self), (self.keep, self.limit)

    def get(self, key: Any, make: Callable[[], tuple[T, int]]) -> T:
        """The value of `key`, made (with its bytes) if it is not here."""
        if key not in self.kept:
            value = make()
            self.kept[key] = value
            while len(self.kept) > 1 and (
                len(self.kept) > self.keep or sum(size for _, size in self.kept.values()) > self.limit
            ):
                self.kept.popitem(last=False)
            return value[0]
        self.kept.move_to_end(key)
        return self.kept[key][0]
