"""`undiffuse tune`: plans that sample takes, the report beside them, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from tests.test_cli import put_model
from undiffuse import Level, Model, UniformLam, UniPC, read_plan, spectral, trace
from undiffuse.plans import plan_for
from undiffuse.tableau import made_for
from undiffuse.tuning import judged_by, stock, tune_run


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run with plans of 2 and 3 evaluations tuned for one second each."""
    torch.set_num_threads(1)
    folder = put_model(tmp_path_factory.mktemp("tuning") / "tiny")
    model = Model.load(folder)
    return folder, tune_run(model, folder, model.config, (2, 3), True, seconds=1.0)


def test_plans_are_kept_and_sampled_by(tuned, run):
    folder, found = tuned
    for n, result in found.report.results.items():
        assert found.plans[n] == folder / f"plan-{n}-w2.safetensors"
        kept = read_plan(found.plans[n])
        assert kept.show() == result.plan.show()
        assert (kept.nfe, kept.name) == (n, result.plan.name)
    code, out, err = run("sample", folder, "--nfe", 3, "-n", 2, "--label", 1, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["nfe"] == 3
    assert facts["plan"]["name"] == found.report.results[3].plan.name
    assert "rows" not in facts["plan"]  # nothing was sought


def errors(found, plan):
    return found.report.fresh.errors(plan.run, Level(*plan.start))


def test_figures_are_those_of_fresh_noise(tuned):
    folder, found = tuned
    facts = json.loads((folder / "tune-w2-nfe2-3" / "report.json").read_text())
    assert set(facts["results"]) == {"2", "3"}
    for n, result in found.report.results.items():
        assert facts["results"][str(n)]["tuned"]["median"] == result.chosen.median
        assert result.chosen == errors(found, result.plan)
        assert result.start == errors(found, result.first)
        assert result.chosen.median <= 1.1 * result.start.median
    assert found.stock[2] == errors(found, stock(Model.load(folder).config, 2))


def test_the_report_has_curves_pictures_and_rungs(tuned):
    folder, found = tuned
    page = found.page.read_text()
    assert found.page == folder / "tune-w2-nfe2-3" / "report.html"
    assert page.count("<img") == 3  # the errors and a row of pictures for each number of evaluations
    for word in ("stock", "auto", "tuned", "not kept" if "not kept" in str(found.report) else "kept"):
        assert word in page
    assert {p.name for p in found.page.parent.glob("*.png")} == {"errors.png", "samples-2.png", "samples-3.png"}


def test_a_model_that_comes_along_is_tuned_into_a_folder_of_ones_own(tuned, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = tuned
    own = shutil.copytree(folder, tmp_path / "own")
    code, out, err = run("tune", own, "--nfe", "1", "--seconds", "0.2", "--unconditional", "--out", "there", "--json")
    assert code == 0, err
    assert json.loads(out)["results"]["1"]["file"] == "there/plan-1.safetensors"
    assert sorted(p.name for p in own.iterdir()) == sorted(p.name for p in folder.iterdir())
    assert (tmp_path / "there" / "tune-nfe1" / "report.html").is_file()
    code, _, err = run("sample", own, "--plan", "there/plan-1.safetensors", "-n", "2", "--json")
    assert code == 0, err
    name = read_plan("there/plan-1.safetensors").name
    code, _, err = run("tune", own, "--nfe", "1", "--seconds", "0.2", "--unconditional", "--out", "there")
    assert f"1 evaluations: {name} is there and is to be beaten" in err


def test_tuning_again_goes_on_from_the_plan_that_is_there(tuned, tmp_path):
    own = shutil.copytree(tuned[0], tmp_path / "own")
    model, there = Model.load(own), read_plan(tuned[0] / "plan-2-w2.safetensors")
    found = tune_run(model, own, model.config, (2,), True, seconds=0.2)
    result = found.report.results[2]
    assert result.first.show() == there.show()
    assert result.chosen.median <= result.start.median * 1.1
    assert plan_for(model, own, model.config, 2, True).plan.show() == result.plan.show()


def test_a_plan_tuned_for_other_weights_is_not_used_nor_lost(tuned, run, tmp_path):
    own = shutil.copytree(tuned[0], tmp_path / "own")
    path = own / "plan-2-w2.safetensors"
    read_plan(path).save(path, made_for(path) | {"model": "other"})
    plan, before = read_plan(path), path.read_bytes()
    replace(plan, name="mine, tuned").save(path, made_for(path))
    before = path.read_bytes()
    code, _, err = run("sample", own, "--nfe", 2, "-n", 2, "--label", 1)
    assert (code, "was tuned for other weights" in err) == (2, True)
    assert path.read_bytes() == before
    replace(plan, name="by auto").save(path, made_for(path))
    code, out, err = run("sample", own, "--nfe", 2, "-n", 2, "--label", 1, "--json")
    assert code == 0, err
    assert json.loads(out)["plan"]["rows"] > 0


def test_other_files_where_the_report_goes_stay(tuned, run, tmp_path):
    own = shutil.copytree(tuned[0], tmp_path / "own")
    mine = own / "tune-w2-nfe2" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    code, _, err = run("tune", own, "--nfe", 2, "--seconds", 0.2)
    assert (code, "holds other files than a tuning's report has, such as mine.txt" in err) == (2, True)
    assert mine.read_text() == "precious"
    (tmp_path / "afile").touch()
    code, _, err = run("tune", own, "--nfe", 2, "--out", tmp_path / "afile")
    assert (code, "is a file: a tuning's report needs the name of a folder" in err) == (2, True)


def test_plans_are_kept_as_they_are_found(tuned, tmp_path):
    own = shutil.copytree(tuned[0], tmp_path / "own")
    model = Model.load(own)

    def stop(text):
        if text.startswith("2 evaluations"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_run(model, own, model.config, (1, 2), False, seconds=0.2, progress=stop)
    assert (own / "plan-1.safetensors").is_file()
    assert not (own / "plan-2.safetensors").exists()


def test_noise_and_interval_are_decided_by_score_and_sampled_with(tuned, run, tmp_path):
    own = shutil.copytree(tuned[0], tmp_path / "own")
    code, out, err = run("tune", own, "--nfe", 2, "--seconds", 0.2, "--score", "--json", "guidance.w=3")
    assert code == 0, err
    facts = json.loads(out)["results"]["2"]
    page = (own / "tune-w3-nfe2" / "report.html").read_text()
    assert "Noise and guidance intervals, 2 evaluations" in page
    assert facts["by score"] in page
    assert "w 3 below 3 std" in page
    assert "ddim eta 0.3" in page
    words = facts["words"].split()
    code, out, err = run("sample", own, "--nfe", 2, "-n", 2, "--label", 1, "--json", *words)
    assert code == 0, err
    found = json.loads(out)["plan"]
    assert found["file"] == facts["file"]
    assert "rows" not in found
    kept = read_plan(facts["file"])
    assert bool(kept.tuned_on) == (facts["by score"] != "the plan, guidance as it was")


@pytest.mark.parametrize("modal", [False, True])
def test_a_plan_chosen_by_features_says_so(tuned, modal):
    model = Model.load(tuned[0])
    levels = UniformLam()(model.schedule, 3)
    plan = spectral(model.spectrum, levels) if modal else trace(UniPC(2), levels)
    judged = judged_by(judged_by(plan, "abc"), "def")
    assert (tuple(plan.tuned_on), tuple(judged.tuned_on)) == ((), ("abc", "def"))
    assert judged.show() == plan.show()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--nfe", "0"], "numbers of evaluations must be from 1 to 60"),
        (["--nfe", "4,four"], "--nfe must be whole numbers such as 4,6,8, got '4,four'"),
        (["--nfe", "4,4"], "each once, such as 4,6,8; got 4,4"),
        (["--seconds", "0"], "seconds of gradient steps must be > 0, got 0.0"),
        (["--seconds", "nan"], "must be > 0, got nan"),
        (["net.width=8"], "net was fixed when the run was trained"),
    ],
)
def test_mistakes(tuned, run, words, why):
    before = sorted(p.name for p in tuned[0].iterdir())
    code, _, err = run("tune", tuned[0], *words)
    assert code == 2
    assert why in err
    assert sorted(p.name for p in tuned[0].iterdir()) == before
