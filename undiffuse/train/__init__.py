"""Training: the objective, the loop, the average of the weights, checkpoints."""

from undiffuse.train.bins import LevelBins
from undiffuse.train.checkpoint import Checkpoints, commit, is_sound, load_weights, replace_text, verify, weights
from undiffuse.train.ema import EMA
from undiffuse.train.loop import NonFinite, Plan, TrainState, same_settings, train
from undiffuse.train.objective import LEVELS, WEIGHTS, Objective

__all__ = [
    "EMA",
    "LEVELS",
    "WEIGHTS",
    "Checkpoints",
    "LevelBins",
    "NonFinite",
    "Objective",
    "Plan",
    "TrainState",
    "commit",
    "is_sound",
    "load_weights",
    "replace_text",
    "same_settings",
    "train",
    "verify",
    "weights",
]
