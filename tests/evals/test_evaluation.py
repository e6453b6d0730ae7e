"""Evaluations of models that are known exactly, and of one that another library trained."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import group
from undiffuse import (
    DDIM,
    VP,
    Dataset,
    Denoiser,
    Discrete,
    Eps,
    Gaussian,
    Index,
    InputError,
    Spectrum,
    UniformLam,
    V,
    trace,
)
from undiffuse.config import Config
from undiffuse.data import Data, load_data
from undiffuse.evals import METRICS
from undiffuse.evaluation import Choices, compare, evaluate, evaluate_samples, read, write
from undiffuse.evaluation.density import likelihoods, quantisation, spacing
from undiffuse.model import Model
from undiffuse.train import MANIFEST, NonFinite, Processes

SPECTRUM = Spectrum(torch.zeros(4), torch.tensor([1.0, 0.5, 0.3, 0.1]) ** 2, shape=(1, 2, 2))
FEW = Choices(features="pixels", over_steps=(), likelihood=0)


def drawn(n, seed, labels=None):
    """Samples of the Gaussian."""
    z = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return Data((z * SPECTRUM.variances.sqrt().float()).reshape(n, 1, 2, 2), labels, "gaussian")


def model_of(denoiser, **settings):
    return Model(denoiser, VP(), 0, SPECTRUM, Config.resolve({"sample": {"steps": 20}, "solver": "dpmpp-2m"}, settings))


EXACT, TRAIN, HELD = model_of(Gaussian(SPECTRUM)), drawn(600, 1), drawn(500, 2)


@pytest.fixture(scope="module")
def exact():
    return evaluate(EXACT, TRAIN, HELD, Choices(features="pixels,pca=2", over_steps=(1, 20), likelihood=200))


def test_an_exact_model_scores_like_real_samples(exact):
    scores = exact.scores["pixels"]
    assert set(scores) == set(METRICS)
    for name in ("frechet-unbiased", "kernel", "sliced-unbiased"):
        assert scores[name].found.low < 0.003, name
        assert scores[name].found.high > 0, name
    for name in ("precision", "recall", "coverage"):
        assert abs(scores[name].found.value - scores[name].floor.value) < 0.05, name
    assert scores["frechet"].floor.value > 0
    assert exact.memory["copy-ratio"].found.low < 1.05
    assert exact.memory["copy-ratio"].found.high > 0.95


def test_one_step_of_a_sampler_is_seen_by_every_distance(exact):
    """In one step all samples are nearly the mean."""
    one, twenty = exact.curves["steps"]
    assert (one["steps"], twenty["steps"]) == (1, 20)
    for name in ("frechet-unbiased", "kernel"):
        assert one[name]["low"] > twenty[name]["high"]
    assert one["recall"]["value"] < 0.2 < twenty["recall"]["value"]


def test_the_last_point_of_the_curve_is_the_score(exact):
    for name in ("frechet-unbiased", "kernel", "precision", "recall"):
        assert exact.curves["steps"][1][name]["value"] == exact.scores["pixels"][name].found.value


def test_likelihood_of_the_exact_model(exact):
    std = SPECTRUM.variances.sqrt()
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))  # in which samples are taken
    held = HELD.x[order[:200]].flatten(1).double()
    bits = -torch.distributions.Normal(0, std).log_prob(held).sum(1) / 4 / torch.log(torch.tensor(2.0))
    found = exact.likelihood
    assert found["unit"] == "bits/dim of the density"
    at_lam_5 = 2e-3  # where the data end, rather than at infinity
    assert found["flow"]["value"] == pytest.approx(float(bits.mean()), abs=at_lam_5)
    assert found["flow"]["settings"]["probes"] == 0
    noise = 0.02  # of the bound's draws
    assert found["flow"]["value"] - noise < found["bound"]["value"] < found["flow"]["value"] + 0.05
    half = 1.96 * float(bits.std()) / 200**0.5
    assert found["flow"]["high"] - found["flow"]["low"] == pytest.approx(2 * half, rel=0.01)


def test_a_model_that_copies_is_found_out():
    found = evaluate(model_of(Dataset(TRAIN.x)), TRAIN, HELD, replace(FEW, likelihood=100))
    assert found.memory["copy-ratio"].found.high < 0.2
    assert found.memory["authentic"].found.value < 0.05
    assert found.memory["ct"].found.value < -5
    assert float(found.copies.ratio.max()) < 0.05
    assert torch.allclose(found.x[found.copies.sample], found.train[found.copies.train], atol=1e-2)
    bits = found.likelihood
    assert bits["bound on training samples"]["high"] < bits["bound"]["low"] - 1


def test_plain_data_and_provenance(exact):
    text = json.dumps(exact.json(), allow_nan=False)
    data = json.loads(text)
    measure, sampler = data["measure"], data["sampler"]
    assert measure["samples"] == 500
    assert set(measure["features"]) == {"pixels", "pca=2"}
    assert all(len(f["sha256"]) == 64 for f in measure["features"].values())
    assert len(measure["held out"]["sha256"]) == len(sampler["model"]) == 64
    assert (sampler["steps"], sampler["nfe"], sampler["rows"], sampler["seed"]) == (20, 20, 20, 0)
    assert sampler["solver"] == {"kind": "dpmpp-2m", "eta": 0.0}
    assert sampler["grid"]["kind"] == "uniform-lam"
    assert sampler["guidance"] == "none"
    for scores in data["scores"].values():
        for score in scores.values():
            assert {"value", "low", "high", "floor", "settings"} <= set(score)


def test_the_model_hash_sees_its_weights():
    def hashed(spectrum):
        return evaluate(model_of(Gaussian(spectrum)), TRAIN, HELD, replace(FEW, n=20)).sampler["model"]

    other = Spectrum(SPECTRUM.mean, SPECTRUM.variances * 1.0001, shape=(1, 2, 2))
    assert hashed(SPECTRUM) == hashed(SPECTRUM) != hashed(other)


def test_the_batch_changes_nothing(exact):
    again = evaluate(
        model_of(Gaussian(SPECTRUM), sample={"steps": 20, "batch": 7}), TRAIN, HELD,
        Choices(features="pixels,pca=2", over_steps=(1, 20), likelihood=200),
    )  # fmt: skip
    assert again.json() == exact.json()


def digits_in_parts(root):
    """The evaluation of a network, as JSON, in the processes of a group."""
    from undiffuse.evaluation.open import data_of_run

    torch.set_num_threads(1)
    run, processes = Path(root), Processes.start("cpu")
    model = Model.load(run)
    train, held_out = data_of_run(model.config, run, 0)
    choices = Choices(features="digits,pca=4", over_steps=(2,), over_w=(1.0,), likelihood=6, n=40)
    return json.dumps(evaluate(model, train, held_out, choices, processes=processes).json())


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run of a few steps on the digits."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "digits"
    config = Config.resolve({
        "net": {"kind": "unet", "width": 16, "mults": [1], "patch": 2}, "train": {"steps": 30, "batch": 32},
        "eval": {"every": 0}, "track": "none", "out": str(out), "sample": {"steps": 3},
    })  # fmt: skip
    from undiffuse.fit import fit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("undiffuse.plot.plot_curves", lambda *_: None)
        fit(config)
    return out


def test_the_number_of_processes_changes_nothing(digits):
    alone = digits_in_parts(digits)
    for world in (2, 3):
        found = group.together(digits_in_parts, str(digits), world=world, timeout=240)
        assert found == [alone] * world
    assert json.loads(alone)["scores"]["adherence"]["class"]["value"] is not None


def test_copies_among_fresh_samples_are_found():
    """A tenth of them, which averages over all samples do not show."""
    mixed = drawn(500, 3).x.clone()
    mixed[::10] = TRAIN.x[:50]
    found = evaluate_samples(Data(mixed, None, "mixed"), TRAIN, HELD, FEW)
    near = found.memory["near-copies"]
    assert near.found.value >= 0.1
    assert near.found.low > near.floor.high
    (warning,) = found.warnings
    assert "they are copies" in warning
    assert [row["ratio"] for row in found.json()["copies"]] == [0.0] * 10
    assert evaluate_samples(drawn(500, 3), TRAIN, HELD, FEW).warnings == ()
    few = drawn(500, 3).x.clone()
    few[::50] = TRAIN.x[:10]  # 2 %, where chance has 2 % of its own
    assert evaluate_samples(Data(few, None, "few"), TRAIN, HELD, FEW).memory["near-copies"].found.value > 0.02


def test_data_sorted_by_class_are_mixed():
    """Else the first n would be of one class, and all scores with them."""
    labels = torch.arange(600) // 300
    shift = 3.0 * labels.reshape(-1, 1, 1, 1)
    train, held = Data(TRAIN.x + shift, labels, "sorted"), Data(drawn(600, 2).x + shift, labels, "sorted")
    found = evaluate_samples(Data(drawn(600, 3).x + shift, labels, "samples"), train, held, replace(FEW, n=100))
    assert 30 < min(found.classes["real"]) <= max(found.classes["real"]) < 70
    assert 30 < min(found.classes["samples"]) <= max(found.classes["samples"]) < 70
    assert found.adherence["class"].found.value > 0.95
    distance = found.scores["pixels"]["frechet-unbiased"]
    assert distance.found.low < 0 < distance.found.high


def test_components_do_not_know_the_samples_of_the_floor():
    """Of wide noise they would otherwise be far from anything fresh, and the floor with them."""

    def noise(n, seed):
        return Data(torch.randn(n, 1, 20, 20, generator=torch.Generator().manual_seed(seed)), None, "noise")

    found = evaluate_samples(noise(80, 3), noise(400, 1), noise(80, 2), replace(FEW, features="pca"))
    scores = found.scores["pca"]
    assert not any("too few training samples" in warning for warning in found.warnings)
    assert scores["frechet"].floor.value == pytest.approx(scores["frechet"].found.value, rel=0.25)
    assert abs(scores["precision"].floor.value - scores["precision"].found.value) < 0.2
    few = evaluate_samples(noise(80, 3), noise(90, 1), noise(80, 2), replace(FEW, features="pca"))
    assert "too few training samples to fit pca" in few.warnings[0]


def test_repeated_samples_are_named():
    again = drawn(500, 3).x.clone()
    again[100:200] = again[:1]
    assert "100 of 500 samples repeat another" in evaluate_samples(Data(again), TRAIN, HELD, FEW).warnings[0]


def test_what_is_odd_is_said():
    wide = evaluate_samples(Data(100 * drawn(500, 3).x, None, "wide"), TRAIN, HELD, FEW)
    assert "have they one unit?" in wide.warnings[0]
    narrow = evaluate_samples(Data(drawn(500, 3).x / 3, None, "narrow"), TRAIN, HELD, FEW)
    assert "have they one unit?" in narrow.warnings[0]
    itself = evaluate_samples(HELD, TRAIN, HELD, FEW)
    assert "500 of the samples are held-out samples" in itself.warnings[0]
    assert itself.memory["copy-ratio"].why
    train = Data(torch.cat([TRAIN.x, HELD.x[:7]]), None, "more")
    assert "7 of the 500 held-out samples are training samples" in evaluate_samples(HELD, train, HELD, FEW).warnings[0]
    with pytest.raises(InputError, match="training data itself"):
        evaluate_samples(drawn(500, 3), TRAIN, TRAIN, FEW)


def test_a_judge_at_chance_is_no_measure():
    """Labels that say nothing of the samples."""
    coin = torch.randint(0, 2, (1100,), generator=torch.Generator().manual_seed(0))
    train, held = Data(TRAIN.x, coin[:600], "coin"), Data(HELD.x, coin[600:], "coin")
    found = evaluate_samples(Data(drawn(500, 3).x, coin[:500], "samples"), train, held, FEW)
    assert any("reads only" in warning for warning in found.warnings)
    assert sum(found.classes["real"]) == 500
    with pytest.raises(InputError, match="label 4"):
        evaluate_samples(Data(drawn(500, 3).x, torch.arange(500) % 5, "five"), train, held, FEW)


@pytest.mark.parametrize("choices", [{"over_steps": (2,)}, {"over_w": (1.0,)}, {"likelihood": 5}])
def test_samples_have_no_curves_and_no_likelihood(choices):
    with pytest.raises(InputError, match="need a model"):
        evaluate_samples(drawn(500, 3), TRAIN, HELD, replace(FEW, **choices))


def test_curves_that_a_sampler_does_not_have():
    with pytest.raises(InputError, match="not guided"):
        evaluate(EXACT, TRAIN, HELD, replace(FEW, over_w=(1.0, 2.0)))
    with pytest.raises(InputError, match="chooses its steps"):
        evaluate(model_of(Gaussian(SPECTRUM), solver="adaptive"), TRAIN, HELD, replace(FEW, over_steps=(5,)))
    plan = trace(DDIM(), UniformLam()(VP(), 5))
    with pytest.raises(InputError, match="own steps"):
        evaluate(EXACT, TRAIN, HELD, replace(FEW, over_steps=(5,)), plan=plan)
    with pytest.raises(InputError, match="there are 500 held-out"):
        evaluate(EXACT, TRAIN, HELD, replace(FEW, likelihood=501))


def test_few_samples_have_no_unbiased_distance():
    x = drawn(40, 1).x.repeat(1, 1, 5, 5) + torch.randn(40, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    samples, train, held = (Data(part, None, "few") for part in (x[:12], x[12:26], x[26:]))
    found = evaluate_samples(samples, train, held, FEW).scores["pixels"]["frechet-unbiased"]
    assert "too few" in found.why
    auto = evaluate_samples(samples, train, held, replace(FEW, features="auto")).scores["pca"]
    assert auto["frechet-unbiased"].found.low < auto["frechet-unbiased"].found.value


def test_samples_of_any_origin():
    """Scored like a model's."""
    fresh = evaluate_samples(drawn(500, 3), TRAIN, HELD, FEW)
    assert (
        fresh.scores["pixels"]["frechet-unbiased"].found.low < 0 < fresh.scores["pixels"]["frechet-unbiased"].found.high
    )
    copies = evaluate_samples(Data(TRAIN.x[:500], None, "copies"), TRAIN, HELD, FEW)
    assert copies.memory["authentic"].found.value == 0
    assert copies.memory["ct"].found.value < -10
    wide = evaluate_samples(Data(2 * drawn(500, 3).x, None, "wide"), TRAIN, HELD, FEW)
    assert wide.scores["pixels"]["frechet-unbiased"].found.low > 0.1
    assert fresh.curves == fresh.likelihood == {}


