"""Where the news of each stream is, layer by layer, and when the last position takes it over."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens import metrics, places
from audio_lens.analysis.grounding.streams import (
    SITE,
    check,
    check_one,
    counterparts,
    fitting,
    own_span,
    said,
    spoken,
    swapped,
)
from audio_lens.arguments import numbers
from audio_lens.edits import Put
from audio_lens.edits.edit import Edit
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.items import ControlError, Items, PairBatch, found, measured, method, statistics
from audio_lens.items.measuring import Cell
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Where
from audio_lens.results import Result

GROUPS = ("own", "other", "last")
CONTROLS = ("other_item", "norm_matched_noise", "identity")
ADDS_UP = 0.1  # by how much the groups' recoveries may miss 1
CANNOT = (
    "This says where the news is that makes an item differ from its counterpart, not what reads it "
    "there, and nothing of what both share."
)


@method("grounding.residence")
def residence(
    model: HookedAudioTransformer,
    items: Items,
    *,
    metric: Any = None,
    streams: Sequence[str] = ("audio", "text"),
    layers: int | Sequence[int] | None = None,
    controls: Sequence[str] = CONTROLS,
    text_span: Where = None,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Where is it now: how much of each stream's news the residual stream holds at which positions.

    For each stream, items run with that stream swapped, and the residual stream entering a layer
    is put back from the whole item, at one group of positions: the stream's own span, the last
    position, and all others. What of the gap between both runs comes back is the group's recovery;
    a ratio of means over items. The groups hold every position once, so their recoveries add up
    to 1 where pieces of news add up.

    Args:
        items: conflict items, as `stream_share` takes them. The shorter of clip and counterpart is
            padded with silence. Items whose texts have other numbers of tokens than their
            counterparts are left out, and counted.
        metric: None takes the logit difference of what the stream says and what is said instead:
            of all answers that the items name, the one that swapping the stream raises most.
        streams: which of both.
        layers: of the decoder; None takes all.
        controls: which are run, of "other_item" (put back from another item of the batch),
            "norm_matched_noise" and "identity" (from the swapped run itself).
        text_span: a place (`audio_lens.places`), where the text's own span is another than from
            the first token that differs up to the question.
        by: a label whose values are drawn in place of items, such as "group".
        seed: of the intervals and of what controls draw.
        progress: as in `patching.sweep`.

    Returns:
        Axes "stream", "layer" and "group" (own, other, last). Beside the controls that were asked
        for: ``destroyed``, the level of a patch that wipes out the other answer and brings none;
        ``log_prob``, the recoveries of the log-probability of what the stream says; ``gap``, what
        recoveries are shares of, in the metric's units.

    Raises:
        ItemError: items that lack a counterpart, or none that fits.
        ControlError: other_item of one item.
        InputError: unknown streams, layers or controls, or a decoder without audio positions.
    """
    check_one(metric)
    check(model, items, streams)
    _check_controls(controls, len(items))
    fit = fitting(model, items, streams)
    depth = decoder_layers(model, layers)
    runs = [
        _Run(model, fit.items, stream, depth, controls, text_span, seed).measured(metric, progress)
        for stream in streams
    ]
    axes = {"stream": list(streams), "layer": depth, "group": list(GROUPS)}
    result = _result(runs, axes, fit.items, controls, {"by": by, "seed": seed})
    result.dropped, result.report = fit.dropped, [*_told(result), *fit.notes]
    result.meta |= {"title": "what of a stream comes back", "value": "recovery"}
    return result


