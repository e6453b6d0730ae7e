"""Batches: the same for any number of workers and processes, resumed anywhere, and past damaged samples."""

import json
import multiprocessing
import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from undiffuse import InputError
from undiffuse.data import (
    Arrays,
    Data,
    Feed,
    InMemory,
    Prepare,
    Raw,
    Shuffled,
    Unreadable,
    Windowed,
    from_data,
    order_for,
)
from undiffuse.data import open_source as open_folder
from undiffuse.data.feed import Ledger, of_rank

from .helpers import coded, flat, pixels, tree, write

SEED = 11


def feed(source, prepare=None, order=None, **options):
    prepare = prepare or Prepare()
    return Feed(source, prepare, order or order_for(source, prepare, SEED), SEED, **options)


@pytest.fixture
def folder(tmp_path):
    for i in range(30):
        write(tmp_path / "set" / "ab"[i % 2] / f"{i:02d}.png", coded(pixels(i, 12, 10 + i % 9)))
    return tmp_path / "set"


AUGMENTED = Prepare(size=8, crop="random", flip=True)


def same(a, b):
    return (
        torch.equal(a.x, b.x)
        and torch.equal(a.ids, b.ids)
        and torch.equal(a.index, b.index)
        and torch.equal(a.labels, b.labels)
    )


def test_batches_hold_what_the_order_says(folder):
    source = open_folder(str(folder))
    for step, batch in enumerate(feed(source, AUGMENTED).steps(1, 7, 6), 1):
        assert torch.equal(batch.ids, Shuffled(30, SEED).rows(step, 6))
        assert batch.index.tolist() == list(range((step - 1) * 6, step * 6))
        assert (batch.x.shape, batch.x.dtype, len(batch)) == ((6, 3, 8, 8), torch.float32, 6)
        for row, i, g in zip(batch.x, batch.ids.tolist(), batch.index.tolist(), strict=True):
            assert torch.equal(row, AUGMENTED(source.read(i), g, SEED).x)
        assert batch.labels.tolist() == [source.read(i).label for i in batch.ids.tolist()]


def test_workers_change_nothing_and_leave_nothing(folder):
    source = open_folder(str(folder))
    torch.manual_seed(0)
    alone = list(feed(source, AUGMENTED).steps(1, 12, 6))
    state = torch.get_rng_state()
    before = set(multiprocessing.active_children())
    running = feed(source, AUGMENTED, workers=2).steps(1, 12, 6)
    together = [next(running) for _ in range(5)]
    assert len(set(multiprocessing.active_children()) - before) == 2
    running.close()
    assert not set(multiprocessing.active_children()) - before
    together += list(feed(source, AUGMENTED, workers=2).steps(6, 12, 6))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_processes_share_out_the_batch_and_runs_resume_anywhere(folder):
    source = open_folder(str(folder))
    whole = list(feed(source, AUGMENTED).steps(1, 12, 6))
    for world in (2, 3):
        parts = [list(feed(source, AUGMENTED).steps(1, 12, 6, r, world)) for r in range(world)]
        for step, batch in enumerate(whole):
            joined = torch.stack([p[step].x for p in parts], 1).flatten(0, 1)
            assert torch.equal(joined, batch.x)
            assert torch.equal(torch.stack([p[step].index for p in parts], 1).flatten(), batch.index)
    for first in (2, 5, 6, 12):
        assert all(
            same(a, b) for a, b in zip(whole[first - 1 :], feed(source, AUGMENTED).steps(first, 12, 6), strict=True)
        )


def test_the_cache_changes_nothing(folder):
    source = open_folder(str(folder))
    kept, fresh = (list(feed(source, AUGMENTED, cache=c).steps(1, 12, 6)) for c in (1 << 20, 0))
    assert all(same(a, b) for a, b in zip(kept, fresh, strict=True))


def test_buckets_come_in_batches_of_one_shape(folder):
    prepare = Prepare(size=16, buckets=(0.8, 1.0, 1.5), multiple=2, crop="random")
    source = open_folder(str(folder))
    batches = list(feed(source, prepare).steps(1, 30, 4))
    assert len({tuple(b.x.shape[2:]) for b in batches}) == 3
    assert {tuple(b.x.shape[2:]) for b in batches} <= set(prepare.shapes())
    assert set(torch.cat([b.ids for b in batches]).tolist()) == set(range(30))


