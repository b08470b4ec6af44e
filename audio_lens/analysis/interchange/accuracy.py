"""Interchange intervention accuracy, and alignment search held against its controls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.interchange.das import das
from audio_lens.analysis.interchange.sources import (
    CHANGED,
    KINDS,
    UNCHANGED,
    Sources,
    likeliest,
    mapped,
    shuffled,
)
from audio_lens.analysis.subspaces.curve import (
    check_controls,
    places_of_part,
    random_like,
    two_parts,
)
from audio_lens.analysis.subspaces.exchange import Exchange, Spot, check_width
from audio_lens.analysis.subspaces.subspace import Subspace, subspace_of
from audio_lens.edits import Edit
from audio_lens.errors import InputError
from audio_lens.items import Items, Pairs, found, measured, method
from audio_lens.items.collect import Place
from audio_lens.items.measuring import Cell
from audio_lens.items.pairs import PairBatch
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result
from audio_lens.running import evaluating
from audio_lens.sites import Site

RANDOM, WHOLE, SHUFFLED = "random_direction", "whole_site", "permuted_labels"
CONTROLS, ALIGNED = (RANDOM, WHOLE), (RANDOM, WHOLE, SHUFFLED)
DORMANT = 0.1  # of accuracy beyond that of the whole site, from which on it is warned


@method("interchange.iia")
def iia(
    model: HookedAudioTransformer,
    pairs: Pairs[Items],
    site: str,
    where: Place = "all",
    basis: Subspace | Float[Tensor, "d k"] | None = None,
    *,
    layer: int | None = None,
    controls: Sequence[str] = CONTROLS,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How often a run that takes from another one answers as that one does (2301.04709).

    Every clean run takes what lies in a subspace (or all, at a place) from a run with another
    answer, "changed", and from one with the same answer, "unchanged". What does nothing has 0 of
    the changed and 1 of the unchanged; what destroys has less of both.

    Args:
        model: the model.
        pairs: kept are those that are answered rightly on the clean side, and not on the corrupted.
            Both sides lend, the corrupted if it answers its item's ``against``; to runs of the same
            layout and batch.
        site: ``part.activation``.
        where: a place, or a function of the item.
        basis: the subspace, or vectors that span one; None takes all.
        layer: the block; None takes that of the subspace, or all in turn.
        controls: of "random_direction" (a random subspace of the same rank) and "whole_site",
            beside a subspace.
        by: a label whose values are drawn in place of items for the intervals, such as "group".
        size: of the batches.
        seed: of who lends to whom, the random subspace and the intervals.
        progress: as in `patching.sweep`.

    Returns:
        1 where the run answers as it should and 0 elsewhere, by item, "layer" (where several) and
        "pairs"; NaN where nobody could lend.

    Raises:
        SiteError: a site or block that the model does not have.
        InputError: a basis of another width, or an unknown control.
        ItemError: answers that are not one token each, or no pair that is left.
    """
    check_controls(controls, CONTROLS)
    subspace = None if basis is None else subspace_of(basis)
    layers = _layers(model, site, layer, subspace)
    for one in layers:
        Spot.of(model, pairs.clean, site, where, one)
    with evaluating(model):
        kept, _ = pairs.kept(model, size)
        place = places_of_part(where, pairs, kept)
        spots = [Spot.of(model, kept.clean, site, place, one) for one in layers]
        named: dict[str, list[Subspace | None]] = {"": [subspace]}
        if subspace is not None:
            drawn = {RANDOM: random_like(subspace, seed), WHOLE: None}
            named |= {name: [drawn[name]] for name in CONTROLS if name in controls}
        values = exchanged(kept, spots, named, None, size, seed, progress)
    axes: dict[str, Sequence[Any]] = {} if len(layers) == 1 else {"layer": layers}
    results = {
        name: _told(x[:, :, 0].squeeze(1) if len(layers) == 1 else x[:, :, 0], axes, kept, by, seed)
        for name, x in values.items()
    }
    result = results.pop("")
    result.controls = results
    what = "all" if subspace is None else f"{subspace.rank} directions"
    result.meta |= {"title": f"{what} of {site} exchanged", "value": "accuracy"}
    result.report = [_said(result, what), *_dormant(result), *_notes(kept)]
    return result


