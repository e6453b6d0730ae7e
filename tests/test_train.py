"""The loop and `fit`: exact resume, the order of samples, rates, NaN, run folders."""

import contextlib
import errno
import json
import math
import multiprocessing
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from tests.runs import Scaled
from undiffuse import (
    VP,
    X0,
    Cosine,
    Dataset,
    Denoiser,
    EDMPrecond,
    Eps,
    Gaussian,
    InputError,
    Label,
    Level,
    Spectrum,
    V,
)
from undiffuse.config import Config
from undiffuse.data import Data
from undiffuse.data.order import Shuffled
from undiffuse.fit import fit
from undiffuse.model import Model
from undiffuse.nets import UNet
from undiffuse.rundata import RunData
from undiffuse.train import (
    EMA,
    Checkpoints,
    Classic,
    Lock,
    NonFinite,
    Objective,
    Plan,
    Power,
    Snapshots,
    commit,
    train,
    verify,
)
from undiffuse.train.objective import LogNormal
from undiffuse.watch import loss_by_level


class Spy(nn.Module):
    """Notes what it is given; at lam = 20 that is the data."""

    def __init__(self):
        super().__init__()
        self.w, self.seen, self.told = nn.Parameter(torch.zeros(1)), [], []

    def forward(self, x, time, cond):
        self.seen.append(x[:, 0].round().long())
        self.told.append(None if cond is None else cond.vector)
        return self.w * x


POINTS = 0.5 * torch.randn(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = Label(3)(torch.arange(10) % 3)
CLEAN = Objective(VP(), LogNormal(-20.0, 0.01))
NUMBERS = torch.arange(10.0)[:, None].repeat(1, 2)
PLAN = Plan(steps=9, batch=4, lr=1e-2, warmup=3, weight_decay=0.1, cond_dropout=0.4, every=2)


def unet(weights=0, dropout=0.3, vector=3):
    torch.manual_seed(weights)
    return Denoiser(UNet(1, width=16, mults=(1,), vector=vector, dropout=dropout), EDMPrecond())


def simple(plan, x=None, net=None, head=None, **kw):
    """A run of a tiny network on data of three elements: its model and its generator."""
    model = Denoiser(Scaled() if net is None else net, head or V())
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1)) if x is None else x
    return model, train(model, x, Objective(VP()), plan, **kw)


def tree(root):
    """Every file below `root` with its bytes."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def run(root, stop=None, weights=0):
    """Train to the end or to step `stop`, with a caller that draws random numbers in between; the losses by step."""
    losses = {}
    for state in train(
        unet(weights), POINTS, Objective(VP()), PLAN, cond=LABELS, seed=5, checkpoints=Checkpoints(root)
    ):
        losses[state.step] = (state.loss, state.grad_norm, state.lr, state.lam.tolist(), state.error.tolist())
        torch.rand(3)
        if state.step == stop:
            break
    return losses


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    root = tmp_path_factory.mktemp("straight")
    return run(root), tree(root)


@pytest.mark.parametrize("stops", [[1], [2], [3], [5], [8], [3, 5, 8]], ids=str)
def test_resumed_is_uninterrupted_bit_for_bit(straight, tmp_path, stops):
    """Weights, average, optimiser and losses, with dropout, condition dropout and batches that straddle epochs."""
    losses, files = straight
    for i, stop in enumerate(stops):
        run(tmp_path, stop, weights=i)
    rest = run(tmp_path, weights=99 if stops[-1] >= PLAN.every else 0)
    assert 0 <= stops[-1] - (min(rest) - 1) < PLAN.every  # a stop at a checkpoint's step has that checkpoint
    assert rest == {step: losses[step] for step in range(min(rest), 10)}
    assert tree(tmp_path) == files
    assert {name.split("/")[1] for name in files} == {
        "model.safetensors", "ema.safetensors", "optimiser.safetensors", "state.json", "manifest.json",
    }  # fmt: skip
    assert run(tmp_path) == {}


def test_the_run_depends_on_the_seed_and_uses_dropout(straight):
    same = [s.loss for s in train(unet(), POINTS, Objective(VP()), PLAN, cond=LABELS, seed=5)]
    other = [s.loss for s in train(unet(), POINTS, Objective(VP()), PLAN, cond=LABELS, seed=6)]
    without = [s.loss for s in train(unet(0, 0.0), POINTS, Objective(VP()), PLAN, cond=LABELS, seed=5)]
    assert same == [straight[0][step][0] for step in range(1, 10)]
    assert all(a != b for a, b in zip(same, other, strict=True))
    assert without[:1] == same[:1]
    assert without[2:] != same[2:]


def test_a_damaged_newest_checkpoint_costs_one_interval_and_nothing_else(straight, tmp_path):
    run(tmp_path)
    damaged = tmp_path / "step-9/ema.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"step-9/ema\.safetensors is truncated.*going on from step-8"):
        rest = run(tmp_path, weights=99)
    assert list(rest) == [9]
    assert tree(tmp_path) == straight[1]


def test_eight_points_are_learned_by_heart():
    """A UNet ends far below the best linear denoiser of eight points; their ideal denoiser's error is nearly 0 here."""
    x, level = POINTS[:8], Level.at(1.0)
    spectrum = Spectrum.measure(x)
    torch.manual_seed(0)
    model = Denoiser(UNet(1, width=16, mults=(1,)), EDMPrecond(spectrum.std))
    ema, objective = EMA(model), Objective(VP(), LogNormal(-1.0, 0.3), sigma_data=spectrum.std)
    states = list(train(model, x, objective, Plan(steps=200, batch=16, lr=1e-2, warmup=10), ema=ema))
    x0, g = x.repeat(40, 1, 1, 1), torch.Generator().manual_seed(1)
    noisy = level.diffuse(x0, torch.randn(x0.shape, generator=g))
    error = float((ema.average(noisy, level) - x0).square().mean())
    ideal = float((Dataset(x)(noisy, level) - x0).square().mean())
    linear = float(spectrum.linear_loss(level))
    assert ideal < 0.05 * linear
    assert ideal < error < 0.2 * linear
    assert float(states[0].error.mean()) > linear


