"""Pictures: grids of samples, the path from noise to data, curves; and the self-contained HTML report."""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from undiffuse.types import InputError

INK, ACCENT, MUTED = "#1b1f24", "#c8553d", "#8a8f98"
PALETTE = ["#c8553d", "#28666e", "#e0a030", "#6a4c93", "#5b8c5a", "#1b1f24", "#b56576", "#457b9d"]


def to_uint8(x: Tensor) -> np.ndarray:
    """(n, 1 or 3, h, w) in [-1, 1] -> (n, h, w) or (n, h, w, 3) bytes; other channel counts show the first."""
    x = ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return x[:, 0].numpy() if x.shape[1] != 3 else x.permute(0, 2, 3, 1).numpy()


def tile(x: Tensor, columns: int, scale: int = 6, gap: int = 4, smooth: bool = False) -> Image.Image:
    """Samples (n, c, h, w) as one picture, enlarged `scale` times by repetition or, if `smooth`, by cubic splines, and
    `gap` pixels apart; raises InputError for data that are no images."""
    if x.ndim != 4 or 0 in x.shape or columns < 1 or scale < 1:
        raise InputError(
            f"only images (n, channels, height, width) can be drawn, got {tuple(x.shape)} in {columns} columns"
        )
    pictures = [Image.fromarray(p) for p in to_uint8(x)]
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    w, h = pictures[0].width * scale, pictures[0].height * scale
    columns = min(columns, len(pictures))
    size = columns * (w + gap) + gap, math.ceil(len(pictures) / columns) * (h + gap) + gap
    sheet = Image.new(pictures[0].mode, size, "white")
    for i, picture in enumerate(pictures):
        place = gap + i % columns * (w + gap), gap + i // columns * (h + gap)
        sheet.paste(picture.resize((w, h), how), place)
    return sheet


