"""A measure of a model along its blocks: one curve for each item, at known depths."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.arguments import number, text
from audio_lens.errors import InputError
from audio_lens.items import statistics
from audio_lens.items.statistics import TwoPieces
from audio_lens.results import Result


@dataclass(frozen=True)
class Measure:
    """What was measured of every item along the blocks of one part of a model.

    Attributes:
        name: what it is called.
        part: "encoder", "decoder" or another one. Depths of different parts are never compared:
            each has its own axis.
        curves: a row for each item, without NaN.
        depths: of the steps: which share of the part's blocks has run by then, from 0 in front of
            the first to 1 behind the last.
        names: of the items; measures of the same items in one order are drawn anew together.
        groups: of every item, drawn in place of items for intervals.
        pieces: what is fitted, as in `statistics.changepoint`: "steps" or "lines".
        n_dropped: how many items have no curve.

    Raises:
        InputError: curves with NaN, depths that do not rise from 0 to 1 or are not as many as the
            steps, too few steps for two pieces.
    """

    name: str
    part: str
    curves: Float[Tensor, "n steps"] = field(repr=False)
    depths: Sequence[float]
    names: Sequence[str] = ()
    groups: Sequence[Hashable] | None = field(default=None, repr=False)
    pieces: str = "steps"
    n_dropped: int = 0

    def __post_init__(self) -> None:
        text("name", self.name)
        text("part", self.part)
        curves = torch.as_tensor(self.curves).double()
        if curves.ndim != 2 or not len(curves) or not curves.isfinite().all():
            raise InputError(f"curves of {self.name!r} are items by steps, of finite numbers")
        depths = [float(number("depths", one, least=0, most=1)) for one in self.depths]
        if sorted(set(depths)) != depths or len(depths) != curves.shape[1]:
            raise InputError(
                f"depths of {self.name!r} rise from 0 to 1, one for each of {curves.shape[1]} "
                f"steps, got {list(self.depths)}"
            )
        names = [str(row) for row in range(len(curves))] if not self.names else list(self.names)
        if len(names) != len(curves):
            raise InputError(f"{len(curves)} curves of {self.name!r} with {len(names)} names")
        for attribute, value in (("curves", curves), ("depths", depths), ("names", names)):
            object.__setattr__(self, attribute, value)
        _ = self.fit  # raises now what it would raise later

    @staticmethod
    def of(
        result: Result,
        name: str,
        part: str,
        n_layers: int,
        *,
        done: int = 0,
        pieces: str = "steps",
        groups: Sequence[Hashable] | None = None,
    ) -> Measure:
        """A measure of what a method found, by layers; items that lack a layer are left out.

        Args:
            result: with the axes "stimulus" and "layer", and no other: `Result.select` takes one
                of several metrics or groups.
            name, part, pieces: as of `Measure`.
            n_layers: how many blocks the part has.
            done: how many blocks have run by layer 0: 0 where layers are what enters a block
                (``resid_pre``, the streams of lenses), 1 where they are what leaves it.
            groups: of every item of the result.

        Raises:
            InputError: a result with other axes, or none of whose items has all layers.
        """
        if result.dims != ("stimulus", "layer"):
            raise InputError(
                f"{name!r} has the axes {', '.join(result.dims)}, not stimulus and layer: choose "
                "by result.select(...)"
            )
        whole = result.values.isfinite().all(1)
        if not whole.any():
            raise InputError(f"no item of {name!r} has a value at every layer")
        rows = whole.nonzero()[:, 0].tolist()
        return Measure(
            name,
            part,
            result.values[whole],
            [(layer + done) / n_layers for layer in result.coords["layer"]],
            [result.coords["stimulus"][row] for row in rows],
            None if groups is None else [groups[row] for row in rows],
            pieces,
            len(whole) - len(rows),
        )

    @cached_property
    def fit(self) -> TwoPieces:
        """Two pieces along the depths."""
        try:
            return TwoPieces.of(torch.tensor(self.depths, dtype=torch.float64), self.pieces)
        except InputError as error:
            raise InputError(f"{self.name!r}: {error}") from error

    @cached_property
    def borders(self) -> Float[Tensor, " splits"]:
        """The depth of every place at which a curve may be cut: between two steps."""
        at, depths = self.fit.splits, torch.tensor(self.depths, dtype=torch.float64)
        return (depths[at - 1] + depths[at]) / 2

    @property
    def mean(self) -> Float[Tensor, "1 steps"]:
        """The mean over the items."""
        return self.curves.mean(0, keepdim=True)

    def changes(self, curves: Float[Tensor, "m steps"]) -> Float[Tensor, " m"]:
        """The depth at which each curve changes; NaN where it does not."""
        split, gain = self.fit(curves)
        return self.borders[split].masked_fill(gain.isnan(), torch.nan)

    def drawn(self, resamples: int, seed: int) -> Float[Tensor, " resamples"]:
        """The depths at which the means of items (or groups) drawn anew change."""
        options: dict[str, Any] = {"groups": self.groups, "resamples": resamples, "seed": seed}
        return self.changes(statistics.drawn_means(self.curves, **options))

    def by_chance(self, resamples: int, generator: torch.Generator) -> Float[Tensor, " resamples"]:
        """Depths drawn evenly from all at which a curve may be cut."""
        drawn = torch.randint(len(self.borders), (resamples,), generator=generator)
        return self.borders[drawn]

    def permuted(self, resamples: int, generator: torch.Generator) -> Float[Tensor, " resamples"]:
        """The depths at which the mean changes with its steps in random order."""
        orders = _orders(resamples, self.curves.shape[1], generator)
        return self.changes(self.mean[0][orders])


def _orders(count: int, n_steps: int, generator: torch.Generator) -> Int[Tensor, "count n_steps"]:
    return torch.rand(count, n_steps, generator=generator).argsort(1)
