"""The command line end to end: files, exit codes, one-line errors."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse import DPMpp2M, Model, Spectrum, cli, trace
from undiffuse.config import Config
from undiffuse.data import load_data
from undiffuse.model import assemble
from undiffuse.runfolder import find_run, shipped
from undiffuse.train.track import PACKAGES

TINY = ["net.width=16", "train.steps=6", "train.batch=16", "train.every=3", "train.warmup=0"]
TINY += ["eval.every=0", "track=none"]


NAMES = ("Sandal", "Bag", "T-shirt, top", "MU", "mu", "shirt", *"abcd")


def train_tiny(out, *words):
    argv, sys.argv = sys.argv, ["undiffuse", "train", f"out={out}", "--json", *TINY, *words]
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = argv
    assert stop.value.code == 0
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("runs") / "tiny", "eval.every=3", "track=auto")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A run with two snapshots, whose own average is of a length that they keep."""
    return train_tiny(tmp_path_factory.mktemp("runs") / "averaged", "train.snapshots=2", "ema.length=0.1")


def put_model(run, seed=0):
    """A folder with a finished model of digits with random weights and the classes NAMES."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = assemble(Config.resolve({"net": {"width": 16}}), Spectrum.measure(load_data("digits").x[:100]), 10)
        for parameter in model.denoiser.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    replace(model, names=NAMES).save(run / "model")
    return run


@pytest.fixture
def models(monkeypatch, tmp_path):
    """A package that brings the models glyphs and marks, called from an empty folder."""
    folder = tmp_path / "package" / "models"
    for seed, name in enumerate(("glyphs", "marks")):
        put_model(folder / name, seed)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("undiffuse.runfolder.SHIPPED", folder)
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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


def test_where_samples_go_is_checked_before_they_are_made(trained, run, monkeypatch, tmp_path):
    monkeypatch.setattr(Model, "sample", None)
    monkeypatch.setattr("undiffuse.cli.os.access", lambda path, mode: False)
    code, _, err = run("sample", trained, "--out", tmp_path / "new" / "x.png")
    assert code == 2
    assert f"there is no permission to write to {tmp_path}" in err
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["net.patch=0"], "UNet needs whole numbers"),
        (["net.width=10000000"], "this network does not fit in memory: {'kind': 'unet', 'width': 10000000"),
        (["net=dit", "net.depth=0"], "DiT needs whole numbers"),
        (["head=eps", "schedule=cosine"], "the Eps head cannot be trained"),
        (["variance=vlb"], "choose levels=uniform-time with levels.t_min=0.0004"),
        (["variance=hybrid", "schedule=iddpm", "schedule.T=4000", "variance.steps=30"], "(schedule.T), got 30"),
        (["head=eps", "variance=hybrid", "schedule=flow"], "the Eps head cannot be trained"),
        (["train.lr=1e300"], "train.lr = 1e+300 is out of range"),
        (["data=none.npz"], "does not exist"),
        (["held_out=1797"], "cannot hold out"),
        (["data=signals.npy", "augment=flip"], "augmentation takes only pictures"),
        (["data.flip=true", "augment=flip"], "mirrors every second picture without telling the network"),
        (["data.flip=true", "augment=geometric"], "augment=geometric is there to prevent"),
        (["engine.sharding=fsdp"], "Muon needs whole matrices, and FSDP shards them: use AdamW (optimiser=adamw)"),
        (["engine.sharding=fsdp", "optimiser=adamw", "train.precision=fp16"], "fp16 cannot be sharded"),
        (["engine.device=cuda"], "no CUDA device here"),
        (["track=trackio"], "track=trackio needs a package"),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry", "wet"])
def test_a_dry_run_refuses_what_training_refuses(words, says, dry, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(PACKAGES, "trackio", "no_such_package")
    np.save("signals.npy", np.random.default_rng(0).normal(size=(20, 1, 8)).astype("float32"))
    code, out, err = run("train", *dry, "out=OUT", "net.width=16", *words)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["signals.npy"]


@pytest.mark.parametrize(
    "words", [["data.flip=true"], ["data.flip=true", "augment=geometric", "augment.x_flip=false"], ["train.batch=auto"]]
)
def test_a_dry_run_says_yes_to_what_is_lawful(words, run, tmp_path):
    code, _, err = run("train", "--dry-run", f"out={tmp_path / 'OUT'}", "net.width=16", *words)
    assert code == 0, err
    assert list(tmp_path.iterdir()) == []


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
        (["train", "out=OUT", "held_out=1796"], "cannot hold out 1796 of 1797 samples: at least 2"),
        (["train", "--config", "none.toml"], "does not exist"),
        (["sample", "OUT"], "does not exist: train one with"),
        (["sample", "RUN", "--label", "11"], "label 11 is out of range"),
        (["sample", "RUN", "--label", "x"], "no class is named 'x': this model knows the classes 0, 1, 2"),
        (["sample", "RUN", "net.width=3"], "fixed when the run was trained"),
        (["sample", "RUN", "sample.steps=0"], "sample.steps must be >= 1"),
        (["sample", "RUN", "sample.n=-4"], "sample.n must be >= 1"),
        (["sample", "RUN", "sampel.n=4"], "did you mean 'sample'"),
        (["sample", "RUN", "--out", "x.jpg"], "written as .png or .npy"),
        (["sample", "RUN", "--out", "RUN/config.toml/x.png"], "config.toml is a file, not a folder"),
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
    config = Config.resolve()
    plan = trace(DPMpp2M(), config.build("grid")(config.build("schedule"), 20))
    stds = torch.tensor([1.0, 0.25], dtype=torch.float64)
    kept = plan.gaussian(stds**2).variance.sqrt() / stds
    assert found["dpmpp-2m"]["kept"] == pytest.approx(kept.tolist(), abs=1e-3)
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


FEW = ["sample.steps=2", "--json"]


def test_a_model_that_comes_along_is_sampled_by_name_and_not_written_to(models, run):
    before = contents(models)
    code, out, err = run("sample", "glyphs", "--class", "sandal", "-n", 4, *FEW)
    assert code == 0, err
    assert json.loads(out)["file"] == "samples/glyphs/seed0-sandal-dpmpp-2m-2-w2.png"
    assert list(contents(Path.cwd())) == [json.loads(out)["file"]]
    run("sample", "glyphs", "--label", "0", "-n", 4, "--out", "a.npy", *FEW)
    run("sample", "glyphs", "--class", "SANDAL", "-n", 4, "--out", "b.npy", *FEW)
    direct = Model.load(models / "glyphs").sample(4, 0, steps=2)
    assert np.array_equal(np.load("a.npy"), direct.numpy())
    assert np.array_equal(np.load("b.npy"), direct.numpy())
    assert contents(models) == before


def test_a_path_goes_before_a_run_of_that_name_and_this_before_what_comes_along(models, run):
    places = [models / "glyphs", Path("runs/glyphs"), Path("glyphs")]
    kept = []
    for seed, place in enumerate(places, 7):
        if place.parent != models:
            put_model(place, seed)
        assert find_run("glyphs") == place
        kept.append(Model.load("glyphs").sample(2, steps=2))
        assert torch.equal(kept[-1], Model.load(place).sample(2, steps=2))
        code, _, err = run("sample", "glyphs", "-n", 1, *FEW)
        assert code == 0, err
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[1], kept[2])
    pictures = {str(p.parent.relative_to(Path.cwd())) for p in Path.cwd().rglob("*.png")}
    assert pictures == {"samples/glyphs", "runs/glyphs/samples", "glyphs/samples"}
    assert find_run("marks") == models / "marks"
    assert find_run("runs/glyphs") == Path("runs/glyphs")


@pytest.mark.parametrize(("command", "words"), [("sample", FEW), ("info", []), ("sample", ["--out", "shards", *FEW])])
def test_names_of_no_model_list_those_that_come_along(models, run, command, words):
    assert shipped() == ("glyphs", "marks")
    assert find_run("glyph") is None
    code, _, err = run(command, "glyph", *words)
    assert code == 2
    assert "run folder glyph does not exist: did you mean 'glyphs'? train one with `undiffuse train out=glyph`" in err
    assert "models that come along: glyphs, marks" in err
    assert err.count("\n") == 1
    Path("glyphs").mkdir()  # which is nearer than the model of that name
    code, _, err = run(command, "glyphs", *words)
    assert code == 2
    assert "glyphs is no run folder" in err
    Path("runs/marks").mkdir(parents=True)
    Path("runs/marks/config.toml").touch()
    code, _, err = run(command, "marks", *words)
    assert code == 2
    assert "marks has no finished model: run its training command again" in err
    assert not Path("shards").exists()


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("glyhps", "'glyphs'"),
        ("MARKS", "'marks'"),
        ("lettres", "'letters'"),
        ("runs/leters", "'runs/letters'"),
        ("zz", ""),
    ],
)
def test_the_nearest_name_of_a_model_or_run_is_asked_about(models, run, command, name, hint):
    Path("runs/letters").mkdir(parents=True)
    Path("runs/letters/config.toml").touch()
    code, _, err = run(command, name)
    assert code == 2
    assert (f": did you mean {hint}? train one with" in err) if hint else ("did you mean" not in err)
    assert "  " not in err


def test_info_tells_of_a_model_by_name_and_of_all_that_come_along(models, run):
    code, out, _ = run("info", "marks", "--json")
    assert code == 0
    model = Model.load(models / "marks")
    facts = json.loads(out)
    assert (facts["run"], facts["parameters"], facts["classes"]) == ("marks", model.parameters, 10)
    assert facts["shape"] == [1, 8, 8]
    assert json.loads(run("info", "--json")[1])["models"] == ["glyphs", "marks"]
    assert "models: glyphs, marks" in run("info")[1]


def test_shards_by_name_are_those_of_the_models_folder(models, run):
    before = contents(models)
    for name, target in (("named", "marks"), ("told", models / "marks")):
        code, _, err = run("sample", target, "--class", "bag,Sandal", "-n", 5, "--shard", 2, "--out", name, *FEW)
        assert code == 0, err
    assert contents(Path("named")) == contents(Path("told"))
    assert len(list(Path("named").glob("*.safetensors"))) == 3
    assert contents(models) == before
    code, _, err = run("sample", "glyphs", "--class", "bag,Sandal", "-n", 5, "--shard", 2, "--out", "named", *FEW)
    assert code == 2
    assert "other settings: model was" in err


def test_a_model_that_comes_along_is_evaluated_by_name_and_not_written_to(models, run):
    before = contents(models)
    words = ["--features", "pixels", "--likelihood", 0, "--over-steps", "", "--over-w", "", "sample.steps=2"]
    code, out, err = run("evaluate", "glyphs", "-n", 60, *words, "--json")
    assert code == 0, err
    folder = Path(json.loads(out)["folder"])
    assert folder.parent == Path("evaluations/glyphs")
    assert (folder / "evaluation.json").is_file()
    assert contents(models) == before


@pytest.mark.parametrize(
    ("words", "classes"),
    [
        ("sandal", [0]),
        ("SANDAL, bag", [0, 1]),
        ("1,Sandal,1", [1, 0, 1]),
        ("t-SHIRT, Top", [2]),
        ("MU,mu", [3, 4]),
        ("each", list(range(10))),
    ],
)
def test_classes_are_named_in_small_letters_or_capitals_or_by_number(models, words, classes):
    assert list(Model.load("glyphs").cycle(words)) == classes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("Mu", "no class is named 'Mu': .*MU, mu"),
        ("sandle", "no class is named 'sandle': did you mean 'Sandal'"),
        ("SANDLE", "no class is named 'SANDLE': did you mean 'Sandal'"),
        ("bag,sandle", "no class is named 'sandle'"),
        ("t-shirt", "no class is named 't-shirt': did you mean 'T-shirt, top'"),
        ("10", "label 10 is out of range"),
        ("", "no class is named ''"),
    ],
)
def test_classes_that_a_model_does_not_know_are_refused(models, run, words, says):
    code, _, err = run("sample", "glyphs", "--class", words, *FEW)
    assert code == 2
    assert re.search(says, err)
    assert list(Path.cwd().iterdir()) == []


def test_the_average_of_a_length_that_was_kept_is_the_runs_own(averaged, run, tmp_path):
    own, rebuilt = Model.load(averaged), Model.load(averaged, ema=0.1)
    assert (own.ema, rebuilt.ema) == (None, 0.1)
    for mine, theirs in zip(rebuilt.denoiser.parameters(), own.denoiser.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
    short = Model.load(averaged, ema=0.05)
    assert any(
        not torch.allclose(a, b, atol=1e-5)
        for a, b in zip(short.denoiser.parameters(), own.denoiser.parameters(), strict=True)
    )
    code, out, err = run("sample", averaged, "-n", 2, "--ema", 0.05, *FEW)
    assert code == 0, err
    assert json.loads(out)["file"] == str(averaged / "samples" / "seed0-any-dpmpp-2m-2-ema0.05.png")
    code, _, _ = run("sample", averaged, "-n", 2, "--ema", 0.05, "--out", tmp_path / "x.npy", *FEW)
    assert np.array_equal(np.load(tmp_path / "x.npy"), short.sample(2, steps=2).numpy())


def test_shards_of_another_average_are_other_shards(averaged, run, tmp_path):
    words = ["-n", 4, "--shard", 2, "--out", tmp_path / "s", *FEW]
    code, _, err = run("sample", averaged, "--ema", 0.05, *words)
    assert code == 0, err
    (tmp_path / "s" / "shard-000001.safetensors").unlink()
    assert json.loads(run("sample", averaged, "--ema", 0.05, *words)[1])["remade"] == 1
    for other in ([], ["--ema", 0.1]):
        code, _, err = run("sample", averaged, *other, *words)
        assert code == 2
        assert "ema" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sample", "PLAIN", "--ema", 0.1], "has no snapshots to rebuild an average from: train with train.snapshots"),
        (["evaluate", "PLAIN", "--ema", 0.1], "has no snapshots"),
        (["sample", "glyphs", "--ema", 0.1], "glyphs comes along with one set of weights, the average power, length"),
        (["sample", "AVERAGED", "--ema", 0], r"ema.length must be in (0, 0.2887]"),
        (["sample", "AVERAGED", "--ema", 0.3], "a share of the run, got 0.3"),
        (["sample", "AVERAGED", "--ema", "nan"], "got nan"),
        (["sample", "AVERAGED", "--ema", 0.28], "2 snapshots of lengths 0.1, 0.05 cannot give an average"),
        (["sample", "AVERAGED", "--ema", "long"], "Invalid value for '--ema'"),
        (["evaluate", "samples.npy", "data=digits", "--ema", 0.1], "--ema and --dry-run are for runs"),
    ],
)
def test_averages_that_cannot_be_are_refused(words, says, models, trained, averaged, run):
    np.save("samples.npy", np.zeros((4, 1, 8, 8), np.float32))
    code, out, err = run(*({"PLAIN": trained, "AVERAGED": averaged}.get(word, word) for word in words))
    assert code == 2, out
    assert says in err
    assert err.count("\n") == 1
    assert [p.name for p in Path.cwd().iterdir()] == ["samples.npy"]


def test_damaged_snapshots_are_refused_by_name(averaged, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(averaged, copy)
    (copy / "averages" / "step-3" / "0.05.safetensors").write_bytes(b"x")
    assert run("sample", copy, "-n", 1, *FEW)[0] == 0
    code, _, err = run("sample", copy, "-n", 1, "--ema", 0.1, *FEW)
    assert code == 2
    assert "step-3" in err
    assert "0.05.safetensors" in err


def test_an_average_without_its_last_snapshot_is_refused(averaged, run, tmp_path):
    """Rather than given for an earlier step."""
    copy = tmp_path / "copy"
    shutil.copytree(averaged, copy)
    shutil.rmtree(copy / "averages" / "step-6")
    code, _, err = run("sample", copy, "-n", 1, "--ema", 0.1, *FEW)
    assert code == 2
    assert re.search("step-6 is missing, the snapshot with which .* end .it has those of steps 3.: put it back", err)


def test_a_rough_average_comes_with_a_warning(monkeypatch, averaged):
    from undiffuse.train import Snapshots

    exact = Snapshots.average
    monkeypatch.setattr(Snapshots, "average", lambda *a: (exact(*a)[0], exact(*a)[1]._replace(error=0.07)))
    with pytest.warns(UserWarning, match="average of length 0.1 to within 7 % only"):
        Model.load(averaged, ema=0.1)


@pytest.mark.parametrize("command", ["sample", "evaluate", "info"])
def test_a_home_that_there_is_not_is_one_line(run, command):
    code, _, err = run(command, "~nosuch/x")
    assert code == 2
    assert "'~nosuch/x' is neither a run folder" in err or "~nosuch/x does not exist" in err
    assert err.count("\n") == 1
