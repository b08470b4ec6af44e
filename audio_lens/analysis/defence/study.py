"""An attack and its defences in one call, ranked on some items and tested on others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from audio_lens.analysis.defence.attacking import EPS, STEP, STEPS, attack
from audio_lens.analysis.defence.defending import DEFENCES, PERCENTS, defend
from audio_lens.analysis.defence.neurons import SITE, check_neurons, rank
from audio_lens.analysis.subspaces.curve import two_parts
from audio_lens.items import ItemError, Items, analysis, method
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

LEAST = 4  # attacked items: two to rank neurons on, two to test


@method("defence.robustness", whole="it ranks neurons on one part of all items")
def robustness(
    model: HookedAudioTransformer,
    items: Items,
    *,
    site: str = SITE,
    how: Sequence[str] = DEFENCES,
    percents: Sequence[float | int] = PERCENTS,
    targets: Sequence[str] | None = None,
    eps: float | int = EPS,
    step: float | int = STEP,
    steps: int = STEPS,
    bias: float | int = 0.5,
    by: str | None = None,
    size: int = 8,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Which answers survive an attack, and which with neurons defended; see `defend`.

    All items are attacked. On one half (of groups of its own, where there are several) neurons are
    ranked, on the other half the defences are tested.

    Args:
        model, items, targets, eps, step, steps: as in `attack`.
        site, how, percents, bias: as in `defend`.
        by, size, seed, progress: as in `attack`.

    Raises:
        ItemError: fewer than four items that can be attacked.
        As `attack` and `defend`.
    """
    check_neurons(model, site)
    options: dict[str, Any] = {"size": size, "progress": progress}
    moved = attack(
        model, items, targets=targets, eps=eps, step=step, steps=steps, seed=seed, **options
    )
    if len(moved) < LEAST:
        raise ItemError(
            f"{LEAST} attacked items or more are ranked and tested on, got {len(moved)}"
        )
    place = {item.id: row for row, item in enumerate(moved.pairs.clean)}
    train, test = (
        [place[item.id] for item in part.clean] for part in two_parts(moved.pairs, 0.5, seed)
    )
    result = defend(
        model,
        moved[test],
        rank(model, moved.pairs[train], site, **options),
        how=how,
        percents=percents,
        bias=bias,
        by=by,
        seed=seed,
        **options,
    )
    result.report = [
        *moved.result.report[:1],
        f"Neurons are ranked on {len(train)} items, and tested on {len(test)} others.",
        *result.report,
    ]
    return result


@analysis("defence")
def study(
    model: HookedAudioTransformer, items: Items, *, seed: int = 0, progress: bool | None = None
) -> Result:
    """How little noise changes the answers, and does putting neurons back keep them?"""
    return robustness(model, items, seed=seed, progress=progress)
