"""The folder of a job: whose it is, which shards are sound, and the ledger and manifest at its end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from undiffuse.bulk.job import Job
from undiffuse.data import JOB, LEDGER
from undiffuse.train import MANIFEST, Lost, replace_bytes, same_settings, sha256, sweep
from undiffuse.types import InputError
from undiffuse.version import __version__

MISSING = "missing"
_SHARD = re.compile(r"shard-(\d{6,})\.(json|safetensors|tar)")
_OURS = r"(?:shard-\d{6,}|job|ledger|manifest)\.\w+"


def to_json(value: Any, indent: int | None = None) -> bytes:
    """One line of JSON, or several."""
    return (json.dumps(value, indent=indent) + "\n").encode()


def inspect(job: Job) -> None:
    """InputError if the folder has files of others, or belongs to a job with other settings; nothing is written."""
    if job.out.exists() and not job.out.is_dir():
        raise InputError(f"{job.out} is a file: shards go into a folder of their own, give another --out")
    about = job.out / JOB
    for path in sorted(job.out.iterdir()) if job.out.is_dir() else ():
        ours = (_SHARD.fullmatch(path.name) or path.name in (JOB, LEDGER, MANIFEST)) and path.is_file()
        if not path.name.startswith(".") and not (ours and about.exists()):
            raise InputError(
                f"{job.out} has {path.name}, which is no file of a sampling job: give an empty or new folder as --out, "
                "or move that file away"
            )
    if not about.exists():
        return
    _compare(job)
    sweep(job.out, _OURS)
    for path in sorted(job.out.iterdir()):  # only now is the number of shards known to be right
        match = _SHARD.fullmatch(path.name)
        index = int(match[1]) if match else 0
        if match and (index >= job.shards or path not in (job.path(index), job.sidecar(index))):
            raise InputError(f"{path} is no shard of this job, which has {job.shards}: move that file away")


def _compare(job: Job) -> None:
    """InputError naming the settings in which the folder's job differs from this one."""
    about = job.out / JOB
    try:
        known = dict(json.loads(about.read_text())["identity"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{about} is damaged: whose shards these are is unknown, give another --out") from error
    same_settings(known, json.loads(json.dumps(job.identity)), job.out)


def claim(job: Job) -> None:
    """Make the folder this job's before its first shard; InputError if another job was faster."""
    about = job.out / JOB
    if not about.exists():
        job.out.mkdir(parents=True, exist_ok=True)
        made_by = {"undiffuse": __version__, "torch": torch.__version__}
        replace_bytes(about, to_json({"identity": job.identity, "made_by": made_by}, 1), keep=True)
    _compare(job)


def _facts(job: Job, index: int) -> dict[str, Any] | None:
    """What a shard's sidecar says; None if there is none. Raises ValueError if it is damaged."""
    try:
        facts: dict[str, Any] = json.loads(job.sidecar(index).read_bytes())
    except FileNotFoundError:
        return None
    span = job.span(index)
    expected = {"file": job.path(index).name, "first": span.start, "n": len(span)}
    good = isinstance(facts, dict) and expected.items() <= facts.items() and {"sha256", "bytes"} <= facts.keys()
    if not good:
        raise ValueError("its sidecar is not of this job")
    return facts


def trouble_of(job: Job, index: int) -> str | None:
    """MISSING, what is wrong with a shard, or None if it is sound."""
    try:
        facts = _facts(job, index)
        if facts is None:
            return MISSING
        path = job.path(index)
        if not path.is_file():
            return "the file is gone"
        if path.stat().st_size != facts["bytes"]:
            return f"{path.stat().st_size} bytes instead of {facts['bytes']}"
        return None if sha256(path) == facts["sha256"] else "its SHA-256 is another"
    except ValueError as error:
        return str(error)


def finish(job: Job) -> None:
    """Write the ledger, a line for each shard, and the manifest, by which `undiffuse.train.verify` knows every file."""
    lines, listed = [], dict[str, dict[str, Any]]()

    def enter(path: Path, data: bytes) -> None:
        listed[path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    enter(job.out / JOB, (job.out / JOB).read_bytes())
    for index in range(job.shards):
        facts = None
        with contextlib.suppress(ValueError):
            facts = _facts(job, index)
        if facts is None:
            raise Lost(f"{job.path(index)} was changed while the job ran: run the command again")
        listed[facts["file"]] = {"bytes": facts["bytes"], "sha256": facts["sha256"]}
        enter(job.sidecar(index), job.sidecar(index).read_bytes())
        lines.append(to_json(facts))
    ledger = b"".join(lines)
    enter(job.out / LEDGER, ledger)
    for name, data in ((LEDGER, ledger), (MANIFEST, to_json(listed, 1))):
        path = job.out / name
        if not path.is_file() or path.read_bytes() != data:
            replace_bytes(path, data)
    sweep(job.out, _OURS)
