"""How items are answered: log-probability, and which word is the likeliest, run by run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens import metrics
from audio_lens.items import Items, Measured, measured
from audio_lens.models import HookedAudioTransformer

LOG_PROB, RIGHT, LOGIT_DIFF, AGAINST = "log_prob", "right", "logit_diff", "against"
TOLD = "The answer's log-probability among all tokens, and whether it is the likeliest one."
Cells = Callable[[Any], Iterable[Any]]


@dataclass(frozen=True)
class Answers:
    """What is right of every item, and what is not.

    Attributes:
        right: the token of ``answer``.
        wrong: the token of ``against``; None where items lack it.
    """

    model: HookedAudioTransformer
    items: Items
    right: Int[Tensor, " n"]
    wrong: Int[Tensor, " n"] | None

    @staticmethod
    def of(model: HookedAudioTransformer, items: Items, against: bool = True) -> Answers:
        """The answers of items; without ``against``, the wrong ones are left out.

        Raises:
            ItemError: answers that are not one token.
        """
        both = against and all(item.against is not None for item in items)
        items.check_answers(model, against=both)

        def tokens(field: str) -> Int[Tensor, " n"]:
            return torch.tensor([model.to_single_token(str(x)) for x in items.values(field)])

        return Answers(model, items, tokens("answer"), tokens("against") if both else None)

    @property
    def names(self) -> list[str]:
        """What is told of every item."""
        return [LOG_PROB, RIGHT] + ([] if self.wrong is None else [LOGIT_DIFF, AGAINST])

    def measured(
        self, cells: Cells, *, size: int = 16, what: str = "items", progress: bool | None = None
    ) -> Measured:
        """What is told of every item in every cell, as `items.measured` runs them."""
        wanted: dict[str, Any] = {
            "said": metrics.read_at(lambda rows: rows.argmax(-1).double(), name="likeliest"),
            LOG_PROB: metrics.log_prob(self._words("answer")),
        }
        if self.wrong is not None:
            words = self._words("answer"), self._words("against")
            wanted[LOGIT_DIFF] = metrics.logit_diff(*words)
        run = measured(
            self.model, self.items, cells, wanted, size=size, what=what, progress=progress
        )
        said, *rest = run.values.unbind(1)
        told = [rest[0], (said == self.right[:, None]).double(), *rest[1:]]
        if self.wrong is not None:
            told.append((said == self.wrong[:, None]).double())
        return Measured(self.names, torch.stack(told, dim=1))

    def of_logits(self, logits: Float[Tensor, "b v"], rows: Sequence[int]) -> Float[Tensor, "b m"]:
        """The same of logits of some items."""
        wide, at = logits.double().cpu(), torch.arange(len(rows))
        said, right = wide.argmax(-1), self.right[list(rows)]
        own = wide[at, right]
        told = [own - wide.logsumexp(-1), (said == right).double()]
        if self.wrong is not None:
            wrong = self.wrong[list(rows)]
            told += [own - wide[at, wrong], (said == wrong).double()]
        return torch.stack(told, dim=1)

    def _words(self, field: str) -> list[str]:
        return [str(one) for one in self.items.values(field)]
