"""How often and how strongly neurons fire for each class, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.analysis.neurons.selectors import scored
from audio_lens.analysis.probes.rows import Rows
from audio_lens.items import ItemError

_AT_ONCE = 2**23  # numbers of all draws in memory
Stats = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Units:
    """Rows gathered by item and class: what is drawn anew for intervals stays together.

    Attributes:
        of_row: the unit of every row.
        item: the item of every unit.
        label: the class of every unit, by its number.
        classes: their names, in order.
    """

    of_row: Int[Tensor, " n"]
    item: Int[Tensor, " units"]
    label: Int[Tensor, " units"]
    classes: list[Any]

    @staticmethod
    def of(rows: Rows) -> Units:
        """The units of rows.

        Raises:
            ItemError: labels of one value.
        """
        classes = sorted(set(rows.labels), key=lambda one: (str(type(one)), one))
        if len(classes) < 2:
            raise ItemError(f"all labels have one value, {classes[0]!r}: there is no other class")
        number = {name: at for at, name in enumerate(classes)}
        label = np.array([number[one] for one in rows.labels])
        pairs, of_row = np.unique(np.stack([rows.item, label]), axis=1, return_inverse=True)
        item, labels = (torch.as_tensor(x) for x in pairs)
        return Units(torch.as_tensor(of_row.reshape(-1)), item, labels, classes)

    def relabelled(self, labels: Sequence[Any]) -> Units:
        """The same units under other classes."""
        return replace(self, label=torch.as_tensor(list(labels)))

    def weights(self, draws: int, seed: int) -> Float[Tensor, "draws units"]:
        """How often each unit is there when items are drawn anew."""
        count = int(self.item.max()) + 1
        draw = np.random.default_rng(seed)
        drawn = draw.multinomial(count, np.full(count, 1 / count), size=draws)
        return torch.as_tensor(drawn).double()[:, self.item]


@dataclass(frozen=True)
class Counts:
    """The sums of one layer's neurons over the rows of every unit.

    Attributes:
        fired: rows in which a neuron is above 0.
        summed: its activations.
        rows: how many rows a unit has.
    """

    units: Units
    fired: Float[Tensor, "units neurons"]
    summed: Float[Tensor, "units neurons"]
    rows: Float[Tensor, " units"]

    @staticmethod
    def of(x: Float[Tensor, "n neurons"], units: Units) -> Counts:
        fired, summed = torch.zeros(2, len(units.label), x.shape[1], dtype=torch.float64)
        fired.index_add_(0, units.of_row, (x > 0).double())
        summed.index_add_(0, units.of_row, x.double())
        rows = torch.bincount(units.of_row, minlength=len(units.label)).double()
        return Counts(units, fired, summed, rows)

    def stats(self, weights: Float[Tensor, "draws units"], part: slice = slice(None)) -> Stats:
        """How often, the mean, and the mean over all other classes: draws, classes, neurons."""
        by_class = torch.nn.functional.one_hot(self.units.label, len(self.units.classes)).double()
        mine = (weights[:, None] * by_class.mT).reshape(-1, weights.shape[1])  # draws*classes units
        shape = (len(weights), len(self.units.classes), -1)
        fired, summed = (
            (mine @ sums[:, part]).reshape(shape) for sums in (self.fired, self.summed)
        )
        rows = (mine @ self.rows).reshape(*shape[:2], 1)
        rest = (summed.sum(1, keepdim=True) - summed) / (rows.sum(1, keepdim=True) - rows)
        return fired / rows, summed / rows, rest

    @property
    def point(self) -> Stats:
        """The same of all items, each once: classes by neurons."""
        often, mean, others = self.stats(torch.ones(1, len(self.units.label)).double())
        return often[0], mean[0], others[0]

    def interval(
        self, kind: str, level: float, resamples: int, seed: int
    ) -> tuple[Float[Tensor, "classes neurons"], Float[Tensor, "classes neurons"]]:
        """Between which bounds a score lies when items are drawn anew.

        Draws that lack a class say nothing of the scores.
        """
        weights = self.units.weights(resamples, seed)
        step = max(1, _AT_ONCE // (resamples * len(self.units.classes)))
        ends = torch.tensor([(1 - level) / 2, (1 + level) / 2]).double()
        bounds = []
        for start in range(0, self.fired.shape[1], step):
            drawn = scored(kind, *self.stats(weights, slice(start, start + step)))
            bounds.append(torch.nanquantile(drawn, ends, dim=0))
        low, high = torch.cat(bounds, dim=-1)
        return low, high
