"""Optimisers: Muon's step against the singular value decomposition, what it acts on, exact resume; schedulers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from undiffuse import VP, Denoiser, EDMPrecond, InputError
from undiffuse.nets import UNet
from undiffuse.train import Checkpoints, Engine, Objective, Plan, check_sharded, made, train
from undiffuse.train.optimiser import OPTIMISERS, AdamW, Muon, scheduled

LR = 0.01
BAND = (0.65, 1.25)  # Newton-Schulz' five quintic iterations map singular values of 0.01 to 1 into about 0.7 ... 1.2


class Parts(nn.Module):
    """Two repeated parts between a first and a last layer."""

    def __init__(self, *parts):
        super().__init__()
        self.stem, self.parts, self.head = nn.Linear(3, 3), nn.ModuleList(parts), nn.Linear(3, 3)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(layer, gradient, kind=None, weight_decay=0.0, steps=1, lr=LR):
    """The change of a layer's weight in `steps` steps with this gradient."""
    before = layer.weight.detach().clone()
    optimiser = (kind or Muon(momentum=0.0))(Parts(layer), lr, weight_decay)
    for _ in range(steps):
        layer.weight.grad = torch.empty_like(layer.weight).copy_(gradient)
        optimiser.step()
    return layer.weight.detach() - before


def spread_spectrum(rows, columns, low=0.1):
    """A matrix with the singular values low ... 1, and its factors."""
    u, _, vt = torch.linalg.svd(normal(rows, columns), full_matrices=False)
    s = torch.linspace(1, low, min(rows, columns))
    return u @ s.diag() @ vt, u, vt


@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (8, 30), (30, 8), (1, 5)])
@pytest.mark.parametrize(("fn", "ratio"), [
    ("match_rms_adamw", lambda r, c: 0.2 * math.sqrt(max(r, c))),
    ("original", lambda r, c: math.sqrt(max(1, r / c))),
])  # fmt: skip
def test_a_step_without_momentum_is_the_gradients_orthogonal_factor(rows, columns, fn, ratio):
    """G = U S V': -lr r U D V' with D in Newton-Schulz' band, so diagonal in the bases of G up to bf16."""
    gradient, u, vt = spread_spectrum(rows, columns)
    kind = Muon(momentum=0.0, adjust_lr_fn=fn)
    made = -stepped(nn.Linear(columns, rows), 7 * gradient, kind) / (LR * ratio(rows, columns))
    inside = u.T @ made @ vt.T
    assert BAND[0] < float(inside.diagonal().min()) <= float(inside.diagonal().max()) < BAND[1]
    assert float((made - u @ inside.diagonal().diag() @ vt).norm() / made.norm()) < 0.03


def test_more_iterations_hold_smaller_singular_values():
    gradient, u, vt = spread_spectrum(16, 16, low=1e-3)

    def least(steps):
        made = stepped(nn.Linear(16, 16), gradient, Muon(momentum=0.0, ns_steps=steps))
        return float((u.T @ made @ vt.T).diagonal().abs().min()) / (LR * 0.2 * 4)

    assert least(1) < 0.02 < least(5) < 0.5 < BAND[0] < least(9)


def test_a_step_has_the_size_of_adamws():
    """Root mean square of a full-rank step: 0.2 lr of a wide, a tall and a square matrix (Liu et al. 2025)."""
    for rows, columns in ((64, 64), (32, 96), (96, 32)):
        size = stepped(nn.Linear(columns, rows), normal(rows, columns)).square().mean().sqrt()
        assert float(size) == pytest.approx(0.2 * LR, rel=0.25)


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_is_an_average_of_gradients(nesterov):
    """The direction after two steps with other gradients: m_t = mu m + (1 - mu) g, and mu m_t + (1 - mu) g."""
    kind, layer, mu = Muon(momentum=0.6, nesterov=nesterov), nn.Linear(10, 10), 0.6
    optimiser, (a, b) = kind(Parts(layer), LR, 0.0), (normal(10, 10, seed=k) for k in (1, 2))
    for g in (a, b):
        before = layer.weight.detach().clone()
        layer.weight.grad = g.clone()
        optimiser.step()
    m = mu * (1 - mu) * a + (1 - mu) * b
    expected = stepped(nn.Linear(10, 10), mu * m + (1 - mu) * b if nesterov else m)
    assert torch.allclose(layer.weight.detach() - before, expected, atol=0.02 * LR)
    other = stepped(nn.Linear(10, 10), m if nesterov else mu * m + (1 - mu) * b)
    assert not torch.allclose(layer.weight.detach() - before, other, atol=0.02 * LR)


