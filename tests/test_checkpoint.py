"""Checkpoints: whole or absent under exceptions, full disks and kills; every kind of damage is found and named."""

import errno
import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from undiffuse import InputError
from undiffuse.train import Checkpoints, checkpoint, commit, verify

FULL = OSError(errno.ENOSPC, "No space left on device")


def write(text, files=("model.bin", "state.json")):
    """A writer of files that hold `text`."""

    def writer(folder):
        for name in files:
            (folder / name).write_text(f"{name} {text}")

    return writer


def tree(root):
    """Every file below `root` with its bytes, and every folder."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


def test_a_commit_is_complete_with_sizes_and_hashes(tmp_path):
    commit(tmp_path / "a" / "b", write("one"))
    manifest = json.loads((tmp_path / "a/b/manifest.json").read_text())
    assert {k: v["bytes"] for k, v in manifest.items()} == {"model.bin": 13, "state.json": 14}
    assert sorted(p.name for p in (tmp_path / "a").rglob("*")) == ["b", "manifest.json", "model.bin", "state.json"]
    verify(tmp_path / "a/b")


def test_a_commit_replaces_the_older_folder_whole(tmp_path):
    commit(tmp_path / "m", write("one", ("old.bin", "model.bin")))
    commit(tmp_path / "m", write("two", ("model.bin",)))
    verify(tmp_path / "m")
    assert sorted(tree(tmp_path)) == ["m", "m/manifest.json", "m/model.bin"]
    assert (tmp_path / "m/model.bin").read_text() == "model.bin two"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads the path of a descriptor")
def test_everything_is_flushed_before_the_rename_and_the_parent_after_it(tmp_path, monkeypatch):
    """A power cut keeps what was flushed alone: files, the manifest, the folder; then the rename; then the parent.

    Before all that, once: the names of the folders that lead there, whoever made them.
    """
    events, fsync, rename = [], os.fsync, Path.rename

    def note(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def move(self, target):
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", move)
    commit(tmp_path / "m", write("one"))
    way, events = events[: len(tmp_path.parents)], events[len(tmp_path.parents) :]
    assert way == [p.name for p in tmp_path.parents]
    *files, manifest, aside, renamed, parent = events
    assert sorted(files) == ["model.bin", "state.json"]
    assert (manifest, renamed, parent) == ("manifest.json", "rename", tmp_path.name)
    assert aside.endswith(".tmp")


def test_files_in_a_folder_inside_are_guarded_or_refused(tmp_path):
    def nested(folder):
        (folder / "shards").mkdir()
        (folder / "shards/0.bin").write_text("one")

    def change():
        commit(tmp_path / "m", nested)
        (tmp_path / "m/shards/0.bin").write_text("two")
        verify(tmp_path / "m")

    with pytest.raises(InputError):
        change()


def fail_in_the_writer(monkeypatch):
    def writer(folder):
        (folder / "model.bin").write_text("half")
        raise FULL

    return writer


def fail_in_the_manifest(monkeypatch):
    real = Path.write_text

    def text(self, data, *args, **kw):
        if self.name == "manifest.json":
            real(self, data[: len(data) // 2])
            raise FULL
        return real(self, data, *args, **kw)

    monkeypatch.setattr(Path, "write_text", text)
    return write("new")


def fail_in_fsync(monkeypatch):
    def fsync(descriptor):
        raise FULL

    monkeypatch.setattr(os, "fsync", fsync)
    return write("new")


def fail_in_the_rename(monkeypatch):
    real = Path.rename

    def rename(self, target):
        if self.name.endswith(".tmp"):
            raise FULL
        return real(self, target)

    monkeypatch.setattr(checkpoint, "_exchange", lambda a, b: False)
    monkeypatch.setattr(Path, "rename", rename)
    return write("new")


def fail_in_safetensors(monkeypatch):
    """What `save_file` raises where the disk is full is no OSError."""

    def writer(folder):
        (folder / "model.bin").write_text("half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    return writer


FAULTS = [fail_in_the_writer, fail_in_the_manifest, fail_in_fsync, fail_in_the_rename, fail_in_safetensors]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_half_written(fault, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, write("one"))
    before = tree(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        checkpoints.save(2, fault(patch))
    assert tree(tmp_path) == before
    assert checkpoints.latest() == (tmp_path / "step-1", [])
    checkpoints.save(2, write("two"))
    assert checkpoints.latest() == (tmp_path / "step-2", [])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_replacement_keeps_the_older_folder(fault, tmp_path, monkeypatch):
    commit(tmp_path / "model", write("one"))
    before = tree(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        commit(tmp_path / "model", fault(patch))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_exception_in_the_writer_leaves_nothing(error, tmp_path):
    def writer(folder):
        (folder / "model.bin").write_text("half")
        raise error

    with pytest.raises(error):
        commit(tmp_path / "m", writer)
    assert tree(tmp_path) == {}


def test_what_a_dead_process_left_is_ignored(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, write("three"))
    for name in (".step-9.123.tmp", f".step-4.{os.getpid()}.tmp", ".trash-1", "step-", "step-x", "step-5.old", "other"):
        shutil.copytree(tmp_path / "step-3", tmp_path / name)
    assert checkpoints.steps() == [3]
    assert checkpoints.latest() == (tmp_path / "step-3", [])
    checkpoints.save(4, write("four"))
    assert checkpoints.latest() == (tmp_path / "step-4", [])
    assert (tmp_path / "step-4/model.bin").read_text() == "model.bin four"


def test_the_next_save_clears_what_dead_processes_left(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, write("one"))
    for name in (f".step-2.{dead.pid}.tmp", f".step-1.{dead.pid}.old", ".trash-0"):
        shutil.copytree(tmp_path / "step-1", tmp_path / name)
    checkpoints.save(3, write("three"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-3"]


def test_the_next_save_clears_what_an_earlier_process_of_its_own_number_left(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, write("one"))
    shutil.copytree(tmp_path / "step-1", tmp_path / f".step-2.{os.getpid()}.tmp")
    checkpoints.save(3, write("three"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-3"]


def test_left_trash_does_not_stop_retirement(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, write("one"))
    shutil.copytree(tmp_path / "step-1", tmp_path / ".trash-1")
    for step in (2, 3):
        checkpoints.save(step, write(str(step)))
    assert checkpoints.steps() == [2, 3]


def test_an_old_folder_left_by_a_process_of_the_same_number_does_not_stop_a_commit(tmp_path):
    commit(tmp_path / "m", write("one"))
    shutil.copytree(tmp_path / "m", tmp_path / f".m.{os.getpid()}.old")
    commit(tmp_path / "m", write("two"))
    assert (tmp_path / "m/model.bin").read_text() == "model.bin two"


def test_other_errors_of_safetensors_stay_what_they_are(tmp_path):
    def writer(folder):
        raise SafetensorError("invalid header")

    with pytest.raises(SafetensorError, match="invalid header"):
        commit(tmp_path / "m", writer)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("exchange", [True, False])
def test_a_name_that_is_given_anew_is_never_without_a_folder(exchange, tmp_path, monkeypatch):
    """With an exchange of names in no moment; without, a kill between two renames leaves .old, which is put back."""
    if not exchange:
        monkeypatch.setattr(checkpoint, "_exchange", lambda a, b: False)
    checkpoints, seen = Checkpoints(tmp_path), []
    checkpoints.save(1, write("one"))
    fsync, rename = os.fsync, Path.rename

    def look():
        copy = tmp_path.parent / f"{tmp_path.name}-{len(seen)}"  # as a kill in this moment would leave it
        shutil.copytree(tmp_path, copy)
        seen.append((copy / "step-1").exists())
        assert Checkpoints(copy).latest() == (copy / "step-1", [])
        Checkpoints(copy).save(2, write("two"))
        assert Checkpoints(copy).steps() == [1, 2]

    def note(descriptor):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            patch.setattr(Path, "rename", rename)
            look()
        fsync(descriptor)

    def move(self, target):
        rename(self, target)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            patch.setattr(Path, "rename", rename)
            look()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", note)
        patch.setattr(Path, "rename", move)
        checkpoints.save(1, write("anew"))
    assert len(seen) > 4
    assert all(seen) == exchange
    assert sorted(tree(tmp_path)) == ["step-1", *(f"step-1/{n}" for n in ("manifest.json", "model.bin", "state.json"))]
    assert (tmp_path / "step-1/model.bin").read_text() == "model.bin anew"


def test_a_reader_removes_nothing_of_a_writer(tmp_path):
    """A process of another machine looks dead to a reader on this one."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, write("one"))
    shutil.copytree(tmp_path / "step-1", tmp_path / f".step-2.{2**22 + 1}.tmp")
    before = tree(tmp_path)
    assert checkpoints.latest() == (tmp_path / "step-1", [])
    assert tree(tmp_path) == before


