"""Encoders of conditions: reading, nulls, dropout, batching, and networks that are trained with them."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from tests.test_nets import inputs, randomised, relative
from undiffuse import CFG, Denoiser, EDMPrecond, Flow, InputError, Label, Level, Spectrum, sample
from undiffuse.cond import Audio, Bytes, Conditioned, Encoders, Layout, prompt
from undiffuse.config import Config
from undiffuse.model import Model, assemble
from undiffuse.nets import UNet
from undiffuse.seeds import uniform
from undiffuse.train import EMA, Checkpoints, Immiscible, Objective, Plan, train

TWO = {"label": Label(3), "tags": Label(5)}


def two(alone=0.1):
    """Two conditions of four samples."""
    encoders = Encoders(TWO, alone)
    return encoders, encoders(label=[2, 0, 1, 1], tags=[[0, 4], [1], [], [2, 3]])


# labels


def test_several_labels_are_several_ones():
    expected = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert Label(3)([[0, 2, 2], {1}, (), 0]).vector.tolist() == expected
    assert Label(3)(torch.tensor(expected).bool()).vector.tolist() == expected
    with pytest.raises(InputError, match="label 3 is out of range"):
        Label(3)([[0, 3]])


# reading


def test_vectors_of_all_encoders_stand_side_by_side_and_missing_ones_are_zero():
    encoders, given = two()
    assert encoders.widths == {"vector": 8, "tokens": 0, "spatial": 0}
    whole = encoders.encoded(given, ())
    tags = [[1, 0, 0, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 0]]
    assert torch.equal(whole.vector, torch.cat([torch.eye(3)[[2, 0, 1, 1]], torch.tensor(tags).float()], 1))
    part = encoders.encoded(encoders(tags=[[1], [2]]), ())
    assert torch.equal(part.vector, torch.eye(8)[[4, 5]])
    assert torch.equal(
        encoders.encoded(encoders(label=[1, None]), ()).vector, torch.eye(8)[[1, 1]] * torch.tensor([[1], [0]])
    )


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"text": ["a"]}, "no condition is called 'text': this model has label, tags"),
        ({"label": [3]}, "label: label 3 is out of range"),
        ({"label": 3}, "label takes a list of values, one a sample, got 3"),
        ({"label": "3"}, "takes a list of values"),
        ({"label": []}, "takes a list of values"),
        ({"label": [None, None]}, "label is None for every sample"),
        ({"label": [1, 2], "tags": [[1]]}, r"different numbers of samples: \{'label': 2, 'tags': 1\}"),
    ],
)
def test_wrong_conditions_are_refused(values, why):
    with pytest.raises(InputError, match=why):
        Encoders(TWO)(**values)


@pytest.mark.parametrize(
    ("encoders", "alone", "why"),
    [
        ({}, 0.1, "names"),
        ({"a b": Label(2)}, 0.1, "names"),
        ({"keys": Label(2)}, 0.1, "cannot be called 'keys'"),
        (TWO, {"x": 0.1}, "alone names 'x'"),
        (TWO, 1.5, "from 0 to 1"),
    ],
)
def test_impossible_encoders_are_refused(encoders, alone, why):
    with pytest.raises(InputError, match=why):
        Encoders(encoders, alone)


# a batch of conditions


def test_null_only_drop_and_against():
    encoders, given = two()

    def vector(given):
        return encoders.encoded(given, ()).vector

    whole = vector(given)
    assert not vector(given.null()).any()
    assert torch.equal(vector(given.only(["tags"])), whole * (torch.arange(8) >= 3))
    assert torch.equal(
        vector(given.drop(torch.tensor([True, False, True, False]))), whole * torch.tensor([[0], [1], [0], [1]])
    )
    other = given.against(encoders(label=[1]))
    assert torch.equal(vector(other), whole)
    assert torch.equal(vector(other.null()), torch.eye(8)[[1] * 4])
    assert torch.equal(vector(other.only(["tags"])), torch.eye(8)[[1] * 4] + vector(given.only(["tags"])))
    for wrong, why in ((lambda: given.only(["text"]), "no condition 'text' was given"), (
        lambda: encoders(tags=[[1]]).against(encoders(label=[1])), "label cannot be guided against"), (
        lambda: given.against(encoders(label=[1, 2])), "2 rows of label to guide 4")):  # fmt: skip
        with pytest.raises(InputError, match=why):
            wrong()


def test_batches_are_cut_and_put_together():
    encoders, given = two()
    given = replace(given.against(encoders(label=[1])), augment=torch.rand(4, 2))
    again = type(given).cat([given[:1], given[1:]])
    rows = torch.tensor([3, 0])
    for mine, theirs in ((again, given), (given[rows], given), (given.to("cpu"), given)):
        pick = rows if mine is not again and len(mine) == 2 else slice(None)
        for a, b in ((mine, theirs), (mine.null(), theirs.null())):
            a, b = encoders.encoded(a, ()), encoders.encoded(b, ())
            assert torch.equal(a.vector, b.vector[pick])
            assert torch.equal(a.augment, b.augment[pick])
    with pytest.raises(InputError, match="different conditions"):
        type(given).cat([given, encoders(tags=[[1]])])
    assert len(given) == 4


def test_dropout_is_a_function_of_seed_and_index_per_sample_and_per_condition():
    n, p = 20_000, {"label": 0.3, "tags": 0.1}
    encoders = Encoders(TWO, p)
    given, index = encoders(label=torch.ones(n).long(), tags=torch.ones(n).long()), torch.arange(n)
    seen = given.dropped(5, index, 0.2)
    there = torch.stack([seen.reads[name].there for name in TWO]).double()
    a, b = 0.8 * 0.7, 0.8 * 0.9
    for found, expected in ((there[0], a), (there[1], b), (there.prod(0), 0.8 * 0.7 * 0.9)):
        assert abs(float(found.mean()) - expected) < 5 * (expected * (1 - expected) / n) ** 0.5
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:100]
    some = given[order].dropped(5, index[order], 0.2)
    assert all(torch.equal(some.reads[k].there, seen.reads[k].there[order]) for k in TWO)
    assert not torch.equal(given.dropped(6, index, 0.2).reads["label"].there, seen.reads["label"].there)


def test_of_one_condition_dropout_is_that_of_a_cond():
    encoders, index = Encoders({"label": Label(3)}, alone=0.9), torch.arange(500)
    given = encoders(label=index % 3)
    plain = Label(3)(index % 3).dropped(7, index, 0.2)
    assert torch.equal(encoders.encoded(given.dropped(7, index, 0.2), ()).vector, plain.vector)
    assert torch.equal(plain.vector.any(1), uniform(7, index) >= 0.2)


def test_equal_conditions_are_equal_rows():
    _, given = two()
    flat = given[torch.tensor([2, 3, 3])].flat()
    assert torch.equal(flat[1], flat[2])
    assert not torch.equal(flat[0], flat[1])
    assert not torch.equal(given.drop(torch.tensor([True] * 4)).flat(), given.flat())


# networks


def test_a_network_with_encoders_is_the_network_with_what_they_give():
    encoders, given = two()
    net = randomised(Conditioned(UNet(1, width=16, augment=2, **encoders.widths), encoders))
    x, t = inputs(4, 1, 6, 7)
    given = replace(given, augment=torch.rand(4, 2))
    told = encoders.encoded(given, x.shape[2:])
    assert torch.equal(net(x, t, given), net.net(x, t, told))
    assert torch.equal(net(x, t, told), net.net(x, t, told))
    assert torch.allclose(net(x, t), net.net(x, t, None))
    model, level = Denoiser(net, EDMPrecond()), Level(0.6, 0.8)
    assert torch.allclose(CFG(3.0)(model, given)(x, level), CFG(3.0)(model, told)(x, level), atol=1e-5)


def test_a_negative_condition_stands_in_the_place_of_the_null_one():
    encoders, given = two()
    model = Denoiser(randomised(Conditioned(UNet(1, width=16, **encoders.widths), encoders)), EDMPrecond())
    (x, _), level = inputs(4, 1, 6, 7), Level(0.6, 0.8)
    negative = encoders(label=[0] * 4, tags=[[1]] * 4)
    off = model(x, level, negative)
    expected = off + 3 * (model(x, level, given) - off)
    guided = CFG(3.0)(model, given.against(negative))(x, level)
    assert torch.allclose(guided, expected, atol=1e-4)
    assert relative(guided, CFG(3.0)(model, given)(x, level)) > 1e-2


def test_encoders_are_rebuilt_from_their_settings():
    encoders, given = two({"tags": 0.4})
    again = Encoders.of(json.loads(json.dumps(encoders.settings())))
    assert again.encoders == encoders.encoders
    assert again.alone == {"tags": 0.4}
    assert torch.equal(again.encoded(given, ()).vector, encoders.encoded(given, ()).vector)
    with pytest.raises(InputError, match="no encoder of the kind 'smell'"):
        Encoders.of({"encoders": {"a": {"kind": "smell"}}, "alone": {}})

    class Own(Label):
        pass

    with pytest.raises(InputError, match="label is encoded by Own: put it into ENCODERS"):
        Encoders({"label": Own(2)}).settings()


# training


def trained(encoders, x, values, steps=60, lr=3e-3, **net):
    """Losses, the network before and after a few steps, and what it was given."""
    torch.manual_seed(0)
    model = Denoiser(
        Conditioned(UNet(x.shape[1], x.ndim - 2, 16, **{**encoders.widths, **net}), encoders), EDMPrecond()
    )
    given, ema = encoders(**values), EMA(model)
    plan = Plan(steps=steps, batch=16, lr=lr, every=0, warmup=1)
    losses = [state.loss for state in train(model, x, Objective(Flow()), plan, cond=given, ema=ema)]
    return losses, ema.average, given


def assert_learned(encoders, x, values, steps=60, **net):
    """The loss falls, every condition changes the output, and every parameter of the encoders has moved."""
    before = {name: p.clone() for name, p in encoders.named_parameters()}
    losses, model, given = trained(encoders, x, values, steps, **net)
    third = len(losses) // 3
    assert sum(losses[-third:]) < 0.8 * sum(losses[:third])
    assert [n for n, p in encoders.named_parameters() if torch.equal(p, before[n])] == []
    noise, level = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)), Level(0.3, 0.95)
    whole = model(noise, level, given)
    for name in given.reads:
        assert relative(model(noise, level, given.only(set(given.reads) - {name})), whole) > 1e-3, name
    return model, given


def test_labels_are_learned():
    labels = torch.arange(16) % 3
    x = labels.float()[:, None, None, None].sub(1).expand(16, 1, 6, 6) + 0.1 * torch.randn(16, 1, 6, 6)
    assert_learned(Encoders(TWO), x, {"label": labels, "tags": [[int(k), 4] for k in labels]})


# prompts


def test_prompts_have_weights_and_what_must_not_be():
    found = prompt(r"a ((red:1.5) car:2), \(one: 3\) --no (wheels:0.5), smoke")
    assert found.text == "a red car, (one: 3)"
    expected = {"a": 1, "r": 3, "c": 2, "o": 1}
    assert [found.weights[found.text.index(k)] for k in ("a ", "red", "car", "one")] == list(expected.values())
    assert found.negative.text == "wheels, smoke"
    assert found.negative.weights == (0.5,) * 6 + (1.0,) * 7
    assert prompt("a car").negative is None
    assert prompt("--no cars").text == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a (red car", r"a \( without its \)"),
        ("a red:1.3) car", r"a \) without its \("),
        ("a (red) car", r"\(red\) has no weight: write \(red:1.3\)"),
        ("a (red:x) car", r"the weight 'x' of \(red:x\) is no number"),
        ("a (red:-1) car", "finite number >= 0"),
        ("a (red:nan) car", "finite number >= 0"),
        ("a car --no", "--no is followed once"),
        ("a --no b --no c", "--no is followed once"),
    ],
)
def test_mistakes_in_prompts_are_said(text, why):
    with pytest.raises(InputError, match=why):
        prompt(text)


# several at once


def scenes(n=24, side=8, seed=0):
    """Pictures of a brightness that a word tells, with a square that a map tells, and a pitch that tells its colour."""
    g = torch.Generator().manual_seed(seed)
    back, front = torch.arange(n) % 2, torch.arange(n) // 2 % 2
    x, mask = (back - 0.5)[:, None, None, None].repeat(1, 1, side, side), torch.zeros(n, side, side).long()
    for k in range(n):
        i, j = torch.randint(0, side - 3, (2,), generator=g).tolist()
        mask[k, i : i + 4, j : j + 4] = 1
    x = torch.where(mask[:, None] == 1, (2.0 * front - 1)[:, None, None, None], x)
    t = torch.arange(1200) / 8000
    sound = [torch.sin(2 * torch.pi * (1500 if k else 300) * t) for k in front.tolist()]
    return x, {"text": ["a light one" if k else "a dark one" for k in back.tolist()], "mask": mask, "sound": sound}


def several():
    """Encoders of the conditions of `scenes`."""
    sound = Audio(rate=8000, mels=16, width=24, depth=1)
    return Encoders({"text": Bytes(width=16, depth=1), "mask": Layout(2), "sound": sound})


def test_tokens_of_several_kinds_are_brought_to_one_width_and_told_apart():
    encoders = randomised(several())
    assert encoders.widths == {"vector": 40, "tokens": 24, "spatial": 2}
    x, values = scenes(4)
    given = encoders(**values)
    told = encoders.encoded(given, x.shape[2:])
    for name, part in (("text", slice(0, 3)), ("sound", slice(3, 5))):
        alone = encoders.modules_by_name[name](given.reads[name].tensors, ())
        layer, mask = encoders.kinds[name], alone.tokens_mask
        assert torch.equal(told.tokens_mask[:, part], mask)
        expected = (alone.tokens @ layer.weight.T + layer.bias)[mask]
        assert torch.allclose(told.tokens[:, part][mask], expected, atol=1e-5)
    assert torch.equal(told.spatial, encoders.modules_by_name["mask"](given.reads["mask"].tensors, x.shape[2:]).spatial)
    words = encoders.encoded(given.only(["text"]), x.shape[2:])
    assert not words.tokens_mask[:, 5:].any()
    assert not words.tokens[:, 5:].any()
    assert not words.spatial.any()


def test_conditions_encoded_ahead_are_the_same_in_every_use():
    encoders, (x, values) = randomised(several()), scenes(4)
    given = encoders(**values).against(encoders(text=["not this"]))
    ahead = encoders.ahead(given, x.shape[2:])

    def parts(given):
        told = encoders.encoded(given, x.shape[2:])
        return told.vector, told.tokens[told.tokens_mask], told.tokens_mask.sum(1), told.spatial

    def both(given):
        return type(given).cat([given, given.null()])

    for use in (lambda g: g, lambda g: g.null(), lambda g: g.only(["mask"]), lambda g: g[1:3], both):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(parts(use(ahead)), parts(use(given)), strict=True))
    with torch.no_grad():
        for p in encoders.parameters():
            p.zero_()
    assert not torch.allclose(parts(ahead)[0], parts(given)[0], atol=1e-2)


def test_several_conditions_are_learned_and_guided_each_by_itself():
    x, values = scenes()
    model, given = assert_learned(several(), x, values, steps=90, cross=(0,))
    start = sample(model, x.shape, Flow(), steps=4, cond=given)
    for name in given.reads:
        guided = sample(model, x.shape, Flow(), steps=4, cond=given, guidance={name: 3.0})
        assert relative(guided, start) > 1e-2
    off = sample(model, x.shape, Flow(), steps=4, cond=given, guidance=dict.fromkeys(given.reads, 1.0))
    assert torch.equal(off, start)


def test_training_with_encoders_goes_on_bit_for_bit(tmp_path):
    x, values = scenes()

    def run(steps, folder):
        torch.manual_seed(0)
        encoders = several()
        model = Denoiser(Conditioned(UNet(1, width=16, cross=(0,), **encoders.widths), encoders), EDMPrecond())
        plan, kept = Plan(steps=6, batch=8, every=3, warmup=1), Checkpoints(tmp_path / folder)
        for state in train(model, x, Objective(Flow()), plan, cond=encoders(**values), checkpoints=kept):
            if state.step == steps:
                break
        return model.state_dict()

    whole = run(6, "a")
    run(4, "b")
    again = run(6, "b")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_noise_is_coupled_within_equal_conditions():
    encoders, n = Encoders({"text": Bytes(width=16, depth=1)}), 12
    given = encoders(text=["a" if k % 3 else "b" for k in range(n)])
    x, eps = inputs(n, 1, 4, 4)[0], inputs(n, 1, 4, 4, seed=5)[0]
    moved = Immiscible()(x, eps, given)
    for rows in (torch.arange(n) % 3 == 0, torch.arange(n) % 3 != 0):
        assert torch.equal(moved[rows].flatten().sort().values, eps[rows].flatten().sort().values)


# models


def test_a_saved_model_has_its_encoders_and_takes_conditions_by_name(tmp_path):
    x, values = scenes()
    encoders = Encoders({"label": Label(2), **several().encoders})
    config = Config.resolve({"net": {"width": 16, "cross": [0], "patch": 1}, "sample": {"steps": 3, "rows": 0}})
    model = replace(assemble(config, Spectrum.measure(x), 2, encoders), names=("dim", "bright"))
    randomised(model.denoiser)
    model.save(tmp_path / "model")
    again = Model.load(tmp_path)
    assert again.encoders.settings() == encoders.settings()
    asked = {
        "text": "a (dark:1.3) one --no light",
        "label": "bright",
        "mask": values["mask"][0],
        "sound": values["sound"][:3],
    }
    a, b = (m.sample(3, given=asked, guidance={"mask": 1.5, "text": 3.0}) for m in (model, again))
    assert torch.equal(a, b)
    assert a.shape == (3, 1, 8, 8)
    for name, other in (("text", "a dark one"), ("label", 0), ("sound", None), ("mask", values["mask"][1])):
        assert (
            relative(
                model.sample(3, given={**asked, name: other}, guidance=2.0), model.sample(3, given=asked, guidance=2.0)
            )
            > 1e-4
        )
    assert torch.equal(model.sample(3, "bright"), model.sample(3, given={"label": 1}))
    for wrong, why in (
        ({"smell": 1}, "no condition is called 'smell'"),
        ({"sound": values["sound"]}, "24 values of sound for 3"),
    ):
        with pytest.raises(InputError, match=why):
            model.sample(3, given=wrong)
    with pytest.raises(InputError, match="among the other conditions"):
        model.sample(3, 1, given={"text": "a"})
    plain = assemble(config, Spectrum.measure(x), 2)
    with pytest.raises(InputError, match="no conditions by name"):
        plain.sample(3, given={"text": "a"})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_encoders_compute_in_the_dtype_of_the_network(dtype):
    encoders, (x, values) = several(), scenes(4)
    net = randomised(Conditioned(UNet(1, width=16, cross=(0,), **encoders.widths), encoders))
    given, t = encoders(**values), torch.linspace(-1, 1, 4)
    out = copy.deepcopy(net).to(dtype)(x.to(dtype), t, given)
    assert out.dtype == dtype
    assert relative(out.float(), net(x, t, given)) < 0.2


def test_a_network_with_encoders_compiles_without_a_graph_break():
    encoders, (x, values) = several(), scenes(4)
    net = randomised(Conditioned(UNet(1, width=16, cross=(0,), **encoders.widths), encoders))
    given, t = encoders(**values), torch.linspace(-1, 1, 4)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for part in (given, given.only(["text"]), None):
        assert torch.allclose(compiled(x, t, part), net(x, t, part), atol=1e-5)
