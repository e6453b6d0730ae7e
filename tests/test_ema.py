"""Averages of the weights against their closed forms: as training goes on, and rebuilt from snapshots."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from undiffuse import InputError
from undiffuse.train import EMA, Classic, Power, Processes, Snapshots
from undiffuse.train.ema import LONGEST, rebuild
from undiffuse.train.ema import shares as shares_of


class Point(nn.Module):
    """Two parameters of different shapes."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.a = nn.Parameter(torch.full((3,), 7.0, dtype=dtype))
        self.b = nn.Parameter(torch.full((2, 2), -9.0, dtype=dtype))

    @torch.no_grad()
    def put(self, a, b):
        self.a.copy_(a)
        self.b.copy_(b)


def shares(n, gamma):
    """The weight of step i in the average after step n: (i^(gamma + 1) - (i - 1)^(gamma + 1)) / n^(gamma + 1)."""
    i = torch.arange(n + 1, dtype=torch.float64)
    return ((i / n) ** (gamma + 1)).diff()


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["double", "single"])
@pytest.mark.parametrize("length", [0.01, 0.05, 0.10, 0.2, LONGEST])
def test_any_sequence_has_the_closed_form_weights(length, dtype, atol):
    gamma = Power(length).gamma
    n, g, module = 60, torch.Generator().manual_seed(0), Point(dtype)
    a, b = torch.randn(n, 3, generator=g).double(), torch.randn(n, 2, 2, generator=g).double()
    ema = EMA(module, Power(length))
    for t in range(1, n + 1):
        module.put(a[t - 1], b[t - 1])
        ema.update(t)
        if t in (1, 2, 17, n):
            for mine, path in ((ema.average.a, a), (ema.average.b, b)):
                expected = torch.tensordot(shares(t, gamma), path[:t].to(dtype).double(), 1)
                assert torch.allclose(mine.double(), expected, rtol=0, atol=atol)


def product(profile, n):
    """The weight of each of n steps from the betas alone."""
    each = [(1 - profile.beta(i)) * math.prod(profile.beta(j) for j in range(i + 1, n + 1)) for i in range(1, n + 1)]
    return torch.tensor(each, dtype=torch.float64)


@pytest.mark.parametrize("length", [0.03, 0.10, LONGEST])
def test_the_closed_form_weights_are_the_product_of_the_betas(length):
    power, n = Power(length), 25
    assert torch.allclose(product(power, n), shares(n, power.gamma), rtol=0, atol=1e-14)
    assert torch.allclose(torch.from_numpy(shares_of(n, length, n)), shares(n, power.gamma), rtol=0, atol=1e-14)
    assert shares_of(10, length, n)[10:].tolist() == [0] * 15
    assert power.beta(1) == 0


def test_the_classic_average_is_exponential_after_its_warm_up():
    """Once t / (t + 9) has reached the decay, at t = 9 decay / (1 - decay), a step's weight falls by it each step."""
    decay, n = 0.9, 200
    weights, warm = product(Classic(decay), n), 81
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    expected = (1 - decay) * decay ** torch.arange(n - warm - 1, -1, -1).double()
    assert torch.allclose(weights[warm:], expected, rtol=1e-12)
    module = Point()
    ema, path = EMA(module, Classic(decay)), torch.randn(n, 3).double()
    for t, value in enumerate(path, 1):
        module.put(value, value[0])
        ema.update(t)
    assert torch.allclose(ema.average.a, weights @ path, atol=1e-13)


@pytest.mark.parametrize("length", [0.02, 0.05, 0.13, 0.25])
def test_a_length_is_the_std_of_time_under_the_average(length):
    n = 20_000
    weights, time = shares_of(n, length, n), (torch.arange(n, dtype=torch.float64).numpy() + 0.5) / n
    mean = weights @ time
    assert math.sqrt(weights @ (time - mean) ** 2) == pytest.approx(length, rel=1e-4)


