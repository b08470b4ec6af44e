"""What ``audio-lens analyse knockout`` runs."""

from __future__ import annotations

from audio_lens.analysis.knockout.knocking import knock_out
from audio_lens.analysis.knockout.reading import mass
from audio_lens.items import Items, analysis
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result


@analysis("knockout")
def study(
    model: HookedAudioTransformer, items: Items, *, seed: int = 0, progress: bool | None = None
) -> dict[str, Result]:
    """In which blocks does the answer depend on attention to the audio?"""
    return {
        "knock_out": knock_out(model, items, seed=seed, progress=progress),
        "mass": mass(model, items, seed=seed, progress=progress),
    }
