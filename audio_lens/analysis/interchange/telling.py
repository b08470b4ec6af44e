"""Accuracies of exchanges as results, and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from audio_lens.analysis.interchange.sources import CHANGED, KINDS, UNCHANGED
from audio_lens.analysis.subspaces.dormant import dormant
from audio_lens.items import Items, Pairs, found
from audio_lens.results import Result

RANDOM, WHOLE = "random_direction", "whole_site"
SHUFFLED, UNTRAINED = "permuted_labels", "untrained"


def told(
    values: Tensor,
    axes: Mapping[str, Sequence[Any]],
    pairs: Pairs[Items],
    by: str | None,
    seed: int,
) -> Result:
    """Accuracies by item, some axes, and kind of pairs."""
    return found(
        values,
        {**axes, "pairs": list(KINDS)},
        list(pairs.clean),
        by=by,
        seed=seed,
        dropped=pairs.dropped.counts,
    )


def said(result: Result, what: str) -> str:
    """The accuracies, in words."""
    one = result.mean()
    if "layer" in one.dims:
        curve = one.select(pairs=CHANGED).values.tolist()
        return f"{what} exchanged: the answer follows in " + ", ".join(
            f"{share:.2f} at {layer}"
            for layer, share in zip(one.coords["layer"], curve, strict=True)
        )
    changed, unchanged = (float(one.select(pairs=kind).values) for kind in (CHANGED, UNCHANGED))
    text = f"{what} exchanged: the answer follows in {changed:.2f} of the changed pairs"
    text += f", stays in {unchanged:.2f} of the unchanged"
    beside = [
        f"{words} {float(one.controls[name].select(pairs=CHANGED).values):.2f}"
        for name, words in (
            (RANDOM, "random ones"),
            (WHOLE, "the whole site"),
            (SHUFFLED, "a shuffled mapping"),
            (UNTRAINED, "in an untrained model"),
        )
        if name in one.controls
    ]
    return text + (f" (changed: {', '.join(beside)})" if beside else "")


def warned(result: Result) -> list[str]:
    """A warning where a subspace follows more often than the whole site (`dormant`)."""
    if WHOLE not in result.controls:
        return []
    changed = result.select(pairs=CHANGED)
    return dormant(changed, changed.controls[WHOLE], "changed pairs")


def notes(pairs: Pairs[Items]) -> list[str]:
    """What was tested, and what that cannot show."""
    return [
        f"{len(pairs)} pairs are tested, {pairs.dropped.total} left out ({pairs.dropped})",
        "that an exchange works says what these directions can do, not that nothing else does it",
    ]
