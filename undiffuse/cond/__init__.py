"""Conditions by mechanism: a vector, tokens, or a spatial map; and the encoders that make them, one per modality."""

from collections.abc import Callable

from undiffuse.cond.audio import Audio, PretrainedAudio, log_mel
from undiffuse.cond.cond import Cond
from undiffuse.cond.encoders import Conditioned, Encoder, Encoders
from undiffuse.cond.given import Given, in_turn
from undiffuse.cond.label import Label
from undiffuse.cond.maps import Depth, Layout, Masked, Picture, Variation
from undiffuse.cond.masks import random_known
from undiffuse.cond.prompt import Prompt, prompt
from undiffuse.cond.text import Bytes, Text

ENCODERS: dict[str, Callable[..., Encoder]] = {
    "label": Label,
    "bytes": Bytes,
    "text": Text,
    "picture": Picture,
    "masked": Masked,
    "variation": Variation,
    "depth": Depth,
    "layout": Layout,
    "audio": Audio,
    "pretrained-audio": PretrainedAudio,
}

__all__ = [
    "ENCODERS",
    "Audio",
    "Bytes",
    "Cond",
    "Conditioned",
    "Depth",
    "Encoder",
    "Encoders",
    "Given",
    "Label",
    "Layout",
    "Masked",
    "Picture",
    "PretrainedAudio",
    "Prompt",
    "Text",
    "Variation",
    "in_turn",
    "log_mel",
    "prompt",
    "random_known",
]