@pytest.mark.parametrize(("conv", "k"), [(nn.Conv1d, (3,)), (nn.Conv2d, (3, 3)), (nn.Conv3d, (3, 1, 2))])
def test_a_convolution_is_the_linear_layer_of_its_flattened_weight(conv, k):
    layer, flat, g = conv(4, 6, k), nn.Linear(4 * math.prod(k), 6), normal(6, 4, *k)
    with torch.no_grad():
        flat.weight.copy_(layer.weight.flatten(1))
    kind = Muon(momentum=0.9)
    made = stepped(layer, g, kind, weight_decay=0.3, steps=3)
    assert torch.allclose(made.flatten(1), stepped(flat, g.flatten(1), kind, weight_decay=0.3, steps=3), atol=1e-7)


def test_channels_last_takes_the_same_step_as_contiguous():
    """A permutation of the columns, which goes through Newton-Schulz; only sums in bf16 are in another order."""
    plain, last, g = nn.Conv2d(8, 6, 3), nn.Conv2d(8, 6, 3), normal(6, 8, 3, 3)
    last.load_state_dict(plain.state_dict())
    last.to(memory_format=torch.channels_last)
    a, b = (stepped(layer, g, Muon(), weight_decay=0.1, steps=4) for layer in (plain, last))
    assert last.weight.is_contiguous(memory_format=torch.channels_last)
    assert not last.weight.is_contiguous()
    assert float((a - b).norm() / a.norm()) < 0.02


@pytest.mark.parametrize("kind", OPTIMISERS.values())
def test_weight_decay_is_decoupled(kind):
    """With no gradient to speak of, weights shrink by lr * decay: hidden matrices, the first layer, and biases."""
    module = Parts(nn.Linear(4, 4))
    before = [p.detach().clone() for p in module.parameters()]
    optimiser = kind()(module, 0.1, 0.5)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    for p, b in zip(module.parameters(), before, strict=True):
        assert torch.allclose(p, b * (1 - 0.1 * 0.5), atol=1e-7)


def test_muon_has_the_matrices_inside_the_unet_and_adamw_the_rest():
    net = UNet(1, width=32, mults=(1, 2), depth=1, vector=3, augment=2)
    optimiser = Muon()(Denoiser(net, EDMPrecond()), LR, 0.0)
    names = {id(p): name for name, p in net.named_parameters()}
    hidden, others = ([names[id(p)] for p in group["params"]] for group in optimiser.param_groups)
    assert sorted(hidden + others) == sorted(names.values())
    outside = {"stem", "head", "embed", "norm"}
    assert {n.split(".")[0] for n in hidden} == {"down", "middle", "up"}
    assert {n.split(".")[0] for n in others} == outside | {"down", "middle", "up"}
    assert all(n.split(".")[0] in outside or dict(net.named_parameters())[n].ndim == 1 for n in others)
    assert {n.split(".", 2)[2] for n in hidden} == {
        "block.conv1.weight", "block.conv2.weight", "block.modulate.weight", "block.skip.weight",
        "attention.qkv.weight", "attention.proj.weight", "conv.weight",
    }  # fmt: skip


def test_the_rest_takes_adamws_step():
    a, b = Parts(nn.Linear(4, 4)), Parts(nn.Linear(4, 4))
    b.load_state_dict(a.state_dict())
    one = Muon(betas=(0.8, 0.95), eps=1e-4)(a, LR, 0.1)
    two = torch.optim.AdamW(b.parameters(), LR, (0.8, 0.95), 1e-4, 0.1, fused=True)
    for step in range(3):
        for k, (p, q) in enumerate(zip(a.parameters(), b.parameters(), strict=True)):
            p.grad = normal(*p.shape, seed=10 * step + k)
            q.grad = p.grad.clone()
        one.step()
        two.step()
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q) == (name != "parts.0.weight")


