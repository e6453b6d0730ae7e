"""The built-in feature networks: pinned weights, the accuracy that the table states, and features fit for distances."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from undiffuse import InputError
from undiffuse.data import materialise, open_source, split
from undiffuse.data.builtin import _CLOTHES
from undiffuse.evals import classifier
from undiffuse.evals.classifier import CLASSIFIERS, FEATURES, WEIGHTS, load_classifier

NAMES = list(CLASSIFIERS)
ROUNDED = 1.5e-4  # one sample of 10,000, which another processor's rounding may turn


def recipes():
    path = Path(__file__).parents[2] / "recipes" / "features.py"
    spec = importlib.util.spec_from_file_location("features_recipe", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look it up
    sys.path.insert(0, str(path.parent))  # as of a script, which has its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


@pytest.fixture(scope="module")
def digits():
    train, held = split(open_source("digits"), 797)
    return materialise(train), held


def accuracy(net, x, labels):
    return float((torch.cat([net(part).argmax(1) for part in x.split(500)]) == labels).float().mean())


@pytest.mark.parametrize("name", NAMES)
def test_each_network_is_as_the_table_says(name):
    net, known = load_classifier(name), CLASSIFIERS[name]
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size <= 2_000_000
    assert len(set(net.names)) == len(net.names) == known.classes
    assert (net.shape, net.training, any(p.requires_grad for p in net.parameters())) == (known.shape, False, False)
    x = torch.rand(3, *known.shape) * 2 - 1
    assert (net(x).shape, net.features(x).shape) == ((3, known.classes), (3, FEATURES))
    assert torch.equal(load_classifier(name)(x), net(x))
    assert known.test == recipes().RECIPES[name].test


def test_the_classes_have_names():
    assert load_classifier("digits").names == load_classifier("mnist").names == tuple("0123456789")
    assert load_classifier("fashion-mnist").names == _CLOTHES
    assert {"grinning face", "red heart", "Germany"} <= set(load_classifier("emoji").names)


@pytest.mark.parametrize("at", [3, 200, 5000, -1])
def test_other_weights_are_refused(tmp_path, monkeypatch, at):
    monkeypatch.setattr(classifier, "WEIGHTS", tmp_path)
    content = bytearray((WEIGHTS / "digits.safetensors").read_bytes())
    path = tmp_path / "digits.safetensors"
    path.write_bytes(content)
    load_classifier("digits")
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{path} has SHA-256 \w+; expected {CLASSIFIERS['digits'].sha256}: install"):
        load_classifier("digits")
    path.unlink()
    with pytest.raises(InputError, match=rf"{path} is missing: install undiffuse again, or train it"):
        load_classifier("digits")


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match=f"no classifier is named 'faces'; there are {', '.join(NAMES)}"):
        load_classifier("faces")


@pytest.mark.parametrize("shape", [(2, 1, 9, 8), (2, 3, 8, 8), (1, 8, 8), (2, 64)])
def test_samples_of_another_shape_are_refused(shape):
    net, x = load_classifier("digits"), torch.zeros(shape)
    for call in (net, net.features):
        with pytest.raises(InputError, match=r"this classifier reads \(n, 1, 8, 8\): resize"):
            call(x)


def test_held_out_digits_are_read_as_well_as_stated(digits):
    assert accuracy(load_classifier("digits"), digits[1].x, digits[1].labels) >= CLASSIFIERS["digits"].accuracy


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_test_set_is_read_as_well_as_stated(name):
    try:
        source = open_source(name)
    except InputError as error:
        pytest.skip(str(error))
    if source.test is None:
        pytest.skip(f"this {name} has no test split")
    x, labels = torch.tensor(source.test.x) / 127.5 - 1, torch.tensor(source.test.labels)
    assert len(x) == 10_000
    assert accuracy(load_classifier(name), x, labels) >= CLASSIFIERS[name].accuracy - ROUNDED


def test_distorted_emoji_are_recognised_as_well_as_stated():
    try:
        data = recipes().task("emoji", None)
    except InputError as error:
        pytest.skip(str(error))
    net = load_classifier("emoji")
    place = {known: i for i, known in enumerate(net.names)}
    labels = torch.tensor([place.get(known, -1) for known in data.names])
    assert (labels >= 0).float().mean() > 0.9  # other versions of the packages draw others
    n = len(labels)
    x = data.test_x[:n][labels >= 0]
    assert accuracy(net, x, labels[labels >= 0]) >= CLASSIFIERS["emoji"].accuracy - 0.02


@pytest.mark.parametrize("name", NAMES)
def test_a_samples_features_do_not_depend_on_its_batch(name):
    net = load_classifier(name)
    x = torch.rand(64, *net.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = net.features(x)
    for part in (1, 7):
        apart = torch.cat([net.features(some) for some in x.split(part)])
        assert torch.allclose(together, apart, atol=1e-5, rtol=0)
    assert not torch.allclose(together, net.train().features(x), atol=1e-3)  # batch statistics would show


def test_features_tell_classes_apart(digits):
    net, (train, held) = load_classifier("digits"), digits
    known = net.features(train.x)
    means = torch.stack([known[train.labels == k].mean(0) for k in range(10)])
    nearest = torch.cdist(net.features(held.x), means).argmin(1)
    assert float((nearest == held.labels).float().mean()) >= 0.98
    assert 0.01 < float(known.std(0).min()) <= float(known.abs().max()) < 100  # none is dead or dominates


def test_distortions_of_the_recipe():
    Distort = recipes().Distort
    torch.manual_seed(0)
    x = torch.rand(16, 3, 12, 12) * 2 - 1
    assert torch.allclose(Distort()(x), x, atol=1e-5)
    flipped = Distort(flip=True)(x)
    kinds = [[torch.allclose(a, b, atol=1e-5) for b in (x[i], x[i].flip(-1))] for i, a in enumerate(flipped)]
    assert all(sum(kind) == 1 for kind in kinds)
    assert len({tuple(kind) for kind in kinds}) == 2
    moved, steps = Distort(shift=1)(x), [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    inner = slice(1, -1)
    for a, b in zip(moved, x, strict=True):  # whole pixels stay what they are
        assert any(torch.allclose(a[:, inner, inner], b.roll(s, (1, 2))[:, inner, inner], atol=1e-5) for s in steps)
    turned = Distort(turn=30)(torch.nn.functional.pad(torch.ones(200, 1, 6, 6), (9, 9, 9, 9), value=-1.0))
    assert math.isclose(float((turned + 1).sum((1, 2, 3)).mean()) / 2, 36, rel_tol=0.02)  # turns keep areas
    coloured = Distort(colour=0.1)(x)
    assert 0.02 < float((coloured - x).abs().mean()) < 0.5
    assert float(coloured.abs().max()) <= 1
