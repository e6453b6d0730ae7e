"""The control branch: silent at first and for null maps, trained alone beside a network that stays as it is."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.test_conditions import given
from tests.test_nets import inputs, randomised, relative
from undiffuse import Cond, Denoiser, EDMPrecond, Flow, InputError, Level
from undiffuse.nets import Control, DiT, UNet
from undiffuse.train import AdamW, Muon, Objective, Plan, train

PLAIN = {"mults": (1, 2), "vector": 3, "augment": 2, "tokens": 6, "cross": (0,), "dropout": 0.2}


def build(dims=2, opened=False, **kw):
    """A randomised network with a control branch, as it starts or with all of it random."""
    control = Control(randomised(UNet(2, dims, 16, **{**PLAIN, **kw})), spatial=2)
    if opened:
        for part in (control.branch, control.hint, control.joins):
            randomised(part, seed=1)
    return control.eval()


@torch.no_grad()
@pytest.mark.parametrize("kw", [{}, {"patch": 2, "transformer": 1, "resample": "residual", "learned_variance": True}])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_at_first_the_output_is_that_of_the_network(dims, kw):
    control, (x, t, cond) = build(dims, **kw), given(*(5, 4, 6)[:dims])
    expected = control.net(x, t, replace(cond, spatial=None))
    assert torch.equal(control(x, t, cond), expected)
    assert relative(build(dims, opened=True, **kw)(x, t, cond), expected) > 0.05


def test_the_branch_starts_as_a_copy_of_the_down_path():
    control = build()
    whole, copied = control.net.state_dict(), control.branch.state_dict()
    assert copied.keys() == {name for name in whole if name.split(".")[0] not in ("up", "norm", "head")}
    assert all(torch.equal(copied[name], whole[name]) for name in copied)
    assert not {p.data_ptr() for p in control.net.parameters()} & {p.data_ptr() for p in control.branch.parameters()}


def test_skips_and_bottleneck_each_get_the_branchs_own_answer():
    """Zhang et al. 2023, equation 2: y + Z(F(x + Z(c)))."""
    control, (x, t, cond) = build(opened=True), given(8, 8)
    net, branch = control.net, control.branch
    emb, context = net.told(x, t, cond)
    told = branch.told(x, t, cond)
    hint = control.hint[1](torch.nn.functional.silu(control.hint[0](cond.spatial)))
    heard = branch.encoded(branch.stem(x) + hint, *told)
    own = net.encoded(net.stem(x), emb, context)
    skips = [skip + join(h) for skip, join, h in zip(own, control.joins, heard, strict=True)]
    assert torch.allclose(control(x, t, cond), net.decoded(skips, emb, context, (8, 8)), atol=1e-5)
    assert len(skips) == len(net.down) + 2


@torch.no_grad()
def test_a_row_without_a_map_is_the_networks_own():
    control, (x, t, cond) = build(opened=True), given(6, 7)
    alone = replace(cond, spatial=None)
    own, both = control.net(x, t, alone), control(x, t, cond)
    assert torch.equal(control(x, t, alone), own)
    assert torch.equal(control(x, t), control.net(x, t))
    half = control(x, t, replace(cond, spatial=cond.spatial * torch.tensor([0.0, 1, 0, 1]).reshape(4, 1, 1, 1)))
    assert torch.equal(half[::2], own[::2])
    assert torch.allclose(half[1::2], both[1::2], atol=1e-5)
    assert relative(both[1::2], own[1::2]) > 0.05


def test_gradient_reaches_the_branch_alone_and_all_of_it():
    control, (x, t, cond) = build(opened=True), given(6, 7)
    control(x, t, cond).square().sum().backward()
    for name, p in control.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) != name.startswith("net."), name
        assert p.requires_grad != name.startswith("net.")


def test_dropout_acts_in_the_branch_alone():
    control, (x, t, cond) = build(opened=True).train(), given(6, 7)
    assert torch.equal(control(x, t), control(x, t))
    assert relative(control(x, t, cond), control(x, t, cond)) > 1e-3
    assert not control.net.training
    assert control.branch.training
    assert not control.eval().branch.training


def _map(spatial):
    return None if spatial is None else Cond(spatial=spatial)


@pytest.mark.parametrize("optimiser", [AdamW(), Muon()])
def test_training_changes_the_branch_alone_and_makes_it_follow_the_map(optimiser):
    """Data that are their maps: from noise alone the frozen network cannot know them."""
    maps = torch.randint(0, 2, (32, 1, 4, 4), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    torch.manual_seed(0)
    control = Control(randomised(UNet(1, width=16)), spatial=1)
    before, model = copy.deepcopy(control.state_dict()), Denoiser(control, EDMPrecond())
    plan = Plan(steps=60, batch=32, lr=1e-2, every=0, warmup=1)
    states = train(model, maps, Objective(Flow()), plan, cond=Cond(spatial=maps), optimiser=optimiser)
    assert [state.step for state in states][-1] == 60
    after, level = control.state_dict(), Level(0.1, 0.995)
    x = 0.1 * maps + 0.995 * inputs(*maps.shape)[0]
    with torch.no_grad():
        right, wrong, none = (model.eval()(x, level, cond) for cond in map(_map, (maps, maps.roll(1, 0), None)))
    assert float((right - maps).square().mean()) < 0.5
    assert float((wrong - maps).square().mean()) > 1
    assert float((none - maps).square().mean()) > 1
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("net."))
    moved = [name for name in before if not name.startswith("net.") and torch.equal(after[name], before[name])]
    assert moved == []


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Control(DiT(1, width=16), 1), "needs a UNet, got DiT"),
        (lambda: Control(UNet(1, width=16, spatial=1), 1), "reads a spatial map by itself"),
        (lambda: Control(UNet(1, width=16), 0), "at least one channel, got spatial=0"),
        (
            lambda: build()(*inputs(2, 2, 4, 4), Cond(spatial=torch.ones(2, 1, 4, 4))),
            r"spatial of shape \(2, 1, 4, 4\)",
        ),
        (lambda: build()(torch.zeros(2, 3, 4, 4), torch.zeros(2)), r"got \(2, 3, 4, 4\)"),
    ],
)
def test_what_cannot_be_controlled_is_refused(make, why):
    with pytest.raises(InputError, match=why):
        make()


def test_compiles_without_a_graph_break():
    control, (x, t, cond) = build(opened=True), given(8, 8)
    torch._dynamo.reset()
    found = torch._dynamo.explain(control)(x, t, cond)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
