"""States of one condition in runs of another: patched across, and mixed (2602.01247)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.arguments import whole
from audio_lens.edits import Put
from audio_lens.edits.edit import Edit, chosen_layers
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.items import Batch, ItemError, Items, found, measured
from audio_lens.items.collect import Place, by_item
from audio_lens.items.measuring import Cell
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result
from audio_lens.sites import Site, SiteError

OTHER, UNPATCHED, STRAIGHT = "other_item", "unpatched", "straight"
CANNOT = (
    "A condition whose states help another holds what that one lacks there; which of what differs "
    "between them it is, this does not tell."
)


def cross_patch(
    model: HookedAudioTransformer,
    conditions: Mapping[str, Items],
    site: str = "decoder.resid_pre",
    where: Place = "audio",
    *,
    layers: Sequence[int] | None = None,
    metric: Any = None,
    controls: bool = True,
    by: str | None = None,
    size: int = 8,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What runs of one condition gain by the states of another, for every two and every layer.

    Conditions hold the same items under the same names: clean and noisy, two speakers, voiced and
    whispered. Values are changes, the patched metric minus the unpatched one, by "into", "source"
    and "layer". A condition in itself must be 0. From good to bad conditions the change tells what
    is needed, from bad to good what suffices.

    Args:
        model: the model.
        conditions: two or more by name; the sides of every item are equally long.
        site: ``part.activation``.
        where: the positions, as in `items.collect`, in all conditions.
        layers: of the site; None takes all.
        metric: as in `items.measured`; None takes the answers, which all conditions then share.
        controls: whether "other_item" runs: the state is of another item of the source condition.
            "unpatched", the metric of every condition, costs nothing.
        by: a label whose values are drawn in place of items for intervals, such as "group".
        size: of the batches.
        seed: of the intervals.
        progress: as in `patching.sweep`.

    Raises:
        InputError: a single condition.
        ItemError: conditions of other items, other answers, or other lengths.
        SiteError: a site or layer that is not there.
    """
    made = _Conditions.of(model, conditions, site, where, layers, metric)
    alone: list[int] = []  # items that no other has the layout of
    names = list(conditions)

    def cells(batch: Batch) -> Iterator[Cell]:
        sides = made.sides(batch)
        held = [made.states(inputs) for inputs in sides]
        for inputs in sides:
            yield inputs, []
        for inputs, states in itertools.product(sides, held):
            yield from ((inputs, [edit]) for edit in made.edits(states, batch))
        if controls:
            alone.extend(batch.rows if len(batch) == 1 else [])
            turned = [{name: x.roll(-1, 0) for name, x in states.items()} for states in held]
            for inputs, states in itertools.product(sides, turned):
                yield from ((inputs, [edit]) for edit in made.edits(states, batch))

    told = measured(
        model, made.first, cells, metric, size=size, what="conditions", progress=progress
    )
    k, drawn = len(names), {"by": by, "seed": seed}
    base, values = told.values[..., :k], told.values[..., k:]
    axes = {"metric": told.metrics, "into": names, "source": names, "layer": made.layers}

    def changes(part: Float[Tensor, "n m cells"]) -> Float[Tensor, "n m k k layers"]:
        return part.unflatten(-1, (k, k, len(made.layers))) - base[..., None, None]

    count = k * k * len(made.layers)
    result = found(changes(values[..., :count]), axes, made.first, **drawn)
    result.controls[UNPATCHED] = found(
        base, {"metric": told.metrics, "into": names}, made.first, **drawn
    )
    if controls:
        other = changes(values[..., count:])
        other[alone] = torch.nan
        result.controls[OTHER] = found(other, axes, made.first, **drawn)
    result.meta |= {"title": f"conditions exchanged at {made.site}", "value": "change"}
    result.report = [*_told(result, names), CANNOT]
    if alone:
        result.report.append(f"{len(alone)} items have the layout of no other, and no {OTHER}.")
    return result