def test_samples_have_the_seed_of_sampling():
    a, b, c = (
        evaluate(model_of(Gaussian(SPECTRUM), sample={"steps": 20, "seed": k}), TRAIN, HELD, replace(FEW, seed=seed))
        for k, seed in ((0, 0), (1, 0), (0, 1))
    )
    assert (a.sampler["seed"], b.sampler["seed"], c.measure["metrics seed"]) == (0, 1, 1)
    assert not torch.allclose(a.x, b.x)
    assert torch.equal(a.x, c.x)
    assert compare(a, b).differences["seed"] == (0, 1)
    with pytest.raises(InputError, match="metrics seed"):
        compare(a, c)


def test_a_tableau_samples_like_its_solver():
    plan = trace(DDIM(), Config.resolve().build("grid")(VP(), 20))
    a = evaluate(EXACT, TRAIN, HELD, FEW, plan=plan)
    b = evaluate(model_of(Gaussian(SPECTRUM), solver={"kind": "ddim"}), TRAIN, HELD, FEW)
    assert torch.allclose(a.x, b.x, atol=1e-5)
    assert a.sampler["nfe"] == 20
    assert a.warnings == ()


def test_scores_on_features_that_a_sampler_was_tuned_on_are_flagged(tmp_path):
    plain = trace(DDIM(), UniformLam()(VP(), 5))
    hashes = evaluate(EXACT, TRAIN, HELD, replace(FEW, features="pca=2", n=50)).measure["features"]
    plan = replace(plain, tuned_on=(hashes["pca=2"]["sha256"],))
    plan.save(tmp_path / "plan.safetensors")
    plan = type(plan).load(tmp_path / "plan.safetensors")
    found = evaluate(EXACT, TRAIN, HELD, replace(FEW, features="pca=2,pixels", n=50), plan=plan)
    assert "tuned on the features pca=2" in found.warnings[0]


