"""Stage 1: every node estimated by attribution patching, on pairs set apart for looking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.tap.exact import DIRECTIONS
from audio_lens.analysis.tap.grids import Grid
from audio_lens.analysis.tap.nodes import NEURON, Kind, Node
from audio_lens.results import Result


def ranked(kind: Kind, scores: Float[Tensor, "directions ..."], most: int) -> list[Node]:
    """The nodes of the largest |score|, both directions averaged, strongest first.

    A layer gives half of its nodes at most, so that as many are left to be compared with.
    """
    mean = scores.mean(0).flatten()
    order = mean.abs().nan_to_num(nan=-1.0).argsort(descending=True, stable=True).tolist()
    nodes, found = kind.nodes, []
    taken: dict[int | None, int] = {}
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


def as_result(kind: Kind, found: Grid, names: Sequence[str], metric: str) -> Result:
    """Estimates as shares of the mean gap; of neurons, which are many, their means alone."""
    shares = found.effects[:, 0] / found.gap[:, 0].mean()
    coords: dict[str, list] = {"direction": list(DIRECTIONS), **kind.coords}
    meta = {"title": f"estimated effect of {kind.site}", "value": "estimate", "metric": metric}
    together = shares.nanmean(0)
    if kind.name == NEURON:
        return Result(together, (*coords,), coords, meta=meta, n_kept=len(names))
    coords = {"stimulus": list(names), **coords}
    return Result(shares, (*coords,), coords, estimate=together, meta=meta, n_kept=len(names))
