"""The saturation curve: how much of the answer comes back with ever more directions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.fusion.recovery import metrics_of_part
from audio_lens.analysis.subspaces.dormant import dormant
from audio_lens.analysis.subspaces.drawn import largest, random_like, random_within
from audio_lens.analysis.subspaces.exchange import Exchange, Spot, check_width
from audio_lens.analysis.subspaces.subspace import Subspace, subspace_of
from audio_lens.arguments import whole
from audio_lens.errors import InputError
from audio_lens.items import ItemError, Items, Pairs, found, measured, method
from audio_lens.items.collect import Place
from audio_lens.items.findings import destroyed_level
from audio_lens.items.measuring import Cell
from audio_lens.items.pairs import PairBatch
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result
from audio_lens.running import evaluating

INSIDE, COMPLEMENT, RANDOM, MATCHED = "inside", "complement", "random_direction", "energy_matched"
PRINCIPAL, OTHER = "random_principal", "other_contrast"
WHOLE, IDENTITY, DESTROYED = "whole_site", "identity", "destroyed"
CONTROLS = (COMPLEMENT, RANDOM, MATCHED, PRINCIPAL, WHOLE, IDENTITY, DESTROYED)
ALONG = (INSIDE, COMPLEMENT, RANDOM, MATCHED, PRINCIPAL, OTHER)  # one run for each rank
PLATEAU = 0.9  # of the largest recovery, from which on the curve is called flat


@method("subspaces.curve")
def curve(
    model: HookedAudioTransformer,
    pairs: Pairs[Items],
    site: str,
    where: Place,
    basis: Subspace | Float[Tensor, "d k"],
    ks: Sequence[int],
    *,
    layer: int | None = None,
    other: Subspace | Float[Tensor, "_ m"] | None = None,
    metric: Any = None,
    controls: Sequence[str] = CONTROLS,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How much of the clean answer the first k directions of a subspace bring back.

    In the run of the corrupted side, what lies in the first k directions is exchanged for what the
    clean run has there. Test on other items than the subspace was fitted on, best on other
    speakers: `Pairs.split` keeps groups apart.

    Args:
        model: the model.
        pairs: kept are those that are answered rightly on the clean side, and not on the corrupted.
        site: ``part.activation``, such as ``decoder.resid_pre`` or ``connector.out``.
        where: a place, or a function of the item (``lambda item: item.words[1]``).
        basis: the subspace, or vectors ``d k`` that span one, the first of them first.
        ks: numbers of directions.
        layer: the block; None takes that of the subspace, if it is of this site.
        other: a subspace of another contrast (who speaks, in place of what is said), whose first k
            directions run as the control "other_contrast": `differences` between other pairs, for
            one. Without it there is no such control.
        metric: as in `items.measured`.
        controls: of "complement" (all but the first k), "random_direction" (random subspaces of the
            same k), "energy_matched" (the same, and what they move is as long at every position),
            "random_principal" (random subspaces of the directions in which the clean runs vary
            most there: the fewest with 0.9 of the variance, or twice as many as ``ks`` asks for),
            "whole_site" (all there is), "identity" (the corrupted run's own part put back) and
            "destroyed".
        by: a label whose values are drawn in place of items for the intervals, such as "group".
        size: of the batches.
        seed: of the random subspaces and the intervals.
        progress: as in `patching.sweep`.

    Returns:
        Recoveries by metric, item and "rank": the ratio of means, with its interval. `elbow` reads
        off where it saturates, and the report says so.

    Raises:
        SiteError: a site or block that the model does not have, or a block that nobody names.
        InputError: a basis of another width, more directions than it (or ``other``) has, or an
            unknown control.
        ItemError: answers that are not one token each, or no pair that is left.
    """
    subspace = subspace_of(basis)
    ranks = ranks_within(ks, subspace)
    contrast = None if other is None else _other(other, ranks[-1])
    check_controls(controls, CONTROLS)
    spot = Spot.of(model, pairs.clean, site, where, layer, subspace)
    with evaluating(model):
        kept, _ = pairs.kept(model, size)
        spot = Spot.of(model, kept.clean, site, places_of_part(where, pairs, kept), spot.layer)
        wide = None
        if PRINCIPAL in controls:
            wide = largest(spot, kept.clean, ranks[-1], size, progress)
        asked = [*controls, *([OTHER] if contrast else [])]
        runs = _Runs(spot, [subspace.first(k) for k in ranks], asked, seed, wide, contrast)
        told = measured(
            model,
            kept,
            runs,
            metrics_of_part(metric, pairs, kept),
            size=size,
            what="subspace",
            progress=progress,
        )
    values = dict(zip(runs.names, told.values.split(runs.counts, dim=-1), strict=True))
    result = _Told(kept, told.metrics, ranks, values, by, seed).result(asked)
    result.meta |= {
        "title": f"{subspace.kind} subspace of {spot}",
        "value": "recovery",
        "elbow": ", ".join(f"{m} {_number(elbow(result, m))}" for m in told.metrics),
    }
    result.report += _said(result, kept)
    return result


