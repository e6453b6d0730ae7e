"""What must be the same on a GPU: run where there is one, skipped elsewhere."""

import contextlib
import subprocess
import sys

import pytest
import torch

from tests.cases import DETERMINISTIC, SOLVER_CASES, STOCHASTIC
from tests.runs import settings, write_pictures
from tests.test_conditions import KINDS as CONDITIONED
from tests.test_conditions import build, given
from undiffuse import (
    CFG,
    VP,
    Denoiser,
    DPMpp2M,
    EDMPrecond,
    Label,
    Noise,
    Spectrum,
    UniformLam,
    sample,
    spectral,
    trace,
)
from undiffuse.config import KINDS
from undiffuse.denoise import Gaussian
from undiffuse.fit import fit
from undiffuse.model import Model
from undiffuse.nets import DiT, UNet
from undiffuse.train import EMA, Objective, Plan, Processes, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
NETS = {
    "unet": lambda: UNet(1, width=16, mults=(1, 2), vector=3),
    "dit": lambda: DiT(1, width=32, depth=2, patch=2, vector=3),
}


def built(name):
    """A network whose answer is not zero, in eval mode, on the GPU."""
    torch.manual_seed(0)
    net = NETS[name]()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return Denoiser(net, EDMPrecond()).eval().requires_grad_(False).cuda()


@pytest.fixture
def waits():
    """Whatever makes the CPU wait for the GPU is an error."""

    def on():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    yield on
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", sorted(SOLVER_CASES))
def test_solvers_give_what_they_give_on_the_cpu(name):
    levels, seen = UniformLam()(VP(), 6)[:-1], []
    model = Gaussian(Spectrum(torch.tensor([0.2, -0.3, 0.0]), torch.tensor([1.0, 0.3, 0.05])))
    for device in ("cpu", "cuda"):
        noise = Noise((4, 3), seed=1, device=device)
        seen.append(trace(SOLVER_CASES[name], levels).run(model.to(device), noise() * 0.9, noise).cpu())
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*DETERMINISTIC[:2], *sorted(STOCHASTIC)[:2], "unipc", "dpmpp-2m"])
@pytest.mark.parametrize("net", NETS)
def test_no_step_waits_for_the_gpu(name, net, waits):
    plan, cond = trace(SOLVER_CASES[name], UniformLam()(VP(), 5)), Label(3)([0, 1, 2, 0]).to("cuda")
    denoise, x = CFG(2.0)(built(net), cond), torch.randn(4, 1, 8, 8, device="cuda")

    def noise():
        return torch.randn_like(x)

    plan.run(denoise, x, noise)
    waits()
    plan.run(denoise, x, noise)


@pytest.mark.parametrize("rank", [None, 3, 12])
def test_a_plan_in_a_basis_is_the_cpus_and_does_not_wait(rank, waits):
    g = torch.Generator().manual_seed(0)
    basis = None if rank is None else torch.linalg.qr(torch.randn(12, rank, generator=g).double())[0].T
    data = Spectrum(torch.randn(12, generator=g), torch.logspace(0, -3, rank or 12), basis, 1e-3, (3, 2, 2))
    plan, x = spectral(data, UniformLam()(VP(), 6), groups=3), torch.randn(4, 3, 2, 2, generator=g)
    due, on = plan.run(lambda x, level: torch.tanh(x), x), x.cuda()
    torch.testing.assert_close(plan.run(lambda x, level: torch.tanh(x), on).cpu(), due, rtol=1e-4, atol=1e-4)
    waits()
    plan.run(lambda x, level: torch.tanh(x), on)


@pytest.mark.parametrize("name", CONDITIONED)
def test_conditions_say_what_they_say_on_the_cpu_and_do_not_wait(name, waits):
    net, (x, t, cond) = build(name).requires_grad_(False), given(8, 8)
    due = net(x, t, cond)
    net, x, t, cond = net.cuda(), x.cuda(), t.cuda(), cond.to("cuda")
    torch.testing.assert_close(net(x, t, cond).cpu(), due, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(net.bfloat16()(x.bfloat16(), t, cond).float().cpu(), due, rtol=0.1, atol=0.1)
    waits()
    net(x.bfloat16(), t, cond)


def test_samples_do_not_depend_on_the_device():
    model, found = built("unet"), {}
    for device in ("cpu", "cuda"):
        found[device] = sample(
            model.to(device), (5, 1, 8, 8), VP(), steps=6, solver=DPMpp2M(), cond=Label(3)([0, 1, 2, 0, 1]),
            guidance=2.0, seed=3, batch=2, device=device,
        ).cpu()  # fmt: skip
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("net", NETS)
def test_compiles_without_graph_breaks(net):
    model = built(net)
    x, time, cond = torch.randn(4, 1, 8, 8, device="cuda"), torch.randn(4, device="cuda"), Label(3)([0, 1, 2, 0])
    cond = cond.to("cuda")
    compiled = torch.compile(model.net, fullgraph=True)
    torch.testing.assert_close(compiled(x, time, cond), model.net(x, time, cond), rtol=1e-3, atol=1e-3)


FAMILIES = ("draws", "coupling", "variance", "optimiser", "augment", "ema", "weight", "levels")


@pytest.mark.parametrize(("family", "kind"), [(family, kind) for family in FAMILIES for kind in KINDS[family]])
def test_trains_with_every_choice(family, kind, tmp_path):
    levels = {"kind": "uniform-time", "t_min": 1e-4}
    more = {"head": {"kind": "eps"}, "schedule": {"kind": "ddpm"}, "levels": levels} if family == "variance" else {}
    more |= {"data": {"flip": False}} if family == "augment" else {}
    config = settings(write_pictures(tmp_path), tmp_path / "run", **{family: {"kind": kind}}, **more)
    model = fit(config, processes=Processes.start("cuda")).model
    assert all(bool(p.isfinite().all()) for p in model.denoiser.parameters())


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    data, found = write_pictures(tmp_path), []

    def stop(state, steps):
        if state.step == 5:
            raise InterruptedError

    for name, ways in (("whole", (None,)), ("stopped", (stop, None))):
        for progress in ways:
            with contextlib.suppress(InterruptedError):
                fit(settings(data, tmp_path / name), progress, processes=Processes.start("cuda"))
        parts = Model.load(tmp_path / name).denoiser.parameters()
        found.append(torch.cat([p.flatten().cpu() for p in parts]))
    assert torch.equal(*found)


def test_the_loss_is_that_of_the_cpu():
    x, found = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = Denoiser(UNet(1, width=16), EDMPrecond()).to(device)
        states = train(model, x, Objective(VP()), Plan(steps=3, batch=8, lr=1e-3), seed=1, ema=EMA(model))
        found[device] = [state.loss for state in states]
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-3)


def test_the_commands(tmp_path):
    words = ["train.steps=30", "train.batch=32", "eval.every=15", "out=run", "train.precision=bf16"]
    for command in (
        ["train", "data=digits", "engine.device=cuda", *words],
        ["sample", "run", "-n", "8", "--out", "a.png"],
        ["sample", "digits", "-n", "8", "--out", "shards/", "--device", "cuda"],
        [
            "evaluate",
            "digits",
            "--device",
            "cuda",
            "-n",
            "100",
            "--over-steps",
            "5",
            "--over-w",
            "",
            "--likelihood",
            "2",
        ],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "undiffuse", *command], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
