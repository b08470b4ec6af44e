"""What each cell of a sweep patches, for all cells at once.

A table of layer and neuron has a million cells: their places are tensors, and one cell's own are
put together when somebody asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from jaxtyping import Int
from torch import Tensor

from audio_lens.sites import Site

PLACE_AXES = ("time", "position", "frequency", "group")  # what splits the positions of a site
Layers = tuple[int | None, ...]


@dataclass(frozen=True)
class Intervention:
    """What one row of a forward has patched: blocks, units (None: all) and a set of positions."""

    layers: Layers
    unit: int | None
    positions: int  # row of `CellTable.positions`


@dataclass(frozen=True, eq=False)
class Interventions(Sequence[Intervention]):
    """Those of all cells, in the order of the axes.

    Attributes:
        blocks: what can be patched together: the layers of every entry of axis "layer", or of all
            cells where there is no such axis.
        block: which of them, for every cell.
        unit: head or neuron of every cell; None where all are patched.
        positions: which set of positions, for every cell.
    """

    blocks: tuple[Layers, ...]
    block: Int[Tensor, " n"]
    unit: Int[Tensor, " n"] | None
    positions: Int[Tensor, " n"]

    @staticmethod
    def of(
        site: Site, axes: Sequence[str], coords: dict[str, list], layers: Layers, layer_window: int
    ) -> Interventions:
        """One for every combination of coordinates.

        Args:
            layers: those patched together where "layer" is none of the axes.
            layer_window: how many blocks from each layer on are patched together.
        """
        sizes = [len(coords[axis]) for axis in axes]
        cells = torch.arange(math.prod(sizes))
        at = dict(zip(axes, torch.unravel_index(cells, sizes), strict=True))
        positions = torch.zeros_like(cells)
        for axis in (axis for axis in axes if axis in PLACE_AXES):
            positions = positions * len(coords[axis]) + at[axis]
        in_order = tuple(sorted(layer for layer in layers if layer is not None)) or layers
        blocks: tuple[Layers, ...] = (in_order,)
        if "layer" in at:
            blocks = tuple(tuple(range(at, at + layer_window)) for at in coords["layer"])
        return Interventions(
            blocks=blocks,
            block=at.get("layer", torch.zeros_like(cells)),
            unit=at.get(site.unit or ""),
            positions=positions,
        )

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, cell: int) -> Intervention: ...

    @overload
    def __getitem__(self, cell: slice) -> list[Intervention]: ...

    def __getitem__(self, cell: int | slice) -> Intervention | list[Intervention]:
        if isinstance(cell, slice):
            return [self[one] for one in range(*cell.indices(len(self)))]
        return Intervention(
            layers=self.blocks[int(self.block[cell])],
            unit=None if self.unit is None else int(self.unit[cell]),
            positions=int(self.positions[cell]),
        )

    @property
    def layers(self) -> Layers:
        """Every layer that any cell patches, each once."""
        return tuple(dict.fromkeys(layer for block in self.blocks for layer in block))

    @property
    def first_layers(self) -> Int[Tensor, " n"]:
        """The first block that each cell patches; -1 outside the blocks."""
        firsts = [-1 if block[0] is None else block[0] for block in self.blocks]
        return torch.tensor(firsts)[self.block]

    @property
    def are_of_one_layer(self) -> bool:
        """Whether no cell patches several blocks."""
        return all(len(block) == 1 for block in self.blocks)
