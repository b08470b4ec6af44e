"""What an edit of attention costs, block by block: knock-out, and its milder kin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.knockout.attending import (
    IDENTITY,
    RANDOM_KEYS,
    TEXT_KEYS,
    Attention,
    OtherKeys,
    Spot,
)
from audio_lens.edits import Bias, Block, Edit, Multiply, Sharpen, Weights
from audio_lens.errors import InputError
from audio_lens.items import Batch, Items, measured
from audio_lens.places import Where

CONTROLS = (RANDOM_KEYS, TEXT_KEYS, IDENTITY)
UNEDITED, CURVE, TOGETHER, SINGLES = "unedited", "curve", "together", "singles"
OnKeys = Block | Bias | Weights | Multiply | Sharpen


def on_keys(do: Any) -> OnKeys:
    """What is done, if it is an edit of attention to some keys.

    Raises:
        InputError: anything else.
    """
    if not isinstance(do, OnKeys):
        raise InputError(
            "do edits attention: edits.Block, Bias, Weights, Multiply or Sharpen, got "
            f"{type(do).__name__}"
        )
    return do


@dataclass(frozen=True)
class Curve:
    """An edit of attention in one window of blocks after the other.

    Attributes:
        do: what is done, to its own keys.
        windows: the blocks that are edited together, for every cell.
        heads: those that are edited: together, or with ``per_head`` one by one.
    """

    attention: Attention
    do: OnKeys
    windows: list[list[int]]
    heads: list[int]
    per_head: bool = False

    @property
    def axes(self) -> dict[str, list[int]]:
        """The named axes of its cells; a window is named by its first block."""
        layers = {"layer": [window[0] for window in self.windows]}
        return layers | ({"head": self.heads} if self.per_head else {})

    @property
    def width(self) -> int:
        """Blocks of a window."""
        return len(self.windows[0])

    @property
    def blocks(self) -> list[int]:
        """Every block that is edited in some window."""
        return sorted({block for window in self.windows for block in window})

    @property
    def singles(self) -> Curve:
        """The curve of its blocks one by one."""
        return replace(self, windows=[[block] for block in self.blocks])

    @property
    def together(self) -> Curve:
        """All its heads in all its blocks at once."""
        return replace(self, windows=[self.blocks], per_head=False)

    @property
    def nothing(self) -> Curve:
        """An edit of the same activations that changes nothing, in all its blocks at once."""
        keys, edits_scores = self.do.keys, self.site.endswith("attn_scores")
        none = Bias(0.0, keys) if edits_scores else Weights(1.0, keys, renormalise=False)
        return replace(self.together, do=none)

    @property
    def site(self) -> str:
        """Scores, or patterns where these are weighed or nothing may take their place."""
        on_patterns = isinstance(self.do, Weights) or (
            isinstance(self.do, Block) and self.attention.is_cross
        )
        return self.attention.site("pattern" if on_patterns else "attn_scores")

    def of_keys(self, keys: Where) -> Curve:
        """The same at other keys."""
        return replace(self, do=replace(self.do, keys=keys))

    def edits(self, queries: Where) -> list[list[Edit]]:
        """The edits of every cell, in the order of its axes."""
        each = [[head] for head in self.heads] if self.per_head else [self.heads]
        return [
            [Edit(self.site, self.do, layer=blocks, head=self._named(heads), where=queries)]
            for blocks in self.windows
            for heads in each
        ]

    def _named(self, heads: list[int]) -> list[int] | None:
        return None if len(heads) == self.attention.n_heads else heads


@dataclass(frozen=True)
class Study:
    """A curve over items, and what runs beside it.

    Attributes:
        where: the place that attends.
        asked: the controls that were asked for.
    """

    curve: Curve
    where: Where
    items: Items
    asked: tuple[str, ...]
    seed: int

    @cached_property
    def queries(self) -> Spot:
        return Spot.of(self.where, self.items)

    @cached_property
    def keys(self) -> Spot:
        return Spot.of(self.curve.do.keys, self.items)

    @cached_property
    def others(self) -> OtherKeys:
        return OtherKeys(self.curve.attention, self.keys, self.seed)

    @cached_property
    def controls(self) -> tuple[str, ...]:
        """Those that were asked for, without text keys where these are none or the keys themselves.

        Raises:
            InputError: names of none.
        """
        unknown = [name for name in self.asked if name not in CONTROLS]
        if unknown:
            raise InputError(f"no control {unknown[0]!r}; there are {', '.join(CONTROLS)}")
        if TEXT_KEYS not in self.asked:
            return self.asked
        first = next(self.items[:1].batches(self.curve.attention.model))
        has_text = self.others.can_draw_text(first)
        return tuple(name for name in self.asked if name != TEXT_KEYS or has_text)

    def runs(self, batch: Batch) -> dict[str, list[list[Edit]]]:
        """The edits of every cell in a batch, by what the cells are of."""
        queries, keys = (spot.at(batch.rows) for spot in (self.queries, self.keys))
        curve = self.curve.of_keys(keys)
        runs = {UNEDITED: [[]], CURVE: curve.edits(queries)}
        for control in self.controls:
            other = curve.nothing if control == IDENTITY else None
            other = other or curve.of_keys(self.others.draw(control, batch))
            runs[control] = other.edits(queries)
        if len(curve.windows) > 1 or curve.per_head:
            runs[TOGETHER] = curve.together.edits(queries)
        if curve.width > 1:
            runs[SINGLES] = curve.singles.edits(queries)
        return runs

    def measure(
        self, metric: Any, size: int, progress: bool | None
    ) -> tuple[list[str], dict[str, Float[Tensor, "n metrics cells"]]]:
        """The metrics, and of every kind of run the metrics of every item."""
        counts: dict[str, int] = {}

        def cells(batch: Batch) -> Iterator[tuple[Any, list[Edit]]]:
            runs = self.runs(batch)
            counts.update({name: len(edits) for name, edits in runs.items()})
            return ((batch.inputs, edit) for edits in runs.values() for edit in edits)

        model = self.curve.attention.model
        told = measured(
            model, self.items, cells, metric, size=size, what="knock-out", progress=progress
        )
        parts = told.values.split(list(counts.values()), dim=-1)
        return told.metrics, dict(zip(counts, parts, strict=True))
