"""What attention gives to some keys: its mass, and how many of its scores are negative."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.analysis.knockout import sentences
from audio_lens.analysis.knockout.attending import RANDOM_KEYS, Attention, OtherKeys, Spot, of_items
from audio_lens.analysis.knockout.curve import Curve, OnKeys, on_keys
from audio_lens.edits import Edit, intervene
from audio_lens.errors import InputError
from audio_lens.hooks import HookPoint
from audio_lens.items import Batch, Items, found, method
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Where
from audio_lens.progress import track
from audio_lens.results import Result
from audio_lens.running import evaluating

Fold = Callable[[Tensor, Tensor], Tensor]  # of b h q k, and the keys b 1 1 k, to b h q
EVEN = "even"


@method("knockout.mass")
def mass(
    model: HookedAudioTransformer,
    items: Items,
    *,
    queries: Where = "last",
    keys: Where = "audio",
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    do: Any = None,
    attention: str | None = None,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What share of its attention every head gives to some keys, from 0 to 1.

    Controls: "even", the share if all keys that a query sees got the same; and "random_keys", the
    share of as many others of the same kind, where there are any.

    Args:
        model: a model that attends to audio.
        items: their answers are not needed.
        queries: the place that attends; the mean over its positions is taken.
        keys: the place that is attended to. Places may differ by item.
        layers, heads: which; None takes all.
        do: an edit of attention that is in force in all these blocks, with keys of its own:
            `edits.Multiply`, `Bias` ...
        attention: as in `knock_out`.
        by: a label whose values are drawn in place of items, for intervals.
        size: of the batches.
        seed: of what is drawn.
        progress: as in `patching.sweep`.

    Returns:
        A result with the axes "layer" and "head".

    Raises:
        InputError: no attention to audio; blocks or heads that are not there; a place that selects
            nothing.
    """
    reader = Reader.of(model, items, queries, keys, layers, heads, attention, size, progress)
    others = OtherKeys(reader.attention, reader.keys, seed)
    drawn: dict[str, Any] = {"by": by, "seed": seed}
    edits = _no_edits if do is None else reader.edits(on_keys(do))
    held = reader.read("pattern", share, edits)
    result = found(held, reader.axes, items, **drawn)
    even = reader.first.read("attn_scores", _even_share)[:, 0, 0]
    result.controls[EVEN] = found(even, {}, items, **drawn)
    if others.are_others(next(items[:1].batches(model, 1))):
        random = reader.read("pattern", share, edits, lambda x: others.draw(RANDOM_KEYS, x))
        result.controls[RANDOM_KEYS] = found(random, reader.axes, items, **drawn)
    result.meta |= {"title": f"attention from {reader.queries} to {reader.keys}", "value": "share"}
    result.report += _of_mass(result, reader)
    return result


