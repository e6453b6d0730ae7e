"""What the command line's words mean: a run with the data that it was trained on, or samples and data to judge by."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from undiffuse.config import Config
from undiffuse.data import Data, Subset, materialise, open_source
from undiffuse.data.source import choice
from undiffuse.rundata import RunData, about_of
from undiffuse.types import InputError


def data_of_run(config: Config, run: Path, n: int) -> tuple[Data, Data]:
    """(training samples or a part of them, at least n held-out ones) of a run, as its model reads them.

    More than the run held out are there only where the data have a test split of their own. Raises InputError where
    the data are not there or have changed since.
    """
    config = Config({**config.values, "out": str(run)}, config.given | {"held_out"})
    try:
        data = RunData.of(config)
    except InputError as error:
        name = config.values["data"]["name"]
        raise InputError(f"the data of {run}, data={name}, cannot be read from this folder: {error}") from error
    if (run / "data.json").is_file() and not about_of(run, data.fingerprint):
        raise InputError(
            f"{data.source.name} has changed since {run} was trained: it can be judged by the same data only"
        )
    if n > len(data.held_out) and data.source.test is not None:
        data = RunData.of(Config({**config.values, "held_out": n}, config.given))
    if n > len(data.held_out):
        raise InputError(f"-n {n}: {run} held out {len(data.held_out)} samples of {data.source.name}, ask for as many")
    return _enough(data, n or len(data.held_out)), data.held_out


def _enough(data: RunData, n: int) -> Data:
    """The training samples in memory; of large data, where these are few, n of them."""
    n = min(n, len(data.source))
    if len(data.train) >= n:
        return data.train
    part = Subset(data.source, choice(data.source, n), data.source.name)
    return materialise(part, data.prepare, data.conditions.reader)


def data_of_samples(target: str, layer: Mapping[str, Any], n: int) -> tuple[Data, Data, Data]:
    """(samples, training data or a part of it, held-out data): all prepared as the settings `data` say.

    Raises InputError without them, and for samples of another shape.
    """
    if set(layer) - {"data", "held_out"}:
        raise InputError(
            f"{target} is no run folder but samples, which are made by now: they take data=... and held_out, "
            f"got {', '.join(sorted(set(layer) - {'data', 'held_out'}))}"
        )
    source = open_source(target)
    if "data" not in layer:
        run = Path("runs") / target
        hint = f" (for the run of that name give {run})" if run.is_dir() else ""
        raise InputError(f"to judge the samples in {target}, say which real data they should be like: data=NAME{hint}")
    config = Config.resolve(layer, {"held_out": n} if n and "held_out" not in layer else {})
    data = RunData.of(config)
    with warnings.catch_warnings():  # of what cannot be read, which is refused here
        warnings.simplefilter("ignore")
        samples = materialise(source, data.prepare)
    if len(samples) < len(source):
        raise InputError(
            f"{len(source) - len(samples)} of the {len(source)} samples in {target} cannot be read, or have NaN or "
            "infinite values: a generator that makes such must not be scored by the others"
        )
    if samples.x.shape[1:] != data.held_out.x.shape[1:]:
        raise InputError(
            f"{target} has samples of shape {tuple(samples.x.shape[1:])}, {data.source.name} of "
            f"{tuple(data.held_out.x.shape[1:])}: give data.size and data.channels that suit both (a .png of "
            "`undiffuse sample` is one picture of many: write them with --format png --out FOLDER)"
        )
    return samples, _enough(data, n or min(len(samples), len(data.held_out))), data.held_out