def test_comparing(exact, tmp_path):
    write(exact, tmp_path / "a")
    other = evaluate(
        model_of(Gaussian(SPECTRUM), sample={"steps": 2}), TRAIN, HELD,
        Choices(features="pixels,pca=2", over_steps=(), likelihood=200),
    )  # fmt: skip
    write(other, tmp_path / "b")
    found = compare(read(tmp_path / "a"), read(tmp_path / "b" / "evaluation.json"))
    verdicts = {(row.group, row.name): row.verdict for row in found.rows}
    assert verdicts["pixels", "frechet-unbiased"] == "a"
    assert verdicts["pixels", "recall"] == "a"
    assert verdicts["likelihood", "flow"] == "neither"  # the same model
    assert found.differences["steps"] == (20, 2)
    assert not found.left_out
    swapped = compare(read(tmp_path / "b"), read(tmp_path / "a"))
    assert {(r.group, r.name): r.verdict for r in swapped.rows}["pixels", "recall"] == "b"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"choices": replace(FEW, n=100)}, "samples is 500 against 100"),
        ({"choices": replace(FEW, seed=1)}, "metrics seed is 0 against 1"),
        ({"held": drawn(500, 9)}, "held out: sha256"),
        ({"choices": replace(FEW, features="pca=3")}, "only one of them has it"),
    ],
)
def test_unlike_scores_are_refused(change, why):
    one = evaluate(EXACT, TRAIN, HELD, FEW).json()
    two = evaluate(EXACT, TRAIN, change.get("held", HELD), change.get("choices", FEW)).json()
    if "pca" in why or "only one" in why:
        two["scores"]["memory"], one["scores"]["memory"] = {}, {}
    with pytest.raises(InputError, match=why):
        compare(one, two)


