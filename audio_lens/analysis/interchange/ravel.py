"""Several attributes of one clip: does a subspace carry one of them, and leave the others alone?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.interchange.sources import likeliest
from audio_lens.analysis.subspaces.curve import check_controls
from audio_lens.analysis.subspaces.dormant import dormant
from audio_lens.analysis.subspaces.drawn import random_like
from audio_lens.analysis.subspaces.exchange import Exchange, Spot, check_width
from audio_lens.analysis.subspaces.subspace import Subspace, subspace_of
from audio_lens.edits import Edit
from audio_lens.errors import InputError
from audio_lens.items import Batch, Item, ItemError, Items, found, measured, method
from audio_lens.items.collect import Place, by_item
from audio_lens.items.measuring import Cell
from audio_lens.items.pairs import answered
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result
from audio_lens.running import evaluating

CAUSE, ISOLATE, DISENTANGLE = "cause", "isolate", "disentangle"
SCORES = (CAUSE, ISOLATE, DISENTANGLE)
RANDOM, WHOLE = "random_direction", "whole_site"
CONTROLS = (RANDOM, WHOLE)
WRONG = "not answered rightly"


@method("interchange.ravel", whole="items lend to each other, and its estimate is of all of them")
def ravel(
    model: HookedAudioTransformer,
    items: Items,
    site: str,
    where: Place,
    subspaces: Mapping[str, Subspace | Float[Tensor, "d k"]],
    *,
    asks: str = "asks",
    layer: int | None = None,
    controls: Sequence[str] = CONTROLS,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Which attribute each subspace carries, and whether it leaves the others alone (RAVEL).

    Every item asks for one attribute of its clip: which digit, how many, who speaks. It takes an
    attribute's subspace from an item that asks the same, and has another value of that attribute.

    - "cause": items that ask for the attribute; 1 where the answer becomes the lender's.
    - "isolate": items that ask for another one, of which the lender has another value, too; 1 where
      the answer stays.
    - "disentangle": the mean of both (as in the published code of 2402.17700).

    Args:
        model: the model.
        items: with a label that names the attribute asked for, and labels with the values of all
            attributes. Kept are those that are answered rightly.
        site, where, layer: as in `iia`; of subspaces that name their layer, it must be the same.
        subspaces: for every attribute, or vectors that span one.
        asks: the label that names what an item asks for.
        controls: of "random_direction" (random subspaces of the same ranks) and "whole_site".
        by, size, seed, progress: as in `iia`.

    Returns:
        Scores by item, "attribute" and "score"; an item has a value of one of cause and isolate,
        and "disentangle" is of all together.

    Raises:
        SiteError: a site or block that the model does not have, or a block that nobody names.
        InputError: a basis of another width, no subspaces, or an unknown control.
        ItemError: items that lack a label or an answer, or none that is left.
    """
    check_controls(controls, CONTROLS)
    if not subspaces:
        raise InputError("subspaces are for each attribute, and there are none")
    named = {name: subspace_of(one) for name, one in subspaces.items()}
    _check_labels(items, asks, list(named))
    items.check_answers(model)
    spot = Spot.of(model, items, site, where, layer, next(iter(named.values())))
    with evaluating(model):
        rows = _right(model, items, size)
        places = by_item(where, items)
        at = where if places is None else [places[row] for row in rows]
        kept = items[rows]
        spot = Spot.of(model, kept, site, at, spot.layer)
        variants: dict[str, dict[str, Subspace | None]] = {"": dict(named)}
        if RANDOM in controls:
            drawn = {
                name: random_like(one, seed + n) for n, (name, one) in enumerate(named.items())
            }
            variants[RANDOM] = dict(drawn)
        if WHOLE in controls:
            variants[WHOLE] = dict.fromkeys(named)
        runs = _Runs(spot, kept, variants, asks, seed)
        told = measured(
            model, kept, runs, {"said": likeliest()}, size=size, what="ravel", progress=progress
        )
    said = told.values[:, 0].unflatten(-1, (len(named), len(variants)))
    is_right = (said == runs.wanted[..., None]).double()
    is_right = is_right.masked_fill(runs.wanted.isnan()[..., None], torch.nan)
    results = {
        name: _scored(is_right[..., n], runs.is_asked, kept, list(named), by, seed)
        for n, name in enumerate(variants)
    }
    result = results.pop("")
    result.controls = results
    lost = len(items) - len(kept)
    result.dropped = {WRONG: lost} if lost else {}
    result.meta |= {"title": f"attributes at {spot}", "value": "score"}
    result.report = [_said(result, name) for name in named]
    if WHOLE in controls:
        cause = result.select(score=CAUSE)
        result.report += dormant(cause, cause.controls[WHOLE], CAUSE)
    result.report.append(f"{len(kept)} items are kept, {lost} left out ({WRONG})")
    return result


