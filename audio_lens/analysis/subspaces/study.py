"""What ``audio-lens analyse subspaces`` runs."""

from __future__ import annotations

from audio_lens.analysis.subspaces.bases import basis, differences
from audio_lens.analysis.subspaces.curve import curve, two_parts
from audio_lens.analysis.subspaces.effects import effects
from audio_lens.items import Items, analysis
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

RANKS = (1, 2, 4, 8, 16, 32, 64)
SITE, LAYER, WHERE = "decoder.resid_pre", 0, "audio"


@analysis("subspaces")
def study(
    model: HookedAudioTransformer, items: Items, *, seed: int = 0, progress: bool | None = None
) -> dict[str, Result]:
    """How few directions of what the decoder hears carry the answer?

    Differences between the clips and their ``other_audio`` are taken on one half of the items
    (of groups of its own, where there are several) and tested on the other.
    """
    kept, _ = items.pairs(stream="audio").kept(model)
    train, test = two_parts(kept, 0.5, seed)
    news = differences(model, train, SITE, WHERE, layer=LAYER, progress=progress)
    found = basis(news, site=SITE, layer=LAYER)
    ks = [k for k in RANKS if k <= found.rank]
    beside = {"seed": seed, "progress": progress}
    saturation = curve(model, test, SITE, WHERE, found, ks, **beside)
    few = found.first(min(16, found.rank))
    return {"curve": saturation, "effects": effects(model, test, SITE, WHERE, few, **beside)}