def test_other_features_of_one_name_are_left_out():
    """Principal components of other training data are other features."""
    choices = replace(FEW, features="pca=2,pixels")
    one, two = (evaluate(EXACT, train, HELD, choices).json() for train in (TRAIN, drawn(600, 5)))
    found = compare(one, two)
    assert {row.group for row in found.rows} == {"pixels"}
    assert "sha256" in found.left_out["pca=2"]
    assert {name for name in found.left_out if name.startswith("memory")} == {
        "memory: copy-ratio", "memory: near-copies", "memory: authentic", "memory: ct"
    }  # fmt: skip


def test_damaged_evaluations_are_refused(exact):
    good = exact.json()
    assert compare(exact, good).rows
    for change in ({"measure": {}}, {"measure": 3}, {"scores": None}):
        with pytest.raises(InputError, match=r"damaged|cannot be compared"):
            compare({**good, **change}, good)
    with pytest.raises(InputError, match="damaged"):
        compare({}, {})


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "does not exist"), ("{", "JSON"), ("[]", "no evaluation"), ('{"format": "other"}', "no evaluation")],
)
def test_what_cannot_be_compared(tmp_path, content, why):
    if content is not None:
        (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(InputError, match=why):
        read(tmp_path)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"n": 1}, ">= 10"),
        ({"n": -3}, ">= 10"),
        ({"n": 12.5}, "whole number"),
        ({"seed": -1}, "from 0 to"),
        ({"seed": 2**70}, "from 0 to"),
        ({"features": ""}, "unknown features"),
        ({"features": ("pca",)}, "words such as"),
        ({"over_steps": 5}, "numbers >= 1"),
        ({"over_steps": (5.5,)}, "numbers >= 1"),
        ({"over_w": ("a",)}, "guidance weights"),
        ({"likelihood": 1}, ">= 2"),
        ({"over_steps": (0,)}, "numbers >= 1"),
        ({"over_w": (float("nan"),)}, "guidance weights"),
    ],
)
def test_choices_are_checked(settings, why):
    with pytest.raises(InputError, match=why):
        Choices(**settings)


