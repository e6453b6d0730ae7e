"""A job's shards by actors of Ray Data."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from undiffuse.bulk.job import Job
from undiffuse.bulk.make import Count, Maker
from undiffuse.train import Lost, NonFinite
from undiffuse.types import InputError


class _Actor:
    """A `Maker` in a process of Ray's; a shard's error is told as data, since Ray would try it again or hide it."""

    def __init__(self, job: Job) -> None:
        self.maker = Maker(job)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {**row, "made": self.maker.make(int(row["index"])), "kind": "", "text": "", "number": 0}
        except Exception as error:
            number = error.errno if isinstance(error, OSError) else 0
            return {**row, "made": False, "kind": type(error).__name__, "text": str(error), "number": number or 0}


def _error(row: dict[str, Any]) -> Exception:
    """What an actor's row says was raised there; of an unknown kind, the actor counts as lost."""
    if row["number"]:
        return OSError(row["number"], row["text"])
    known = {kind.__name__: kind for kind in (NonFinite, InputError)}
    return known[row["kind"]](row["text"]) if row["kind"] in known else Lost(f"{row['kind']}: {row['text']}")


def on_ray(job: Job, todo: Sequence[int], workers: int | None, count: Count) -> list[int]:
    """Make these shards by actors of Ray Data: on the cluster at hand (RAY_ADDRESS), or one of this machine."""
    try:
        ray: Any = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError as error:
        raise InputError("Ray is not installed: pip install 'undiffuse[scale]'") from error
    with contextlib.redirect_stdout(sys.stderr):  # where Ray tells of workers that died
        return _spread(ray, job, todo, workers, count)


def _spread(ray: Any, job: Job, todo: Sequence[int], workers: int | None, count: Count) -> list[int]:
    mine = not ray.is_initialized()
    if mine:
        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGTERM) if main else None
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        if before is not None:  # Ray sets its own
            signal.signal(signal.SIGTERM, before)
    try:
        gpu = job.device != "cpu"
        most = int(ray.cluster_resources().get("GPU" if gpu else "CPU", 1))
        workers = min(len(todo), workers or max(1, most))
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        # a lost block is made again, and finds the shards that it finished: many blocks only to spread them evenly
        blocks = min(len(todo), 64 * workers)
        rows = ray.data.from_items([{"index": index} for index in todo], override_num_blocks=blocks).map(
            _Actor, fn_constructor_args=(job,), concurrency=workers, num_cpus=1, num_gpus=1 if gpu else 0
        )
        made = []
        for row in rows.iter_rows():
            if row["kind"]:
                raise _error(row)
            count.at(row["index"], 1)
            made += [int(row["index"])] if row["made"] else []
        return made
    except ray.exceptions.RayError as error:  # such as a worker that cannot load the model
        raise Lost(f"Ray: {str(error).strip().splitlines()[-1]}") from error
    finally:
        if mine:
            ray.shutdown()