@method(
    "grounding.hand_over",
    whole="its layer is read from the mean over all items: make a study of grounding.residence",
)
def hand_over(
    model: HookedAudioTransformer,
    items: Items,
    *,
    metric: Any = None,
    streams: Sequence[str] = ("audio", "text"),
    layers: int | Sequence[int] | None = None,
    controls: Sequence[str] = CONTROLS,
    text_span: Where = None,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """When is it consulted: the first layer at which the last position holds more than the span.

    Args:
        items, metric, streams, layers, controls, text_span, by, seed, progress: as of `residence`,
            whose recoveries this is read from.

    Returns:
        Axis "stream": the first layer at whose entry the last position recovers more than the
        stream's own span, with an interval over items; NaN where that happens at no layer.

    Raises:
        ItemError, ControlError, InputError: as `residence`.
    """
    moved = residence(
        model,
        items,
        metric=metric,
        streams=streams,
        layers=layers,
        controls=controls,
        text_span=text_span,
        by=by,
        seed=seed,
        progress=progress,
    )
    named = {item.id: item.value(by) for item in items} if by else None
    groups = None if named is None else [named[name] for name in moved.coords["stimulus"]]
    return handed_over(moved, groups, seed)


LEADS = {
    "title": "where the last position holds more than the stream's own",
    "value": "layer",
    "together": "a layer of all items",
}


def handed_over(moved: Result, groups: Sequence[Hashable] | None = None, seed: int = 0) -> Result:
    """The hand-over layers of a residence that is known; see `hand_over`.

    Args:
        moved: what `residence` gave.
        groups: of every item, drawn in place of items.
        seed: of the interval.
    """
    streams, layers = moved.coords["stream"], moved.coords["layer"]
    gap = moved.controls["gap"].values
    recovered = moved.values * gap[..., None, None]  # n streams layers groups
    own, last = (recovered[..., moved.coords["group"].index(name)] for name in ("own", "last"))
    ahead = torch.cat([last - own, gap[..., None]], dim=-1)
    each = torch.stack([_first(one[None], layers) for one in ahead])
    drawn = statistics.bootstrap(ahead, lambda x: _first(x, layers), groups=groups, seed=seed)
    return Result(
        each,
        ("stimulus", "stream"),
        {"stimulus": moved.coords["stimulus"], "stream": streams},
        estimate=drawn.value,
        low=drawn.low,
        high=drawn.high,
        report=[*_handed_over_told(drawn, streams), *moved.report],
        meta=moved.meta | {"method": "grounding.hand_over"} | LEADS,
        recipe=moved.recipe | {"method": "grounding.hand_over"},
        n_kept=moved.n_kept,
        dropped=moved.dropped,
    )


def _first(ahead: Float[Tensor, "m streams steps"], layers: list[int]) -> Float[Tensor, " streams"]:
    """The first layer at which the last position is ahead of the span; NaN at none.

    Behind the layers stands the gap, whose sign says what is more.
    """
    mean = ahead.nanmean(0)
    over = mean[:, :-1] * mean[:, -1:].sign() > 0
    at = torch.tensor(layers, dtype=torch.float64)[over.int().argmax(1)]
    return at.masked_fill(~over.any(1), torch.nan)


# -------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class _Measured:
    """What one stream's runs gave.

    Attributes:
        values: of every metric, recovered un-normalised; the true source first, then controls.
        gap: between the whole item and its counterpart.
        swapped: of the counterpart.
    """

    values: Float[Tensor, "n metrics sources layers groups"]
    gap: Float[Tensor, "n metrics"]
    swapped: Float[Tensor, "n metrics"]


@dataclass(frozen=True)
class _Run:
    """The runs of one stream."""

    model: HookedAudioTransformer
    items: Items
    stream: str
    layers: list[int]
    controls: Sequence[str]
    text_span: Where
    seed: int

    def measured(self, metric: Any, progress: bool | None) -> _Measured:
        wanted = self._metrics(progress) if metric is None else metric
        pairs, alone = counterparts(self.items, self.stream), set()

        def cells(batch: PairBatch) -> Iterator[Cell]:
            return self._cells(batch, alone)

        what = f"{self.stream}, patches"
        values = measured(self.model, pairs, cells, wanted, what=what, progress=progress).values
        whole, swapped, patched = values[..., 0], values[..., 1], values[..., 2:]
        shape = (1 + len(self.controls), len(self.layers), len(GROUPS))
        recovered = (patched - swapped[..., None]).reshape(*swapped.shape, *shape)
        if "other_item" in self.controls and alone:
            recovered[sorted(alone), :, 1 + list(self.controls).index("other_item")] = torch.nan
        return _Measured(recovered, whole - swapped, swapped)

    def _metrics(self, progress: bool | None) -> dict[str, Any]:
        """Of what the stream says against what is said in its place."""
        own = spoken(self.items, "answer" if self.stream == "audio" else "against")
        sides = [self.items, swapped(self.items, self.stream)]
        told = said(self.model, sides, progress=progress)
        rivals = told.rivals(told.columns(self.model, own), 1)
        return {"logit_diff": metrics.logit_diff(own, rivals), "log_prob": metrics.log_prob(own)}

    def _cells(self, batch: PairBatch, alone: set[int]) -> Iterator[Cell]:
        """Both unpatched runs, then every patch: source by source, layer by layer."""
        clean, corrupted = batch.pair.clean, batch.pair.corrupted
        yield clean, []
        sources = [held(self.model, clean, self.layers)]
        sources += [self._control(name, sources[0], batch, alone) for name in self.controls]
        groups = self._groups(batch)
        yield corrupted, []
        for source in sources:
            for layer in self.layers:
                for where in groups:
                    yield corrupted, [Edit(SITE, Put(source), layer=layer, where=where)]

    def _groups(self, batch: PairBatch) -> list[Bool[Tensor, "b t"]]:
        own = own_span(self.model, batch, self.items, self.stream, self.text_span)
        last, valid = (
            places.locate(self.model, batch.pair.clean, SITE, where) for where in ("last", "all")
        )
        own = own & ~last
        return [own, valid & ~own & ~last, last]

    def _control(
        self, name: str, own: dict[str, Tensor], batch: PairBatch, alone: set[int]
    ) -> dict[str, Tensor]:
        if name == "identity":
            return held(self.model, batch.pair.corrupted, self.layers)
        seed = self.seed + batch.rows[0]
        if name == "norm_matched_noise":
            return {
                at: statistics.norm_matched_noise(x, seed + number)
                for number, (at, x) in enumerate(own.items())
            }
        says = spoken(self.items[batch.rows], "answer" if self.stream == "audio" else "against")
        try:
            other = statistics.other_item(len(batch), says, seed=seed)
        except ControlError:  # no batch to draw from: these items have no such value
            alone.update(batch.rows)
            return own
        return {at: x[other] for at, x in own.items()}


@torch.no_grad()
def held(
    model: HookedAudioTransformer, inputs: AudioInputs, layers: Sequence[int]
) -> dict[str, Tensor]:
    """The residual streams entering some layers, by the names of their hooks."""
    names = [f"decoder.blocks.{layer}.hook_resid_pre" for layer in layers]
    _, cache = model.run_with_cache(inputs, names_filter=names)
    return {name: cache[name] for name in names}


def _check_controls(controls: Sequence[str], count: int) -> None:
    unknown = [name for name in controls if name not in CONTROLS]
    if unknown or len(set(controls)) < len(controls):
        raise InputError(f"controls are some of {', '.join(CONTROLS)}, each once; got {controls!r}")
    if "other_item" in controls:
        statistics.other_item(count)


def decoder_layers(model: HookedAudioTransformer, layers: int | Sequence[int] | None) -> list[int]:
    """The layers of the decoder that were asked for.

    Raises:
        InputError: others than it has, or in another order.
    """
    count = model.cfg.need_decoder.n_layers
    chosen = list(range(count)) if layers is None else [int(x) for x in numbers("layers", layers)]
    if not chosen or sorted(set(chosen)) != chosen or not 0 <= chosen[0] <= chosen[-1] < count:
        raise InputError(f"layers lie in 0 to {count - 1}, in order, each once; got {layers!r}")
    return chosen


# -------------------------------------------------------------------------------- results


def _result(
    runs: Sequence[_Measured],
    axes: dict[str, list],
    items: Items,
    controls: Sequence[str],
    drawn: dict[str, Any],
) -> Result:
    values = torch.stack([run.values for run in runs], dim=1)  # n streams metrics sources ...
    gap = torch.stack([run.gap for run in runs], dim=1)  # n streams metrics

    def recovered(metric: int, source: int) -> Result:
        over, under = values[:, :, metric, source], gap[:, :, metric]
        return found(over, axes, items, denominators=under, **drawn)

    beside = {name: recovered(0, number) for number, name in enumerate(controls, start=1)}
    if gap.shape[-1] > 1:  # the metrics of items, with their log-probability as the second
        level = torch.stack([-run.swapped[:, 0] for run in runs], dim=1)  # n streams
        level = repeat(level, "n streams -> n streams layers", layers=len(axes["layer"]))
        across = {"stream": axes["stream"], "layer": axes["layer"]}
        destroyed = found(level, across, items, denominators=gap[..., 0], **drawn)
        beside |= {"log_prob": recovered(1, 0), "destroyed": destroyed}
    beside["gap"] = found(gap[..., 0], {"stream": axes["stream"]}, items, **drawn)
    return replace(recovered(0, 0), controls=beside)


# -------------------------------------------------------------------------------- in words


def _told(result: Result) -> list[str]:
    report = [line for stream in result.coords["stream"] for line in _stream_told(result, stream)]
    sums = result.mean().values.sum(-1)
    low, high = sums.min().item(), sums.max().item()
    pieces = f"The recoveries of the groups add up to {low:.2f} to {high:.2f}"
    if max(abs(low - 1), abs(high - 1)) > ADDS_UP:
        pieces += ": pieces of news work together or stand in for each other, and are no shares"
    return [*report, f"{pieces}.", CANNOT]


def _stream_told(result: Result, stream: str) -> Iterator[str]:
    one = result.select(stream=stream).mean()
    own, _, last = one.values.unbind(-1)
    layers = result.coords["layer"]
    held = [layer for layer, held in zip(layers, own.tolist(), strict=True) if held > 0.5]
    taken = [layer for layer, held in zip(layers, last.tolist(), strict=True) if held > 0.5]
    gap = one.controls["gap"]
    low, high = (float("nan") if x is None else x.item() for x in (gap.low, gap.high))
    yield (
        f"Of the {stream} ({gap.values.item():.2f} [{low:.2f}, {high:.2f}] of the metric), more "
        f"than half is at its own positions at {_listed(held)}, and at the last position at "
        f"{_listed(taken)}."
    )
    if low <= 0 <= high:
        yield f"The {stream} may move nothing at all: shares of its gap say nothing then."
    at = f"At the {stream}'s own positions"
    for name in CONTROLS:
        if name in one.controls:
            most = one.controls[name].values[:, 0]
            size = most[most.abs().nan_to_num().argmax()].item()
            yield f"{at} {name} recovers at most {size:.2f}."
    if "destroyed" in one.controls:
        level = one.controls["destroyed"].values[0].item()
        yield f"Wiping out the other answer of the {stream} by itself would recover {level:.2f}."


def _listed(layers: list[int]) -> str:
    if not layers:
        return "no layer"
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"


def _handed_over_told(drawn: statistics.Estimate, streams: list[str]) -> Iterator[str]:
    numbers = zip(streams, *(x.tolist() for x in (drawn.value, drawn.low, drawn.high)), strict=True)
    for stream, layer, low, high in numbers:
        if layer != layer:
            yield f"The {stream} is never handed over to the last position at these layers."
        else:
            yield (
                f"The {stream} is handed over to the last position at layer {layer:g} "
                f"[{low:g}, {high:g}]."
            )
