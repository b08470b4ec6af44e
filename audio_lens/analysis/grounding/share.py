"""Does it listen: what each stream moves alone, what is answered, and with the text dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.grounding.streams import (
    STREAMS,
    Said,
    check,
    check_one,
    said,
    spoken,
    swapped,
    without_difference,
)
from audio_lens.inputs import InputError
from audio_lens.items import Item, ItemError, Items, found, method
from audio_lens.items.item import listed
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

SAID = ("audio", "text", "other")
CANNOT = (
    "This says nothing of where in the model a stream is read, and holds for these counterparts "
    "and this way of asking."
)


@method("grounding.stream_share")
def stream_share(
    model: HookedAudioTransformer,
    items: Items,
    *,
    metric: Any = None,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Does it listen: the audio's part of what both streams move, G_a / (G_a + G_t).

    G is by how much the metric changes when that stream alone is swapped for its counterpart,
    everything else equal; not normalised, so that a stream that is ignored counts as little as it
    moves. 1 is a listener, 0 a reader. The result is a ratio of means over all items.

    Args:
        items: conflict items: the clip says ``answer``, the text says ``against``, and
            ``other_audio`` and ``other_text`` say something else.
        metric: rises with what the clip says and falls with what the text says, linearly; None
            takes the logit difference of ``answer`` and ``against``.
        by: a label whose values are drawn in place of items, such as "group".
        seed: of the intervals and of the words that gaps are compared with.
        progress: as in `patching.sweep`.

    Returns:
        One number. Controls: ``log_prob``, the same of the log-probabilities of what each stream
        says; ``behaviour``, the share of the audio's answers among those that follow a stream.

    Raises:
        ItemError: items that lack a counterpart, or answers that are not one token.
    """
    told = _said(model, items, metric, progress)
    drawn = {"by": by, "seed": seed}

    def share(moved: Float[Tensor, "n streams"], **beside: Any) -> Result:
        audio, text = moved.unbind(1)
        return found(audio, {}, items, denominators=audio + text, **drawn, **beside)

    moved, follows = _moved(told, model, items), _follows(told, model, items)
    controls = {"behaviour": share(follows[:, :2])}
    if metric is None:
        controls["log_prob"] = share(_moved_log_prob(told, model, items))
    meta = {"title": "the audio's part of what both streams move", "value": "share"}
    result = share(moved, controls=controls, meta=meta)
    gaps = found(moved, {"stream": STREAMS}, items, **drawn)
    result.report = [
        f"The audio makes {_number(result)} of what both streams move.",
        f"Swapping the audio alone moves the metric by {_number(gaps, 0)}, swapping the text "
        f"alone by {_number(gaps, 1)}.",
        *_negative(gaps),
        _answers_told(follows),
        *_by_chance(model, items, told, metric, seed),
        CANNOT,
    ]
    return result