def test_data_that_do_not_fit():
    other = Data(torch.zeros(9, 1, 3, 3))
    with pytest.raises(InputError, match=r"\(1, 3, 3\)"):
        evaluate(EXACT, TRAIN, other, FEW)
    with pytest.raises(InputError, match="at most 500"):
        evaluate(EXACT, TRAIN, HELD, replace(FEW, n=501))
    with pytest.raises(InputError, match="no labels"):
        evaluate(replace(EXACT, classes=3), TRAIN, HELD, FEW)
    labelled = replace(EXACT, classes=3)
    with pytest.raises(InputError, match="label 4"):
        evaluate(labelled, drawn(600, 1, torch.arange(600) % 5), drawn(500, 2, torch.arange(500) % 3), FEW)
    with pytest.raises(InputError, match="eval"):
        evaluate(replace(EXACT, denoiser=Denoiser(torch.nn.Linear(2, 2), V()).train()), TRAIN, HELD, FEW)


def test_broken_samples_are_not_scored():
    class Broken(torch.nn.Module):
        def forward(self, x, level, cond=None):
            return x * torch.nan

    with pytest.raises(NonFinite, match="500 of 500"):
        evaluate(model_of(Broken().eval()), TRAIN, HELD, FEW)


class Half(torch.nn.Module):
    """A decoder from latents to data."""

    def forward(self, x):
        return torch.cat([x, -x], 1)


