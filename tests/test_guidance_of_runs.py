"""Guidance that asks other networks: those of runs."""

import numpy as np
import pytest
import torch

import undiffuse
from undiffuse import Autoguidance, InputError
from undiffuse.config import Config, parse_overrides
from undiffuse.fit import fit

SMALL = "net.width=16 train.steps=12 train.batch=16 train.snapshots=4 eval.every=0 track=none sample.rows=4"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("guided") / "run"
    fit(Config.resolve(parse_overrides(SMALL.split()), {"out": str(out)}))
    return out


def test_the_weak_version_is_the_average_as_it_was(trained):
    model = undiffuse.load(trained)
    early = undiffuse.load(trained, until=0.5)
    from undiffuse.train import Snapshots

    state, _ = Snapshots(trained / "averages").average(model.config.values["ema"]["length"], 6)
    for name, value in early.denoiser.named_parameters():
        assert torch.equal(value, state[name]), name
    guide = model.guide(Autoguidance(3.0, until=0.5))
    x = model.sample(2, label=[1, 2], steps=3, guidance=guide)
    assert torch.equal(x, model.sample(2, label=[1, 2], steps=3, guidance=Autoguidance(3.0, weak=early.denoiser)))
    assert not torch.allclose(x, model.sample(2, label=[1, 2], steps=3, guidance=1.0), atol=1e-4)


def test_autoguidance_on_the_command_line(run, trained, tmp_path):
    words = ["sample", trained, "--class", "3", "-n", 2, "sample.steps=2", "guidance=autoguidance", "guidance.w=2"]
    code, out, _ = run(*words, "guidance.until=0.25", "--out", tmp_path / "a.npy", "--json")
    assert code == 0, out
    code, _, err = run(*words, "guidance.run=nowhere", "--out", tmp_path / "b.npy")
    assert (code, "nowhere does not exist" in err) == (2, True)
    code, _, err = run(*words, "guidance.ema=0.4", "--out", tmp_path / "b.npy")
    assert (code, "guidance.ema" in err) == (2, True)
    code, _, err = run("sample", "digits", *words[2:], "--out", tmp_path / "b.npy")
    assert (code, "comes along with one set of weights" in err) == (2, True)
    assert not (tmp_path / "b.npy").exists()


def test_pictures_on_the_way_do_not_ask_for_earlier_weights(run, tmp_path):
    words = [*SMALL.replace("eval.every=0", "eval.every=6 eval.n=4").split(), "guidance=autoguidance"]
    code, _, err = run("train", *words, f"out={tmp_path / 'run'}")
    assert code == 0, err
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 2


def test_a_weak_version_is_read_once(trained, monkeypatch):
    from undiffuse.train import Snapshots

    model, read = undiffuse.load(trained), []
    plain = Snapshots.average
    monkeypatch.setattr(Snapshots, "average", lambda self, *how: read.append(how) or plain(self, *how))
    for _ in range(3):
        model.sample(1, label=1, steps=1, guidance=Autoguidance(2.0, until=0.75))
    assert len(read) == 1


def test_a_model_of_no_folder_has_no_earlier_average(trained):
    from dataclasses import replace

    model = replace(undiffuse.load(trained), folder=None)
    with pytest.raises(InputError, match="no run folder"):
        model.guide(Autoguidance(2.0))


@pytest.mark.parametrize("kind", ["rescale", "threshold", "apg", "cfg++", "cfg-zero", "per-level"])
def test_kinds_of_guidance_by_configuration(run, trained, tmp_path, kind):
    more = ["guidance.lam=[-2,2]", "guidance.w=[1,3]"] if kind == "per-level" else []
    words = ["sample", trained, "--class", "3", "-n", 2, f"guidance={kind}", *more]
    code, _, err = run(*words, "sample.steps=2", "--out", tmp_path / "a.npy")
    assert code == 0, err
    code, _, err = run(*words, "--nfe", 3, "--out", tmp_path / "a.npy")
    assert code == 0, err


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    out = tmp_path_factory.mktemp("guided") / "reader"
    words = "kind=classifier net.width=16 train.steps=12 train.batch=16 eval.every=0 track=none"
    fit(Config.resolve(parse_overrides(words.split()), {"out": str(out)}))
    return out