@method("interchange.align")
def align(
    model: HookedAudioTransformer,
    pairs: Pairs[Items],
    site: str,
    where: Place = "all",
    *,
    layer: int | None = None,
    ranks: Sequence[int] = (1, 8),
    steps: int = 120,
    share: float = 0.5,
    controls: Sequence[str] = ALIGNED,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Which few directions carry the answer: learned on some speakers, tested on the others.

    `das` learns on one part of the pairs, of groups of its own; the accuracies are of the other.

    Args:
        model: the model.
        pairs: as in `das`; split by their groups, or where there is one only by items.
        site, where, layer: as in `das`.
        ranks: numbers of directions, each learned for itself.
        steps: of learning.
        share: of the pairs that are learned from.
        controls: of "random_direction", "whole_site" and "permuted_labels": as many directions,
            learned for a mapping in which every answer stands for another one. What can be learned
            for that says nothing about the model.
        by, size, progress: as in `iia`.
        seed: of all that is drawn.

    Returns:
        Accuracies by item, "rank" and "pairs", of the pairs that were not learned from.

    Raises:
        SiteError, InputError, ItemError, ControlError: as `das`, and for pairs that cannot be
            split.
    """
    check_controls(controls, ALIGNED)
    if not ranks:
        raise InputError("ranks are numbers of directions, and there are none")
    spot = Spot.of(model, pairs.clean, site, where, layer)
    kept, _ = pairs.kept(model, size)
    place = places_of_part(where, pairs, kept)
    train, test = two_parts(kept, share, seed)

    def learned(mapping: Mapping[str, str] | None) -> list[Subspace | None]:
        options: dict[str, Any] = {"layer": spot.layer, "steps": steps, "mapping": mapping}
        options |= {"size": size, "seed": seed, "progress": progress}
        at = places_of_part(place, kept, train)
        return [das(model, train, site, at, rank=rank, **options) for rank in ranks]

    named = {"": learned(None)}
    if RANDOM in controls:
        named[RANDOM] = [random_like(one, seed + n) for n, one in enumerate(named[""]) if one]
    if WHOLE in controls:
        named[WHOLE] = [None]
    with evaluating(model):
        spots = [Spot.of(model, test.clean, site, places_of_part(place, kept, test), spot.layer)]
        values = exchanged(test, spots, named, None, size, seed, progress)
        wrong: list[Subspace | None] = []
        if SHUFFLED in controls:
            mapping = shuffled(kept, seed)
            wrong = learned(mapping)
            values |= exchanged(test, spots, {SHUFFLED: wrong}, mapping, size, seed, progress)
    results = {
        name: _told(x[:, 0, 0], {}, test, by, seed)
        if name == WHOLE
        else _told(x[:, 0], {"rank": list(ranks)}, test, by, seed)
        for name, x in values.items()
    }
    result = results.pop("")
    result.controls = results
    result.meta |= {"title": f"directions of {spot} exchanged", "value": "accuracy"}
    result.report = [
        _said(result.select(rank=rank), f"{rank} directions") for rank in ranks
    ] + _losses(ranks, named[""], wrong)
    result.report += [*_dormant(result), f"learned on {len(train)} other pairs", *_notes(test)]
    return result


def exchanged(
    pairs: Pairs[Items],
    spots: Sequence[Spot],
    named: Mapping[str, Sequence[Subspace | None]],
    mapping: Mapping[str, str] | None,
    size: int,
    seed: int,
    progress: bool | None,
) -> dict[str, Float[Tensor, "n spots subspaces pairs"]]:
    """Whether each pair answers as it should, for every spot and subspace and either kind of pairs.

    Args:
        mapping: what each answer stands for; None for itself.
    """
    runs = _Runs(pairs, spots, named, mapping, seed)
    told = measured(
        spots[0].model,
        pairs,
        runs,
        {"said": likeliest()},
        size=size,
        what="interchange",
        progress=progress,
    )
    counts = [len(some) for some in named.values()]
    said = told.values[:, 0].unflatten(-1, (len(KINDS), len(spots), sum(counts)))
    is_right = (said == runs.wanted[:, :, None, None]).double()
    is_right = is_right.masked_fill(runs.wanted.isnan()[:, :, None, None], torch.nan)
    parts = is_right.permute(0, 2, 3, 1).split(counts, dim=2)
    return dict(zip(named, parts, strict=True))


class _Runs:
    """The exchanges of a batch.

    Attributes:
        wanted: of every pair the token that should follow, of either kind; NaN where nobody lends.
    """

    def __init__(
        self,
        pairs: Pairs[Items],
        spots: Sequence[Spot],
        named: Mapping[str, Sequence[Subspace | None]],
        mapping: Mapping[str, str] | None,
        seed: int,
    ):
        self.pairs, self.spots, self.mapping = pairs, spots, mapping
        self.subspaces = [one for some in named.values() for one in some]
        self.draw = np.random.default_rng(seed)
        self.wanted = torch.full((len(pairs), len(KINDS)), torch.nan, dtype=torch.float64)

    def __call__(self, batch: PairBatch) -> Iterator[Cell]:
        clean, count = batch.pair.clean, len(batch)
        sources = Sources.of(self.spots, self.pairs, batch)
        for kind_number, kind in enumerate(KINDS):
            lenders = sources.drawn(count, kind, self.draw)
            for row, lender in zip(batch.rows, lenders, strict=True):
                answer = None if lender is None else mapped(sources.answers[lender], self.mapping)
                if answer is not None:
                    token = self.spots[0].model.to_single_token(answer)
                    self.wanted[row, kind_number] = float(token)
            chosen = [row if one is None else one for row, one in enumerate(lenders)]
            for spot, states in zip(self.spots, sources.states, strict=True):
                exchange = Exchange(spot, states[:count], states[chosen], batch.rows)
                for subspace in self.subspaces:
                    yield clean, self._edits(exchange, subspace)

    @staticmethod
    def _edits(exchange: Exchange, subspace: Subspace | None) -> list[Edit]:
        if subspace is None:
            return exchange.whole()
        check_width(subspace, exchange.own, exchange.spot)
        return exchange.inside(subspace)


def _layers(
    model: HookedAudioTransformer, site: str, layer: int | None, subspace: Subspace | None
) -> list[int | None]:
    parsed = Site.parse(site, model)
    if layer is None and subspace is not None and subspace.site == str(parsed):
        layer = subspace.layer
    if layer is not None or parsed.n_layers is None:
        return [layer]
    return list(range(parsed.n_layers))


def _told(
    values: Tensor,
    axes: Mapping[str, Sequence[Any]],
    pairs: Pairs[Items],
    by: str | None,
    seed: int,
) -> Result:
    return found(
        values,
        {**axes, "pairs": list(KINDS)},
        list(pairs.clean),
        by=by,
        seed=seed,
        dropped=pairs.dropped.counts,
    )


def _said(result: Result, what: str) -> str:
    """The accuracies, in words."""
    one = result.mean()
    if "layer" in one.dims:
        curve = one.select(pairs=CHANGED).values.tolist()
        return f"{what} exchanged: the answer follows in " + ", ".join(
            f"{share:.2f} at {layer}"
            for layer, share in zip(one.coords["layer"], curve, strict=True)
        )
    changed, unchanged = (float(one.select(pairs=kind).values) for kind in (CHANGED, UNCHANGED))
    told = f"{what} exchanged: the answer follows in {changed:.2f} of the changed pairs"
    told += f", stays in {unchanged:.2f} of the unchanged"
    beside = [
        f"{words} {float(one.controls[name].select(pairs=CHANGED).values):.2f}"
        for name, words in (
            (RANDOM, "random ones"),
            (WHOLE, "the whole site"),
            (SHUFFLED, "a shuffled mapping"),
        )
        if name in one.controls
    ]
    return told + (f" (changed: {', '.join(beside)})" if beside else "")


def _losses(
    ranks: Sequence[int], true: Sequence[Subspace | None], wrong: Sequence[Subspace | None]
) -> list[str]:
    return [
        f"{rank} directions: a loss of {b.meta['loss']} for a shuffled mapping, of "
        f"{a.meta['loss']} for the true one"
        for rank, a, b in zip(ranks, true, wrong, strict=False)
        if a is not None and b is not None
    ]


def _dormant(result: Result) -> list[str]:
    """A warning where a subspace does more than all there is."""
    if WHOLE not in result.controls:
        return []
    changed = result.mean().select(pairs=CHANGED)
    more = changed.values - changed.controls[WHOLE].values
    if not bool((more.nan_to_num(nan=0) > DORMANT).any()):
        return []
    return [
        "the subspace does more than the whole site: it may work through a pathway that the model "
        "itself does not use"
    ]


def _notes(pairs: Pairs[Items]) -> list[str]:
    return [
        f"{len(pairs)} pairs are tested, {pairs.dropped.total} left out ({pairs.dropped})",
        "that an exchange works says what these directions can do, not that nothing else does it",
    ]
