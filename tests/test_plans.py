"""Plans from a run to its samples: chosen, kept, used again, shown."""

import contextlib
import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_cli import put_model
from undiffuse import VP, InputError, Modal, Model, Tableau, UniformLam, UniPC, read_plan, spectral, trace
from undiffuse.config import Config
from undiffuse.plans import plan_for, plan_name
from undiffuse.runfolder import SHIPPED, find_run, fingerprint, shipped
from undiffuse.tableau import made_for
from undiffuse.tune import reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return put_model(tmp_path_factory.mktemp("plans") / "tiny")


@pytest.fixture
def own(folder, tmp_path):
    """A run of the test's own."""
    return shutil.copytree(folder, tmp_path / "own")


def test_either_kind_of_file_is_read_and_shown(own, tmp_path, run):
    levels, data = UniformLam()(VP(), 3), Model.load(own).spectrum
    for plan in (trace(UniPC(2), levels, "unipc"), spectral(data, levels)):
        plan.save(tmp_path / "p.safetensors")
        again = read_plan(tmp_path / "p.safetensors")
        assert type(again) is type(plan)
        assert again.show() == plan.show()
        code, out, _ = run("plan", "show", tmp_path / "p.safetensors", "--digits", 2)
        assert code == 0
        assert out.strip() == plan.show(2)


def test_a_plan_samples_as_its_solver_does(folder):
    model, levels = Model.load(folder), UniformLam()(VP(), 4)
    plan = trace(UniPC(2), levels)
    a = model.sample(3, [1, 2, 3], plan=plan, seed=4)
    b = model.sample(3, [1, 2, 3], steps=4, solver=UniPC(2), grid=UniformLam(), schedule=VP(), seed=4)
    assert torch.allclose(a, b, atol=1e-5)
    # sample k is the same in another batch, also of a plan in a basis
    modal = spectral(model.spectrum, levels)
    assert torch.allclose(model.sample(4, plan=modal)[2:], model.sample(2, plan=modal, first=2), atol=1e-5)
    with pytest.raises(InputError, match="leave solver and grid out"):
        model.sample(2, plan=plan, solver=UniPC(2))


def test_the_method_chooses_for_the_model_it_belongs_to(folder):
    model = Model.load(folder)
    assert model.auto(6, noises=0).plan.name == "spectral-3c on spectral"
    assert model.auto(6, guidance=7.5, noises=0).plan.name == "spectral-1c on spectral"
    found = model.auto(2, guidance=2.0, noises=4)
    tried = [trial for trial in found.trials if trial.noises]
    assert found.rows == 2 * 4 * (40 + 2 * len(tried))  # guidance: two rows each
    assert model.sample(2, label=3, plan=found.plan).shape == (2, 1, 8, 8)


def test_nfe_is_sought_once_and_kept(own, run):
    code, out, _ = run("sample", own, "--nfe", 2, "-n", 3, "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["nfe"] == 2
    assert facts["plan"]["file"] == str(own / "plan-2.safetensors")
    assert facts["plan"]["rows"] > 0
    before = (own / "plan-2.safetensors").read_bytes()
    first = Path(facts["file"]).read_bytes()
    code, out, _ = run("sample", own, "--nfe", 2, "-n", 3, "--json")
    assert "rows" not in json.loads(out)["plan"]  # used again
    assert (own / "plan-2.safetensors").read_bytes() == before
    code, out, _ = run("sample", own, "--plan", own / "plan-2.safetensors", "-n", 3, "--json")
    assert code == 0
    again = json.loads(out)
    assert again["plan"]["name"] == facts["plan"]["name"]
    assert Path(again["file"]).read_bytes() == first
    assert again["file"].endswith("seed0-any-plan-2.png")
    assert isinstance(read_plan(own / "plan-2.safetensors"), Tableau | Modal)
    assert not list(own.glob("*.part"))


def test_guided_plans_are_kept_by_weight_and_said(own, run):
    code, out, _ = run("sample", own, "--nfe", 2, "-n", 2, "--label", "each", "guidance.w=3")
    assert code == 0
    assert (own / "plan-2-w3.safetensors").is_file()
    assert "network rows" in out
    assert "4 network rows a sample" in out
    assert list((own / "samples").glob("seed0-each-nfe2-w3.png"))


def test_a_plan_of_other_weights_is_made_anew(own):
    model = Model.load(own)
    assert plan_for(model, own, model.config, 1, False).choice is not None
    assert plan_for(model, own, model.config, 1, False).choice is None
    path = own / "plan-1.safetensors"
    os.utime(path, (0, 0))  # a copied folder
    assert plan_for(model, own, model.config, 1, False).choice is None
    read_plan(path).save(path, made_for(path) | {"model": "of before"})
    assert plan_for(model, own, model.config, 1, False).choice is not None
    assert made_for(path)["model"] == fingerprint(own)
    path.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"plan-1\.safetensors is not a readable plan.*delete it"):
        plan_for(model, own, model.config, 1, False)


