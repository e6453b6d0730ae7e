"""`undiffuse tune`: plans that sample takes, the report beside them, and what is refused."""

import json
import shutil

import pytest
import torch

from tests.test_cli import put_model
from undiffuse import Level, Model, UniformLam, UniPC, read_plan, spectral, trace
from undiffuse.plans import plan_for
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
    facts = json.loads((folder / "tune-w2" / "report.json").read_text())
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
    assert found.page == folder / "tune-w2" / "report.html"
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
    assert not (own / "tune").exists()
    assert (tmp_path / "there" / "tune" / "report.html").is_file()
    code, _, err = run("sample", own, "--plan", "there/plan-1.safetensors", "-n", "2", "--json")
    assert code == 0, err


def test_tuning_again_starts_from_the_plan_of_auto(tuned, tmp_path):
    own = shutil.copytree(tuned[0], tmp_path / "own")
    model = Model.load(own)
    first = model.auto(2, guidance=model.config.build("guidance")).plan
    found = tune_run(model, own, model.config, (2,), True, seconds=0.2)
    assert found.report.results[2].first.show() == first.show()
    assert plan_for(model, own, model.config, 2, True).plan.show() == found.report.results[2].plan.show()


def test_noise_and_interval_are_decided_by_score_and_sampled_with(tuned, run, tmp_path):
    own = shutil.copytree(tuned[0], tmp_path / "own")
    code, out, err = run("tune", own, "--nfe", 2, "--seconds", 0.2, "--score", "--json", "guidance.w=3")
    assert code == 0, err
    facts = json.loads(out)["results"]["2"]
    page = (own / "tune-w3" / "report.html").read_text()
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
        (["--nfe", "0"], "budgets"),
        (["--nfe", "4,four"], "--nfe must be whole numbers such as 4,6,8, got '4,four'"),
        (["--nfe", "4,4"], "each number of evaluations once"),
        (["--seconds", "0"], "seconds > 0"),
        (["--seconds", "nan"], "seconds > 0"),
        (["net.width=8"], "net was fixed when the run was trained"),
    ],
)
def test_mistakes(tuned, run, words, why):
    before = sorted(p.name for p in tuned[0].iterdir())
    code, _, err = run("tune", tuned[0], *words)
    assert code == 2
    assert why in err
    assert sorted(p.name for p in tuned[0].iterdir()) == before
