"""`Maker`: a process that makes shards, as .safetensors or as .tar of PNGs; `Count` tells how far a job is."""

from __future__ import annotations

import hashlib
import io
import itertools
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save as serialise
from torch import Tensor

from undiffuse import plot
from undiffuse.bulk.folder import claim, to_json, trouble_of
from undiffuse.bulk.job import Job
from undiffuse.cond import in_turn
from undiffuse.config import Config
from undiffuse.modal import read_plan
from undiffuse.model import Model
from undiffuse.runfolder import fingerprint
from undiffuse.sample import State
from undiffuse.train import NonFinite, replace_bytes, sha256
from undiffuse.types import InputError

Progress = Callable[[float, int, float], None]  # samples that are there, of how many, and made each second


class Maker:
    """Makes shards of a job: the model is loaded once, here, and put on `device` (default: the job's)."""

    def __init__(self, job: Job, model: Model | None = None, device: torch.device | None = None) -> None:
        model = model or Model.load(job.run, job.ema)
        if fingerprint(job.run) != job.model:
            raise InputError(f"{job.run} was trained again since the job began: run the command again")
        torch.set_num_threads(job.threads)  # results may depend on it
        config = Config.resolve(model.config.values, job.values)
        model.denoiser.to(device or job.device)
        self.job, self.model = job, model.using(config)
        if job.plan is not None and sha256(job.plan[0]) != job.plan[1]:
            raise InputError(f"{job.plan[0]} has changed since the job began: run the command again")
        for file, known in job.files:
            if sha256(Path(file)) != known:
                raise InputError(f"{file} has changed since the job began: run the command again")
        self.words = model.words(dict(job.words))
        self.plan = None if job.plan is None else read_plan(job.plan[0])
        grid, steps = config.build("grid"), config.section("sample").steps
        self.steps = self.plan.nfe if self.plan is not None else len(grid(self.model.schedule, steps)) - 1

    def make(self, index: int, count: Count | None = None) -> bool:
        """Make a shard, unless it is sound by now; whether it was made. Raises NonFinite for NaN and infinite values.

        Samples are the same for every order, batch and number of processes: each depends on the seed and its number.
        """
        job, span = self.job, self.job.span(index)
        if trouble_of(job, index) is None:  # another command was faster, or a lost block is tried again
            if count is not None:
                count.at(index, 1)
            return False
        labels = torch.tensor([job.labels[k % len(job.labels)] for k in span]) if job.labels else None
        given = in_turn(self.words, span) if self.words else None
        x = self.model.sample(
            len(span), labels, given=given, plan=self.plan, first=span.start, progress=self._steps(index, count)
        )
        x = x.cpu().contiguous()
        bad = ~torch.isfinite(x.flatten(1)).all(1)
        if bool(bad.any()):
            raise NonFinite(
                f"{int(bad.sum())} samples have NaN or infinite values, the first is {span[int(bad.nonzero()[0])]}, "
                f"and shard {index} was not written: try another solver, grid or steps"
            )
        if job.format == "png":
            data = _tar(self.model.shown(x), labels, span.start)
        else:
            data = serialise({"x": x} if labels is None else {"x": x, "label": labels})
        claim(job)
        replace_bytes(job.path(index), data)
        digest = hashlib.sha256(data).hexdigest()
        facts = {"file": job.path(index).name, "first": span.start, "n": len(span)}
        replace_bytes(job.sidecar(index), to_json({**facts, "bytes": len(data), "sha256": digest}))
        if count is not None:
            count.at(index, 1)
        return True

    def _steps(self, index: int, count: Count | None) -> Callable[[State], None] | None:
        """What counts a shard's solver steps, of all its batches."""
        if count is None:
            return None
        batches = -(-len(self.job.span(index)) // self.job.values["sample"]["batch"])
        seen = itertools.count(1)
        return lambda _: count.at(index, 0.999 * next(seen) / (batches * self.steps))


class Count:
    """How many samples are there by now and at what rate; other processes are taken to be as fast as this one."""

    def __init__(self, job: Job, todo: Sequence[int], processes: int, progress: Progress | None) -> None:
        self.job, self.progress, self.processes = job, progress, processes
        self.kept, self.most = job.n - sum(len(job.span(i)) for i in todo), sum(len(job.span(i)) for i in todo)
        self.done, self.started = 0.0, time.perf_counter()

    def at(self, shard: int, share: float) -> None:
        """Say that a share of a shard is there besides the finished ones; a share of 1 finishes it."""
        size = len(self.job.span(shard)) * share
        if share == 1:
            self.done += size
        if self.progress is not None:
            drawn = min(self.most, (self.done + (share < 1) * size) * self.processes)
            self.progress(self.kept + drawn, self.job.n, drawn / (time.perf_counter() - self.started))


def _tar(x: Tensor, labels: Tensor | None, first: int) -> bytes:
    """Images (k, c, h, w) as PNGs named by sample number, each with its label as .cls, as WebDataset reads them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i, pixels in enumerate(plot.to_uint8(x)):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            files = {"png": png.getvalue()} | ({} if labels is None else {"cls": str(int(labels[i])).encode()})
            for suffix, data in files.items():
                about = tarfile.TarInfo(f"{first + i:09d}.{suffix}")  # time 0 and owner 0: the same bytes every time
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))
    return buffer.getvalue()
