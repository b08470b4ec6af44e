"""Does a model listen, where is what it heard, and when does it consult that.

Of items whose text contradicts their clip. A single coefficient cannot say all three (see `gc`):

- `stream_share`: which part of what both streams move is the audio's. *Does it listen.*
- `residence`: where each stream's news is, at which layer. *Where is it now.*
- `hand_over`: the layer at which the last position takes it over. *When is it consulted.*
"""

from audio_lens.analysis.grounding.gates import and_or, gc, kinds
from audio_lens.analysis.grounding.residence import CONTROLS, hand_over, handed_over, residence
from audio_lens.analysis.grounding.share import (
    answers,
    counterfactual,
    gaps,
    stream_share,
    text_dominance,
)
from audio_lens.items import Items, analysis
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

__all__ = [
    "CONTROLS",
    "and_or",
    "answers",
    "counterfactual",
    "gaps",
    "gc",
    "grounding",
    "hand_over",
    "handed_over",
    "kinds",
    "residence",
    "stream_share",
    "text_dominance",
]


@analysis("grounding")
def grounding(
    model: HookedAudioTransformer, items: Items, *, seed: int = 0, progress: bool | None = None
) -> dict[str, Result]:
    """Does it listen or read, where is each stream at which layer, and when is it handed over?"""
    share = stream_share(model, items, seed=seed, progress=progress)
    moved = residence(model, items, seed=seed, progress=progress)
    return {"share": share, "residence": moved, "hand_over": handed_over(moved, seed=seed)}
