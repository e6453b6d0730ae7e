"""A run's state as safetensors and JSON, the same whatever the number of processes; no pickle."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from undiffuse.train.checkpoint import Checkpoints, load_weights, takes_part, weights, whole, whole_like
from undiffuse.train.ema import EMA
from undiffuse.train.plan import same_settings
from undiffuse.train.processes import Processes
from undiffuse.types import InputError


class Files:
    """Model, average, optimiser, the caller's own tensors `also`, the loss scale, and the step."""

    def __init__(
        self,
        model: nn.Module,
        ema: EMA,
        optimiser: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        identity: dict[str, Any],
        also: Mapping[str, Tensor],
    ) -> None:
        self.model, self.ema, self.optimiser, self.scaler = model, ema, optimiser, scaler
        self.identity, self.also = identity, also

    def save(self, checkpoints: Checkpoints, step: int, processes: Processes) -> None:
        """Commit the state; every process takes part where parameters are shards, the main one writes."""
        parts: dict[str, dict[str, Tensor]] = {}
        if takes_part(self.model, processes.main):
            parts = {"model": weights(self.model), "optimiser": self._moments()}
            parts |= {name: weights(average) for name, average in self._averages().items()}
        if self.also:
            parts["also"] = {name: value.clone() for name, value in self.also.items()}
        state = {"step": step, "identity": self.identity, "scaler": self.scaler.state_dict()}

        def write(folder: Path) -> None:
            for name, tensors in parts.items():
                save_file(tensors, folder / f"{name}.safetensors")
            (folder / "state.json").write_text(json.dumps(state))

        processes.together(lambda: checkpoints.save(step, write))

    def newest(self, checkpoints: Checkpoints | None) -> int:
        """Take up the newest checkpoint that verifies: its step, or 0 if there is none; damaged ones are named."""
        found = None if checkpoints is None else checkpoints.latest()
        if found is None:
            return 0
        for problem in found[1]:
            warnings.warn(f"{problem}; going on from {found[0].name}", stacklevel=4)
        return self.read(found[0])

    def read(self, folder: Path) -> int:
        """Take up the state in `folder`: its step. Raises InputError if it belongs to a run with other settings."""
        known = json.loads((folder / "state.json").read_text())
        same_settings(known["identity"], self.identity, folder)
        stored = load_file(folder / "also.safetensors") if (folder / "also.safetensors").exists() else {}
        missing = [k for k, v in self.also.items() if k not in stored or stored[k].shape != v.shape]
        if missing:
            raise InputError(
                f"{folder} belongs to a run with other settings: it has no {', '.join(missing)} of these shapes. Give "
                "another folder or delete that run"
            )
        load_weights(self.model, folder / "model.safetensors")
        for name, average in self._averages().items():
            load_weights(average, folder / f"{name}.safetensors")
        owners = [p for group in self.optimiser.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(folder / "optimiser.safetensors").items():
            i, name = key.split(".", 1)
            owner = owners[int(i)]
            state.setdefault(int(i), {})[name] = whole_like(value, owner) if value.shape == owner.shape else value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        for name, value in self.also.items():
            value.copy_(stored[name])
        if known["scaler"]:
            self.scaler.load_state_dict(known["scaler"])
        return int(known["step"])

    def _averages(self) -> dict[str, nn.Module]:
        return {f"ema-{i}" if i else "ema": average for i, average in enumerate(self.ema.averages)}

    def _moments(self) -> dict[str, Tensor]:
        return {
            f"{i}.{name}": whole(value).contiguous()
            for i, state in self.optimiser.state_dict()["state"].items()
            for name, value in state.items()
        }
