"""Attention rollout: what of each position could have come up to some others (2005.00928)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.knockout import sentences
from audio_lens.analysis.knockout.attending import Attention, Spot, of_items
from audio_lens.arguments import number
from audio_lens.errors import InputError
from audio_lens.hooks import HookPoint
from audio_lens.items import Batch, Items, found, method
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Where
from audio_lens.progress import track
from audio_lens.results import Result
from audio_lens.running import evaluating

EVEN = "even"
Square = Float[Tensor, "b t t"]


@method("knockout.rollout")
def rollout(
    model: HookedAudioTransformer,
    items: Items,
    *,
    queries: Where = "last",
    keys: Any = None,
    residual: float | int = 0.5,
    attention: str | None = None,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What share of some positions' states comes from others, if attention is all that mixes them.

    Block by block, a position is ``residual`` of itself and the rest of what it attends to, heads
    averaged; the products of all blocks say how much of what enters the first has come where
    (Abnar and Zuidema, 2020). Values and MLPs are left out, and with them whatever they cancel or
    amplify: `value_zeroing` and `knock_out` are about those.

    Args:
        model: the model.
        items: their answers are not needed.
        queries: the place that is looked at; the mean over its positions is taken.
        keys: groups of positions, a mapping of names to places; one place is a group alone. None is
            audio and text.
        residual: what of a position stays by itself in each block, from 0 to 1.
        attention: ``part.attn``; None is the decoder's.
        by: a label whose values are drawn in place of items, for intervals.
        size: of the batches.
        seed: of the intervals.
        progress: as in `patching.sweep`.

    Returns:
        Shares by "group" and "layer", after each block. The control "even" has every query attend
        evenly to all it sees: what the mask and the depth give without any attention.

    Raises:
        InputError: cross-attention, no group, or a place that selects nothing.
    """
    read = Attention.of(model, attention)
    if read.is_cross:
        raise InputError(
            f"{read.name} reads other positions than it writes: rollout goes through attn of a "
            "part, such as decoder.attn"
        )
    if keys is None:
        keys = {name: name for name in ("audio", "text")}
    if not isinstance(keys, Mapping):
        keys = {str(Spot.of(keys, items)): keys}
    if not keys:
        raise InputError("keys name at least one group of positions")
    number("residual", residual, least=0, most=1)
    groups = {name: Spot.of(where, items) for name, where in keys.items()}
    rolling = _Rolling(read, Spot.of(queries, items), groups, float(residual))
    axes = {"group": list(groups), "layer": list(range(read.n_layers))}
    values, even = rolling.measured(items, size, progress).unbind(1)
    result = found(values, axes, items, by=by, seed=seed)
    result.controls[EVEN] = found(even, axes, items, by=by, seed=seed)
    result.meta |= {"title": f"attention rollout to {rolling.queries}", "value": "share"}
    result.report = list(_told(result, rolling))
    return result


@dataclass(frozen=True)
class _Rolling:
    """The shares of groups of positions, through all blocks.

    Attributes:
        groups: by name.
        residual: what stays in each block.
    """

    attention: Attention
    queries: Spot
    groups: dict[Any, Spot]
    residual: float

    def measured(
        self, items: Items, size: int, progress: bool | None
    ) -> Float[Tensor, "n two groups layers"]:
        """The shares by attention as it is, and by even attention."""
        model, rows, done = self.attention.model, {}, 0
        with track("rollout", len(items), "items", show=progress) as advance, evaluating(model):
            for batch in items.batches(model, size):
                rows |= dict(zip(batch.rows, self._of_batch(batch), strict=True))
                done += len(batch)
                advance(len(batch), done)
        return torch.stack([rows[row] for row in range(len(items))])

    @torch.no_grad()
    def _of_batch(self, batch: Batch) -> Float[Tensor, "b two groups layers"]:
        ground = self.attention.ground_of_queries(batch.inputs)
        asked = ground.held(self.queries.at(batch.rows)).double()
        held = [ground.held(x.at(batch.rows)) for x in self.groups.values()]
        among = torch.stack(held, dim=1).double()
        found_ = []
        for mixing in self._mixing(batch):
            rolled, shares = torch.eye(asked.shape[1], dtype=torch.float64), []
            for block in mixing:
                if block.shape[-2:] != rolled.shape[-2:]:
                    raise InputError(
                        f"{self.attention.name} attends within pieces, where places have no names"
                    )
                rolled = self.residual * rolled + (1 - self.residual) * block @ rolled
                own = asked[:, None] @ rolled / asked.sum(1)[:, None, None]
                shares.append((own * among).sum(-1))
            found_.append(torch.stack(shares, dim=-1))
        return of_items(torch.stack(found_, dim=1), ground, len(batch))

    def _mixing(self, batch: Batch) -> tuple[list[Square], list[Square]]:
        """What every block mixes, heads averaged: as it is, and evenly among what is seen."""
        patterns: dict[int, Square] = {}
        even: dict[int, Square] = {}

        def take(x: Float[Tensor, "b h q k"], hook: HookPoint) -> None:
            patterns[hook.layer()] = x.double().mean(1).cpu()

        def see(x: Float[Tensor, "b h q k"], hook: HookPoint) -> None:
            seen = x.isfinite().double()
            even[hook.layer()] = (seen / seen.sum(-1, keepdim=True)).mean(1).cpu()

        model, read, layers = self.attention.model, self.attention, range(self.attention.n_layers)
        hooks = [(read.hook_name("pattern", layer), take) for layer in layers]
        hooks += [(read.hook_name("attn_scores", layer), see) for layer in layers]
        model.run_with_hooks(batch.inputs, fwd_hooks=hooks, return_type=None)
        return [patterns[n] for n in layers], [even[n] for n in layers]


def _told(result: Result, rolling: _Rolling) -> Iterator[str]:
    last = result.coords["layer"][-1]
    for name in rolling.groups:
        cell = result.select(group=name, layer=last).cells()[0]
        even = result.controls[EVEN].select(group=name, layer=last).cells()[0].value
        yield (
            f"{sentences.amount(cell)} of {rolling.queries} comes from {name} by the last block; "
            f"with even attention {even:.3g}."
        )
    yield "What comes up is not what is used: knock_out says what the answer depends on."
