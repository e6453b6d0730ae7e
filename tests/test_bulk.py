"""Bulk sampling: the same bytes for every shard size, number of processes and interruption."""

import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file

from undiffuse import Model, Spectrum, cli, plot
from undiffuse.bulk import Maker, bulk, make, plan
from undiffuse.bulk.ray import _Actor, _error
from undiffuse.config import Config
from undiffuse.data import Statistics, load_data, open_source
from undiffuse.model import assemble
from undiffuse.train import Lost, NonFinite, replace_bytes, verify
from undiffuse.types import InputError

FAST = {"sample": {"steps": 2, "rows": 8}}
FORK = multiprocessing.get_context("fork")
N = 20
LOOSE = {"kind": "adaptive", "rtol": 0.1, "atol": 0.1, "first": 1.0}


def finished(run, x, classes=0, seed=0, **more):
    """The folder of a finished run: a model of data like x (n, *shape) with random weights, and what else it has."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = assemble(Config.resolve({"net": {"width": 16}}), Spectrum.measure(x), classes)
        for parameter in model.denoiser.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    replace(model, **more).save(run / "model")
    return run


@pytest.fixture(scope="module")
def digits():
    return load_data("digits").x[:100]


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    return finished(tmp_path_factory.mktemp("runs") / "tiny", digits, 10)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    x = torch.rand(40, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return finished(tmp_path_factory.mktemp("unlabelled") / "run", x)


@pytest.fixture(scope="module")
def nine(trained, tmp_path_factory):
    """A finished folder, not to be changed."""
    out = tmp_path_factory.mktemp("nine") / "s"
    bulk(trained, out, 9, "each", shard=3, settings=FAST)
    return out


@pytest.fixture(scope="module")
def twenty(trained, tmp_path_factory):
    """A finished folder, not to be changed."""
    out = tmp_path_factory.mktemp("twenty") / "s"
    bulk(trained, out, N, "each", shard=3, settings=FAST)
    return out


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


def joined(folder, key="x"):
    return torch.cat([load_file(p)[key] for p in sorted(Path(folder).glob("*.safetensors"))])


def child(work):
    """`work` in a process of its own, which ends with its exit code; as cheap as a fork."""

    def run():
        try:
            work()
        except SystemExit as stop:
            os._exit(stop.code or 0)
        os._exit(0)

    process = FORK.Process(target=run)
    process.start()
    return process


def command(*words):
    def work():
        sys.argv = ["undiffuse", *map(str, words)]
        cli.main()

    return work


@pytest.mark.parametrize("shard", [3, 8, 1000])
def test_shards_join_to_what_the_model_samples(trained, tmp_path, shard):
    report = bulk(trained, tmp_path / "s", N, "each", shard=shard, settings=FAST)
    labels = torch.arange(N) % 10
    assert (joined(tmp_path / "s") == Model.load(trained).sample(N, labels, steps=2, rows=8, batch=7)).all()
    assert (joined(tmp_path / "s", "label") == labels).all()
    count = -(-N // shard)
    assert (report.shards, report.written, report.kept, report.remade) == (count, count, 0, 0)
    verify(tmp_path / "s")
    ledger = [json.loads(line) for line in (tmp_path / "s" / "ledger.jsonl").read_text().splitlines()]
    assert [row["first"] for row in ledger] == list(range(0, N, shard))
    assert sum(row["n"] for row in ledger) == N
    assert [json.loads(p.read_text()) for p in sorted((tmp_path / "s").glob("shard-*.json"))] == ledger


def test_without_a_label_samples_are_unconditional(trained, unlabelled, tmp_path):
    bulk(trained, tmp_path / "a", 7, shard=2, settings=FAST)
    assert set(load_file(tmp_path / "a" / "shard-000000.safetensors")) == {"x"}
    assert (joined(tmp_path / "a") == Model.load(trained).sample(7, steps=2, rows=8)).all()
    bulk(unlabelled, tmp_path / "b", 7, shard=2, settings=FAST)
    assert joined(tmp_path / "b").shape == (7, 2, 8, 8)


@pytest.mark.parametrize("solver", ["ddpm", "sa-solver", LOOSE, "langevin", "dpmpp-2s-ancestral"])
def test_noise_and_steps_of_a_sample_are_its_own(trained, tmp_path, solver):
    for shard, batch in [(2, 1), (5, 256)]:
        settings = {"solver": solver, "sample": {"steps": 3, "rows": 2, "batch": batch}}
        bulk(trained, tmp_path / f"{shard}", 3, "3", shard=shard, settings=settings)
    assert (joined(tmp_path / "2") == joined(tmp_path / "5")).all()


def test_labels_follow_the_number_of_the_sample(trained, tmp_path):
    bulk(trained, tmp_path / "s", 11, "4,0,9", shard=4, settings=FAST)
    assert joined(tmp_path / "s", "label").tolist() == [(4, 0, 9)[k % 3] for k in range(11)]
    model = Model.load(trained)
    assert model.cycle("7") == (7,)
    assert model.cycle(None) == ()
    for label, message in [("10", "out of range"), ("-1", "out of range"), ("a", "no class is named 'a'"), ("", "''")]:
        with pytest.raises(InputError, match=message):
            model.cycle(label)


def test_the_same_call_again_does_nothing_and_another_batch_is_the_same_job(trained, twenty, tmp_path):
    out = shutil.copytree(twenty, tmp_path / "s")
    before, times = contents(out), {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    report = bulk(trained, out, N, "each", shard=3, settings=FAST)
    assert (report.written, report.kept, report.remade) == (0, 7, 0)
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == times
    (out / "shard-000002.json").unlink()  # a kill between the shard and its sidecar
    (out / "manifest.json").unlink()
    report = bulk(trained, out, N, "each", shard=3, settings={"sample": {**FAST["sample"], "batch": 2}})
    assert (report.written, report.kept, report.remade) == (1, 6, 0)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda s, j: s.write_bytes(s.read_bytes()[:-5]), "bytes instead of"),
        (lambda s, j: s.write_bytes(s.read_bytes()[:-1] + b"\x55"), "SHA-256"),
        (lambda s, j: s.unlink(), "gone"),
        (lambda s, j: j.write_bytes(j.read_bytes()[:20]), "shard-000001"),
        (lambda s, j: j.write_bytes(b"\xff\xfe"), "shard-000001"),
        (lambda s, j: shutil.copy(j.with_name("shard-000000.json"), j), "not of this job"),
    ],
)
def test_a_damaged_shard_is_named_and_made_again(trained, nine, tmp_path, damage, says):
    out = shutil.copytree(nine, tmp_path / "s")
    before = contents(out)
    damage(out / "shard-000001.safetensors", out / "shard-000001.json")
    assert contents(out) != before
    report = bulk(trained, out, 9, "each", shard=3, settings=FAST)
    assert (report.written, report.kept, report.remade) == (0, 2, 1)
    assert report.damaged[0].startswith("shard-000001.safetensors: ")
    assert says in report.damaged[0]
    assert contents(out) == before


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"n": 10}, "sample.n was 9, is 10"),
        ({"shard": 4}, "shard was 3, is 4"),
        ({"label": "1"}, "label was 'each', is '1'"),
        ({"label": None}, "guidance was .cfg., is not set"),
        ({"format": "png"}, "format was"),
        ({"threads": 2}, "threads was 1, is 2"),
        ({"settings": {**FAST, "solver": "ddim"}}, "solver was .dpmpp-2m., is .ddim."),
        ({"settings": {**FAST, "guidance": {"w": 3.0}}}, "guidance.w was 2.0, is 3.0"),
        ({"settings": {**FAST, "grid": "karras"}}, "grid was .uniform-lam., is .karras."),
        ({"settings": {"sample": {"steps": 2, "rows": 4}}}, "sample.rows was 8, is 4"),
        ({"settings": {"sample": {**FAST["sample"], "seed": 1}}}, "sample.seed was 0, is 1"),
    ],
)
def test_the_folder_of_a_job_with_other_settings_is_refused(trained, nine, change, names):
    given = {"n": 9, "label": "each", "shard": 3, "settings": FAST}
    before = contents(nine)
    with pytest.raises(InputError, match=names):
        bulk(trained, nine, **{**given, **change})
    assert contents(nine) == before


def test_samples_of_another_model_are_refused(trained, digits, tmp_path):
    bulk(trained, tmp_path / "s", 4, settings=FAST)
    other = finished(tmp_path / "other", digits, 10, seed=5)
    with pytest.raises(InputError, match="model was"):
        bulk(other, tmp_path / "s", 4, settings=FAST)
    job = plan(Model.load(other), other, tmp_path / "new")
    shutil.rmtree(other)
    shutil.copytree(trained, other)
    with pytest.raises(InputError, match="trained again"):
        Maker(job)


def test_folders_with_files_of_others_are_refused_and_left_alone(trained, tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for folder, message in [(out, "has thesis.txt"), (tmp_path / "file", "is a file"), (trained, "no file of a sampl")]:
        before = [p.name for p in folder.rglob("*")]
        with pytest.raises(InputError, match=message):
            bulk(trained, folder, 4, settings=FAST)
        assert [p.name for p in folder.rglob("*")] == before
    job = tmp_path / "job"
    bulk(trained, job, 4, shard=2, settings=FAST)
    for name in ("notes.txt", "shard-000002.json", "shard-000000.tar", "shard-000001.safetensors.bak"):
        (job / name).write_text("precious")
        with pytest.raises(InputError, match=name):
            bulk(trained, job, 4, shard=2, settings=FAST)
        assert (job / name).read_text() == "precious"
        (job / name).unlink()
    (job / "job.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        bulk(trained, job, 4, shard=2, settings=FAST)
    (job / "job.json").unlink()
    with pytest.raises(InputError, match="no file of a sampling job"):
        bulk(trained, job, 4, shard=2, settings=FAST)


def test_what_killed_processes_left_aside_goes_and_what_others_write_stays(trained, tmp_path):
    out = tmp_path / "s"
    bulk(trained, out, 4, shard=2, settings=FAST)
    dead = child(lambda: None)
    dead.join()
    names = [f".shard-000001.json.{socket.gethostname()}.{pid}.tmp" for pid in (dead.pid, os.getppid())]
    for name in [*names, ".mine", f".shard-000001.json.elsewhere.{dead.pid}.tmp"]:
        (out / name).write_text("half")
    bulk(trained, out, 4, shard=2, settings=FAST)
    assert not (out / names[0]).exists()
    assert {p.name for p in out.glob(".*")} == {names[1], ".mine", f".shard-000001.json.elsewhere.{dead.pid}.tmp"}


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(trained, tmp_path):
    out, n = tmp_path / "s", 60
    started = time.perf_counter()
    bulk(trained, tmp_path / "whole", n, "each", shard=2, settings=FAST)
    seconds, chance = time.perf_counter() - started, random.Random(1)
    kept, killed = [], 0
    for _ in range(10):
        process = child(lambda: bulk(trained, out, n, "each", shard=2, settings=FAST))
        process.join(chance.uniform(0.02, 0.4) * seconds)
        killed += process.is_alive()
        process.kill()
        process.join()
        for sidecar in out.glob("shard-*.json") if out.exists() else ():
            assert (
                sidecar.with_suffix(".safetensors").read_bytes()
                == contents(tmp_path / "whole")[sidecar.with_suffix(".safetensors").name]
            )
        kept.append(len(list(out.glob("shard-*.json"))) if out.exists() else 0)
    assert killed >= 3
    assert kept == sorted(kept)
    bulk(trained, out, n, "each", shard=2, settings=FAST)
    assert contents(out) == contents(tmp_path / "whole")
    verify(out)


def test_two_commands_on_one_folder_do_not_spoil_it(trained, tmp_path):
    bulk(trained, tmp_path / "one", 40, "each", shard=2, settings=FAST)
    words = ["sample", trained, "-n", 40, "--label", "each", "--shard", 2, "sample.steps=2", "sample.rows=8", "--json"]
    both = [child(command(*words, "--out", tmp_path / "two")) for _ in range(2)]
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_two_different_commands_on_one_folder_do_not_share_it(trained, tmp_path):
    words = ["sample", trained, "-n", 20, "--shard", 2, "sample.steps=2", "--json", "--out", tmp_path / "s"]
    both = [child(command(*words, f"sample.seed={seed}")) for seed in (1, 2)]
    for process in both:
        process.join(60)
    assert sorted(process.exitcode for process in both) == [0, 2]
    seed = 1 if both[0].exitcode == 0 else 2
    bulk(trained, tmp_path / "alone", 20, shard=2, settings={"sample": {"steps": 2, "seed": seed}})
    assert contents(tmp_path / "alone") == contents(tmp_path / "s")


def test_the_first_to_claim_a_folder_keeps_it_also_without_links(trained, tmp_path, monkeypatch):
    for text in (b"first", b"second"):
        replace_bytes(tmp_path / "job.json", text, keep=True)
    assert contents(tmp_path) == {"job.json": b"first"}

    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert bulk(trained, tmp_path / "s", 3, settings=FAST).written == 1
    verify(tmp_path / "s")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_it_at_once_with_what_is_finished(trained, tmp_path, number, code):
    words = ["sample", trained, "-n", 100_000, "--shard", 2, "--json", "--out", tmp_path / "s"]
    process = child(command(*words, "sample.steps=2", "sample.rows=8"))
    while not (tmp_path / "s" / "shard-000003.json").exists():
        assert process.is_alive()
        time.sleep(0.01)
    started = time.perf_counter()
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == code
    assert time.perf_counter() - started < 5
    first = Model.load(trained).sample(8, steps=2, rows=8)
    assert (
        torch.cat([load_file(tmp_path / "s" / f"shard-00000{i}.safetensors")["x"] for i in range(4)]) == first
    ).all()


def test_a_full_disk_exits_75_and_keeps_the_finished_shards(trained, tmp_path, run, monkeypatch):
    words = ["sample", trained, "-n", 12, "--shard", 3, "--out", tmp_path / "s", "--json", "sample.steps=2"]
    write = make.replace_bytes

    def full(path, data, **more):
        if path.name == "shard-000002.safetensors":
            raise OSError(28, "No space left on device", str(path))
        write(path, data, **more)

    monkeypatch.setattr(make, "replace_bytes", full)
    code, _, err = run(*words)
    assert code == 75
    assert "the disk is full" in err
    assert "shard-000002.safetensors" in err
    assert sorted(p.name for p in (tmp_path / "s").glob("shard-*.json")) == ["shard-000000.json", "shard-000001.json"]
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    code, _, err = run(*words)
    assert code == 75
    assert "shard-000002.safetensors" in err
    assert not list((tmp_path / "s").glob(".*"))
    monkeypatch.undo()
    code, out, _ = run(*words)
    assert (json.loads(out)["written"], json.loads(out)["kept"]) == (2, 2)


def test_samples_that_are_not_finite_are_not_written(trained, tmp_path, monkeypatch):
    def bad(self, n, *_, first=0, **__):
        x = torch.zeros(n, 1, 8, 8)
        x[torch.arange(first, first + n) == 5] = torch.nan
        return x

    monkeypatch.setattr(Model, "sample", bad)
    with pytest.raises(NonFinite, match="1 samples have NaN or infinite values, the first is 5, and shard 2"):
        bulk(trained, tmp_path / "s", 8, shard=2, settings=FAST)
    assert {p.name for p in (tmp_path / "s").glob("shard-*.json")} == {"shard-000000.json", "shard-000001.json"}
    with pytest.raises(NonFinite):
        bulk(trained, tmp_path / "t", 8, shard=8, settings=FAST)
    assert not (tmp_path / "t").exists()


def members(work, launcher="", meanwhile=lambda both: None):
    """The exit codes of two processes of one group, as a launcher starts them, each doing `work`; with `launcher`, as
    torchrun does."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def member(rank):
        def begin():
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
            os.environ.update(where, RANK=str(rank), WORLD_SIZE="2")
            if launcher:
                os.environ["TORCHELASTIC_RUN_ID"] = launcher
            PartialState._reset_state()  # what other tests in this process left
            work()

        return begin

    both = [child(member(rank)) for rank in range(2)]
    meanwhile(both)
    for process in both:
        process.join(60)
    return [process.exitcode for process in both]


