"""Faults of `benchmarks/faults.py`, fewer of each; and defects planted on purpose, which they must find."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import faults

from undiffuse.train import Checkpoints, checkpoint

flush, put = checkpoint.flush, checkpoint._put


@pytest.mark.parametrize("again", [False, True], ids=["a new step each", "each step twice"])
def test_a_kill_loses_nothing_that_was_reported(tmp_path, again):
    kills = faults.kill_saves(tmp_path, 10, again)
    assert (kills.bad, kills.fell_back) == (0, 0)
    assert kills.torn > 0  # most fall into a save


def test_every_damage_is_found_named_and_passed_over(tmp_path):
    results = faults.damage(tmp_path, share=0.03)
    assert all(r.asked == r.found == r.named == r.fell_back > 3 for r in results.values()), results
    assert len(results) == 5
    assert results["one bit flipped"].asked > 150


def test_damages_find_a_check_of_sizes_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "sha256", lambda path: "0" * 64)
    results = faults.damage(tmp_path, share=0.03)
    assert results["truncated"].found == results["truncated"].asked
    assert 0 < results["one bit flipped"].found < results["one bit flipped"].asked


def test_damages_find_a_check_of_listed_files_alone(tmp_path, monkeypatch):
    real = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: () if self.name == "step-2" else real(self, pattern))
    monkeypatch.setattr(faults, "damages", lambda folder, share: [("foreign file", folder / "foreign.bin", b"x")])
    assert vars(faults.damage(tmp_path)["foreign file"]) == {"asked": 1, "found": 0, "named": 0, "fell_back": 0}


def test_a_power_cut_loses_nothing_that_was_reported(tmp_path):
    result = faults.power_cuts(tmp_path, limit=8)
    assert result.bad == []
    assert result.moments > 90
    assert result.states > 300


def test_a_power_cut_between_two_renames_loses_nothing(tmp_path, monkeypatch):
    """Where names cannot be exchanged, an older folder is moved away first and put back after a cut."""
    monkeypatch.setattr(checkpoint, "_exchange", lambda a, b: False)
    assert faults.power_cuts(tmp_path, limit=4).bad == []


def without_flush(*suffixes):
    """A commit that leaves out some of its flushes."""
    return {"flush": lambda path: None if path.name.endswith(suffixes) else flush(path)}


def delete_before_rename(aside, folder, old):
    """Replace a folder by first deleting it."""
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def rename_before_flush(folder, write):
    """Manifest first: the files are flushed once they have their name."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder)
    files = sorted(p for p in folder.iterdir() if p.name != checkpoint.MANIFEST)
    manifest = {p.name: {"bytes": p.stat().st_size, "sha256": checkpoint.sha256(p)} for p in files}
    for path in (folder / checkpoint.MANIFEST, *files, folder, folder.parent):
        if path.name == checkpoint.MANIFEST:
            path.write_text(json.dumps(manifest))
        flush(path)


def save_in_place_for_ever(root, pipe, again):
    checkpoint.commit = rename_before_flush  # in the process that is to be killed
    faults.save_for_ever(root, pipe, again)


def test_kills_find_saves_in_place(tmp_path):
    kills = faults.kill_saves(tmp_path, 6, True, save_in_place_for_ever)
    assert kills.bad + kills.fell_back > 0


PLANTED = {
    "no flush of the manifest": without_flush(checkpoint.MANIFEST),
    "no flush of the weights": without_flush(".safetensors"),
    "no flush of the folder aside": without_flush(".tmp"),
    "no flush of the rename": without_flush("checkpoints"),
    "no flush of the way there": {"_anchor": lambda folder: None},
    "deleted before the rename": {"_put": delete_before_rename},
    "manifest first, in place": {"commit": rename_before_flush},
    "two renames and nothing put back": {"_exchange": lambda a, b: False, "_restore": lambda parent, name: None},
}


@pytest.mark.parametrize("planted", PLANTED)
def test_power_cuts_find_planted_defects(tmp_path, monkeypatch, planted):
    for name, function in PLANTED[planted].items():
        monkeypatch.setattr(checkpoint, name, function)
    assert faults.power_cuts(tmp_path, limit=8, first=True).bad


def test_power_cuts_find_that_the_older_are_retired_too_early(tmp_path, monkeypatch):
    real = Checkpoints.save

    def save(self, step, write):
        for old in self.steps()[:-1]:
            shutil.rmtree(self.root / f"step-{old}")
        real(self, step, write)

    monkeypatch.setattr(Checkpoints, "save", save)
    assert "1 sound checkpoints, 2 wanted" in faults.power_cuts(tmp_path, limit=8, first=True).bad[0]


def test_a_full_disk_gives_exit_75_and_the_same_command_goes_on(tmp_path):
    results = faults.disk_full(tmp_path, [0, 300_000])
    if isinstance(results, str):
        pytest.skip(results)
    nothing, some = results
    assert [r.code for r in results] == [75, 75]
    assert all(r.intact and r.resumed for r in results)
    assert (nothing.steps, some.steps) == ([], [2])
    assert all(r.said.startswith("error: the disk is full") for r in results)


def test_bounds_are_the_rule_of_three():
    assert faults.bound(0, 200) == pytest.approx(1 - 0.05 ** (1 / 200), rel=1e-9)
    assert faults.bound(1, 20) == pytest.approx(0.2161, abs=1e-4)  # Clopper and Pearson, one side
    assert faults.bound(20, 20) == 1
