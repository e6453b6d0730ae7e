"""Orders: every sample once an epoch, whatever the batch, as a function of seed and place."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch

from undiffuse import InputError
from undiffuse.data import Bucketed, Prepare, Shuffled, Windowed, from_data, order_for, split
from undiffuse.data.data import Data
from undiffuse.data.order import shard_of
from undiffuse.seeds import seed_of

COUNTS = (5, 9, 1, 0, 7, 12, 3, 8)
N = sum(COUNTS)
FLAT = {
    "shuffled": lambda seed: Shuffled(N, seed),
    "windowed": lambda seed: Windowed(COUNTS, seed, window=2),
    "wide": lambda seed: Windowed(COUNTS, seed, window=100),
}
ALL = {
    **FLAT,
    "lanes": lambda seed: Windowed(COUNTS, seed, window=2, lanes=3),
    "bucketed": lambda seed: Bucketed(torch.arange(N) % 7 // 3, seed),
}


def stream(order, count, batch):
    """The first `count` sample numbers; `count` is a multiple of `batch`."""
    return torch.cat([order.rows(step, batch) for step in range(1, count // batch + 1)])


@pytest.mark.parametrize("make", FLAT.values(), ids=FLAT)
def test_every_epoch_has_every_sample_exactly_once_and_its_own_order(make):
    epochs = stream(make(1), 4 * N, N // 5).view(4, N)
    assert N % 5 == 0
    assert all(sorted(e.tolist()) == list(range(N)) for e in epochs)
    assert len({tuple(e.tolist()) for e in epochs}) == 4


@pytest.mark.parametrize("make", [*FLAT.values(), ALL["lanes"]], ids=[*FLAT, "lanes"])
@pytest.mark.parametrize("batch", [1, 4, 60, 2 * N])
def test_the_sample_at_an_index_does_not_depend_on_the_batch(make, batch):
    count = 4 * N // batch * batch
    assert torch.equal(stream(make(3), count, batch), stream(make(3), 4 * N, 2)[:count])


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_rows_depend_on_the_seed_and_the_step_alone(make):
    forwards = [make(5).rows(s, 6).tolist() for s in range(1, 31)]
    order = make(5)
    backwards = [order.rows(s, 6).tolist() for s in range(30, 0, -1)]
    assert forwards == backwards[::-1]
    assert forwards != [make(6).rows(s, 6).tolist() for s in range(1, 31)]
    assert forwards == [pickle.loads(pickle.dumps(order)).rows(s, 6).tolist() for s in range(1, 31)]


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_the_rows_of_all_processes_make_up_the_batch(make):
    for step in (1, 2, 17):
        rows = make(0).rows(step, 12)
        for world in (1, 2, 3):
            parts = [make(0).rows(step, 12)[r::world] for r in range(world)]
            assert torch.equal(torch.stack(parts, 1).flatten(), rows)


def test_shuffled_follows_the_rule_of_the_first_runs():
    for step in (1, 4, 9):
        epoch, place = divmod((step - 1) * 10, 30)
        order = torch.randperm(30, generator=torch.Generator().manual_seed(seed_of(7, 2, epoch)))
        assert torch.equal(Shuffled(30, 7).rows(step, 10), order[place : place + 10])


def test_places_in_the_order_are_drawn_evenly():
    for make in (lambda s: Shuffled(10, s), lambda s: Windowed((5, 5), s, window=2)):
        counts = sum(torch.nn.functional.one_hot(make(s).rows(1, 10), 10) for s in range(2000))
        assert int((counts - 200).abs().max()) < 65  # 5 deviations of a binomial


@pytest.mark.parametrize("batch", [1, 3, 8, 64])
def test_every_bucketed_step_is_of_one_bucket_and_an_epoch_has_every_sample(batch):
    of = torch.tensor([0] * 11 + [2] * 30 + [5] * 2)[torch.randperm(43, generator=torch.Generator().manual_seed(0))]
    order = Bucketed(of, 1)
    steps = order.epoch(batch)
    for epoch in range(3):
        rows = [order.rows(epoch * steps + s, batch) for s in range(1, steps + 1)]
        assert all(len(r) == batch and len(of[r].unique()) == 1 for r in rows)
        seen = torch.cat(rows).bincount(minlength=43)
        assert int(seen.min()) >= 1
        if batch == 1:
            assert int(seen.max()) == 1
    assert steps == sum(-(-n // batch) for n in (11, 30, 2))


def test_bucketed_mixes_the_buckets_within_an_epoch():
    of = (torch.arange(400) >= 200).long()
    kinds = [int(of[Bucketed(of, 0).rows(s, 4)[0]]) for s in range(1, 101)]
    assert 30 < sum(a != b for a, b in pairwise(kinds)) < 70


def test_a_replacement_stays_in_its_bucket_and_reaches_all_of_it():
    of = torch.tensor([1, 0, 1, 1, 0, 2])
    order, seen = Bucketed(of), [0]
    for _ in range(3):
        seen.append(order.after(seen[-1]))
    assert seen == [0, 2, 3, 0]
    assert order.after(5) == 5
    assert [Shuffled(3).after(i) for i in range(3)] == [1, 2, 0]


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_reader_needs_few_shards_at_hand(window):
    counts = (10,) * 12
    shards = shard_of(counts, stream(Windowed(counts, 4, window), 240, 1))
    for first in range(0, 240, 10 * window):
        assert len(set(shards[first : first + 10 * window].tolist())) == window
    # within a window the shards are mixed, not one after the other
    if window > 1:
        assert len(set(shards[:10].tolist())) > 1


def test_every_epoch_has_its_own_order_of_shards_and_of_samples():
    one = stream(Windowed((20,), 0, 1), 60, 20).view(3, 20)
    many = shard_of((1,) * 20, stream(Windowed((1,) * 20, 0, 1), 60, 20)).view(3, 20)
    for epochs in (one, many):
        assert len({tuple(e.tolist()) for e in epochs}) == 3


@pytest.mark.parametrize(("lanes", "world"), [(4, 2), (4, 4), (2, 2), (6, 3)])
def test_each_process_reads_shards_of_its_own(lanes, world):
    counts = (10, 12, 7, 9, 10, 11, 8, 10, 13, 6, 10, 10)
    order = Windowed(counts, 0, 2, lanes)
    rows = torch.stack([order.rows(s, 12) for s in range(1, 60)])
    mine = [set(shard_of(counts, rows[:, r::world].flatten()).tolist()) for r in range(world)]
    assert sum(len(m) for m in mine) == len(set().union(*mine)) == len(counts)


def test_a_lane_has_each_of_its_samples_once_an_epoch_and_lanes_are_balanced():
    counts = (10, 12, 7, 9, 10, 11, 8, 13)
    order = Windowed(counts, 3, 2, 4)
    rows = stream(order, 320, 4)
    for lane in range(4):
        mine = rows[lane::4]
        n = len(set(mine.tolist()))
        assert 18 <= n <= 22
        assert len(set(mine[:n].tolist())) == len(set(mine[n : 2 * n].tolist())) == n


def test_impossible_windows_are_refused():
    for counts, window, lanes in [((5, 5), 0, 1), ((5, 0), 1, 2), ((5,), 1, 0), ((), 1, 1)]:
        with pytest.raises(InputError, match="lanes and a window"):
            Windowed(counts, 0, window, lanes)


def test_the_order_fits_the_source():
    source = from_data(Data(torch.zeros(6, 1, 8, 8)))
    assert isinstance(order_for(source, Prepare(), 3), Shuffled)
    assert isinstance(order_for(source, Prepare(size=8, buckets=(1.0, 2.0)), 3), Bucketed)


def test_digits_split_as_they_always_did():
    from undiffuse.data import load_data, open_source

    data = load_data("digits")
    train, held = data.split(360)
    source, same = split(open_source("digits"), 360)
    assert torch.equal(held.x, same.x)
    assert torch.equal(held.labels, same.labels)
    assert (train.name, held.name) == (source.name, same.name)
    assert [source.read(i).label for i in range(50)] == train.labels[:50].tolist()
    assert np.array_equal(source.read(7).x, train.x[7].numpy())
