"""What ``audio-lens analyse adapters`` runs."""

from __future__ import annotations

from typing import Any

from audio_lens.analysis.adapters.aligning import alignment
from audio_lens.analysis.adapters.classifying import classifier_lens
from audio_lens.analysis.adapters.contributing import contributions
from audio_lens.analysis.adapters.counting import directions
from audio_lens.analysis.adapters.erasing import erasure
from audio_lens.analysis.adapters.outputs import Spots
from audio_lens.analysis.adapters.streams import is_adapted
from audio_lens.analysis.adapters.sweeping import sweep
from audio_lens.items import Items, analysis
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

SEEDS, STEPS = 3, 30  # of the sweep


@analysis("adapters")
def study(
    model: HookedAudioTransformer, items: Items, *, seed: int = 0, progress: bool | None = None
) -> dict[str, Result]:
    """What does an adapter do to each layer; or, without one, which layers learn the answers best?

    A model that carries a live adapter (``--model`` names the adapter's folder) is analysed where
    the adapter sits. Any other is given adapters in groups of its blocks, which are trained on one
    half of the items, of groups of their own where there are several, and tested on the other.
    """
    options: dict[str, Any] = {"seed": seed, "progress": progress}
    if not is_adapted(model):
        return {"sweep": sweep(model, items, **_sweep_of(items, seed), **options)}
    part = Spots.of(model, None).part
    results = {
        "alignment": alignment(model, items, part=part, **options),
        "directions": directions(model, items, part=part, **options),
        "contributions": contributions(model, items, part=part, **options),
        "erasure": erasure(model, items, part=part, **options),
    }
    if model.cfg.output_kind == "classes":
        results["classifier_lens"] = classifier_lens(model, items, **options)
    return results


def _sweep_of(items: Items, seed: int) -> dict[str, Any]:
    """Arguments of the sweep: items without groups are split as they come."""
    groups = {item.group for item in items}
    split = "group" if len(groups) > 1 and None not in groups else "id"
    return {"split": split, "seeds": list(range(seed, seed + SEEDS)), "steps": STEPS}
