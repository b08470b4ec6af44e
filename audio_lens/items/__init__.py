"""Items of a study, in tables and in batches; their activations; what many of them say."""

from audio_lens.items import read, statistics
from audio_lens.items.activations import Activations
from audio_lens.items.batches import Batch
from audio_lens.items.collect import collect
from audio_lens.items.controls import ControlError
from audio_lens.items.demo import demo_items
from audio_lens.items.findings import found, found_by_name
from audio_lens.items.item import Item, ItemError
from audio_lens.items.items import Items
from audio_lens.items.measuring import Measured, measured
from audio_lens.items.methods import ANALYSES, METHODS, Method, MethodError, analysis, method, rerun
from audio_lens.items.pairs import Dropped, ItemPair, PairBatch, Pairs
from audio_lens.items.shards import ActivationsError

__all__ = [
    "ANALYSES",
    "METHODS",
    "Activations",
    "ActivationsError",
    "Batch",
    "ControlError",
    "Dropped",
    "Item",
    "ItemError",
    "ItemPair",
    "Items",
    "Measured",
    "Method",
    "MethodError",
    "PairBatch",
    "Pairs",
    "analysis",
    "collect",
    "demo_items",
    "found",
    "found_by_name",
    "measured",
    "method",
    "read",
    "rerun",
    "statistics",
]
