"""What many items say together: means with intervals, ratios, change points, and controls.

Intervals are percentiles of a bootstrap over items, or over groups of them (speakers), which then
count as one each: items of one speaker are not independent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.errors import InputError
from audio_lens.items.controls import (
    CONTROLS,
    ControlError,
    destroyed,
    empty,
    full,
    identity,
    no_audio,
    norm_matched_noise,
    other_item,
    permuted_labels,
    random_direction,
    random_keys,
    random_sites,
)

__all__ = [
    "CONTROLS",
    "ChangePoint",
    "ControlError",
    "Estimate",
    "TwoPieces",
    "bootstrap",
    "changepoint",
    "destroyed",
    "drawn_means",
    "empty",
    "full",
    "identity",
    "no_audio",
    "norm_matched_noise",
    "other_item",
    "permuted_labels",
    "random_direction",
    "random_keys",
    "random_sites",
    "ratio_of_means",
]

LEVEL, RESAMPLES, SEED = 0.95, 2000, 0
_AT_ONCE = 2**23  # drawn numbers in memory; torch finds no quantiles of more than twice as many
Statistic = Callable[[Float[Tensor, " m *cells"]], Float[Tensor, "*cells"]]
Groups = Sequence[Hashable] | None


class Estimate(NamedTuple):
    """What items give together, and between which bounds it lies.

    Attributes:
        value: of every cell.
        low, high: ends of the interval; NaN where a single item (or group) has a value, which says
            nothing of others.
        level: how often such intervals hold the true value, about.
    """

    value: Float[Tensor, "*cells"]
    low: Float[Tensor, "*cells"]
    high: Float[Tensor, "*cells"]
    level: float

    @property
    def interval(self) -> Float[Tensor, " 2 *cells"]:
        """Both bounds."""
        return torch.stack([self.low, self.high])

    def __repr__(self) -> str:
        if self.value.ndim:
            return f"Estimate of {list(self.value.shape)} cells, intervals of {self.level:.0%}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap(
    values: Float[Tensor, " n *cells"],
    statistic: Statistic | None = None,
    *,
    groups: Groups = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """The mean of every cell over the items, with an interval.

    Args:
        values: of every item; an item is left out of cells where it is NaN.
        statistic: something else than the mean, of the items that were drawn; it sees NaN.
        groups: of every item; groups are drawn in place of items.
        level: of the interval.
        resamples: how often items are drawn anew.
        seed: of what is drawn.

    Raises:
        ValueError: no items, or not as many groups.
    """
    values = torch.as_tensor(values).double()
    draw = _Draws.of(len(values), groups, resamples, seed)
    if statistic is not None:
        drawn = torch.stack([statistic(values[index]) for index in draw.items()])
        return draw.estimate(statistic(values), drawn, level)
    return ratio_of_means(
        values, torch.ones_like(values), groups=groups, level=level, resamples=resamples, seed=seed
    )


def ratio_of_means(
    numerators: Float[Tensor, " n *cells"],
    denominators: Float[Tensor, " n *cells"],
    *,
    groups: Groups = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """Mean numerator by mean denominator of every cell: the stable form of a recovery.

    A mean of ratios would be ruled by the items whose denominator is near 0. Where the mean
    denominator of some draws has another sign than the whole, the ratio is not bounded: the
    interval is then infinite.

    Args:
        numerators, denominators: of every item; an item is left out of cells where either is NaN.
        groups, level, resamples, seed: as in `bootstrap`.

    Raises:
        ValueError: no items, unequal shapes, or not as many groups.
    """
    over, under = (torch.as_tensor(x).double() for x in (numerators, denominators))
    if over.shape != under.shape:
        raise InputError(f"{list(over.shape)} numerators by {list(under.shape)} denominators")
    draw = _Draws.of(len(over), groups, resamples, seed)
    lacking = over.isnan() | under.isnan()
    sums = [draw.summed(x.masked_fill(lacking, 0).reshape(len(over), -1)) for x in (over, under)]
    counts = draw.summed((~lacking).double().reshape(len(over), -1))
    whole = sums[0].sum(0) / sums[1].sum(0)
    low, high = torch.empty_like(whole), torch.empty_like(whole)
    step = max(1, _AT_ONCE // resamples)
    for start in range(0, whole.numel(), step):
        part = slice(start, start + step)
        above, below, held = (draw.weights @ x[:, part] for x in (*sums, counts))
        drawn = (above / below).masked_fill(held == 0, torch.nan)
        low[part], high[part] = _percentiles(drawn, level)
        unbounded = ((below * sums[1][:, part].sum(0).sign() <= 0) & (held > 0)).any(0)
        low[part] = low[part].masked_fill(unbounded, -torch.inf)
        high[part] = high[part].masked_fill(unbounded, torch.inf)
    alone = (counts > 0).sum(0) < 2
    low, high = (x.masked_fill(alone, torch.nan) for x in (low, high))
    return Estimate(*(x.reshape(over.shape[1:]) for x in (whole, low, high)), level)


# -------------------------------------------------------------------------------- change points


@dataclass(frozen=True)
class ChangePoint:
    """Where a curve changes.

    Attributes:
        at: the first coordinate behind the change; NaN for a curve that never changes.
        low, high: the interval of that, by the bootstrap.
        level: of the interval.
        gain: the share of what one piece leaves over that two pieces explain, 0 to 1.
        p: how often a curve of the same values in random order is explained as well; large where
            there is no change point.
    """

    at: float
    low: float
    high: float
    level: float
    gain: float
    p: float


Pieces = Literal["steps", "lines"]


def changepoint(
    curves: Float[Tensor, "n steps"],
    coords: Sequence[float | int] | None = None,
    *,
    pieces: str = "steps",
    groups: Groups = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> ChangePoint:
    """Where the mean of the items' curves changes: the best fit of two pieces.

    Args:
        curves: one for each item, without NaN.
        coords: of the steps, such as layers; None counts from 0.
        pieces: "steps" are two levels, "lines" two straight lines.
        groups, level, resamples, seed: as in `bootstrap`.

    Raises:
        ValueError: too few steps for two pieces, NaN, or other things that do not fit.
    """
    curves = torch.as_tensor(curves).double()
    if curves.ndim != 2 or curves.isnan().any():
        raise InputError("curves are items by steps, without NaN")
    n_steps = curves.shape[1]
    places = torch.as_tensor(list(range(n_steps)) if coords is None else list(coords)).double()
    if len(places) != n_steps:
        raise InputError(f"{n_steps} steps with {len(places)} coordinates make no two {pieces}")
    draw = _Draws.of(len(curves), groups, resamples, seed)
    fit = TwoPieces.of(places, pieces)
    mean = curves.mean(0)
    split, gain = fit(mean[None])
    if gain.isnan().any():
        return ChangePoint(*[float("nan")] * 3, level=level, gain=0.0, p=1.0)
    drawn, gains = fit(draw.means(curves))
    behind = places[fit.splits]
    low, high = _percentiles(behind[drawn[~gains.isnan()]][:, None], level)
    generator = np.random.default_rng(seed)
    shuffled = torch.stack(
        [mean[torch.as_tensor(generator.permutation(n_steps))] for _ in range(resamples)]
    )
    as_good = (fit(shuffled)[1] >= gain - 1e-12).sum().item()
    alone = draw.weights.shape[1] < 2
    return ChangePoint(
        at=behind[split[0]].item(),
        low=float("nan") if alone else low.item(),
        high=float("nan") if alone else high.item(),
        level=level,
        gain=gain.item(),
        p=(1 + as_good) / (1 + resamples),
    )


@dataclass(frozen=True)
class TwoPieces:
    """Two pieces that fit a curve best, and what one piece would leave over.

    Attributes:
        splits: the first step behind every place at which a curve may be cut.
        one: from a curve to what one piece leaves over.
        two: from a curve to what two pieces leave over, for every split.
    """

    splits: Int[Tensor, " splits"]
    one: Float[Tensor, "steps steps"]
    two: Float[Tensor, "splits steps steps"]

    @staticmethod
    def of(places: Float[Tensor, " steps"], pieces: str = "steps") -> TwoPieces:
        """Pieces of curves over steps that stand at these places.

        Raises:
            InputError: another kind of pieces, or too few steps for two.
        """
        if pieces not in get_args(Pieces):
            raise InputError(f"pieces are one of {', '.join(get_args(Pieces))}, got {pieces!r}")
        least, count = 1 if pieces == "steps" else 2, len(places)
        if count < 2 * least + 1:
            raise InputError(f"{count} steps make no two {pieces}")
        splits = torch.arange(least, count - least + 1)
        one = _leaves_over(places, [0, count], pieces)
        two = [_leaves_over(places, [0, at, count], pieces) for at in splits.tolist()]
        return TwoPieces(splits, one, torch.stack(two))

    def __call__(
        self, curves: Float[Tensor, "m steps"]
    ) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
        """Which split fits each curve best, and its gain; NaN where one piece leaves nothing."""
        left = (curves @ self.two).square().sum(-1)  # splits m
        best, whole = left.min(0), (curves @ self.one).square().sum(-1)
        nothing = whole <= 1e-18 * curves.square().sum(-1).clamp(min=1e-300)
        return best.indices, (1 - best.values / whole).masked_fill(nothing, torch.nan)


def drawn_means(
    values: Float[Tensor, " n *cells"],
    *,
    groups: Groups = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Float[Tensor, " resamples *cells"]:
    """Means of items (or groups) drawn anew, again and again: the same draws for the same seed.

    Raises:
        ValueError: no items, or not as many groups.
    """
    values = torch.as_tensor(values).double()
    draw = _Draws.of(len(values), groups, resamples, seed)
    return draw.means(values.reshape(len(values), -1)).reshape(-1, *values.shape[1:])


def _leaves_over(
    places: Float[Tensor, " steps"], bounds: Sequence[int], pieces: str
) -> Float[Tensor, "steps steps"]:
    """From a curve to what pieces between the bounds leave over of it."""
    columns = []
    for start, stop in itertools.pairwise(bounds):
        inside = torch.zeros_like(places)
        inside[start:stop] = 1
        columns += [inside] if pieces == "steps" else [inside, inside * places]
    design = torch.stack(columns, 1)
    return torch.eye(len(places)).double() - design @ torch.linalg.pinv(design)


# -------------------------------------------------------------------------------- drawing items


@dataclass(frozen=True)
class _Draws:
    """Items drawn anew, again and again, whole groups at a time.

    Attributes:
        members: one where an item is of a group.
        weights: how often each group was drawn.
    """

    members: Float[Tensor, "groups n"]
    weights: Float[Tensor, "resamples groups"]

    @staticmethod
    def of(count: int, groups: Groups, resamples: int, seed: int) -> _Draws:
        if count == 0:
            raise InputError("no items to draw from")
        named = list(range(count)) if groups is None else list(groups)
        if len(named) != count:
            raise InputError(f"{count} items need as many groups, got {len(named)}")
        if any(group is None for group in named):
            raise InputError("every item needs a group, and some have none")
        number = {group: i for i, group in enumerate(dict.fromkeys(named))}
        members = torch.zeros(len(number), count, dtype=torch.float64)
        members[[number[group] for group in named], list(range(count))] = 1
        even = np.full(len(number), 1 / len(number))
        drawn = np.random.default_rng(seed).multinomial(len(number), even, size=resamples)
        return _Draws(members, torch.as_tensor(drawn).double())

    @property
    def sizes(self) -> Float[Tensor, " groups"]:
        return self.members.sum(1)

    def summed(self, values: Float[Tensor, "n cells"]) -> Float[Tensor, "groups cells"]:
        """Sums over the items of each group."""
        return self.members @ values

    def means(self, values: Float[Tensor, "n cells"]) -> Float[Tensor, "resamples cells"]:
        """The mean over the items of each draw."""
        weights = self.weights / (self.weights @ self.sizes)[:, None]
        return weights @ self.summed(values)

    def items(self) -> list[Tensor]:
        """The numbers of the items of each draw."""
        own = [row.nonzero()[:, 0] for row in self.members]
        return [
            torch.cat([own[i].repeat(int(times)) for i, times in enumerate(counts) if times])
            for counts in self.weights
        ]

    def estimate(self, whole: Tensor, drawn: Tensor, level: float) -> Estimate:
        whole, drawn = whole.double(), drawn.double()
        low, high = _percentiles(drawn.reshape(len(drawn), -1), level)
        if len(self.members) < 2:
            low, high = torch.full_like(low, torch.nan), torch.full_like(high, torch.nan)
        return Estimate(whole, low.reshape(whole.shape), high.reshape(whole.shape), level)


def _percentiles(drawn: Float[Tensor, "resamples cells"], level: float) -> Float[Tensor, "2 cells"]:
    """The bounds that leave as many draws below as above; NaN draws are left out."""
    if not 0 < level < 1:
        raise InputError(f"level lies between 0 and 1, got {level}")
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=drawn.dtype)
    parts = drawn.split(max(1, _AT_ONCE // len(drawn)), dim=1)
    return torch.cat([part.nanquantile(ends, dim=0) for part in parts], dim=1)
