"""Several processes, interruption at every step, signals, and memory that runs out."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import runs
from tests.group import together
from tests.runs import STEPS
from undiffuse import VP, Denoiser, InputError, V
from undiffuse.model import Model
from undiffuse.train import Checkpoints, Engine, Gradient, Objective, Plan, Processes, train, verify

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()}


def kept(out):
    """What a run keeps: weights, average, optimiser, the caller's sums, the log with its measurements, pictures; not
    the settings, in which `out` and the number of workers differ."""
    return {
        name: content for name, content in tree(out).items()
        if not name.endswith(("config.toml", "manifest.json", "bad.jsonl")) and "state.json" not in name
    }  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return runs.write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory):
    """One process, uninterrupted, reading by itself: its folder and what it saw."""
    out = tmp_path_factory.mktemp("alone") / "run"
    return out, runs.run(pictures, out)


@pytest.fixture(scope="module")
def pair(pictures, tmp_path_factory):
    """Two processes, uninterrupted."""
    out = tmp_path_factory.mktemp("pair") / "run"
    return out, together(runs.run, pictures, out)[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_at_every_step_equals_the_uninterrupted_one(alone, pictures, tmp_path, workers):
    """Bit for bit: weights, average, optimiser, level bins, log, measurements, pictures."""
    runs.run_everywhere(pictures, tmp_path, workers)
    for k in range(1, STEPS + 1):
        assert kept(tmp_path / f"stop{k}") == kept(alone[0]), k


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_stopped_at_every_step_equal_the_uninterrupted_two(pair, pictures, tmp_path, workers):
    together(runs.run_everywhere, pictures, tmp_path, workers, timeout=200)
    for k in range(1, STEPS + 1):
        assert kept(tmp_path / f"stop{k}") == kept(pair[0]), k


def test_two_processes_do_what_one_does(alone, pair):
    """The same samples at the same levels; losses are compared below, without dropout."""
    assert [v[1:] for v in alone[1].values()] == [v[1:] for v in pair[1].values()]
    assert sorted(i for v in alone[1].values() for i in v[1])[:3] == [0, 0, 0]


def test_one_and_two_processes_have_the_same_losses():
    plan = {"steps": 8, "batch": 8, "every": 0, "lr": 1e-3, "warmup": 0}
    one, mine = runs.losses(plan, {})
    for found, theirs in together(runs.losses, plan, {}):
        for step, (loss, norm) in one.items():
            assert found[step] == pytest.approx((loss, norm), rel=1e-5)
        for name, value in mine.items():
            assert np.allclose(theirs[name], value, atol=1e-5), name


def test_from_two_processes_to_one_and_back_no_sample_is_missed_or_seen_twice(alone, pictures, tmp_path):
    seen = {}
    for world, stop in ((2, 5), (1, 9), (2, None)):
        parts = together(runs.run, pictures, tmp_path / "run", stop, world=world)
        assert all(part == parts[0] for part in parts)
        seen |= parts[0]
    assert {k: v[1:] for k, v in seen.items()} == {k: v[1:] for k, v in alone[1].items()}
    ids = [i for step in range(1, STEPS + 1) for i in seen[step][1]]
    assert all(sorted(ids[e : e + 24]) == list(range(24)) for e in range(0, 72, 24))


def test_sharded_processes_have_the_losses_of_one(tmp_path):
    """FSDP2 on two processes: the same curve to 1e-5, and a checkpoint that one process goes on from."""
    plan = {"steps": 8, "batch": 8, "every": 4, "lr": 1e-3, "warmup": 0}
    one, mine = runs.losses(plan, {}, tmp_path / "one")
    for found, theirs in together(runs.losses, plan, {"sharding": "fsdp"}, tmp_path / "two"):
        for step, (loss, norm) in one.items():
            assert found[step] == pytest.approx((loss, norm), rel=1e-5)
        for name, value in mine.items():
            assert np.allclose(theirs[name], value, atol=1e-5), name
    shutil.rmtree(tmp_path / "two/step-8")
    rest, _ = runs.losses(plan, {}, tmp_path / "two")
    assert list(rest) == [5, 6, 7, 8]
    assert rest[8][0] == pytest.approx(one[8][0], rel=1e-5)
    shutil.rmtree(tmp_path / "one/step-8")
    for found, _ in together(runs.losses, plan, {"sharding": "fsdp"}, tmp_path / "one"):
        assert list(found) == [5, 6, 7, 8]
        assert found[8][0] == pytest.approx(one[8][0], rel=1e-5)


def test_a_sharded_run_writes_a_model_that_loads(pictures, tmp_path, alone):
    adamw = {"optimiser": {"kind": "adamw"}}
    together(run_with, pictures, tmp_path / "run", adamw, world=2)
    together(run_with, pictures, tmp_path / "fsdp", {"engine": {"sharding": "fsdp"}, **adamw})
    model = Model.load(tmp_path / "fsdp")
    plain = Model.load(tmp_path / "run")
    for name, value in model.denoiser.state_dict().items():
        assert torch.allclose(value, plain.denoiser.state_dict()[name], atol=1e-3), name
    a, b = (m.sample(2, label=1, steps=2) for m in (model, plain))
    assert float((a - b).norm() / b.norm()) < 0.01


def run_with(data, out, more, stop=None):
    return runs.run(data, out, stop, **more)


def test_a_sharded_run_stopped_after_measuring_equals_the_uninterrupted_one(pictures, tmp_path):
    """The main process has the measurements of step 8, the others have not: all must leave them out."""
    settings = {"engine": {"sharding": "fsdp"}, "train": {**runs.SETTINGS["train"], "every": 4}, "optimiser": "adamw"}
    together(run_with, pictures, tmp_path / "straight", settings)
    together(run_with, pictures, tmp_path / "run", settings, 8)
    together(run_with, pictures, tmp_path / "run", settings)
    assert kept(tmp_path / "run") == kept(tmp_path / "straight")


def test_a_process_that_dies_is_noticed_by_the_others():
    (said, seconds), _ = together(runs.deserted, 3, silent=(1,))
    assert said.startswith("another process of this run ended")
    assert seconds < 10


@pytest.mark.parametrize("place", [0, 1])
def test_nan_in_one_of_two_processes_stops_both_and_names_level_and_parameters(place):
    (said, seconds), (other, later) = together(runs.poisoned, 3, place)
    assert said == other
    assert "stopped at step 3" in said
    assert "Levels (lam) with a non-finite loss: " in said
    assert "none (the loss" not in said
    assert "Non-finite gradients: " in said
    assert "model.net.a" not in said  # the names are the network's own
    assert "net.a" in said
    assert max(seconds, later) < 5


@pytest.mark.parametrize(("most", "sizes"), [(16, {16}), (8, {16, 8}), (5, {16, 8, 4}), (1, {16, 8, 4, 2, 1})])
def test_where_memory_runs_out_smaller_calls_give_the_same_weights(most, sizes):
    plain, _ = runs.hungry(64)
    if most < 16:
        with pytest.warns(UserWarning, match="memory ran out: going on with"):
            found, calls = runs.hungry(most)
    else:
        found, calls = runs.hungry(most)
    assert set(calls) == sizes
    for name, value in plain.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


def test_micro_batches_give_the_gradient_of_the_whole():
    def gradient(micro):
        model, objective = runs.small(), Objective(VP())
        work = Gradient(model, objective, "float32", Engine(micro=micro), Processes(), 0)
        eps = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(2))
        loss = work(runs.POINTS[:8], eps, objective.draw(8), runs.LABELS[:8], torch.arange(8))
        return loss.loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    losses, whole = gradient(0)
    for micro in (1, 3, 8):
        again, parts = gradient(micro)
        assert torch.allclose(again, losses, rtol=1e-5)
        assert float((parts - whole).norm() / whole.norm()) < 1e-6


def test_two_processes_agree_on_the_smaller_memory_before_they_begin():
    plain, _ = runs.hungry(64)
    for found, calls in together(runs.hungry, 64, 3):
        assert calls[-1] == 2
        for name, value in plain.items():
            assert found[name] == pytest.approx(value, abs=1e-6), name


def test_memory_for_less_than_one_sample_is_a_clear_error():
    with pytest.warns(UserWarning, match="memory ran out"), pytest.raises(InputError, match="even with one sample"):
        runs.hungry(0)


def test_other_errors_of_the_network_are_not_taken_for_memory():
    class Broken(runs.Scaled):
        def forward(self, x, time, cond):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        next(train(Denoiser(Broken(), V()), torch.zeros(4, 3), Objective(VP()), Plan(steps=1, batch=2)))


def test_recomputed_activations_give_the_same_weights_bit_for_bit():
    plan = {"steps": 3, "batch": 8, "every": 0}
    (one, mine), (found, theirs) = runs.losses(plan, {}), runs.losses(plan, {"recompute": True})
    assert found == one
    assert all(np.array_equal(theirs[name], value) for name, value in mine.items())


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(InputError, match=r"batch=5 cannot be shared by 2"):
        next(train(
            Denoiser(runs.Scaled(), V()), torch.zeros(8, 3), Objective(VP()), Plan(batch=5), processes=Processes(0, 2)
        ))  # fmt: skip


# the command line


def command(data, out, *more):
    s = runs.SETTINGS
    return [
        "-m", "undiffuse", "train", f"data={data}", "data.size=8", "data.crop=random", "data.flip=true", f"out={out}",
        "net.width=16", "net.mults=[1]", "net.patch=2", "net.dropout=0.2", "held_out=6", "seed=3", "track=none",
        f"train.batch={s['train']['batch']}", "train.warmup=2", "eval.every=0", "engine.device=cpu", *more,
    ]  # fmt: skip


def start(words, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(path, process, seconds=90):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


def steps(out):
    return Checkpoints(out / "checkpoints").steps()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(pictures, tmp_path, number, code):
    out, long = tmp_path / "run", ["train.steps=100000", "train.every=99999"]
    process = start([sys.executable, *command(pictures, out, *long)])
    wait_for(out / "config.toml", process)
    asked = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - asked < 10
    assert process.returncode == code, err
    assert "the same command goes on" in err
    assert "Traceback" not in err
    (step,) = steps(out)
    verify(out / f"checkpoints/step-{step}")
    state = json.loads((out / f"checkpoints/step-{step}/state.json").read_text())
    assert state["step"] == step < 99999


def test_two_launched_processes_save_on_sigterm(pictures, tmp_path):
    out, long = tmp_path / "run", ["train.steps=100000", "train.every=99999"]
    process = start([*LAUNCH, *command(pictures, out, *long)])
    wait_for(out / "config.toml", process)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=40)
    assert time.monotonic() - asked < 10
    assert len(steps(out)) == 1


def test_a_killed_worker_is_started_again_and_the_run_finishes(pictures, tmp_path, pair):
    """torchrun --max-restarts=1: one of two processes is killed with SIGKILL in step 7."""
    out = tmp_path / "run"
    words = command(pictures, out, "train.steps=12", "train.every=3")
    words[words.index("eval.every=0")] = "eval.every=4"
    words += ["eval.n=4", "sample.steps=2"]
    killer = tmp_path / "killer.py"
    killer.write_text(
        "import os, runpy, signal, sys\n"
        "import undiffuse.train.loop as loop\n"
        "step, first = loop._step, os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "def killing(number, *rest):\n"
        "    if number == 7 and first and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(number, *rest)\n"
        "loop._step = killing\n"
        "sys.argv = ['undiffuse', *sys.argv[1:]]\n"
        "runpy.run_module('undiffuse', run_name='__main__')\n"
    )
    process = start([*LAUNCH, "--max-restarts", "1", str(killer), *words[2:]])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    assert "SIGKILL" in err or "-9" in err
    mine, theirs = kept(out), kept(pair[0])
    for part in (mine, theirs):  # the log has a row every 50 steps here, every 2 there
        part.pop("curves.png", None)
        for name in [n for n in part if n.endswith(("metrics.jsonl", "also.safetensors"))]:
            del part[name]
    assert mine == theirs
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval" in row] == [4, 8, 12]


def test_accelerate_launch_trains(pictures, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    process = start([*launch, *command(pictures, tmp_path / "run", "train.steps=3", "--json")])
    text, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    facts = json.loads(text.strip().splitlines()[-1])
    assert facts["steps_run"] == 3
    assert math.isfinite(facts["samples_per_second"])
    assert Model.load(tmp_path / "run").classes == 3
