"""Items of a study, in tables and in batches; their activations; what many of them say."""

from audio_lens.items import read
from audio_lens.items.batches import Batch
from audio_lens.items.item import Item, ItemError
from audio_lens.items.items import Items

__all__ = ["Batch", "Item", "ItemError", "Items", "read"]
