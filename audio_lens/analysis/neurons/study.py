"""What ``audio-lens analyse neurons`` runs."""

from __future__ import annotations

from audio_lens.analysis.neurons.comparing import compare
from audio_lens.analysis.neurons.dosing import dose
from audio_lens.analysis.neurons.logged import logged, right
from audio_lens.analysis.neurons.scoring import scores
from audio_lens.analysis.neurons.selection import select
from audio_lens.items import ItemError, Items, analysis
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

SHARE = 0.08
PART = "encoder"


@analysis("neurons")
def study(
    model: HookedAudioTransformer, items: Items, *, seed: int = 0, progress: bool | None = None
) -> dict[str, Result]:
    """Which neurons of the encoder belong to one answer, and what is lost without them?

    Neurons are chosen on one part of the items that are answered rightly and tested on the other:
    other groups, where these say the same answers, else other items.
    """
    kept = right(model, items)
    fitted, tested, how = halves(kept, seed)
    acts = logged(model, fitted, PART, progress=progress)
    selectors = compare(model, tested, acts, SHARE, seed=seed, progress=progress)
    chosen = select(scores(acts, "answer", control=False, resamples=0), SHARE)
    curve = dose(model, tested, chosen, seed=seed, progress=progress)
    for result in (selectors, curve):
        result.report.append(how)
        result.dropped = {"not answered rightly": len(items) - len(kept)}
        result.dropped["answer not in both parts"] = len(kept) - len(fitted) - len(tested)
    return {"selectors": selectors, "dose": curve}


def halves(items: Items, seed: int = 0) -> tuple[Items, Items, str]:
    """Two parts in which the same answers are, and how they were made.

    Raises:
        ItemError: fewer than two answers that are there twice.
    """
    try:
        parts = _common(*items.split(seed=seed))
        return *parts, "Neurons were chosen on some groups and tested on others."
    except ItemError:  # no groups, one group, or groups of other answers
        order = _alternating(items)
    parts = _common(items[order[0]], items[order[1]])
    note = "Neurons were chosen and tested on items of the same groups: they may know the voices."
    return *parts, note


def _alternating(items: Items) -> tuple[list[int], list[int]]:
    """Rows of both parts: the items of every answer in turn."""
    seen: dict[str, int] = {}
    parts: tuple[list[int], list[int]] = ([], [])
    for row, item in enumerate(items):
        count = seen.get(str(item.answer), 0)
        parts[count % 2].append(row)
        seen[str(item.answer)] = count + 1
    return parts


def _common(one: Items, other: Items) -> tuple[Items, Items]:
    """The items whose answers both parts have."""
    both = set(one.values("answer")) & set(other.values("answer"))
    if len(both) < 2:
        raise ItemError(
            f"{len(both)} answers are in both parts of the items that are answered rightly: two or "
            "more are needed, each in two items"
        )
    return one.filter(lambda x: x.answer in both), other.filter(lambda x: x.answer in both)