def test_a_linear_ramp_lags_by_a_constant_share_of_the_run():
    """Time under the average has mean (gamma + 1) / (gamma + 2) and std `length` of the run (Karras et al. 2024)."""
    n, gamma, module = 4000, Power(0.10).gamma, Point()
    ema = EMA(module)
    for t in range(1, n + 1):
        share = torch.tensor(t / n, dtype=torch.float64)
        module.put(share, share**2)
        ema.update(t)
    mean, second = float(ema.average.a[0]), float(ema.average.b[0, 0])
    ramp = float((shares(n, gamma) * torch.arange(1, n + 1) / n).sum())
    assert mean == pytest.approx(ramp, abs=1e-12)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3)
    assert math.sqrt(second - mean**2) == pytest.approx(0.1, abs=5e-4)


def test_the_longest_is_the_plain_average():
    module, path = Point(), torch.randn(30, 3).double()
    ema = EMA(module, Power(LONGEST))
    for t, value in enumerate(path, 1):
        module.put(value, value[0])
        ema.update(t)
    assert torch.allclose(ema.average.a, path.mean(0), atol=1e-13)


def test_the_first_update_forgets_the_initial_weights():
    module = Point(torch.float32)
    ema = EMA(module)
    module.put(torch.tensor([0.1, 1e30, -3.0]), torch.tensor(math.pi))
    ema.update(1)
    assert torch.equal(ema.average.a, module.a)
    assert torch.equal(ema.average.b, module.b)


def test_buffers_are_copied_and_not_averaged():
    module = nn.BatchNorm1d(4)
    ema, g = EMA(module), torch.Generator().manual_seed(0)
    for t in range(1, 6):
        module(3 + torch.randn(8, 4, generator=g))
        ema.update(t)
        for name, value in module.named_buffers():
            assert torch.equal(ema.average.get_buffer(name), value)
    assert int(ema.average.num_batches_tracked) == 5
    assert ema.average.running_mean is not module.running_mean


def test_the_trained_module_is_left_alone():
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    module(torch.randn(8, 4)).sum().backward()
    before, grads = copy.deepcopy(module.state_dict()), [p.grad.clone() for p in module.parameters()]
    ema = EMA(module)
    for t in range(1, 4):
        ema.update(t)
        ema.average(torch.randn(8, 4))
    assert module.training
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    for mine, grad in zip(module.parameters(), grads, strict=True):
        assert mine.requires_grad
        assert torch.equal(mine.grad, grad)


def test_the_average_is_for_sampling():
    module = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 4))
    ema, x = EMA(module), torch.randn(3, 4)
    ema.update(1)
    assert not any(m.training for m in ema.average.modules())
    assert not any(p.requires_grad for p in ema.average.parameters())
    assert torch.equal(ema.average(x), ema.average(x))
    assert not torch.equal(module(x), module(x))
    assert not ema.average(x).requires_grad
    assert {p.data_ptr() for p in ema.average.parameters()}.isdisjoint(p.data_ptr() for p in module.parameters())


def test_tied_weights_stay_tied():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    average = EMA(module).average
    assert average[0].weight is average[1].weight


@pytest.mark.parametrize("length", [0, -0.1, 0.3, math.nan])
def test_impossible_lengths_and_decays_are_refused(length):
    with pytest.raises(InputError, match=r"ema\.length"):
        Power(length)


@pytest.mark.parametrize("decay", [1, -0.1, math.nan])
def test_impossible_decays_are_refused(decay):
    with pytest.raises(InputError, match=r"ema\.decay"):
        Classic(decay)


def test_what_is_no_profile_is_refused():
    with pytest.raises(InputError, match=r"profiles such as Power\(0.1\).*got 6.94"):
        EMA(Point(), 6.94)


def walk(tmp_path, count, n=2000, stop=None):
    """A network on its way, noisy and drifting as in training, with snapshots, and the direct averages of some
    lengths."""
    g, module = torch.Generator().manual_seed(0), nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20))
    lengths = (0.05, 0.10, 0.07, 0.03, 0.13, 0.2)
    ema, kept = EMA(module, *map(Power, lengths)), Snapshots(tmp_path / "averages", count)
    tracked = EMA(module, *map(Power, lengths[:2]))
    aim = [torch.randn(p.shape, generator=g) for p in module.parameters()]
    for t in range(1, n + 1):
        with torch.no_grad():
            for p, to in zip(module.parameters(), aim, strict=True):
                p += 0.005 * (to - p) + 0.01 * torch.randn(p.shape, generator=g)
            module[1].running_mean.fill_(t)
        ema.update(t)
        tracked.update(t)
        if kept.due(t, n):
            kept.save(t, tracked, Processes())
    return kept, dict(zip(lengths, ema.averages, strict=True)), module


