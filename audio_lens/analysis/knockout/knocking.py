"""What the answer loses when some positions cannot attend to others, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.knockout import sentences
from audio_lens.analysis.knockout.attending import IDENTITY, Attention
from audio_lens.analysis.knockout.curve import (
    CONTROLS,
    CURVE,
    SINGLES,
    TOGETHER,
    UNEDITED,
    Curve,
    OnKeys,
    Study,
    on_keys,
)
from audio_lens.analysis.knockout.reading import negative_scores
from audio_lens.arguments import names, whole
from audio_lens.edits import Bias, Block, Multiply, Sharpen, Weights
from audio_lens.errors import InputError
from audio_lens.items import Items, found, measured, method
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Where
from audio_lens.results import Result

TEXT_ONLY, SUM = "text_only", "sum_of_singles"
DONE = {
    Block: "no attention",
    Bias: "scores raised",
    Weights: "weights multiplied",
    Multiply: "scores multiplied",
    Sharpen: "attention sharpened",
}
UNCHECKED = (
    "Whether a prompt without these keys still works as a prompt was not checked: text_only= takes "
    "items that can be answered without audio."
)
LIMITS = (
    "A flat curve does not show that audio is not used: positions in between may have read it "
    'earlier and hand it on (queries="text"), and blocks may stand in for each other (window=).'
)


@method("knockout.knock_out")
def knock_out(
    model: HookedAudioTransformer,
    items: Items,
    *,
    queries: Where = "last",
    keys: Where = "audio",
    layers: int | Sequence[int] | None = None,
    window: int = 1,
    metric: Any = None,
    do: Any = None,
    heads: int | Sequence[int] | None = None,
    per_head: bool = False,
    attention: str | None = None,
    controls: Sequence[str] = CONTROLS,
    text_only: Items | None = None,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What the answer loses when some positions cannot attend to others, block by block.

    Values are the unedited metric minus the edited one: what the answer depends on is positive.
    The keys that are left share what the blocked ones had; in cross-attention, where none may be
    left, nothing takes their place.

    Args:
        model: a model that attends to audio.
        items: with answers, unless there is a ``metric``.
        queries: the place that attends.
        keys: the place that is attended to. Places may differ by item: a function of the item, or
            a list with one for each.
        layers: the blocks, of windows the first ones; None takes all.
        window: how many blocks are edited together. Above 1, what the single blocks lose stands
            beside: their sum as control "sum_of_singles", their curve in the report.
        metric: as in `items.measured`; None takes the answers' log-probability and, where items
            have ``against``, the logit difference.
        do: something else than to block: `edits.Bias`, `Weights`, `Multiply` (MATA) or `Sharpen`,
            with keys of its own.
        heads: which heads are edited; None takes all.
        per_head: whether they are edited one by one (axis "head").
        attention: ``part.attn`` or ``part.cross_attn``; None is where the decoder reads audio.
        controls: "random_keys", "text_keys" (where the keys are audio, and there is text) and
            "identity", an edit of the same activations by nothing.
        text_only: items that can be answered from their text alone: what they lose under the same
            edit (control "text_only") is no lack of audio, but a broken context.
        by: a label (such as "group") whose values are drawn in place of items, for intervals.
        size: of the batches.
        seed: of all that is drawn.
        progress: as in `patching.sweep`.

    Returns:
        A result with the axis "layer" and, of heads one by one, "head".

    Raises:
        InputError: no attention to audio; blocks, heads or controls that are not there; keys that
            are given twice; a place that selects nothing.
        ControlError: a control that cannot be drawn.
        ItemError: items without answers of one token, where there is no ``metric``.
    """
    read = Attention.of(model, attention)
    first = read.layers(layers, whole("window", window))
    windows = [list(range(one, one + window)) for one in first]
    curve = Curve(read, _do(do, keys), windows, read.heads(heads), per_head)
    study = Study(curve, queries, items, tuple(names("controls", controls)), seed)
    told = Told(study, study.measure(metric, size, progress), by)
    result = told.of(CURVE)
    result.controls |= {name: told.of(name) for name in study.controls}
    if window > 1:
        result.controls[SUM] = told.found(_summed(told.effects[SINGLES], curve), curve.axes)
    result.report += told.sentences(result)
    if text_only is None:
        result.report.append(UNCHECKED)
    else:
        _add_text_only(result, replace(study, items=text_only), metric, size, progress)
    result.report += [
        *_of_other_clips(told, metric, size, progress),
        *(_of_signs(study, curve.do, size, progress) if isinstance(curve.do, Multiply) else []),
        LIMITS,
    ]
    result.meta |= {
        "title": told.title,
        "value": "loss of the metric",
        "site": curve.site,
        "window": f"{window}",
    }
    return result


def _do(do: Any, keys: Where) -> OnKeys:
    """What is done to which keys.

    Raises:
        InputError: no edit of attention, or keys that are given twice.
    """
    if do is None:
        return Block(keys)
    if not (isinstance(keys, str) and keys == "audio"):
        raise InputError(f"keys are given twice: {type(do).__name__} brings its own, drop keys=")
    return on_keys(do)


def _summed(singles: Float[Tensor, "n m cells"], curve: Curve) -> Float[Tensor, "n m sums"]:
    """What the blocks of every window lose one by one, added."""
    by_block = singles.unflatten(2, (len(curve.blocks), -1))
    rows = [[curve.blocks.index(block) for block in window] for window in curve.windows]
    return torch.stack([by_block[:, :, own].sum(2) for own in rows], dim=2).flatten(2)