def save_png(x: Tensor, path: Path, columns: int = 8, smooth: bool = False) -> None:
    """Write samples as a PNG, small images enlarged to about 64 pixels."""
    tile(x, columns, max(1, 64 // x.shape[-1]), smooth=smooth).save(path)


def save_sheet(columns: dict[str, Tensor], path: Path, side: int = 112) -> None:
    """Write pictures (n, c, h, w) of each name as a column under it, one row a sample, enlarged to about `side` pixels;
    smaller ones, such as those of low resolution, are shown as large. Raises InputError for data that are no images."""
    whole = max((x for x in columns.values()), key=lambda x: x.shape[-1] if x.ndim == 4 else 0)
    scale = max(1, side // max(whole.shape[-2:]))
    strips = [tile(x, 1, scale * max(1, whole.shape[-1] // x.shape[-1])).convert("RGB") for x in columns.values()]
    font, top, gap = ImageFont.load_default(12), 20, 4
    widths = [
        max(strip.width - gap, math.ceil(font.getlength(name)) + 2 * gap)
        for strip, name in zip(strips, columns, strict=True)
    ]
    sheet = Image.new("RGB", (sum(widths) + gap, max(strip.height for strip in strips) + top), "white")
    draw, left = ImageDraw.Draw(sheet), 0
    for strip, name, width in zip(strips, columns, widths, strict=True):
        sheet.paste(strip, (left + (width + gap - strip.width) // 2, top))
        draw.text((left + (width + gap) / 2, top - 4), name, INK, font, anchor="ms")
        left += width
    sheet.save(path)


def save_gif(frames: Sequence[Image.Image], path: Path, milliseconds: int = 90, hold: int = 14) -> None:
    """Write frames as an endless GIF that rests on the last one."""
    if not frames:
        raise InputError("a GIF needs at least one frame")
    shown = [f.quantize(16 if f.mode == "L" else 256) for f in frames]
    shown[0].save(
        path,
        save_all=True,
        append_images=[*shown[1:], *[shown[-1]] * hold],
        duration=milliseconds,
        loop=0,
        disposal=1,
    )


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot, which would change the caller's backend

    figure = Figure(figsize=(width, height), dpi=150)
    axes = figure.subplots(rows, columns)
    for at in np.atleast_1d(np.asarray(axes, object)).flat:
        at.spines[["top", "right"]].set_visible(False)
        at.tick_params(colors=INK, labelsize=9)
        at.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        at.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path)


def plot_levels(rows: Sequence[dict[str, float]], path: Path) -> None:
    """The network's error over noise level as a share of the best linear denoiser's."""
    figure, axes = _figure(6.4, 3.2)
    lam = [r["lam"] for r in rows]
    axes.axhline(1, color=MUTED, linewidth=1, linestyle="--")
    axes.text(lam[-1], 1.02, "best linear denoiser", color=MUTED, fontsize=9, ha="right")
    axes.plot(lam, [r["mse"] / r["linear"] for r in rows], color=ACCENT, marker="o", linewidth=2)
    axes.set_ylim(0, max(1.15, 1.05 * max(r["mse"] / r["linear"] for r in rows)))
    axes.set_xlabel("lam = log(alpha / sigma):  noise  →  data", fontsize=9)
    axes.set_ylabel("squared error, relative", fontsize=9)
    _save(figure, path)


def plot_distances(table: dict[str, dict[int, float]], floor: float, label: str, path: Path) -> None:
    """Distance over steps for several solvers, with the real-against-real floor."""
    figure, axes = _figure(6.4, 3.2)
    for (name, values), color in zip(table.items(), itertools.cycle(PALETTE), strict=False):
        axes.plot(list(values), list(values.values()), color=color, marker="o", linewidth=2, label=name)
    axes.axhline(floor, color=MUTED, linewidth=1, linestyle="--", label="real against real")
    steps = list(next(iter(table.values())))
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(s) for s in steps])
    _log_values(axes)
    axes.minorticks_off()
    axes.set_xlabel("steps", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def plot_errors(curves: dict[str, dict[int, Sequence[float]]], path: Path) -> None:
    """Median and 90th percentile of samplers' errors at the end over the number of evaluations."""
    figure, axes = _figure(6.4, 3.2)
    for (name, values), color in zip(curves.items(), (MUTED, PALETTE[1], ACCENT, *PALETTE[2:]), strict=False):
        for k, style, inside in ((0, "-", color), (1, ":", "white")):
            line, label = [value[k] for value in values.values()], name if k == 0 else None
            axes.plot(list(values), line, color=color, marker="o", markerfacecolor=inside, linestyle=style, label=label)
    budgets = sorted({n for values in curves.values() for n in values})
    axes.set_xticks(budgets, [str(n) for n in budgets])
    _log_values(axes)
    axes.minorticks_off()
    axes.set_xlabel("evaluations", fontsize=9)
    axes.set_ylabel("relative error at the end", fontsize=9)
    axes.set_title("median (full) and 90th percentile (hollow)", fontsize=9, loc="left")
    axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def plot_rows(rows: dict[str, Tensor], path: Path) -> None:
    """Samples (n, c, h, w) of each name as a row, the same columns in all; raises InputError for data that are no
    images."""
    sheets = {name: tile(x, len(x), max(1, 64 // x.shape[-1])) for name, x in rows.items()}
    wide, high = next(iter(sheets.values())).size
    figure, axes = _figure(1.2 + 7.6, len(rows) * 7.6 * high / wide, len(rows))
    for at, (name, sheet) in zip(np.atleast_1d(axes).flat, sheets.items(), strict=True):
        at.imshow(np.asarray(sheet.convert("RGB")))
        at.set_axis_off()
        at.text(-0.01, 0.5, name, transform=at.transAxes, ha="right", va="center", fontsize=10, color=INK)
    figure.subplots_adjust(0.14, 0, 1, 1, 0, 0)
    figure.savefig(path)


def columns_for(n: int, classes: int = 0) -> int:
    """The columns of a grid of n samples, whose classes take turns: a class a column, or several for few classes.

    >>> columns_for(64), columns_for(64, 10), columns_for(64, 3), columns_for(5, 3), columns_for(64, 100)
    (8, 10, 9, 3, 8)
    """
    if not 1 < classes <= min(n, 16):
        return n if n <= 10 else 8
    return classes * max(1, min(round(9 / classes), n // classes) if n >= 4 * classes else 1)


def plot_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A run's log as curves: loss and gradient norm, and where it was measured held-out error per lam relative to the
    best linear denoiser and the distance to held-out data with its real-against-real floor; of a classifier, its
    held-out loss relative to the prior's, and its accuracy."""
    logged, seen = [r for r in rows if "loss" in r], [r for r in rows if "eval" in r]
    figure, axes = _figure(9.6, 6.0 if seen else 3.2, 2 if seen else 1, 2)
    panels = list(axes.flat)
    _curve(panels[0], logged, "loss", "weighted loss")
    _curve(panels[1], logged, "grad_norm", "gradient norm")
    if seen and "frechet" in seen[0]["eval"]:
        _curves_of_levels(panels[2], seen, "held-out error / best linear", lambda b: b["mse"], lambda b: b["linear"])
        _curves_of_distances(panels[3], seen)
    elif seen:
        _curves_of_levels(panels[2], seen, "held-out loss / prior's", lambda b: b["loss"], lambda b: b["prior"])
        _curves_of_levels(panels[3], seen, "held-out accuracy", lambda b: b["accuracy"], lambda b: 1.0)
    for at in panels:
        at.set_xlabel("step", fontsize=9)
    _save(figure, path)


def _log_values(axes: Any) -> None:
    """A logarithmic axis of values, marked 1, 2, 5, 10."""
    from matplotlib import ticker

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def _log_scale(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis where positive values span more than a factor of five."""
    from matplotlib import ticker

    finite = [v for v in values if math.isfinite(v)]
    if not finite or min(finite) <= 0 or max(finite) <= 5 * min(finite):
        return
    _log_values(axes)
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _curve(axes: Any, rows: Sequence[dict[str, Any]], key: str, label: str, smooth: int = 9) -> None:
    """Values over steps, with their running median where there are enough."""
    steps, values = [r["step"] for r in rows], [math.nan if r[key] is None else r[key] for r in rows]
    many = len(values) >= 3 * smooth
    if not many:
        axes.plot(steps, values, color=ACCENT, linewidth=2, marker=".")
    else:
        axes.plot(steps, values, color=MUTED, linewidth=0.8, alpha=0.7)
        half, whole = smooth // 2, range(smooth // 2, len(values) - smooth // 2)
        windows = ([v for v in values[i - half : i + half + 1] if math.isfinite(v)] for i in whole)
        medians = [float(np.median(w)) if w else math.nan for w in windows]
        axes.plot([steps[i] for i in whole], medians, color=ACCENT, linewidth=2)
    axes.set_ylabel(label, fontsize=9)
    _log_scale(axes, values)


_Value = Callable[[dict[str, Any]], float | None]


def _curves_of_levels(axes: Any, rows: Sequence[dict[str, Any]], label: str, value: _Value, reference: _Value) -> None:
    axes.axhline(1, color=MUTED, linewidth=1, linestyle="--")
    axes.set_ylabel(label, fontsize=9)
    steps, drawn = [r["step"] for r in rows], [1.0]
    for i, (level, color) in enumerate(zip(rows[0]["eval"]["levels"], itertools.cycle(PALETTE), strict=False)):
        found = [r["eval"]["levels"][i] for r in rows]
        values = [math.nan if (v := value(b)) is None else v / (reference(b) or math.nan) for b in found]
        axes.plot(steps, values, color=color, marker=".", linewidth=1.5, label=f"lam {level['lam']:+g}")
        drawn += values
    _log_scale(axes, drawn)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _curves_of_distances(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    steps, last = [r["step"] for r in rows], rows[-1]["eval"]
    axes.set_ylabel(f"Fréchet distance of {last['n']} samples", fontsize=9)
    values = [math.nan if r["eval"]["frechet"] is None else r["eval"]["frechet"] for r in rows]
    lines = axes.plot(steps, values, color=ACCENT, marker=".", linewidth=2, label="samples")
    floor = f"{last['n']} real ones"
    lines.append(axes.axhline(last["frechet_floor"], color=MUTED, linewidth=1, linestyle="--", label=floor))
    copies = axes.twinx()
    ratios = [math.nan if r["eval"]["nearest_ratio"] is None else r["eval"]["nearest_ratio"] for r in rows]
    lines += copies.plot(steps, ratios, color=PALETTE[1], marker=".", linewidth=1.5, label="nearest-neighbour ratio")
    copies.set_ylabel("nearest-neighbour ratio (far below 1: copies)", fontsize=8, color=PALETTE[1])
    copies.set_ylim(0, 1.5)
    copies.spines[["top"]].set_visible(False)
    axes.set_ylim(bottom=0)
    axes.legend(handles=lines, frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=3)


def plot_scores(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Scores over the number of steps and over guidance weights, a row each: distances with their intervals and floors,
    and shares."""
    shares = {"precision": "precision", "recall": "recall", "adherence": "read as asked"}
    figure, panels = _figure(9.6, 3.0 * len(curves), len(curves), 3)
    for (key, rows), row in zip(curves.items(), np.atleast_2d(panels), strict=True):
        for at, name, label in (
            (row[0], "frechet-unbiased", "Fréchet distance, unbiased"),
            (row[1], "kernel", "kernel distance"),
        ):
            _scores_over(at, key, rows, name, ACCENT)
            at.set_ylabel(label, fontsize=9)
        for (name, label), color in zip(shares.items(), PALETTE[1:], strict=False):
            if all(name in r for r in rows):
                _scores_over(row[2], key, rows, name, color, label)
        row[2].set_ylim(0, 1.02)
        row[2].set_ylabel("share of samples", fontsize=9)
        row[2].legend(
            frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, columnspacing=1
        )
        for at in row:
            at.set_xlabel("steps" if key == "steps" else f"guidance weight {key}", fontsize=9)
    _save(figure, path)


def _scores_over(axes: Any, key: str, rows: Sequence[dict[str, Any]], name: str, color: str, label: str = "") -> None:
    """One score over steps or weights with its interval and floor."""
    from matplotlib import ticker

    at = [r[key] for r in rows]
    if key == "steps":
        axes.set_xscale("log")
        axes.set_xticks(at, [f"{value:g}" for value in at])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    if all(r[name]["value"] is None or math.isnan(r[name]["value"]) for r in rows):
        axes.text(0.5, 0.5, "too few samples", transform=axes.transAxes, ha="center", color=MUTED, fontsize=9)
        axes.set_yticks([])
        return
    value, low, high = (
        [math.nan if r[name][k] is None else r[name][k] for r in rows] for k in ("value", "low", "high")
    )
    if len(at) == 1:
        axes.vlines(at, low, high, color=color, alpha=0.3)
        axes.set_xlim(0.5 * at[0], 1.5 * at[0] + 1e-9) if at[0] > 0 else None
    axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
    axes.plot(at, value, color=color, marker="o", markersize=4, linewidth=2, label=label or None)
    floor, shade = rows[0][name]["floor"], color if label else MUTED
    if floor["value"] is not None:
        axes.axhline(floor["value"], color=shade, linewidth=1, linestyle="--")
    if not label and floor["low"] is not None:
        axes.axhspan(floor["low"], floor["high"], color=shade, alpha=0.12, linewidth=0)


def plot_samples(x: Tensor, others: Tensor, path: Path, labels: tuple[str, str]) -> None:
    """Samples that are no images beside others: points of the plane as a scatter, anything else as curves, a panel for
    each of at most ten pairs."""
    if math.prod(x.shape[1:]) == 2:
        figure, axes = _figure(5.6, 4.2)
        few = len(x) < 50
        for part, color, label, size in ((others, MUTED, labels[1], 90), (x, ACCENT, labels[0], 20)):
            size = size if few else 8
            axes.scatter(*part.flatten(1).T.tolist(), s=size, color=color, alpha=0.6, linewidth=0, label=label)
        axes.set_aspect("equal", adjustable="datalim")
        axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        return _save(figure, path)
    n = min(len(x), 10)
    figure, panels = _figure(9.6, 1.6 * math.ceil(n / 5), math.ceil(n / 5), min(n, 5))
    for i, axes in enumerate(np.atleast_1d(np.asarray(panels, object)).flat):
        axes.set_xticks([])
        if i >= n:
            axes.set_axis_off()
            continue
        axes.plot(others[i].flatten().tolist(), color=MUTED, linewidth=1)
        axes.plot(x[i].flatten().tolist(), color=ACCENT, linewidth=1.4)
    _save(figure, path)


def plot_classes(samples: Sequence[int], real: Sequence[int], names: Sequence[str], path: Path) -> None:
    """The shares of classes among samples and among real ones."""
    figure, axes = _figure(6.4, 2.8)
    at = np.arange(len(names))
    for shift, counts, color, label in ((-0.2, real, MUTED, "real"), (0.2, samples, ACCENT, "samples")):
        axes.bar(at + shift, np.asarray(counts) / max(1, sum(counts)), 0.38, color=color, label=label)
    axes.set_xticks(at, names, rotation=45 if max(map(len, names)) > 3 else 0, fontsize=8)
    axes.set_ylabel("share", fontsize=9)
    axes.set_ylim(top=1.25 * max(max(c) / max(1, sum(c)) for c in (samples, real)))
    axes.legend(frameon=False, fontsize=8, ncols=2)
    _save(figure, path)


def plot_bound(terms: Sequence[dict[str, Any]], path: Path) -> None:
    """A variational bound's terms over noise level, as bits per dimension and unit of lam, and what it starts and ends
    with."""
    figure, axes = _figure(6.4, 2.8)
    steps = [t for t in terms if t["lam_now"] is not None and t["lam_then"] is not None]
    edges = [steps[0]["lam_now"], *(t["lam_then"] for t in steps)]
    density = [t["bits"] / (t["lam_then"] - t["lam_now"]) for t in steps]
    axes.stairs(density, edges, color=ACCENT, linewidth=1.5, fill=True, alpha=0.25)
    axes.stairs(density, edges, color=ACCENT, linewidth=1.5)
    ends = f"prior {terms[0]['bits']:.3g}, steps {sum(t['bits'] for t in steps):.3g}, "
    axes.set_title(ends + f"reconstruction {terms[-1]['bits']:.3g} bits per dimension", fontsize=9, loc="left")
    axes.set_xlabel("lam = log(alpha / sigma):  noise  →  data", fontsize=9)
    axes.set_ylabel("bits / dim per unit of lam", fontsize=9)
    axes.set_ylim(bottom=0)
    _save(figure, path)


def data_uri(path: Path) -> str:
    """A file as a data URI."""
    kind = {".png": "image/png", ".gif": "image/gif"}.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"only .png and .gif files can be embedded, got {path.name}")
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def image_uri(image: Image.Image) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1b1f24; background: #faf9f7; margin: 0; }
main { max-width: 46rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; }
p { margin: .5rem 0; } .lead { color: #555b64; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0; }
.card { background: #fff; border: 1px solid #e7e4df; border-radius: .5rem; padding: .8rem 1.1rem; flex: 1 1 6rem; }
.card b { display: block; font-size: 1.6rem; } .card span { color: #555b64; font-size: .88rem; }
figure { margin: 1rem 0; } figcaption { color: #555b64; font-size: .9rem; margin-top: .3rem; }
img { max-width: 100%; height: auto; border-radius: .3rem; }
.warning { background: #fbeee6; border-left: 3px solid #c8553d; padding: .6rem .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0; }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid #e7e4df; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; color: #555b64; font-size: .88rem; }
td small, th small { color: #777d86; font-weight: 400; display: inline-block; max-width: 17rem; white-space: normal; }
code, pre { font: .88rem/1.5 ui-monospace, monospace; background: #f0eeea; border-radius: .3rem; }
code { padding: .1rem .3rem; } pre { padding: .8rem 1rem; overflow-x: auto; }
"""


def table_html(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain strings; a second line of a cell is small."""

    def cell(text: str) -> str:
        first, *more = html.escape(text).split("\n")
        return first + "".join(f"<br><small>{line}</small>" for line in more)

    head = "".join(f"<th>{cell(c)}</th>" for c in header)
    body = "".join("<tr>" + "".join(f"<td>{cell(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def page(title: str, body: str) -> str:
    """A complete HTML page without outside resources."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>"
    )
