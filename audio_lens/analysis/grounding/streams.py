"""Conflict items: what moves one stream alone, where it stands, and what the model says of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens import metrics, places
from audio_lens.inputs import InputError
from audio_lens.items import ItemError, Items, PairBatch, Pairs, measured
from audio_lens.items.item import heard, listed, rated
from audio_lens.items.pairs import Stream
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Where, Words

STREAMS = ("audio", "text")
SITE = "decoder.resid_pre"
UNFIT = "the counterparts do not fit the item position by position"
WIDE = "\u3002\uff01\uff1f"  # full stop, exclamation and question mark of Chinese and Japanese
_SENTENCE = re.compile(rf".+?(?:[.?!]+(?=\s|$)|[{WIDE}]|\n|$)", re.DOTALL)


def check(model: HookedAudioTransformer, items: Items, streams: Sequence[str] = STREAMS) -> None:
    """Raise unless these are conflict items whose answers the model can give.

    Raises:
        ItemError: naming items that lack a counterpart, or answers that are not one token.
        InputError: streams that are none.
    """
    if not streams or not set(streams) <= set(STREAMS) or len(set(streams)) < len(streams):
        raise InputError(f"streams are some of {', '.join(STREAMS)}, each once; got {streams!r}")
    wrong = []
    for item in items:
        there = {"audio": item.other_audio, "text": item.other_text}
        lacking = [f"other_{stream}" for stream in streams if there[stream] is None]
        if lacking:
            wrong.append(f"{item.name} has no {' and no '.join(lacking)}")
        elif "text" in streams and item.text == item.other_text:
            wrong.append(f"{item.name}: text and other_text are the same")
    if wrong:
        what = "items have no counterpart that moves one stream alone"
        raise ItemError(listed(f"{len(wrong)} of {len(items)} {what}", wrong))
    items.check_answers(model, against=True)


def check_one(metric: Any) -> None:
    """Raise for several metrics at once.

    Raises:
        InputError: for a mapping.
    """
    if isinstance(metric, Mapping):
        raise InputError(f"one metric at a time here, got {', '.join(map(str, metric))}")


@dataclass(frozen=True)
class Fitting:
    """Items whose counterparts fit them position by position.

    Attributes:
        dropped: how many others there were, by why.
        notes: what was done to those that are here.
    """

    items: Items
    dropped: dict[str, int]
    notes: list[str]


def fitting(
    model: HookedAudioTransformer, items: Items, streams: Sequence[str] = STREAMS
) -> Fitting:
    """The items that fit their counterparts; shorter clips are padded to their counterparts'.

    Raises:
        ItemError: if that leaves none, naming the first.
    """
    notes = []
    if set(streams) & {"audio", "both"}:
        items, seconds = padded(items)
        if seconds:
            notes.append(
                f"{len(seconds)} clips were shorter than their counterparts, or these than they: "
                f"up to {max(seconds):.2f} s of silence was appended to make both as long."
            )
    pairs = [counterparts(items, stream) for stream in streams]
    rows, why = [], []
    for row in range(len(items)):
        try:
            for one in pairs:
                next(one[[row]].batches(model, 1))
            rows.append(row)
        except ItemError as error:
            why.append(str(error))
    if not rows:
        raise ItemError(listed(f"none of the {len(items)} items fits its counterparts", why))
    return Fitting(items[rows], {UNFIT: len(why)} if why else {}, notes)


def padded(items: Items) -> tuple[Items, list[float]]:
    """The items with silence behind the shorter of clip and ``other_audio``; how much, in seconds.

    Clips of another rate than their counterparts stay as they are.

    Raises:
        AudioError: a clip that cannot be read.
    """
    made, seconds = [], []
    for item in items:
        sides = [heard(rated(x, item.sampling_rate)) for x in (item.audio, item.other_audio)]
        (one, rate), (other, other_rate) = sides
        if len(one) != len(other) and rate == other_rate:
            length = max(len(one), len(other))
            seconds.append(abs(len(one) - len(other)) / rate)
            one, other = (np.pad(x, (0, length - len(x))) for x in (one, other))
            item = item.replaced(audio=one, other_audio=other, sampling_rate=rate)
        made.append(item)
    return Items(made), seconds


# -------------------------------------------------------------------------------- what is said


@dataclass(frozen=True)
class Said:
    """What the model says of every item as it is, and with one stream swapped.

    Attributes:
        words: all answers that the items name.
        logits: of these words, where the answer is written.
        totals: of each run, the logarithm of the summed exponentials of all logits.
        tokens: the likeliest token of each run.
        values: of a metric of the user's own, if there is one.
    """

    words: list[str]
    logits: Float[Tensor, "n words runs"]
    totals: Float[Tensor, "n runs"]
    tokens: Int[Tensor, "n runs"]
    values: Float[Tensor, "n runs"] | None

    def columns(self, model: HookedAudioTransformer, words: Sequence[str]) -> Int[Tensor, " n"]:
        """Which of `words` each of some words is."""
        ids = [model.to_single_token(word) for word in self.words]
        return torch.tensor([ids.index(model.to_single_token(str(word))) for word in words])

    def logit(self, columns: Int[Tensor, " n"]) -> Float[Tensor, "n runs"]:
        """The logit of one word of each item."""
        return self.logits[torch.arange(len(columns)), columns]

    def rivals(self, columns: Int[Tensor, " n"], run: int) -> list[str]:
        """For each item the word, other than its own, that a run raises most over the first."""
        rise = (self.logits[..., run] - self.logits[..., 0]).clone()
        rise[torch.arange(len(columns)), columns] = -torch.inf
        return [self.words[column] for column in rise.argmax(1)]


def said(
    model: HookedAudioTransformer,
    sides: Sequence[Items],
    metric: Any = None,
    *,
    progress: bool | None = None,
) -> Said:
    """What the model says of the items on every side; all sides name the same answers."""
    words = named(model, sides[0])
    ids = [model.to_single_token(word) for word in words]
    wanted: dict[str, Any] = {
        f"logit {word}": metrics.read_at(lambda rows, at=at: rows[:, at].double(), name=word)
        for word, at in zip(words, ids, strict=True)
    }
    wanted["total"] = metrics.read_at(lambda rows: rows.double().logsumexp(-1), name="total")
    wanted["token"] = metrics.read_at(lambda rows: rows.argmax(-1).double(), name="likeliest")
    if metric is not None:
        wanted["own"] = metric
    runs = [
        measured(model, side, _unedited, wanted, what="answers", progress=progress).values
        for side in sides
    ]
    values = torch.cat(runs, dim=-1)  # n metrics runs
    count = len(words)
    own = values[:, -1] if metric is not None else None
    return Said(words, values[:, :count], values[:, count], values[:, count + 1].long(), own)


def _unedited(batch: Any) -> list[tuple[Any, list]]:
    return [(batch.inputs, [])]


def named(model: HookedAudioTransformer, items: Items) -> list[str]:
    """All answers that the items name, each token once."""
    words: dict[int, str] = {}
    for item in items:
        for word in (item.answer, item.against):
            words.setdefault(model.to_single_token(str(word)), str(word))
    return list(words.values())


def spoken(items: Items, field: str) -> list[str]:
    """The answers of one field, answer or against, of every item."""
    return [str(getattr(item, field)) for item in items]


def counterparts(items: Items, stream: str) -> Pairs[Items]:
    """The items beside their counterparts of one stream, or of both."""
    return items.pairs(stream=cast(Stream, stream))


def swapped(items: Items, stream: str) -> Items:
    """The items with one stream replaced by its counterpart."""
    return counterparts(items, stream).corrupted


# -------------------------------------------------------------------------------- where it stands


def own_span(
    model: HookedAudioTransformer, batch: PairBatch, items: Items, stream: str, text_span: Where
) -> Bool[Tensor, "b t"]:
    """The positions at which a stream stands before anything reads it.

    Of the audio, the positions that hold it. Of the text, ``text_span``, or else the statement:
    from the first token in which the two texts differ up to the question, which begins behind the
    last such token; without a question there, up to that token.
    """
    clean, corrupted = batch.pair.clean, batch.pair.corrupted
    if stream == "audio":
        return places.locate(model, clean, SITE, "audio")
    if text_span is not None:
        return places.locate(model, clean, SITE, text_span)
    differs = (clean.tokens != corrupted.tokens).cpu()
    index = torch.arange(differs.shape[1])
    first, last = differs.int().argmax(1), torch.where(differs, index, -1).amax(1)
    questions = [question_of(str(x.text), str(x.other_text)) for x in items[batch.rows]]
    asking = ["last" if asked is None else Words(asked, "all") for asked in questions]
    asked = places.locate(model, clean, SITE, asking).cpu() & (index > last[:, None])
    for row, question in enumerate(questions):
        if question is not None and asked[row].any():
            last[row] = asked[row].int().argmax() - 1
    return (index >= first[:, None]) & (index <= last[:, None])


def question_of(text: str, other: str) -> str | None:
    """The first sentence behind all that differs that asks, or else the last; None without any."""
    differs_to = len(text) - _shared(text[::-1], other[::-1])
    behind = [x for x in sentences(text) if x.start() >= differs_to and x[0].strip()]
    asking = [x for x in behind if x[0].rstrip().endswith(("?", WIDE[-1]))]
    return (asking or behind[-1:])[0][0].strip() if behind else None


def sentences(text: str) -> list[re.Match[str]]:
    """The sentences of a text, with their places in it."""
    return list(_SENTENCE.finditer(text))


def without_difference(text: str, other: str) -> str:
    """The text without the sentences that differ in another one."""
    start, stop = _shared(text, other), len(text) - _shared(text[::-1], other[::-1])
    kept = [x[0] for x in sentences(text) if x.end() <= start or x.start() >= max(stop, start + 1)]
    return " ".join(part.strip() for part in kept if part.strip())


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))
