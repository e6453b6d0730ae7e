"""Hostile data: refused before memory is taken, nothing run, nothing written outside the cache."""

import io
import json
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib

import numpy as np
import pytest

from undiffuse import InputError
from undiffuse.data import Prepare, Unreadable, open_source
from undiffuse.data.arrays import check_zip
from undiffuse.data.picture import decode, header

from .helpers import coded, flat, pixels, tar, tree, values, write


def png(width, height, depth=8, kind=2, data=b""):
    """A PNG of that header, with packed `data`."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def zeros(count):
    """`count` zero bytes, packed, without ever holding them."""
    packer = zlib.compressobj(6)
    first, other = (packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + other * (count >> 20) + packer.flush()


def bombs(root):
    """Files that would take from 200 MB to many GB."""
    write(root / "header.png", png(65535, 65535))
    write(root / "wide.png", png(2**31 - 1, 1, kind=0))
    write(root / "flat.png", png(8000, 8000, kind=0, data=zeros(8001 * 8000)))
    write(root / "grown.png", png(16000, 5500, kind=2, data=zeros(48001 * 5500)))
    write(root / "huge.gif", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + bytes(200))
    write(
        root / "huge.bmp",
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 60, 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0),
    )
    return root


def arrays(root):
    """Array files that would."""
    packed = {"zip.npz": 220 << 20, "small.npz": 80 << 20}
    for name, size in packed.items():
        with zipfile.ZipFile(root / name, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|u1", "fortran_order": False, "shape": (size >> 20, 1, 1 << 20)}
            )
            for _ in range(size >> 20):
                file.write(bytes(1 << 20))
    with open(root / "claims.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (2**40, 1, 8)})
        file.write(bytes(100))
    with zipfile.ZipFile(root / "many.npz", "w") as archive:
        for k in range(30_000):
            archive.writestr(f"{k:040d}.npy", b"")
    write(root / "head.safetensors", struct.pack("<Q", 2**40) + b"{}")
    entry = {"dtype": "F32", "shape": [2**40, 1, 1], "data_offsets": [0, 2**42]}
    text = json.dumps({"x": entry}).encode()
    write(root / "claims.safetensors", struct.pack("<Q", len(text)) + text)
    return sorted(p.name for p in root.iterdir())


_ATTACK = """
import resource, sys, warnings
from pathlib import Path
from undiffuse import InputError
from undiffuse.data import Prepare, open_source
import pyarrow.parquet, safetensors, PIL.Image, numpy.lib.format
warnings.simplefilter("ignore")
pictures, files, cache = map(Path, sys.argv[1:])
PIL.Image.init()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
refused = 0
source = open_source(str(pictures))
for i in range(len(source)):
    for prepare in (Prepare(), Prepare(size=64), Prepare(size=64, buckets=(0.5, 2.0))):
        try:
            prepare(source.read(i), 0, 0)
            print("read", source.read(i).where)
        except InputError as error:
            refused += 1
for path in sorted(files.iterdir()):
    try:
        open_source(str(path), cache=cache).read(0)
        print("read", path)
    except InputError as error:
        refused += 1
print(refused, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder of pictures and one of files, and the names of the latter."""
    root = tmp_path_factory.mktemp("hostile")
    bombs(root / "pictures")
    (root / "files").mkdir()
    tables(root / "files" / "packed.parquet")
    return root, arrays(root / "files")


def test_bombs_are_refused_before_memory_is_taken(hostile, tmp_path):
    root, names = hostile
    places = [str(p) for p in (root / "pictures", root / "files", tmp_path / "cache")]
    done = subprocess.run([sys.executable, "-c", _ATTACK, *places], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *read, last = done.stdout.strip().splitlines()
    refused, grown = map(int, last.split())
    assert read == []
    assert refused == 3 * 6 + len(names)
    assert grown < 200, f"memory grew by {grown} MiB"


def tables(path):
    """A small file whose one row group would be 4 GB."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    big = pa.array([b"\0" * (1 << 20)])
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(4096, np.int32)), big)
    pq.write_table(pa.table({"image": column}), path, store_schema=False)  # read back as plain bytes


def test_the_reasons_name_the_size(hostile):
    root, _ = hostile
    with pytest.raises(Unreadable, match=r"65535 x 65535|decompression bomb"):
        decode(png(65535, 65535), "x")
    with pytest.raises(Unreadable, match="refused as a decompression bomb"):
        decode(root / "pictures" / "flat.png", "x")
    with pytest.raises(InputError, match=r"x.npy would grow from \d+ to \d+ bytes.*np.savez"):
        open_source(str(root / "files" / "zip.npz"))
    with pytest.raises(InputError, match="list of members is longer"):
        open_source(str(root / "files" / "many.npz"))


