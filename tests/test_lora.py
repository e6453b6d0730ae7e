"""LoRA by peft on a frozen network: the recipe of docs/networks.md."""

import copy

import pytest
import torch

from tests.test_conditions import build, given
from tests.test_nets import relative
from undiffuse import Denoiser, EDMPrecond, Flow
from undiffuse.train import EMA, Objective, Plan, train

peft = pytest.importorskip("peft", reason="LoRA needs peft: pip install 'undiffuse[lora]'")

TARGETS = {"unet": r".*\.(qkv|proj|q|kv|conv1|conv2)", "dit": r"blocks\..*\.(qkv|proj|q|kv|up|down)"}


def adapted(kind, rank=4):
    """A randomised network, its weights before, and itself with adapters."""
    net = build(kind)
    before = copy.deepcopy(net.state_dict())
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS[kind.split("-")[0]])
    return before, peft.inject_adapter_in_model(config, net)


def base(state):
    """The frozen weights among those of an adapted network, by their own names."""
    return {name.replace(".base_layer", ""): value for name, value in state.items() if "lora_" not in name}


@pytest.mark.parametrize("kind", ["unet", "unet-transformer", "dit", "dit-joint"])
def test_adapters_start_as_nothing_train_alone_and_merge(kind):
    before, net = adapted(kind)
    x, t, cond = given(8, 8)
    plain = build(kind)
    with torch.no_grad():
        assert torch.equal(net.eval()(x, t, cond), plain(x, t, cond))
    small = [p for p in net.parameters() if p.requires_grad]
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {
        name for name in net.state_dict() if "lora_" in name
    }
    assert 0 < sum(p.numel() for p in small) < 0.5 * sum(p.numel() for p in plain.parameters())
    model = Denoiser(net, EDMPrecond())
    ema = EMA(model)
    plan = Plan(steps=8, batch=4, lr=1e-2, every=0, warmup=1)
    losses = [state.loss for state in train(model, x, Objective(Flow()), plan, cond=cond, ema=ema)]
    assert len(losses) == 8
    after = base(net.eval().state_dict())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with torch.no_grad():
        out = net(x, t, cond)
        assert relative(out, plain(x, t, cond)) > 1e-2
        assert relative(out, ema.average.net(x, t, cond)) > 1e-6
        fresh = adapted(kind)[1].eval()
        peft.set_peft_model_state_dict(fresh, peft.get_peft_model_state_dict(net))
        assert torch.equal(fresh(x, t, cond), out)
        for module in net.modules():
            if hasattr(module, "merge"):
                module.merge()
        assert relative(net(x, t, cond), out) < 1e-5
    plain.load_state_dict(base(net.state_dict()))
    with torch.no_grad():
        assert torch.equal(plain(x, t, cond), net(x, t, cond))