def test_the_next_commit_clears_what_killed_ones_of_the_same_folder_left(tmp_path):
    commit(tmp_path / "m", write("one"))
    for name in (".m.4194305.tmp", ".m.4194305.old", ".other.4194305.tmp", ".m.x.tmp"):
        shutil.copytree(tmp_path / "m", tmp_path / name)
    commit(tmp_path / "m", write("two"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.x.tmp", ".other.4194305.tmp", "m"]


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of a text, a binary and an empty file."""

    def writer(folder):
        (folder / "state.json").write_text('{"step": 1}')
        (folder / "model.bin").write_bytes(random.Random(0).randbytes(5000))
        (folder / "empty.bin").touch()

    commit(tmp_path / "step-1", writer)
    return tmp_path / "step-1"


def named(folder, name):
    """The error of `verify`, which must name this file."""
    with pytest.raises(InputError) as caught:
        verify(folder)
    assert name in str(caught.value)
    return str(caught.value)


def test_every_flipped_bit_is_found(saved):
    generator = random.Random(1)
    for path in sorted(p for p in saved.iterdir() if p.stat().st_size):
        whole = path.read_bytes()
        places = range(len(whole)) if len(whole) < 1000 else [0, len(whole) - 1, *generator.sample(range(5000), 100)]
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << generator.randrange(8)
            path.write_bytes(damaged)
            named(saved, str(saved if path.name == "manifest.json" else path))
        path.write_bytes(whole)
    verify(saved)


@pytest.mark.parametrize("name", ["state.json", "model.bin", "manifest.json"])
def test_every_truncated_lengthened_emptied_or_deleted_file_is_found(saved, name):
    path = saved / name
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"}", bytes(len(whole))):
        path.write_bytes(damaged)
        named(saved, str(path))
    path.unlink()
    assert str(saved) in named(saved, name)
    if name != "manifest.json":
        path.mkdir()
        named(saved, str(path))


def test_a_file_that_was_empty_must_stay_empty(saved):
    (saved / "empty.bin").write_text("x")
    assert "1 bytes, 0 expected" in named(saved, "empty.bin")


@pytest.mark.parametrize(
    "text",
    [
        *["[]", "3", "null", '{"state.json": 3}', '{"state.json": {}}', '{"a": {"bytes": "x"}}'],
        *['{"state.json": {"bytes": 1e999, "sha256": ""}}', "[" * 100_000],
    ],
    ids=lambda text: text[:40],
)
def test_a_manifest_of_another_form_is_refused(saved, text):
    (saved / "manifest.json").write_text(text)
    named(saved, "manifest.json")


def test_a_manifest_that_leaves_files_out_is_refused(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    for keep in ([], ["model.bin"]):
        (saved / "manifest.json").write_text(json.dumps({k: manifest[k] for k in keep}))
        named(saved, "state.json" if keep else "is not listed")


@pytest.mark.parametrize("trick", ["../outside.bin", "sub/../../outside.bin", "..", ".", "", "/etc/hostname", "a\0b"])
def test_a_manifest_cannot_point_outside_its_folder(saved, trick):
    (saved.parent / "outside.bin").write_bytes((saved / "model.bin").read_bytes())
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps({**manifest, trick: manifest["model.bin"]}))
    named(saved, trick.replace("/", os.sep))


def test_a_name_that_no_file_can_have_is_damage(saved):
    (saved / "manifest.json").write_text(json.dumps({"x" * 300: {"bytes": 1, "sha256": ""}}))
    named(saved, "cannot be read")


def test_a_file_that_cannot_be_read_is_damage(saved, monkeypatch):
    """A failing sector gives EIO in the middle of a file: `latest` must go on to the one before."""
    checkpoints, real = Checkpoints(saved.parent), open
    checkpoints.save(2, write("two"))

    def failing(path, *args, **kw):
        if "step-2" in str(path) and str(path).endswith("model.bin"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, *args, **kw)

    monkeypatch.setattr("builtins.open", failing)
    folder, problems = checkpoints.latest()
    assert folder == saved
    assert "model.bin" in problems[0]


def test_latest_falls_back_and_reports(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert checkpoints.latest() is None
    for step in (9, 10, 11):
        checkpoints.save(step, write(str(step)))
    assert checkpoints.latest() == (tmp_path / "step-11", [])
    (tmp_path / "step-11/state.json").unlink()
    (tmp_path / "step-10/model.bin").write_text("model.bin xx")
    folder, problems = checkpoints.latest()
    assert folder == tmp_path / "step-9"
    assert ["step-11/state.json" in problems[0], "step-10/model.bin" in problems[1], len(problems)] == [True, True, 2]
    (tmp_path / "step-9/manifest.json").unlink()
    with pytest.raises(InputError, match=r"no checkpoint can be read: .*step-11.*step-10.*step-9"):
        checkpoints.latest()


def test_a_stray_file_with_the_name_of_a_checkpoint_is_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, write("one"))
    (tmp_path / "step-2").write_text("not a folder")
    assert checkpoints.latest()[0] == tmp_path / "step-1"


@pytest.mark.parametrize(("asked", "kept"), [(-1, 2), (0, 2), (1, 2), (2, 2), (4, 4)])
def test_the_newest_are_kept_and_at_least_two(tmp_path, asked, kept):
    checkpoints = Checkpoints(tmp_path, keep=asked)
    for step in (8, 9, 10, 11, 100):
        checkpoints.save(step, write(str(step)))
        verify(tmp_path / f"step-{step}")
    assert checkpoints.steps() == [8, 9, 10, 11, 100][-kept:]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"step-{n}" for n in checkpoints.steps())


def test_damaged_checkpoints_do_not_count_among_the_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, write("one"))
    checkpoints.save(9, write("nine"))
    (tmp_path / "step-9/model.bin").unlink()
    for step in (2, 3):
        checkpoints.save(step, write(str(step)))
    (tmp_path / "step-3/model.bin").unlink()
    assert checkpoints.latest()[0] == tmp_path / "step-2"


def save_for_ever(root, ledger):
    """Back-to-back saves, each noted in the ledger once it has returned."""
    checkpoints, parts = Checkpoints(root), [random.Random(i).randbytes(200_000) for i in range(3)]

    def writer(folder):
        for i, part in enumerate(parts):
            (folder / f"{i}.bin").write_bytes(part)

    newest = checkpoints.latest()
    with open(ledger, "a", buffering=1) as f:
        for step in itertools.count(1 + (int(newest[0].name[5:]) if newest else 0)):
            checkpoints.save(step, writer)
            f.write(f"{step}\n")


def test_a_kill_in_the_middle_of_saves_loses_nothing_committed(tmp_path):
    """15 kills at random moments: what `save` returned for is there, newer is whole, nothing needs a fallback."""
    context, generator = multiprocessing.get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(["tests.test_checkpoint"])
    root, ledger, torn = tmp_path / "checkpoints", tmp_path / "ledger", 0
    ledger.touch()
    for _ in range(15):
        size, process = ledger.stat().st_size, context.Process(target=save_for_ever, args=(root, ledger))
        process.start()
        while ledger.stat().st_size < size + 2:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(0.02 * generator.random())
        process.kill()
        process.join()
        folder, problems = Checkpoints(root).latest()
        newest, returned = int(folder.name[5:]), int(ledger.read_text().split()[-1])
        assert problems == []
        assert newest in (returned, returned + 1)
        torn += any(p.name.startswith(".") for p in root.iterdir())
        for p in root.glob(".*"):
            shutil.rmtree(p)
    assert torn > 0
