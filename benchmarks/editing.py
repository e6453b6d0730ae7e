"""Editing and restoration of real held-out pictures, Fashion-MNIST's test set, by the model `fashion` that comes along.

`python benchmarks/editing.py [n]` restores n (64) pictures by every method, writes its section with PSNR in dB (mean
and standard error), and draws docs/editing.png of the first pictures of eight classes, not selected.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import table, write
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

import undiffuse
from undiffuse.data import Subset, materialise, open_source
from undiffuse.data.prepare import Prepare
from undiffuse.edit import Deblur, Edited, ImageToImage, Inpaint, Invert, RandomMask, SuperResolution, edit, psnr
from undiffuse.model import Model
from undiffuse.plot import INK, MUTED, to_uint8
from undiffuse.restore import RESTORERS, invert, reconstruct

PICTURE = Path(__file__).parents[1] / "docs" / "editing.png"
STEPS, NOISE, SHOWN = 16, 0.05, 8
TO = {0: 6, 1: 3, 2: 4, 3: 0, 4: 2, 5: 7, 6: 0, 7: 9, 8: 2, 9: 7}  # what each class becomes by inversion


def drawn_mask() -> Tensor:
    """What is known (1, 1, 28, 28) beside a stroke of a thick pen."""
    image = Image.new("L", (28 * 8, 28 * 8), 255)
    draw = ImageDraw.Draw(image)
    way = [(30, 30), (120, 70), (60, 120), (180, 130), (110, 190), (190, 200)]
    draw.line(way, fill=0, width=44, joint="curve")
    for x, y in way:
        draw.ellipse([x - 22, y - 22, x + 22, y + 22], fill=0)
    small = np.asarray(image.resize((28, 28), Image.Resampling.BOX))
    return torch.from_numpy(small > 127).float()[None, None]


def problems(by: str) -> dict[str, Any]:
    """The tasks, solved by a method."""
    return {
        "inpainting": Inpaint(drawn_mask(), by=by),
        "super-resolution x4": SuperResolution(factor=4, by=by, noise=NOISE, measure=True),
        "de-blurring": Deblur(blur=1.5, by=by, noise=NOISE, measure=True),
        "random mask": RandomMask(share=0.3, by=by, noise=NOISE, measure=True),
    }


def baseline(task: str, found: Edited, mean: Tensor) -> Tensor:
    """What needs no model: bilinear up-scaling, the measurement itself, or the data's mean where nothing is known."""
    if task == "super-resolution x4":
        return interpolate(found.before["measured"], scale_factor=4, mode="bilinear", align_corners=False)
    if task == "de-blurring":
        return found.before["measured"]
    if task == "random mask":
        return torch.where(found.before["measured"] == 0, mean, found.before["measured"])
    return torch.where(drawn_mask() == 1, found.before["original"], mean)


def db(values: Tensor) -> str:
    """Mean and standard error."""
    return f"{float(values.mean()):.2f} ± {float(values.std()) / math.sqrt(len(values)):.2f}"


def compared(model: Model, x: Tensor) -> str:
    """Every method on every task."""
    mean = model.spectrum.mean.float().reshape(model.shape)
    tasks = list(problems("mmps"))
    rows = {"without a model": dict[str, str]()}
    for by in ("replacement", "repaint", *RESTORERS):
        seconds, row = list[float](), dict[str, str]()
        for task in tasks if by in RESTORERS else tasks[:1]:
            started = time.perf_counter()
            found = edit(model, x, problems(by)[task], steps=STEPS, seed=1)
            seconds.append(time.perf_counter() - started)
            row[task] = db(psnr(found.results["result"], x))
            rows["without a model"][task] = db(psnr(baseline(task, found, mean), x))
        row["s a picture"] = f"{np.mean(seconds) / len(x):.2f}"
        rows[by] = row
        print(by, row, flush=True)
    header = ["", *tasks, "s a picture"]
    return table(header, [[name, *(row.get(key, "") for key in header[1:])] for name, row in rows.items()])


def inverted(model: Model, x: Tensor, labels: Tensor) -> str:
    """Inversion there and back, and into other classes as an independent classifier reads them."""
    few, how = x[:16], {"schedule": model.schedule, "grid": model.config.build("grid"), "steps": 50}
    denoise, rows = model.bind(labels[:16], 16), []
    for name, exact in (("fixed point", True), ("single pass", False)):
        started = time.perf_counter()
        noise = invert(denoise, few, exact=exact, **how)
        seconds = (time.perf_counter() - started) / len(few)
        off = (reconstruct(denoise, noise, **how) - few).square().mean().sqrt()
        rows.append([name, f"{float(off):.2g}", f"{seconds:.2f}"])
    return table(["DDIM inversion, 50 steps", "round trip, RMS", "s a picture"], rows)


