"""Restoration: samples of p(x0 | y) for y = A(x0) + noise, and of p(x0) exp(reward(x0)); and editing: image to image,
inpainting, inversion, FlowEdit and prompt-to-prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from undiffuse.restore.daps import DAPS
from undiffuse.restore.diffpir import DiffPIR
from undiffuse.restore.dps import DPS
from undiffuse.restore.flowedit import flowedit
from undiffuse.restore.img2img import img2img
from undiffuse.restore.inpaint import Replace, Returning, composite, inpaint
from undiffuse.restore.inversion import invert, reconstruct
from undiffuse.restore.mmps import MMPS
from undiffuse.restore.operators import OPERATORS, Blur, Downsample, Gray, Mask, Matrix, Operator
from undiffuse.restore.pigdm import PiGDM
from undiffuse.restore.problem import Problem, simulate
from undiffuse.restore.prompt import check_aligned, check_attention, check_shares, injected, paired, prompt_to_prompt
from undiffuse.restore.solve import Restorer, restore
from undiffuse.restore.steer import Steered, steer
from undiffuse.restore.strength import levels_from
from undiffuse.restore.tmpd import TMPD

RESTORERS: dict[str, Callable[..., Any]] = {
    "mmps": MMPS,
    "tmpd": TMPD,
    "pigdm": PiGDM,
    "dps": DPS,
    "diffpir": DiffPIR,
    "daps": DAPS,
}

__all__ = [
    "DAPS",
    "DPS",
    "MMPS",
    "OPERATORS",
    "RESTORERS",
    "TMPD",
    "Blur",
    "DiffPIR",
    "Downsample",
    "Gray",
    "Mask",
    "Matrix",
    "Operator",
    "PiGDM",
    "Problem",
    "Replace",
    "Restorer",
    "Returning",
    "Steered",
    "check_aligned",
    "check_attention",
    "check_shares",
    "composite",
    "flowedit",
    "img2img",
    "injected",
    "inpaint",
    "invert",
    "levels_from",
    "paired",
    "prompt_to_prompt",
    "reconstruct",
    "restore",
    "simulate",
    "steer",
]
