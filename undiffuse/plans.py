"""Plans kept in run folders: the sampler that `auto` chose or `tune` made, so that it is sought once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from undiffuse.config import Config
from undiffuse.data.source import digest
from undiffuse.guide import CFG
from undiffuse.modal import Modal, read_plan
from undiffuse.model import Model, comes_along, run_folder
from undiffuse.tableau import Tableau
from undiffuse.train import MANIFEST
from undiffuse.tune import Choice

TUNED = ", tuned"  # the end of the names of plans that `tune` made


@dataclass(frozen=True, eq=False)
class Kept:
    """A plan, the file in which it is kept (None: nowhere), and how it was chosen (None: earlier)."""

    plan: Tableau | Modal
    path: Path | None
    choice: Choice | None


def plan_name(model: Model, config: Config, nfe: int, labels: bool) -> str:
    """The file of the plan for a model sampled as `config` says: plan-6, with labels plan-6-w2, and with a hash of
    whatever else differs from the run's own: the schedule, a guidance interval, the average of weights."""
    other: dict[str, object] = {} if model.ema is None else {"ema": model.ema}
    if config.values["schedule"] != model.config.values["schedule"]:
        other["schedule"] = config.values["schedule"]
    name, guidance = f"plan-{nfe}", config.build("guidance")
    if labels:
        name += f"-w{guidance.w:.12g}" if hasattr(guidance, "w") else "-guided"
        if guidance != CFG(getattr(guidance, "w", 1.0)):
            other["guidance"] = config.values["guidance"]
    return name + (f"-{digest(json.dumps(other, sort_keys=True))[:6]}" if other else "") + ".safetensors"


def plan_for(
    model: Model,
    run: str | Path,
    config: Config,
    nfe: int,
    labels: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Kept:
    """The plan of `nfe` evaluations of a run sampled as `config` says, with labels or without: the one kept in its
    folder, else chosen by `Model.auto` and kept there, if the folder is the user's own. Models that come with the
    package have plans of 4, 5, 6, 8 and 10 evaluations.

    It is chosen anew where the model was trained further. Raises InputError for nfe < 1 and a damaged file.
    """
    folder = run_folder(run)
    path, trained = folder / plan_name(model, config, nfe, labels), folder / "model" / MANIFEST
    if path.is_file() and (comes_along(folder) or path.stat().st_mtime >= trained.stat().st_mtime):
        return Kept(read_plan(path), path, None)
    choice = model.using(config).auto(nfe, guidance=config.build("guidance") if labels else None, progress=progress)
    if not own(folder):
        return Kept(choice.plan, None, choice)
    keep(choice.plan, path)
    return Kept(choice.plan, path, choice)


def keep(plan: Tableau | Modal, path: Path) -> None:
    """Write a plan, complete or not at all."""
    part = path.with_suffix(f".{os.getpid()}.part")
    plan.save(part)
    part.replace(path)


def own(folder: Path) -> bool:
    """Whether a folder may be written to: it is the user's, and not part of the package."""
    me = os.getuid() if hasattr(os, "getuid") else folder.stat().st_uid
    return not comes_along(folder) and folder.stat().st_uid == me and os.access(folder, os.W_OK)
