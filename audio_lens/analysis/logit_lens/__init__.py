"""The logit lens: what each layer would write, and how many items it would answer rightly."""

from __future__ import annotations

from audio_lens.analysis.logit_lens.curves import (
    critical_layer,
    landmarks,
    onset,
    peak,
    threshold,
)
from audio_lens.analysis.logit_lens.enriching import enrich, enrichment, grid, selected
from audio_lens.analysis.logit_lens.prefix import prefixed
from audio_lens.analysis.logit_lens.scores import (
    critical,
    information,
    outcomes,
    probability,
)
from audio_lens.analysis.logit_lens.settling import saturation, saturation_layer
from audio_lens.analysis.logit_lens.streams import (
    TOP_TOKENS,
    Lens,
    Streams,
    check_vocabulary,
    has_vocabulary,
    read_streams,
    stream_names,
    texts_of,
)
from audio_lens.analysis.logit_lens.training import divergence, train
from audio_lens.analysis.logit_lens.tuned import TunedLens
from audio_lens.items import Items, analysis
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

__all__ = [
    "TOP_TOKENS",
    "Lens",
    "Streams",
    "TunedLens",
    "analyse",
    "check_vocabulary",
    "critical",
    "critical_layer",
    "divergence",
    "enrich",
    "enrichment",
    "grid",
    "has_vocabulary",
    "information",
    "landmarks",
    "onset",
    "outcomes",
    "peak",
    "prefixed",
    "probability",
    "read_streams",
    "saturation",
    "saturation_layer",
    "selected",
    "stream_names",
    "texts_of",
    "threshold",
    "train",
]


@analysis("logit_lens")
def analyse(
    model: HookedAudioTransformer, items: Items, *, seed: int = 0, progress: bool | None = None
) -> dict[str, Result]:
    """In which layers would the model already answer rightly?

    Raises:
        InputError, ItemError, TokenError, ControlError: as `information`.
    """
    return {
        "information": information(model, items, seed=seed, progress=progress),
        "outcomes": outcomes(model, items, seed=seed, progress=progress),
    }
