"""Runs of kind=classifier: their folder, how they go on, what they refuse."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import runs
from tests.group import together
from undiffuse import ClassifierModel, InputError, Level, Model
from undiffuse.config import Config, parse_overrides
from undiffuse.fit import fit
from undiffuse.runfolder import fingerprint
from undiffuse.train.track import flat

TINY = ["net.width=16", "train.batch=16", "train.warmup=0", "track=none"]


def tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()}


def kept(out):
    """What a run keeps, but for settings in which `out` differs."""
    others = ("config.toml", "manifest.json", "state.json")
    return {name: content for name, content in tree(out).items() if not name.endswith(others)}


def resolve(*words):
    return Config.resolve(parse_overrides(["kind=classifier", *words]))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run of the digits, long enough to read some."""
    out = tmp_path_factory.mktemp("digits") / "reader"
    words = [*TINY, "train.batch=64", "train.lr=1e-2", "train.steps=160", "eval.every=80"]
    words += ["train.snapshots=4", "train.every=80"]
    return out, fit(resolve(f"out={out}", *words), log_every=40)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return runs.write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    return out, runs.run_classifier(pictures, out)


def test_a_run_reads_held_out_digits_and_says_how_well(digits):
    out, fitted = digits
    scores = fitted.model.scores
    print(scores)
    assert [row["lam"] for row in scores] == sorted(row["lam"] for row in scores)
    assert scores[-1]["accuracy"] > 0.85
    assert scores[-1]["loss"] < 0.3 * scores[-1]["prior"]
    assert abs(scores[0]["loss"] - scores[0]["prior"]) < 0.1
    again = ClassifierModel.load(out)
    assert again.scores == scores
    assert again.judged(fitted.held_out).scores == scores
    assert again.names == fitted.model.names
    assert len(again.names) in (0, 10)
    x = fitted.held_out.x[:5]
    assert torch.equal(again.classifier(x, Level.at(1.0)), fitted.model.classifier(x, Level.at(1.0)))
    assert not any(p.requires_grad for p in again.classifier.parameters())
    assert str(again) == f"ClassifierModel({again.parameters:,} parameters, shape (1, 8, 8), 10 classes)"


