"""The last stage: what can be read, and how layers resemble each other, beside what is used."""

from __future__ import annotations

from audio_lens.analysis import probes, similarity
from audio_lens.analysis.tap.place import Place
from audio_lens.items import Items
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

LABEL = "answer"


def readable(
    model: HookedAudioTransformer,
    items: Items,
    place: Place,
    *,
    size: int,
    seed: int,
    progress: bool | None,
) -> dict[str, Result]:
    """Probes of the answer at the confirmed windows, layer by layer, and how alike layers are."""
    beside = {"site": place.site, "where": place.where, "size": size, "seed": seed}
    return {
        "probes": probes.layers(model, items, LABEL, progress=progress, **beside),
        "similarity": similarity.layers(model, items, progress=progress, **beside),
    }
