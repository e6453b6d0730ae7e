"""Training: the objective, the loop, the average of the weights, checkpoints."""

from undiffuse.train.augment import AUGMENTS, Augment, Flip, Geometric
from undiffuse.train.bins import ClassifierBins, LevelBins
from undiffuse.train.checkpoint import MANIFEST, Checkpoints, commit, is_sound, load_weights, verify, weights
from undiffuse.train.classifier import ClassifierObjective
from undiffuse.train.coupling import COUPLINGS, Immiscible
from undiffuse.train.draws import DRAWS, Adaptive, Independent, Stratified
from undiffuse.train.durable import Lock, replace_bytes, replace_text, sha256, sweep
from undiffuse.train.ema import EMA, PROFILES, TRACKED, Classic, Power, Snapshots
from undiffuse.train.feed import Feed, Rows
from undiffuse.train.gradient import Gradient, out_of_memory
from undiffuse.train.loop import NonFinite, TrainState, train
from undiffuse.train.objective import LEVELS, WEIGHTS, Aim, Objective
from undiffuse.train.optimiser import OPTIMISERS, AdamW, Muon, check_sharded, made
from undiffuse.train.plan import Engine, Plan, same_settings
from undiffuse.train.processes import Lost, Processes, launched
from undiffuse.train.stop import Preempted, Signals
from undiffuse.train.track import TRACKERS, Tracker, find_tracker, read_log
from undiffuse.train.variance import VARIANCES, VLB, Hybrid

__all__ = [
    "AUGMENTS",
    "COUPLINGS",
    "DRAWS",
    "EMA",
    "LEVELS",
    "MANIFEST",
    "OPTIMISERS",
    "PROFILES",
    "TRACKED",
    "TRACKERS",
    "VARIANCES",
    "VLB",
    "WEIGHTS",
    "AdamW",
    "Adaptive",
    "Aim",
    "Augment",
    "Checkpoints",
    "Classic",
    "ClassifierBins",
    "ClassifierObjective",
    "Engine",
    "Feed",
    "Flip",
    "Geometric",
    "Gradient",
    "Hybrid",
    "Immiscible",
    "Independent",
    "LevelBins",
    "Lock",
    "Lost",
    "Muon",
    "NonFinite",
    "Objective",
    "Plan",
    "Power",
    "Preempted",
    "Processes",
    "Rows",
    "Signals",
    "Snapshots",
    "Stratified",
    "Tracker",
    "TrainState",
    "check_sharded",
    "commit",
    "find_tracker",
    "is_sound",
    "launched",
    "load_weights",
    "made",
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
