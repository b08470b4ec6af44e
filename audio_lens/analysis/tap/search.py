"""Stage 1: every node estimated by attribution patching, on pairs set apart for looking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import patching
from audio_lens.analysis.tap.exact import DENOISE, DIRECTIONS, in_window
from audio_lens.analysis.tap.nodes import Kind, Node
from audio_lens.items import Items, Pairs
from audio_lens.items.pairs import PairBatch
from audio_lens.metrics import Metric
from audio_lens.models import HookedAudioTransformer
from audio_lens.progress import track
from audio_lens.results import Result


@dataclass(frozen=True)
class Estimates:
    """Estimated effects, towards the run that activations come from, by kind of node.

    Attributes:
        effects: in units of the metric; NaN where a pair has no position in a window.
        gap: clean minus corrupted.
    """

    effects: dict[str, Float[Tensor, "n directions ..."]]
    gap: Float[Tensor, " n"]

    def scores(self, name: str) -> Float[Tensor, "directions ..."]:
        """The mean estimate as a share of the mean gap."""
        return self.effects[name].nanmean(0) / self.gap.mean()


def estimates(
    model: HookedAudioTransformer,
    pairs: Pairs[Items],
    kinds: Sequence[Kind],
    metric: Any,
    *,
    size: int,
    progress: bool | None = None,
) -> Estimates:
    """Attribution patching (Nanda, 2023) of all nodes in both directions, summed over positions.

    Args:
        metric: one, whose gradient is taken; of all pairs.
        size: of the batches.
    """
    effects = {
        kind.name: torch.full((len(pairs), 2, *kind.shape), torch.nan, dtype=torch.float64)
        for kind in kinds
    }
    gap = torch.full((len(pairs),), torch.nan, dtype=torch.float64)
    with track("attribution", len(pairs), "pairs", show=progress) as advance:
        done = 0
        for batch in pairs.batches(model, size):
            own = metric.of_rows(batch.rows, len(pairs)) if isinstance(metric, Metric) else metric
            for kind in kinds:
                for number, direction in enumerate(DIRECTIONS):
                    found, apart = _of_batch(model, batch, kind, own, direction)
                    effects[kind.name][batch.rows, number] = found
                    gap[batch.rows] = apart
            done += len(batch)
            advance(len(batch), done)
    return Estimates(effects, gap)


def _of_batch(
    model: HookedAudioTransformer, batch: PairBatch, kind: Kind, metric: Any, direction: str
) -> tuple[Float[Tensor, "b ..."], Float[Tensor, " b"]]:
    """The effects of a batch, and the gap of its pairs."""
    spans = kind.coords.get("time", [])
    here = [
        number
        for number, span in enumerate(spans)
        if in_window(model, batch.pair.clean, Node(kind.name, str(kind.site), span=span)).any()
    ]
    windows = {"windows": [spans[number] for number in here]} if spans else {}
    told = patching.attribute(
        model,
        **batch.pair,
        site=str(kind.site),
        axes=kind.axes,
        metric=metric,
        direction=direction,
        progress=False,
        **windows,
    )
    clean, corrupted = (x.double().reshape(-1).cpu() for x in (told.clean, told.corrupted))
    shape = [len(batch), *(len(told.coords[axis]) for axis in kind.axes)]
    values = told.values.double().cpu().reshape(shape)
    base = (corrupted if direction == DENOISE else clean).reshape(-1, *[1] * (len(shape) - 1))
    moved = values - base if direction == DENOISE else base - values
    if spans and len(here) < len(spans):
        every = torch.full((*shape[:-1], len(spans)), torch.nan, dtype=torch.float64)
        every[..., here] = moved
        moved = every
    return moved, clean - corrupted


def ranked(kind: Kind, scores: Float[Tensor, "directions ..."], most: int) -> list[Node]:
    """The nodes of the largest |score|, both directions averaged, strongest first.

    A layer gives half of its nodes at most, so that as many are left to be compared with.
    """
    mean = scores.mean(0).flatten()
    order = mean.abs().nan_to_num(nan=-1.0).argsort(descending=True, stable=True).tolist()
    nodes, found, taken = kind.nodes, [], {}
    in_layer = len(nodes) // max(1, len(kind.coords.get("layer", [None])))
    for place in order:
        node = nodes[place]
        if len(found) == most or bool(mean[place].isnan()):
            break
        if taken.get(node.layer, 0) < in_layer // 2:
            taken[node.layer] = taken.get(node.layer, 0) + 1
            found.append(node)
    return found


def score_of(kind: Kind, scores: Float[Tensor, "directions ..."]) -> Mapping[Node, float]:
    """The mean score of every node."""
    return dict(zip(kind.nodes, scores.mean(0).flatten().tolist(), strict=True))


def as_result(kind: Kind, found: Estimates, names: Sequence[str], metric: str) -> Result:
    """The estimates of a kind; of neurons, which are many, what all pairs give together."""
    coords: dict[str, list] = {"direction": list(DIRECTIONS), **kind.coords}
    shares = found.effects[kind.name] / found.gap.mean()
    meta = {"title": f"estimated effect of {kind.site}", "value": "estimate", "metric": metric}
    if kind.name == "neuron":
        return Result(shares.nanmean(0), (*coords,), coords, meta=meta, n_kept=len(names))
    coords = {"stimulus": list(names), **coords}
    return Result(
        shares, (*coords,), coords, estimate=shares.nanmean(0), meta=meta, n_kept=len(names)
    )
