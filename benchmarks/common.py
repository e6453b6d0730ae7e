"""Shared by the benchmark commands: each writes its section of RESULTS.md."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("RESULTS.md")


def machine() -> str:
    """The machine in words: the numbers below hold for it."""
    cpu = next((line.split(":")[1].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")), "")
    threads = f"{torch.get_num_threads()} threads"
    return f"{cpu or platform.machine()}, {threads}, Python {platform.python_version()}, torch {torch.__version__}"


def _read(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(title: str, command: str, text: str) -> None:
    """Print the section and put it into RESULTS.md in place of the earlier one."""
    section = f"## {title}\n\n`{command}` ({machine()})\n\n{text.strip()}\n"
    old = (
        RESULTS.read_text()
        if RESULTS.exists()
        else "# Results\n\nEach section is written by the command that it names.\n"
    )
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.S | re.M)
    new = pattern.sub(lambda _: section + "\n", old) if pattern.search(old) else old.rstrip() + "\n\n" + section
    RESULTS.write_text(new.rstrip() + "\n")
    print(section)