def test_latents_are_decoded_and_have_no_likelihood():
    model = replace(EXACT, decode=Half())
    train, held = (Data(Half()(part.x), None, "pairs") for part in (TRAIN, HELD))
    with pytest.raises(InputError, match="latents"):
        evaluate(model, train, held, replace(FEW, likelihood=10))
    with pytest.raises(InputError, match="latents"):
        likelihoods(model, train, held, 10, 0, Processes(), lambda *_: None)
    found = evaluate(model, train, held, replace(FEW, likelihood=None))
    assert found.likelihood == {}
    assert "latents" in found.warnings[0]
    assert found.x.shape == (500, 2, 2, 2)
    assert (
        found.scores["pixels"]["frechet-unbiased"].found.low < 0 < found.scores["pixels"]["frechet-unbiased"].found.high
    )


def test_spacing():
    assert spacing(torch.arange(256) / 127.5 - 1) == (pytest.approx(2 / 255), (-1.0, 1.0))
    assert spacing(torch.tensor([0.0, 1.0]))[0] == 1
    assert spacing(load_data("digits").x) == (0.125, (-1.0, 1.0))
    assert spacing(torch.tensor([0.5, 0.5])) is None
    assert spacing(torch.randn(1000)) is None
    step, span = spacing(torch.tensor([0.1, 0.4, 1.0]))
    assert (round(step, 6), round(span[0], 6), round(span[1], 6)) == (0.3, 0.1, 1.0)
    pixels = torch.randint(0, 256, (50, 3, 4, 4)) / 127.5 - 1
    assert quantisation(pixels) is not None
    with pytest.raises(InputError, match="different steps"):
        quantisation(pixels * torch.tensor([1.0, 1.2, 0.7]).reshape(3, 1, 1))


def diffusers_ddpm(steps):
    """diffusers' own network, schedule and training loop on digits without labels."""
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 16), norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), layers_per_block=1,
    )  # fmt: skip
    scheduler, optimiser = DDPMScheduler(num_train_timesteps=1000), torch.optim.AdamW(net.parameters(), 2e-3)
    train, held_out = load_data("digits").split(797)
    for _ in range(steps):
        x0 = train.x[torch.randint(len(train), (64,))]
        noise, t = torch.randn_like(x0), torch.randint(1000, (64,))
        loss = (net(scheduler.add_noise(x0, noise, t), t).sample - noise).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval(), scheduler, train, held_out


