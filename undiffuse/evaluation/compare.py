"""Comparing evaluations: only what was measured alike."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from undiffuse.evaluation.evaluation import FORMAT, Evaluation
from undiffuse.types import InputError

FILE = "evaluation.json"


class Row(NamedTuple):
    """A score of both: `verdict` is a, b, or neither where their intervals do not tell them apart."""

    group: str
    name: str
    a: float
    b: float
    better: str
    verdict: str


class Comparison(NamedTuple):
    """The scores that were measured alike, those that were not with the reason, and how the samplers differ."""

    rows: list[Row]
    left_out: dict[str, str]
    differences: dict[str, tuple[Any, Any]]


def read(path: str | Path) -> dict[str, Any]:
    """What `undiffuse evaluate` wrote: an evaluation.json, or the folder with it. Raises InputError."""
    path = Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: --compare takes what `undiffuse evaluate` writes") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(f"{path} is no evaluation ({FORMAT}): --compare takes what `undiffuse evaluate` writes")
    return found


def unlike(a: Any, b: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """The places in nested plain data where two differ.

    >>> unlike({"n": 1, "k": {"a": 2}}, {"n": 1, "k": {"a": 3}})
    {'k: a': (2, 3)}
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        out = dict[str, tuple[Any, Any]]()
        for key in dict.fromkeys((*a, *b)):
            out |= unlike(a.get(key), b.get(key), f"{where}: {key}" if where else str(key))
        return out
    return {} if a == b else {where: (a, b)}


def _said(differ: Mapping[str, tuple[Any, Any]]) -> str:
    def short(value: Any) -> str:
        return value[:12] + "…" if isinstance(value, str) and len(value) == 64 else str(value)

    return "; ".join(f"{where} is {short(a)} against {short(b)}" for where, (a, b) in differ.items())


def compare(a: Mapping[str, Any] | Evaluation, b: Mapping[str, Any] | Evaluation) -> Comparison:
    """Two evaluations, or what `read` gives of them, beside each other. InputError where they were not measured alike,
    which says in what, and for damaged ones."""
    one, two = (part.json() if isinstance(part, Evaluation) else part for part in (a, b))
    try:
        return _compare(one, two)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"an evaluation is damaged ({type(error).__name__}: {error}): evaluate again") from error


def _compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    measures = [{k: v for k, v in one["measure"].items() if k != "features"} for one in (a, b)]
    if differ := unlike(measures[0], measures[1]):
        raise InputError(f"these scores cannot be compared: {_said(differ)}. Evaluate both alike")
    rows, left_out = list[Row](), dict[str, str]()
    known = [one["measure"]["features"] for one in (a, b)]
    for group in dict.fromkeys((*a["scores"], *b["scores"])):
        if group not in a["scores"] or group not in b["scores"]:
            left_out[group] = "only one of them has it"
            continue
        if group in known[0] and (differ := unlike(known[0][group], known[1][group])):
            left_out[group] = f"other features: {_said(differ)}"
            continue
        for name in dict.fromkeys((*a["scores"][group], *b["scores"][group])):
            pair = [one["scores"][group].get(name) for one in (a, b)]
            if None in pair:
                left_out[f"{group}: {name}"] = "only one of them has it"
            elif differ := unlike(pair[0]["settings"], pair[1]["settings"]):
                left_out[f"{group}: {name}"] = _said(differ)
            elif pair[0]["value"] is not None and pair[1]["value"] is not None:
                rows.append(_row(group, name, *pair))
    rows += _likelihoods(a["likelihood"], b["likelihood"], left_out)
    if not rows:
        raise InputError(f"these evaluations share no score that was measured alike: {_joined(left_out)}")
    return Comparison(rows, left_out, unlike(a["sampler"], b["sampler"]))


def _joined(left_out: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "both are empty"


def _likelihoods(a: Mapping[str, Any], b: Mapping[str, Any], left_out: dict[str, str]) -> list[Row]:
    rows = []
    for name in (key for key in a if key in b and isinstance(a[key], Mapping) and "value" in a[key]):
        if differ := unlike(a[name]["settings"], b[name]["settings"]):
            left_out[f"likelihood: {name}"] = _said(differ)
        else:
            rows.append(_row("likelihood", name, {**a[name], "better": "lower"}, b[name]))
    return rows


def _half(score: Mapping[str, Any]) -> float:
    low, high = score.get("low"), score.get("high")
    return (high - low) / 2 if low is not None and high is not None else math.nan


def _row(group: str, name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Row:
    """Apart where the difference is beyond the 95 % interval of a difference of independent estimates."""
    gap, better = a["value"] - b["value"], a["better"]
    floor = (a.get("floor") or {}).get("value")
    aim = {"one": 1.0, "zero": 0.0, "floor": math.nan if floor is None else floor}.get(better, math.nan)
    off = [abs(one["value"] - aim) for one in (a, b)]
    gain = {"lower": -gap, "higher": gap}.get(better, off[1] - off[0])
    apart = abs(gap) > math.hypot(_half(a), _half(b))
    verdict = ("a" if gain > 0 else "b") if apart and not math.isnan(gain) else "neither"
    return Row(group, name, a["value"], b["value"], better, verdict)
