"""The report of an evaluation: one self-contained HTML page, its pictures, and evaluation.json."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from undiffuse import plot
from undiffuse.evals import Estimate
from undiffuse.evaluation.compare import FILE
from undiffuse.evaluation.evaluation import Evaluation
from undiffuse.evaluation.scores import Score
from undiffuse.train import MANIFEST, commit
from undiffuse.types import InputError

SHOWN = 60


def number(value: float | None, digits: int = 3) -> str:
    """A figure as people read it; a dash where there is none.

    >>> number(0.123456), number(12.3456), number(-4321.0), number(None)
    ('0.123', '12.3', '−4,321', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    return (f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.{digits}g}").replace("-", "−")


def with_interval(found: Estimate) -> str:
    """A figure with its 95 % interval on a second line, where there is one.

    >>> with_interval(Estimate(0.5, 0.25, 0.75)), with_interval(Estimate(0.5))
    ('0.5\\n0.25 … 0.75', '0.5')
    """
    if math.isnan(found.low):
        return number(found.value)
    return f"{number(found.value)}\n{number(found.low)} … {number(found.high)}"


WORDS = {"lower": "lower", "higher": "higher", "one": "near 1", "zero": "near 0", "floor": "as real"}
HEADER = ["score\n95 % interval", "samples", "real samples", "better"]
LIKELIHOODS = ("bound", "bound on training samples", "flow")


def rows_of(scores: Mapping[str, Score]) -> list[list[str]]:
    """A row a score: title (and why there is no value), value and floor with their intervals, which way is better."""
    return [
        [f"{s.title}\n{s.why}" if s.why else s.title, with_interval(s.found), with_interval(s.floor), WORDS[s.better]]
        for s in scores.values()
    ]


def write(found: Evaluation, folder: str | Path) -> Path:
    """Write evaluation.json, pictures and report.html as the folder, whole or not at all; the report's path.

    An evaluation that is there is replaced; InputError for a folder that holds anything else.
    """
    folder = Path(folder)
    writable(folder)

    def fill(aside: Path) -> None:
        pictures = _pictures(found, aside)
        (aside / FILE).write_text(json.dumps(found.json(), indent=1) + "\n")
        (aside / "report.html").write_text(plot.page("undiffuse: evaluation", _body(found, pictures)))

    commit(folder, fill)
    return folder / "report.html"


def writable(folder: Path, what: str = "an evaluation", mark: str = FILE) -> None:
    """Raises InputError for a path to which a folder of this kind, known by the file `mark`, is not written."""
    if not str(folder).strip() or folder in (Path(), Path("/")):
        raise InputError(f"{what} is a folder of its own: give its name, got {str(folder)!r}")
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file: {what} needs the name of a folder")
    permitted(folder)
    if folder.is_dir() and any(folder.iterdir()):
        try:
            known = {MANIFEST, *json.loads((folder / MANIFEST).read_text())}
        except (OSError, ValueError, TypeError):
            known = set()
        others = sorted(path.name for path in folder.iterdir() if path.name not in known)
        if mark not in known or others:
            raise InputError(
                f"{folder} holds other files than {what} has, such as {', '.join(others[:3])}: give another folder"
            )


def permitted(path: Path) -> Path:
    """The nearest part of a path that is there; InputError where it may not be written to."""
    there = next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())
    if not os.access(there, os.W_OK):
        raise InputError(f"{path} cannot be written: there is no permission to write to {there}")
    return there


