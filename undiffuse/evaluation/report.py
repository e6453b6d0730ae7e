"""The report of an evaluation: one self-contained HTML page, its pictures, and evaluation.json."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from undiffuse import plot
from undiffuse.evals import Estimate
from undiffuse.evaluation.compare import FILE
from undiffuse.evaluation.evaluation import Evaluation
from undiffuse.evaluation.scores import Score
from undiffuse.train import replace_text

SHOWN = 60


def number(value: float | None, digits: int = 3) -> str:
    """A figure as people read it; a dash where there is none.

    >>> number(0.123456), number(12.3456), number(None)
    ('0.123', '12.3', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{digits}g}".replace("-", "−")


def with_interval(found: Estimate) -> str:
    """A figure with its 95 % interval on a second line, where there is one.

    >>> with_interval(Estimate(0.5, 0.25, 0.75)), with_interval(Estimate(0.5))
    ('0.5\\n0.25 … 0.75', '0.5')
    """
    if math.isnan(found.low):
        return number(found.value)
    return f"{number(found.value)}\n{number(found.low)} … {number(found.high)}"


WORDS = {"lower": "lower", "higher": "higher", "one": "near 1", "zero": "near 0"}
HEADER = ["score\n95 % interval", "samples", "real samples", "better"]
LIKELIHOODS = ("bound", "bound on training samples", "flow")


def rows_of(scores: Mapping[str, Score]) -> list[list[str]]:
    """A row a score: title, value and floor with their intervals, which way is better or why there is none."""
    return [
        [s.title, with_interval(s.found), with_interval(s.floor), s.why or WORDS[s.better]] for s in scores.values()
    ]


def write(found: Evaluation, folder: Path) -> Path:
    """Write evaluation.json, pictures and report.html into the folder; the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(found, folder)
    replace_text(folder / FILE, json.dumps(found.json(), indent=1) + "\n")
    replace_text(folder / "report.html", plot.page("undiffuse: evaluation", _body(found, folder, pictures)))
    return folder / "report.html"


def _pictures(found: Evaluation, folder: Path) -> dict[str, Path]:
    """What could be drawn, by name."""
    out: dict[str, Path] = {}
    images = found.x.ndim == 4

    def at(name: str) -> Path:
        out[name] = folder / f"{name}.png"
        return out[name]

    if images:
        scale = max(1, 64 // found.x.shape[-1])
        plot.tile(found.x[:SHOWN], 10, scale, smooth=True).save(at("samples"))
        pairs = torch.cat([found.x[found.copies.sample], found.train[found.copies.train]])
        plot.tile(pairs, len(pairs) // 2, scale, smooth=True).save(at("copies"))
    if found.curves:
        plot.plot_scores(found.curves, at("curves"))
    if found.classes:
        names = found.classes["names"]
        if len(names) <= 40:
            plot.plot_classes(found.classes["samples"], found.classes["real"], names, at("classes"))
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
    first = next(iter(found.scores))
    out = []
    for group, name, text in (
        (found.scores[first], "frechet-unbiased", f"Fréchet distance without bias, on {first}; real samples {{}}"),
        (found.scores[first], "precision", f"precision on {first}; real samples {{}}"),
        (found.scores[first], "recall", f"recall on {first}; real samples {{}}"),
        (found.adherence, "class", "read as the class asked for; real samples {}"),
    ):
        if name in group and not math.isnan(group[name].found.value):
            out.append((number(group[name].found.value), text.format(number(group[name].floor.value))))
    for name, unit in (("flow", "probability flow"), ("bound", "variational bound")):
        if name in found.likelihood and found.likelihood[name].get("value") is not None:
            out.append((number(found.likelihood[name]["value"]), f"bits per dimension, {unit}"))
            break
    return out


def _body(found: Evaluation, folder: Path, pictures: Mapping[str, Path]) -> str:
    n, held = found.measure["samples"], found.measure["held out"]
    made = "".join(f'<div class="card"><b>{a}</b><span>{html.escape(b)}</span></div>' for a, b in cards(found))
    parts = [
        "<h1>Evaluation</h1>",
        f'<p class="lead">{n:,} samples against {held["n"]:,} real ones that training has not seen: '
        f"{html.escape(held['name'])}. Beside every score stands its floor: what {n:,} real training samples score "
        "in place of the generated ones. A score within the floor's interval cannot be told from real data by it.</p>",
        f'<div class="cards">{made}</div>',
        "".join(f'<p class="warning"><b>Warning:</b> {html.escape(text)}.</p>' for text in found.warnings),
        _figure(pictures, "samples", "Generated samples", f"The first {min(n, SHOWN)} samples, not selected."),
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
                "Bands are 95 % intervals; dashed lines the floor, which real samples reach. Settings that are chosen "
                "by these curves are tuned on their features: judge them by others.",
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
            "Above, the samples that lie nearest to a training sample in proportion to the nearest held-out one; "
            "below, those training samples. Ratios of the distances: "
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
            rows.append([name, f"{inner[:24]}…" if isinstance(inner, str) and len(inner) == 64 else str(inner)])
    return rows
