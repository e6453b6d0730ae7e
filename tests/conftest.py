"""Settings for all tests, and the command line as a function."""

import sys

import pytest
import torch
from hypothesis import settings

from undiffuse import cli

settings.register_profile("shared", deadline=None)  # no time limit on an example, since machines are shared
settings.load_profile("shared")


@pytest.fixture(autouse=True)
def seeded():
    """Draws without a seed of their own are the same in every run, whatever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture
def run(monkeypatch, capsys):
    """`undiffuse` with these words: its exit code, and what it printed on both streams."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["undiffuse", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr()
        return stop.value.code, out.out, out.err

    return call