def test_large_honest_files_are_read(tmp_path):
    photo = pixels(0, 3000, 4000)  # 36 MB of noise
    assert decode(coded(photo, "JPEG"), "x").shape == (3, 3000, 4000)
    assert decode(coded(np.zeros((2000, 2000, 3), np.uint8)), "x").shape == (3, 2000, 2000)
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((60, 1, 1000, 1000), np.uint8))  # 60 MB, packed 1000 times
    assert len(open_source(str(tmp_path / "a.npz"))) == 60
    np.savez(tmp_path / "b.npz", x=np.zeros((100, 1, 1000, 1000), np.uint8))
    check_zip(tmp_path / "b.npz")


def test_vector_formats_and_scripts_are_not_opened(tmp_path):
    evil = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touched) (w) file closefile\n"
    with pytest.raises(Unreadable, match="not a picture of a known format"):
        decode(evil, "x")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_damaged_pictures_are_read_or_unreadable_wherever_the_damage_is(format):
    whole = coded(pixels(0, 6, 6), format)
    rng = np.random.default_rng(0)
    for k in range(200):
        content = bytearray(whole)
        at = int(rng.integers(len(whole)))
        content = content[:at] if k % 4 == 0 else content
        for _ in range(k % 4):
            content[int(rng.integers(len(content)))] = int(rng.integers(256))
        for read in (lambda c: header(c, "x"), lambda c: decode(c, "x", 4), lambda c: decode(c, "x", indices=True)):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = read(bytes(content))
            except Unreadable:
                continue
            else:
                assert all(side > 0 for side in getattr(found, "shape", found))


def entry(name, kind=tarfile.REGTYPE, target="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (entry("../../out.png"), "leads out"),
        (entry("/tmp/out.png"), "leads out"),
        (entry("a/../../out.png"), "leads out"),
        (entry("link.png", tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
        (entry("hard.png", tarfile.LNKTYPE, "ok.png"), "is a link"),
        (entry("device.png", tarfile.CHRTYPE), "device"),
        (entry("block.png", tarfile.BLKTYPE), "device"),
        (entry("pipe.png", tarfile.FIFOTYPE), "device"),
        (entry("long.png", size=2**40), "may|GiB|MiB|cut off"),
    ],
)
def test_tricks_in_shards_are_refused_and_recorded(tmp_path, bad, why):
    root = tmp_path / "set"
    tar(root / "a.tar", {"ok.png": flat(1)}, [bad])
    before = tree(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = open_source(str(root), cache=tmp_path / "cache")
    assert len(source) == 2
    with pytest.raises(Unreadable, match=why) as caught:
        source.read(1)
    assert str(root / "a.tar") in caught.value.where
    assert Prepare()(source.read(0), 0, 0).x.shape == (1, 4, 4)
    after = {k: v for k, v in tree(tmp_path).items() if not k.startswith("cache/")}
    assert after == before
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {"index"}


def test_shards_of_countless_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("undiffuse.data.shards._MEMBERS", 20)
    path = tar(tmp_path / "a.tar", {f"{k}.png": flat(k) for k in range(21)})
    with pytest.raises(InputError, match="more than 20 members"):
        open_source(str(path), cache=tmp_path / "cache")


def test_damaged_shards_are_read_or_refused_wherever_the_damage_is(tmp_path):
    members = {k: v for i in range(3) for k, v in {f"{i}.png": flat(i), f"{i}.cls": b"1", f"{i}.json": b"{}"}.items()}
    whole, rng = tar(tmp_path / "a.tar", members).read_bytes(), np.random.default_rng(0)
    for k in range(150):
        content = bytearray(whole[: int(rng.integers(len(whole)))] if k % 3 == 0 else whole)
        for _ in range(k % 3):
            content[int(rng.integers(len(content)))] ^= int(rng.integers(1, 256))
        write(tmp_path / "b.tar", bytes(content))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                source = open_source(str(tmp_path / "b.tar"), cache=tmp_path / "cache")
            except InputError:
                continue
            for i in range(len(source)):
                try:
                    Prepare()(source.read(i), 0, 0)
                except InputError:
                    continue


def test_an_index_from_elsewhere_reads_nothing_outside_its_shard(tmp_path):
    path = tar(tmp_path / "a.tar", {"a.png": flat(1)})
    open_source(str(path), cache=tmp_path / "cache")
    (index,) = (tmp_path / "cache" / "index").iterdir()
    found = json.loads(index.read_text())
    found["samples"] = [["../../etc/passwd", {"png": [0, 10**15]}, ""]]
    index.write_text(json.dumps(found))
    with pytest.raises(InputError):
        open_source(str(path), cache=tmp_path / "cache").read(0)


def test_an_archive_with_nested_folders_keeps_its_names_apart(tmp_path):
    path = tar(tmp_path / "a.tar", {"x/a.png": flat(1), "y/a.png": flat(2)})
    assert values(open_source(str(path), cache=tmp_path / "cache")) == [1, 2]
    assert io.BytesIO(path.read_bytes()).read(1) == b"x"
