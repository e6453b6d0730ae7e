"""What networks cost: counted without computing, beside closed forms, real runs and published figures."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from undiffuse.cli import app
from undiffuse.config import Config, parse_overrides
from undiffuse.nets import DiT, UNet
from undiffuse.nets.presets import PRESETS, cost

SMALL = [name for name, preset in PRESETS.items() if name in ("default", "unet-s", "dit-xs")]


@pytest.mark.parametrize(
    ("name", "giga", "millions"),
    [("dit-s", 6.06, 33), ("dit-b", 23.01, 130), ("dit-l", 80.71, 458), ("dit-xl", 118.64, 675)],
)
def test_transformers_are_of_the_published_sizes(name, giga, millions):
    """Peebles and Xie 2023, table 4: multiplications and parameters of DiT-S/2 to XL/2 on latents of 32x32x4."""
    found = cost(PRESETS[name].build, PRESETS[name].shape)
    assert found.flops / 2e9 == pytest.approx(giga, rel=0.01)
    assert found.parameters / 1e6 == pytest.approx(millions, rel=0.02)


def test_operations_of_a_transformer_are_their_closed_form():
    """For n tokens of width d: 24 n d^2 in linear layers, 4 n^2 d in attention, 12 d^2 in the modulation."""
    n, d, depth = 16, 64, 3
    found = cost(lambda: DiT(3, width=d, depth=depth, patch=2), (3, 8, 8))
    blocks = depth * (24 * n * d**2 + 4 * n**2 * d + 12 * d**2)
    ends = 2 * n * d * 12 * 2 + 4 * d**2
    assert found.flops == blocks + ends + 4 * d**2  # the last: two layers of the time's embedding


def test_operations_of_a_unet_are_their_closed_form():
    """One level of one block: convolutions 18 c c' and 2 c c' a pixel; the embedding; attention in the middle."""
    c, pixels = 16, 64
    found = cost(lambda: UNet(1, width=c, mults=(1,)), (1, 8, 8))
    convolutions = 18 * (1 * c + 2 * c * c + 4 * c * c + 2 * (2 * c * c + c * c) + c) + 2 * 2 * 2 * c * c
    attention = 2 * 4 * c * c * pixels + 4 * pixels**2 * c
    embedding = 2 * (c * 4 * c + 16 * c * c) + 5 * 2 * (4 * c * 2 * c)
    assert found.flops == convolutions * pixels + attention + embedding


@pytest.mark.parametrize("name", SMALL)
def test_parameters_and_activations_are_those_of_a_real_run(name):
    preset, kept = PRESETS[name], {}
    net = preset.build()

    def keep(value):
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = storage
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        out = net(torch.zeros(1, *preset.shape), torch.zeros(1))
    for p in net.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    found = cost(preset.build, preset.shape)
    assert found.parameters == sum(p.numel() for p in net.parameters())
    assert found.activations == sum(storage.nbytes() for storage in kept.values())
    assert out.shape == (1, *preset.shape)


@pytest.mark.parametrize("name", PRESETS)
def test_the_words_of_a_preset_are_its_settings(name):
    preset = PRESETS[name]
    config = Config.resolve(parse_overrides(preset.words.split()))
    for key, value in preset.settings.items():
        assert config.values["net"][key] == (list(value) if isinstance(value, tuple) else value)
    with torch.device("meta"):
        mine = preset.build(vector=10)
        theirs = config.build("net", channels=preset.shape[0], dims=len(preset.shape) - 1, vector=10)
    assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_the_default_preset_is_the_default_network():
    settings = Config.resolve().values["net"]
    assert Config.resolve(parse_overrides(PRESETS["default"].words.split())).values["net"] == settings


def test_info_net_prints_the_table(monkeypatch):
    monkeypatch.setattr("undiffuse.nets.presets.PRESETS", {name: PRESETS[name] for name in SMALL})
    runner = CliRunner()
    found = json.loads(runner.invoke(app, ["info", "net", "--json"]).stdout)
    assert [row["name"] for row in found] == SMALL
    assert all(math.prod(row["shape"]) > 0 and row["activations"] > 0 for row in found)
    shown = runner.invoke(app, ["info", "net"]).stdout
    assert all(f"{row['parameters'] / 1e6:.3g}" in shown and row["words"] in shown for row in found)
