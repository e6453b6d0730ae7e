"""Trackers: what metrics.jsonl says, also shown by TensorBoard, Weights & Biases or trackio (through accelerate)."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from undiffuse.types import InputError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
TRACKERS = ("auto", "none", *PACKAGES)


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row of the log under names that trackers group by, without the lists."""
    out: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "step":
            out[f"{prefix}{key}"] = value
    for b in row.get("bins", ()):
        loss, reference = ("mse", "linear") if "mse" in b else ("loss", "prior")
        out[f"{prefix}relative error/lam {b['lam']:+.1f}"] = b[loss] / b[reference]
    return out


def find_tracker(kind: str) -> str:
    """The tracker that `kind` means here; InputError for an unknown or missing one."""
    if kind == "auto":
        return "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
    if kind != "none" and kind not in PACKAGES:
        raise InputError(f"track={kind!r} is not known: auto, none, {', '.join(PACKAGES)}")
    if kind != "none" and importlib.util.find_spec(PACKAGES[kind]) is None:
        raise InputError(f"track={kind} needs a package: pip install {PACKAGES[kind]}; or give track=none")
    return kind


class Tracker:
    """Sends rows of the log to the tracker named `kind`: auto (TensorBoard where installed), none, or one of PACKAGES.

    TensorBoard's files are written anew from the log when a run goes on, so that they hold each step once. Raises
    InputError for an unknown or missing tracker.
    """

    def __init__(self, kind: str, out: Path, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
        self.inner: Any = None
        kind = find_tracker(kind)
        if kind == "none":
            return
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's trackers ask it which process is the main one
        make = LOGGER_TYPE_TO_CLASS[kind]
        if kind == "tensorboard":
            logs = out / "logs" / "tensorboard"
            shutil.rmtree(logs, ignore_errors=True)
            self.inner = make("tensorboard", logging_dir=str(out / "logs"))
        else:
            self.inner = make(out.name, **({"dir": str(out)} if kind == "wandb" else {}))
        self.inner.start()
        if kind == "tensorboard":
            for row in rows:
                self.log(row)
        else:
            self.inner.store_init_configuration(dict(settings))

    def log(self, row: Mapping[str, Any]) -> None:
        """Send one row; its `step` is the tracker's."""
        if self.inner is not None:
            self.inner.log(flat(row), step=int(row["step"]))

    def close(self) -> None:
        """Write out what is still in memory."""
        if self.inner is not None:
            self.inner.finish()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a line torn by a full disk or a kill is left out."""
    rows = []
    for line in path.read_bytes().decode(errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, KeyError, TypeError):
            continue
        rows.append(row)
    return rows
