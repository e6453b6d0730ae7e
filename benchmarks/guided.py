"""Guidance on trained models: fidelity, diversity and saturation over the scale of guidance that samples really see.

`python benchmarks/guided.py [fashion scenes]` trains what is not trained yet into runs/guidance/ (fashion and its
classifier: 40 CPU minutes; scenes is the recipe text.toml: 20), measures every kind of guidance at several
strengths, and writes its section and docs/guidance-NAME.png. It goes on where it stopped: scores are kept in
runs/guidance/NAME-scores.json. The best strength of each kind is measured again on fresh samples.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from common import table, write
from torch import Tensor

from undiffuse import APG, CFG, Autoguidance, CFGpp, ClassifierGuidance, Rescale, sample
from undiffuse.config import Config, parse_overrides
from undiffuse.data.picture import to_float
from undiffuse.evals import extract, frechet, open_features, precision, recall
from undiffuse.evaluation.open import data_of_run
from undiffuse.fit import fit
from undiffuse.guide import Guidance
from undiffuse.guide.effective import Watched
from undiffuse.model import Model

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "guidance"
COMMON = (
    "optimiser=muon train.lr=5e-3 train.warmup=40 train.precision=bf16 engine.device=cpu eval.every=0 track=none "
    "data=fashion-mnist net.kind=unet net.patch=2 levels.kind=uniform-lam"
)
TRAININGS = {
    "fashion": f"{COMMON} levels.lam_min=-4 levels.lam_max=3 grid.lam_max=3 train.snapshots=16 net.width=48 "
    "net.mults=[1,2] net.depth=1 train.steps=6500 train.batch=64",
    "reader": f"kind=classifier {COMMON} levels.lam_min=-6 levels.lam_max=4 net.width=32 net.mults=[1,2,2] "
    "train.steps=2800 train.batch=128 held_out=2048",
}
INTERVAL, UNTIL = (-1.0, 3.0), 0.0625  # of lam; a share of the training, the first of 16 snapshots
CONFIRMED = ("CFG", "interval")
Made = Callable[[float], Guidance]


@dataclass(frozen=True)
class Set:
    """A trained model with real data to hold its samples against."""

    name: str
    model: Model
    real: Tensor
    features: Callable[[Tensor], Tensor]
    told: Callable[[int, int], Any]
    read: Callable[[Tensor], dict[str, float]]
    n: int
    confirmed: int


def trained(name: str) -> Model:
    """The run of this name, trained where it is not yet."""
    out = RUNS / name
    fit(Config.resolve(parse_overrides(TRAININGS[name].split()), {"out": str(out)}))
    return Model.load(out)


def methods(classifier: str | None) -> dict[str, tuple[Made, tuple[float, ...]]]:
    """Each kind of guidance by its strength, and the strengths that are measured."""
    weights = (1.5, 2.0, 3.0, 5.0)
    every: dict[str, tuple[Made, tuple[float, ...]]] = {
        "CFG": (CFG, (1.0, 1.25, 1.5, 2.0, 3.0, 5.0)),
        "interval": (lambda w: CFG(w, *INTERVAL), weights),
        "rescale": (Rescale, weights),
        "APG": (APG, (2.0, 3.0, 5.0, 8.0)),
        "CFG++": (lambda scale: CFGpp(scale), (0.5, 0.7, 1.0)),
        "autoguidance": (lambda w: Autoguidance(w, until=UNTIL), (1.5, 2.0)),
    }
    if classifier is not None:
        every["classifier"] = (lambda w: ClassifierGuidance(w, run=classifier), (2.0, 3.0))
    return every


def drawn(s: Set, guide: Guidance, n: int, seed: int, batch: int = 256) -> Tensor:
    """n samples, in the network's range."""
    use, config = s.model.config.section("sample"), s.model.config
    out = []
    for start in range(0, n, batch):
        many = min(batch, n - start)
        out.append(
            sample(
                s.model.denoiser, (many, *s.model.shape), s.model.schedule, steps=use.steps,
                solver=config.build("solver"), grid=config.build("grid"), cond=s.told(start, many), guidance=guide,
                seed=seed, first=start, rows=64,
            )
        )  # fmt: skip
    return torch.cat(out)


def scale_of(s: Set, guide: Guidance, n: int = 32) -> float:
    """The effective scale over n samples and their evaluations."""
    watched = Watched(guide)
    drawn(s, watched, n, 9)
    return watched.scale


def scores(s: Set, guide: Guidance, n: int, seed: int) -> dict[str, float]:
    """Fréchet distance, precision, recall, the share of elements out of the data's range, what is read as asked."""
    started = time.perf_counter()
    x = drawn(s, guide, n, seed)
    seconds = (time.perf_counter() - started) / n
    fake, real = extract(s.features, x), extract(s.features, s.real)
    part = real[: len(fake)]
    return {
        "frechet": frechet(real, fake),
        "precision": precision(part, fake).value,
        "recall": recall(part, fake).value,
        "beyond": float((x.abs() > 1.05).double().mean()),
        **s.read(x),
        "ms": 1000 * seconds,
    }


def fashion() -> tuple[Set, dict[str, tuple[Made, tuple[float, ...]]]]:
    """Fashion-MNIST by class, with the features of its own classifier."""
    from undiffuse.evals.classifier import load_classifier

    model = trained("fashion")
    fit(Config.resolve(parse_overrides(TRAININGS["reader"].split()), {"out": str(RUNS / "reader")}))
    train, held = data_of_run(model.config, RUNS / "fashion", 10_000)
    judge = load_classifier("fashion-mnist")

    def read(x: Tensor) -> dict[str, float]:
        with torch.no_grad():
            found = torch.cat([judge(part.clamp(-1, 1)).argmax(1) for part in x.split(500)])
        return {"read as asked": float((found == torch.arange(len(x)) % 10).double().mean())}

    def told(first: int, n: int) -> Any:
        return model.cond([k % 10 for k in range(first, first + n)], n)

    features = open_features("auto", train.x, "fashion-mnist")[0]
    found = Set("fashion", model, held.x, features, told, read, 1000, 1000)
    return found, methods(str(RUNS / "reader"))


