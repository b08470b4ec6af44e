"""How the streams meet: AND or OR at each layer, and the notes' coefficient, with its warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens import places
from audio_lens.analysis.grounding.residence import decoder_layers, held
from audio_lens.analysis.grounding.streams import (
    SITE,
    STREAMS,
    check,
    check_one,
    counterparts,
    fitting,
    own_span,
)
from audio_lens.edits import Put
from audio_lens.edits.edit import Edit
from audio_lens.inputs import InputError
from audio_lens.items import Items, PairBatch, found, measured, method, statistics
from audio_lens.items.measuring import Cell
from audio_lens.metrics import Metric
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Where
from audio_lens.results import Result

SITES = ("audio", "text", "last")
DIRECTIONS = ("denoise", "noise")
HIGH, LOW = 0.5, 0.2
LEAST, LEAST_SHARE = 0.5, 0.05  # logits, or shares of a gap, that a coefficient needs at least
BIASED = (
    "gc(L) is biased to the audio beyond layer 0: news of the text leaves its positions at once, "
    "while news of the audio stays. Ask stream_share whether the model listens, residence where "
    "the news is, and hand_over when it is consulted."
)


@method("grounding.and_or")
def and_or(
    model: HookedAudioTransformer,
    items: Items,
    *,
    metric: Any = None,
    layers: int | Sequence[int] | None = None,
    text_span: Where = None,
    high: float = HIGH,
    low: float = LOW,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Does the answer need both streams, or is either enough: AND or OR, layer by layer.

    Clean is the item, corrupted has both streams swapped. Put back from the clean run, one stream's
    span recovers what it is enough for (denoise); put from the corrupted run into the clean one, it
    takes away what it is needed for (noise). Both are shares of the gap. See `kinds`.

    Args:
        items: with ``other_audio`` and ``other_text``. The question makes most sense where clip and
            text agree on ``answer``, and both counterparts say ``against``: of contradicting
            streams each supports another answer.
        metric: None takes the logit difference of ``answer`` and ``against``.
        layers, text_span, by, seed, progress: as of `residence`.
        high, low: an effect above, or below, which a site is enough (or needed), or is not.

    Returns:
        Axes "layer", "group" (the audio's own span, the text's, the last position) and "direction"
        (denoise, noise). The control ``identity`` puts back a run's own activations.

    Raises:
        ItemError: items that lack a counterpart, or none that fits.
        InputError: thresholds that leave nothing between them, or layers that are not there.
    """
    _check_thresholds(high, low)
    check_one(metric)
    check(model, items)
    fit = fitting(model, items, ("both",))
    kept = fit.items
    depth = decoder_layers(model, layers)
    wanted = _logit_diff(model, kept) if metric is None else metric

    def cells(batch: PairBatch) -> Iterator[Cell]:
        clean, corrupted = batch.pair.clean, batch.pair.corrupted
        groups = _sites(model, batch, kept, text_span)
        own, other = held(model, clean, depth), held(model, corrupted, depth)
        for inputs, sources in ((clean, (other, own)), (corrupted, (own, other))):
            yield inputs, []
            for source in sources:
                for layer in depth:
                    for where in groups:
                        yield inputs, [Edit(SITE, Put(source), layer=layer, where=where)]

    pairs = counterparts(kept, "both")
    values = measured(model, pairs, cells, wanted, what="gates", progress=progress).values[:, 0]
    sides = values.reshape(len(kept), 2, -1)  # from the clean run, from the corrupted
    gap = sides[:, 0, 0] - sides[:, 1, 0]
    changed = (sides[..., 1:] - sides[..., :1]).reshape(-1, 2, 2, len(depth), len(SITES))
    effects = torch.stack([changed[:, 1], -changed[:, 0]], dim=-1)  # n sources layers sites ways
    axes = {"layer": depth, "group": list(SITES), "direction": list(DIRECTIONS)}
    drawn: dict[str, Any] = {"denominators": gap, "by": by, "seed": seed}
    controls = {"identity": found(effects[:, 1], axes, kept, **drawn)}
    result = found(effects[:, 0], axes, kept, controls=controls, dropped=fit.dropped, **drawn)
    result.meta |= {"high": str(high), "low": str(low)}
    result.report = [
        f"layer {layer}: {kind}" for layer, kind in kinds(result, high=high, low=low).items()
    ] + fit.notes
    return result


def kinds(result: Result, *, high: float = HIGH, low: float = LOW) -> dict[int, str]:
    """What the two streams' spans are to the answer, at each layer of an `and_or` result.

    "AND": each is needed (its noise above ``high``), and neither is enough by itself (denoise below
    ``low``). "OR": each is enough, and neither is needed. "audio" or "text": that one is enough and
    needed, and the other neither. "last": the last position is both, and neither stream's span
    matters any more. Anything else is "mixed".

    Raises:
        InputError: thresholds that leave nothing between them.
    """
    _check_thresholds(high, low)
    return {
        layer: _kind(result.select(layer=layer).mean(), high, low)
        for layer in result.coords["layer"]
    }