def test_any_flipped_bit_and_what_is_no_number_is_found(own, tmp_path):
    model = Model.load(own)
    levels = UniformLam()(VP(), 2)
    for plan in (trace(UniPC(2), levels, "unipc"), spectral(model.spectrum, levels)):
        path = tmp_path / "p.safetensors"
        plan.save(path, {"w": 2.0})
        assert made_for(path) == {"w": 2.0}
        data = path.read_bytes()
        for at in torch.randint(len(data) * 8, (200,), generator=torch.Generator().manual_seed(0)).tolist():
            bad = bytearray(data)
            bad[at // 8] ^= 1 << at % 8
            path.write_bytes(bad)
            with contextlib.suppress(InputError):
                assert read_plan(path).show(16) == plan.show(16)  # a bit of the padding or of the layout's text
                assert made_for(path) == {"w": 2.0}
    table = trace(UniPC(2), levels)
    replace(table, sigma=table.sigma * torch.nan).save(path)
    with pytest.raises(InputError, match="NaN or infinite"):
        read_plan(path)


def test_a_plan_is_used_for_what_it_was_made_for(own, tmp_path, run):
    model, about = Model.load(own), None
    path = tmp_path / "p.safetensors"
    assert run("sample", own, "--nfe", 2, "-n", 2, "--label", 1)[0] == 0
    about = made_for(own / "plan-2-w2.safetensors")
    plan = read_plan(own / "plan-2-w2.safetensors")
    for changed, code, word in (
        ({}, 0, ""),
        ({"shape": [3, 8, 8]}, 2, "made for the shape [3, 8, 8], and this is [1, 8, 8]"),
        ({"schedule": {"kind": "flow"}}, 2, "made for the schedule"),
        ({"guidance": None}, 0, "warning"),
        ({"model": "x"}, 0, "another model or other weights"),
    ):
        plan.save(path, about | changed)
        found, _, err = run("sample", own, "--plan", path, "-n", 2, "--label", 1)
        assert (found, word in err, bool(word) or not err) == (code, True, True), changed
    with pytest.raises(InputError, match=r"got Choice: give its \.plan"):
        model.sample(2, plan=model.auto(2, noises=0))


def test_names_tell_plans_apart_that_must_differ(folder):
    model = Model.load(folder)

    def name(labels, *layers):
        return plan_name(model, Config.resolve(model.config.values, *layers), 6, labels)

    assert name(False) == name(False, {"guidance": {"w": 5.0}}) == "plan-6.safetensors"
    assert name(True) == "plan-6-w2.safetensors"
    assert name(True, {"guidance": {"w": 1.0}}) == "plan-6-w1.safetensors"
    assert name(True, {"sample": {"seed": 3}, "solver": "ddim"}) == name(True)
    others = [name(True, {"guidance": {"lam_min": -1.0}}), name(True, {"schedule": "cosine"}), name(True)]
    others += [name(True, {"guidance": {"lam_min": -2.0}}), name(False, {"schedule": "cosine"}), name(False)]
    assert len(set(others)) == 6


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs owners of files")
def test_a_folder_of_others_is_left_alone(own, monkeypatch):
    model, uid = Model.load(own), os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    kept = plan_for(model, own, model.config, 1, False)
    assert (kept.path, list(own.glob("plan-*"))) == (None, [])
    monkeypatch.setattr(os, "getuid", lambda: uid)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert plan_for(model, own, model.config, 1, False).path is None
    assert stat.S_ISDIR(own.stat().st_mode)


def test_nothing_is_written_into_the_package():
    model, before = Model.load("digits"), sorted(SHIPPED.rglob("*"))
    assert plan_for(model, "digits", model.config, 1, False).path is None
    assert find_run("digits").resolve().parent == SHIPPED.resolve()
    assert sorted(SHIPPED.rglob("*")) == before


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("labels", [False, True])
def test_models_that_come_along_have_plans(name, labels):
    model, given = Model.load(name), [3, 7, 1, 9] if labels else None
    due = model.sample(4, given, plan=reference(model.schedule, 5, model.spectrum))
    for nfe, most in {4: 0.2, 5: 0.1, 6: 0.1, 8: 0.06, 10: 0.04}.items():
        kept = plan_for(model, name, model.config, nfe, labels)
        assert (kept.choice, kept.plan.nfe) == (None, nfe)
        off = (model.sample(4, given, plan=kept.plan) - due).flatten(1).norm(dim=1) / due.flatten(1).norm(dim=1)
        assert float(off.median()) < most


def test_shards_by_a_plan_hold_what_it_samples(own, tmp_path, run):
    out = tmp_path / "shards"
    code, _, err = run("sample", own, "--nfe", 2, "-n", 5, "--out", out, "--shard", 3)
    assert code == 0, err
    plan = read_plan(own / "plan-2.safetensors")
    x = torch.cat([load_file(path)["x"] for path in sorted(out.glob("*.safetensors"))])
    assert torch.equal(x, Model.load(own).sample(5, plan=plan))
    code, _, err = run("sample", own, "--plan", own / "plan-2.safetensors", "-n", 5, "--out", out, "--shard", 3)
    assert code == 0, err
    code, _, err = run("sample", own, "-n", 5, "--out", out, "--shard", 3)
    assert (code, "plan" in err) == (2, True)


def test_evaluations_by_a_plan_are_named_by_it(own, run):
    words = ["-n", 12, "--features", "pixels", "--over-steps", "", "--over-w", "", "--likelihood", 0]
    code, _, err = run("evaluate", own, "--nfe", 2, *words, "--json")
    assert code == 0, err
    assert (own / "plan-2-w2.safetensors").is_file()
    assert list((own / "evaluations").glob("nfe2-w2-*"))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--nfe", "0"], "nfe must be a whole number >= 1"),
        (["--nfe", "3", "--plan", "p"], "leave one of them out"),
        (["--nfe", "3", "solver=ddim"], "leave out solver"),
        (["--nfe", "3", "grid=karras", "sample.steps=3"], "leave out grid, sample.steps"),
        (["--plan", "nowhere", "schedule=cosine"], "leave out schedule"),
        (["--plan", "nowhere"], "nowhere is not a readable plan"),
    ],
)
def test_mistakes(folder, run, words, why):
    code, _, err = run("sample", folder, *words)
    assert code == 2
    assert why in err
    assert not list(folder.glob("plan-*"))
