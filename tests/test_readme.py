"""The README's tables say what the code says."""

import re
from pathlib import Path

import pytest

from undiffuse import SOLVERS
from undiffuse.grid import GRIDS

README = Path(__file__).parents[1] / "README.md"


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
