"""Alignment search, held against its controls: learned on some speakers, tested on the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.interchange.accuracy import exchanged
from audio_lens.analysis.interchange.das import check_search, learned
from audio_lens.analysis.interchange.sources import shuffled
from audio_lens.analysis.interchange.telling import (
    RANDOM,
    SHUFFLED,
    UNTRAINED,
    WHOLE,
    notes,
    said,
    told,
    warned,
)
from audio_lens.analysis.probes.baselines import untrained
from audio_lens.analysis.subspaces.curve import check_controls, places_of_part, two_parts
from audio_lens.analysis.subspaces.drawn import random_like
from audio_lens.analysis.subspaces.exchange import Spot
from audio_lens.analysis.subspaces.subspace import Subspace
from audio_lens.errors import InputError
from audio_lens.items import Items, Pairs, method
from audio_lens.items.collect import Place
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result
from audio_lens.running import evaluating

CONTROLS = (RANDOM, WHOLE, SHUFFLED, UNTRAINED)


@method(
    "interchange.align",
    whole="it learns from one part of all pairs: make a study of interchange.iia",
)
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
    controls: Sequence[str] = CONTROLS,
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
        controls: of "random_direction", "whole_site", "permuted_labels" (as many directions,
            learned for a mapping in which every answer stands for another one) and "untrained" (as
            many, learned in a copy of the model whose weights stand in random order). What can be
            learned for these says nothing about what the model has learned.
        by, size, progress: as in `iia`.
        seed: of all that is drawn.

    Returns:
        Accuracies by item, "rank" and "pairs", of the pairs that were not learned from.

    Raises:
        SiteError, InputError, ItemError, ControlError: as `das`, and for pairs that cannot be
            split.
    """
    check_controls(controls, CONTROLS)
    if not ranks:
        raise InputError("ranks are numbers of directions, and there are none")
    for rank in ranks:
        check_search(pairs, rank, steps)
    spot = Spot.of(model, pairs.clean, site, where, layer)
    kept, _ = pairs.kept(model, size)
    train, test = two_parts(kept, share, seed)
    place = places_of_part(where, pairs, kept)
    at, held_out = (places_of_part(place, kept, part) for part in (train, test))
    search = _Search(model, spot, (train, test), (at, held_out), ranks, steps, size, seed, progress)
    own = search.learned(model)
    named: dict[str, Sequence[Subspace | None]] = {"": own}
    if RANDOM in controls:
        named[RANDOM] = [random_like(one, seed + n) for n, one in enumerate(own)]
    if WHOLE in controls:
        named[WHOLE] = [None]
    values = search.tested(model, named)
    wrong: list[Subspace] = []
    if SHUFFLED in controls:
        mapping = shuffled(kept, seed)
        wrong = search.learned(model, mapping)
        values |= search.tested(model, {SHUFFLED: wrong}, mapping)
    if UNTRAINED in controls:
        other = untrained(model, seed)
        values |= search.tested(other, {UNTRAINED: search.learned(other)})
    results = {
        name: told(x[:, 0, 0], {}, test, by, seed)
        if name == WHOLE
        else told(x[:, 0], {"rank": list(ranks)}, test, by, seed)
        for name, x in values.items()
    }
    result = results.pop("")
    result.controls = results
    result.meta |= {"title": f"directions of {spot} exchanged", "value": "accuracy"}
    result.report = [said(result.select(rank=rank), f"{rank} directions") for rank in ranks]
    result.report += [*_losses(ranks, own, wrong), *warned(result)]
    result.report += [f"learned on {len(train)} other pairs", *notes(test)]
    return result


@dataclass(frozen=True)
class _Search:
    """Directions that are learned on some pairs and tested on others, in one model or another.

    Attributes:
        model: the one whose answers count; in any other the items' answers do.
        parts, places: to learn from, and to test on.
    """

    model: HookedAudioTransformer
    spot: Spot
    parts: tuple[Pairs[Items], Pairs[Items]]
    places: tuple[Place, Place]
    ranks: Sequence[int]
    steps: int
    size: int
    seed: int
    progress: bool | None

    def learned(
        self, model: HookedAudioTransformer, mapping: Mapping[str, str] | None = None
    ) -> list[Subspace]:
        """Directions of every rank."""
        return [
            learned(
                model,
                self.parts[0],
                str(self.spot.site),
                self.places[0],
                layer=self.spot.layer,
                rank=rank,
                steps=self.steps,
                mapping=mapping,
                asked=model is self.model,
                size=self.size,
                seed=self.seed,
                progress=self.progress,
            )
            for rank in self.ranks
        ]

    def tested(
        self,
        model: HookedAudioTransformer,
        named: Mapping[str, Sequence[Subspace | None]],
        mapping: Mapping[str, str] | None = None,
    ) -> dict[str, Float[Tensor, "n spots subspaces pairs"]]:
        """Whether the pairs that were not learned from answer as they should."""
        test, site = self.parts[1], str(self.spot.site)
        spots = [Spot.of(model, test.clean, site, self.places[1], self.spot.layer)]
        asked = model is self.model
        with evaluating(model):
            return exchanged(
                test, spots, named, mapping, self.size, self.seed, self.progress, asked
            )


def _losses(ranks: Sequence[int], true: Sequence[Subspace], wrong: Sequence[Subspace]) -> list[str]:
    return [
        f"{rank} directions: a loss of {b.meta['loss']} for a shuffled mapping, of "
        f"{a.meta['loss']} for the true one"
        for rank, a, b in zip(ranks, true, wrong, strict=False)
    ]
