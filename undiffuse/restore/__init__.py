"""Editing of pictures by a denoiser of them: image to image, inpainting, inversion, prompt-to-prompt, FlowEdit."""

from undiffuse.restore.flowedit import flowedit
from undiffuse.restore.img2img import img2img
from undiffuse.restore.inpaint import Replace, Returning, composite, inpaint
from undiffuse.restore.inversion import invert, reconstruct
from undiffuse.restore.prompt import check_aligned, injected, paired, prompt_to_prompt
from undiffuse.restore.strength import levels_from

__all__ = [
    "Replace",
    "Returning",
    "check_aligned",
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
]
