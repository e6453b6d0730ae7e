"""The average of the weights against the power rule's closed form."""

import copy
import math

import pytest
import torch
from torch import nn

from undiffuse import InputError
from undiffuse.train import EMA


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
@pytest.mark.parametrize("gamma", [0.0, 1.0, 6.94, 16.97])
def test_any_sequence_has_the_closed_form_weights(gamma, dtype, atol):
    n, g, module = 60, torch.Generator().manual_seed(0), Point(dtype)
    a, b = torch.randn(n, 3, generator=g).double(), torch.randn(n, 2, 2, generator=g).double()
    ema = EMA(module, gamma)
    for t in range(1, n + 1):
        module.put(a[t - 1], b[t - 1])
        ema.update(t)
        if t in (1, 2, 17, n):
            for mine, path in ((ema.average.a, a), (ema.average.b, b)):
                expected = torch.tensordot(shares(t, gamma), path[:t].to(dtype).double(), 1)
                assert torch.allclose(mine.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("gamma", [0.0, 6.94])
def test_the_closed_form_weights_are_the_product_of_the_betas(gamma):
    ema, n = EMA(Point(), gamma), 25
    product = [(1 - ema.beta(i)) * math.prod(ema.beta(j) for j in range(i + 1, n + 1)) for i in range(1, n + 1)]
    assert torch.allclose(torch.tensor(product).double(), shares(n, gamma), atol=1e-14)
    assert ema.beta(1) == 0


def test_a_linear_ramp_lags_by_a_constant_share_and_gamma_6_94_is_a_width_of_ten_percent():
    """Time under the average has mean (gamma + 1) / (gamma + 2) and std 0.1 of the run (Karras et al. 2024, 3.1)."""
    n, gamma, module = 4000, 6.94, Point()
    ema = EMA(module, gamma)
    for t in range(1, n + 1):
        share = torch.tensor(t / n, dtype=torch.float64)
        module.put(share, share**2)
        ema.update(t)
    mean, second = float(ema.average.a[0]), float(ema.average.b[0, 0])
    ramp = float((shares(n, gamma) * torch.arange(1, n + 1) / n).sum())
    assert mean == pytest.approx(ramp, abs=1e-12)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3)
    assert math.sqrt(second - mean**2) == pytest.approx(0.1, abs=5e-4)


def test_gamma_zero_is_the_plain_average():
    module, path = Point(), torch.randn(30, 3).double()
    ema = EMA(module, 0)
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


def test_tied_weights_stay_tied_and_negative_gamma_is_refused():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    average = EMA(module).average
    assert average[0].weight is average[1].weight
    with pytest.raises(InputError, match="gamma"):
        EMA(module, -0.1)