@pytest.mark.parametrize(("kind", "kw"), [(AdamW(), {}), (AdamW((0.5, 0.7), 1e-3), {"betas": (0.5, 0.7), "eps": 1e-3})])
def test_adamw_is_torchs_with_its_defaults(kind, kw):
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.load_state_dict(a.state_dict())
    one, two = kind(a, LR, 0.1), torch.optim.AdamW(b.parameters(), lr=LR, weight_decay=0.1, fused=True, **kw)
    for step in range(3):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            p.grad = q.grad = normal(*p.shape, seed=step)
        one.step()
        two.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert {k: v for k, v in one.param_groups[0].items() if k != "params"} == {
        k: v for k, v in two.param_groups[0].items() if k != "params"
    }


@pytest.mark.parametrize("kind", OPTIMISERS.values())
def test_the_rate_of_the_groups_is_the_rate_of_the_step(kind):
    """As the loop sets it; at rate 0 nothing moves."""
    module = Parts(nn.Linear(4, 4))
    before = [p.detach().clone() for p in module.parameters()]
    optimiser = kind()(module, 1.0, 0.1)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    for group in optimiser.param_groups:
        group["lr"] = 0.0
    optimiser.step()
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    optimiser.zero_grad()
    assert all(p.grad is None for p in module.parameters())


def test_parameters_without_a_gradient_stay():
    layer = nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    optimiser = Muon()(Parts(layer), LR, 0.5)
    optimiser.step()
    assert torch.equal(layer.weight, before)
    layer.weight.grad = normal(4, 4)
    optimiser.step()
    assert not torch.equal(layer.weight, before)


def test_a_closure_gives_the_gradient():
    module = Parts(nn.Linear(3, 3))
    before = module.parts[0].weight.detach().clone()
    optimiser = Muon()(module, LR, 0.0)

    def closure():
        optimiser.zero_grad()
        loss = module.parts[0](torch.ones(2, 3)).square().sum()
        loss.backward()
        return loss

    assert bool(optimiser.step(closure) > 0)
    assert not torch.equal(module.parts[0].weight, before)


def test_momenta_are_read_into_another_layout():
    """A state that was saved from contiguous weights, read where they are channels last."""
    plain, last = nn.Conv2d(8, 6, 3), nn.Conv2d(8, 6, 3)
    last.load_state_dict(plain.state_dict())
    last.to(memory_format=torch.channels_last)
    one, two = (Muon()(Parts(layer), LR, 0.0) for layer in (plain, last))
    for k in range(4):
        if k == 3:
            two.load_state_dict({**two.state_dict(), "state": one.state_dict()["state"]})
            last.load_state_dict(plain.state_dict())
            before = plain.weight.detach().clone()
        for layer, optimiser in ((plain, one), (last, two))[: 2 if k == 3 else 1]:
            layer.weight.grad = torch.empty_like(layer.weight).copy_(normal(6, 8, 3, 3, seed=k))
            optimiser.step()
    a, b = plain.weight.detach(), last.weight.detach()
    assert float((a - b).norm() / (a - before).norm()) < 0.02
    assert torch.allclose(
        one.state_dict()["state"][0]["momentum_buffer"], two.state_dict()["state"][0]["momentum_buffer"], atol=1e-7
    )


def test_a_scaled_gradient_that_overflowed_is_left_out():
    module, scaler = Parts(nn.Linear(3, 3)), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimiser = Muon()(module, LR, 0.0)
    for bad in (False, True):
        before = [p.detach().clone() for p in module.parameters()]
        loss = module.head(module.parts[0](module.stem(torch.ones(1, 3)))).square().sum()
        scaler.scale(loss).backward()
        size = module.head.weight.grad.clone()
        if bad:
            module.stem.weight.grad[0, 0] = math.inf
        scaler.unscale_(optimiser)
        assert torch.equal(module.head.weight.grad, size / 4)
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
        same = [torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True)]
        assert all(same) if bad else not any(same)


X = normal(10, 1, 4, 4)
PLAN = Plan(steps=7, batch=4, lr=1e-2, warmup=2, weight_decay=0.1, every=2)
UNUSED, SHARDED = Denoiser(UNet(1, width=16, mults=(1,)), EDMPrecond()), Engine(sharding="fsdp")


