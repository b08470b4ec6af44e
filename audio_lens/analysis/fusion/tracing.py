"""Causal tracing of where audio and text meet: layer by layer, and by groups of positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from audio_lens.analysis.fusion.groups import Groups
from audio_lens.analysis.fusion.recovery import (
    CONTROLS,
    Request,
    Spot,
    clean_of,
    need_decoder,
    standing,
    traced,
)
from audio_lens.arguments import numbers
from audio_lens.edits.edit import chosen_layers
from audio_lens.items import Items, Pairs, analysis, method
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result
from audio_lens.sites import Site, SiteError


@method("fusion.trace")
def trace(
    model: HookedAudioTransformer,
    items: Items | Pairs,
    *,
    site: str = "decoder.resid_pre",
    layers: int | Sequence[int] | None = None,
    groups: Mapping[str, Any] | None = None,
    metric: Any = None,
    controls: Sequence[str] = CONTROLS,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Where in the decoder the states hold what was heard (2603.13768).

    In the run of the corrupted clip, the states of one layer at a group of positions are replaced
    by those of the clean run. A recovery of 1 says that they are all that the answer needs, 0 that
    they bring nothing. The default groups are all "text", all "audio", and the parts of the text:
    "early", "options" (the stretch of the item's text that has all its options; the whole
    "question" where some item has none), "late" and "last".

    Args:
        model: a model with a decoder.
        items: items, whose clips are set beside silence of the same length; or pairs. Kept are
            those that the model answers rightly on the clean side, and not on the corrupted.
        site: what is replaced: ``decoder.resid_pre``, the states entering a block, or another
            site of the decoder's blocks.
        layers: which blocks; None for all.
        groups: places by name in place of the default groups, or functions that give one for each
            item: ``{"cue": lambda item: Words(item.labels["cue"])}``.
        metric: as in `items.measured`.
        controls: of "identity" (the corrupted run's own states put back), "other_item" (states of
            another item with another answer), "norm_matched_noise" and "destroyed".
        by: a label whose values are drawn in place of items for the intervals, such as "group".
        size: of the batches.
        seed: of the draws.
        progress: as in `patching.sweep`.

    Returns:
        Recoveries by metric, item, layer and group: the ratio of means, with its interval. NaN for
        a prompt that does not have a group.

    Raises:
        InputError: a model without a decoder, or an unknown control.
        SiteError: a site or a layer that the model does not have.
        ItemError: answers that are not one token each, no pair that is left, or a given place that
            an item's prompt does not hold.
        ControlError: one pair alone, where another item is asked for.
    """
    rows = block_numbers(model, site, layers)
    found = traced(
        model,
        items,
        Request(
            [Spot(site, layer) for layer in rows],
            {"layer": rows},
            Groups.of_prompt(clean_of(items)) if groups is None else Groups.given(groups),
            metric,
            controls,
            by,
            size,
            seed,
            progress,
        ),
    )
    found.report[:0] = _said(found)
    found.report.append(
        "recovery says where clean states suffice, not that they are needed; and it holds for the "
        "kept items and this corruption"
    )
    return found


@analysis("fusion")
def analyse(
    model: HookedAudioTransformer,
    items: Items | Pairs,
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Where in the decoder do the states hold what was heard, by layer and part of the prompt?"""
    return trace(model, items, seed=seed, progress=progress)


def block_numbers(
    model: HookedAudioTransformer, site: str, layers: int | Sequence[int] | None
) -> list[int]:
    """The blocks asked for.

    Raises:
        InputError: a model without a decoder.
        SiteError: a site outside the blocks of the decoder, or a block that it does not have.
    """
    need_decoder(model)
    found = Site.parse(site, model)
    if found.n_layers is None or (found.part, found.positions_of) != ("decoder", "decoder"):
        raise SiteError(f"fusion is traced over positions of the decoder's blocks, not at {found}")
    asked = None if layers is None else numbers("layers", layers)
    return [layer for layer in chosen_layers(found, asked) if layer is not None]


def _said(result: Result) -> list[str]:
    """What was found in each metric, in words."""
    return [f"{metric}: {_held(result, metric)}" for metric in result.coords["metric"]]


def _held(result: Result, metric: str) -> str:
    """Which groups hold the answer, and at which layers."""
    layers = result.coords["layer"]
    held = {
        group: [
            n for n, holds in zip(layers, standing(result, metric, group), strict=True) if holds
        ]
        for group in result.coords["group"]
    }
    where = [f"{group!r} at {', '.join(map(str, at))}" for group, at in held.items() if at]
    nowhere = [repr(group) for group, at in held.items() if not at]
    said = (
        [f"the answer is held by {'; '.join(where)}"] if where else ["the answer is held nowhere"]
    )
    said += [f"at no layer by {', '.join(nowhere)}"] if where and nowhere else []
    return f"{'; '.join(said)} (recovery above 0.5 and above the controls)"