def _kind(one: Result, high: float, low: float) -> str:
    def is_all(effect: float, way: str) -> bool:
        return effect > high if way == "high" else effect < low

    def fits(patterns: Mapping[str, tuple[str, str]]) -> bool:
        return all(
            is_all(one.select(group=site, direction=direction).values.item(), way)
            for site, ways in patterns.items()
            for direction, way in zip(DIRECTIONS, ways, strict=True)
        )

    nothing, everything = ("low", "low"), ("high", "high")
    known = {
        "AND": dict.fromkeys(STREAMS, ("low", "high")),
        "OR": dict.fromkeys(STREAMS, ("high", "low")),
        "audio": {"audio": everything, "text": nothing},
        "text": {"audio": nothing, "text": everything},
        "last": dict.fromkeys(STREAMS, nothing) | {"last": everything},
    }
    return next((name for name, pattern in known.items() if fits(pattern)), "mixed")


def _check_thresholds(high: float, low: float) -> None:
    if not 0 <= low < high <= 1:
        raise InputError(f"thresholds lie in 0 <= low < high <= 1, got low={low}, high={high}")


def _sites(
    model: HookedAudioTransformer, batch: PairBatch, items: Items, text_span: Where
) -> list[Bool[Tensor, "b t"]]:
    last = places.locate(model, batch.pair.clean, SITE, "last")
    spans = [own_span(model, batch, items, stream, text_span) & ~last for stream in STREAMS]
    return [*spans, last]


def _logit_diff(model: HookedAudioTransformer, items: Items) -> Metric:
    items.check_answers(model, against=True)
    return items.metrics(model)["logit_diff"]


# -------------------------------------------------------------------------------- the notes' gc


@method("grounding.gc", whole="it is a ratio of all items: make a study of grounding.stream_share")
def gc(
    model: HookedAudioTransformer,
    items: Items,
    *,
    raw: bool = False,
    layers: int | Sequence[int] | None = None,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """The grounding coefficient gc(L) = D_a / (D_a + D_t) of un-normalised effects, with a warning.

    D is what putting back a stream's positions brings of the logit difference of ``answer`` and
    ``against`` when that stream is swapped: of the audio at its positions, of the text at all text
    but the last position; negative means count as 0.

    Args:
        items: conflict items, as `stream_share` takes them.
        raw: must be said. Normalised by each stream's own gap, the coefficient has the same curve
            for a model that listens and one that reads, and is not given.
        layers, by, seed, progress: as of `residence`.

    Returns:
        Axis "layer"; NaN where both streams bring back less than half a logit together. The control
        ``normalised`` is the form that cannot tell a listener from a reader.

    Raises:
        InputError: without ``raw=True``.
        ItemError: as `residence`.
    """
    if not raw:
        raise InputError(
            "gc normalised by each stream's own gap cannot tell a listener from a reader: use "
            "stream_share, residence and hand_over, or raw=True for the un-normalised coefficient"
        )
    warnings.warn(BIASED, stacklevel=3)
    check(model, items)
    fit = fitting(model, items)
    kept = fit.items
    depth = decoder_layers(model, layers)
    effects, gaps = zip(
        *(_brought_back(model, kept, stream, depth, progress) for stream in STREAMS), strict=True
    )
    both = torch.stack([torch.stack(effects, dim=1), torch.stack(gaps, dim=1)])
    groups = None if by is None else [item.value(by) for item in kept]

    def coefficient(is_normalised: bool) -> Result:
        def of_many(x: Float[Tensor, "m two streams layers"]) -> Float[Tensor, " layers"]:
            brought, gap = x.nanmean(0)
            return (
                _coefficient(brought / gap, LEAST_SHARE)
                if is_normalised
                else _coefficient(brought, LEAST)
            )

        values = both.movedim(1, 0)  # n two streams layers
        each = torch.stack([of_many(one[None]) for one in values])
        drawn = statistics.bootstrap(values, of_many, groups=groups, seed=seed)
        of_items = found(each, {"layer": depth}, kept, by=by, seed=seed)
        of_items.meta["together"] = "a coefficient of all items"
        return replace(of_items, estimate=drawn.value, low=drawn.low, high=drawn.high)

    result = coefficient(False)
    return replace(
        result,
        controls={"normalised": coefficient(True)},
        dropped=fit.dropped,
        report=[BIASED, *fit.notes],
    )


def _coefficient(
    brought: Float[Tensor, "streams layers"], least: float
) -> Float[Tensor, " layers"]:
    audio, text = brought.clamp(min=0)
    return (audio / (audio + text)).masked_fill(audio + text < least, torch.nan)


def _brought_back(
    model: HookedAudioTransformer,
    items: Items,
    stream: str,
    layers: Sequence[int],
    progress: bool | None,
) -> tuple[Float[Tensor, "n layers"], Float[Tensor, "n layers"]]:
    """What putting back a stream's positions brings of its answer, and the gap, in every layer."""
    where = places.AUDIO if stream == "audio" else places.TEXT - "last"

    def cells(batch: PairBatch) -> Iterator[Cell]:
        clean, corrupted = batch.pair.clean, batch.pair.corrupted
        yield clean, []
        source = held(model, clean, layers)
        yield corrupted, []
        for layer in layers:
            yield corrupted, [Edit(SITE, Put(source), layer=layer, where=where)]

    pairs, wanted = counterparts(items, stream), _logit_diff(model, items)
    what = f"{stream}, patches"
    values = measured(model, pairs, cells, wanted, what=what, progress=progress).values[:, 0]
    side = 1 if stream == "audio" else -1  # of the difference, which stream it is for
    whole, swapped, patched = values[:, :1], values[:, 1:2], values[:, 2:]
    return side * (patched - swapped), (side * (whole - swapped)).expand_as(patched)
