"""What a subspace is good for: enough, needed, steering, and the same for other groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from audio_lens.analysis.fusion.recovery import metrics_of_part
from audio_lens.analysis.subspaces.bases import basis as basis_of
from audio_lens.analysis.subspaces.bases import differences
from audio_lens.analysis.subspaces.curve import (
    check_controls,
    curve,
    places_of_part,
)
from audio_lens.analysis.subspaces.dormant import dormant
from audio_lens.analysis.subspaces.drawn import random_like
from audio_lens.analysis.subspaces.exchange import Exchange, Spot, check_width
from audio_lens.analysis.subspaces.subspace import Subspace, subspace_of
from audio_lens.arguments import whole
from audio_lens.errors import InputError
from audio_lens.items import Items, Pairs, found, measured, method
from audio_lens.items.collect import Place
from audio_lens.items.measuring import Cell
from audio_lens.items.pairs import PairBatch
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result
from audio_lens.running import evaluating

SUFFICIENCY, NECESSITY = "sufficiency", "necessity"
TESTS = (SUFFICIENCY, "complement", NECESSITY, "others_needed")
RANDOM, WHOLE = "random_direction", "whole_site"
CONTROLS = (RANDOM, WHOLE)


@method("subspaces.effects")
def effects(
    model: HookedAudioTransformer,
    pairs: Pairs[Items],
    site: str,
    where: Place,
    basis: Any,
    *,
    layer: int | None = None,
    metric: Any = None,
    controls: Sequence[str] = CONTROLS,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Whether a subspace is enough for the answer, and whether it is needed.

    - "sufficiency": the corrupted run takes the subspace's part from the clean one; how much of the
      gap between both comes back.
    - "complement": it takes all but that part.
    - "necessity": the clean run takes the subspace's part from the corrupted one; how much of the
      gap is lost. In logit differences that is directionality, too: 1 says that the answer moves
      all the way to the corrupted one's, about a half that the right one is merely destroyed.
    - "others_needed": it takes all but that part.

    Args:
        model, pairs, site, where, layer, metric, by, size, seed, progress: as in `curve`.
        basis: the subspace, or vectors ``d k`` that span one.
        controls: of "random_direction" (a random subspace of the same rank) and "whole_site".

    Returns:
        Shares of the gap by metric, item and "test": the ratio of means, with its interval.

    Raises:
        SiteError, InputError, ItemError: as `curve`.
    """
    subspace = subspace_of(basis)
    check_controls(controls, CONTROLS)
    spot = Spot.of(model, pairs.clean, site, where, layer, subspace)
    with evaluating(model):
        kept, _ = pairs.kept(model, size)
        spot = Spot.of(model, kept.clean, site, places_of_part(where, pairs, kept), spot.layer)
        asked = {"": subspace, RANDOM: random_like(subspace, seed), WHOLE: None}
        named = {n: one for n, one in asked.items() if not n or n in controls}
        told = measured(
            model,
            kept,
            lambda batch: _runs(spot, batch, list(named.values())),
            metrics_of_part(metric, pairs, kept),
            size=size,
            what="subspace",
            progress=progress,
        )
    clean, corrupted, runs = told.values[..., 0], told.values[..., 1], told.values[..., 2:]
    n_back = len(runs[0, 0]) // 2
    moved = torch.cat(
        [runs[..., :n_back] - corrupted[..., None], clean[..., None] - runs[..., n_back:]], -1
    )
    both_ways = moved.unflatten(-1, (2, len(named), 2))  # ways, subspaces, inside or outside
    results = {
        name: found(
            both_ways[:, :, :, number].flatten(-2),
            {"metric": told.metrics, "test": list(TESTS)},
            list(kept.clean),
            denominators=clean - corrupted,
            by=by,
            seed=seed,
            dropped=kept.dropped.counts,
        )
        for number, name in enumerate(named)
    }
    result = results.pop("")
    result.controls = results
    result.meta |= {"title": f"{subspace.rank} directions of {spot}", "value": "share of the gap"}
    result.report = [_said(result, one, subspace.rank) for one in told.metrics]
    if WHOLE in controls:
        result.report += [text for one in told.metrics for text in _warned(result, one)]
    result.report.append(f"{len(kept)} pairs are kept, {kept.dropped.total} left out")
    return result


def _runs(spot: Spot, batch: PairBatch, subspaces: Sequence[Subspace | None]) -> Iterator[Cell]:
    """Both unedited runs; then the corrupted one that takes from the clean, and the other way."""
    clean, corrupted = batch.pair.clean, batch.pair.corrupted
    states = spot.run(clean)[1], spot.run(corrupted)[1]
    back = Exchange(spot, states[1], states[0], batch.rows)
    forth = Exchange(spot, states[0], states[1], batch.rows)
    yield clean, []
    yield corrupted, []
    for inputs, exchange in ((corrupted, back), (clean, forth)):
        for subspace in subspaces:
            if subspace is None:
                yield inputs, exchange.whole()
                yield inputs, []
            else:
                check_width(subspace, states[0], spot)
                yield inputs, exchange.inside(subspace)
                yield inputs, exchange.outside(subspace)


