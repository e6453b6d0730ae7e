"""Plans kept in run folders: the sampler that `auto` chose or `tune` made, so that it is sought once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from undiffuse import tableau
from undiffuse.config import Config
from undiffuse.data.source import digest
from undiffuse.guide import CFG
from undiffuse.modal import Modal, read_plan
from undiffuse.model import Model
from undiffuse.runfolder import comes_along, fingerprint, run_folder
from undiffuse.tableau import Tableau
from undiffuse.tune import Choice
from undiffuse.types import InputError

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
        name += f"-w{guidance.w:.12g}" if isinstance(guidance, CFG) else "-guided"
        if not isinstance(guidance, CFG) or guidance != CFG(guidance.w):
            other["guidance"] = config.values["guidance"]
    return name + (f"-{digest(json.dumps(other, sort_keys=True))[:6]}" if other else "") + ".safetensors"


def made_for(model: Model, run: str | Path, config: Config, labels: bool) -> dict[str, Any]:
    """What a plan depends on besides its number of evaluations, as its file says it."""
    return {
        "model": fingerprint(run_folder(run)),
        "shape": list(model.shape),
        "schedule": config.values["schedule"],
        "guidance": config.values["guidance"] if labels else None,
        "ema": model.ema,
    }


def kept_plan(
    model: Model, run: str | Path, config: Config, nfe: int, labels: bool, folder: Path | None = None
) -> Kept | None:
    """The plan in a folder (default: the run's own) for samples as `config` says, with labels or without; None where
    there is none, or where `auto` chose it for other weights.

    Raises InputError for a damaged file, and for a plan that was tuned for other weights.
    """
    path = (folder or run_folder(run)) / plan_name(model, config, nfe, labels)
    if not path.is_file():
        return None
    try:
        plan, about = read_plan(path), tableau.made_for(path)
    except InputError as error:
        raise InputError(f"{error}; delete it, and one is sought again") from error
    if about.get("model") == fingerprint(run_folder(run)):
        return Kept(plan, path, None)
    if plan.name.endswith(TUNED):
        raise InputError(f"{path} was tuned for other weights than those of {run}: delete it, and tune again")
    return None


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

    Raises InputError for nfe < 1 and as `kept_plan` does.
    """
    if (kept := kept_plan(model, run, config, nfe, labels)) is not None:
        return kept
    choice = model.using(config).auto(nfe, guidance=config.build("guidance") if labels else None, progress=progress)
    folder = run_folder(run)
    if not own(folder):
        return Kept(choice.plan, None, choice)
    path = folder / plan_name(model, config, nfe, labels)
    keep(choice.plan, path, made_for(model, run, config, labels))
    return Kept(choice.plan, path, choice)


def keep(plan: Tableau | Modal, path: Path, about: dict[str, Any]) -> None:
    """Write a plan and what it was made for, complete or not at all."""
    part = path.with_suffix(f".{os.getpid()}.part")
    plan.save(part, about)
    part.replace(path)


def check_plan(path: Path, about: dict[str, Any]) -> str:
    """What differs between what a plan in a file was made for and `about`, as a sentence, "" for nothing; InputError
    where it cannot be used at all: for samples of another shape, and for another schedule."""
    made = tableau.made_for(path)
    differ = [key for key in made if made[key] != about.get(key)]
    for key in ("shape", "schedule"):
        if key in differ:
            raise InputError(f"{path} was made for the {key} {made[key]}, and this is {about[key]}: it cannot be used")
    words = {"model": "another model or other weights", "guidance": "other guidance", "ema": "another average"}
    told = [words[key] for key in differ if key in words]
    return f"{path} was made for {' and '.join(told)}: its samples may be worse than its name says" if told else ""


def own(folder: Path) -> bool:
    """Whether a folder may be written to: it is the user's, and not part of the package."""
    me = os.getuid() if hasattr(os, "getuid") else folder.stat().st_uid
    return not comes_along(folder) and folder.stat().st_uid == me and os.access(folder, os.W_OK)