def scenes() -> tuple[Set, dict[str, tuple[Made, tuple[float, ...]]]]:
    """Scenes by captions of held-out combinations, with principal components as features."""
    from conditions import held_out, read_captions
    from conditions import trained as recipe

    model, _ = recipe("text")
    raws, told = held_out(model, 1024)
    train, _ = data_of_run(model.config, Path(model.config.values["out"]), 0)
    real = torch.from_numpy(np.stack([to_float(np.asarray(raw.x)) for raw in raws]))
    told = model.encoders.ahead(told, model.shape[1:])  # type: ignore[union-attr]

    def read(x: Tensor) -> dict[str, float]:
        found = read_captions(x[: len(raws)], raws[: len(x)])
        return {name: found[name] for name in ("colour", "shape", "relation")}

    def those(first: int, n: int) -> Any:
        return told[torch.arange(first, first + n) % len(raws)]

    kinds = {name: (make, strengths[-3::2]) for name, (make, strengths) in methods(None).items()}
    kinds["CFG"] = (CFG, (1.0, 2.0, 5.0))
    del kinds["autoguidance"]  # no snapshots of this run
    return Set("scenes", model, real, open_features("pca", train.x)[0], those, read, 128, 0), kinds


SETS = {"fashion": fashion, "scenes": scenes}


def best(rows: Sequence[dict[str, Any]], method: str) -> dict[str, Any]:
    """The row of a method with the least Fréchet distance."""
    return min((row for row in rows if row["method"] == method), key=lambda row: row["frechet"])


COLOURS = dict(
    zip(
        ("CFG", "interval", "rescale", "APG", "CFG++", "autoguidance", "classifier"),
        ("#1f2937", "#2563eb", "#16a34a", "#d97706", "#9ca3af", "#dc2626", "#7c3aed"),
        strict=True,
    )
)


def picture(name: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Scores over the effective scale, and diversity over fidelity."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.9))
    panels = (
        ("frechet", "Fréchet distance (less is better)"),
        ("recall", "recall: diversity"),
        ("precision", "precision: fidelity"),
        ("beyond", "share of pixels out of range"),
    )
    for axis, (key, label) in zip(axes, panels, strict=True):
        start = next(row for row in rows if row["method"] == "CFG" and row["strength"] == 1)
        for method, colour in COLOURS.items():
            own = sorted([row for row in rows if row["method"] == method], key=lambda row: row["scale"])
            if not own:
                continue
            own = own if method == "CFG" else [start, *own]
            axis.plot([r["scale"] for r in own], [r[key] for r in own], "o-", color=colour, label=method, ms=4, lw=1.6)
        axis.set_xlabel("effective scale")
        axis.set_title(label, fontsize=10, loc="left")
        axis.set_xscale("log")
        axis.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_yscale("log")
    axes[-1].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", help="which; default: all")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    text = []
    for name in asked.sets or SETS:
        s, kinds = SETS[name]()
        kept = RUNS / f"{name}-scores.json"
        rows: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.is_file() else []

        def measured(method: str, strength: float, n: int, seed: int, s: Set = s, kinds: Any = kinds,
                     rows: list[dict[str, Any]] = rows, kept: Path = kept) -> dict[str, Any]:  # fmt: skip
            key = {"method": method, "strength": strength, "n": n, "seed": seed}
            for row in rows:
                if all(row[k] == v for k, v in key.items()):
                    return row
            guide = s.model.guide(kinds[method][0](strength))
            rows.append({**key, "scale": scale_of(s, guide), **scores(s, guide, n, seed)})
            kept.write_text(json.dumps(rows, indent=1))
            print(rows[-1], flush=True)
            return rows[-1]

        curves = [measured(m, v, s.n, 0) for m, (_, strengths) in kinds.items() for v in strengths]
        picture(name, curves, ROOT / "docs" / f"guidance-{name}.png")
        columns = [c for c in curves[0] if c not in ("method", "strength", "n", "seed", "scale", "ms")]
        shown = [
            [
                r["method"],
                f"{r['strength']:g}",
                f"{r['scale']:.2f}",
                *(f"{r[c]:.3g}" for c in columns),
                f"{r['ms']:.1f}",
            ]
            for r in curves
        ]
        header = ["guidance", "strength", "effective scale", *columns, "ms a sample"]
        text.append(f"### {name}: {s.n:,} samples of each\n\n{table(header, shown)}")
        if s.confirmed:
            chosen = [best(curves, method) for method in CONFIRMED]
            again = [measured(r["method"], r["strength"], s.confirmed, 1) for r in chosen]
            plain = again[0]
            lines = [
                [r["method"], f"{r['strength']:g}", f"{r['scale']:.2f}", *(f"{r[c]:.3g}" for c in columns),
                 f"{100 * (1 - r['frechet'] / plain['frechet']):+.0f} %", f"{r['recall'] - plain['recall']:+.3f}"]
                for r in again
            ]  # fmt: skip
            more = [*header[:-1], "gain in Fréchet over CFG", "in recall"]
            text.append(f"The best strength of each, on {s.confirmed:,} fresh samples:\n\n{table(more, lines)}")
    write("Guidance on trained models", "python benchmarks/guided.py", "\n\n".join(text))


if __name__ == "__main__":
    main()
