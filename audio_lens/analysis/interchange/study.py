"""What ``audio-lens analyse interchange`` runs."""

from __future__ import annotations

from audio_lens.analysis.interchange.accuracy import iia
from audio_lens.analysis.interchange.aligning import align
from audio_lens.items import Items, analysis
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

SITE, WHERE = "decoder.resid_pre", "audio"


@analysis("interchange")
def study(
    model: HookedAudioTransformer, items: Items, *, seed: int = 0, progress: bool | None = None
) -> dict[str, Result]:
    """Does a run answer as the one whose states it takes, and how few directions are enough?

    The clips lend to each other, and so do their ``other_audio``.
    """
    pairs = items.pairs(stream="audio")
    beside = {"seed": seed, "progress": progress}
    return {
        "iia": iia(model, pairs, SITE, WHERE, **beside),
        "align": align(model, pairs, SITE, WHERE, layer=0, ranks=[1, 8], **beside),
    }