def elbow(result: Result, metric: str | None = None, share: float = PLATEAU) -> int | None:
    """The fewest directions that bring 0.9 of what the curve reaches; None where it reaches none.

    Args:
        result: of `curve`.
        metric: which, where there are several; None takes the first.
        share: in place of 0.9.
    """
    named = metric or result.coords.get("metric", [None])[0]
    one = result if named is None else result.select(metric=named)
    reached = one.mean().values
    top = float(reached.nan_to_num(nan=-math.inf).max())
    if not top > 0:
        return None
    return int(one.coords["rank"][int((reached >= share * top).nonzero()[0])])


def ranks_within(ks: Sequence[int], subspace: Subspace) -> list[int]:
    """Numbers of directions that a subspace has, in order.

    Raises:
        InputError: none, one twice, or more than there are.
    """
    ranks = [whole("ks", k, least=1, most=subspace.rank) for k in ks]
    if not ranks or len(set(ranks)) < len(ranks):
        raise InputError(f"ks are numbers of directions, each once, got {list(ks)}")
    return sorted(ranks)


def _other(given: Subspace | Float[Tensor, "d m"], most: int) -> Subspace:
    """The subspace of another contrast.

    Raises:
        InputError: fewer directions than are compared.
    """
    other = subspace_of(given)
    if other.rank < most:
        raise InputError(
            f"other= is compared at as many directions: ks go up to {most}, and it has {other.rank}"
        )
    return other


def check_controls(asked: Sequence[str], known: Sequence[str]) -> None:
    """Raise for controls that are none.

    Raises:
        InputError: naming the first.
    """
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise InputError(f"no control {unknown[0]!r} here; there is {', '.join(known)}")


def places_of_part(where: Place, pairs: Pairs[Items], part: Pairs[Items]) -> Place:
    """The places of some pairs, where they are listed for all."""
    if not isinstance(where, list) or all(type(one) is int for one in where):
        return where
    number = {item.id: row for row, item in enumerate(pairs.clean)}
    return [where[number[item.id]] for item in part.clean]


def two_parts(pairs: Pairs[Items], share: float, seed: int) -> tuple[Pairs[Items], Pairs[Items]]:
    """Two parts that share no group; where all are of one, that share no item.

    Raises:
        ItemError: a single pair.
    """
    if len({item.group for item in pairs.clean}) > 1:
        return pairs.split("group", share, seed)
    if len(pairs) < 2:
        raise ItemError("one pair cannot be split in a part to fit on and one to test on")
    rows = np.random.default_rng(seed).permutation(len(pairs)).tolist()
    cut = min(max(1, round(share * len(rows))), len(rows) - 1)
    return pairs[sorted(rows[:cut])], pairs[sorted(rows[cut:])]


