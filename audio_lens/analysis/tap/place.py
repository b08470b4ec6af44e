"""Stages behind the claims: the confirmed place, its hand-over, its subspace, its hypothesis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis import grounding, scrubbing, subspaces
from audio_lens.analysis.scrubbing import Hypothesis, Node
from audio_lens.analysis.subspaces import Subspace
from audio_lens.analysis.tap.claims import Claim
from audio_lens.analysis.tap.nodes import WINDOW
from audio_lens.errors import AudioLensError
from audio_lens.items import Items, Pairs
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Where
from audio_lens.results import Result
from audio_lens.timeline import Span

RANKS = (1, 2, 4, 8, 16, 32)
FEATURE = "answer"
DRAWS = 1
SHOWN = 8  # groups that a note names


@dataclass(frozen=True)
class Place:
    """Where a stream was confirmed to carry the answer: windows of one layer.

    Attributes:
        spans: without those that others hold, in order of time.
    """

    site: str
    layer: int
    spans: tuple[Span, ...]

    @staticmethod
    def of(claims: Sequence[Claim]) -> Place | None:
        """The first of the layers with the most confirmed windows; None without any."""
        own = [one for one in claims if one.kind == WINDOW and one.is_confirmed]
        counts = Counter(one.layer for one in own if one.layer is not None)
        if not counts:
            return None
        most = max(counts.values())
        layer = min(one for one, count in counts.items() if count == most)
        found = [x for x in own if x.layer == layer]
        spans = sorted(
            (Span(float(x.start_s or 0), float(x.end_s or 0)) for x in found), key=_start
        )
        return Place(found[0].site, layer, tuple(spans))

    @property
    def where(self) -> Where:
        """All windows as one place."""
        where: Any = self.spans[0]
        for span in self.spans[1:]:
            where = where | span
        return where

    def __str__(self) -> str:
        told = ", ".join(f"{span.start_s:.2f}-{span.end_s:.2f}" for span in self.spans)
        return f"{self.site} of block {self.layer} at {told} s"


def _start(span: Span) -> float:
    return span.start_s


def handed_over(
    model: HookedAudioTransformer,
    pairs: Pairs[Items],
    metric: Any,
    *,
    seed: int,
    progress: bool | None,
) -> dict[str, Result]:
    """Where what was heard is, by layer, and when the last position takes it over."""
    items = Items(
        one.replaced(other_audio=other.audio, other_text=None)
        for one, other in zip(pairs.clean, pairs.corrupted, strict=True)
    )
    moved = grounding.residence(
        model,
        items,
        metric=metric,
        streams=("audio",),
        controls=("other_item",),
        seed=seed,
        progress=progress,
    )
    return {"residence": moved, "hand_over": grounding.handed_over(moved, seed=seed)}


def in_subspace(
    model: HookedAudioTransformer,
    parts: tuple[Pairs[Items], Pairs[Items]],
    place: Place,
    metrics: tuple[Any, Any],
    rank: int,
    *,
    size: int,
    seed: int,
    progress: bool | None,
) -> tuple[dict[str, Result], Subspace]:
    """The subspace of the pairs' differences, fitted on one part and tested on the other.

    Args:
        parts: the pairs that were searched, and those that are confirmed on.
        metrics: of each part.

    Returns:
        "saturation", the curve of what was fitted on the pairs searched, tested on the others;
        "transfer_back", the other way round, of ``rank`` directions; "subspace", whether as many
        are enough and needed. And these directions.
    """
    where, beside = place.where, {"seed": seed, "size": size, "progress": progress}
    searched, confirmed = (_fitted(model, pairs, place, progress) for pairs in parts)
    rank = min(rank, searched.rank, confirmed.rank)
    ks = sorted({k for k in RANKS if k <= searched.rank} | {rank})
    few = searched.first(rank)
    spot = (model, parts[1], place.site, where)
    return {
        "saturation": subspaces.curve(*spot, searched, ks, metric=metrics[1], **beside),
        "transfer_back": subspaces.curve(
            *(model, parts[0], place.site, where),
            *(confirmed, [rank]),
            metric=metrics[0],
            controls=("random_direction", "complement"),
            **beside,
        ),
        "subspace": subspaces.effects(*spot, few, metric=metrics[1], **beside),
    }, few


def _fitted(
    model: HookedAudioTransformer, pairs: Pairs[Items], place: Place, progress: bool | None
) -> Subspace:
    news = subspaces.differences(
        model, pairs, place.site, place.where, layer=place.layer, progress=progress
    )
    return subspaces.basis(news, site=place.site, layer=place.layer)


def transferred(
    results: Mapping[str, Result], rank: int, searched: Pairs[Items], confirmed: Pairs[Items]
) -> list[str]:
    """What the subspace brings to those that it was not fitted on, in words."""
    names = [
        ", ".join(sorted({str(x.group) for x in part.clean})) for part in (searched, confirmed)
    ]
    ways = ("saturation", *names), ("transfer_back", *names[::-1])
    said = []
    for name, fitted, tested in ways:
        one = results[name].select(rank=rank).mean()
        told = ", ".join(
            f"{float(one.values[i]):.2f} of {metric} (random ones "
            f"{float(one.controls['random_direction'].values[i]):.2f})"
            for i, metric in enumerate(one.coords["metric"])
        )
        said.append(f"{rank} directions fitted on {fitted} bring, on {tested}, {told}.")
    return said


def scrubbed(
    model: HookedAudioTransformer,
    pairs: Pairs[Items],
    place: Place,
    basis: Float[Tensor, "d k"] | None,
    *,
    size: int,
    seed: int,
    progress: bool | None,
) -> dict[str, Result]:
    """The claimed hypothesis: the answer, at this place, and nothing else of the item matters.

    Both sides of the pairs lend to each other; each keeps to items with its question.
    """
    items = both_sides(pairs)
    within = "text" if all(item.text is not None for item in items) else None
    claims = {"scrubbing": Node(place.site, place.layer, place.where, feature=FEATURE)}
    if basis is not None:
        claims["scrubbing_subspace"] = Node(
            place.site, place.layer, place.where, basis, feature=FEATURE
        )
    return {
        name: scrubbing.scrub(
            model,
            items,
            Hypothesis([node]),
            within=within,
            draws=DRAWS,
            skip_bad=True,
            size=size,
            seed=seed,
            progress=progress,
        )
        for name, node in claims.items()
    }


def both_sides(pairs: Pairs[Items]) -> Items:
    """The clean items, and the corrupted ones as items that say what they are set against."""
    others = [
        other.replaced(answer=one.against, against=one.answer, id=f"{one.id} (corrupted)")
        for one, other in zip(pairs.clean, pairs.corrupted, strict=True)
        if one.against is not None
    ]
    return Items([*pairs.clean, *others])


def written(subspace: Subspace) -> Result:
    """The directions as a result, so that a file can hold them."""
    width, rank = subspace.basis.shape
    coords = {"entry": list(range(width)), "direction": list(range(rank))}
    meta = {"title": "directions of the subspace", "value": "entry"}
    return Result(subspace.basis.double(), (*coords,), coords, meta=meta)


def told_why(error: AudioLensError) -> str:
    """The first line of an error."""
    return str(error).partition("\n")[0]
