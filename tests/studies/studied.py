"""What workers of studies under test import: cases, loaders, things that go wrong."""

from __future__ import annotations

import os
import signal
import time

from audio_lens import HookedAudioTransformer, Item, Items, metrics
from audio_lens.studies import Case


def embedded() -> HookedAudioTransformer:
    """The shipped model, by a loader."""
    return HookedAudioTransformer.from_pretrained("embedded")


def other_weights() -> HookedAudioTransformer:
    """The shipped model with one weight changed."""
    model = HookedAudioTransformer.from_pretrained("embedded")
    next(model.parameters()).data += 0.5
    return model


def case(model: HookedAudioTransformer, item: Item) -> Case:
    """An item beside its counterpart, by the log-probability of its answer."""
    (batch,) = Items([item]).pairs(stream="audio").batches(model, 1)
    return Case(batch.pair.clean, batch.pair.corrupted, metrics.log_prob(str(item.answer)))


def deadly(model: HookedAudioTransformer, item: Item) -> Case:
    """A case that kills its process for items labelled so."""
    if item.labels.get("deadly"):
        os.kill(os.getpid(), signal.SIGKILL)
    return case(model, item)


def slow(model: HookedAudioTransformer, item: Item) -> Case:
    """A case that takes its time, so that a study can be stopped on its way."""
    time.sleep(1.0)
    return case(model, item)
