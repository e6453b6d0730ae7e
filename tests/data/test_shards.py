"""Shards: what is in them, the index, windows, and the bounded cache of fetched ones."""

import functools
import http.server
import io
import json
import multiprocessing
import pickle
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from undiffuse import InputError
from undiffuse.data import Feed, Prepare, Subset, Unreadable, Windowed, open_source, order_for, split
from undiffuse.data.cache import Cache, Recent
from undiffuse.data.order import shard_of
from undiffuse.data.shards import braces, split_name

from .helpers import coded, flat, tar, tree, values, write


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def shard(path, start, count, side=4):
    """Samples start, ..., of gray value and label by their number."""
    members = {}
    for k in range(start, start + count):
        members |= {f"{k:04d}.png": flat(k % 250, side), f"{k:04d}.cls": str(k % 5).encode()}
    return tar(path, members)


@pytest.fixture
def shards(tmp_path):
    """Twelve shards of ten samples, and 5 more in the last."""
    for s in range(13):
        shard(tmp_path / "set" / f"part-{s:02d}.tar", 10 * s, 5 if s == 12 else 10)
    return tmp_path / "set"


@pytest.fixture
def server(shards):
    """An address at which the shards are served, and the requests that came."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(shards)))
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", asked
    running.shutdown()
    running.server_close()


def test_files_of_one_basename_are_a_sample(tmp_path):
    mask, depth, x = (
        np.arange(16).reshape(4, 4),
        np.ones((4, 4), np.float32),
        np.random.default_rng(0).normal(size=(2, 5)),
    )
    members = {
        "in/a.png": flat(7),
        "in/a.cls": b" 2\n",
        "in/a.txt": "a böat\n".encode(),
        "in/a.depth.npy": npy(depth),
        "in/a.segmentation.png": coded(mask.astype(np.uint8)),
        "in/b.json": b'{"label": 4, "caption": "two", "x": 1}',
        "in/b.JPG": coded(np.full((4, 4), 90, np.uint8), "JPEG"),
        "c.npy": npy(x),
        "c.cls": b"0",
    }
    source = open_source(str(tar(tmp_path / "a.tar", members)), cache=tmp_path / "cache")
    assert (len(source), source.counts, source.classes) == (3, (3,), tuple("01234"))
    assert source.columns == ("depth", "segmentation", "text")
    a, b = (Prepare()(source.read(i), 0, 0) for i in range(2))
    assert (a.label, a.columns["text"], b.label, b.columns["text"]) == (2, "a böat", 4, "two")
    assert np.array_equal(a.columns["segmentation"], mask)
    assert np.array_equal(a.columns["depth"][0], depth)
    assert np.array_equal(source.read(2).x, x)
    assert [source.read(i).where.split("a.tar/")[1] for i in range(3)] == ["in/a", "in/b", "c"]


def test_a_folder_a_pattern_and_a_list_of_braces_are_the_same(shards, tmp_path):
    cache = {"cache": tmp_path / "cache"}
    before = tree(shards)
    names = [str(shards), f"{shards}/part-*.tar", f"{shards}/part-{{00..12}}.tar", f"{shards}/part-{{0,1}}[0-9].tar"]
    for name in names:
        source = open_source(name, **cache)
        assert values(source) == list(range(125))
        assert [source.read(i).label for i in range(125)] == [i % 5 for i in range(125)]
        assert source.counts == (10,) * 12 + (5,)
    assert tree(shards) == before
    with pytest.raises(InputError, match=r"part-13.tar does not exist"):
        open_source(f"{shards}/part-{{00..13}}.tar", **cache)


def test_braces_and_names():
    assert list(braces("{a,b}-{1..3}")) == ["a-1", "a-2", "a-3", "b-1", "b-2", "b-3"]
    assert list(braces("plain")) == ["plain"]
    with pytest.raises(InputError, match="more than a million"):
        list(braces("x{0..99999999}"))
    assert split_name("a.b/c.seg.PNG") == ("a.b/c", "seg.png")


def test_train_and_test_folders_of_shards_are_splits(tmp_path):
    shard(tmp_path / "set" / "train" / "0.tar", 0, 3)
    shard(tmp_path / "set" / "test" / "0.tar", 50, 2)
    source = open_source(str(tmp_path / "set"), cache=tmp_path / "cache")
    assert (values(source), values(source.test)) == ([0, 1, 2], [50, 51])


def test_the_last_whole_shards_are_held_out(shards, tmp_path):
    source = open_source(str(shards), cache=tmp_path / "cache")
    train, held = split(source, 12)
    assert (len(train), train.counts) == (110, (10,) * 11)
    assert ((held.x.mean((1, 2, 3)) + 1) * 127.5).round().tolist() == list(range(110, 122))
    assert values(train) == list(range(110))
    assert isinstance(order_for(train, Prepare(), 0), Windowed)
    with pytest.raises(InputError, match="needs samples in any order"):
        order_for(train, Prepare(size=4, buckets=(1.0,)))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_shards_has_every_sample_once(shards, tmp_path, workers):
    source = open_source(str(shards), cache=tmp_path / "cache")
    order = order_for(source, Prepare(), seed=1, window=3)
    batches = list(Feed(source, Prepare(), order, 1, workers=workers).steps(1, 50, 5))
    ids = torch.cat([b.ids for b in batches])
    assert [sorted(e.tolist()) for e in ids.view(2, 125)] == [list(range(125))] * 2
    gray = ((torch.cat([b.x for b in batches]).mean((1, 2, 3)) + 1) * 127.5).round()
    assert torch.equal(gray.long(), ids)
    assert torch.equal(torch.cat([b.labels for b in batches]), ids % 5)


def test_the_index_is_made_once_and_again_when_a_shard_changes(shards, tmp_path, monkeypatch):
    cache, opened = tmp_path / "cache", []
    real = Cache.open
    monkeypatch.setattr(Cache, "open", lambda self, place: (opened.append(place), real(self, place))[1])
    first = open_source(str(shards), cache=cache)
    assert len(opened) == 13
    again = open_source(str(shards), cache=cache)
    assert len(opened) == 13
    assert first.fingerprint() == again.fingerprint()
    shard(shards / "part-03.tar", 200, 7)
    changed = open_source(str(shards), cache=cache)
    assert len(opened) == 14
    assert values(changed)[25:45] == [*range(25, 30), *range(200, 207), *range(40, 48)]
    assert changed.fingerprint() != first.fingerprint()
    for path in (cache / "index").iterdir():
        path.write_text(path.read_text()[:50])
    assert values(open_source(str(shards), cache=cache)) == values(changed)
    assert values(pickle.loads(pickle.dumps(changed))) == values(changed)


# ---------------------------------------------------------------- what is wrong in shards


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_pickles_are_passed_over_and_reported(tmp_path):
    mark = tmp_path / "executed"
    evil = pickle.dumps(Payload(mark))
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    members = {
        "a.png": flat(1),
        "a.pyd": evil,
        "a.pickle": evil,
        "a.pth": evil,
        "b.npy": buffer.getvalue(),
        "c.pkl": evil,
    }
    with pytest.warns(UserWarning, match=r"passed over: 1 \.\w+, 1 \.\w+, 1 \.\w+, 1 \.\w+"):
        source = open_source(str(tar(tmp_path / "a.tar", members)), cache=tmp_path / "cache")
    assert source.ignored == {"pyd": 1, "pickle": 1, "pth": 1, "pkl": 1}
    assert (len(source), Prepare()(source.read(0), 0, 0).columns) == (2, {})
    with pytest.raises(Unreadable, match=r"its .npy cannot be read.*allow_pickle=False"):
        source.read(1)
    assert not mark.exists()
    pickle.loads(evil)
    assert mark.exists()


def test_damaged_members_are_unreadable_and_the_others_are_read(tmp_path):
    members = {
        "a.png": flat(1),
        "a.cls": b"1",
        "b.txt": b"no picture",
        "b.cls": b"0",
        "c.png": flat(2),
        "c.cls": b"cat",
        "d.png": flat(3),
        "d.json": b"{",
        "e.npy": b"no array",
        "e.cls": b"0",
        "f.png": b"",
        "f.cls": b"1",
    }
    source = open_source(str(tar(tmp_path / "a.tar", members)), cache=tmp_path / "cache")
    why = {}
    for i in range(6):
        try:
            Prepare()(source.read(i), 0, 0)
        except Unreadable as error:
            why[error.where.removeprefix(f"{tmp_path}/a.tar/")] = error.reason
    assert list(why) == list("bcdef")
    for key, text in zip(
        "bcdef", ["neither picture", "'cat' is not", "json cannot", "npy cannot", "is empty"], strict=True
    ):
        assert text in why[key]


def test_truncated_shards_give_what_is_whole(tmp_path):
    path = shard(tmp_path / "a.tar", 0, 10)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 // 512 * 512 - 500])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = open_source(str(path), cache=tmp_path / "cache")
    good = [i for i in range(len(source)) if not _wrong(source, i)]
    assert 3 <= len(good) < 10
    assert values(Subset(source, good)) == good
    for content in (b"", b"not a tar at all" * 100, whole[:100]):
        path.write_bytes(content)
        with pytest.raises(InputError):
            open_source(str(path), cache=tmp_path / "cache")


def _wrong(source, i):
    try:
        Prepare()(source.read(i), 0, 0)
    except Unreadable:
        return True
    return False


def test_compressed_and_mixed_shards_are_refused(tmp_path):
    write(tmp_path / "a.tar.gz", b"x")
    with pytest.raises(InputError, match="gunzip"):
        open_source(str(tmp_path / "a.tar.gz"), cache=tmp_path / "cache")
    shard(tmp_path / "set" / "a.tar", 0, 1)
    write(tmp_path / "set" / "b.parquet", b"x")
    with pytest.raises(InputError, match="all of one kind"):
        open_source(str(tmp_path / "set"), cache=tmp_path / "cache")
    with pytest.raises(InputError, match="without a sample"):
        open_source(str(tar(tmp_path / "none.tar", {"a.pyd": b"x"})), cache=tmp_path / "cache")


# ---------------------------------------------------------------- tensors


def tensors(path, start, count, **more):
    """A .safetensors shard of samples that are their number everywhere, with the label of `shard`."""
    numbers = torch.arange(start, start + count)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {"x": numbers.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous(), "label": numbers % 5, **more}, path
    )
    return path


def numbers(source):
    return [int(source.read(i).x[0, 0, 0]) for i in range(len(source))]


def test_shards_of_tensors_are_read_by_number(tmp_path, server, shards):
    for s, count in enumerate((4, 1, 5)):
        tensors(tmp_path / "t" / f"part-{s}.safetensors", 10 * s, count, text_length=torch.ones(count))
        tensors(shards / f"part-{s}.safetensors", 10 * s, count)
    names = [str(tmp_path / "t"), str(tmp_path / "t/*.safetensors"), f"{server[0]}/part-{{0..2}}.safetensors"]
    for name in names:
        source = open_source(name, cache=tmp_path / "cache")
        assert (source.counts, source.classes) == ((4, 1, 5), tuple("01234"))
        assert numbers(source) == [0, 1, 2, 3, 10, 20, 21, 22, 23, 24]
        assert [source.read(i).label for i in range(10)] == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4]
        assert source.read(4).where.endswith("part-1.safetensors[0]")
        assert numbers(pickle.loads(pickle.dumps(source))) == numbers(source)
        assert isinstance(order_for(source, Prepare()), Windowed)
    source = open_source(names[0], cache=tmp_path / "cache")
    assert source.columns == ("text_length",)
    before = source.fingerprint()
    tensors(tmp_path / "t" / "part-2.safetensors", 20, 6)
    assert open_source(names[0], cache=tmp_path / "cache").fingerprint() != before


def test_shards_of_tensors_for_testing_are_held_out(tmp_path):
    for folder, start in (("train", 0), ("test", 50)):
        tensors(tmp_path / "set" / folder / "a.safetensors", start, 3)
    source = open_source(str(tmp_path / "set"), cache=tmp_path / "cache")
    assert (numbers(source), numbers(source.test)) == ([0, 1, 2], [50, 51, 52])


def test_damaged_shards_of_tensors_are_named(tmp_path):
    path = tensors(tmp_path / "t" / "a.safetensors", 0, 4)
    tensors(tmp_path / "t" / "b.safetensors", 4, 4)
    source, whole = open_source(str(tmp_path / "t"), cache=tmp_path / "cache"), path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(Unreadable, match=r"a\.safetensors is not a readable array file"):
        source.read(0)
    with pytest.raises(InputError, match=r"a\.safetensors is not a readable array file"):
        open_source(str(tmp_path / "t"), cache=tmp_path / "cache")
    tensors(path, 0, 2)
    with pytest.raises(Unreadable, match="the shard was changed"):
        source.read(3)
    assert int(source.read(4).x[0, 0, 0]) == 4


# ---------------------------------------------------------------- fetched shards


def held(root):
    """The shards in a cache, and the bytes of all but the index."""
    found = [p for p in root.iterdir() if p.is_file() and p.suffix == ".tar"]
    return len(found), sum(p.stat().st_size for p in root.iterdir() if p.is_file())


def test_more_than_the_cache_holds_streams_through_it(shards, server, tmp_path):
    address, asked = server
    size = (shards / "part-00.tar").stat().st_size
    cache = tmp_path / "cache"
    source = open_source(f"{address}/part-{{00..12}}.tar", cache=cache, cache_bytes=3 * size)
    assert source.counts == (10,) * 12 + (5,)
    assert len(asked) == 13
    object.__setattr__(source, "_recent", Recent(2))
    order = order_for(source, Prepare(), seed=0, window=2)
    seen = []
    for batch in Feed(source, Prepare(), order, 0, cache=0).steps(1, 25, 5):
        seen += batch.ids.tolist()
        assert held(cache)[0] <= 3
        assert held(cache)[1] <= 3 * size
    assert sorted(seen) == list(range(125))
    assert len(asked) <= 13 + 13 + 2
    windows = [len(set(shard_of(source.counts, torch.tensor(seen[k : k + 20])).tolist())) for k in range(0, 120, 20)]
    assert max(windows) <= 4


def test_shards_are_fetched_once_while_they_fit(shards, server, tmp_path):
    address, asked = server
    for name in (f"{address}/part-{{00..03}}.tar", f"file://{shards}/part-{{00..03}}.tar"):
        for _ in range(2):
            assert values(open_source(name, cache=tmp_path / "cache")) == list(range(40))
    assert len(asked) == 4
    assert held(tmp_path / "cache")[0] == 8


def test_the_least_recently_used_shard_goes_first(shards, server, tmp_path):
    address, asked = server
    cache = Cache(tmp_path / "cache", 2 * (shards / "part-00.tar").stat().st_size)
    for k in (0, 1, 0, 2, 0, 1):
        cache.open(f"{address}/part-0{k}.tar").close()
        time.sleep(0.02)
    assert asked == [f"/part-0{k}.tar" for k in (0, 1, 2, 1)]


def test_shards_that_cannot_be_fetched_are_said(server, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    address, asked = server
    cache = tmp_path / "cache"
    with pytest.raises(InputError, match=r"absent.tar cannot be fetched: HTTP Error 404"):
        open_source(f"{address}/absent.tar", cache=cache)
    assert len(asked) == 1
    with pytest.raises(InputError, match="cannot be fetched"):
        open_source("http://127.0.0.1:9/a.tar", cache=cache)
    with pytest.raises(InputError, match="expected an address of http, https or file"):
        open_source("ftp://127.0.0.1/a.tar", cache=cache)
    with pytest.raises(InputError, match="raise the bytes of the cache"):
        open_source(f"{address}/part-00.tar", cache=cache, cache_bytes=1000)
    assert [p for p in cache.iterdir() if p.suffix != ".lock"] == []


def test_a_broken_transfer_is_tried_again(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    content, tries = (shards / "part-00.tar").read_bytes(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            tries.append(1)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if len(tries) > 2 else content[:700])

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    source = open_source(f"http://127.0.0.1:{running.server_port}/a.tar", cache=tmp_path / "cache")
    running.shutdown()
    running.server_close()
    assert values(source) == list(range(10))
    assert len(tries) == 3


def _read_all(address, cache, size, out):
    source = open_source(f"{address}/part-{{00..05}}.tar", cache=cache, cache_bytes=2 * size)
    out.put([v for _ in range(3) for v in values(source)])


def test_processes_share_a_cache_that_is_too_small_for_them(shards, server, tmp_path):
    size, context = (shards / "part-00.tar").stat().st_size, multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    processes = [context.Process(target=_read_all, args=(server[0], tmp_path / "cache", size, out)) for _ in range(3)]
    for p in processes:
        p.start()
    found = [out.get() for _ in processes]
    for p in processes:
        p.join()
    assert found == [list(range(60)) * 3] * 3
    assert held(tmp_path / "cache")[1] <= 2 * size
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_each_process_fetches_shards_of_its_own(shards, server, tmp_path):
    address, asked = server
    source = open_source(f"{address}/part-{{00..11}}.tar", cache=tmp_path / "a")
    order = order_for(source, Prepare(), 0, window=2, lanes=2)
    del asked[:]
    fetched = []
    for rank in range(2):
        mine = open_source(f"{address}/part-{{00..11}}.tar", cache=tmp_path / "a")
        object.__setattr__(mine, "cache", Cache(tmp_path / f"rank-{rank}", 1 << 30))
        list(Feed(mine, Prepare(), order, 0).steps(1, 30, 4, rank, 2))
        fetched.append(set(asked))
        del asked[:]
    assert not fetched[0] & fetched[1]
    assert len(fetched[0] | fetched[1]) == 12


def test_large_tables_are_read_by_row_group(tmp_path, monkeypatch):
    from .test_sources import parquet, rows

    monkeypatch.setattr("undiffuse.data.table._MEMORY", 1500)
    parquet(tmp_path / "set" / "a.parquet", rows(20), groups=4)
    parquet(tmp_path / "set" / "b.parquet", rows(6, 100), groups=4)
    source = open_source(str(tmp_path / "set"), cache=tmp_path / "cache")
    assert source.counts == (4, 4, 4, 4, 4, 4, 2)
    assert values(source) == [*range(20), *range(100, 106)]
    ids = torch.cat([b.ids for b in Feed(source, Prepare(), order_for(source, Prepare(), 0, 2), 0).steps(1, 13, 2)])
    assert sorted(ids.tolist()) == list(range(26))
    assert len(source._recent.kept) < 7
    monkeypatch.setattr("undiffuse.data.table._GROUP", 300)
    with pytest.raises(InputError, match="write smaller ones"):
        open_source(str(tmp_path / "set"), cache=tmp_path / "cache").read(0)


def test_tables_come_from_addresses(shards, server, tmp_path):
    from .test_sources import parquet, rows

    parquet(shards / "t.parquet", rows(6), groups=4)
    source = open_source(f"{server[0]}/t.parquet?download=1", cache=tmp_path / "cache")
    assert values(source) == list(range(6))
    assert source.counts == (4, 2)


def test_an_index_is_plain_json(shards, tmp_path):
    open_source(str(shards), cache=tmp_path / "cache")
    found = [json.loads(p.read_text()) for p in (tmp_path / "cache" / "index").iterdir()]
    assert sorted(i["place"] for i in found) == sorted(str(p) for p in shards.iterdir())
