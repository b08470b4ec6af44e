"""The five selectors beside each other: whose neurons are specific to their class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.answers import TOLD
from audio_lens.analysis.neurons.deactivating import EFFECTS, losses, randoms, three
from audio_lens.analysis.neurons.effects import METRICS, PER_LAYER, RANDOM, Study
from audio_lens.analysis.neurons.scoring import lacking, scores
from audio_lens.analysis.neurons.selection import Selection, select
from audio_lens.analysis.neurons.selectors import AAPE, KINDS, SHARES
from audio_lens.arguments import names
from audio_lens.errors import InputError
from audio_lens.items import Activations, Items, method
from audio_lens.items.collect import Place
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

BESIDE = (RANDOM, PER_LAYER)


@method("neurons.compare")
def compare(
    model: HookedAudioTransformer,
    items: Items,
    activations: Activations,
    share: float | int = 0.01,
    *,
    kinds: Sequence[str] = KINDS,
    per: str = "model",
    label: str = "answer",
    where: Place = "all",
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What every selector's neurons take from their own class, and from the others.

    Each selector takes the same share of neurons (AAPE filters by it: that share has a low
    entropy), and these are taken out of the run of items that they were not chosen by.

    Args:
        model: the model.
        items: to test on, as in `deactivation`.
        activations: of other items, as `logged` gives them.
        share, per: as in `select`.
        kinds: the selectors.
        label, where, by, size, seed, progress: as in `deactivation`.

    Returns:
        Axes "metric" (log_prob, recall), "kind" and "effect" (self, cross, specificity), as
        `specificity` tells them. Controls are as many random neurons as the first selector took,
        in the model and in each layer. NaN of selectors that leave a class without neurons.

    Raises:
        As `scores`, `select` and `deactivation`.
    """
    asked = names("kinds", kinds)
    if not asked:
        raise InputError(f"kinds are some of {', '.join(KINDS)}, got none")
    tried = {kind: _chosen(activations, label, kind, share, per, seed) for kind in asked}
    chosen = {kind: one for kind, one in tried.items() if isinstance(one, Selection)}
    if not chosen:
        raise InputError("; ".join(f"{kind}: {why}" for kind, why in tried.items()))
    first = next(iter(chosen.values()))
    study = Study.of(model, items, first, label, where, size, progress)
    lost = losses(study, chosen | randoms(first, BESIDE, seed))
    told = {name: three(one, study.own) for name, one in lost.items()}
    weight = told[next(iter(chosen))][1]

    def of(values: Float[Tensor, "n metrics *cells"], axes: dict[str, list], **more: Any) -> Result:
        wide = weight.reshape(-1, *[1] * (values.ndim - 1))
        return study.found(values * wide, axes, by, seed, denominators=weight, **more)

    controls = {name: of(told[name][0], {"effect": list(EFFECTS)}) for name in BESIDE}
    meta = {"title": "what is lost by neurons taken out", "value": "loss", "site": first.site}
    nothing = torch.full_like(told[next(iter(chosen))][0], torch.nan)
    values = torch.stack([told[kind][0] if kind in told else nothing for kind in asked], dim=2)
    axes = {"kind": asked, "effect": list(EFFECTS)}
    result = of(values, axes, controls=controls, meta=meta | {"share": f"{share:g}", "per": per})
    lacking = [f"{kind}: {why}." for kind, why in tried.items() if isinstance(why, str)]
    result.report = [*_said(result, chosen), *lacking, TOLD]
    return result


def _chosen(
    activations: Activations, label: str, kind: str, share: float | int, per: str, seed: int
) -> Selection | str:
    """The neurons of a selector; or why it takes none for some class."""
    filters = (SHARES[0], share, SHARES[2]) if kind == AAPE else None
    ranked = scores(activations, label, kind, shares=filters, control=False, resamples=0, seed=seed)
    bare = lacking(ranked)
    return select(ranked, share, per) if not bare else f"no neuron may be taken for {bare}"


def _said(result: Result, chosen: dict[str, Selection]) -> list[str]:
    """A line for every selector, and one for random neurons."""
    lines = []
    for kind, selection in chosen.items():
        one = result.select(kind=kind)
        numbers = "; ".join(f"{metric} {_three_of(one, metric)}" for metric in METRICS)
        counts = selection.counts
        lines.append(f"{kind}, {min(counts)} to {max(counts)} neurons of a class: {numbers}.")
    for name, control in result.controls.items():
        numbers = "; ".join(f"{metric} {_three_of(control, metric)}" for metric in METRICS)
        lines.append(f"{name}: {numbers}.")
    return lines


def _three_of(result: Result, metric: str) -> str:
    own, cross, _ = result.cells(metric)
    return f"self {own.value:.2f} [{own.low:.2f}, {own.high:.2f}], cross {cross.value:.2f}"