@method("knockout.negative_scores")
def negative_scores(
    model: HookedAudioTransformer,
    items: Items,
    *,
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
    """What share of the scores of some keys is negative, which multiplying lowers.

    Args, result and errors are those of `mass`.
    """
    reader = Reader.of(model, items, queries, keys, layers, heads, attention, size, progress)
    held = reader.read("attn_scores", _negative_share)
    meta = {"title": f"negative scores from {reader.queries} to {reader.keys}", "value": "share"}
    return found(held, reader.axes, items, by=by, seed=seed, meta=meta)


def share(pattern: Float[Tensor, "b h q k"], keys: Bool[Tensor, "b 1 1 k"]) -> Tensor:
    """What every query gives to the keys, ``b h q``."""
    return (pattern * keys).sum(-1)


def _negative_share(scores: Float[Tensor, "b h q k"], keys: Bool[Tensor, "b 1 1 k"]) -> Tensor:
    seen = scores.isfinite() & keys
    return ((scores < 0) & seen).sum(-1) / seen.sum(-1)


def _even_share(scores: Float[Tensor, "b h q k"], keys: Bool[Tensor, "b 1 1 k"]) -> Tensor:
    seen = scores.isfinite()
    return (seen & keys).sum(-1) / seen.sum(-1)


def _of_mass(result: Result, reader: Reader) -> Iterator[str]:
    top, even = result.top(1)[0], result.controls[EVEN].cells()[0]
    yield (
        f"Most attention from {reader.queries} to {reader.keys} is in {sentences.place_of(top)}: "
        f"{sentences.amount(top)}; spread evenly over all keys it would be {even.value:.3g}."
    )
    yield (
        "Attention is no evidence of use: what is attended to may carry nothing, or be read by "
        "nobody. knock_out says what it does to the answer."
    )


def _no_edits(batch: Batch) -> list[Edit]:
    return []


@dataclass(frozen=True)
class Reader:
    """Reads scores or patterns of every item, from some queries to some keys.

    Attributes:
        layers, heads: which are read.
    """

    attention: Attention
    items: Items
    queries: Spot
    keys: Spot
    layers: list[int]
    heads: list[int]
    size: int
    progress: bool | None

    @staticmethod
    def of(
        model: HookedAudioTransformer,
        items: Items,
        queries: Where,
        keys: Where,
        layers: int | Sequence[int] | None,
        heads: int | Sequence[int] | None,
        attention: str | None,
        size: int,
        progress: bool | None,
    ) -> Reader:
        """A reader of what was asked for.

        Raises:
            InputError: no attention to audio; blocks or heads that are not there.
        """
        read = Attention.of(model, attention)
        spots = Spot.of(queries, items), Spot.of(keys, items)
        return Reader(read, items, *spots, read.layers(layers), read.heads(heads), size, progress)

    @property
    def axes(self) -> dict[str, list[int]]:
        return {"layer": self.layers, "head": self.heads}

    @property
    def first(self) -> Reader:
        """Of its first block and head."""
        return replace(self, layers=self.layers[:1], heads=self.heads[:1])

    def edits(self, do: OnKeys) -> Callable[[Batch], list[Edit]]:
        """An edit of what is read, at the same queries and in the same blocks and heads."""
        keys, curve = (
            Spot.of(do.keys, self.items),
            Curve(self.attention, do, [self.layers], self.heads),
        )

        def of_batch(batch: Batch) -> list[Edit]:
            own = curve.of_keys(keys.at(batch.rows))
            return own.edits(self.queries.at(batch.rows))[0]

        return of_batch

    @torch.no_grad()
    def read(
        self,
        last: str,
        fold: Fold,
        edits: Callable[[Batch], list[Edit]] = _no_edits,
        keys: Callable[[Batch], Bool[Tensor, "b k"]] | None = None,
    ) -> Float[Tensor, "n layers heads"]:
        """A fold of scores or patterns, the mean over the queries of every item.

        Args:
            last: "attn_scores" or "pattern".
            fold: of ``b h q k`` and the keys, to ``b h q``.
            edits: that are in force in a batch.
            keys: others than its own.
        """
        values = torch.zeros(len(self.items), len(self.layers), len(self.heads)).double()
        model, done, keys = self.attention.model, 0, keys or self._keys
        with track("attention", len(self.items), "items", show=self.progress) as advance:
            for batch in self.items.batches(model, self.size):
                with evaluating(model), _in_force(model, edits(batch)):
                    values[batch.rows] = self._of_batch(batch, last, fold, keys(batch))
                done += len(batch)
                advance(len(batch), done)
        return values

    def _keys(self, batch: Batch) -> Bool[Tensor, "b k"]:
        ground = self.attention.ground_of_keys(batch.inputs)
        return ground.held(self.keys.at(batch.rows))

    def _of_batch(
        self, batch: Batch, last: str, fold: Fold, keys: Bool[Tensor, "b k"]
    ) -> Float[Tensor, "b layers heads"]:
        ground = self.attention.ground_of_queries(batch.inputs)
        queries = ground.held(self.queries.at(batch.rows))
        found: dict[int, Tensor] = {}

        def take(x: Float[Tensor, "b h q k"], hook: HookPoint) -> None:
            width = x.shape[-1]
            if len(keys) not in (1, len(x)) or len(queries) != len(x) or keys.shape[1] < width:
                raise InputError(f"{hook.name} attends within pieces, where places have no names")
            here = fold(x[:, self.heads], keys[:, None, None, :width].to(x.device)).double().cpu()
            asked = queries[:, None, : here.shape[-1]]
            found[hook.layer()] = here.where(asked, 0.0).sum(-1) / asked.sum(-1)

        hooks = [(self.attention.hook_name(last, layer), take) for layer in self.layers]
        self.attention.model.run_with_hooks(batch.inputs, fwd_hooks=hooks, return_type=None)
        entries = torch.stack([found[layer] for layer in self.layers], dim=1)
        return of_items(entries, ground, len(batch))


def _in_force(model: HookedAudioTransformer, edits: list[Edit]) -> AbstractContextManager[Any]:
    return intervene(model, edits) if edits else nullcontext()