def tree(root):
    """Every file below `root` with its bytes."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def run(root, kind, stop=None, weights=0, precision="float32", scheduler=None):
    """Train to the end or to step `stop`: the losses by step."""
    torch.manual_seed(weights)
    model, losses = Denoiser(UNet(1, width=16, mults=(1,)), EDMPrecond()), {}
    plan = replace(PLAN, precision=precision)
    for state in train(
        model, X, Objective(VP()), plan, seed=5, checkpoints=Checkpoints(root), optimiser=kind, scheduler=scheduler
    ):
        losses[state.step] = (state.loss, state.grad_norm, state.lr)
        if state.step == stop:
            break
    return losses


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", [AdamW(betas=(0.8, 0.9)), Muon(), Muon(momentum=0.5, nesterov=False)])
def test_resumed_is_uninterrupted_bit_for_bit(kind, precision, tmp_path):
    losses = run(tmp_path / "straight", kind, precision=precision)
    assert losses.keys() == set(range(1, 8))
    run(tmp_path / "stopped", kind, stop=2, precision=precision)
    run(tmp_path / "stopped", kind, stop=5, weights=1, precision=precision)
    rest = run(tmp_path / "stopped", kind, weights=2, precision=precision)
    assert rest == {step: losses[step] for step in range(5, 8)}
    assert tree(tmp_path / "stopped") == tree(tmp_path / "straight")


@pytest.mark.parametrize("name", ["one-cycle", "sequential"])
def test_a_scheduled_run_resumed_is_uninterrupted_bit_for_bit(name, tmp_path):
    """The rates are the scheduler's and not the plan's, also where momenta change with them."""
    losses = run(tmp_path / "straight", AdamW(), scheduler=SCHEDULERS[name])
    run(tmp_path / "stopped", AdamW(), stop=4, scheduler=SCHEDULERS[name])
    rest = run(tmp_path / "stopped", AdamW(), weights=2, scheduler=SCHEDULERS[name])
    assert rest == {step: losses[step] for step in range(5, 8)}
    assert tree(tmp_path / "stopped") == tree(tmp_path / "straight")
    optimiser = AdamW()(nn.Linear(2, 2), PLAN.lr, 0.0)
    expected = rates(scheduled(SCHEDULERS[name], optimiser), optimiser, 7)
    assert [rate for _, _, rate in losses.values()] == [rate for ((rate, _),) in expected]


def test_optimisers_train_apart(tmp_path):
    ends = [run(tmp_path / str(k), kind)[7] for k, kind in enumerate((AdamW(), Muon(), Muon(ns_steps=2)))]
    assert len(set(ends)) == 3


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: AdamW(betas=(0.9, 1.0)), "optimiser.betas"),
        (lambda: AdamW(betas=(0.9,)), "optimiser.betas"),
        (lambda: AdamW(eps=0.0), "optimiser.eps"),
        (lambda: AdamW(eps=1e300), "optimiser.eps"),
        (lambda: Muon(betas=(-0.1, 0.9)), "optimiser.betas"),
        (lambda: Muon(eps=math.inf), "optimiser.eps"),
        (lambda: Muon(momentum=1.0), "optimiser.momentum"),
        (lambda: Muon(ns_steps=0), "optimiser.ns_steps"),
        (lambda: Muon(adjust_lr_fn="other"), "optimiser.adjust_lr_fn"),
        (lambda: Muon()(nn.Linear(3, 3), LR, 0.0), r"no matrices.*use AdamW .optimiser=adamw."),
        (lambda: made(torch.optim.Adam, nn.Linear(3, 3), LR, 0.0), "Adam.* makes no optimiser: .*torch.optim.Adam"),
        (lambda: made(AdamW, nn.Linear(3, 3), LR, 0.0), r"makes no optimiser: expected AdamW\(\)"),
        (lambda: made(torch.optim.SGD([torch.ones(1)]), nn.Linear(3, 3), LR, 0.0), "makes no optimiser.*not callable"),
        (lambda: made(lambda *_: None, nn.Linear(3, 3), LR, 0.0), "makes no optimiser"),
        (lambda: next(train(UNUSED, X, Objective(VP()), PLAN, optimiser=torch.optim.Adam)), "makes no optimiser"),
        (lambda: next(train(UNUSED, X, Objective(VP()), PLAN, optimiser=Muon(), engine=SHARDED)), "FSDP shards"),
        (lambda: check_sharded(AdamW(), "fp16"), "train.precision=fp16 cannot be sharded"),
    ],
)
def test_impossible_settings_are_refused(make, why):
    with pytest.raises(InputError, match=why):
        make()


def test_any_optimiser_of_torch_trains(tmp_path):
    """As a function of module, rate and decay; also one whose state is empty."""
    kind = lambda module, lr, decay: torch.optim.SGD(module.parameters(), lr, weight_decay=decay)  # noqa: E731
    losses = run(tmp_path / "straight", kind)
    run(tmp_path / "stopped", kind, stop=4)
    assert run(tmp_path / "stopped", kind, weights=2) == {step: losses[step] for step in range(5, 8)}


def test_shards_are_refused(monkeypatch):
    monkeypatch.setattr("undiffuse.train.optimiser.is_shard", lambda p: p.ndim == 2)
    with pytest.raises(InputError, match=r"FSDP shards them: use AdamW .optimiser=adamw., or engine\.sharding=ddp"):
        Muon()(Parts(nn.Linear(3, 3)), LR, 0.0)


SCHEDULERS = {
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=20),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / math.sqrt(k + 1)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.97**k),
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.7),
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [2, 9], 0.3),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.3, 4),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=7),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.93),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 15, 1.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6, 1e-3),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4, 2),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, 3, mode="triangular2", cycle_momentum=False),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 12)], [4]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 4), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
}  # fmt: skip


def rates(scheduler, optimiser, steps):
    """Rate and momentum of each of the next steps."""
    found = []
    for _ in range(steps):
        found.append([(group["lr"], group["betas"]) for group in optimiser.param_groups])
        optimiser.step()
        scheduler.step()
    return found


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("done", [0, 1, 5, 11])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_as_if_it_had_not_stopped(name, done):
    """Bit for bit, for every scheduler of torch that is a function of the step."""
    straight, again = (AdamW()(nn.Linear(2, 2), 0.1, 0.0) for _ in range(2))
    expected = rates(scheduled(SCHEDULERS[name], straight), straight, 16)
    scheduler = scheduled(SCHEDULERS[name], again, done)
    again.load_state_dict(straight.state_dict() | {"param_groups": again.state_dict()["param_groups"]})
    assert rates(scheduler, again, 16 - done) == expected[done:]
    assert name == "constant" or len({rate for ((rate, _),) in expected}) > 1


def test_the_rates_are_the_schedulers_own():
    optimiser = Muon()(Parts(nn.Linear(3, 3)), 0.1, 0.0)
    scheduler = scheduled(lambda o: lr_scheduler.ExponentialLR(o, 0.5), optimiser, 3)
    assert [group["lr"] for group in optimiser.param_groups] == [0.1 / 8] * 2
    optimiser.step()
    scheduler.step()
    assert [group["lr"] for group in optimiser.param_groups] == [0.1 / 16] * 2


@pytest.mark.parametrize("make", [lr_scheduler.ReduceLROnPlateau, lambda o: None])
def test_what_is_no_function_of_the_step_is_refused(make):
    with pytest.raises(InputError, match="whose step\\(\\) needs no measurement"):
        scheduled(make, AdamW()(nn.Linear(2, 2), 0.1, 0.0))


def test_what_torch_says_of_a_scheduler_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"scheduler cannot be made for this optimiser: .*total_steps"):
        scheduled(lambda o: lr_scheduler.OneCycleLR(o, 0.1), AdamW()(nn.Linear(2, 2), 0.1, 0.0))
    short = lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=3)  # noqa: E731
    with pytest.raises(InputError, match="scheduler fails in step 4; it must last for all of the plan's steps"):
        run(tmp_path, AdamW(), scheduler=short)
    with pytest.raises(InputError, match="scheduler fails in step 4"):
        scheduled(short, AdamW()(nn.Linear(2, 2), 0.1, 0.0), 5)
