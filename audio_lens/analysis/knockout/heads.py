"""Heads that look at the audio where the model is right: audio specialists (2603.06854)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.knockout import sentences
from audio_lens.analysis.knockout.reading import Reader, share
from audio_lens.errors import InputError
from audio_lens.items import Items, found, method, statistics
from audio_lens.items.pairs import answered
from audio_lens.items.statistics import LEVEL
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Where
from audio_lens.results import Result
from audio_lens.running import evaluating

PERMUTED, PERMUTATIONS = "permuted_labels", 1000
CONSTANT = 1e-6  # a spread of attention below it is rounding


@method(
    "knockout.audio_specialists",
    whole="a correlation is of all items: study knockout.mass, and correlate its values",
)
def audio_specialists(
    model: HookedAudioTransformer,
    items: Items,
    *,
    correct: Sequence[float | int] | None = None,
    queries: Where = "last",
    keys: Where = "audio",
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    attention: str | None = None,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Of every head, how its attention to the audio goes with right answers over the items.

    The values are Pearson's correlations; a head that attends to all items alike has none (NaN).
    Every item's value is its own term of the correlation. Control: "permuted_labels", the mean
    correlation with right answers in another order, and as its interval what 95 % of the orders
    give.

    Args:
        model: a model that attends to audio.
        items: with answers of one token, of which some are given rightly and some are not.
        correct: for each item how right it is, if not this: 1 where the likeliest token is the
            answer, and else 0.
        queries, keys: from where to where attention is added up; the mean over the queries is
            taken.
        layers, heads: which; None takes all.
        attention: as in `knock_out`.
        by: a label whose values are drawn in place of items, for intervals; labels are then
            permuted within its values.
        size: of the batches.
        seed: of what is drawn.
        progress: as in `patching.sweep`.

    Returns:
        A result with the axes "layer" and "head".

    Raises:
        ControlError: answers that are all right, or all wrong.
        InputError: no attention to audio; not as many ``correct`` as items.
        ItemError: items without answers of one token.
    """
    reader = Reader.of(model, items, queries, keys, layers, heads, attention, size, progress)
    right = _right(model, items, size) if correct is None else _given(correct, len(items))
    groups = None if by is None else items.values(by)
    statistics.permuted_labels(right.tolist(), groups, seed=seed)  # raises where all are the same
    masses = reader.read("pattern", share)
    terms = _terms(masses, right)
    drawn = statistics.bootstrap(
        torch.stack([masses, right[:, None, None].expand_as(masses)], -1),
        lambda both: _terms(both[..., 0], both[:, 0, 0, 1]).mean(0),
        groups=groups,
        seed=seed,
    )
    orders = _in_other_orders(masses, right, groups, seed)
    result = found(terms, reader.axes, items, by=by, seed=seed)
    result.low, result.high = drawn.low, drawn.high
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2]).double()
    low, high = orders.nanquantile(ends, dim=0)
    result.controls[PERMUTED] = Result(
        orders.mean(0), result.axes, dict(reader.axes), low=low, high=high
    )
    result.meta |= {"title": "attention to the audio, and right answers", "value": "correlation"}
    result.report += _told(result, orders, right)
    return result


def _right(model: HookedAudioTransformer, items: Items, size: int) -> Float[Tensor, " n"]:
    """1 where the likeliest token is the answer."""
    items.check_answers(model)
    right = torch.zeros(len(items)).double()
    with evaluating(model), torch.no_grad():
        for batch in items.batches(model, size):
            answers = [str(items[row].answer) for row in batch.rows]
            right[batch.rows] = torch.from_numpy(answered(model, batch.inputs, answers)).double()
    return right


def _given(correct: Sequence[float | int], count: int) -> Float[Tensor, " n"]:
    if len(correct) != count:
        raise InputError(f"{count} items need as many values of correct, got {len(correct)}")
    return torch.tensor([float(one) for one in correct]).double()


def _terms(masses: Float[Tensor, " n *cells"], right: Float[Tensor, " n"]) -> Tensor:
    """The terms whose mean over the items is the correlation; NaN where nothing varies."""
    right = right.reshape(-1, *[1] * (masses.ndim - 1))
    return _standard(masses) * _standard(right)


def _standard(values: Float[Tensor, " n *cells"]) -> Float[Tensor, " n *cells"]:
    spread = values.std(0, correction=0, keepdim=True)
    return (values - values.mean(0, keepdim=True)) / spread.where(spread > CONSTANT, torch.nan)


def _in_other_orders(
    masses: Float[Tensor, " n *cells"], right: Float[Tensor, " n"], groups: Any, seed: int
) -> Float[Tensor, " orders *cells"]:
    """Correlations with right answers in other orders, within groups if there are any."""
    draw, rows = np.random.default_rng(seed), np.arange(len(right))
    named = rows * 0 if groups is None else np.unique(np.array(groups), return_inverse=True)[1]
    members = [rows[named == one] for one in np.unique(named)]
    steady, found = _standard(masses), []
    for _ in range(PERMUTATIONS):
        order = rows.copy()
        for own in members:
            order[own] = draw.permutation(own)
        found.append((steady * _standard(right[order]).reshape(-1, 1, 1)).mean(0))
    return torch.stack(found)


def _told(result: Result, orders: Tensor, right: Float[Tensor, " n"]) -> Iterator[str]:
    known = [cell for cell in result.cells() if cell.value == cell.value]
    if not known:
        yield "No head attends to the audio of some items more than to that of others."
        return
    top, strongest = result.top(1)[0], orders.abs().nan_to_num(0).flatten(1).amax(1)
    bound = float(strongest.quantile(LEVEL))
    beyond = sorted(cell.place for cell in known if abs(cell.value) > bound)
    yield (
        f"The items are right by {right.mean():.3g} on average. Attention to the audio goes with "
        f"right answers most in {sentences.place_of(top)}: r = {sentences.amount(top)}."
    )
    yield (
        f"In another order of the answers, the strongest of all heads stays below {bound:.2g} in "
        f"{LEVEL:.0%} of {PERMUTATIONS} draws; beyond that: {', '.join(beyond) or 'none'}."
    )
    yield (
        "A correlation does not show that a head brings the answer: easy items may draw its "
        "attention. knock_out(per_head=True) says what is lost without it."
    )
