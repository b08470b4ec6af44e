"""Stages 3 and 4: exact effects of every node, and of those to confirm beside their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.tap.choose import RANDOM
from audio_lens.analysis.tap.exact import (
    DENOISE,
    DIRECTIONS,
    IDENTITY,
    NORM,
    OTHER,
    TRUE,
    Exact,
    Patch,
    exact,
)
from audio_lens.analysis.tap.grids import Grid
from audio_lens.analysis.tap.nodes import Kind, Node
from audio_lens.items import Items, Pairs, found
from audio_lens.items.findings import destroyed_level
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

GAP, DESTROYED = "gap", "destroyed"
BROUGHT = (OTHER, NORM)  # sources that must not bring the answer; removing it they may well do


def exact_map(pairs: Pairs[Items], kind: Kind, measured: Grid, metrics: Sequence[str]) -> Result:
    """The exact effect of every node of a kind, in both directions: shares of the gap."""
    axes = {"metric": list(metrics), "direction": list(DIRECTIONS), **kind.coords}
    result = found(
        measured.effects,
        axes,
        list(pairs.clean),
        denominators=measured.gap,
        dropped=pairs.dropped.counts,
    )
    result.meta |= {"title": f"exact effect of {kind.site}", "value": "share of the gap"}
    return result


def tested(
    model: HookedAudioTransformer,
    pairs: Pairs[Items],
    nodes: Sequence[Node],
    others: Sequence[Node],
    metric: Any,
    *,
    size: int,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Effects of nodes under one corruption, and of all that must not do the same.

    Args:
        nodes: to confirm.
        others: matched random ones, of the same kinds and layers.

    Returns:
        Shares of the gap by metric, pair, "direction" and "node". Controls: "other_item" and
        "norm_matched_noise" (of direction "denoise": NaN in the other, where anything that is put
        in may take the answer away), "random_sites" (of each node, the mean of the random ones of
        its kind and layer), "identity" (all nodes of a direction at once), "destroyed", and "gap",
        what all of these are shares of.
    """
    asked: list[Patch] = [Patch((node,), d) for d in DIRECTIONS for node in nodes]
    asked += [Patch((node,), d) for d in DIRECTIONS for node in others]
    asked += [Patch((node,), DENOISE, source) for source in BROUGHT for node in nodes]
    asked += [Patch(tuple(nodes), d, IDENTITY) for d in DIRECTIONS]
    told = exact(model, pairs, asked, metric, size=size, seed=seed, progress=progress)
    n, m = len(nodes), len(others)
    own, random, brought, same = told.effects.split([2 * n, 2 * m, len(BROUGHT) * n, 2], dim=-1)
    return of_effects(
        told,
        pairs,
        [str(node) for node in nodes],
        {
            TRUE: own.unflatten(-1, (2, n)),
            RANDOM: _random(random.unflatten(-1, (2, m)), nodes, others),
            IDENTITY: same[..., None].expand(*same.shape, n),
            **{
                source: _denoising(x)
                for source, x in zip(BROUGHT, brought.split(n, dim=-1), strict=True)
            },
        },
    )


def _random(
    effects: Float[Tensor, "b m directions others"], nodes: Sequence[Node], others: Sequence[Node]
) -> Float[Tensor, "b m directions nodes"]:
    """For every node the mean of the random ones of its kind and layer."""
    columns = []
    for node in nodes:
        alike = [i for i, x in enumerate(others) if (x.kind, x.layer) == (node.kind, node.layer)]
        columns.append(effects[..., alike].nanmean(-1))
    return torch.stack(columns, dim=-1)


def _denoising(effects: Float[Tensor, "b m nodes"]) -> Float[Tensor, "b m directions nodes"]:
    return torch.stack([effects, torch.full_like(effects, torch.nan)], dim=2)


def of_effects(
    told: Exact, pairs: Pairs[Items], names: list[str], effects: Mapping[str, Tensor]
) -> Result:
    """Effects of nodes and of their controls as one result; see `tested`.

    Args:
        effects: n m directions nodes, by control; "" for the nodes' own.
    """
    items, gap = list(pairs.clean), told.gap
    axes: dict[str, Sequence[Any]] = {"metric": told.metrics}
    placed = axes | {"direction": list(DIRECTIONS), "node": names}
    results = {name: found(x, placed, items, denominators=gap) for name, x in effects.items()}
    result = results.pop(TRUE)
    results[DESTROYED] = destroyed_level(told.metrics, told.clean, told.corrupted, items)
    results[GAP] = found(gap, axes, items)
    result.controls = results
    result.n_kept, result.dropped = len(items), pairs.dropped.counts
    result.meta |= {"title": "effects of nodes and their controls", "value": "share of the gap"}
    return result