class _Runs:
    """The exchanges of a batch.

    Attributes:
        wanted: of every item and attribute the token that should follow; NaN where nobody lends.
        is_asked: whether the item asks for the attribute.
    """

    def __init__(
        self,
        spot: Spot,
        items: Items,
        variants: Mapping[str, Mapping[str, Subspace | None]],
        asks: str,
        seed: int,
    ):
        self.spot, self.items, self.variants, self.asks = spot, items, variants, asks
        self.names = list(variants[""])
        self.draw = np.random.default_rng(seed)
        shape = len(items), len(self.names)
        self.wanted = torch.full(shape, torch.nan, dtype=torch.float64)
        asked = [[item.value(asks) == name for name in self.names] for item in items]
        self.is_asked = torch.tensor(asked)

    def __call__(self, batch: Batch) -> Iterator[Cell]:
        own = self.spot.run(batch.inputs)[1]
        held = [self.items[row] for row in batch.rows]
        for number, name in enumerate(self.names):
            lenders = []
            for place, item in enumerate(held):
                lender = self._lender(held, place, name)
                lenders.append(place if lender is None else lender)
                if lender is not None:
                    one = held[lender] if item.value(self.asks) == name else item
                    token = self.spot.model.to_single_token(str(one.answer))
                    self.wanted[batch.rows[place], number] = float(token)
            exchange = Exchange(self.spot, own, own[lenders], batch.rows)
            for subspaces in self.variants.values():
                yield batch.inputs, self._edits(exchange, subspaces[name])

    def _lender(self, held: Sequence[Item], place: int, name: str) -> int | None:
        """An item that asks the same, with another value of the attribute and of what is asked."""
        own = held[place]
        asked = own.value(self.asks)
        fitting = [
            other
            for other, item in enumerate(held)
            if item.value(self.asks) == asked
            and item.value(name) != own.value(name)
            and item.answer != own.answer
        ]
        return int(self.draw.choice(fitting)) if fitting else None

    def _edits(self, exchange: Exchange, subspace: Subspace | None) -> list[Edit]:
        if subspace is None:
            return exchange.whole()
        check_width(subspace, exchange.own, self.spot)
        return exchange.inside(subspace)


def _right(model: HookedAudioTransformer, items: Items, size: int) -> list[int]:
    """The items that are answered rightly."""
    rows: list[int] = []
    with torch.no_grad():
        for batch in items.batches(model, size):
            answers = [str(items[row].answer) for row in batch.rows]
            right = answered(model, batch.inputs, answers)
            rows += [row for row, one in zip(batch.rows, right, strict=True) if one]
    if not rows:
        raise ItemError(f"none of {len(items)} items is answered rightly")
    return sorted(rows)


def _check_labels(items: Items, asks: str, names: Sequence[str]) -> None:
    for item in items:
        lacking = [label for label in (asks, *names) if item.value(label) is None]
        if lacking:
            raise ItemError(f"{item.name} has no label {lacking[0]!r}")
    unasked = [name for name in names if all(item.value(asks) != name for item in items)]
    if unasked:
        raise ItemError(f"no item asks for {unasked[0]!r}, by its label {asks!r}")


def _scored(
    is_right: Float[Tensor, "n attributes"],
    is_asked: Tensor,
    items: Items,
    names: Sequence[str],
    by: str | None,
    seed: int,
) -> Result:
    cause, isolate = (is_right.masked_fill(~kind, torch.nan) for kind in (is_asked, ~is_asked))
    values = torch.stack([cause, isolate, torch.full_like(cause, torch.nan)], dim=-1)

    def together(some: Float[Tensor, "m attributes scores"]) -> Float[Tensor, "attributes scores"]:
        means = some[..., :2].nanmean(0)
        return torch.cat([means, means.mean(-1, keepdim=True)], dim=-1)

    axes = {"attribute": list(names), "score": list(SCORES)}
    return found(values, axes, list(items), statistic=together, by=by, seed=seed)


def _said(result: Result, name: str) -> str:
    one = result.select(attribute=name).mean()
    scores = {score: float(one.select(score=score).values) for score in SCORES}
    return (
        f"{name}: the answer becomes the lender's in {scores[CAUSE]:.2f}, other answers stay in "
        f"{scores[ISOLATE]:.2f} (mean {scores[DISENTANGLE]:.2f})"
    )
