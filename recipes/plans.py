"""Tunes the samplers of the models that come with the package, which `undiffuse sample NAME --nfe N` takes.

    python recipes/plans.py [digits] [mnist] [fashion] [--seconds 42] [--device cuda]

Each model has plans of 4, 5, 6, 8 and 10 evaluations, with labels at its own guidance and without; those that are there
are kept. The shipped ones were tuned on one NVIDIA H200 for 42 seconds each.
"""

from __future__ import annotations

import argparse

from undiffuse.model import Model
from undiffuse.plans import keep, made_for, plan_name
from undiffuse.runfolder import SHIPPED, shipped
from undiffuse.tune import Result

NFE = (4, 5, 6, 8, 10)


def make(name: str, labels: bool, seconds: float, device: str) -> None:
    """Tune and install the plans of a model."""
    model = Model.load(name)
    model.denoiser.to(device)
    files = {n: SHIPPED / name / plan_name(model, model.config, n, labels) for n in NFE}
    todo = [n for n, path in files.items() if not path.is_file()]
    if not todo:
        return
    guidance = model.config.build("guidance") if labels else None
    about = made_for(model, name, model.config, labels)

    def found(n: int, result: Result) -> None:
        print(result)
        keep(result.plan, files[n], about)
        print(f"{files[n]}: {files[n].stat().st_size:,} bytes", flush=True)

    model.tune(todo, guidance=guidance, seconds=seconds, progress=found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(shipped())}; default all")
    parser.add_argument("--seconds", type=float, default=42.0, help="of gradient steps for each number of evaluations")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    for name in args.names or shipped():
        for labels in (True, False):
            make(name, labels, args.seconds, args.device)


if __name__ == "__main__":
    main()
