"""What a model says if each stream of its encoder stands for the last: answers, or texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens import metrics
from audio_lens.analysis.encoder_lens.streams import (
    check_readable,
    in_place_of_last,
    n_streams,
    reference_of,
    streams_of,
    written,
)
from audio_lens.errors import InputError
from audio_lens.items import Batch, ItemError, Items, measured
from audio_lens.items.item import Item
from audio_lens.items.measuring import Cell
from audio_lens.metrics import Metric
from audio_lens.models import HookedAudioTransformer
from audio_lens.progress import track
from audio_lens.timeline import Span

ANSWERS, TEXTS = "answers", "texts"
TOP, RIGHT, _CHANCE = "top", "right", " by chance"
REFERENCE = "silence"


@dataclass(frozen=True)
class Said:
    """What was said of every item: by the unedited model, of each stream, and of each of silence.

    Attributes:
        said: numbers that are equal where the same is said of an item, "cells" in that order.
        scores: metrics of every item.
        by_chance: the same of another item's answers; NaN where that has no meaning.
        right: whether it is the item's answer, where there are answers.
        texts: what was written, in place of answers.
        n_streams: of each kind.
    """

    said: Int[Tensor, "n cells"]
    scores: dict[str, Float[Tensor, "n cells"]]
    by_chance: dict[str, Float[Tensor, "n cells"]]
    right: Bool[Tensor, "n cells"] | None
    texts: list[list[str]]
    n_streams: int

    @property
    def own(self) -> slice:
        """The cells of the items' own streams."""
        return slice(1, 1 + self.n_streams)

    @property
    def silent(self) -> slice:
        """The cells of the streams of silence."""
        return slice(1 + self.n_streams, 1 + 2 * self.n_streams)


def reading_of(model: HookedAudioTransformer, items: Items, reads: str | None) -> str:
    """Whether the lens reads answers or texts: answers, where all are single tokens or classes.

    Raises:
        InputError: something else that is to be read, or a model of which nothing can.
        ItemError: answers that are to be read and are no single tokens.
    """
    check_readable(model)
    if reads not in (None, ANSWERS, TEXTS):
        raise InputError(f"reads is {ANSWERS!r}, {TEXTS!r} or None, got {reads!r}")
    if reads is not None:
        return reads
    if model.cfg.output_kind == "ctc" or any(item.answer is None for item in items):
        return TEXTS
    try:
        items.check_answers(model)
    except ItemError:
        return TEXTS
    return ANSWERS


def say(
    model: HookedAudioTransformer,
    items: Items,
    reads: str,
    order: Sequence[int],
    *,
    metric: Any = None,
    controls: bool = True,
    max_new_tokens: int | None = None,
    size: int = 8,
    progress: bool | None = None,
) -> Said:
    """Run every stream of every item, and of a silent clip with ``controls``.

    Args:
        reads: answers or texts, as `reading_of` gives it.
        order: of every item the number of another, whose answer is right by chance.
        metric, controls, max_new_tokens, size, progress: as in `encoder_lens`.
    """
    if reads == ANSWERS:
        return _answers(model, items, order, metric, controls, size, progress)
    if metric is not None:
        raise InputError("texts are scored by the word error rate: metric= is for answers")
    return _texts(model, items, order, controls, max_new_tokens, size, progress)


def cells_of(model: HookedAudioTransformer, batch: Batch, with_silence: bool) -> Iterator[Cell]:
    """The unedited run of a batch, each stream in the place of the last, and each of silence."""
    yield batch.inputs, []
    for stream in streams_of(model, batch.inputs):
        yield batch.inputs, [in_place_of_last(model, stream)]
    if with_silence:
        silence = reference_of(batch.inputs, REFERENCE)
        for stream in streams_of(model, silence):
            yield silence, [in_place_of_last(model, stream)]


# -------------------------------------------------------------------------------- answers


