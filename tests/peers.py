"""Other libraries' samplers, brought to float64 and to one call, so that they can be compared to rounding."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler_discrete": "EulerDiscreteScheduler",
    "heun_discrete": "HeunDiscreteScheduler",
    "dpmsolver_multistep": "DPMSolverMultistepScheduler",
    "flow_match_euler_discrete": "FlowMatchEulerDiscreteScheduler",
    "dpmsolver_singlestep": "DPMSolverSinglestepScheduler",
    "unipc_multistep": "UniPCMultistepScheduler",
    "deis_multistep": "DEISMultistepScheduler",
    "sasolver": "SASolverScheduler",
    "euler_ancestral_discrete": "EulerAncestralDiscreteScheduler",
    "k_dpm_2_discrete": "KDPM2DiscreteScheduler",
    "k_dpm_2_ancestral_discrete": "KDPM2AncestralDiscreteScheduler",
    "lms_discrete": "LMSDiscreteScheduler",
    "ipndm": "IPNDMScheduler",
    "pndm": "PNDMScheduler",
    "lcm": "LCMScheduler",
}
VE = (
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
)


class Promoted:
    """A module whose `float32` is float64."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self.float32 = module, module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def load_diffusers(monkeypatch: pytest.MonkeyPatch, promote: bool = True) -> dict[str, type]:
    """diffusers' scheduler classes by name; they draw noise by calling the `generator` that `step` is given.

    With `promote` they compute in float64 wherever they name float32. Skips the test where diffusers is missing.
    """
    pytest.importorskip("diffusers", reason="parity with diffusers needs diffusers: pip install 'undiffuse[dev]'")
    classes = {}
    for name, kind in SCHEDULERS.items():
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
        if promote:
            monkeypatch.setattr(module, "torch", Promoted(torch))
            monkeypatch.setattr(module, "np", Promoted(np))
        monkeypatch.setattr(module, "randn_tensor", lambda shape, generator, **_: generator(), raising=False)
        classes[kind] = getattr(module, kind)
    return classes


def run_scheduler(scheduler: Any, net: Any, x: Tensor, **step: Any) -> Tensor:
    """A diffusers scheduler's sample from x in VP or flow coordinates; `net(x, time)` gives its `prediction_type`.

    Euler and Heun work in VE coordinates: x / alpha at the start, and x again at the end, where alpha = 1.
    """
    if type(scheduler).__name__ in VE:
        x = x * (1 + scheduler.sigmas[0] ** 2).sqrt().to(x.dtype)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps:
        answer = net(scale(x, t), t.expand(len(x)))
        x = scheduler.step(answer, t, x, return_dict=False, **step)[0]
    return x


def load_k_diffusion() -> ModuleType:
    """k-diffusion's `sampling` alone: its package imports training code and libraries that sampling never calls.

    Third-party modules that are missing are stubbed during the load. Skips the test where k-diffusion is missing.
    """
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("parity with k-diffusion needs k-diffusion: pip install --no-deps k-diffusion")
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations or [])
    names = ("torchsde", "torchdiffeq", "torchvision", "torchvision.transforms")
    stubs = {name: ModuleType(name) for name in names if importlib.util.find_spec(name.split(".")[0]) is None}
    for name, attribute in (("torchdiffeq", "odeint"), ("torchvision.transforms", "functional")):
        if name in stubs:
            setattr(stubs[name], attribute, None)
    touched = (*stubs, "k_diffusion", "k_diffusion.sampling", "k_diffusion.utils")
    before = {name: sys.modules.pop(name) for name in touched if name in sys.modules}
    sys.modules.update(stubs, k_diffusion=package)
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in touched:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@contextlib.contextmanager
def load_torch_fidelity() -> Iterator[Callable[[str], Any]]:
    """What imports a module of torch-fidelity by name. It imports torchvision for pictures: where that is missing a
    stand-in serves, and at the end the modules, which have seen it, are forgotten."""
    stand_ins = ["torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"]
    missing = [] if importlib.util.find_spec("torchvision") else stand_ins
    modules = {name: ModuleType(name) for name in missing}
    for path, module in modules.items():
        module.__path__ = []
        module.__dict__.update(dict.fromkeys(("CIFAR10", "CIFAR100", "STL10"), type("Pictures", (), {})))
        parent, _, child = path.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)

    def load(name: str) -> Any:
        sys.modules.update(modules)
        try:
            return importlib.import_module(f"torch_fidelity.{name}")
        finally:
            for path in missing:
                del sys.modules[path]

    try:
        yield load
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
            del sys.modules[name]