def _pictures(found: Evaluation, folder: Path) -> dict[str, Path]:
    """What could be drawn, by name."""
    out: dict[str, Path] = {}

    def at(name: str) -> Path:
        out[name] = folder / f"{name}.png"
        return out[name]

    copies, originals = found.x[found.copies.sample], found.train[found.copies.train]
    if found.x.ndim == 4 and min(found.x.shape[2:]) > 1:
        scale = max(1, 64 // found.x.shape[-1])
        plot.tile(found.x[:SHOWN], 10, scale, smooth=True).save(at("samples"))
        plot.tile(torch.cat([copies, originals]), len(copies), scale, smooth=True).save(at("copies"))
    elif found.x.ndim < 5:
        k = len(found.x) if math.prod(found.x.shape[1:]) == 2 else 10
        plot.plot_samples(found.x[:k], found.train[:k], at("samples"), ("samples", "training samples"))
        plot.plot_samples(copies, originals, at("copies"), ("likeliest copies", "their nearest training samples"))
    if found.curves:
        plot.plot_scores(found.curves, at("curves"))
    if found.classes and len(found.classes["names"]) <= 40:
        plot.plot_classes(found.classes["samples"], found.classes["real"], found.classes["names"], at("classes"))
    if terms := found.likelihood.get("terms"):
        plot.plot_bound(terms, at("bound"))
    return out


def _figure(pictures: Mapping[str, Path], name: str, alt: str, caption: str, width: int = 0) -> str:
    if name not in pictures:
        return ""
    size = f' width="{width}"' if width else ""
    return (
        f'<figure><img src="{plot.data_uri(pictures[name])}"{size} alt="{html.escape(alt)}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def cards(found: Evaluation) -> list[tuple[str, str]]:
    """The figures to see first."""
    first, out = next(iter(found.scores)), list[tuple[str, str]]()
    for group, name, text in (
        (found.scores[first], "frechet-unbiased", f"Fréchet distance without bias, on {first}; real samples {{}}"),
        (found.scores[first], "kernel", f"kernel distance on {first}; real samples {{}}"),
        (found.scores[first], "recall", f"recall on {first}; real samples {{}}"),
        (found.adherence, "class", "read as the class asked for; real samples {}"),
        (found.memory, "near-copies", "near copies of training samples; real samples {}"),
    ):
        if name == "kernel" and out:
            continue  # it stands in for an unbiased Fréchet distance
        if name in group and not math.isnan(group[name].found.value):
            out.append((number(group[name].found.value), text.format(number(group[name].floor.value))))
    for name, unit in (("flow", "probability flow"), ("bound", "variational bound")):
        if name in found.likelihood and found.likelihood[name].get("value") is not None:
            out.append((number(found.likelihood[name]["value"]), f"bits per dimension, {unit}"))
            break
    return out


def subject(sampler: Mapping[str, Any]) -> str:
    """What was evaluated, in a few words."""
    if "steps" not in sampler:
        return f"the samples {sampler['samples']}"
    solver, guidance = sampler["solver"], sampler["guidance"]
    kind = solver["kind"] if isinstance(solver, Mapping) else solver
    w = f", w = {guidance['w']:g}" if isinstance(guidance, Mapping) and "w" in guidance else ""
    run = f"{sampler['run']}: " if "run" in sampler else ""
    return f"{run}{kind}, {sampler['steps']} steps{w}"


def _body(found: Evaluation, pictures: Mapping[str, Path]) -> str:
    n, held = found.measure["samples"], found.measure["held out"]
    made = "".join(f'<div class="card"><b>{a}</b><span>{html.escape(b)}</span></div>' for a, b in cards(found))
    first, images = next(iter(found.scores)), found.x.ndim == 4 and min(found.x.shape[2:]) > 1
    where = ("Above", "below") if images else ("In colour", "in gray")
    shown = f"The first {min(n, SHOWN)} samples, not selected." if images else "Samples, and training ones in gray."
    parts = [
        f"<h1>Evaluation of {html.escape(subject(found.sampler))}</h1>",
        f'<p class="lead">{n:,} samples against {held["n"]:,} real ones that training has not seen: '
        f"{html.escape(held['name'])}. Beside every score stands its floor: what {n:,} real training samples score "
        "in place of the generated ones. A score within the floor's interval cannot be told from real data by it.</p>",
        f'<div class="cards">{made}</div>',
        "".join(f'<p class="warning"><b>Warning:</b> {html.escape(text)}.</p>' for text in found.warnings),
        _figure(pictures, "samples", "Generated samples", shown),
    ]
    for name, scores in found.scores.items():
        about = found.measure["features"][name]
        parts += [
            f"<h2>Scores on {html.escape(name)}</h2>",
            f"<p>Features {html.escape(name)}, SHA-256 <code>{about['sha256'][:16]}</code>; resize: "
            f"{html.escape(about['resize'])}.</p>",
            plot.table_html(HEADER, rows_of(scores)),
        ]
    if found.adherence:
        parts += ["<h2>Does it do what it is asked?</h2>", plot.table_html(HEADER, rows_of(found.adherence))]
    if found.curves:
        parts += [
            "<h2>Over steps and guidance</h2>",
            _figure(
                pictures, "curves", "Scores over steps and guidance weight",
                f"On {first}. Bands are 95 % intervals; dashed lines the floor, which real samples reach, with its "
                "interval in gray. Settings that are chosen by these curves are tuned on their features: judge them by "
                "others.",
            ),
        ]  # fmt: skip
    if found.classes:
        c = found.classes
        parts += [
            "<h2>Classes</h2>",
            _figure(
                pictures, "classes", "Classes read",
                f"How often each class is read. Total variation {number(c['variation'])}, p = {number(c['p'])} "
                "(chi-squared test of equal shares).",
                width=640,
            ),
        ]  # fmt: skip
    parts += [
        "<h2>Did it copy?</h2>",
        _figure(
            pictures, "copies", "Samples above their nearest training samples",
            f"{where[0]}, the samples that lie nearest to a training sample, in proportion to the distance of that one "
            "to its own nearest neighbour; "
            f"{where[1]}, those training samples. Ratios of the distances: "
            + ", ".join(f"{ratio:.2f}" for ratio in found.copies.ratio.tolist()) + ".",
        ),
        plot.table_html(HEADER, rows_of(found.memory)),
    ]  # fmt: skip
    if found.likelihood:
        parts += _likelihood(found.likelihood, pictures)
    parts += [
        "<h2>Provenance</h2>",
        "<p>Scores are comparable where the first table agrees; the second says what made the samples.</p>",
        plot.table_html(["measured by", ""], _flat(found.measure)),
        plot.table_html(["sampled by", ""], _flat(found.sampler)),
        f"<p>Every figure is in <code>{FILE}</code>; <code>undiffuse evaluate --compare A B</code> sets two of them "
        "beside each other.</p>",
    ]
    return "\n".join(part for part in parts if part)


def _likelihood(found: Mapping[str, Any], pictures: Mapping[str, Path]) -> list[str]:
    rows = [
        [found[name]["title"], with_interval(Estimate(*(found[name][k] for k in ("value", "low", "high"))))]
        for name in LIKELIHOODS
        if name in found
    ]
    notes = " ".join(f"{found[name]['title'].capitalize()}: {found[name]['note']}." for name in LIKELIHOODS)
    return [
        "<h2>Likelihood</h2>",
        f"<p>{html.escape(found['about'])}</p>",
        plot.table_html(["bits per dimension\n95 % interval", ""], rows),
        f"<p>{html.escape(notes)}</p>",
        _figure(
            pictures, "bound", "Terms of the bound", "The bound's terms over noise levels: where bits are spent.", 640
        ),
    ]


def _flat(value: Mapping[str, Any], where: str = "") -> list[list[str]]:
    """Nested plain data as rows of (place, value)."""
    rows = []
    for key, inner in value.items():
        name = f"{where}: {key}" if where else str(key)
        if isinstance(inner, Mapping):
            rows += _flat(inner, name)
        else:
            text = str(inner)
            rows.append([name, f"{text[:24]}…" if len(text) == 64 else text if len(text) < 90 else f"{text[:90]}…"])
    return rows
