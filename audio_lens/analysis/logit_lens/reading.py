"""Residual streams of many items at some positions, and which option each would answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.analysis.logit_lens.tuned import TunedLens
from audio_lens.analysis.logit_lens.vocabulary import (
    check_reads_text,
    first_tokens,
    logits_of_streams,
    option_log_probs,
    pieces,
    stream_hooks,
)
from audio_lens.hooks import HookFn, HookPoint
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.items import ItemError, Items
from audio_lens.items.collect import Place, by_item
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Ground, Where
from audio_lens.progress import track
from audio_lens.running import evaluating

LAST = "last"
BATCH = 16


@dataclass(frozen=True)
class Residuals:
    """The residual streams of a batch at some positions.

    Attributes:
        rows: which of all items the batch holds.
        resid: the stream that enters each block, and the one that leaves the last.
        item: the place in the batch of each position's item.
        groups: which of the positions are in each place, by its name.
    """

    rows: list[int]
    inputs: AudioInputs
    resid: Float[Tensor, "streams n d"]
    item: Int[Tensor, " n"]
    groups: dict[str, Bool[Tensor, " n"]]

    def by_item(
        self, values: Float[Tensor, "streams n *r"], group: str
    ) -> Float[Tensor, "items streams *r"]:
        """The mean over the positions of a place, for every item of the batch."""
        chosen = self.groups[group]
        item, own = self.item[chosen], values[:, chosen].movedim(1, 0)
        counts = torch.bincount(item, minlength=len(self.rows)).to(own)
        sums = own.new_zeros(len(self.rows), *own.shape[1:]).index_add(0, item, own)
        return sums / counts.reshape(-1, *[1] * (own.ndim - 1))


def residuals(
    model: HookedAudioTransformer,
    items: Items,
    groups: Mapping[str, Place],
    *,
    what: str = "items",
    progress: bool | None = None,
) -> Iterator[Residuals]:
    """The residual streams of all items at the positions of some places, batch by batch.

    Raises:
        InputError: a place that selects nothing in some item.
    """
    own = {name: by_item(where, items) for name, where in groups.items()}
    with track(what, len(items), "items", show=progress) as advance:
        done = 0
        for batch in items.batches(model, BATCH):
            here = {
                name: where if (each := own[name]) is None else [each[row] for row in batch.rows]
                for name, where in groups.items()
            }
            yield residuals_of(model, batch.rows, batch.inputs, here)
            done += len(batch)
            advance(len(batch), done)


@torch.no_grad()
def residuals_of(
    model: HookedAudioTransformer,
    rows: Sequence[int],
    inputs: AudioInputs,
    groups: Mapping[str, Where],
) -> Residuals:
    ground = Ground.of(model, inputs, model.output_part)
    masks = {name: ground.held(where) for name, where in groups.items()}
    wanted = torch.stack([*masks.values()]).any(0)
    kept: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: HookPoint) -> None:
        if tensor.shape[:2] != wanted.shape:
            raise InputError(
                f"{hook.name} is {list(tensor.shape[:2])} here, its positions {list(wanted.shape)}"
            )
        kept[str(hook.name)] = tensor.detach()[wanted.to(tensor.device)].to(model.device)

    keep.only_reads = True
    names = stream_hooks(model, model.output_part)
    hooks: list[tuple[str, HookFn]] = [(name, keep) for name in names]
    with evaluating(model), model.hooks(fwd_hooks=hooks):
        model(inputs, return_type=None)
    return Residuals(
        list(rows),
        inputs,
        torch.stack([kept[name] for name in names]),
        torch.tensor(ground.prompts)[wanted.nonzero()[:, 0]],
        {name: mask[wanted] for name, mask in masks.items()},
    )


@torch.no_grad()
def through_lens(
    model: HookedAudioTransformer,
    held: Residuals,
    read: Callable[[Float[Tensor, "streams m v"]], Tensor],
    lens: TunedLens | None = None,
) -> Tensor:
    """What a function reads of the log-probabilities of all streams, position by position.

    Args:
        read: gives ``streams m ...`` or ``m ...``; positions come in pieces.
        lens: translates the streams first; None takes them as they are.
    """
    count = held.resid.shape[1]
    found = []
    for piece in pieces(model, len(held.resid), count):
        resid = held.resid[:, piece]
        logits = logits_of_streams(model, resid if lens is None else lens(resid), held.inputs)
        precise = torch.promote_types(logits.dtype, torch.float32)
        found.append(read(logits.to(precise).log_softmax(-1)).cpu())
    return torch.cat(found, dim=1)


# -------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class Asked:
    """What is asked of items.

    Attributes:
        options: all answers that are compared.
        tokens: those that each option begins with.
        right: the number of every item's answer among the options.
    """

    options: tuple[str, ...]
    tokens: list[list[int]]
    right: Int[Tensor, " n"]

    @staticmethod
    def of(model: HookedAudioTransformer, items: Items) -> Asked:
        """What is asked of items: their options, or all answers that any of them names.

        Raises:
            InputError: a model without a vocabulary.
            ItemError: items without an answer, of unequal options, or of a single one.
            TokenError: options that begin with the same token.
        """
        check_reads_text(model)
        answers = [str(answer) for answer in items.values("answer")]
        if any(item.options for item in items):
            options = items.common_options()
        else:
            named = [answer for item in items for answer in (item.answer, item.against)]
            options = tuple(dict.fromkeys(name for name in named if name is not None))
        if len(options) < 2:
            raise ItemError(f"all items have the answer {answers[0]!r}: there is nothing to choose")
        right = torch.tensor([options.index(answer) for answer in answers])
        return Asked(options, first_tokens(model, options), right)

    @property
    def chance(self) -> float:
        """How often a choice by lot is right."""
        return 1 / len(self.options)

    def level(self, labels: Int[Tensor, " n"]) -> float:
        """What one answer to all can reach of these labels, where each counts the same."""
        return max(self.chance, 1 / len(labels.unique()))


def balanced(labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """One number for each item, so that every label counts as much as any other; 1 on average."""
    counts = torch.bincount(labels).double()
    return len(labels) / ((counts > 0).sum() * counts[labels])


@dataclass(frozen=True)
class Readings:
    """What the streams of every item would answer.

    Attributes:
        votes: at which share of an item's positions an option is the likeliest.
        probs: the mean probability of every option there, among all tokens.
        written: the option that the item's last position writes in the end; of a CTC model, which
            writes everywhere, the one that most positions do.
    """

    asked: Asked
    votes: Float[Tensor, "n groups streams options"]
    probs: Float[Tensor, "n groups streams options"]
    written: Int[Tensor, " n"]

    @property
    def is_right(self) -> Bool[Tensor, " n"]:
        """Which items are answered rightly."""
        return self.written == self.asked.right


def read_options(
    model: HookedAudioTransformer,
    items: Items,
    where: Place | Mapping[str, Place],
    asked: Asked,
    *,
    lens: TunedLens | None = None,
    what: str = "items",
    progress: bool | None = None,
) -> Readings:
    """Which option each stream of every item would answer.

    Args:
        where: a place, or several by name.
        lens: translates the streams first.

    Raises:
        InputError: a place that selects nothing in some item, or a lens of another model.
    """
    places: dict[str, Any] = dict(where) if isinstance(where, Mapping) else {"": where}
    if lens is not None:
        lens.check(model)
    at_end = {} if model.cfg.output_kind == "ctc" else {LAST: LAST}
    beside = {f"@{name}": place for name, place in at_end.items()}
    shape = (len(items), len(places), len(stream_hooks(model, model.output_part)))
    votes = torch.zeros(*shape, len(asked.options), dtype=torch.float64)
    probs, written = torch.zeros_like(votes), torch.zeros(len(items), dtype=torch.long)
    for held in residuals(model, items, places | beside, what=what, progress=progress):
        options = through_lens(
            model, held, lambda log_probs: option_log_probs(log_probs, asked.tokens), lens
        ).double()
        choices = torch.nn.functional.one_hot(options.argmax(-1), len(asked.options)).double()
        rows = torch.tensor(held.rows)
        for number, name in enumerate(places):
            votes[rows, number] = held.by_item(choices, name)
            probs[rows, number] = held.by_item(options.exp(), name)
        last = f"@{LAST}" if at_end else next(iter(places))
        written[rows] = held.by_item(choices, last)[:, -1].argmax(-1)
    return Readings(asked, votes, probs, written)