def _said(result: Result, metric: str, rank: int) -> str:
    one = result.select(metric=metric).mean()
    shares = {test: float(one.select(test=test).values) for test in TESTS}
    return (
        f"{metric}: {rank} directions bring {shares['sufficiency']:.2f} of the gap back, all "
        f"others {shares['complement']:.2f}; without them {shares['necessity']:.2f} is lost, "
        f"without the others {shares['others_needed']:.2f}"
    )


def _warned(result: Result, metric: str) -> Iterator[str]:
    for test in (SUFFICIENCY, NECESSITY):
        one = result.select(metric=metric, test=test)
        yield from dormant(one, one.controls[WHOLE], f"{metric}, {test}")


@method(
    "subspaces.transfer",
    whole="it fits on the pairs of each value of a label: make a study of subspaces.effects",
)
def transfer(
    model: HookedAudioTransformer,
    pairs: Pairs[Items],
    site: str,
    where: Place,
    *,
    layer: int | None = None,
    rank: int = 16,
    between: str = "group",
    metric: Any = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Whether directions fitted on one speaker (or noise, or room) hold for the others.

    For every value of a label a subspace of differences is fitted on its pairs and tested on those
    of each value. On its own value it is tested on what it was fitted on: read the others.

    Args:
        model, pairs, site, where, layer, metric, size, seed, progress: as in `curve`.
        rank: how many directions.
        between: the label, such as "group", "room" or "noise".

    Returns:
        Recoveries by metric, item, "fitted" (on which value) and "tested": NaN beside the value of
        the item. The control "random_direction" has random subspaces of the same rank.

    Raises:
        SiteError, InputError, ItemError: as `curve`; and for pairs of one value only.
    """
    whole("rank", rank, least=1)
    spot = Spot.of(model, pairs.clean, site, where, layer)
    kept, _ = pairs.kept(model, size)
    place = places_of_part(where, pairs, kept)
    of = [item.value(between) for item in kept.clean]
    names = list(dict.fromkeys(of))
    if len(names) < 2 or None in names:
        raise InputError(f"transfer is between two values of {between!r} or more, got {names}")
    wanted = metrics_of_part(metric, pairs, kept)
    rows = {name: [row for row, one in enumerate(of) if one == name] for name in names}
    fitted = {}
    for name in names:
        at = places_of_part(place, kept, kept[rows[name]])
        news = differences(model, kept[rows[name]], site, at, layer=spot.layer, progress=progress)
        fitted[name] = basis_of(news, site=site, layer=spot.layer, rank=rank)
    parts: dict[Any, Any] = {}
    for name in names:
        for tested in names:
            part = kept[rows[tested]]
            parts[name, tested] = curve(
                model,
                part,
                site,
                places_of_part(place, kept, part),
                fitted[name],
                [rank],
                layer=spot.layer,
                metric=metrics_of_part(wanted, kept, part),
                controls=(RANDOM,),
                size=size,
                seed=seed,
                progress=progress,
            )
    result = _table(kept, names, rows, parts, None, seed)
    result.controls = {RANDOM: _table(kept, names, rows, parts, RANDOM, seed)}
    result.meta |= {"title": f"{rank} directions of {spot}", "value": "recovery"}
    for one in result.coords["metric"]:
        least = _elsewhere(result, one, names)
        most = _elsewhere(result.controls[RANDOM], one, names, most=True)
        result.report.append(
            f"{one}: fitted on others, {rank} directions bring {least:.2f} at least, random ones "
            f"{most:.2f} at most"
        )
    return result


def _table(
    kept: Pairs[Items],
    names: Sequence[Any],
    rows: dict[Any, list[int]],
    parts: dict[Any, Result],
    control: str | None,
    seed: int,
) -> Result:
    """All parts as one result, whose cells are each of the items of one value."""
    metrics = parts[names[0], names[0]].coords["metric"]
    values = torch.full((len(kept), len(metrics), len(names), len(names)), torch.nan).double()
    together = torch.full((3, len(metrics), len(names), len(names)), torch.nan).double()
    for (name, tested), part in parts.items():
        one = (part if control is None else part.controls[control]).select(
            rank=part.coords["rank"][0]
        )
        at = names.index(name), names.index(tested)
        values[rows[tested], :, at[0], at[1]] = one.values.mT
        held = (one.estimate, one.low, one.high)
        for number, x in enumerate(held):
            if x is not None:
                together[number, :, at[0], at[1]] = x
    axes = {"metric": metrics, "fitted": list(names), "tested": list(names)}
    result = found(values, axes, list(kept.clean), seed=seed, dropped=kept.dropped.counts)
    result.estimate, result.low, result.high = together
    return result


def _elsewhere(result: Result, metric: str, names: Sequence[Any], most: bool = False) -> float:
    """The least (or most) recovery of values that nothing was fitted on."""
    table = result.select(metric=metric).mean().values
    apart = table[~torch.eye(len(names), dtype=torch.bool)]
    return float(apart.max() if most else apart.min())