def _answers(
    model: HookedAudioTransformer,
    items: Items,
    order: Sequence[int],
    metric: Any,
    controls: bool,
    size: int,
    progress: bool | None,
) -> Said:
    other = items[list(order)]
    named = items.metrics(model) if metric is None else dict(metrics.named(metric))
    chance = {} if metric is not None else other.metrics(model)
    wanted = named | {f"{name}{_CHANCE}": one for name, one in chance.items()} | _top()
    runs = measured(
        model,
        items,
        lambda batch: cells_of(model, batch, controls),
        wanted,
        size=size,
        what="encoder lens",
        progress=progress,
    )
    values = dict(zip(runs.metrics, runs.values.unbind(1), strict=True))
    said = values[TOP].long()
    right, wrong = (said == answer_tokens(model, part)[:, None] for part in (items, other))
    nothing = torch.full_like(right.double(), torch.nan)
    by_chance = {name: values.get(f"{name}{_CHANCE}", nothing) for name in named}
    return Said(
        said,
        {RIGHT: right.double()} | {name: values[name] for name in named},
        {RIGHT: wrong.double()} | by_chance,
        right,
        [],
        n_streams(model),
    )


def measured_with_right(
    model: HookedAudioTransformer,
    items: Items,
    cells: Callable[[Batch], Iterator[Cell]],
    metric: Any,
    **options: Any,
) -> tuple[list[str], Float[Tensor, "n metrics cells"]]:
    """`measured`, with "right" before the items' own metrics: whether the answer is likeliest.

    A metric that is given stands alone.
    """
    if metric is not None:
        runs = measured(model, items, cells, metric, **options)
        return runs.metrics, runs.values
    runs = measured(model, items, cells, items.metrics(model) | _top(), **options)
    right = runs.values[:, -1:] == answer_tokens(model, items)[:, None, None]
    return [RIGHT, *runs.metrics[:-1]], torch.cat([right.double(), runs.values[:, :-1]], dim=1)


def _top() -> dict[str, Metric]:
    """The metric that names the likeliest token."""
    return {TOP: metrics.read_at(lambda logits: logits.argmax(-1).double(), name=TOP)}


def answer_tokens(model: HookedAudioTransformer, items: Items) -> Int[Tensor, " n"]:
    """The token (or class) of every item's answer."""
    return torch.tensor([model.to_single_token(str(item.answer)) for item in items])


# -------------------------------------------------------------------------------- texts


def transcripts(items: Items) -> list[str] | None:
    """What is said in every clip: the answer, or else the labels of the words; None without.

    Raises:
        ItemError: items of which some have one and others not.
    """
    found = [_transcript(item) for item in items]
    if all(one is None for one in found):
        return None
    lacking = [item.name for item, one in zip(items, found, strict=True) if one is None]
    if lacking:
        raise ItemError(f"{lacking[0]} has neither an answer nor words, and others have")
    return [one for one in found if one is not None]


def _transcript(item: Item) -> str | None:
    if item.answer is not None:
        return item.answer
    labels = [Span.of(word).label for word in item.words]
    return " ".join(filter(None, labels)) or None


def _texts(
    model: HookedAudioTransformer,
    items: Items,
    order: Sequence[int],
    controls: bool,
    max_new_tokens: int | None,
    size: int,
    progress: bool | None,
) -> Said:
    truth = transcripts(items)
    if truth is not None:
        metrics.wer(truth[0], truth[0])  # raises now what it would raise later
    texts: list[list[str]] = [[] for _ in items]
    with track("encoder lens", len(items), "items", show=progress) as advance:
        done = 0
        for batch in items.batches(model, size):
            for inputs, edits, *_ in cells_of(model, batch, controls):
                said = written(model, inputs, edits, max_new_tokens)
                for row, text in zip(batch.rows, said, strict=True):
                    texts[row].append(text)
            done += len(batch)
            advance(len(batch), done)
    scores, chance = (
        {} if words is None else {"wer": error_rates(words, texts)}
        for words in (truth, None if truth is None else [truth[i] for i in order])
    )
    right = None if truth is None else scores["wer"] == 0
    return Said(_numbered(texts), scores, chance, right, texts, n_streams(model))


def error_rates(truth: Sequence[str], texts: Sequence[Sequence[str]]) -> Float[Tensor, "n cells"]:
    """The word error rate of every text of every item."""
    rates = [
        [metrics.wer(words, text) for text in said]
        for words, said in zip(truth, texts, strict=True)
    ]
    return torch.tensor(rates, dtype=torch.float64)


def _numbered(texts: Sequence[Sequence[str]]) -> Int[Tensor, "n cells"]:
    """Texts as numbers, equal where they are but for case and spaces at the ends."""
    known: dict[str, int] = {}
    return torch.tensor(
        [[known.setdefault(one.strip().lower(), len(known)) for one in said] for said in texts]
    )
