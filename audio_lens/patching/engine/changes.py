"""From a patched site to the rows of the residual stream that it changes.

Every patch of one block, wherever it sits, ends up as a `BlockEntry`: rows of the residual stream
entering a block that differ from the base run's. Patches inside a block become what they add to
the residual stream; the rest of the block then runs on the changed rows alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.errors import InputError
from audio_lens.models.layers import MLP, Attention, Block, GatedMLP
from audio_lens.patching.engine.trace import PackedRows, Source, Trace
from audio_lens.sites import Site

Projected = tuple[Tensor, Tensor, Tensor]
KEYS = ("k", "v", "rot_k")
_ADDED = ("attn_out", "cross_attn_out", "mlp_out")
_STAGES = ("resid_pre", "resid_mid", "resid_mid_cross", "normalized_resid_mid")
_STAGES += ("resid_post", "normalized_resid_post")

Tables = TypeVar("Tables")


@dataclass(frozen=True)
class LanePatches:
    """What is patched in each lane (a copy of a row of the base run), in the same block.

    Attributes:
        row: which row of the base run (a prompt, or a clip in the encoder).
        where: the patched positions, of the site's own axis of positions.
        unit: the patched head or neuron; None for all.
    """

    row: Int[Tensor, " n"]
    where: Bool[Tensor, "n s"]
    unit: Int[Tensor, " n"] | None

    @property
    def units(self) -> Int[Tensor, " n"]:
        """The patched units of lanes that name them.

        Raises:
            ValueError: where all units are patched.
        """
        if self.unit is None:
            raise InputError("these lanes patch all units at once")
        return self.unit

    def __getitem__(self, index: Tensor) -> LanePatches:
        unit = None if self.unit is None else self.unit[index]
        return LanePatches(self.row[index], self.where[index], unit)

    def of_unit(self, x: Bool[Tensor, "b s u"]) -> Bool[Tensor, "n s"]:
        """What holds of every lane's row and unit."""
        steps = torch.arange(x.shape[1], device=x.device)
        return x[self.row[:, None], steps, self.units[:, None]]


@dataclass(frozen=True)
class BlockEntry:
    """LaneRows of the residual stream entering a block that differ from the base run's.

    Attributes:
        layer: the block; the number of blocks means what leaves the last.
        lane, position: where each changed row belongs.
        values: the rows.
        projected: their queries, keys and values in that block, where they are known.
    """

    layer: int
    lane: Int[Tensor, " m"]
    position: Int[Tensor, " m"]
    values: Float[Tensor, "m d"]
    projected: Projected | None = None

    def __getitem__(self, index: Tensor) -> BlockEntry:
        return BlockEntry(
            self.layer,
            self.lane[index],
            self.position[index],
            self.values[index],
            picked(self.projected, index),
        )

    def of_lanes(self, lanes: Int[Tensor, " n"]) -> BlockEntry:
        """The same for lanes that have other numbers in a larger set."""
        return BlockEntry(self.layer, lanes[self.lane], self.position, self.values, self.projected)


class Changes(ABC, Generic[Tables]):
    """What patches of one site change; one block's tables are held at a time.

    Args:
        demanded: the positions that are read behind the last block; None for all.
    """

    def __init__(
        self, site: Site, base: Trace, source: Source, demanded: Bool[Tensor, "b t"] | None
    ):
        self.site, self.base, self.source, self.demanded = site, base, source, demanded
        self._tables: tuple[int, Tables] | None = None

    def entry(self, layer: int, lanes: LanePatches) -> BlockEntry:
        """The rows that patches of this block change."""
        if self._tables is None or self._tables[0] != layer:
            self._tables = None  # never two blocks at once
            self._tables = (layer, self._make_tables(layer))
        return self._entry(layer, lanes, self._tables[1])

    @abstractmethod
    def _make_tables(self, layer: int) -> Tables: ...

    @abstractmethod
    def _entry(self, layer: int, lanes: LanePatches, tables: Tables) -> BlockEntry: ...

    def attention(self, layer: int) -> Attention:
        """The attention whose site is patched."""
        return getattr(self.base.block(layer), self.site.sublayer)

    @property
    def stage(self) -> str:
        """Which sum of the residual stream this attention writes to."""
        return "resid_mid_cross" if self.site.sublayer == "cross_attn" else "resid_mid"

    # ---------------------------------------------------------------- shared steps

    def _base(self, layer: int, *names: str) -> list[Tensor]:
        """Activations of the base run, by their names in a block."""
        held = self.base.at(layer, names)
        return [held[name] for name in names]

    def _onwards(
        self, layer: int, values: Float[Tensor, "m d"], prompts: Int[Tensor, " m"]
    ) -> Float[Tensor, "m d"]:
        """The rest of a block for packed rows of the stream that its attention has written to."""
        context = PackedRows.of(self.base, prompts)
        return self.base.block(layer).onwards(self.stage, values[None], context)[0]

    def _read(self, where: Bool[Tensor, "n t"], row: Tensor, entered: int) -> Bool[Tensor, "n t"]:
        """Without the rows that nobody reads any more."""
        # in an earlier block every row may yet be attended to; behind the last one rows are alone
        if entered < self.base.n_layers or self.demanded is None:
            return where
        return where & self.demanded[row]

    def _changed_rows(
        self, lanes: LanePatches, differs: Bool[Tensor, "b t"] | Bool[Tensor, "b t u"], entered: int
    ) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
        """Lane and position of every patched row whose activation differs in the source."""
        by_lane = differs[lanes.row] if lanes.unit is None else lanes.of_unit(differs)
        where = self._read(lanes.where & by_lane, lanes.row, entered)
        lane, position = where.nonzero(as_tuple=True)
        return lane, position


def picked(projected: Projected | None, at: Tensor | tuple[Tensor, ...]) -> Projected | None:
    """Some rows of queries, keys and values, where these are known."""
    if projected is None:
        return None
    q, k, v = projected
    return q[at], k[at], v[at]


def is_entered(site: Site, block: Block) -> bool:
    """Whether patches of a block's site are known to be changes of its residual stream."""
    if site.sublayer:
        return site.sublayer in ("attn", "cross_attn") or type(block.mlp) in (MLP, GatedMLP)
    return site.last in (*_ADDED, *_STAGES)


def kept_for(site: Site, block: Block) -> tuple[list[str], list[str]]:
    """What to hold of every block, of the base run and of the source, so that no block runs twice.

    Patterns, scores, results and neurons are too large for that: those are made block by block.
    """
    if site.reads_attention:
        return [f"{site.sublayer}.hook_z", _stage_behind(site.sublayer)], []
    if site.sublayer == "mlp" or site.last == "result":
        return [], []
    if not site.sublayer:
        is_held = site.last in ("resid_pre", block.last_stage)
        own = [] if is_held else [site.local_hook]
        of_stream = {"cross_attn_out": "resid_mid", "mlp_out": block.mlp_stage}
        return [*own, *(f"hook_{of_stream[n]}" for n in [site.last] if n in of_stream)], own
    prefix = site.sublayer
    is_memory = prefix == "cross_attn" and site.last in KEYS
    asked = ["cross_attn.hook_q"] if is_memory else []
    return [f"{prefix}.hook_z", _stage_behind(prefix), *asked], [] if is_memory else [
        site.local_hook
    ]


def _stage_behind(sublayer: str) -> str:
    """The sum of the residual stream that an attention writes to."""
    return "hook_resid_mid_cross" if sublayer == "cross_attn" else "hook_resid_mid"
