"""From every item's values to a `Result`: an estimate, an interval, and what stands beside them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.errors import InputError
from audio_lens.items.controls import LEVELS, destroyed
from audio_lens.items.item import Item, ItemError
from audio_lens.items.statistics import (
    LEVEL,
    RESAMPLES,
    SEED,
    Estimate,
    Statistic,
    bootstrap,
    ratio_of_means,
)
from audio_lens.results import Result

TOGETHER = "together"  # of the meta: what the estimate is, where it can be told from the values
MEAN, RATIO_OF_MEANS = "mean", "ratio of means"


def found(
    values: Float[Tensor, " n *cells"],
    axes: Mapping[str, Sequence[Any]],
    items: Sequence[Item],
    *,
    denominators: Float[Tensor, " n *_"] | None = None,
    statistic: Statistic | None = None,
    by: str | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    controls: Mapping[str, Result] | None = None,
    dropped: Mapping[str, int] | None = None,
    meta: Mapping[str, str] | None = None,
    report: Sequence[str] = (),
) -> Result:
    """What items give together, by named axes, with an interval in every cell.

    Args:
        values: of every item, in the order of ``axes``.
        axes: names of the axes behind the items, with their coordinates; "metric" comes first.
        items: whose values they are.
        denominators: of every item, for one value or each: the result is then the ratio of means,
            and the items' values their own ratios.
        statistic: something else than the mean.
        by: a label whose values are drawn in place of items, such as "group".
        level, resamples, seed: of the interval, as in `statistics.bootstrap`.
        controls: results that stand beside this one.
        dropped: how many items were left out, by why.
        meta: what else it was made with.
        report: notes for people.

    Raises:
        ItemError: values of another number of items, or items that lack the label.
        ValueError: axes that do not fit the values.
    """
    values = torch.as_tensor(values).double()
    if len(values) != len(items):
        raise ItemError(f"values of {len(values)} items for {len(items)}")
    return found_by_name(
        values,
        axes,
        [item.id for item in items],
        groups=None if by is None else [_group(item, by) for item in items],
        by=by,
        denominators=denominators,
        statistic=statistic,
        level=level,
        resamples=resamples,
        seed=seed,
        controls=controls,
        dropped=dropped,
        meta=meta,
        report=report,
    )


def found_by_name(
    values: Float[Tensor, " n *cells"],
    axes: Mapping[str, Sequence[Any]],
    names: Sequence[str],
    *,
    groups: Sequence[Hashable] | None = None,
    by: str | None = None,
    denominators: Float[Tensor, " n *_"] | None = None,
    statistic: Statistic | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    controls: Mapping[str, Result] | None = None,
    dropped: Mapping[str, int] | None = None,
    meta: Mapping[str, str] | None = None,
    report: Sequence[str] = (),
) -> Result:
    """`found` of items that are known by their names alone.

    Args:
        names: of the items.
        groups: of every item, which are drawn in their place.
        by: what the groups are called.

    The others are those of `found`.

    Raises:
        ValueError: axes or groups that do not fit the values.
    """
    values = torch.as_tensor(values).double()
    drawn: dict[str, Any] = {"groups": groups, "level": level, "resamples": resamples, "seed": seed}
    under: Tensor | None = None
    if denominators is None:
        estimate = bootstrap(values, statistic, **drawn)
    else:
        shape = (*denominators.shape, *[1] * (values.ndim - denominators.ndim))
        under = torch.as_tensor(denominators).double().reshape(shape).expand_as(values)
        estimate, values = ratio_of_means(values, under, **drawn), values / under
    units = f"{len(names)} items" if groups is None else f"{len(set(groups))} of {by}"
    told = {"interval": f"{level:.0%}, by {resamples} draws of {units}", "seed": str(seed)}
    if statistic is None:
        told[TOGETHER] = MEAN if denominators is None else RATIO_OF_MEANS
    return _labelled(
        values,
        estimate,
        {name: list(coords) for name, coords in axes.items()},
        list(names),
        meta=told | dict(meta or {}),
        report=list(report),
        controls=dict(controls or {}),
        weights=under,
        n_kept=len(names),
        dropped=dict(dropped or {}),
    )


def destroyed_level(
    metrics: Sequence[str],
    clean: Float[Tensor, "n metrics"],
    corrupted: Float[Tensor, "n metrics"],
    items: Sequence[Item],
    **drawn: Any,
) -> Result:
    """The control "destroyed" of every metric, with the share of each item in it.

    Args:
        metrics: their names; one whose level is not known is NaN.
        clean, corrupted: of both unpatched runs.
        items: of the pairs.
        drawn: ``by`` and ``seed`` of `found`.

    Raises:
        ControlError: baselines that do not differ.
    """
    gained = torch.full_like(clean.double(), torch.nan)
    for n, name in enumerate(metrics):
        if name in LEVELS:
            destroyed(clean[:, n], corrupted[:, n], name)  # raises where nothing differs
            gained[:, n] = -corrupted[:, n] if name == "logit_diff" else 0.0
    axes = {"metric": list(metrics)}
    return found(gained, axes, items, denominators=clean - corrupted, **drawn)


def _labelled(
    values: Tensor,
    estimate: Estimate,
    axes: dict[str, list],
    names: list[str],
    weights: Tensor | None,
    **beside: Any,
) -> Result:
    """The result; the axis of the metric stands before that of the items."""
    has_metric = "metric" in axes
    if has_metric and next(iter(axes)) != "metric":
        raise InputError(f"metric is the first of the axes, got {', '.join(axes)}")
    dims = ["stimulus", *axes]
    if has_metric:
        dims[:2] = ["metric", "stimulus"]
        values = values.movedim(0, 1)
        weights = None if weights is None else weights.movedim(0, 1)
    return Result(
        values,
        tuple(dims),
        {"stimulus": names, **axes},
        estimate=estimate.value,
        low=estimate.low,
        high=estimate.high,
        weights=weights,
        **beside,
    )


def _group(item: Item, by: str) -> Any:
    group = item.value(by)
    if group is None:
        raise ItemError(f"{item.name} has no {by} to draw by")
    return group
