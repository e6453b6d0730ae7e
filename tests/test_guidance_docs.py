"""The table of guidance says what the code says."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from undiffuse import GUIDES

DOC = Path(__file__).parents[1] / "docs" / "guidance.md"
ROWS = {r[0].strip(" `"): [c.strip() for c in r[1:]] for r in
        (line.split("|")[1:-1] for line in DOC.read_text().splitlines() if line.startswith("| `"))}  # fmt: skip


def test_every_kind_has_its_row():
    assert list(ROWS) == list(GUIDES)


@pytest.mark.parametrize("name", GUIDES)
def test_settings_are_those_of_the_kind(name):
    called, _, settings, _ = ROWS[name]
    assert called == f"`{GUIDES[name].__name__}`"
    known = {f.name for f in fields(GUIDES[name])}
    named = {word.split("=")[0] for word in re.findall(r"`([^`]+)`", settings)}
    assert named <= known
    left = known - named - {"lam_min", "lam_max", "lams", "weak", "classifier"}
    assert not left, left