@dataclass(frozen=True)
class Told:
    """What a study measured, and what that says.

    Attributes:
        measured: the metrics, and of every kind of run the metrics of every item.
        by: a label whose values are drawn in place of items.
    """

    study: Study
    measured: tuple[list[str], dict[str, Float[Tensor, "n m cells"]]]
    by: str | None

    @property
    def metrics(self) -> list[str]:
        return self.measured[0]

    @property
    def unedited(self) -> dict[str, float]:
        """Every metric of the unedited run."""
        means = self.measured[1][UNEDITED].mean((0, 2)).tolist()
        return dict(zip(self.metrics, means, strict=True))

    @cached_property
    def effects(self) -> dict[str, Float[Tensor, "n m cells"]]:
        """What every kind of run loses."""
        values = self.measured[1]
        return {name: values[UNEDITED] - held for name, held in values.items()}

    def of(self, name: str) -> Result:
        """What one kind of run loses, as a result."""
        axes = {} if name in (IDENTITY, TOGETHER) else self.study.curve.axes
        return self.found(self.effects[name], axes)

    def found(self, values: Tensor, axes: dict[str, list[int]]) -> Result:
        """A result of values of every item."""
        shape = [len(along) for along in axes.values()]
        return found(
            values.reshape(*values.shape[:2], *shape),
            {"metric": self.metrics, **axes},
            self.study.items,
            by=self.by,
            seed=self.study.seed,
        )

    @property
    def title(self) -> str:
        curve = self.study.curve
        return (
            f"{DONE[type(curve.do)]} from {self.study.queries} to {self.study.keys} in "
            f"{curve.attention.name}"
        )

    def sentences(self, result: Result) -> Iterator[str]:
        """What was found, in plain words."""
        curve, unedited = self.study.curve, self.unedited
        each = "in one block" if curve.width == 1 else f"in {curve.width} blocks at a time"
        for metric in self.metrics:
            most = sentences.strongest(result, metric, curve.width, unedited[metric])
            yield f"{self.title[0].upper()}{self.title[1:]}, {each}: {most}."
        if TOGETHER in self.effects:
            yield from self._of_all(self.of(TOGETHER))
        for name in self.study.controls:
            keys = "" if name == IDENTITY else f" ({self.study.others.told(name)})"
            yield f"Control {name}{keys}: {sentences.largest(result.controls[name], self.metrics)}."
        if SINGLES in self.effects:
            yield from self._of_singles(result)

    def _of_all(self, together: Result) -> Iterator[str]:
        blocks = self.study.curve.blocks
        for metric, unedited in self.unedited.items():
            cell = together.cells(metric)[0]
            yield (
                f"All {len(blocks)} blocks together: {metric} {sentences.moved(cell.value)} by "
                f"{sentences.amount(sentences.sized(cell))}, to {unedited - cell.value:.3g}."
            )

    def _of_singles(self, result: Result) -> Iterator[str]:
        curve = self.study.curve
        singles = self.found(self.effects[SINGLES], curve.singles.axes)
        for metric in self.metrics:
            top = result.top(1, metric)[0]
            alone = result.controls[SUM].select(**top.at).cells(metric)[0].value
            losses = ", ".join(sentences.each(singles, metric))
            yield (
                f"One by one, blocks {curve.blocks} lose {losses} of {metric}. Together, "
                f"{sentences.place_of(top, curve.width)} lose {top.value:.3g}; one by one, added, "
                f"{alone:.3g}."
            )


def _add_text_only(
    result: Result, study: Study, metric: Any, size: int, progress: bool | None
) -> None:
    """The same curve of items that need no audio, as a control and a sentence."""
    study = replace(study, asked=())
    told = Told(study, study.measure(metric, size, progress), None)
    if told.metrics != result.coords["metric"]:
        raise InputError(
            f"text_only items are measured by {', '.join(told.metrics)}, the others by "
            f"{', '.join(result.coords['metric'])}: give both the same answers, or metric="
        )
    result.controls[TEXT_ONLY] = told.of(CURVE).mean()
    most = sentences.largest(result.controls[TEXT_ONLY], told.metrics)
    result.report.append(
        f"{len(study.items)} items that need no audio lose under the same: {most}."
    )


def _of_other_clips(told: Told, metric: Any, size: int, progress: bool | None) -> Iterator[str]:
    """What is lost with the counterparts of the clips, where all items bring one."""
    items, model = told.study.items, told.study.curve.attention.model
    if any(item.other_audio is None for item in items):
        return
    swapped = Items(item.replaced(audio=item.other_audio, other_audio=None) for item in items)
    runs = measured(
        model, swapped, lambda x: [(x.inputs, [])], metric, size=size, progress=progress
    )
    lost = told.found(told.measured[1][UNEDITED] - runs.values, {})
    for name in told.metrics:
        cell = lost.cells(name)[0]
        yield (
            f"With the other clip in place of the right one, unedited, {name} "
            f"{sentences.moved(cell.value)} by {sentences.amount(sentences.sized(cell))}."
        )


def _of_signs(study: Study, do: Multiply, size: int, progress: bool | None) -> Iterator[str]:
    """How many of the scores are negative, which multiplying lowers."""
    curve = study.curve
    negative = negative_scores(
        curve.attention.model,
        study.items,
        queries=study.queries.where,
        keys=study.keys.where,
        layers=curve.blocks,
        heads=curve.heads,
        attention=curve.attention.name,
        size=size,
        progress=progress,
    )
    shares = negative.values.mean((0, 2)).tolist()
    told = ", ".join(f"{b}: {share:.0%}" for b, share in zip(curve.blocks, shares, strict=True))
    what = "raises" if do.mode == "mult_abs" else "lowers"
    yield f"Of these scores, negative in block {told}. {do.mode} {what} those."
