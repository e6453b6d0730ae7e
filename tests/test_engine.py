"""How the work is done: precision, compiling, the batch that is found, trackers, signals, the log."""

import contextlib
import json
import math
import os
import signal
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.runs import LABELS, POINTS, Scaled, small
from undiffuse import VP, Denoiser, InputError, Spectrum, V
from undiffuse.conditions import Conditions
from undiffuse.config import Config
from undiffuse.data import Data, Prepare
from undiffuse.fit import fit, largest_batch
from undiffuse.train import (
    EMA,
    Checkpoints,
    Engine,
    NonFinite,
    Objective,
    Plan,
    Preempted,
    Processes,
    Signals,
    Tracker,
    read_log,
    train,
)


class Watched(nn.Module):
    """A network that notes the types that reach it."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.types = nn.Conv2d(1, 1, 1), nn.Linear(1, 1), []

    def forward(self, x, time, cond):
        hidden = self.conv(x)
        told = self.linear(time[:, None])[..., None, None]
        self.types.append((x.dtype, time.dtype, hidden.dtype))
        return hidden + told


@pytest.mark.parametrize(
    ("precision", "inside"), [("float32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_levels_time_weights_and_loss_stay_in_float32(precision, inside):
    model = Denoiser(Watched(), V())
    states = list(train(model, POINTS, Objective(VP()), Plan(steps=2, batch=4, precision=precision)))
    assert set(model.net.types) == {(torch.float32, torch.float32, inside)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(state.error.dtype == state.lam.dtype == torch.float64 for state in states)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_learns_what_float32_learns(precision):
    """On pictures of one grey each, whose mean over the pixels is soon found."""
    x = (0.5 * torch.randn(16, 1, 1, 1, generator=torch.Generator().manual_seed(0))).expand(16, 1, 4, 4)

    def losses(kind):
        plan = Plan(steps=60, batch=16, lr=1e-2, warmup=5, precision=kind)
        return [state.loss for state in train(small(), x, Objective(VP()), plan, cond=LABELS)]

    full, reduced = losses("float32"), losses(precision)
    assert full != reduced
    assert reduced[:8] == pytest.approx(full[:8], rel=0.03)
    assert sum(reduced[-20:]) == pytest.approx(sum(full[-20:]), rel=0.4)
    assert sum(reduced[-20:]) < 1.4 * sum(reduced[:10])


def test_the_networks_time_embedding_is_computed_in_float32_in_reduced_precision():
    """Two levels that bf16 cannot tell apart (their times differ by 2^-10) give different embeddings."""
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        a, b = (model.net.embed.time(torch.tensor([t])) for t in (1.0, 1.0 + 2.0**-10))
    assert a.dtype == torch.float32
    exact = model.net.embed.time(torch.tensor([1.0]))
    assert torch.equal(a, exact)
    assert not torch.equal(a, b)


class Overflowing(Scaled):
    """Its gradient overflows while `left` > 0."""

    def __init__(self, left):
        super().__init__()
        self.left = left
        self.a.register_hook(self._spoil)

    def _spoil(self, gradient):
        self.left -= 1
        return gradient * math.inf if self.left >= 0 else gradient


def test_a_step_whose_loss_scale_overflows_is_left_out_and_the_scale_halved(tmp_path):
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    model = Denoiser(Overflowing(2), V())
    before = [p.detach().clone() for p in model.parameters()]
    states = train(
        model, x, Objective(VP()), Plan(steps=4, batch=4, precision="fp16", every=1), checkpoints=Checkpoints(tmp_path)
    )
    for _ in range(2):
        state = next(states)
        assert math.isinf(state.grad_norm)
        assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    assert math.isfinite(next(states).grad_norm)
    assert not any(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    next(states)
    kept = json.loads((tmp_path / "step-3/state.json").read_text())["scaler"]
    assert kept["scale"] == 65536.0 / 4


def test_a_loss_scale_that_always_overflows_is_a_divergence():
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    states = train(Denoiser(Overflowing(10**9), V()), x, Objective(VP()), Plan(steps=99, batch=4, precision="fp16"))
    with pytest.raises(NonFinite, match="step 21"):
        list(states)


def test_fp16_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    plan, x = Plan(steps=6, batch=4, precision="fp16", every=2), torch.randn(16, 3)
    straight = [s.loss for s in train(Denoiser(Overflowing(1), V()), x, Objective(VP()), plan)]
    for state in train(Denoiser(Overflowing(1), V()), x, Objective(VP()), plan, checkpoints=Checkpoints(tmp_path)):
        if state.step == 4:
            break
    del state
    rest = [
        s.loss
        for s in train(Denoiser(Overflowing(0), V()), x, Objective(VP()), plan, checkpoints=Checkpoints(tmp_path))
    ]
    assert rest == straight[4:]


def test_a_compiled_network_trains_as_the_plain_one():
    def losses(engine):
        torch.manual_seed(0)
        model = Denoiser(Watched(), V())
        model.net.types = None
        model.net.forward = lambda x, time, cond: model.net.conv(x) * torch.tanh(time)[:, None, None, None]
        plan, ema = Plan(steps=4, batch=4, warmup=0), EMA(model)
        found = [s.loss for s in train(model, POINTS, Objective(VP()), plan, ema=ema, engine=engine)]
        return found, list(model.state_dict()), list(ema.average.state_dict())

    (plain, names, _), (compiled, same, average) = losses(Engine()), losses(Engine(compile=True))
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert names == same == average


def test_the_largest_batch_stops_where_memory_ends_or_speed_does(monkeypatch):
    config = Config.resolve({"net": {"width": 16, "mults": [1]}})
    x = 0.5 * torch.randn(50, 1, 4, 4)
    told = Conditions(3, None, {}, Prepare())
    data, spectrum = (
        SimpleNamespace(classes=3, conditions=told, train=Data(x, torch.arange(50) % 3)),
        Spectrum.measure(x),
    )
    clock, cost = [0.0], [lambda b: 1.0 + b]

    def forward(self, x, time, cond):
        if len(x) > 128:
            raise torch.OutOfMemoryError("planted")
        clock[0] += cost[0](len(x))
        return 0.0 * x + self.head.weight.sum()

    monkeypatch.setattr("undiffuse.nets.UNet.forward", forward)
    monkeypatch.setattr("undiffuse.fit.time.perf_counter", lambda: clock[0])
    found = {}
    for name, law in {"flat": lambda b: b, "fixed": lambda b: 1.0, "knee": lambda b: max(64, b)}.items():
        cost[0] = law
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found[name] = largest_batch(config, data, spectrum, torch.device("cpu"))
    assert found == {"flat": 16, "fixed": 128, "knee": 64}


def test_the_batch_that_was_found_is_written_and_kept(tmp_path, monkeypatch):
    def layer(**more):
        train_ = {"steps": 2, "batch": "auto", "every": 1}
        base = {"net": {"width": 16, "mults": [1]}, "train": train_, "out": str(tmp_path / "run"), "track": "none"}
        return Config.resolve(base, {"eval": {"every": 0}}, more)

    monkeypatch.setattr("undiffuse.fit.largest_batch", lambda *_: 24)
    seen = []
    fit(layer(), lambda state, _: seen.append(len(state.ids)))
    assert seen == [24, 24]
    assert Config.read(tmp_path / "run/config.toml")["train"]["batch"] == 24
    monkeypatch.setattr("undiffuse.fit.largest_batch", lambda *_: 99)
    assert fit(layer()).model.config.section("train").batch == 24


# signals


def test_the_first_ctrl_c_is_noted_the_second_interrupts_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Signals() as asked:
        assert asked() == 0
        signal.raise_signal(signal.SIGINT)
        assert asked() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert asked() == signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_where_all_is_saved_a_signal_ends_at_once_and_no_handler_of_errors_hides_it():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for number, error in ((signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)):
        with pytest.raises(error), Signals(at_once=True), contextlib.suppress(Exception):
            signal.raise_signal(number)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_outside_the_main_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def enter():
        with Signals() as asked:
            seen.append((asked(), signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(0, True)]


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)])
def test_what_is_asked_in_a_step_is_saved_after_it(tmp_path, number, error):
    asked, seen = [0], []

    def follow():
        plan = Plan(steps=9, batch=4, every=0)
        for state in train(
            small(),
            POINTS,
            Objective(VP()),
            plan,
            cond=LABELS,
            checkpoints=Checkpoints(tmp_path),
            asked=lambda: asked[0],
        ):
            seen.append(state.step)
            asked[0] = number if state.step == 5 else 0

    with pytest.raises(error):
        follow()
    assert seen == [1, 2, 3, 4, 5]
    assert Checkpoints(tmp_path).steps() == [5]


# the log and its trackers


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_each_step_once_after_stops(tmp_path):
    from tests import runs

    data = runs.write_pictures(tmp_path)
    runs.run(data, tmp_path / "straight", track="tensorboard")
    for stop in (4, 7, None):
        runs.run(data, tmp_path / "run", stop, track="tensorboard")
    straight, found = (scalars(tmp_path / name / "logs/tensorboard") for name in ("straight", "run"))
    assert found == straight
    assert [step for step, _ in found["loss"]] == [2, 4, 6, 8, 10, 12]
    rows = {row["step"]: row for row in read_log(tmp_path / "run/metrics.jsonl") if "loss" in row}
    assert [value for _, value in found["loss"]] == pytest.approx([rows[s]["loss"] for s, _ in found["loss"]])
    assert [step for step, _ in found["eval/frechet"]] == [4, 8, 12]
    assert any("relative error/lam" in tag for tag in found)


def test_trackers_that_are_unknown_or_missing_are_refused(tmp_path):
    with pytest.raises(InputError, match="track='tensorbored' is not known"):
        Tracker("tensorbored", tmp_path, [], {})
    with pytest.raises(InputError, match="pip install wandb"):
        Tracker("wandb", tmp_path, [], {})
    Tracker("none", tmp_path, [], {}).log({"step": 1, "loss": 2.0})
    assert not list(tmp_path.iterdir())


def test_numbers_that_json_does_not_know_are_null(tmp_path):
    from undiffuse.runlog import Log

    log = Log(tmp_path, Config.resolve({"track": "none"}), writes=True)
    log.begin(0)
    log.add({"step": 1, "loss": 1.0, "grad_norm": math.inf, "eval": {"levels": [{"mse": math.nan}]}})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": 1.0, "grad_norm": None, "eval": {"levels": [{"mse": None}]}}
    other = Log(tmp_path, Config.resolve({"track": "none"}), writes=False)
    other.begin(0)
    other.add({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == text


# one process


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"no CUDA device here; use engine\.device=cpu"):
        Processes.start("cuda")
    assert Processes.start("auto") == Processes(device=torch.device("cpu"))


def test_what_fails_in_the_main_process_is_raised():
    def fail():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        Processes().together(fail)
    with pytest.raises(OSError, match="No space"):
        Processes().each(fail)
    assert Processes().each(lambda: 7) == [7]
    assert Processes().share(lambda: 7) == 7
    assert os.environ.get("WORLD_SIZE", "1") == "1"
