"""`Log`: metrics.jsonl of a run folder, and what is drawn and sent from it."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from undiffuse import plot
from undiffuse.config import Config
from undiffuse.train import Tracker, read_log, replace_text


class Log:
    """metrics.jsonl and what is drawn from it, written by the main process alone: one row a step, each step once."""

    def __init__(self, out: Path, config: Config, writes: bool) -> None:
        self.out, self.config, self.writes = out, config, writes
        self.path, self.rows = out / "metrics.jsonl", list[dict[str, Any]]()
        self.tracker: Tracker | None = None
        self.drawn = -math.inf

    def begin(self, step: int) -> None:
        """Keep the rows up to the step from which training goes on."""
        if not self.writes:
            return
        self.rows = [row for row in read_log(self.path) if row["step"] <= step]
        if self.path.exists():
            replace_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.tracker = Tracker(self.config.values["track"], self.out, self.rows, self.config.values)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, durably: a checkpoint may follow, which must not outlive it."""
        if not self.writes:
            return
        row = plain(row)
        self.rows.append(row)
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")
            f.flush()
            os.fsync(f.fileno())
        if self.tracker is not None:
            self.tracker.log(row)

    def watched(self, step: int) -> bool:
        """Whether the step's measurements are there."""
        return any(row["step"] == step and "eval" in row for row in self.rows)

    def draw(self, every: float = 0.0) -> None:
        """curves.png, unless it was drawn less than `every` seconds ago."""
        if self.writes and self.rows and time.monotonic() - self.drawn > every:
            plot.plot_curves(self.rows, self.out / "curves.png")
            self.drawn = time.monotonic()

    def close(self) -> None:
        if self.tracker is not None:
            self.tracker.close()


def plain(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
