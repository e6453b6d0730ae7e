"""Training: the objective, the loop, the average of the weights, checkpoints."""

from undiffuse.train.bins import LevelBins
from undiffuse.train.checkpoint import MANIFEST, Checkpoints, commit, is_sound, load_weights, verify, weights
from undiffuse.train.durable import Lock, replace_bytes, replace_text, sha256, sweep
from undiffuse.train.ema import EMA
from undiffuse.train.feed import Feed, Rows
from undiffuse.train.gradient import Gradient, out_of_memory
from undiffuse.train.loop import NonFinite, TrainState, train
from undiffuse.train.objective import LEVELS, WEIGHTS, Objective
from undiffuse.train.plan import Engine, Plan, same_settings
from undiffuse.train.processes import Lost, Processes, launched
from undiffuse.train.stop import Preempted, Signals
from undiffuse.train.track import TRACKERS, Tracker, read_log

__all__ = [
    "EMA",
    "LEVELS",
    "MANIFEST",
    "TRACKERS",
    "WEIGHTS",
    "Checkpoints",
    "Engine",
    "Feed",
    "Gradient",
    "LevelBins",
    "Lock",
    "Lost",
    "NonFinite",
    "Objective",
    "Plan",
    "Preempted",
    "Processes",
    "Rows",
    "Signals",
    "Tracker",
    "TrainState",
    "commit",
    "is_sound",
    "launched",
    "load_weights",
    "out_of_memory",
    "read_log",
    "replace_bytes",
    "replace_text",
    "same_settings",
    "sha256",
    "sweep",
    "train",
    "verify",
    "weights",
]
