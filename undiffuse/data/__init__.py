"""Data: sources of samples, their preparation, their order, and the batches of a run."""

from undiffuse.data.audio import decode_audio, resampled
from undiffuse.data.builtin import BUILT_IN
from undiffuse.data.data import Data
from undiffuse.data.feed import Batch, Feed, InMemory
from undiffuse.data.open import load_data, open_source
from undiffuse.data.order import Bucketed, Order, Shuffled, Windowed, order_for
from undiffuse.data.prepare import Example, Prepare, bucket_of
from undiffuse.data.source import Arrays, Cached, Raw, Source, Subset, Unreadable, from_data
from undiffuse.data.split import materialise, split
from undiffuse.data.statistics import Statistics, measure, settle
from undiffuse.data.tensors import JOB, LEDGER
from undiffuse.data.value import read_depth, read_picture, read_segmentation

__all__ = [
    "BUILT_IN",
    "JOB",
    "LEDGER",
    "Arrays",
    "Batch",
    "Bucketed",
    "Cached",
    "Data",
    "Example",
    "Feed",
    "InMemory",
    "Order",
    "Prepare",
    "Raw",
    "Shuffled",
    "Source",
    "Statistics",
    "Subset",
    "Unreadable",
    "Windowed",
    "bucket_of",
    "decode_audio",
    "from_data",
    "load_data",
    "materialise",
    "measure",
    "open_source",
    "order_for",
    "read_depth",
    "read_picture",
    "read_segmentation",
    "resampled",
    "settle",
    "split",
]
