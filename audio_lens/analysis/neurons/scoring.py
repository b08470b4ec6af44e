"""Which neurons fire for a class: scores of all neurons of a site, by one of five selectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.neurons.counting import Counts, Units
from audio_lens.analysis.neurons.logged import NOT_RIGHT
from audio_lens.analysis.neurons.selectors import FREQUENCIES, checked, eligible, scored
from audio_lens.analysis.probes.rows import Given, Labels, Rows, rows_of
from audio_lens.arguments import whole
from audio_lens.errors import InputError
from audio_lens.items import Activations
from audio_lens.items.statistics import LEVEL, permuted_labels
from audio_lens.results import Result

PERMUTED = "permuted_labels"
RESAMPLES = 200
POOLED = (
    "The activations are means over positions: how often a neuron fires is counted over items, "
    "not over positions. Collect with pool=None to count positions."
)
LIMITS = (
    "A high score says that a neuron fires for the class, not that anything uses it: deactivate "
    "it on other items (neurons.deactivation)."
)


def scores(
    activations: Given,
    label: Labels,
    kind: str = "MAD",
    *,
    site: str | None = None,
    layers: Sequence[int] | None = None,
    floor: float | int | None = None,
    shares: Sequence[float | int] | None = None,
    control: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Result:
    """How much every neuron is of every class, by one of five selectors.

    P is the share of a class's positions at which a neuron is above 0, g its activation there.

    - "LAP": P. Neurons that always fire have it for every class.
    - "LAPE": minus the entropy of P over the classes, in nats; only of the class with the largest
      P, and where that is ``floor`` or more.
    - "MAD": the mean of g over the class minus that over all others.
    - "CAS": the mean of g over the class minus the largest mean of any other.
    - "AAPE": minus the entropy as of LAPE; of neurons that are not the rarest, whose entropy is
      among the lowest, and for classes whose P is among the highest (``shares``).

    Log activations where the model answers rightly (`logged`), and try the neurons on other items.

    Args:
        activations: `Activations` of a site of neurons, or a tensor ``n d``.
        label: of the items, or one for every row.
        kind: see above.
        site, layers: of `Activations`; None takes the first, and all its layers.
        floor: of LAPE; 0.2 where it is None.
        shares: of AAPE: how many are dropped for firing rarely, how many of the others are kept
            for a low entropy, and which share of all P counts as high; None is 0.05, 0.01, 0.05.
        control: whether the scores under permuted labels stand beside.
        resamples: how often items are drawn anew for the intervals; 0 makes none.
        seed: of what is drawn.

    Returns:
        Axes "class", "layer" (of activations in blocks) and "neuron"; NaN where a selector may not
        take a neuron for a class.

    Raises:
        InputError: another kind, a limit of another kind, labels that are not as many as the rows,
            or a site of heads.
        ItemError: labels of one value.
        ActivationsError: a site, layer or label that was not collected.
    """
    limit, filters = checked(kind, floor, shares)
    whole("resamples", resamples, least=0)
    rows = rows_of(activations, label, site=site, layers=layers)
    if "head" in rows.axes:
        raise InputError("a site of heads has no neurons: name one such as mlp.post or mlp.gate")
    way = _Way(kind, limit, filters, resamples, seed)
    units = Units.of(rows)
    values, low, high = way.of(rows, units, with_interval=resamples > 0)
    axes = {"class": units.classes, **rows.axes, "neuron": list(range(values.shape[-1]))}
    controls = {}
    if control:
        permuted = units.relabelled(permuted_labels(units.label.tolist(), seed=seed))
        controls[PERMUTED] = Result(way.of(rows, permuted)[0], (*axes,), axes)
    not_right = rows.meta.get(NOT_RIGHT)
    result = Result(
        values,
        (*axes,),
        axes,
        low=low,
        high=high,
        controls=controls,
        n_kept=len(rows.names),
        dropped={} if not_right is None else {NOT_RIGHT: int(not_right)},
        meta=rows.meta | {"kind": kind, "title": f"{kind} of neurons by class", "value": kind},
    )
    is_pooled = isinstance(activations, Activations) and activations.index["pool"] != "none"
    result.report = [
        *_said(result),
        *([POOLED] if is_pooled and kind in FREQUENCIES else []),
        LIMITS,
    ]
    return result


@dataclass(frozen=True)
class _Way:
    """How neurons are scored."""

    kind: str
    floor: float
    shares: tuple[float, float, float]
    resamples: int
    seed: int

    def of(
        self, rows: Rows, units: Units, with_interval: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scores and bounds: classes, layers where there are any, neurons."""
        often, found, bounds = [], [], []
        for cell in _cells(rows):
            counts = Counts.of(rows.cells(cell), units)
            point = counts.point
            often.append(point[0])
            found.append(scored(self.kind, *point))
            if with_interval:
                bounds.append(counts.interval(self.kind, LEVEL, self.resamples, self.seed))
        widths = {x.shape[-1] for x in found}
        if len(widths) > 1:
            raise InputError(f"layers have {sorted(widths)} neurons: name those of one width")
        may = eligible(self.kind, torch.cat(often, -1), self.floor, self.shares)
        may = torch.stack(may.chunk(len(found), dim=-1), 1)
        shape = (len(units.classes), *rows.shape, found[0].shape[-1])

        def whole_of(parts: Sequence[Tensor]) -> Float[Tensor, "..."]:
            return torch.stack(list(parts), 1).masked_fill(~may, torch.nan).reshape(shape)

        if not with_interval:
            return whole_of(found), None, None
        low, high = zip(*bounds, strict=True)
        return whole_of(found), whole_of(low), whole_of(high)


def _cells(rows: Rows) -> Iterable[tuple[int, ...]]:
    return [(at,) for at in range(rows.shape[0])] if rows.axes else [()]


def _said(result: Result) -> list[str]:
    """What was found, in words."""
    best = result.values.flatten(1).nan_to_num(nan=-torch.inf).max(1).values
    classes, bare = result.coords["class"], lacking(result)
    told = f"{result.meta['kind']} of {result.values[0].numel()} neurons for {len(classes)} classes"
    there = best[best > -torch.inf]
    if len(there):
        told += f": the best of a class has {there.min():.3g} to {there.max():.3g}"
    if PERMUTED in result.controls and len(there):
        chance = result.controls[PERMUTED].values.flatten(1).nan_to_num(nan=-torch.inf).max(1)
        under = chance.values[chance.values > -torch.inf]
        none = "none may be taken"
        told += ", under permuted labels "
        told += f"{under.min():.3g} to {under.max():.3g}" if len(under) else none
    notes = [f"{told}."]
    if bare:
        notes.append(f"No neuron may be taken for {bare}: lower the limits.")
    return notes


def lacking(result: Result) -> str:
    """The classes for which no neuron may be taken; empty where there are none."""
    nothing = result.values.flatten(1).isnan().all(1).tolist()
    named = zip(result.coords["class"], nothing, strict=True)
    return ", ".join(str(name) for name, is_bare in named if is_bare)


def classes_of(result: Result) -> list[Any]:
    """The classes of scores.

    Raises:
        InputError: a result that has none.
    """
    if result.dims[:1] != ("class",) or result.dims[-1:] != ("neuron",):
        raise InputError(f"scores have the axes class, layer, neuron; got {', '.join(result.dims)}")
    return result.coords["class"]
