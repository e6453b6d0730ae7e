"""Samples to be scored: drawn from a model by several processes, with what made them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from undiffuse.cond import Cond, Given
from undiffuse.data.source import digest
from undiffuse.denoise import Counter
from undiffuse.evals.features import hash_of
from undiffuse.guide import CFG, Guidance
from undiffuse.modal import Modal
from undiffuse.model import Model
from undiffuse.sample import State, sample
from undiffuse.tableau import Tableau
from undiffuse.train import NonFinite, Processes, weights

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Sampler:
    """A model as its configuration samples it, or by `plan` in place of solver and grid; sample k is given told[k]."""

    model: Model
    told: Cond | Given | None
    seed: int
    processes: Processes
    plan: Tableau | Modal | None = None

    def at(self, steps: int | None = None, w: float | None = None) -> Sampler:
        """The same with other steps or another guidance weight."""
        values = self.model.config.values
        if steps is not None:
            values = {**values, "sample": {**values["sample"], "steps": steps}}
        if w is not None:
            values = {**values, "guidance": {**values["guidance"], "w": w}}
        config = replace(self.model.config, values=values)
        return replace(self, model=replace(self.model, config=config))

    @property
    def guidance(self) -> Guidance:
        """The configured guidance; none without conditions."""
        return CFG() if self.told is None else self.model.guide()

    @property
    def steps(self) -> int:
        """The solver's steps."""
        return int(self.model.config.values["sample"]["steps"])

    def draw(self, n: int, progress: Callable[[int, int], None] = lambda done, n: None) -> Tensor:
        """Samples 0, ..., n - 1 in the data's range, each process making its part; raises NonFinite.

        Network calls have `sample.rows` rows, so that neither the batch nor the number of processes changes a sample.
        """
        x = self.processes.divide(n, lambda part: self._part(part, progress)).cpu()
        bad = ~torch.isfinite(x.flatten(1)).all(1)
        if bool(bad.any()):
            raise NonFinite(
                f"{int(bad.sum())} of {n} samples have NaN or infinite values, the first is {int(bad.nonzero()[0])}: "
                "try another solver, grid or steps"
            )
        return x

    def _part(self, part: range, progress: Callable[[int, int], None]) -> Tensor:
        model, use, out = self.model, self.model.config.section("sample"), []
        starts = range(part.start, part.stop, use.batch)
        for i, start in enumerate(starts):
            k = range(start, min(part.stop, start + use.batch))
            told = None if self.told is None else self.told[k.start : k.stop]

            def on_state(state: State, i: int = i) -> None:
                progress(i * self.steps + state.i, len(starts) * self.steps)

            x = model.sample(
                len(k), given=told, plan=self.plan, guidance=self.guidance, seed=self.seed, first=k.start,
                progress=on_state,
            )  # fmt: skip
            if self.plan is not None:
                progress(i + 1, len(starts))
            out.append(x)
        return torch.cat(out)

    def cost(self) -> dict[str, Any]:
        """nfe (sequential evaluations) and network rows of one sample, counted on sample 0."""
        counter, model = Counter(self.model.denoiser), self.model
        cond = None if self.told is None else self.told[:1]
        use, own = model.config, self.plan is None
        sample(
            counter, (1, *model.shape), model.schedule, steps=self.steps, solver=use.build("solver") if own else None,
            grid=use.build("grid") if own else None, plan=self.plan, cond=cond, guidance=self.guidance, seed=self.seed,
            device=model.device,
        )  # fmt: skip
        return {"nfe": counter.calls, "rows": counter.rows}

    def about(self, weights_are: str, run: str = "") -> dict[str, Any]:
        """What made the samples, as plain data."""
        values = self.model.config.values
        how: dict[str, Any] = {
            **({"run": run} if run else {}),
            "model": hash_of_model(self.model),
            "weights": weights_are,
            "parameters": self.model.parameters,
            "schedule": _short(repr(self.model.schedule)),
            "solver": values["solver"],
            "grid": values["grid"],
            "steps": self.steps,
        }
        if self.plan is not None:
            how |= {"solver": f"plan {self.plan.name}".strip(), "grid": "the plan's", "steps": self.plan.nfe}
        return {
            **how,
            **self.cost(),
            "guidance": values["guidance"] if self.told is not None else "none",
            **self._given(),
            "seed": self.seed,
            "rows of a network call": values["sample"]["rows"],
            "tuned on": list(self.plan.tuned_on) if self.plan is not None else [],
        }

    def _given(self) -> dict[str, str]:
        those = "none" if self.told is None else f"those of the first {len(self.told)} training samples"
        named = {"conditions": ", ".join(self.told.reads)} if isinstance(self.told, Given) else {}
        return {"labels" if not named else "values of conditions": those, **named}


def _short(text: str) -> str:
    """A text, or of a long one its start and hash: a table of levels has a thousand numbers."""
    return text if len(text) <= 100 else f"{text[:40]}… (SHA-256 {digest(text)[:16]})"


def hash_of_model(model: Model) -> str:
    """SHA-256 of the weights; says so where a model has none that could be hashed."""
    found = sorted(weights(model.denoiser).items())
    if not found:
        return "unknown: a function without parameters"
    return digest(*(part for name, value in found for part in (name, hash_of(value))))
