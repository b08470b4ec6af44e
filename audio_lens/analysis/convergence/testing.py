"""The test: do the change points of measures lie nearer to each other than by chance?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.convergence.measure import Measure
from audio_lens.arguments import number, whole
from audio_lens.errors import InputError
from audio_lens.items import statistics
from audio_lens.items.statistics import LEVEL, RESAMPLES
from audio_lens.results import Result

UNIFORM, PERMUTED = "uniform", "permuted"
APART, SHIFT = "apart", "shift"
HALF = 0.5  # the depth that is claimed for several models
ALPHA = 0.05
CANNOT = (
    "Change points that lie together say nothing of a common cause: blocks may do several things "
    "at once. A curve that rises slowly has a change point too: see its gain and its interval."
)


def change_points(
    measures: Sequence[Measure],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Result:
    """At which depth each measure changes, with an interval over items.

    Metrics by "measure": "depth", the share of the part's blocks that has run where two pieces fit
    the mean curve best; "gain", what of the curve they explain beyond one piece; "p", how often
    the same values in random order are explained as well; "from_half", how far the depth lies
    from 0.5.

    Args:
        measures: one or more, of different names.
        level: of the intervals.
        resamples: how often items are drawn anew.
        seed: of what is drawn.

    Raises:
        InputError: no measures, or two of one name.
    """
    return _Test.of(measures, level, resamples, seed).change_points()


def agreement(
    measures: Sequence[Measure],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Result:
    """How far the change points of every two measures of one part lie apart, against chance.

    Metrics by "measure" and "other": "apart", the distance of their depths, and "shift", the depth
    of the one minus that of the other, both with intervals: measures of the same items are drawn
    anew together. Of measures of different parts both are NaN. Controls: "uniform", change points
    drawn evenly and independently from all that there can be, and "permuted", those of the same
    curves with their layers in random order.

    The statistic of a part is the mean distance of its pairs. ``meta`` tells of each part its
    verdict and the p of both controls: "together" where both are 0.05 or less and no interval of
    a shift leaves 0 out, "near" where one does, "apart" where one does and p is larger, else
    "open". Of few layers no p can be small: ``least_p`` is what perfect agreement would have.

    Args:
        measures: two or more of one part at least.
        level, resamples, seed: as in `change_points`.

    Raises:
        InputError: no two measures of one part, or two of one name.
    """
    test = _Test.of(measures, level, resamples, seed)
    if not test.parts:
        raise InputError(
            "no two measures are of one part: there is "
            + ", ".join(f"{one.name} ({one.part})" for one in measures)
        )
    return test.agreement()


@dataclass(frozen=True)
class _Test:
    """Measures, and how they are drawn anew."""

    measures: list[Measure]
    level: float
    resamples: int
    seed: int

    @staticmethod
    def of(measures: Sequence[Measure], level: float, resamples: int, seed: int) -> _Test:
        held = list(measures)
        if not held or not all(isinstance(one, Measure) for one in held):
            raise InputError(f"measures are a list of convergence.Measure, got {measures!r}")
        names = [one.name for one in held]
        if len(set(names)) < len(names):
            raise InputError(f"measures have names of their own, got {', '.join(names)}")
        number("level", level, above=0, most=0.999)
        return _Test(held, level, whole("resamples", resamples, least=1), seed)

    @property
    def names(self) -> list[str]:
        return [one.name for one in self.measures]

    @cached_property
    def parts(self) -> dict[str, list[int]]:
        """The measures of every part that has several."""
        by_part: dict[str, list[int]] = {}
        for row, one in enumerate(self.measures):
            by_part.setdefault(one.part, []).append(row)
        return {part: rows for part, rows in by_part.items() if len(rows) > 1}

    @cached_property
    def depths(self) -> Float[Tensor, " measures"]:
        return torch.cat([one.changes(one.mean) for one in self.measures])

    @cached_property
    def drawn(self) -> Float[Tensor, "resamples measures"]:
        """Depths of items drawn anew: the same items for all measures that are of the same."""
        sets: dict[tuple, int] = {}
        seeds = [self.seed + sets.setdefault(tuple(one.names), len(sets)) for one in self.measures]
        each = zip(self.measures, seeds, strict=True)
        return torch.stack([one.drawn(self.resamples, seed) for one, seed in each], dim=1)

    @cached_property
    def nulls(self) -> dict[str, Float[Tensor, "resamples measures"]]:
        """Depths by chance, of both kinds."""
        generator = torch.Generator().manual_seed(self.seed)
        kinds = {UNIFORM: Measure.by_chance, PERMUTED: Measure.permuted}
        return {
            name: torch.stack(
                [draw(one, self.resamples, generator) for one in self.measures], dim=1
            )
            for name, draw in kinds.items()
        }

    @cached_property
    def told(self) -> dict[str, str]:
        units = "groups" if any(one.groups for one in self.measures) else "items"
        return {
            "interval": f"{self.level:.0%}, by {self.resamples} draws of {units}",
            "seed": str(self.seed),
        }

    def bounds(self, drawn: Float[Tensor, " resamples *cells"]) -> tuple[Tensor, Tensor]:
        """The interval of every cell; draws that have none are left out."""
        ends = torch.tensor([(1 - self.level) / 2, (1 + self.level) / 2]).double()
        low, high = drawn.nanquantile(ends, dim=0)
        return low, high

    # ---------------------------------------------------------------- each measure

    def change_points(self) -> Result:
        points = [
            statistics.changepoint(
                one.curves,
                pieces=one.pieces,
                groups=one.groups,
                resamples=self.resamples,
                seed=self.seed,
            )
            for one in self.measures
        ]
        depths, drawn = self.depths, self.drawn
        alone = torch.tensor([_units(one) < 2 for one in self.measures])
        low, high = (x.masked_fill(alone, torch.nan) for x in self.bounds(drawn))
        near, far = self.bounds((drawn - HALF).abs())
        near, far = (x.masked_fill(alone, torch.nan) for x in (near, far))
        gain, p = (torch.tensor([getattr(x, name) for x in points]) for name in ("gain", "p"))
        nothing = torch.full_like(depths, torch.nan)
        rows = {
            "depth": (depths, low, high),
            "gain": (gain.double(), nothing, nothing),
            "p": (p.double(), nothing, nothing),
            "from_half": ((depths - HALF).abs(), near, far),
        }
        values, low, high = (torch.stack(column) for column in zip(*rows.values(), strict=True))
        return Result(
            values,
            ("metric", "measure"),
            {"metric": list(rows), "measure": self.names},
            low=low,
            high=high,
            n_kept=max(len(one.curves) for one in self.measures),
            meta=self.told | {"title": "where measures change", "value": "value"},
            report=[*map(self._told_of, range(len(self.measures))), CANNOT],
        )

    def _told_of(self, row: int) -> str:
        one, depth = self.measures[row], float(self.depths[row])
        left = f", {one.n_dropped} items left out" if one.n_dropped else ""
        if depth != depth:
            return f"{one.name} ({one.part}) does not change at any depth{left}."
        low, high = (float(x[row]) for x in self.bounds(self.drawn))
        return (
            f"{one.name} ({one.part}, {one.pieces} over {len(one.depths)} depths{left}): changes "
            f"at {depth:.2f} [{low:.2f}, {high:.2f}]."
        )

    # ---------------------------------------------------------------- all of a part

    def agreement(self) -> Result:
        verdicts = {part: self._verdict(part) for part in self.parts}
        controls = {name: self._distances(null.mean(0), null) for name, null in self.nulls.items()}
        for name, null in self.nulls.items():  # of distances the mean, not the distance of means
            apart = (null[:, :, None] - null[:, None]).abs().nanmean(0)
            controls[name].values[0] = self._masked(apart)
        result = self._distances(self.depths, self.drawn)
        result.controls = controls
        result.n_kept = max(len(one.curves) for one in self.measures)
        result.meta = self.told | {
            "title": "how far change points lie apart",
            "value": "depth",
            **{
                f"{part} {key}": told for part, one in verdicts.items() for key, told in one.items()
            },
        }
        result.report = [
            *map(self._told_of, range(len(self.measures))),
            *(text for part in self.parts for text in self._said(part, verdicts[part])),
            "Depths of different parts lie on different axes: they are neither compared nor "
            "averaged.",
            CANNOT,
        ]
        return result

    def _distances(
        self, depths: Float[Tensor, " measures"], drawn: Float[Tensor, "resamples measures"]
    ) -> Result:
        shift, shifts = depths[:, None] - depths, drawn[:, :, None] - drawn[:, None]
        low, high = (
            torch.stack([self._masked(one), self._masked(other)])
            for one, other in zip(self.bounds(shifts.abs()), self.bounds(shifts), strict=True)
        )
        axes = {"metric": [APART, SHIFT], "measure": self.names, "other": self.names}
        values = torch.stack([self._masked(shift.abs()), self._masked(shift)])
        return Result(values, tuple(axes), dict(axes), low=low, high=high)

    def _masked(self, x: Float[Tensor, "m m"]) -> Float[Tensor, "m m"]:
        """NaN for a measure with itself, and with one of another part."""
        parts = [one.part for one in self.measures]
        same = torch.tensor([[a == b for b in parts] for a in parts]).fill_diagonal_(False)
        return x.masked_fill(~same, torch.nan)

    def _verdict(self, part: str) -> dict[str, str]:
        """What is said of a part, with the numbers that it is said by."""
        rows = self.parts[part]
        distance = _distance(self.depths[None, rows])[0]
        p = {name: _share(_distance(null[:, rows]), distance) for name, null in self.nulls.items()}
        least = _share(_distance(self.nulls[UNIFORM][:, rows]), torch.tensor(0.0).double())
        known = bool(distance.isfinite())
        together = known and max(p.values()) <= ALPHA
        shifted = bool(self._shifted(rows))
        verdict = (
            ("near" if shifted else "together") if together else "apart" if shifted else "open"
        )
        return {
            "verdict": verdict,
            "distance": f"{float(distance):.4g}",
            **{f"p_{name}": f"{one:.4g}" for name, one in p.items()},
            "least_p": f"{least:.4g}",
        }

    def _shifted(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Pairs whose interval of the shift leaves 0 out."""
        found = []
        for one, other in itertools.combinations(rows, 2):
            low, high = self.bounds(self.drawn[:, one] - self.drawn[:, other])
            if bool(low > 0) or bool(high < 0):
                found.append((one, other))
        return found

    def _said(self, part: str, told: dict[str, str]) -> Iterator[str]:
        rows = self.parts[part]
        yield (
            f"{part}: {len(rows)} measures lie {float(told['distance']):.3f} apart on average; "
            f"that is as near by chance with p = {told['p_uniform']} (uniform) and "
            f"{told['p_permuted']} (permuted layers). Verdict: {told['verdict']}."
        )
        if float(told["least_p"]) > ALPHA:
            yield (
                f"{part}: with so few layers perfect agreement would have p = {told['least_p']}: "
                "it cannot be told from chance, whatever the measures."
            )
        for one, other in self._shifted(rows):
            low, high = self.bounds(self.drawn[:, one] - self.drawn[:, other])
            yield (
                f"{self.names[one]} and {self.names[other]} differ: by "
                f"{float(self.depths[one] - self.depths[other]):+.2f} of the depth "
                f"[{float(low):+.2f}, {float(high):+.2f}]."
            )


def _distance(depths: Float[Tensor, "m measures"]) -> Float[Tensor, " m"]:
    """The mean distance of every two; NaN where one has no change point."""
    pairs = list(itertools.combinations(range(depths.shape[1]), 2))
    return torch.stack([(depths[:, a] - depths[:, b]).abs() for a, b in pairs], dim=1).mean(1)


def _share(null: Float[Tensor, " m"], distance: Float[Tensor, ""]) -> float:
    """How often chance is as near; 1 where nothing is known."""
    if not bool(distance.isfinite()):
        return 1.0
    as_near = int((null <= distance + 1e-12).sum())
    return (1 + as_near) / (1 + len(null))


def _units(measure: Measure) -> int:
    return len(set(measure.names if measure.groups is None else measure.groups))