class Foreign(torch.nn.Module):
    """diffusers' network with our call."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, time, cond):
        return self.net(x, time).sample


def test_a_model_that_diffusers_trained(tmp_path):
    """Nothing in the evaluation knows of it, and its samples are those of diffusers' own sampler."""
    from diffusers import DDIMScheduler

    net, scheduler, train, held_out = diffusers_ddpm(60)
    discrete = Discrete(scheduler.alphas_cumprod)
    spectrum = Spectrum.measure(train.x)
    config = Config.resolve(
        {"solver": "ddim", "grid": {"kind": "indexed", "spacing": "leading"}, "sample": {"steps": 10}}
    )
    model = Model(Denoiser(Foreign(net), Eps(clock=Index(discrete))).eval(), discrete, 0, spectrum, config)
    found = evaluate(model, train, held_out, Choices(n=200, over_steps=(), likelihood=2))
    assert set(found.scores) == {"digits", "pca"}
    assert found.scores["digits"]["frechet-unbiased"].found.low > found.scores["digits"]["frechet-unbiased"].floor.high
    assert found.classes["names"] == [str(k) for k in range(10)]
    assert found.likelihood["bound"]["value"] > 0
    assert found.adherence == {}
    assert write(found, tmp_path / "e").is_file()

    theirs = DDIMScheduler(num_train_timesteps=1000, set_alpha_to_one=True, clip_sample=False)
    theirs.set_timesteps(10)
    from undiffuse import Noise

    x = Noise((200, 1, 8, 8), 0)()
    first = discrete.index(int(theirs.timesteps[0]))
    x = x * float(first.sigma)
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(net(x, t).sample, t, x).prev_sample
    assert torch.allclose(x.clamp(-1, 1), found.x, atol=2e-3)


def test_report_and_files(exact, tmp_path):
    page = write(exact, tmp_path / "deep" / "er").read_text()
    for words in ("Did it copy?", "Provenance", "Fréchet, unbiased", "Likelihood", "95 % interval", "pca=2"):
        assert words in page
    assert "http" not in page.replace("http-equiv", "")
    files = {path.name for path in (tmp_path / "deep" / "er").iterdir()}
    pictures = {"samples.png", "copies.png", "curves.png", "bound.png"}
    assert files == {"evaluation.json", "report.html", MANIFEST, *pictures}
    assert json.loads((tmp_path / "deep" / "er" / "evaluation.json").read_text()) == exact.json()


def test_an_evaluation_is_written_whole(exact, tmp_path, monkeypatch):
    """An older one stays as it was where the new one cannot be written; other files are never touched."""
    write(exact, str(tmp_path / "e"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "e").iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("undiffuse.plot.page", fail)
        with pytest.raises(OSError, match="No space"):
            write(replace(exact, curves={}), tmp_path / "e")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "e").iterdir()}
    write(replace(exact, curves={}), tmp_path / "e")
    assert not (tmp_path / "e" / "curves.png").exists()
    (tmp_path / "e" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"such as notes.txt"):
        write(exact, tmp_path / "e")
    assert (tmp_path / "e" / "notes.txt").read_text() == "mine"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    for place in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt", tmp_path / "mine" / "thesis.txt" / "x", ""):
        with pytest.raises(InputError, match="folder"):
            write(exact, place)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_signals_have_pictures_of_their_own(tmp_path):
    spectrum = Spectrum(torch.zeros(6), torch.ones(6) / 4, shape=(1, 6))
    data = [Data(torch.randn(60, 1, 6, generator=torch.Generator().manual_seed(k)) / 2) for k in (1, 2)]
    model = Model(Gaussian(spectrum).eval(), VP(), 0, spectrum, Config.resolve())
    found = evaluate(model, *data, replace(FEW, features="auto", likelihood=10))
    assert set(found.scores) == {"pca"}
    page = write(found, tmp_path / "e")
    assert (tmp_path / "e" / "samples.png").is_file()
    assert (tmp_path / "e" / "copies.png").is_file()
    assert "in gray, those training samples" in page.read_text()