def test_the_average_in_the_loop_is_the_power_rule_over_its_own_weights():
    model, states = simple(replace(PLAN, lr=0.1, warmup=0), ema=(ema := EMA(Denoiser(Scaled(), V()), Power(0.15))))
    ema.module = model
    path = torch.stack([model.net.a.detach().clone() for _ in states]).double()
    share = (torch.arange(10).double() / 9).pow(Power(0.15).gamma + 1).diff()
    assert torch.allclose(ema.average.net.a.double(), share @ path, atol=1e-6)
    assert (path.diff(dim=0).abs().amax(1)[:-1] > 0).all()


def test_the_loop_sees_each_sample_once_an_epoch_across_a_stop(tmp_path):
    plan, seen = Plan(steps=15, batch=4, every=1), []
    for stop in (4, 9, None):
        model = Denoiser(Spy(), X0())
        first = None
        for state in train(model, NUMBERS, CLEAN, plan, checkpoints=Checkpoints(tmp_path)):
            first = first or state.step
            if state.step == stop:
                break
        seen[(first - 1) * 4 :] = torch.cat(model.net.seen).tolist()
    assert len(seen) == 60
    for epoch in range(6):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_conditions_stay_with_their_samples_and_are_dropped_at_their_rate(share):
    model, cond = Denoiser(Spy(), X0()), Label(10)(torch.arange(10))
    for _ in train(model, NUMBERS, CLEAN, Plan(steps=100, batch=20, cond_dropout=share), cond=cond):
        pass
    told, seen = torch.cat(model.net.told), torch.cat(model.net.seen)
    dropped = (told == 0).all(1)
    assert torch.equal(told[~dropped].argmax(1), seen[~dropped])
    assert (told[~dropped].sum(1) == 1).all()
    assert float(dropped.float().mean()) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 2000))


