"""Where runs are found, and what any run's folder has: a model that verifies, averages, a fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path

from torch import nn

from undiffuse.config import Config
from undiffuse.train import MANIFEST, Snapshots, load_weights, verify
from undiffuse.types import InputError, did_you_mean

SHIPPED = Path(__file__).parent / "models"


def shipped() -> tuple[str, ...]:
    """The names of the models that come with the package; recipes/models.py trains them."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob("*/model")))


def _expanded(target: str | Path) -> Path:
    """The path with ~ replaced, where there is such a home."""
    return Path(os.path.expanduser(target))


def find_run(target: str | Path) -> Path | None:
    """The run folder that is meant: the path itself, else runs/NAME, else the model NAME that comes along; or None."""
    here = _expanded(target)
    for path in (here,) if here.exists() else (Path("runs") / target, SHIPPED / target):
        if (path / "model").is_dir() or (path / "config.toml").is_file():
            return path
    return None


def comes_along(run: Path) -> bool:
    """Whether the run folder is that of a model that comes with the package."""
    return run.resolve().parent == SHIPPED.resolve()


def nearest_run(target: str | Path) -> str:
    """Which name of a model that comes along, or of a run in runs/, may have been meant, as a question; else ""."""
    runs = [config.parent for config in Path("runs").glob("*/config.toml")]
    return did_you_mean(str(target), [*shipped(), *(run.name for run in runs), *map(str, runs)])


def run_folder(run: str | Path) -> Path:
    """The folder that `find_run` finds; InputError where there is none."""
    found = find_run(run)
    if found is None and not _expanded(run).exists():
        todo = (
            f"train one with `undiffuse train out={run}`, or take one of the models that come along: "
            f"{', '.join(shipped())}"
        )
        raise InputError(f"run folder {run} does not exist: " + f"{nearest_run(run)} {todo}".lstrip())
    if found is None:
        raise InputError(f"{run} is no run folder: train one with `undiffuse train out=FOLDER`")
    return found


def finished(run: str | Path) -> tuple[Path, Path]:
    """A run's folder, and in it the folder of its model, which verifies; InputError where there is none."""
    found = run_folder(run)
    if not (found / "model").is_dir():
        raise InputError(f"{run} has no finished model: run its training command again, it goes on where it stopped")
    verify(found / "model")
    return found, found / "model"


def take_average(module: nn.Module, run: Path, config: Config, ema: float | None, until: float = 1.0) -> float:
    """Give the module the average of this length, or of the run's own, which it returns, after the share `until` of the
    training or the snapshot nearest to it; rebuilt from the run's snapshots, with a warning where it is not near."""
    snapshots, end = Snapshots(run / "averages"), config.section("train").steps
    length = config.values["ema"].get("length") if ema is None else ema
    if length is None:
        raise InputError(f"{run} has an average of no length: say which, such as ema=0.1")
    if until < 1:
        end = min(snapshots.steps(), key=lambda step: abs(step - until * end), default=end)
    state, fit = snapshots.average(length, end)
    load_weights(module, state)
    if fit.error > 0.02:
        there = f"the run's snapshots give the average of length {length:g} to within {100 * fit.error:.0f} % only"
        warnings.warn(f"{there}: train with more of them", stacklevel=3)
    return float(length)


def average_file(config: Config) -> str:
    """The name of the file with a model's averaged weights."""
    return f"ema-{'-'.join(str(value) for value in config.values['ema'].values())}.safetensors"


def fingerprint(run: str | Path) -> str:
    """The hash of a finished model's hashes."""
    manifest = json.loads((Path(run) / "model" / MANIFEST).read_text())
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