@pytest.mark.parametrize("launcher", ["", "torchelastic"])
def test_a_failing_process_does_not_leave_the_others_waiting(trained, tmp_path, launcher, capfd):
    def work():
        make = Maker.make

        def full(self, index, count=None):
            if index == 3:
                raise OSError(errno.ENOSPC, "No space left on device", "shard-000003")
            return make(self, index, count)

        Maker.make = full
        command("sample", trained, "-n", 12, "--shard", 2, "sample.steps=2", "--json", "--out", tmp_path / "s")()

    assert members(work, launcher) == [75, 75]
    says = capfd.readouterr().err
    assert "the disk is full (shard-000003)" in says
    assert ("process 1 failed: " in says) == (not launcher)  # a launcher ends the others: no need to wait for them
    assert "the same command goes on where this one stopped" in says
    assert {p.name for p in (tmp_path / "s").glob("shard-*.json")} >= {"shard-000001.json"}
    assert not (tmp_path / "s" / "manifest.json").exists()


def test_a_process_that_waits_for_the_slowest_hears_a_signal(trained, tmp_path, capfd):
    def work():
        if os.environ["RANK"] == "1":
            Maker.make = lambda *_: time.sleep(60)
        command("sample", trained, "-n", 4, "--shard", 2, "sample.steps=2", "--json", "--out", tmp_path / "s")()

    def ask(both):
        while not (tmp_path / "s" / "shard-000000.json").exists():
            assert both[0].is_alive()
            time.sleep(0.01)
        time.sleep(0.1)  # by now it waits
        for process in both:
            assert process.is_alive()
            process.terminate()

    started = time.perf_counter()
    assert members(work, meanwhile=ask) == [75, 75]
    assert time.perf_counter() - started < 20
    assert "asked to end by signal 15; saved; the same command goes on" in capfd.readouterr().err