def test_the_rate_warms_up_stays_and_falls_as_a_cosine():
    plan = Plan(steps=100, lr=2.0, warmup=10, decay=0.4)
    rates = [plan.rate(step) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert set(rates[10:60]) == {2.0}
    assert rates[60:] == pytest.approx([1 + math.cos(math.pi * i / 40) for i in range(40)])
    assert [state.lr for state in simple(plan)[1]] == rates


def test_without_decay_the_rate_stays_to_the_end():
    plan = Plan(steps=5, warmup=0, decay=0.0, lr=0.1)
    assert [plan.rate(step) for step in range(1, 6)] == [0.1] * 5


def test_the_first_step_is_adamws():
    """Adam's first move is the rate times the sign of the gradient; decay takes rate x weight_decay of the weights."""
    model, states = simple(Plan(steps=2, lr=4e-2, warmup=4, weight_decay=0.5, clip=1e9, decay=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    next(states)
    for name, p in model.named_parameters():
        expected = before[name] - 1e-2 * (0.5 * before[name] + p.grad.sign())
        assert torch.allclose(p, expected, rtol=1e-5, atol=1e-7)


def test_gradients_are_clipped_to_their_norm_and_reported_unclipped():
    reported, left = {}, {}
    for clip in (1e-3, 1e3):
        model, states = simple(Plan(steps=2, clip=clip))
        reported[clip] = next(states).grad_norm
        left[clip] = torch.cat([p.grad for p in model.parameters()])
    assert reported[1e-3] == reported[1e3]
    assert float(left[1e3].norm()) == pytest.approx(reported[1e3], rel=1e-5)
    assert torch.allclose(left[1e-3], left[1e3] * 1e-3 / reported[1e3], rtol=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_one_bad_sample_stops_the_run_at_its_step_and_level(value):
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    clean = list(simple(Plan(steps=4, batch=4), x)[1])
    step, place = 3, 1
    bad = int(Shuffled(16, 0).rows(step, 4)[place])
    lam = float(clean[step - 1].lam[place])
    x[bad] = value
    model, states = simple(Plan(steps=4, batch=4), x)
    seen, weights = [], []

    def follow():
        for state in states:
            seen.append(state.loss)
            weights[:] = [p.detach().clone() for p in model.parameters()]

    with pytest.raises(NonFinite, match=rf"step {step}:.*: {lam:.2f}\. Samples: {bad}\..*gradients: net\.a"):
        follow()
    assert seen == [state.loss for state in clean[: step - 1]]
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), weights, strict=False))


def test_a_bad_weight_is_named_with_its_step():
    model, states = simple(Plan(steps=4, batch=4))
    next(states)
    with torch.no_grad():
        model.net.b[1] = math.nan
    with pytest.raises(NonFinite, match=r"step 2:.*Non-finite weights: net\.b\."):
        next(states)


def test_only_the_parameters_with_bad_gradients_are_named():
    model, states = simple(Plan(steps=4, batch=4))
    model.net.b.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(NonFinite, match=r"Non-finite gradients: net\.b\. Non-finite weights: none"):
        next(states)


def test_a_caller_that_switches_to_eval_does_not_switch_dropout_off(straight):
    model, losses = unet(), []
    for state in train(model, POINTS, Objective(VP()), PLAN, cond=LABELS, seed=5):
        model.eval()
        losses.append(state.loss)
    assert losses == [straight[0][step][0] for step in range(1, 10)]


def test_other_settings_are_refused_by_name(tmp_path):
    plan, checkpoints = Plan(steps=2, batch=4, every=1), Checkpoints(tmp_path)
    list(simple(plan, checkpoints=checkpoints, identity={"width": 3, "seed": 1, "net": {"kind": "unet"}})[1])
    before = tree(tmp_path)
    for other, key in [
        ({"width": 4, "seed": 1, "net": {"kind": "unet"}}, "width"),
        ({"width": 3, "seed": 1, "net": {"kind": "dit"}}, "net"),
        ({"width": 3, "net": {"kind": "unet"}}, r"seed was 1, is not set\."),
        ({"width": 3, "seed": 1, "net": {"kind": "dit", "heads": 2}}, r"net was 'unet', is 'dit'\. Give another"),
        ({"width": 3, "seed": 1, "net": {"kind": "unet"}, "patch": 2}, "patch"),
    ]:
        with pytest.raises(InputError, match=rf"step-2 belongs to a run with other settings: {key}"):
            next(simple(plan, checkpoints=checkpoints, identity=other)[1])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("identity", [{"mults": (1, 2)}, {"step": 0}], ids=["tuple", "step"])
def test_any_identity_that_json_takes_recognises_its_own_run(identity, tmp_path):
    plan = Plan(steps=2, batch=4, every=1)
    for expected in (2, 0):
        assert len(list(simple(plan, checkpoints=Checkpoints(tmp_path), identity=identity)[1])) == expected


@pytest.mark.parametrize("first", ["compiled", "plain"])
def test_compiled_and_plain_runs_go_on_from_each_other(first, tmp_path):
    plan = Plan(steps=3, batch=4, every=1)
    nets = {"compiled": torch.compile(Scaled(), backend="eager"), "plain": Scaled()}
    for name in sorted(nets, key=first.__ne__):
        for state in simple(plan, net=nets[name], checkpoints=Checkpoints(tmp_path))[1]:
            if name == first and state.step == 2:
                break
    assert state.step == 3


def test_tied_weights_are_saved(tmp_path):
    net = Scaled()
    net.b = net.a
    plan = Plan(steps=2, batch=4, every=1)
    assert len(list(simple(plan, net=net, checkpoints=Checkpoints(tmp_path))[1])) == 2


def test_impossible_runs_are_refused_before_they_start(tmp_path):
    for values in (
        *({"steps": 0}, {"batch": 0}, {"lr": 0.0}, {"lr": math.nan}, {"lr": 1e300}, {"warmup": -1}, {"decay": 1.1}),
        *({"clip": 0.0}, {"weight_decay": -1.0}, {"weight_decay": math.inf}, {"cond_dropout": 1.5}, {"every": -1}),
        *({"snapshots": -1}, {"snapshots": 1501}),
    ):
        with pytest.raises(InputError, match=next(iter(values))):
            Plan(**values)
    for x, cond, why in (
        (torch.zeros(4, 3, dtype=torch.uint8), None, "takes floats.*uint8"),
        (torch.zeros(0, 3), None, "takes floats"),
        (np.zeros((4, 3)), None, "tensor x .*got ndarray"),
        (torch.zeros(4, 3), torch.zeros(4), "cond must be a Cond"),
    ):
        with pytest.raises(InputError, match=why):
            next(train(Denoiser(Scaled(), V()), x, Objective(VP()), PLAN, cond=cond))
    for values in ({"steps": 1.5}, {"batch": "many"}, {"every": 0.5}):
        with pytest.raises(InputError, match="must be a whole number"):
            Plan(**values)
    with pytest.raises(InputError, match="3 rows for 16"):
        next(simple(PLAN, cond=Label(3)([0, 1, 2]))[1])
    with pytest.raises(InputError, match="the Eps head"):
        next(train(Denoiser(Scaled(), Eps()), torch.zeros(4, 3), Objective(Cosine()), PLAN))


# fit and run folders

SETTINGS = {
    "net": {"kind": "unet", "width": 16, "mults": [1], "dropout": 0.2},
    "train": {"steps": 8, "batch": 8, "every": 2, "warmup": 2},
    "held_out": 6,
    "seed": 3,
    "track": "none",
    "eval": {"every": 0},
}


class Stop(Exception):
    """A caller that gives up."""


def stop_at(step):
    def progress(state, steps):
        if state.step == step:
            raise Stop

    return progress


def write_data(folder):
    g = np.random.default_rng(0)
    np.savez(folder / "data.npz", x=g.normal(0, 0.6, (30, 1, 4, 4)).astype("float32"), labels=np.arange(30) % 3)
    return folder / "data.npz"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that went straight through: its layers without `out`, its folder and its result."""
    folder = tmp_path_factory.mktemp("fit")
    layer = {**SETTINGS, "data": str(write_data(folder))}
    return layer, folder / "run", fit(Config.resolve(layer, {"out": str(folder / "run")}), log_every=2)


def at(finished, out, *layers):
    return Config.resolve(finished[0], *layers, {"out": str(out)})


def same_run(a, b):
    """Two run folders that may differ in their `out` alone."""
    for part in ("model/ema-power-0.1.safetensors", "model/spectrum.safetensors", "metrics.jsonl"):
        assert (a / part).read_bytes() == (b / part).read_bytes()
    assert tree(a / "checkpoints") == tree(b / "checkpoints")


def test_fit_writes_a_run_folder(finished):
    layer, out, fitted = finished
    assert {p.name for p in out.iterdir()} == {
        ".lock", "config.toml", "data.json", "spectrum.safetensors", "metrics.jsonl", "curves.png", "checkpoints",
        "model",
    }  # fmt: skip
    assert Checkpoints(out / "checkpoints").steps() == [6, 8]
    verify(out / "model")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    spectrum, plan = Spectrum.measure(fitted.train.x), fitted.model.config.section("train")
    for row in rows:
        assert row["lr"] == plan.rate(row["step"])
        assert math.isfinite(row["loss"] + row["grad_norm"])
        assert sum(b["count"] for b in row["bins"]) == 2 * 8
        assert all(0 < b["linear"] < spectrum.std**2 for b in row["bins"])
    assert (len(fitted.train), len(fitted.held_out)) == (24, layer["held_out"])
    assert fitted.model.classes == 3


def test_the_written_configuration_is_the_resolved_one_and_rebuilds_the_run(finished, tmp_path):
    _, out, fitted = finished
    read = Config.read(out / "config.toml")
    assert Config.resolve(read).values == fitted.model.config.values
    assert Config.resolve(Config.read(out / "model/config.toml")).values == fitted.model.config.values
    std = float(fitted.train.x.var(0, correction=0).mean()) ** 0.5
    assert read["head"]["sigma_data"] == pytest.approx(std, rel=1e-3)
    fit(Config.resolve(read, {"out": str(tmp_path / "again")}), log_every=2)
    same_run(tmp_path / "again", out)


def test_the_written_configuration_rebuilds_a_run_whose_held_out_samples_were_not_stated(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 1, 4, 4)).astype("float32")
    fit(settle(tmp_path, x))
    fit(Config.resolve(Config.read(tmp_path / "run/config.toml"), {"out": str(tmp_path / "again")}))
    same_run(tmp_path / "again", tmp_path / "run")


def test_running_again_after_the_end_changes_nothing(finished):
    _, out, fitted = finished
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    before, steps = tree(out), []
    again = fit(at(finished, out), lambda state, total: steps.append(state), log_every=2)
    assert steps == []
    assert tree(out) == before
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == stamps
    for mine, theirs in zip(again.model.denoiser.parameters(), fitted.model.denoiser.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("stops", [[1], [4], [8], [3, 6]], ids=str)
def test_a_run_that_stopped_goes_on_as_if_it_had_not(finished, tmp_path, stops):
    for stop in stops:
        with pytest.raises(Stop):
            fit(at(finished, tmp_path / "run"), stop_at(stop), log_every=2)
        assert not (tmp_path / "run/model").exists()
    fit(at(finished, tmp_path / "run"), log_every=2)
    same_run(tmp_path / "run", finished[1])


def test_every_line_of_the_log_is_there_once_after_a_stop(finished, tmp_path):
    with pytest.raises(Stop):
        fit(at(finished, tmp_path / "run"), stop_at(5), log_every=1)
    fit(at(finished, tmp_path / "run"), log_every=1)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [sum(b["count"] for b in row["bins"]) for row in rows] == [8] * 8


def test_lines_of_the_log_that_span_a_checkpoint_survive_a_stop(finished, tmp_path):
    fit(at(finished, tmp_path / "straight"), log_every=3)
    with pytest.raises(Stop):
        fit(at(finished, tmp_path / "run"), stop_at(6), log_every=3)
    fit(at(finished, tmp_path / "run"), log_every=3)
    same_run(tmp_path / "run", tmp_path / "straight")


def test_a_torn_line_in_the_log_does_not_stop_a_resume(finished, tmp_path):
    with pytest.raises(Stop):
        fit(at(finished, tmp_path / "run"), stop_at(5), log_every=2)
    with open(tmp_path / "run/metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lo')
    fit(at(finished, tmp_path / "run"), log_every=2)
    same_run(tmp_path / "run", finished[1])


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl"])
def test_a_disk_that_is_full_at_a_resume_costs_nothing(finished, tmp_path, monkeypatch, name):
    real = Path.write_text

    def write_text(self, data, *args, **kw):
        if self.name == name:
            real(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, data, *args, **kw)

    with pytest.raises(Stop):
        fit(at(finished, tmp_path / "run"), stop_at(5), log_every=2)
    with monkeypatch.context() as patch, contextlib.suppress(OSError):
        patch.setattr(Path, "write_text", write_text)
        fit(at(finished, tmp_path / "run"), log_every=2)
    fit(at(finished, tmp_path / "run"), log_every=2)
    same_run(tmp_path / "run", finished[1])


def test_fit_falls_back_over_a_damaged_checkpoint(finished, tmp_path):
    with pytest.raises(Stop):
        fit(at(finished, tmp_path / "run"), stop_at(7), log_every=2)
    (tmp_path / "run/checkpoints/step-6/optimiser.safetensors").write_bytes(b"\0" * 9)
    with pytest.warns(UserWarning, match="step-6/optimiser"):
        fit(at(finished, tmp_path / "run"), log_every=2)
    same_run(tmp_path / "run", finished[1])


def fit_slowly(config, note):
    def progress(state, steps):
        note.put(state.step)
        time.sleep(0.05)

    fit(config, progress, log_every=2)


def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(finished, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_train", "tests.test_checkpoint"])
    for step in (3, 5, 6):
        note = context.Queue()
        process = context.Process(target=fit_slowly, args=(at(finished, tmp_path / "run"), note))
        process.start()
        while process.is_alive() and (note.empty() or note.get() < step):
            time.sleep(0.001)
        assert process.is_alive()
        process.kill()
        process.join()
    fit(at(finished, tmp_path / "run"), log_every=2)
    same_run(tmp_path / "run", finished[1])


def test_a_lost_model_folder_is_made_again_from_the_checkpoint(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    fit(at(finished, tmp_path / "run"), log_every=2)
    same_run(tmp_path / "run", finished[1])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 4}, "seed"),
        ({"held_out": 5}, "held_out"),
        ({"schedule": "cosine"}, "schedule"),
        ({"train": {"lr": 1e-3}}, r"train\.lr"),
        ({"train": {"steps": 99}}, r"train\.steps was 8, is 99\. The rate falls .* for more of them train anew"),
        ({"optimiser": "adamw"}, r"optimiser was 'muon', is 'adamw'\. Give another"),
        ({"net": {"dropout": 0.1}}, r"net\.dropout"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_by_name(finished, change, key):
    before = tree(finished[1])
    with pytest.raises(InputError, match=rf"other settings: .*{key}"):
        fit(at(finished, finished[1], change))
    assert tree(finished[1]) == before


def test_sampling_settings_may_change(finished):
    fitted = fit(at(finished, finished[1], {"solver": "ddim", "sample": {"steps": 3}}), stop_at(1))
    assert fitted.model.sample(2, label=1).shape == (2, 1, 4, 4)
    assert fitted.model.config.values["solver"]["kind"] == "ddim"
    assert fitted.model.config.values["sample"]["steps"] == 3


def test_other_data_under_the_same_name_is_refused(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 1, 4, 4)).astype("float32")
    with pytest.raises(Stop):
        fit(settle(tmp_path, x, head="v"), stop_at(3))
    with pytest.raises(InputError, match="data"):
        fit(settle(tmp_path, 1 - x, head="v"))


def test_other_labels_under_the_same_name_are_refused(tmp_path):
    layer = {**SETTINGS, "data": str(write_data(tmp_path)), "out": str(tmp_path / "run")}
    with pytest.raises(Stop):
        fit(Config.resolve(layer), stop_at(3))
    with np.load(tmp_path / "data.npz") as was:
        np.savez(tmp_path / "data.npz", x=was["x"], labels=(was["labels"] + 1) % 3)
    with pytest.raises(InputError, match="data"):
        fit(Config.resolve(layer))


def test_a_first_start_that_failed_does_not_bind_the_next(tmp_path):
    """Nothing was saved, so other settings, of the training too, are taken."""
    x = np.random.default_rng(0).normal(size=(20, 1, 4, 4)).astype("float32")
    with pytest.raises(Stop):
        fit(settle(tmp_path, x, head="v"), stop_at(1))
    assert (tmp_path / "run/config.toml").is_file()
    fitted = fit(settle(tmp_path, x, head="x0"))
    assert fitted.model.config.values["head"]["kind"] == "x0"
    assert Config.read(tmp_path / "run/config.toml")["head"]["kind"] == "x0"


def test_a_configuration_that_no_run_has_written_is_not_overwritten(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 1, 4, 4)).astype("float32")
    config = settle(tmp_path, x)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text("seed = 3\n")
    with pytest.raises(InputError, match=r"was written by no run: .*--config"):
        fit(config)
    assert (tmp_path / "run/config.toml").read_text() == "seed = 3\n"


def test_settings_of_the_reading_may_change_when_a_run_goes_on(finished, tmp_path):
    with pytest.raises(Stop):
        fit(at(finished, tmp_path / "run"), stop_at(5), log_every=2)
    fit(at(finished, tmp_path / "run", {"data": {"bad_share": 0.5, "memory_mb": 99}}), log_every=2)
    same_run(tmp_path / "run", finished[1])


def hold(folder, taken):
    folder.mkdir()
    with Lock(folder) as lock:
        lock.take()
        taken.set()
        time.sleep(60)


def test_a_run_folder_is_for_one_process_at_a_time(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 1, 4, 4)).astype("float32")
    context = multiprocessing.get_context("forkserver")
    taken = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", taken))
    process.start()
    assert taken.wait(60)
    with pytest.raises(InputError, match="run is in use by another process"):
        fit(settle(tmp_path, x))
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
    process.kill()
    process.join()
    fit(settle(tmp_path, x))


def test_a_file_in_the_place_of_the_run_folder_is_named(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 1, 4, 4)).astype("float32")
    config = settle(tmp_path, x)
    (tmp_path / "run").write_text("mine")
    with pytest.raises(InputError, match="is a file: give the name of a folder"):
        fit(config)


def test_a_finished_run_without_checkpoints_is_not_overwritten_by_another(finished, tmp_path):
    fit(at(finished, tmp_path / "run", {"train": {"every": 0}}))
    before = tree(tmp_path / "run")
    with pytest.raises(InputError, match="other settings"):
        fit(at(finished, tmp_path / "run", {"train": {"every": 0, "steps": 3}}))
    assert tree(tmp_path / "run") == before


def test_load_gives_the_model_that_fit_returned(finished):
    _, out, fitted = finished
    model = Model.load(out)
    for (name, mine), theirs in zip(
        model.denoiser.state_dict().items(), fitted.model.denoiser.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    averaged = load_file(out / "checkpoints/step-8/ema.safetensors")
    assert all(torch.equal(v, averaged[k]) for k, v in model.denoiser.state_dict().items())
    assert not model.denoiser.training
    assert not any(p.requires_grad for p in model.denoiser.parameters())
    draw = [m.sample(3, label=[0, 1, 2], steps=4) for m in (model, model, fitted.model)]
    assert torch.equal(draw[0], draw[1])
    assert torch.equal(draw[0], draw[2])
    assert (model.shape, model.classes, model.config.values) == ((1, 4, 4), 3, fitted.model.config.values)


@pytest.mark.parametrize("name", ["config.toml", "model.json", "spectrum.safetensors", "ema-*", "manifest.json"])
def test_a_changed_truncated_or_missing_file_of_a_model_is_named(finished, tmp_path, name):
    shutil.copytree(finished[1], tmp_path / "run")
    (path,) = (tmp_path / "run/model").glob(name)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for damaged in (flipped, whole[:-1], b"", None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(InputError, match="manifest" if name == "manifest.json" else path.name):
            Model.load(tmp_path / "run")


def test_a_missing_or_unfinished_run_says_what_to_do(finished, tmp_path):
    with pytest.raises(InputError, match=r"nowhere does not exist.*undiffuse train"):
        Model.load(tmp_path / "nowhere")
    with pytest.raises(Stop):
        fit(at(finished, tmp_path / "run"), stop_at(5))
    with pytest.raises(InputError, match="no finished model: run its training command again"):
        Model.load(tmp_path / "run")


@pytest.mark.parametrize(
    "forge",
    [
        lambda f: (f / "config.toml").write_text((f / "config.toml").read_text().replace("width = 16", "width = 24")),
        lambda f: (f / "config.toml").write_text("net = ["),
        lambda f: (f / "model.json").write_text("{}"),
        lambda f: (f / "spectrum.safetensors").write_bytes(b"\xff" * 40),
        *(
            pytest.param(forge)
            for forge in (
                lambda f: (f / "model.json").write_text("[]"),
                lambda f: (f / "spectrum.safetensors").unlink(),
            )
        ),
    ],
    ids=["width", "toml", "keys", "spectrum", "list", "no-spectrum"],
)
def test_a_model_that_does_not_fit_together_is_refused_though_its_hashes_are_right(finished, tmp_path, forge):
    def writer(aside):
        shutil.copytree(finished[1] / "model", aside, dirs_exist_ok=True)
        (aside / "manifest.json").unlink()
        forge(aside)

    commit(tmp_path / "model", writer)
    with pytest.raises(InputError):
        Model.load(tmp_path)


def test_labels_reach_the_network(tmp_path):
    """Two classes at -1 and +1: in almost pure noise the prediction is the mean of the class that is asked for."""
    labels = np.arange(40) % 2
    x = np.random.default_rng(0).normal(0, 0.1, (40, 1, 4, 4)) + (2 * labels - 1)[:, None, None, None]
    np.savez(tmp_path / "x.npz", x=x.astype("float32"), labels=labels)
    plan = {"steps": 80, "batch": 16, "lr": 1e-2, "warmup": 5, "every": 0}
    base = {"data": str(tmp_path / "x.npz"), "out": str(tmp_path / "run"), "net": {"width": 16}, "train": plan}
    model = fit(Config.resolve(base, {"levels": {"kind": "log-normal", "mean": 2.0, "std": 1.0}})).model
    level, z = Level.at(-3.0), torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    below, above = model.denoiser(level.sigma * z, level, model.cond([0, 1], 2)).mean((1, 2, 3)).tolist()
    assert below < -0.8
    assert above > 0.8


def settle(tmp_path, x, **layers):
    """A configuration for an array without labels."""
    np.save(tmp_path / "x.npy", x)
    plan = {"steps": 3, "batch": 4, "every": 2}
    base = {"data": str(tmp_path / "x.npy"), "out": str(tmp_path / "run"), "net": {"width": 16}, "train": plan}
    return Config.resolve(base, {"track": "none", "eval": {"every": 0}}, layers)


def test_four_samples_are_enough(tmp_path):
    x = np.random.default_rng(0).normal(size=(4, 1, 4, 4)).astype("float32")
    fitted = fit(settle(tmp_path, x, eval={"every": 2}))
    assert (len(fitted.train), len(fitted.held_out)) == (2, 2)


def test_unlabelled_data_in_one_dimension(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 2, 9)).astype("float32")
    fitted = fit(settle(tmp_path, x))
    assert (len(fitted.train), len(fitted.held_out)) == (16, 4)
    model = Model.load(tmp_path / "run")
    draws = model.sample(3, steps=4)
    assert draws.shape == (3, 2, 9)
    assert torch.isfinite(draws).all()
    assert torch.equal(draws, fitted.model.sample(3, steps=4))
    assert len({tuple(x.flatten().tolist()) for x in draws}) == 3
    assert model.classes == 0
    with pytest.raises(InputError, match="without labels"):
        model.sample(3, label=0)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda x: np.full_like(x, np.inf), "no sample can be read; .*NaN or infinite"),
        (lambda x: np.full_like(x, 0.1), "all samples are the same"),
        (lambda x: x[:1], "cannot hold out 2 of 1"),
        (lambda x: x[:2], "cannot hold out 2 of 2 samples: at least 2 are needed to measure by, and 2 to train on"),
        (lambda x: x[:3], "cannot hold out 2 of 3"),
    ],
    ids=["inf", "constant", "one", "two", "three"],
)
def test_data_that_cannot_be_learned_from_is_refused_and_leaves_nothing(tmp_path, spoil, why):
    x = np.random.default_rng(0).normal(size=(20, 1, 4, 4)).astype("float32")
    with pytest.raises(InputError, match=why):
        fit(settle(tmp_path, spoil(x)))
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]


def test_one_sample_with_nan_is_left_out_and_listed(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 1, 4, 4)).astype("float32")
    x[7] = np.nan
    config = settle(tmp_path, x, train={"steps": 12, "batch": 8})
    with pytest.warns(UserWarning, match=r"1 sample could not be read.*bad\.jsonl"):
        fitted = fit(config)
    (line,) = (tmp_path / "run/bad.jsonl").read_text().splitlines()
    assert json.loads(line)["where"].endswith("x.npy[7]")
    assert "NaN" in json.loads(line)["reason"]
    assert len(fitted.train) + len(fitted.held_out) == 19


def test_heads_that_cannot_start_in_pure_noise_are_refused_and_leave_nothing(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 1, 4, 4)).astype("float32")
    for schedule in ("cosine", "flow", "sigmoid"):
        with pytest.raises(InputError, match="the Eps head"):
            fit(settle(tmp_path, x, head="eps", schedule=schedule))
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]


def test_a_run_that_diverges_stops_and_makes_no_model(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 1, 4, 4)).astype("float32")
    config = settle(tmp_path, x, train={"steps": 50, "lr": 1e30, "warmup": 0, "every": 1})
    for _ in range(2):
        with pytest.raises(NonFinite, match="step"):
            fit(config)
        assert not (tmp_path / "run/model").exists()


def test_data_of_small_scale_trains(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 1, 4, 4)).astype("float32")
    fitted = fit(settle(tmp_path, 1e-5 * x))
    assert fitted.model.config.values["head"]["sigma_data"] == pytest.approx(fitted.model.spectrum.std, rel=1e-3)


def test_few_large_samples_train(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 1, 46, 46)).astype("float32")
    fitted = fit(settle(tmp_path, x, net={"width": 16, "patch": 8}, train={"steps": 1}))
    assert fitted.model.spectrum.std == pytest.approx(float(fitted.train.x.std(0, correction=0).square().mean()) ** 0.5)


def test_a_stated_number_of_held_out_samples_is_kept(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 1, 4, 4)).astype("float32")
    data = RunData.of(settle(tmp_path, x, held_out=20))
    assert (len(data.train), len(data.held_out)) == (10, 20)


def test_loss_by_level_of_the_best_linear_denoiser_is_the_linear_loss(finished):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 1, 4, generator=g) * torch.tensor([0.1, 0.5, 1.0, 2.0])
    spectrum = Spectrum.measure(x)
    model = replace(finished[2].model, denoiser=Gaussian(spectrum), spectrum=spectrum)
    rows = loss_by_level(model, Data(x), lams := torch.tensor([-3.0, 0.0, 3.0]))
    for row, lam in zip(rows, lams, strict=True):
        assert row["lam"] == float(lam)
        assert row["linear"] == float(spectrum.linear_loss(Level.at(lam)))
        assert row["mse"] == pytest.approx(row["linear"], rel=0.06)
    again = loss_by_level(model, Data(x), lams, batch=7)
    assert [r["mse"] for r in again] == pytest.approx([r["mse"] for r in rows], rel=1e-6)


def averaged(folder, stop=None):
    """A short run with two more averages and snapshots, in `folder`."""
    torch.manual_seed(0)
    model = unet()
    ema = EMA(model, Classic(0.5), Power(0.05), Power(0.10))
    kept, saved = Snapshots(folder / "averages", 3), Checkpoints(folder / "steps")
    for state in train(
        model, POINTS, Objective(VP()), PLAN, cond=LABELS, seed=5, ema=ema, snapshots=kept, checkpoints=saved
    ):
        if state.step == stop:
            break
    return ema, kept


def test_snapshots_and_all_averages_of_a_run_go_on_bit_for_bit(tmp_path):
    ema, kept = averaged(tmp_path / "a")
    for stop in (4, None):
        again, _ = averaged(tmp_path / "b", stop)
    for mine, other in zip(ema.averages, again.averages, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert kept.steps() == [3, 6, 9]
    state, fit = kept.average(0.10)
    assert fit.error < 1e-12
    assert all(torch.allclose(state[k], v, atol=1e-6) for k, v in ema.averages[2].named_parameters())
    assert not all(torch.allclose(state[k], v, atol=1e-4) for k, v in ema.average.named_parameters())


def test_snapshots_without_an_average_by_the_power_rule_are_refused(tmp_path):
    model = unet()
    states = train(
        model, POINTS, Objective(VP()), PLAN, cond=LABELS, ema=EMA(model, Classic()), snapshots=Snapshots(tmp_path)
    )
    with pytest.raises(InputError, match=r"averages by the power rule.*Classic.*add Power"):
        next(states)


def test_a_scheduler_of_torch_takes_the_place_of_the_plans_rate(tmp_path):
    def go(folder, stop=None):
        rates, model = [], Denoiser(Scaled(), V())
        for state in train(
            model, POINTS[..., :3], Objective(VP()), PLAN, scheduler=lambda o: OneCycleLR(o, 0.3, total_steps=20),
            seed=5, checkpoints=Checkpoints(folder),
        ):  # fmt: skip
            rates.append(state.lr)
            if state.step == stop:
                break
        return rates, model

    optimiser = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    expected, cycle = [], OneCycleLR(optimiser, 0.3, total_steps=20)
    for _ in range(PLAN.steps):
        expected.append(cycle.get_last_lr()[0])
        optimiser.step()
        cycle.step()
    rates, model = go(tmp_path / "a")
    assert rates == expected
    first, _ = go(tmp_path / "b", 4)
    rest, again = go(tmp_path / "b")
    assert first[: PLAN.steps - len(rest)] + rest == expected
    assert torch.equal(model.net.a, again.net.a)


def test_an_average_of_another_length_is_rebuilt_from_a_run(tmp_path):
    data, load = str(write_data(tmp_path)), Model.load
    layer = {**SETTINGS, "data": data, "train": {**SETTINGS["train"], "steps": 40, "lr": 0.01}}
    for name, more in (("direct", {"ema": {"length": 0.07}}), ("kept", {"train": {"snapshots": 20}})):
        settings = {**layer, **more, "out": str(tmp_path / name)}
        settings["train"] = {**layer["train"], **more.get("train", {})}
        fit(Config.resolve(settings))
    direct, rebuilt, other = (load(tmp_path / n, e) for n, e in (("direct", None), ("kept", 0.07), ("kept", None)))

    def off(model):
        pairs = zip(model.denoiser.parameters(), direct.denoiser.parameters(), strict=True)
        return sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5

    assert off(rebuilt) < 0.02 * off(other)
    assert (rebuilt.average, other.average) == ("power, length 0.07, rebuilt", "power, length 0.1")
    with pytest.raises(InputError, match=r"no snapshots .* train\.snapshots=16"):
        load(tmp_path / "direct", 0.07)
    with pytest.raises(InputError, match=r"ema\.length must be in"):
        load(tmp_path / "kept", 0.5)
