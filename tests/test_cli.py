"""The command line end to end: files, exit codes, one-line errors."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from undiffuse import cli

TINY = ["net.width=16", "train.steps=6", "train.batch=16", "train.every=3", "train.warmup=0"]
TINY += ["eval.every=0", "track=none"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    argv, sys.argv = sys.argv, ["undiffuse", "train", f"out={out}", "--json", *TINY, "eval.every=3", "track=auto"]
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = argv
    assert stop.value.code == 0
    return out


def test_train_writes_a_run_folder_and_is_idempotent(trained, run):
    assert {p.name for p in trained.iterdir()} >= {"config.toml", "metrics.jsonl", "checkpoints", "model"}
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert rows[-2]["step"] == rows[-1]["step"] == 6
    assert {"lam", "mse", "linear", "count"} <= rows[-2]["bins"][0].keys()
    assert sorted(p.name for p in (trained / "samples").iterdir()) == ["step-000003.png", "step-000006.png"]
    assert Image.open(trained / "curves.png").size == (1440, 900)
    assert [row["step"] for row in rows if "eval" in row] == [3, 6]
    assert list((trained / "logs/tensorboard").glob("events.*"))
    code, out, _ = run("train", f"out={trained}", "--json", *TINY)
    assert code == 0
    assert json.loads(out)["steps_run"] == 0


def test_train_refuses_other_settings_in_the_same_folder(trained, run):
    code, _, err = run("train", f"out={trained}", "net.width=24", *TINY[1:])
    assert code == 2
    assert "other settings: net.width was 16, is 24" in err


def test_sample_writes_a_picture_and_says_what_it_cost(trained, run, tmp_path):
    out = tmp_path / "x.png"
    code, text, _ = run("sample", trained, "--json", "--label", "each", "--out", out, "sample.n=20", "sample.steps=4")
    facts = json.loads(text)
    assert code == 0
    assert (facts["nfe"], facts["rows_per_sample"]) == (4, 8)
    assert Image.open(out).size[0] > 64
    code, text, _ = run("sample", trained, "sample.n=3", "solver=heun", "sample.steps=2", "--json")
    assert json.loads(text)["rows_per_sample"] == 3
    assert (trained / "samples" / "seed0-any-heun-2.png").is_file()
    run("sample", trained, "sample.n=3", "--label", "1", "sample.steps=2", "guidance.w=1.5")
    assert (trained / "samples" / "seed0-1-dpmpp-2m-2-w1.5.png").is_file()


def test_samples_are_the_same_whatever_the_batch(trained, run, tmp_path):
    for name, batch in [("a", 10), ("b", 10), ("c", 3)]:
        run("sample", trained, "--label", 3, "--out", tmp_path / f"{name}.npy", "sample.n=10", f"sample.batch={batch}")
    a, b, c = (np.load(tmp_path / f"{name}.npy") for name in "abc")
    assert a.shape == (10, 1, 8, 8)
    assert (a == b).all()
    assert (a == c).all()


def test_info_lists_kinds_settings_and_runs(trained, run):
    code, out, _ = run("info", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["solver"]["heun"] == {"order": 2, "calls_per_step": 2, "class": "Heun"}
    assert "uniform-lam" in facts["grid"]
    assert "dpmpp-2m" in run("info")[1]
    assert "# solver=adams" in run("info", "config")[1]
    assert json.loads(run("info", trained, "--json")[1])["classes"] == 10


def test_dry_run_prints_the_resolved_configuration_and_writes_nothing(run, tmp_path):
    out = tmp_path / "never"
    for command in ("train", "demo"):
        words = [command, "--dry-run", "--json", *(["--out", out] if command == "demo" else [f"out={out}"])]
        code, text, _ = run(*words, "net.width=48")
        assert code == 0
        assert json.loads(text)["net"]["width"] == 48
    assert not out.exists()


def test_a_toml_file_is_a_layer_below_the_words(run, tmp_path):
    (tmp_path / "c.toml").write_text("seed = 5\n[net]\nwidth = 32\n")
    code, text, _ = run("train", "--config", tmp_path / "c.toml", "net.width=40", "--dry-run", "--json")
    values = json.loads(text)
    assert code == 0
    assert (values["seed"], values["net"]["width"]) == (5, 40)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "data=digitz", "out=OUT"], "did you mean 'digits'"),
        (["train", "data=none.npz", "out=OUT"], "does not exist"),
        (["train", "sovler=x", "out=OUT"], "did you mean 'solver'"),
        (["train", "head=eps", "schedule=cosine", "out=OUT"], "ends in pure noise"),
        (["train", "out=OUT", "train.batch=0"], "train.batch"),
        (["train", "out=OUT", "net.attention=[3]"], "attention names levels"),
        (["train", "out=OUT", "held_out=1797"], "cannot hold out"),
        (["train", "--config", "none.toml"], "does not exist"),
        (["sample", "OUT"], "does not exist: train one with"),
        (["sample", "RUN", "--label", "11"], "label 11 is out of range"),
        (["sample", "RUN", "--label", "x"], "no class is named 'x': this model knows the classes 0, 1, 2"),
        (["sample", "RUN", "net.width=3"], "fixed when the run was trained"),
        (["sample", "RUN", "sample.steps=0"], "sample.steps must be >= 1"),
        (["sample", "RUN", "sample.n=-4"], "sample.n must be >= 1"),
        (["sample", "RUN", "sampel.n=4"], "did you mean 'sample'"),
        (["sample", "RUN", "--out", "x.jpg"], "written as .png or .npy"),
        (["sample"], "Missing argument"),
        (["simple"], "No such command"),
        (["info", "nowhere"], "does not exist"),
        (["demo", "data=other.npz", "--out", "OUT"], "the demo is about the digits"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2_and_leave_nothing(words, message, run, tmp_path, trained):
    out = tmp_path / "out"
    words = [w.replace("OUT", str(out)).replace("RUN", str(trained)) for w in words]
    code, _, err = run(*words)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not out.exists()


def test_the_demo_does_not_overwrite_other_folders(run, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    code, _, err = run("demo", "--out", tmp_path)
    assert code == 2
    assert "not a run folder" in err
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_damaged_runs_are_refused_by_name(trained, run, tmp_path):
    import shutil

    for damage, message in [
        (lambda m: (m / "model.json").unlink(), "model.json is missing"),
        (lambda m: (m / "spectrum.safetensors").write_bytes(b"x"), "truncated or changed"),
        (lambda m: (m / "config.toml").write_text((m / "config.toml").read_text().replace("16", "17")), "was changed"),
        (lambda m: (m / "manifest.json").write_text("{"), "is damaged"),
        (lambda m: (m / "manifest.json").unlink(), "has no manifest.json"),
        (shutil.rmtree, "has no finished model"),
    ]:
        copy = tmp_path / "copy"
        shutil.copytree(trained, copy)
        damage(copy / "model")
        code, _, err = run("sample", copy)
        assert code == 2
        assert message in err
        shutil.rmtree(copy)


def test_a_full_disk_asks_to_try_again(run, monkeypatch, tmp_path):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    monkeypatch.setattr("undiffuse.train.files.save_file", full)
    code, _, err = run("train", f"out={tmp_path / 'run'}", *TINY)
    assert code == 75
    assert "disk is full" in err


def test_diverging_training_exits_1_and_names_the_level(run, tmp_path):
    code, _, err = run("train", f"out={tmp_path / 'run'}", *TINY, "train.lr=1e30", "train.clip=1e30")
    assert code == 1
    assert "not finite" in err
    assert err.count("\n") <= 2


def test_the_demo_runs_small(run, tmp_path):
    out = tmp_path / "demo"
    for _ in range(2):
        code, text, _ = run("demo", "--out", out, "--json", *TINY, "held_out=40")
        assert code == 0
    result = json.loads(text)
    assert set(result["table"]) == {"DDPM", "DDIM", "DPM-Solver++(2M)"}
    assert set(result["table"]["DDIM"]) == {"5", "10", "20", "50"}
    for name in ("samples.png", "denoising.gif", "report.html", "config.toml", "metrics.jsonl", "result.json"):
        assert (out / name).stat().st_size > 0
    report = (out / "report.html").read_text()
    assert not re.search("https?://", report)
    assert report.count("data:image/") == 5
    assert Image.open(out / "denoising.gif").n_frames > 20


def test_import_is_light():
    """The package brings in torch and nothing heavy; under a second beyond torch."""
    code = (
        "import torch, sys, time; t = time.perf_counter(); import undiffuse; d = time.perf_counter() - t\n"
        "heavy = {'numpy.random', 'matplotlib', 'pydantic', 'sklearn', 'typer', 'rich', 'PIL'} & set(sys.modules)\n"
        "heavy.discard('numpy.random')\nprint(d, sorted(heavy))"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    assert out.split(maxsplit=1)[1].strip() == "[]"


def test_certify_measures_every_solver_and_one(run):
    code, out, err = run("certify", "--json", "--std", "1,0.25")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["failed"] == []
    found = {s["name"]: s for s in facts["solvers"]}
    assert len(found) == len(cli.KINDS["solver"])
    assert found["unipc"]["measured"] == pytest.approx(3, abs=0.1)
    assert found["dpmpp-2m"]["kept"] == pytest.approx([1.0157, 1.0148], abs=1e-3)
    assert found["adaptive"]["kept"] is None
    code, out, _ = run("certify", "--json", "solver=ddim", "sample.steps=10", "grid=indexed", "schedule=ddpm")
    assert code == 0
    assert len(json.loads(out)["solvers"]) == 1


def test_certify_fails_a_solver_that_is_not_what_it_says(run, monkeypatch):
    from undiffuse import UniPC
    from undiffuse.solvers import SOLVERS

    class Boastful(UniPC):
        global_order = 5

    monkeypatch.setitem(SOLVERS, "boastful", Boastful)
    code, out, _ = run("certify", "solver=boastful")
    assert code == 1
    assert "FAILS" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["solver=dpmpp-4m"], "did you mean"),
        (["solver=ddim", "solver.order=3"], "unknown key solver.order"),
        (["net.width=3"], "certify needs no net"),
        (["--std", "1,big"], "--std must be numbers"),
        (["--std", "0"], "stds of the data must be > 0"),
        (["sample.steps=0"], "must be >= 1"),
        (["solver=unipc", "solver.eta=0.5"], "eta must be 0"),
        (["solver=runge-kutta", "solver.method=rk9"], "unknown Runge-Kutta method"),
        (["grid=restart", "sample.steps=1"], "needs levels around it"),
        (["grid=ays", "grid.model=sd3"], "grid.model"),
    ],
)
def test_certify_says_what_is_wrong(run, words, says):
    code, _, err = run("certify", *words)
    assert code == 2
    assert says in err
