"""All nodes of a kind on every pair: estimated by gradients, or patched one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.tap.exact import DENOISE, DIRECTIONS, in_window
from audio_lens.analysis.tap.nodes import Kind, Node
from audio_lens.items import Items, Pairs
from audio_lens.items.pairs import PairBatch
from audio_lens.metrics import Metric
from audio_lens.models import HookedAudioTransformer


@dataclass(frozen=True)
class Grid:
    """The effect of every node of a kind on every pair.

    Attributes:
        effects: how far the metric moves towards the run that the activations come from, in its own
            units; NaN where a pair has no position in a window.
        gap: clean minus corrupted.
    """

    effects: Float[Tensor, "n metrics directions ..."]
    gap: Float[Tensor, "n metrics"]


def grid(
    how: Callable[..., Any],
    model: HookedAudioTransformer,
    pairs: Pairs[Items],
    kind: Kind,
    metrics: Mapping[str, Any],
    size: int,
) -> Grid:
    """All nodes of a kind in both directions, batch by batch.

    Args:
        how: `patching.attribute` or `patching.sweep`.
        metrics: of all pairs, by name.
    """
    shape = (len(pairs), len(metrics), len(DIRECTIONS), *kind.shape)
    effects = torch.full(shape, torch.nan, dtype=torch.float64)
    gap = torch.full(shape[:2], torch.nan, dtype=torch.float64)
    for batch in pairs.batches(model, size):
        own = {
            name: one.of_rows(batch.rows, len(pairs)) if isinstance(one, Metric) else one
            for name, one in metrics.items()
        }
        for number, direction in enumerate(DIRECTIONS):
            moved, apart = _of_batch(how, model, batch, kind, own, direction)
            effects[batch.rows, :, number], gap[batch.rows] = moved, apart
    return Grid(effects, gap)


def _of_batch(
    how: Callable[..., Any],
    model: HookedAudioTransformer,
    batch: PairBatch,
    kind: Kind,
    metrics: Mapping[str, Any],
    direction: str,
) -> tuple[Float[Tensor, "b metrics ..."], Float[Tensor, "b metrics"]]:
    """The effects of a batch, and the gap of its pairs."""
    spans = kind.coords.get("time", [])
    nodes = [Node(kind.name, str(kind.site), span=span) for span in spans]
    here = [i for i, node in enumerate(nodes) if in_window(model, batch.pair.clean, node).any()]
    told = how(
        model,
        **batch.pair,
        site=str(kind.site),
        axes=kind.axes,
        metric=metrics,
        direction=direction,
        progress=False,
        **({"windows": [spans[i] for i in here]} if spans else {}),
    )
    baselines = [len(metrics), len(batch)]
    clean, corrupted = (
        x.detach().double().cpu().reshape(baselines) for x in (told.clean, told.corrupted)
    )
    shape = [*baselines, *(len(told.coords[axis]) for axis in kind.axes)]
    values = told.values.detach().double().cpu().reshape(shape)
    base = (corrupted if direction == DENOISE else clean).reshape(*baselines, *[1] * len(kind.axes))
    moved = values - base if direction == DENOISE else base - values
    if len(here) < len(spans):  # only of windows, which are the last axis
        every = torch.full((*shape[:-1], len(spans)), torch.nan, dtype=torch.float64)
        every[..., here] = moved
        moved = every
    return moved.transpose(0, 1), (clean - corrupted).T
