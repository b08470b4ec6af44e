"""The last stage: what can be read, and how layers resemble each other, beside what is used."""

from __future__ import annotations

from typing import Any

from audio_lens.analysis import probes, similarity
from audio_lens.analysis.tap.place import Place
from audio_lens.items import Items
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

LABEL = "answer"


def probed(model: HookedAudioTransformer, items: Items, place: Place, **how: Any) -> Result:
    """Probes of the answer at the confirmed windows, layer by layer."""
    return probes.layers(model, items, LABEL, site=place.site, where=place.where, **how)


def compared(model: HookedAudioTransformer, items: Items, place: Place, **how: Any) -> Result:
    """How alike the layers are at the confirmed windows."""
    return similarity.layers(model, items, site=place.site, where=place.where, **how)