def changed(model: Model, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures in their other class by inversion, and these classes."""
    target = torch.tensor([TO[int(k)] for k in labels])
    how = {"target": model.cond(target, len(x)), "source": model.cond(labels, len(x)), "steps": 25}
    return edit(model, x, Invert(), **how).results["changed"], target


def strip(pictures: Tensor, side: int, gap: int) -> Image.Image:
    """Pictures in a row, enlarged."""
    each = [Image.fromarray(p).resize((side, side), Image.Resampling.NEAREST) for p in to_uint8(pictures)]
    sheet = Image.new("L", (len(each) * (side + gap) - gap, side), 255)
    for k, picture in enumerate(each):
        sheet.paste(picture, (k * (side + gap), 0))
    return sheet


def figure(model: Model, x: Tensor, labels: Tensor) -> None:
    """docs/editing.png: groups of rows, a picture a column."""
    from matplotlib.figure import Figure

    told, ways, steps = model.cond(labels, len(x)), ("replacement", "repaint", "mmps"), 25
    again = edit(model, x, ImageToImage((0.4, 0.7, 0.85)), target=told, steps=20, seed=2).results
    filled = {by: edit(model, x, problems(by)["inpainting"], steps=steps, seed=3) for by in ways}
    tasks = {task: edit(model, x, problems("mmps")[task], steps=steps, seed=4) for task in list(problems("mmps"))[1:]}
    other, target = changed(model, x, labels)
    names = {"super-resolution x4": "7×7 → 28×28", "de-blurring": "blur and noise", "random mask": "30 % of pixels"}
    groups: dict[str, dict[str, Tensor]] = {
        "": {"original": x},
        "image to image": dict(again),
        "another class": {"by inversion": other},
        "inpainting": {
            "masked": filled["mmps"].before["masked"],
            "replacement": filled["replacement"].results["result"],
            "RePaint": filled["repaint"].results["result"],
            "MMPS": filled["mmps"].results["result"],
        },
    } | {
        {"super-resolution x4": "super-resolution", "de-blurring": "de-blurring", "random mask": "random mask"}[task]: {
            names[task]: found.before["measured"],
            "MMPS": found.results["result"],
        }
        for task, found in tasks.items()
    }
    side, gap, left, between, dpi = 84, 5, 330, 20, 150
    wide = left + len(x) * (side + gap)
    high = sum(len(rows) * (side + gap) + between for rows in groups.values()) - between + 10 + 2 * gap
    drawing = Figure(figsize=(wide / dpi, high / dpi), dpi=dpi)
    top = gap
    for title, rows in groups.items():
        for k, (name, pictures) in enumerate(rows.items()):
            image = strip(pictures, side, gap)
            axes = drawing.add_axes((left / wide, 1 - (top + side) / high, image.width / wide, side / high))
            axes.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            at = 1 - (top + side / 2) / high
            drawing.text(
                (left - 14) / wide, at, name, ha="right", va="center", fontsize=8.5, color=MUTED if title else INK
            )
            if k == 0 and title:
                drawing.text(8 / wide, at, title, ha="left", va="center", fontsize=8.5, color=INK, weight="bold")
            top += side + gap
            if pictures is other:
                for column, label in enumerate(target.tolist()):
                    middle, at = (left + column * (side + gap) + side / 2) / wide, 1 - (top + 5) / high
                    drawing.text(middle, at, model.names[label], ha="center", va="center", fontsize=6, color=MUTED)
                top += 10
        top += between
    drawing.savefig(PICTURE)


def main(n: int) -> None:
    model = undiffuse.load("fashion")
    test = open_source("fashion-mnist").test
    assert test is not None
    data = materialise(Subset(test, np.arange(max(n, 100))), Prepare())
    x, labels = data.x, torch.as_tensor(data.labels)
    started = time.perf_counter()
    first = [int((labels == k).nonzero()[0]) for k in (9, 7, 5, 8, 3, 2, 6, 1)][:SHOWN]
    figure(model, x[first], labels[first])
    print(f"figure: {time.perf_counter() - started:.0f} s", flush=True)
    text = (
        f"{n} pictures of Fashion-MNIST's test set, `fashion` without class, {STEPS} steps, one sample a picture: "
        f"PSNR in dB, mean ± standard error. Noise of std {NOISE} in what is measured, none in inpainting.\n\n"
    )
    text += compared(model, x[:n]) + "\n\n" + NOTES + "\n\n" + inverted(model, x, labels)
    write("Editing and restoration", "make bench-editing", text)
    print(f"{time.perf_counter() - started:.0f} s")


NOTES = """\
PSNR of one posterior sample is about 3 dB below that of the posterior's mean, the best that there is, and says nothing
of whether samples are spread right (`tests/exact/test_restore.py` does). As their authors report, MMPS is ahead of
TMPD, PiGDM and DPS on linear problems (Rozet et al. 2024), DiffPIR of DPS in PSNR (Zhu et al. 2023), RePaint of
replacement (Lugmayr et al. 2022), and DAPS, with hundreds of evaluations, of DPS and DiffPIR (Zhang et al. 2024).
Methods have their default settings here; the papers tune zeta of DPS for each task."""

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64)
