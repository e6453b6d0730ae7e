"""The README's tables say what the code says."""

import re
from pathlib import Path

import pytest
import torch

import undiffuse
from undiffuse import SOLVERS
from undiffuse.grid import GRIDS

README = Path(__file__).parents[1] / "README.md"
TRAINING = README.parent / "docs" / "training.md"


def rows():
    section = README.read_text().split("## Solvers\n")[1].split("\n## ")[0]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in cells}


def test_the_table_of_solvers_has_every_solver_once():
    assert list(rows()) == list(SOLVERS)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_orders_and_evaluations_are_the_solvers_own(name):
    call, order, calls, _ = rows()[name]
    solver = SOLVERS[name]()
    assert call.startswith(f"`{SOLVERS[name].__name__}(")
    assert re.search(rf"\b{solver.global_order}\b", order), (order, solver.global_order)
    found = re.search(r"\d+", calls)
    if found and "+" not in calls:
        assert int(found[0]) == solver.calls


def test_every_grid_is_named():
    text = README.read_text()
    assert all(f"`{name}`" in text for name in GRIDS)


def test_the_python_of_training_runs(monkeypatch, tmp_path):
    """Every block in the order of the page, as one program; its last model is a run that can be sampled."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", TRAINING.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    names = {}
    exec("\n".join(blocks), names)
    assert names["state"].step == 20
    assert names["fit"].error < 0.15
    before, after = undiffuse.load("digits"), undiffuse.load("runs/longer")
    assert after.sample(2, 3, steps=2).shape == (2, 1, 8, 8)
    pairs = list(zip(before.denoiser.parameters(), after.denoiser.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in pairs)


COMMANDS = re.findall(r"^undiffuse train (.*)$", TRAINING.read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_training_are_lawful(command, run, tmp_path):
    words = [word for word in command.split() if not word.startswith(("data=", "out="))]
    code, _, err = run("train", "--dry-run", f"out={tmp_path / 'run'}", *words)
    assert code == 0, err