def test_what_workers_need_can_be_sent_to_them(folder):
    for order in (None, Windowed((10, 20), 0, 1)):
        for prepare in (AUGMENTED, replace(AUGMENTED, buckets=(1.0, 1.4)) if order is None else AUGMENTED):
            given = feed(open_folder(str(folder)), prepare, order)
            sent = pickle.loads(pickle.dumps(given))
            assert all(same(a, b) for a, b in zip(given.steps(1, 9, 5), sent.steps(1, 9, 5), strict=True))


def test_columns_are_lists(tmp_path):
    source = Arrays(np.zeros((6, 1, 4, 4), np.uint8), extra={"text": np.array(list("abcdef")), "age": np.arange(6)})
    (batch,) = feed(source).steps(1, 1, 4)
    assert batch.columns == {"text": ["abcdef"[i] for i in batch.ids], "age": batch.ids.tolist()}
    assert batch.labels is None


def test_wrong_shares_of_a_batch_are_refused(folder):
    for rank, world, batch in ((2, 2, 6), (-1, 1, 6), (0, 7, 6)):
        with pytest.raises(InputError, match="at least one row a process"):
            next(feed(open_folder(str(folder)), AUGMENTED).steps(1, 1, batch, rank, world))
    with pytest.raises(InputError, match=r"engine.workers = -1"):
        feed(open_folder(str(folder)), workers=-1)


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_of_several_shapes_ask_for_a_size(folder, workers):
    with pytest.raises(InputError, match=r"one shape is needed: set data.size") as caught:
        list(feed(open_folder(str(folder)), workers=workers).steps(1, 3, 6))
    assert "Traceback" not in str(caught.value)


def test_in_memory_gives_rows_of_tensor_and_condition():
    x, cond = torch.randn(20, 2, 3), torch.arange(20)
    batches = list(InMemory(x, cond, 4, labels=cond % 3).steps(1, 9, 6))
    for step, batch in enumerate(batches, 1):
        assert torch.equal(batch.ids, Shuffled(20, 4).rows(step, 6))
        assert torch.equal(batch.x, x[batch.ids])
        assert torch.equal(batch.cond, batch.ids)
        assert torch.equal(batch.labels, batch.ids % 3)
    parts = [next(iter(InMemory(x, cond, 4).steps(3, 3, 6, r, 2))) for r in range(2)]
    assert torch.equal(torch.stack([p.x for p in parts], 1).flatten(0, 1), batches[2].x)
    assert parts[0].labels is None
    with pytest.raises(InputError, match="7 rows for 20 samples"):
        InMemory(x, cond[:7])


def test_data_in_memory_and_as_a_source_are_the_same():
    data = Data(torch.rand(30, 1, 4, 4), torch.arange(30) % 4)
    a = list(feed(from_data(data)).steps(1, 8, 7))
    b = list(InMemory(data.x, None, SEED, data.labels).steps(1, 8, 7))
    assert all(same(p, q) for p, q in zip(a, b, strict=True))


# ---------------------------------------------------------------- damaged samples


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    """600 flat pictures, of which six cannot be read: sample k is gray of k % 250."""
    root = tmp_path_factory.mktemp("dirty")
    for i in range(600):
        write(root / f"{i:03d}.png", flat(i % 250))
    noise = coded(pixels(3, 40, 40))
    bad = {
        17: noise[: len(noise) // 2],
        18: b"",
        101: b"I am a text",
        300: noise[:-30],
        301: noise[:20],
        599: b"\x89PNG",
    }
    for i, content in bad.items():
        write(root / f"{i:03d}.png", content)
    return root, bad


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (2, 1), (0, 2)])
def test_a_dirty_folder_is_trained_on(dirty, tmp_path, workers, world):
    root, bad = dirty
    before, source = tree(root), open_folder(str(root))
    ledger = tmp_path / "run" / "bad.jsonl"
    runs = [
        list(feed(source, Prepare(size=4, channels=1), workers=workers, ledger=ledger).steps(1, 60, 20, r, world))
        for r in range(world)
    ]
    for step in range(60):
        ids = torch.stack([run[step].ids for run in runs], 1).flatten().tolist()
        x = torch.stack([run[step].x for run in runs], 1).flatten(0, 1)
        wanted = Shuffled(600, SEED).rows(step + 1, 20).tolist()
        for got, want in zip(ids, wanted, strict=True):
            assert got == {17: 19, 18: 19, 101: 102, 300: 302, 301: 302, 599: 0}.get(want, want)
        assert ((x.mean((1, 2, 3)) + 1) * 127.5).round().tolist() == [i % 250 for i in ids]
    lines = [json.loads(text) for r in range(world) for text in of_rank(ledger, r).read_text().splitlines()]
    assert {line["where"].rpartition("/")[2] for line in lines} == {f"{i:03d}.png" for i in bad}
    reasons = {line["where"][-7:-4]: line["reason"] for line in lines}
    assert reasons["018"] == "the file is empty"
    assert "not a picture of a known format" in reasons["101"]
    assert all(reasons.values())
    for r in range(world):
        mine = of_rank(ledger, r).read_text().splitlines()
        assert len(mine) == len(set(mine))
    assert len(lines) == 6 or world > 1
    assert tree(root) == before