def off(state, average):
    """The relative distance of parameters in the 2-norm."""
    pairs = [(state[name], value) for name, value in average.named_parameters()]
    mine, direct = (torch.cat([pair[i].detach().flatten() for pair in pairs]) for i in (0, 1))
    return float((mine - direct).norm() / direct.norm())


def test_a_rebuilt_average_is_the_direct_one_to_1e_minus_5(tmp_path):
    """Of any length, from 128 snapshots; the tracked lengths themselves are in the last one."""
    kept, direct, module = walk(tmp_path, 128)
    for length, average in direct.items():
        state, fit = kept.average(length)
        assert off(state, average) < (1e-6 if length in (0.05, 0.10) else 1e-5), (length, fit.error)
        assert off(module.state_dict(), average) > 1e-2  # the averages are no copies of the weights
        assert torch.equal(state["1.running_mean"], module[1].running_mean)
        average.load_state_dict(state)


def test_the_error_is_that_of_the_steps_weights_and_falls_with_more_snapshots(tmp_path):
    """By brute force: one trained parameter a step, a one at that step alone, reads off the weights themselves."""
    n, found = 200, {}
    for count in (4, 16):
        module = nn.Linear(n, 1, bias=False)
        ema, kept = EMA(module, Power(0.05), Power(0.10)), Snapshots(tmp_path / str(count), count)
        for t in range(1, n + 1):
            module.weight.data = torch.eye(n)[t - 1 : t].clone()
            ema.update(t)
            if kept.due(t, n):
                kept.save(t, ema, Processes())
        state, fit = kept.average(0.07)
        wanted = torch.from_numpy(shares_of(n, 0.07, n))
        assert float((state["weight"][0] - wanted).norm() / wanted.norm()) == pytest.approx(fit.error, rel=1e-3)
        found[count] = fit.error
    assert found[16] < found[4] / 4
    with pytest.raises(InputError, match=r"16 snapshots of lengths 0\.05, 0\.1 .* 0\.005: the nearest differs by"):
        kept.average(0.005)


def test_the_lengths_that_16_snapshots_give_are_those_that_are_told():
    """0.03 to 0.2 to within 5 %, 0.02 to 0.25 to within the 15 % above which they are refused."""
    n, missed = 1600, lambda length: rebuild(stored, n, length).error
    stored = [(t, s) for t in range(100, n + 1, 100) for s in (0.05, 0.10)]
    assert max(missed(length) for length in (0.03, 0.04, 0.07, 0.15, 0.2)) < 0.05 < min(missed(0.025), missed(0.24))
    assert missed(0.25) < 0.15 < missed(0.28)
    told = r"0\.03\s+to\s+0\.2\s+to\s+within\s+5\s+%"
    for text in (Snapshots.__doc__, Path(__file__).parents[1].joinpath("docs", "training.md").read_text()):
        assert re.search(told, text)
        assert "0.2887" in text


def test_constant_weights_are_rebuilt_exactly_however_few_the_snapshots():
    for length in (0.001, 0.02, 0.28):
        assert rebuild([(50, 0.05), (50, 0.10), (100, 0.05), (100, 0.10)], 100, length).coefficients.sum() == 1


def test_snapshots_are_due_as_often_as_asked_and_at_the_end():
    for count, steps in ((1, 7), (3, 10), (16, 1500), (50, 20)):
        due = [t for t in range(1, steps + 1) if Snapshots("x", count).due(t, steps)]
        assert len(due) == min(count, steps)
        assert due[-1] == steps
        assert max(b - a for a, b in zip([0, *due], due, strict=False)) <= -(-steps // count)


def test_snapshots_that_are_missing_or_damaged_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no snapshots .* train\.snapshots=16"):
        Snapshots(tmp_path).average(0.1)
    with pytest.raises(InputError, match="snapshots must be >= 1"):
        Snapshots(tmp_path, 0)
    kept, *_ = walk(tmp_path, 2, 40)
    (kept.root / "step-20" / "0.05.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"0\.05\.safetensors is truncated"):
        kept.average(0.07)
