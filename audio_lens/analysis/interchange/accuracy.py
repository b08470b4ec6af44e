"""Interchange intervention accuracy: does a run answer as the one that it takes from?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.interchange.sources import KINDS, Sources, likeliest, mapped
from audio_lens.analysis.interchange.telling import RANDOM, WHOLE, notes, said, told, warned
from audio_lens.analysis.subspaces.curve import check_controls, places_of_part
from audio_lens.analysis.subspaces.drawn import random_like
from audio_lens.analysis.subspaces.exchange import Exchange, Spot, check_width
from audio_lens.analysis.subspaces.subspace import Subspace, subspace_of
from audio_lens.edits import Edit
from audio_lens.items import Items, Pairs, measured, method
from audio_lens.items.collect import Place
from audio_lens.items.measuring import Cell
from audio_lens.items.pairs import PairBatch
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result
from audio_lens.running import evaluating
from audio_lens.sites import Site

CONTROLS = (RANDOM, WHOLE)


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
        name: told(x[:, :, 0].squeeze(1) if len(layers) == 1 else x[:, :, 0], axes, kept, by, seed)
        for name, x in values.items()
    }
    result = results.pop("")
    result.controls = results
    what = "all" if subspace is None else f"{subspace.rank} directions"
    result.meta |= {"title": f"{what} of {site} exchanged", "value": "accuracy"}
    result.report = [said(result, what), *warned(result), *notes(kept)]
    return result


def exchanged(
    pairs: Pairs[Items],
    spots: Sequence[Spot],
    named: Mapping[str, Sequence[Subspace | None]],
    mapping: Mapping[str, str] | None,
    size: int,
    seed: int,
    progress: bool | None,
    asked: bool = True,
) -> dict[str, Float[Tensor, "n spots subspaces pairs"]]:
    """Whether each pair answers as it should, for every spot and subspace and either kind of pairs.

    Args:
        mapping: what each answer stands for; None for itself.
        asked: as in `Sources.of`.
    """
    runs = _Runs(pairs, spots, named, mapping, seed, asked)
    found = measured(
        spots[0].model,
        pairs,
        runs,
        {"said": likeliest()},
        size=size,
        what="interchange",
        progress=progress,
    )
    counts = [len(some) for some in named.values()]
    answers = found.values[:, 0].unflatten(-1, (len(KINDS), len(spots), sum(counts)))
    is_right = (answers == runs.wanted[:, :, None, None]).double()
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
        asked: bool,
    ):
        self.pairs, self.spots, self.mapping, self.asked = pairs, spots, mapping, asked
        self.subspaces = [one for some in named.values() for one in some]
        self.draw = np.random.default_rng(seed)
        self.wanted = torch.full((len(pairs), len(KINDS)), torch.nan, dtype=torch.float64)

    def __call__(self, batch: PairBatch) -> Iterator[Cell]:
        clean, count = batch.pair.clean, len(batch)
        sources = Sources.of(self.spots, self.pairs, batch, self.asked)
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