def test_the_command(digits, run, tmp_path):
    words = ["-n", 60, "--over-steps", "2,3", "--over-w", "1,2", "--likelihood", 4, "--out", tmp_path / "out"]
    code, out, _ = run("evaluate", digits, "--json", *words)
    assert code == 0
    found = json.loads(out)
    assert found["measure"]["samples"] == 60
    assert set(found["curves"]) == {"steps", "w"}
    assert found["scores"]["digits"]["frechet"]["floor"]["value"] > 0
    assert found["classes"]["names"][:2] == ["0", "1"]
    assert found["sampler"]["weights"] == "average (power, length 0.1) after 30 steps"
    assert (tmp_path / "out" / "report.html").is_file()
    code, out, _ = run(
        "evaluate",
        digits,
        "-n",
        60,
        "--over-steps",
        "",
        "--over-w",
        "",
        "--likelihood",
        0,
        "solver=ddim",
        "guidance.w=1",
    )
    assert code == 0
    assert "real samples" in out
    (folder,) = (digits / "evaluations").glob("ddim-3-w1-*")
    assert (folder / "evaluation.json").is_file()
    code, out, _ = run("evaluate", "--compare", tmp_path / "out", folder)
    assert code == 0
    assert "solver: kind: dpmpp-2m | ddim" in out
    code, out, _ = run("evaluate", "--compare", tmp_path / "out", folder, "--json")
    assert json.loads(out)["differences"]["guidance: w"] == [2.0, 1.0]


def test_the_command_on_samples(digits, run, tmp_path):
    samples = tmp_path / "samples.npz"
    import numpy as np

    x = load_data("digits").x[:80]
    np.savez(samples, x=x.numpy())
    code, out, _ = run("evaluate", samples, "data=digits", "-n", 70, "--json", "--out", tmp_path / "e")
    assert code == 0
    assert json.loads(out)["sampler"]["samples"] == "samples"
    code, _, err = run("evaluate", samples)
    assert (code, "data=NAME" in err) == (2, True)
    code, _, err = run("evaluate", samples, "data=digits", "solver=ddim")
    assert (code, "made by now" in err) == (2, True)
    code, _, err = run("evaluate", samples, "data=toy-moons")
    assert (code, "shape" in err) == (2, True)
    code, _, err = run("evaluate", samples, "data=digits", "--likelihood", 5)
    assert (code, "need a model" in err) == (2, True)
    broken = x.numpy().copy()
    broken[3] = np.nan
    np.savez(samples, x=broken)
    code, _, err = run("evaluate", samples, "data=digits")
    assert (code, "1 of the 80 samples" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "needs a run folder or samples"),
        (["nowhere"], "undiffuse train out=runs/nowhere"),
        ([""], "needs a run folder or samples"),
        (["RUN", "--device", "tpu"], "auto, cpu or cuda"),
        (["RUN", "--out", ""], "folder of its own"),
        (["RUN", "--out", "README.md"], "is a file"),
        (["RUN", "--seed", "-1"], "seed must be"),
        (["RUN", "--over-steps", "two"], "--over-steps must be numbers"),
        (["RUN", "--features", "digitz"], "did you mean 'digits'"),
        (["RUN", "-n", "5000"], "held out 797"),
        (["RUN", "sample.n=5000"], "held out 797"),
        (["RUN", "-n", "50", "sample.n=60"], "differ"),
        (["RUN", "net.width=3"], "fixed when the run was trained"),
        (["RUN", "--plan", "nowhere.safetensors"], "nowhere.safetensors"),
        (["RUN", "--compare", "a", "b"], "nothing else"),
        (["RUN", "solver=ddin"], "did you mean 'ddim'"),
    ],
)
def test_mistakes(digits, run, words, why):
    code, _, err = run("evaluate", *[digits if word == "RUN" else word for word in words])
    assert code == 2
    assert why in err


def test_changed_data_are_refused(tmp_path, run):
    import numpy as np

    g = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=g.integers(0, 256, (60, 1, 8, 8)).astype("uint8"))
    layer = {
        "data": {"name": str(tmp_path / "d.npz")}, "out": str(tmp_path / "run"), "track": "none", "eval": {"every": 0},
        "train": {"steps": 2, "batch": 4}, "net": {"kind": "unet", "width": 16, "mults": [1], "patch": 2},
    }  # fmt: skip
    from undiffuse.fit import fit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("undiffuse.plot.plot_curves", lambda *_: None)
        fit(Config.resolve(layer))
    np.savez(tmp_path / "d.npz", x=g.integers(0, 256, (60, 1, 8, 8)).astype("uint8"))
    code, _, err = run("evaluate", tmp_path / "run")
    assert code == 2
    assert "has changed since" in err