@dataclass
class _Runs:
    """The runs of a batch: both unedited, and those of every rank and control."""

    spot: Spot
    subspaces: Sequence[Subspace]
    controls: Sequence[str]
    seed: int
    largest: Float[Tensor, "d m"] | None
    other: Subspace | None

    @property
    def names(self) -> list[str]:
        """What the runs are of, in order."""
        along = [name for name in ALONG if name == INSIDE or name in self.controls]
        alone = [name for name in (WHOLE, IDENTITY) if name in self.controls]
        return ["clean", "corrupted", *along, *alone]

    @property
    def counts(self) -> list[int]:
        """How many runs each."""
        return [len(self.subspaces) if name in ALONG else 1 for name in self.names]

    def __call__(self, batch: PairBatch) -> Iterator[Cell]:
        clean, corrupted = batch.pair.clean, batch.pair.corrupted
        states = self.spot.run(corrupted)[1], self.spot.run(clean)[1]
        for one in (self.subspaces[0], *([self.other] if self.other else [])):
            check_width(one, states[0], self.spot)
        exchange = Exchange(self.spot, *states, batch.rows)
        edits = {
            "clean": [[]],
            "corrupted": [[]],
            INSIDE: map(exchange.inside, self.subspaces),
            COMPLEMENT: map(exchange.outside, self.subspaces),
            RANDOM: map(exchange.inside, self._drawn()),
            MATCHED: map(exchange.as_much, self._drawn(), self.subspaces),
            PRINCIPAL: map(exchange.inside, self._within()),
            OTHER: map(exchange.inside, self._others()),
            WHOLE: [exchange.whole()],
            IDENTITY: [exchange.nothing(self.subspaces[-1])],
        }
        for name in self.names:
            for edit in edits[name]:
                yield clean if name == "clean" else corrupted, edit

    def _drawn(self) -> list[Subspace]:
        """Random subspaces, of every rank its own."""
        return [random_like(one, self.seed + n) for n, one in enumerate(self.subspaces)]

    def _within(self) -> list[Subspace]:
        """The same where activations vary most; none, where that was not asked for."""
        if self.largest is None:
            return []
        ranks = [one.rank for one in self.subspaces]
        return [random_within(self.largest, k, self.seed + n) for n, k in enumerate(ranks)]

    def _others(self) -> list[Subspace]:
        """The first directions of another contrast, if there is one."""
        return [] if self.other is None else [self.other.first(one.rank) for one in self.subspaces]


@dataclass
class _Told:
    """The values of all runs as a `Result`."""

    pairs: Pairs[Items]
    metrics: list[str]
    ranks: list[int]
    values: Mapping[str, Float[Tensor, "n metrics runs"]]
    by: str | None
    seed: int

    def result(self, controls: Sequence[str]) -> Result:
        beside = {name: self._control(name) for name in (*CONTROLS, OTHER) if name in controls}
        return self._recovered(INSIDE, controls=beside, dropped=self.pairs.dropped.counts)

    def _control(self, name: str) -> Result:
        if name != DESTROYED:
            return self._recovered(name)
        clean, corrupted = (self.values[side][..., 0] for side in ("clean", "corrupted"))
        items = list(self.pairs.clean)
        return destroyed_level(self.metrics, clean, corrupted, items, by=self.by, seed=self.seed)

    def _recovered(self, name: str, **told: Any) -> Result:
        gained = self.values[name] - self.values["corrupted"]
        axes: dict[str, Sequence[Any]] = {"metric": self.metrics}
        if name in ALONG:
            axes["rank"] = self.ranks
        else:
            gained = gained[..., 0]
        return found(
            gained,
            axes,
            list(self.pairs.clean),
            denominators=(self.values["clean"] - self.values["corrupted"])[..., 0],
            by=self.by,
            seed=self.seed,
            **told,
        )


def _number(k: int | None) -> str:
    return "none" if k is None else str(k)


def _said(result: Result, pairs: Pairs[Items]) -> list[str]:
    """What was found in each metric, in words."""
    said = [_found(result, metric) for metric in result.coords["metric"]]
    warnings = [text for m in result.coords["metric"] for text in _warned(result, m)]
    return [
        *said,
        *warnings,
        f"{len(pairs)} pairs are kept, {pairs.dropped.total} left out ({pairs.dropped})",
        "recovery says that these directions suffice for this corruption, not that the model needs "
        "them: subspaces.effects asks for that",
    ]


def _found(result: Result, metric: str) -> str:
    one, k = result.select(metric=metric), elbow(result, metric)
    if k is None:
        return f"{metric}: no number of directions brings anything back"
    parts = [f"{metric}: {k} directions bring {_amount(one.select(rank=k))}"]
    parts += [
        f"{words} {_amount(one.select(rank=k).controls[name])}"
        for name, words in (
            (RANDOM, f"{k} random ones"),
            (PRINCIPAL, f"{k} of where most varies"),
            (OTHER, f"{k} of the other contrast"),
            (COMPLEMENT, "all others together"),
        )
        if name in one.controls
    ]
    return ", ".join(parts) + f" (the fewest that reach {PLATEAU:g} of what the curve does)"


def _warned(result: Result, metric: str) -> list[str]:
    one = result.select(metric=metric)
    return dormant(one, one.controls[WHOLE], metric) if WHOLE in one.controls else []


def _amount(cell: Result) -> str:
    value = cell.mean()
    if value.low is None or value.high is None or not bool(value.low.isfinite()):
        return f"{float(value.values):.3g}"
    return f"{float(value.values):.3g} [{float(value.low):.3g}, {float(value.high):.3g}]"
