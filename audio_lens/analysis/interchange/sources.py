"""Runs whose answers are known, and which of them lend their activations to which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import metrics
from audio_lens.analysis.subspaces.exchange import Spot
from audio_lens.items import ControlError, Items, Pairs
from audio_lens.items.pairs import PairBatch, top_token
from audio_lens.metrics import Metric

CHANGED, UNCHANGED = "changed", "unchanged"
KINDS = (CHANGED, UNCHANGED)


def likeliest() -> Metric:
    """The likeliest token where the answer is written, as a number."""
    return metrics.read_at(lambda rows: rows.argmax(-1).double(), name="likeliest")


@dataclass(frozen=True)
class Sources:
    """Both sides of a batch of pairs, at some spots.

    Attributes:
        answers: of the clean runs, then of the corrupted ones; None of those that do not say what
            their item is set against, or, where no model is asked, of items set against nothing.
        states: the activations of all these runs, for every spot.
    """

    answers: list[str | None]
    states: list[Float[Tensor, "runs ..."]]

    @staticmethod
    def of(
        spots: Sequence[Spot], pairs: Pairs[Items], batch: PairBatch, asked: bool = True
    ) -> Sources:
        """Of a batch.

        Args:
            asked: whether a corrupted run counts for its item's ``against`` only if the model says
                so; an untrained one says nothing.
        """
        model = spots[0].model
        items = [pairs.clean[row] for row in batch.rows]
        states, said = [], None
        for spot in spots:
            runs = [spot.run(inputs) for inputs in batch.pair.values()]
            said = top_token(model, batch.pair.corrupted, runs[1][0]) if said is None else said
            states.append(torch.cat([own for _, own in runs]))
        assert said is not None
        against = [
            item.against
            if item.against is not None
            and (not asked or model.to_single_token(item.against) == int(token))
            else None
            for item, token in zip(items, said, strict=True)
        ]
        return Sources([*(item.answer for item in items), *against], states)

    def lenders(self, row: int, kind: str) -> list[int]:
        """The runs whose answer is another one, or the same, and is known."""
        own = self.answers[row]
        return [
            run
            for run, answer in enumerate(self.answers)
            if run != row and answer is not None and (answer == own) == (kind == UNCHANGED)
        ]

    def drawn(self, count: int, kind: str, draw: np.random.Generator) -> list[int | None]:
        """A lender for each of the first rows; None where there is none."""
        found = [self.lenders(row, kind) for row in range(count)]
        return [int(draw.choice(some)) if some else None for some in found]


def shuffled(pairs: Pairs[Items], seed: int = 0) -> dict[str, str]:
    """Every answer as another one: a mapping that no part of a run stands for.

    Raises:
        ControlError: a single answer, for which no other can stand.
    """
    known = sorted(set(answers_of(pairs)))
    if len(known) < 2:
        raise ControlError("a shuffled mapping needs two answers or more")
    order = np.random.default_rng(seed).permutation(len(known))
    return {known[a]: known[b] for a, b in zip(order, np.roll(order, 1), strict=True)}


def answers_of(pairs: Pairs[Items]) -> list[str]:
    """All answers of both sides."""
    named = [(item.answer, item.against) for item in pairs.clean]
    return [one for both in named for one in both if one is not None]


def mapped(answer: str | None, mapping: Mapping[str, str] | None) -> str | None:
    """The answer, or what stands for it."""
    return answer if mapping is None or answer is None else mapping[answer]