@pytest.mark.parametrize("launcher", ["", "torchelastic"])
def test_two_processes_write_what_one_writes(trained, twenty, tmp_path, launcher, capfd):
    words = ["sample", trained, "-n", N, "--label", "each", "--shard", 3, "sample.steps=2", "sample.rows=8", "--json"]
    assert members(command(*words, "--out", tmp_path / "two"), launcher) == [0, 0]
    assert contents(twenty) == contents(tmp_path / "two")
    facts = json.loads(capfd.readouterr().out)
    assert (facts["written"], facts["kept"], facts["n"]) == (7, 0, N)


def test_ray_writes_the_same_and_makes_up_for_a_worker_that_is_killed(trained, tmp_path, monkeypatch, capfd):
    pytest.importorskip("ray")
    n, shard = 400, 5
    words = ["sample", trained, "-n", n, "--label", "each", "--shard", shard, "--ray", "--workers", 2, "--json"]
    words += ["sample.steps=2", "sample.rows=8"]
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    process = child(command(*words, "--out", tmp_path / "ray"))
    while not (tmp_path / "ray" / "shard-000004.json").exists():
        assert process.is_alive(), capfd.readouterr().err
        time.sleep(0.01)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "MapWorker" in " ".join(p.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    assert not (tmp_path / "ray" / "manifest.json").exists()
    process.join(120)
    out, err = capfd.readouterr()
    assert process.exitcode == 0, err
    bulk(trained, tmp_path / "one", n, "each", shard=shard, settings=FAST)
    assert contents(tmp_path / "one") == contents(tmp_path / "ray")
    assert json.loads(out)["shards"] == n // shard


@pytest.mark.parametrize(
    ("error", "arrives"),
    [
        (NonFinite("3 samples"), NonFinite("3 samples")),
        (InputError("no"), InputError("no")),
        (OSError(28, "No space left on device"), OSError(28, "[Errno 28] No space left on device")),
        (ValueError("odd"), Lost("ValueError: odd")),
    ],
)
def test_an_error_in_an_actor_arrives_as_what_it_was(trained, tmp_path, monkeypatch, error, arrives):
    def fail(*_):
        raise error

    monkeypatch.setattr(Maker, "make", fail)
    row = _Actor(plan(Model.load(trained), trained, tmp_path / "s"))({"index": 0})
    assert not row["made"]
    found = _error(row)
    assert (type(found), found.args) == (type(arrives), arrives.args)


def test_without_ray_it_says_what_to_install(trained, tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run("sample", trained, "-n", 4, "--out", tmp_path / "s", "--ray")
    assert code == 2
    assert "pip install 'undiffuse[scale]'" in err
    assert not (tmp_path / "s").exists()


def test_png_shards_are_tars_of_images_named_by_number(trained, unlabelled, tmp_path):
    for name in "ab":
        bulk(trained, tmp_path / name, 5, "each", shard=2, format="png", settings=FAST)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    expected = plot.to_uint8(Model.load(trained).sample(5, torch.arange(5), steps=2, rows=8))
    seen = {}
    for path in sorted((tmp_path / "a").glob("*.tar")):
        with tarfile.open(path) as tar:
            seen |= {member.name: tar.extractfile(member).read() for member in tar}
    assert list(seen) == [f"{k:09d}.{suffix}" for k in range(5) for suffix in ("png", "cls")]
    for k in range(5):
        assert (np.asarray(Image.open(io.BytesIO(seen[f"{k:09d}.png"]))) == expected[k]).all()
        assert seen[f"{k:09d}.cls"] == str(k).encode()
    read = load_data(str(tmp_path / "a"))
    assert (plot.to_uint8(read.x) == expected).all()
    assert read.labels.tolist() == list(range(5))
    with pytest.raises(InputError, match="1 or 3 channels"):
        bulk(unlabelled, tmp_path / "c", 5, format="png", settings=FAST)


def test_progress_ends_at_all_samples_and_never_goes_back(trained, tmp_path):
    seen = []
    bulk(trained, tmp_path / "s", 10, shard=4, settings=FAST, progress=lambda there, n, rate: seen.append((there, n)))
    there = [t for t, _ in seen]
    assert there == sorted(there)
    assert seen[-1] == (10, 10)
    assert len(set(there)) > 5
    (tmp_path / "s" / "shard-000001.json").unlink()
    seen.clear()
    bulk(trained, tmp_path / "s", 10, shard=4, settings=FAST, progress=lambda there, n, rate: seen.append((there, n)))
    assert 6 < seen[0][0] < 10
    assert seen[-1] == (10, 10)


def test_the_command_tells_what_it_did(trained, tmp_path, run):
    words = ["sample", trained, "-n", 10, "--label", "each", "--shard", 4, "--out", tmp_path / "s", "sample.steps=2"]
    threads = torch.get_num_threads()
    code, out, _ = run(*words, "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["n"], facts["shards"], facts["written"], facts["kept"], facts["remade"]) == (10, 3, 3, 0, 0)
    assert facts["samples_per_second"] == pytest.approx(10 / facts["seconds"], rel=0.1)
    assert torch.get_num_threads() == threads
    (tmp_path / "s" / "shard-000001.safetensors").write_bytes(b"")
    code, out, err = run(*words)
    assert code == 0
    assert "10 samples in 3 shards, 0 new, 2 kept, 1 made again" in out
    assert "warning: made again: shard-000001.safetensors: 0 bytes instead of" in err
    code, out, _ = run("sample", trained, "-n", 7, "--out", tmp_path / "x.npy", "--json", "sample.steps=2")
    assert np.load(tmp_path / "x.npy").shape == (7, 1, 8, 8)
    code, out, _ = run("sample", trained, "-n", 7, "--dry-run", "--json", "--out", tmp_path / "never")
    assert json.loads(out)["sample"]["n"] == 7
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-n", "0"], "sample.n must be >= 1, got 0"),
        (["-n", "4", "sample.n=5"], "differ"),
        (["--shard", "0"], ">= 1"),
        (["--threads", "0"], ">= 1"),
        (["--workers", "2"], "workers are Ray's"),
        (["--ray", "--workers", "0"], "workers are Ray's"),
        (["sample.rows=0"], "sample.rows >= 1"),
        (["--format", "jpg"], "unknown format 'jpg'"),
        (["--device", "tpu"], "not to be had"),
        (["--label", "10"], "out of range"),
        (["--label", "each,a"], "no class is named 'a'"),
        (["net.width=3"], "fixed when the run was trained"),
        (["grid=restart", "sample.steps=1"], "needs levels around it"),
        (["--out", "x.png", "--shard", "3"], "are for shards"),
        (["--out", "x.png", "--ray"], "are for shards"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(trained, tmp_path, run, words, says):
    code, _, err = run("sample", trained, "--out", tmp_path / "s", *words)
    assert code == 2
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_labels_need_a_model_with_classes(unlabelled, tmp_path, run):
    for label in ("each", "1"):
        code, _, err = run("sample", unlabelled, "-n", 4, "--label", label, "--out", tmp_path / "s")
        assert code == 2
        assert "trained without labels" in err
    with pytest.raises(InputError, match="fixed when the run was trained"):
        bulk(unlabelled, tmp_path / "s", settings={"net": {"width": 3}})
    with pytest.raises(InputError, match="unknown engine"):
        bulk(unlabelled, tmp_path / "s", 3, engine="spark")
    assert not (tmp_path / "s").exists()


def test_ray_under_torchrun_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="Ray spreads the work by itself"):
        bulk(trained, tmp_path / "s", 3, engine="ray", settings=FAST)
    assert issubclass(Lost, RuntimeError)


NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag, leather", "ankle boot")


@pytest.fixture(scope="module")
def named(digits, tmp_path_factory):
    return finished(tmp_path_factory.mktemp("named") / "run", digits, 10, names=NAMES)


@pytest.mark.parametrize(
    ("label", "classes"),
    [
        ("sandal", (5,)),
        ("t-shirt, ankle boot,2", (0, 9, 2)),
        ("shirt,0,each", (6, 0, *range(10))),
        ("bag, leather", (8,)),
    ],
)
def test_classes_are_named_in_one_file_and_in_shards(named, tmp_path, run, label, classes):
    words = ["sample", named, "-n", 7, "--label", label, "--json", "sample.steps=2", "sample.rows=8", "--out"]
    assert run(*words, tmp_path / "x.npy")[0] == 0
    assert run(*words, tmp_path / "s")[0] == 0
    labels = [classes[k % len(classes)] for k in range(7)]
    assert joined(tmp_path / "s", "label").tolist() == labels
    expected = Model.load(named).sample(7, labels, steps=2, rows=8)
    assert (torch.from_numpy(np.load(tmp_path / "x.npy")) == expected).all()
    assert (joined(tmp_path / "s") == expected).all()


def test_a_class_by_name_or_number_is_the_same_job(named, tmp_path):
    bulk(named, tmp_path / "s", 4, "sandal,coat", shard=2, settings=FAST)
    assert bulk(named, tmp_path / "s", 4, "5,4", shard=2, settings=FAST).kept == 2


@pytest.mark.parametrize("out", ["s", "x.npy"])
def test_an_unknown_class_is_answered_with_the_known_and_the_nearest(named, tmp_path, run, out):
    code, _, err = run("sample", named, "--label", "coat,sandals", "--out", tmp_path / out)
    assert code == 2
    assert "no class is named 'sandals': did you mean 'sandal'? this model knows the classes t-shirt, trouser" in err
    assert "or 0 ... 9" in err
    assert not (tmp_path / out).exists()


def test_a_file_of_samples_without_a_name_of_its_own_has_no_separators_of_its_classes(named, run):
    code, out, _ = run("sample", named, "-n", 1, "--label", "bag, leather", "--json", "sample.steps=2")
    assert code == 0
    assert Path(json.loads(out)["file"]).name == "seed0-bag_leather-dpmpp-2m-2-w2.png"


@pytest.fixture(scope="module")
def counted(digits, tmp_path_factory):
    """A model of pictures with values from 0 to 16, which were normalised."""
    scale = Statistics((8.0,), (4.0,), (1, 8, 8), 100, 0.0, 16.0)
    return finished(tmp_path_factory.mktemp("counted") / "run", digits, 10, scale=scale)


def test_samples_of_normalised_data_have_its_range_in_one_file_and_in_shards(trained, counted, tmp_path, run):
    words = ["-n", 4, "--label", "each", "--json", "sample.steps=2", "sample.rows=8", "--out"]
    for name in ("x.npy", "s"):
        assert run("sample", counted, *words, tmp_path / name)[0] == 0
    expected = 8 * Model.load(trained).sample(4, range(4), steps=2, rows=8) + 8
    assert torch.allclose(torch.from_numpy(np.load(tmp_path / "x.npy")), expected)
    assert torch.allclose(joined(tmp_path / "s"), expected)


def test_pictures_of_normalised_data_reach_from_its_lowest_to_its_highest_value(counted, trained, tmp_path, run):
    model = Model.load(counted)
    x = model.sample(4, range(4), steps=2, rows=8)
    shown = plot.to_uint8(x / 8 - 1)
    assert 0 < shown.mean() < 255
    assert (plot.to_uint8(model.shown(x)) == shown).all()
    words = ["-n", 4, "--label", "each", "sample.steps=2", "sample.rows=8", "--out"]
    assert run("sample", counted, *words, tmp_path / "s", "--format", "png")[0] == 0
    assert (plot.to_uint8(load_data(str(tmp_path / "s")).x) == shown).all()
    assert run("sample", counted, *words, tmp_path / "x.png")[0] == 0
    plot.save_png(x / 8 - 1, tmp_path / "expected.png", columns=4)
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    within = replace(model, scale=Statistics((0.1,), (0.4,), (1, 8, 8), 100, -0.9, 1.0))
    assert within.shown(x) is x
    assert Model.load(trained).shown(x) is x


def test_shards_of_samples_are_data(trained, tmp_path, run, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(plot, "plot_curves", lambda *_: None)  # which takes most of the time
    out = tmp_path / "shards"
    bulk(trained, out, 40, "each", shard=8, settings=FAST)
    x, labels = joined(out), joined(out, "label")
    source = open_source(str(out))
    assert (source.counts, source.classes, source.columns) == ((8,) * 5, tuple("0123456789"), ())
    read = [source.read(i) for i in range(40)]
    assert all(np.array_equal(raw.x, x[i].numpy()) for i, raw in enumerate(read))
    assert [raw.label for raw in read] == labels.tolist()
    one = load_data(str(out / "shard-000001.safetensors"))
    assert torch.equal(one.x, x[8:16])
    assert torch.equal(one.labels, labels[8:16])
    words = ["train", f"data={out}", "train.steps=2", "train.batch=8", "net.width=16", "eval.every=0", "track=none"]
    code, said, err = run(*words, f"out={tmp_path / 'run'}", "--json")
    assert code == 0, err
    assert json.loads(said)["steps_run"] == 2
    assert Model.load(tmp_path / "run").classes == 10


def test_shards_without_labels_are_data_without_classes(trained, tmp_path):
    bulk(trained, tmp_path / "s", 5, shard=2, settings=FAST)
    source = open_source(str(tmp_path / "s"), cache=tmp_path / "cache")
    assert (source.counts, source.classes, source.read(4).label) == ((2, 2, 1), (), None)


def test_unfinished_or_damaged_samples_are_no_data(nine, tmp_path):
    out = shutil.copytree(nine, tmp_path / "s")
    shard = out / "shard-000001.safetensors"
    content = shard.read_bytes()
    for damage, says in [(content[:-1], f"has {len(content) - 1} bytes, not {len(content)}"), (None, "is missing")]:
        shard.unlink() if damage is None else shard.write_bytes(damage)
        with pytest.raises(InputError, match=f"shard-000001.safetensors {says}: run its `undiffuse sample` command"):
            open_source(str(out), cache=tmp_path / "cache")
    shard.write_bytes(content)
    assert len(open_source(str(out), cache=tmp_path / "cache")) == 9
    (out / "ledger.jsonl").write_text("{")
    with pytest.raises(InputError, match=r"ledger.jsonl is damaged"):
        open_source(str(out), cache=tmp_path / "cache")
    (out / "ledger.jsonl").unlink()
    with pytest.raises(InputError, match="not finished: run its"):
        open_source(str(out), cache=tmp_path / "cache")