def interpolate(
    model: HookedAudioTransformer,
    conditions: Mapping[str, Items],
    site: str = "decoder.resid_pre",
    where: Place = "audio",
    *,
    steps: int = 4,
    layers: Sequence[int] | None = None,
    metric: Any = None,
    by: str | None = None,
    size: int = 8,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """The metric along mixtures of conditions: does it go smoothly from one to the other?

    In runs of the first condition the states become ``sum of weight times state`` of all, with
    weights that add up to 1 on a grid. Values are the metric, by "mixture" and "layer". The
    control "straight" is what mixing the metric of the pure conditions in the same runs would
    give: the metric of a readout that is linear in the states.

    Args:
        model, conditions, site, where, layers, metric, by, size, seed, progress: as in
            `cross_patch`.
        steps: of the grid from one condition to another.

    Raises:
        As `cross_patch`.
    """
    made = _Conditions.of(model, conditions, site, where, layers, metric)
    names = list(conditions)
    grid = _grid(len(names), whole("steps", steps, least=1))
    weights = torch.tensor(grid, dtype=torch.float64) / steps

    def cells(batch: Batch) -> Iterator[Cell]:
        sides = made.sides(batch)
        held = [made.states(inputs) for inputs in sides]
        for row in weights.tolist():
            mixed = {
                name: torch.stack([w * states[name] for w, states in zip(row, held, strict=True)])
                for name in held[0]
            }
            summed = {name: parts.sum(0) for name, parts in mixed.items()}
            yield from ((sides[0], [edit]) for edit in made.edits(summed, batch))

    told = measured(model, made.first, cells, metric, size=size, what="mixtures", progress=progress)
    values = told.values.unflatten(-1, (len(grid), len(made.layers)))
    pure = [
        grid.index(tuple(steps * (n == m) for n in range(len(names)))) for m in range(len(names))
    ]
    straight = torch.einsum("gk,nmkl->nmgl", weights, values[:, :, pure])
    mixtures = [_named(names, row) for row in weights.tolist()]
    axes = {"metric": told.metrics, "mixture": mixtures, "layer": made.layers}
    drawn = {"by": by, "seed": seed}
    result = found(values, axes, made.first, **drawn)
    result.controls[STRAIGHT] = found(straight, axes, made.first, **drawn)
    off = (values - straight).mean(0).abs().flatten(1).amax(1).tolist()
    result.meta |= {"title": f"mixtures of conditions at {made.site}", "value": "metric"}
    result.report = [
        f"{name}: at most {one:.3g} off the straight line between the pure conditions."
        for name, one in zip(told.metrics, off, strict=True)
    ]
    return result


def _grid(count: int, steps: int) -> list[tuple[int, ...]]:
    """All weights of so many conditions that add up to the steps, the first condition's first."""
    every = itertools.product(range(steps, -1, -1), repeat=count)
    return [row for row in every if sum(row) == steps]


def _named(names: Sequence[str], weights: Sequence[float]) -> str:
    return ", ".join(f"{w:g} {name}" for name, w in zip(names, weights, strict=True) if w)


@dataclass(frozen=True)
class _Conditions:
    """The same items under several conditions, and the place that is exchanged."""

    model: HookedAudioTransformer
    items: list[Items]
    site: Site
    layers: list[Any]
    where: Place

    @staticmethod
    def of(
        model: HookedAudioTransformer,
        conditions: Mapping[str, Items],
        site: str,
        where: Place,
        layers: Sequence[int] | None,
        metric: Any,
    ) -> _Conditions:
        """The conditions, checked.

        Raises:
            InputError, ItemError, SiteError: as `cross_patch`.
        """
        if not isinstance(conditions, Mapping) or len(conditions) < 2:
            raise InputError("conditions are two or more, items by name")
        first, *others = conditions.values()
        for name, items in list(conditions.items())[1:]:
            if [x.id for x in items] != [x.id for x in first]:
                raise ItemError(f"condition {name!r} holds other items, or in another order")
            unlike = [a for a, b in zip(first, items, strict=True) if a.answer != b.answer]
            if unlike and metric is None:
                raise ItemError(
                    f"{unlike[0].name} has another answer in condition {name!r}: pass metric="
                )
        parsed = Site.parse(site, model)
        if parsed.reads_attention:
            raise SiteError(f"{parsed} holds numbers per query and key: conditions exchange states")
        chosen = list(chosen_layers(parsed, layers))
        return _Conditions(model, [first, *others], parsed, chosen, where)

    @property
    def first(self) -> Items:
        return self.items[0]

    def sides(self, batch: Batch) -> list[AudioInputs]:
        """The items of a batch under all conditions."""
        sides = [batch.inputs]
        for items in self.items[1:]:
            part = items[batch.rows]
            inputs = part.prepare(self.model)
            try:
                batch.inputs.check_pairs_with(inputs, "the first condition", "another")
            except InputError as error:
                raise ItemError(f"{part[0].name}: {error}") from error
            sides.append(inputs)
        return sides

    @torch.no_grad()
    def states(self, inputs: AudioInputs) -> dict[str, Tensor]:
        """The site at every layer, by hook name."""
        names = [self.site.hook_name(layer) for layer in self.layers]
        return self.model.run_with_cache(inputs, names_filter=names, return_cache_object=False)[1]

    def edits(self, states: dict[str, Tensor], batch: Batch) -> list[Edit]:
        """What puts states in place, layer by layer."""
        places = by_item(self.where, self.first)
        where = self.where if places is None else [places[row] for row in batch.rows]
        return [
            Edit(str(self.site), Put(states), layer=layer, where=where) for layer in self.layers
        ]


def _told(result: Result, names: Sequence[str]) -> Iterator[str]:
    for metric in result.coords["metric"]:
        one = result.select(metric=metric)
        bases = [
            f"{name} {float(one.controls[UNPATCHED].select(into=name).mean().values):.3g}"
            for name in names
        ]
        yield f"{metric}, unpatched: {', '.join(bases)}."
        for into, source in itertools.permutations(names, 2):
            curve = one.select(into=into, source=source).mean().values
            top = int(curve.abs().nan_to_num(nan=-1).argmax())
            yield (
                f"{metric} of {into} with states of {source}: {float(curve[top]):+.3g} at most, at "
                f"layer {result.coords['layer'][top]}."
            )