def test_classifier_guidance_on_the_command_line(run, trained, reader, tmp_path):
    words = ["sample", trained, "--class", "3", "-n", 2, "sample.steps=2", "guidance=classifier", "guidance.w=4"]
    code, _, err = run(*words, f"guidance.run={reader}", "--out", tmp_path / "a.npy", "--json")
    assert code == 0, err
    for more, said in (
        ([], "which classifier: guidance.run=RUN"),
        ([f"guidance.run={trained}"], "holds a denoiser"),
        (["guidance.run=nowhere"], "nowhere does not exist"),
        ([f"guidance.run={reader}", "guidance.base=both"], "guidance.base"),
    ):
        code, _, err = run(*words, *more, "--out", tmp_path / "b.npy")
        assert (code, said in err) == (2, True), err
    assert not (tmp_path / "b.npy").exists()


def test_a_classifier_of_other_data_is_refused(trained, reader):
    from undiffuse import ClassifierGuidance

    model = undiffuse.load("mnist")
    with pytest.raises(InputError, match="train it with the same data"):
        model.guide(ClassifierGuidance(2.0, run=str(reader)))
    guide = undiffuse.load(trained).guide(ClassifierGuidance(2.0, run=str(reader)))
    level = undiffuse.Level.at(0.0)
    assert guide.classifier(torch.zeros(2, 1, 8, 8), level).shape == (2, 10)


def test_guidance_without_a_condition(run, trained, tmp_path):
    words = ["sample", trained, "-n", 2, "sample.steps=2"]
    for kind in ("apg", "cfg++", "per-level", "classifier"):
        code, _, err = run(*words, f"guidance={kind}", "--out", tmp_path / "a.npy")
        assert (code, "needs a condition" in err or "guidance.run" in err) == (2, True), err
        code, _, err = run(*words, f"guidance={kind}", "--out", tmp_path / "shards")
        assert (code, "needs a condition" in err or "guidance.run" in err) == (2, True), err
    assert not list(tmp_path.iterdir())
    model = undiffuse.load(trained)
    x = Autoguidance(3.0, until=0.25)
    found = model.sample(2, steps=2, guidance=x)
    code, _, err = run(*words, "guidance=autoguidance", "guidance.w=3", "--out", tmp_path / "a.npy")
    assert code == 0, err
    assert torch.allclose(torch.from_numpy(np.load(tmp_path / "a.npy")), found, atol=1e-6)
    assert not torch.allclose(found, model.sample(2, steps=2), atol=1e-4)
    code, _, err = run(*words, "guidance=autoguidance", "guidance.w=3", "--out", tmp_path / "shards")
    assert code == 0, err
    code, _, err = run(*words, "guidance=autoguidance", "guidance.w=2", "--out", tmp_path / "shards")
    assert (code, "guidance" in err) == (2, True), err


@pytest.mark.parametrize("kind", ["rescale", "threshold", "apg", "cfg++", "cfg-zero", "per-level", "autoguidance"])
def test_a_kind_named_alone_guides(trained, kind):
    model = undiffuse.load(trained if kind == "autoguidance" else "digits")
    model = model.using(Config.resolve(model.config.values, {"guidance": kind}))
    x = model.sample(2, label=[1, 2], steps=2)
    assert not torch.allclose(x, model.sample(2, label=[1, 2], steps=2, guidance=1.0), atol=1e-4)


def test_what_is_no_network_is_told(trained, reader):
    from undiffuse import ClassifierGuidance, ClassifierModel

    with pytest.raises(InputError, match="denoiser, got Model"):
        Autoguidance(2.0, weak=undiffuse.load(trained))
    with pytest.raises(InputError, match="got ClassifierModel"):
        ClassifierGuidance(2.0, classifier=ClassifierModel.load(reader))
    with pytest.raises(InputError, match="finite number"):
        Autoguidance("2")
