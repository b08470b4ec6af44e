"""What ``audio-lens analyse steering`` runs."""

from __future__ import annotations

from audio_lens.analysis.grounding.share import bare
from audio_lens.analysis.steering.back_patching import back_patch
from audio_lens.analysis.steering.contrasting import contrast
from audio_lens.analysis.steering.finding import directions
from audio_lens.analysis.steering.sweeping import sweep
from audio_lens.items import ItemError, Items, analysis
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

SITE, WHERE = "decoder.resid_pre", "last"


@analysis("steering")
def study(
    model: HookedAudioTransformer, items: Items, *, seed: int = 0, progress: bool | None = None
) -> dict[str, Result]:
    """Can a direction make the model go by what it hears, and does decoding do as much?

    Of conflict items: the direction leads from the prompts as they are to the same clips without
    the contradicting text, at the last position. It is learned on one part of the items (other
    groups, where there are several) and added on the other.
    """
    fitted, tested = _parts(items, seed)
    beside = {"seed": seed, "progress": progress}
    found = directions(model, bare(fitted, None), fitted, SITE, where=WHERE, layers=_layers(model))
    return {
        "sweep": sweep(model, tested, found, **beside),
        "back_patch": back_patch(model, tested, **beside),
        "aad": contrast(model, tested, "AAD", **beside),
        "gacl": contrast(model, tested, "GACL", **beside),
    }


def _layers(model: HookedAudioTransformer) -> list[int]:
    """All but the first, whose last position has read nothing yet."""
    return list(range(1, model.cfg.need_decoder.n_layers))


def _parts(items: Items, seed: int) -> tuple[Items, Items]:
    """Items to learn from, and others."""
    lacking = [item.name for item in items if item.other_text is None]
    if lacking:
        raise ItemError(
            f"{len(lacking)} items have no other_text, by which what contradicts their clips is "
            f"found, such as {lacking[0]}"
        )
    try:
        return items.split(seed=seed)
    except ItemError:  # no groups, or one
        return items[::2], items[1::2]
