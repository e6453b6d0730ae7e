"""Samples to be scored: drawn from a model by several processes, with what made them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from undiffuse.data.source import digest
from undiffuse.denoise import Counter, FixedRows
from undiffuse.evals.features import hash_of
from undiffuse.guide import CFG, Guidance
from undiffuse.model import Model
from undiffuse.sample import Noise, State, sample
from undiffuse.tableau import Tableau
from undiffuse.train import NonFinite, Processes, weights

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Sampler:
    """A model as its configuration samples it, or by `plan` in place of solver and grid; sample k has labels[k]."""

    model: Model
    labels: Tensor | None
    seed: int
    processes: Processes
    plan: Tableau | None = None

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
        """The configured guidance; none without labels."""
        return CFG() if self.labels is None else self.model.config.build("guidance")  # type: ignore[no-any-return]

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
            labels = None if self.labels is None else self.labels[k.start : k.stop]
            if self.plan is None:

                def on_state(state: State, i: int = i) -> None:
                    progress(i * self.steps + state.i, len(starts) * self.steps)

                x = model.sample(
                    len(k), labels, guidance=self.guidance, seed=self.seed, first=k.start, progress=on_state
                )
            else:
                denoiser = FixedRows(model.denoiser, use.rows) if use.rows else model.denoiser
                x = model.restore(self._planned(self.plan, denoiser, k, labels))
                progress(i + 1, len(starts))
            out.append(x)
        return torch.cat(out)

    @torch.no_grad()
    def _planned(self, plan: Tableau, denoiser: Any, k: range, labels: Tensor | None) -> Tensor:
        model, cond = self.model, self.model.cond(labels, len(k))
        noise = Noise((len(k), *model.shape), self.seed, k, device=model.device)
        denoise = self.guidance(denoiser, None if cond is None else cond.to(model.device))
        return plan.run(denoise, plan.start[1] * noise(), noise)

    def cost(self) -> dict[str, Any]:
        """nfe (sequential evaluations) and network rows of one sample, counted on sample 0."""
        counter, model = Counter(self.model.denoiser), self.model
        labels = None if self.labels is None else self.labels[:1]
        if self.plan is not None:
            self._planned(self.plan, counter, range(1), labels)
        else:
            cond, use = model.cond(labels, 1), model.config
            sample(
                counter, (1, *model.shape), model.schedule, steps=self.steps, solver=use.build("solver"),
                grid=use.build("grid"), cond=cond, guidance=self.guidance, seed=self.seed, device=model.device,
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
            how |= {"solver": f"tableau {self.plan.name}".strip(), "grid": "the tableau's", "steps": self.plan.nfe}
        return {
            **how,
            **self.cost(),
            "guidance": values["guidance"] if self.labels is not None else "none",
            "labels": f"those of the first {len(self.labels)} training samples" if self.labels is not None else "none",
            "seed": self.seed,
            "rows of a network call": values["sample"]["rows"],
            "tuned on": list(self.plan.tuned_on) if self.plan is not None else [],
        }


def _short(text: str) -> str:
    """A text, or of a long one its start and hash: a table of levels has a thousand numbers."""
    return text if len(text) <= 100 else f"{text[:40]}… (SHA-256 {digest(text)[:16]})"


def hash_of_model(model: Model) -> str:
    """SHA-256 of the weights; says so where a model has none that could be hashed."""
    found = sorted(weights(model.denoiser).items())
    if not found:
        return "unknown: a function without parameters"
    return digest(*(part for name, value in found for part in (name, hash_of(value))))