@method("grounding.gaps")
def gaps(
    model: HookedAudioTransformer,
    items: Items,
    *,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How far each stream moves the answer when it alone is swapped, in logits and in nats.

    Args:
        items, by, seed, progress: as of `stream_share`.

    Returns:
        Axes "metric" (of what the stream says: the log-probability, and the logit difference to
        what the other says) and "stream". The control ``permuted_labels`` is of two answers of
        other items.

    Raises:
        ItemError: as `stream_share`.
    """
    told = _said(model, items, None, progress)
    values = torch.stack([_moved_log_prob(told, model, items), _moved(told, model, items)], dim=1)
    axes = {"metric": ["log_prob", "logit_diff"], "stream": STREAMS}
    drawn: dict[str, Any] = {"by": by, "seed": seed}
    chance = _chance(model, items, told, seed)
    controls = {}
    if chance is not None:
        controls["permuted_labels"] = found(chance, {"stream": STREAMS}, items, **drawn)
    result = found(values, axes, items, controls=controls, **drawn)
    of_logits = result.of_metric("logit_diff")
    result.report = [
        f"Swapping the {stream} alone moves the logit difference by {_number(of_logits, at)}."
        for at, stream in enumerate(STREAMS)
    ] + _by_chance(model, items, told, None, seed)
    return result


@method("grounding.answers")
def answers(
    model: HookedAudioTransformer,
    items: Items,
    *,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How often the likeliest token is what the clip says, what the text says, or another.

    Args:
        items: with ``answer`` and ``against``; counterparts are not needed.
        by, seed, progress: as of `stream_share`.

    Returns:
        Axis "said": audio, text, other.

    Raises:
        ItemError: answers that are not one token.
    """
    items.check_answers(model, against=True)
    follows = _follows(said(model, [items], progress=progress), model, items)
    report = [_answers_told(follows)]
    return found(follows, {"said": SAID}, items, by=by, seed=seed, report=report)


@method("grounding.text_dominance")
def text_dominance(
    model: HookedAudioTransformer,
    items: Items,
    *,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """ALME's ratio (2602.11488): answers of the text among those of the text or the audio.

    Answers that are neither are left out, not counted as "not text". It is a ratio under the
    instruction that the items' texts give.

    Args:
        items, by, seed, progress: as of `answers`.

    Raises:
        ItemError: answers that are not one token.
    """
    items.check_answers(model, against=True)
    follows = _follows(said(model, [items], progress=progress), model, items)
    text, either = follows[:, 1], follows[:, :2].sum(1)
    report = [_answers_told(follows)]
    return found(text, {}, items, denominators=either, by=by, seed=seed, report=report)


# -------------------------------------------------------------------------------- counterfactual

OUTCOMES = ("flips", "to_audio", "kept", "dropped")


@method("grounding.counterfactual")
def counterfactual(
    model: HookedAudioTransformer,
    items: Items,
    *,
    without: Callable[[Item], str] | None = None,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """The same audio with the contradicting text dropped (2606.05161): whose answer flips?

    The score is the logit difference of ``answer`` and ``against``: positive where the model sides
    with the clip. An item flips if its sign changes when the text is dropped.

    Args:
        items: conflict items; of the counterparts only ``other_text`` is needed.
        without: the text of an item without what contradicts the clip; None drops the sentences
            that are others in ``other_text``.
        by, seed, progress: as of `stream_share`.

    Returns:
        Axis "metric": flips, 0 or 1; to_audio, flips from the text's side to the audio's; the score
        with the text kept, and with it dropped. The control ``other_text`` keeps a text of the
        same form that says something else.

    Raises:
        ItemError: items without ``other_text``, or of whose text nothing, or everything, is
            dropped.
    """
    check(model, items, ("text",))
    dropped = bare(items, without)
    told = said(model, [items, dropped, swapped(items, "text")], progress=progress)
    scores = _score(told, model, items)
    axes = {"metric": OUTCOMES}
    control = found(_outcomes(scores[:, [0, 2]]), axes, items, by=by, seed=seed)
    values = _outcomes(scores[:, :2])
    controls = {"other_text": control}
    result = found(values, axes, items, by=by, seed=seed, controls=controls)
    flips, to_audio, kept, dropped = (_number(result, at) for at in range(4))
    result.report = [
        f"Without the contradicting text the answer changes sides in {flips} of the items, from "
        f"the text's to the audio's in {to_audio}.",
        f"The score for the audio's answer is {kept} with the text, and {dropped} without.",
        "A text that says something else in its place flips "
        f"{_number(control, 0)}; what flips only when the text is gone may follow the form of "
        "the prompt.",
    ]
    return result


def bare(items: Items, without: Callable[[Item], str] | None) -> Items:
    """The items without what contradicts their clips."""
    wrong, made = [], []
    for item in items:
        given, other = str(item.text), str(item.other_text)
        text = without_difference(given, other) if without is None else without(item)
        if text == given:
            wrong.append(f"{item.name}: nothing is dropped of {given!r}")
        elif not text.strip():
            wrong.append(f"{item.name}: nothing is left of {given!r}: pass without=")
        made.append(item.replaced(text=text))
    if wrong:
        raise ItemError(listed(f"{len(wrong)} of {len(items)} texts cannot be dropped", wrong))
    return Items(made)


def _outcomes(scores: Float[Tensor, "n two"]) -> Float[Tensor, "n outcomes"]:
    kept, dropped = scores.unbind(1)
    flips = (kept > 0) != (dropped > 0)
    to_audio = flips & (dropped > 0)
    return torch.stack([flips.double(), to_audio.double(), kept, dropped], dim=1)


# -------------------------------------------------------------------------------- what was said


def _said(model: HookedAudioTransformer, items: Items, metric: Any, progress: bool | None) -> Said:
    """Of the items as they are, with the audio swapped, and with the text swapped."""
    check_one(metric)
    check(model, items)
    sides = [items, *(swapped(items, stream) for stream in STREAMS)]
    return said(model, sides, metric, progress=progress)


def _score(told: Said, model: HookedAudioTransformer, items: Items) -> Float[Tensor, "n runs"]:
    """Logit of what the clip says minus logit of what the text says."""
    right, wrong = (told.columns(model, spoken(items, x)) for x in ("answer", "against"))
    return told.logit(right) - told.logit(wrong)


def _swaps(score: Float[Tensor, "n three"]) -> Float[Tensor, "n streams"]:
    """What each stream moves of a score for the audio against the text."""
    whole, audio, text = score.unbind(1)
    return torch.stack([whole - audio, text - whole], dim=1)


def _moved(told: Said, model: HookedAudioTransformer, items: Items) -> Float[Tensor, "n streams"]:
    return _swaps(_score(told, model, items) if told.values is None else told.values)


def _moved_log_prob(
    told: Said, model: HookedAudioTransformer, items: Items
) -> Float[Tensor, "n streams"]:
    """By how much swapping a stream lowers the log-probability of what that stream says."""
    right, wrong = (
        told.logit(told.columns(model, spoken(items, x))) - told.totals
        for x in ("answer", "against")
    )
    return torch.stack([right[:, 0] - right[:, 1], wrong[:, 0] - wrong[:, 2]], dim=1)


def _follows(told: Said, model: HookedAudioTransformer, items: Items) -> Float[Tensor, "n said"]:
    """Whether the likeliest token is the audio's answer, the text's, or another."""
    token = told.tokens[:, 0]
    audio, text = (
        token == torch.tensor([model.to_single_token(word) for word in spoken(items, x)])
        for x in ("answer", "against")
    )
    return torch.stack([audio, text, ~(audio | text)], dim=1).double()


def _chance(
    model: HookedAudioTransformer, items: Items, told: Said, seed: int
) -> Float[Tensor, "n streams"] | None:
    """What the streams move of two answers of other items; None where there are too few."""
    draw, count = np.random.default_rng(seed), len(told.words)
    if count < 4:
        return None
    own = [told.columns(model, spoken(items, x)).tolist() for x in ("answer", "against")]
    pairs = [
        draw.choice([i for i in range(count) if i not in both], 2, replace=False)
        for both in zip(*own, strict=True)
    ]
    one, other = torch.as_tensor(np.array(pairs)).unbind(1)
    return _swaps(told.logit(one) - told.logit(other))


# -------------------------------------------------------------------------------- in words


def _number(result: Result, at: int | None = None) -> str:
    """An estimate with its interval."""
    if result.estimate is None or result.low is None or result.high is None:
        raise InputError("no estimate with an interval")
    one, low, high = result.estimate, result.low, result.high
    if at is not None:
        one, low, high = one[at], low[at], high[at]
    return f"{one.item():.2f} [{low.item():.2f}, {high.item():.2f}]"


def _answers_told(follows: Float[Tensor, "n said"]) -> str:
    audio, text, other = follows.mean(0).tolist()
    ratio = f"{text / (text + audio):.2f}" if text + audio else "undefined"
    return (
        f"Answered is what the audio says in {audio:.2f} of the items, what the text says in "
        f"{text:.2f}, something else in {other:.2f}; ALME's text dominance ratio, text by text or "
        f"audio, is {ratio}."
    )


def _negative(gaps: Result) -> list[str]:
    if gaps.high is None:
        return []
    against = [stream for stream, high in zip(STREAMS, gaps.high.tolist(), strict=True) if high < 0]
    return [
        f"The {stream} moves the answer away from what it says: the share is then no part of a "
        "whole."
        for stream in against
    ]


def _by_chance(
    model: HookedAudioTransformer, items: Items, told: Said, metric: Any, seed: int
) -> list[str]:
    chance = None if metric is not None else _chance(model, items, told, seed)
    if chance is None:
        return []
    audio, text = chance.mean(0).tolist()
    return [f"Two answers of other items are moved by {audio:.2f} and {text:.2f} logits."]