def test_a_ledger_is_written_once_over_several_runs(dirty, tmp_path):
    root, bad = dirty
    ledger = write(tmp_path / "bad.jsonl", "")
    for _ in range(2):
        list(feed(open_folder(str(root)), Prepare(size=4, channels=1), ledger=ledger).steps(1, 30, 20))
    assert len(ledger.read_text().splitlines()) == len(bad)
    ledger.write_text(ledger.read_text() + '{"where": "half')
    assert len(Ledger(ledger).known) == len(bad)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_damaged_samples_stop_the_run(dirty, tmp_path, workers):
    root, _ = dirty
    options = {"workers": workers, "ledger": tmp_path / "bad.jsonl"}
    with pytest.raises(InputError, match=r"more than data.bad_share = 0.005 allows.*bad.jsonl") as caught:
        list(feed(open_folder(str(root)), Prepare(size=4, channels=1), share=0.005, **options).steps(1, 30, 20))
    assert type(caught.value) is InputError
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) >= 4


class Broken(Arrays):
    """Samples of which those in `bad` cannot be read."""

    bad = frozenset()

    def read(self, i):
        if i in self.bad:
            raise Unreadable(f"sample {i}", "broken")
        return Raw(np.full((1, 2, 2), i % 256, np.uint8))


def broken(n, bad):
    source = Broken(np.zeros((n, 1, 2, 2), np.uint8))
    object.__setattr__(source, "bad", frozenset(bad))
    return source


def test_one_damaged_sample_is_always_allowed_and_two_of_few_are_not():
    assert len(list(feed(broken(10, {3})).steps(1, 20, 5))) == 20
    with pytest.raises(InputError, match=r"of \d+ samples read cannot be decoded"):
        list(feed(broken(10, {3, 7})).steps(1, 20, 5))
    assert len(list(feed(broken(10, {3, 7}), share=0.2).steps(1, 20, 5))) == 20


@pytest.mark.parametrize("n", [3, 500, 100_000])
def test_wholly_damaged_data_stop_at_once(n):
    source = broken(n, range(n))
    with pytest.raises(InputError, match="cannot be"):
        list(feed(source, share=1.0).steps(1, 1, 2))
    with pytest.raises(InputError, match="cannot be"):
        next(feed(source).steps(1, 1, 2))


def test_a_damaged_tenth_is_noticed_long_before_the_share_of_all_is_used_up():
    source = broken(100_000, range(0, 100_000, 10))
    seen = []
    with pytest.raises(InputError, match="cannot be decoded"):
        seen.extend(len(batch) for batch in feed(source).steps(1, 1000, 20))
    assert sum(seen) < 1000


def test_a_share_of_a_hundredth_is_never_taken_for_more():
    for seed in range(4):
        bad = torch.randperm(3000, generator=torch.Generator().manual_seed(seed))[:30].tolist()
        source = broken(3000, bad)
        assert len(list(Feed(source, Prepare(), Shuffled(3000, seed), seed).steps(1, 30, 100))) == 30


def test_replacements_in_buckets_and_shards_fit():
    source = broken(40, {5})
    batches = list(feed(source, order=Windowed((10, 10, 20), 0, 2)).steps(1, 4, 10))
    ids = torch.cat([b.ids for b in batches]).bincount(minlength=40)
    assert (int(ids[5]), int(ids[6]), int(ids.sum())) == (0, 2, 40)


def test_feeds_can_run_side_by_side(folder):
    source, found = open_folder(str(folder)), {}
    shared = feed(source, AUGMENTED)

    def run(k):
        found[k] = list(shared.steps(1, 6, 6))

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(same(a, b) for k in range(1, 4) for a, b in zip(found[0], found[k], strict=True))