def test_its_log_has_loss_and_accuracy_by_level(digits):
    rows = [json.loads(line) for line in (digits[0] / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "loss" in row]
    assert [row["step"] for row in logged] == [40, 80, 120, 160]
    for row in logged:
        assert {"lam", "count", "loss", "accuracy", "prior"} == row["bins"][0].keys()
        assert sum(b["count"] for b in row["bins"]) == 40 * 64
    means = [sum(b["count"] * b[k] for b in logged[-1]["bins"]) / 2560 for k in ("loss", "accuracy")]
    assert means[0] < sum(b["count"] * b["loss"] for b in logged[0]["bins"]) / 2560
    assert logged[-1]["bins"][-1]["accuracy"] > logged[-1]["bins"][0]["accuracy"]
    assert [row["step"] for row in rows if "eval" in row] == [80, 160]
    assert rows[-1]["eval"]["levels"] == list(digits[1].model.scores)
    assert (digits[0] / "curves.png").stat().st_size > 10_000


def test_the_prior_is_the_share_of_each_class_in_the_training_data(digits):
    _, fitted = digits
    shares = torch.bincount(fitted.train.labels) / len(fitted.train)
    assert torch.allclose(fitted.model.classifier(fitted.train.x[:2], Level(0, 1)).softmax(1), shares.expand(2, 10))


def test_another_average_of_its_weights(digits):
    one, other = (ClassifierModel.load(digits[0], ema=length) for length in (0.05, 0.1))
    x = torch.randn(3, 1, 8, 8)
    assert not torch.equal(one.classifier(x, Level.at(0.0)), other.classifier(x, Level.at(0.0)))
    assert one.scores == ()  # which were another average's
    with pytest.raises(InputError, match=r"0\.2887"):
        ClassifierModel.load(digits[0], ema=0.5)


@pytest.mark.parametrize("stops", [[1], [4], [7, 9]], ids=str)
def test_stopped_and_gone_on_equals_uninterrupted(alone, pictures, tmp_path, stops):
    """Bit for bit: weights, averages, optimiser, bins, log, scores; with dropout, crops and augmentation."""
    for stop in stops:
        runs.run_classifier(pictures, tmp_path / "run", stop)
    assert runs.run_classifier(pictures, tmp_path / "run") == {
        step: values for step, values in alone[1].items() if step > stops[-1] // 3 * 3
    }
    assert kept(tmp_path / "run") == kept(alone[0])
    assert runs.run_classifier(pictures, tmp_path / "run") == {}


def test_two_processes_train_one_classifier(pictures, tmp_path):
    """Of the same samples at the same levels; dropout's draws differ."""
    pair = together(runs.run_classifier, pictures, tmp_path / "pair")
    assert pair[0] == pair[1]
    assert list(pair[0]) == list(range(1, runs.STEPS + 1))
    assert ClassifierModel.load(tmp_path / "pair").scores


def test_a_folder_read_in_passing_gives_what_memory_gives(pictures, tmp_path):
    words = [*TINY, f"data={pictures}", "train.steps=3", "held_out=6", "eval.every=0"]
    one = fit(resolve(*words, f"out={tmp_path / 'memory'}")).model
    other = fit(resolve(*words, f"out={tmp_path / 'files'}", "data.memory_mb=0")).model
    assert one.scores == other.scores


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["head=v"], "kind=classifier takes no head, only denoisers do: leave that out"),
        (["head.sigma_data=0.5"], r"no head\.sigma_data, only"),
        (
            ["weight=edm", "guidance.w=3"],
            r"no guidance\.w, weight, only",
        ),
        (["variance=hybrid"], "no variance"),
        (["coupling=immiscible"], "no coupling"),
        (["cond.text=bytes"], r"no cond\.text"),
        (["solver=ddim"], "no solver"),
        (["grid=karras"], "no grid"),
        (["sample.n=4"], r"no sample\.n"),
        (["train.cond_dropout=0.1"], r"no train\.cond_dropout"),
        (["eval.n=64"], r"no eval\.n"),
        (["net=dit"], "net=dit cannot be a classifier: kind=classifier takes net=unet"),
        (["net.cross=[0]"], r"net\.cross is for what a denoiser is told"),
        (["net.classes=3"], r"unknown key net\.classes"),
        (["levels.lam_max=-9"], "lam_min < lam_max"),
        (["augment.p=0.5"], r"augment\.p"),
        (["kind=clasifier"], "kind='clasifier' is not known: did you mean 'classifier'"),
        (["kind=x"], "there are: classifier, denoiser"),
        (["kind=3"], "kind must be text"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(InputError, match=message):
        resolve(*words)


def test_its_configuration_rebuilds_itself_without_what_denoisers_have():
    config = resolve("net.width=24", "train.steps=7")
    assert Config.resolve(tomllib.loads(config.toml())).values == config.values
    assert not {"head", "weight", "solver", "guidance", "sample"} & config.values.keys()
    assert "cond_dropout" not in config.values["train"]
    assert config.values["net"]["width"] == 24


def test_a_folder_from_before_there_was_a_kind_is_a_denoisers(tmp_path):
    """It loads, and a run that was begun so goes on: what it is recognised by has no kind."""
    out = tmp_path / "old"
    words = [f"out={out}", *TINY, "train.steps=2", "train.every=1", "eval.every=0"]
    fit(Config.resolve(parse_overrides(words)))
    assert "kind" not in json.loads((out / "checkpoints/step-2/state.json").read_text())["identity"]
    for path in (out / "config.toml", out / "model/config.toml"):
        path.write_text(path.read_text().replace('kind = "denoiser"\n', "", 1))
        assert "kind" not in tomllib.loads(path.read_text())
    assert Config.resolve(Config.read(out / "config.toml")).values["kind"] == "denoiser"
    (out / "model/manifest.json").unlink()  # not finished: it goes on
    assert fit(Config.resolve(parse_overrides(words))).model.classes == 10


def test_a_denoisers_folder_is_no_classifiers_and_the_other_way_round(digits, tmp_path, run):
    out, _ = digits
    with pytest.raises(InputError, match=r"holds a classifier.*undiffuse\.ClassifierModel\.load"):
        Model.load(out)
    with pytest.raises(InputError, match="digits holds a denoiser; a classifier is trained by"):
        ClassifierModel.load("digits")
    for words in (["sample", out], ["tune", out], ["evaluate", out]):
        code, _, err = run(*words)
        assert (code, "holds a classifier" in err) == (2, True)
    code, _, err = run("train", f"out={out}", *TINY)
    assert code == 2
    assert "kind was 'classifier', is not set" in err


def write(path, x, labels=None):
    np.savez(path, x=x, **({} if labels is None else {"labels": labels}))
    return path


def test_data_without_labels_or_of_one_class_are_refused_before_training(tmp_path, run):
    x = np.random.default_rng(0).normal(size=(20, 1, 8, 8)).astype("float32")
    for name, labels, word in (("none", None, "no labels"), ("one", np.zeros(20, int), "one class only")):
        path = write(tmp_path / f"{name}.npz", x, labels)
        for more in ([], ["--dry-run"]):
            out = tmp_path / "out"
            code, _, err = run("train", "kind=classifier", f"data={path}", "held_out=4", f"out={out}", *TINY, *more)
            assert code == 2
            assert f"{word}, and kind=classifier learns two or more classes: give a folder" in err
            assert not out.exists()


def test_the_command_line_trains_shows_and_says_where_to_go_on(tmp_path, run):
    out, words = tmp_path / "reader", [*TINY, "train.steps=3", "eval.every=0"]
    code, text, _ = run("train", "kind=classifier", f"out={out}", *words)
    assert code == 0
    assert "accuracy" in text
    assert f"Next: undiffuse info {out}" in " ".join(text.split())
    code, text, _ = run("train", "kind=classifier", f"out={out}", *words, "--json")
    facts = json.loads(text)
    assert (code, facts["steps_run"]) == (0, 0)
    code, text, _ = run("info", out, "--json")
    shown = json.loads(text)
    assert shown["kind"] == "classifier"
    assert shown["classes"] == 10
    assert shown["scores"] == facts["scores"]
    assert shown["scores"][0].keys() == {"lam", "accuracy", "loss", "ece", "prior"}
    code, text, _ = run("info", out)
    assert code == 0
    assert "calibration error" in text
    code, text, _ = run("info", "config")
    assert 'kind = "denoiser"' in text
    assert "# kind=denoiser or classifier" in text
    code, text, _ = run("train", "kind=classifier", "--dry-run", f"out={tmp_path / 'x'}", *words)
    assert (code, tomllib.loads(text)["kind"]) == (0, "classifier")


def test_a_model_that_does_not_fit_or_is_damaged_is_named(tmp_path):
    out = tmp_path / "reader"
    fit(resolve(f"out={out}", *TINY, "train.steps=1", "eval.every=0"))
    assert len(fingerprint(out)) == 64
    file = out / "model/model.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(InputError, match=r"model\.json"):
        ClassifierModel.load(out)
    with pytest.raises(InputError, match="does not exist"):
        ClassifierModel.load(tmp_path / "none")


def test_the_demo_is_about_a_denoiser(run, tmp_path):
    code, _, err = run("demo", "kind=classifier", "--out", tmp_path / "demo")
    assert (code, "the demo trains a denoiser: leave out kind" in err) == (2, True)


def test_trackers_are_told_of_every_level_and_of_means(digits):
    rows = [json.loads(line) for line in (digits[0] / "metrics.jsonl").read_text().splitlines()]
    logged, seen = flat(rows[-2]), flat(rows[-1])
    best = rows[-2]["bins"][-1]
    assert logged[f"relative error/lam {best['lam']:+.1f}"] == best["loss"] / best["prior"]
    levels = rows[-1]["eval"]["levels"]
    assert seen["eval/accuracy"] == pytest.approx(sum(row["accuracy"] for row in levels) / len(levels))


def test_the_batch_is_measured_as_that_of_a_denoiser(monkeypatch, tmp_path):
    def forward(self, x, time, cond=None):
        if len(x) > 32:
            raise torch.OutOfMemoryError("planted")
        return 0.0 * self.head.weight.sum() + x.new_zeros(len(x), 10)

    monkeypatch.setattr("undiffuse.nets.EncoderUNet.forward", forward)
    clock = iter(range(10**6))
    monkeypatch.setattr("undiffuse.fit.time.perf_counter", lambda: float(next(clock)))
    words = [*TINY, "train.batch=auto", "train.steps=1", "eval.every=0", "held_out=20", f"out={tmp_path / 'auto'}"]
    assert fit(resolve(*words)).model.config.values["train"]["batch"] == 32
