"""How well attribution said what exact patches then found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.tap.claims import Claim
from audio_lens.patching.attribution.confirm import rank_correlation
from audio_lens.results import Result

LEAST = 3  # nodes that a rank correlation is of


def of_grid(estimated: Result, exact: Result, metric: str, k: int) -> dict[str, float | int | None]:
    """Agreement over all nodes of a kind, the directions averaged.

    Args:
        estimated: of the pairs that were searched.
        exact: of those that are confirmed on: what is lost between speakers counts too.
        metric: that of the estimates.
        k: how many nodes count as the strongest.

    Returns:
        "spearman" of the values; "overlap" (Jaccard) and "precision" of the strongest k, by size.
    """
    first = estimated.mean().values.mean(0).flatten()
    second = exact.mean().select(metric=metric).values.mean(0).flatten()
    return agreement(first, second, k)


def of_claims(claims: Sequence[Claim]) -> dict[str, float | int | None]:
    """Agreement over the nodes alone that were confirmed or refused; none is stronger than all."""
    values = ([one.estimate for one in claims], [one.effect for one in claims])
    first, second = (torch.tensor(x, dtype=torch.float64) for x in values)
    return agreement(first, second, 0)


def agreement(
    estimated: Float[Tensor, " n"], exact: Float[Tensor, " n"], k: int
) -> dict[str, float | int | None]:
    """Spearman's rank correlation, and overlap and precision of the strongest k."""
    there = estimated.isfinite() & exact.isfinite()
    estimated, exact = estimated[there], exact[there]
    n = len(exact)
    rank = rank_correlation(estimated, exact) if n >= LEAST else float("nan")
    told: dict[str, float | int | None] = {"spearman": rank if rank == rank else None, "nodes": n}
    if not 0 < k < n:
        return told | {"overlap": None, "precision": None}
    best = [set(x.abs().argsort(descending=True)[:k].tolist()) for x in (estimated, exact)]
    shared = len(best[0] & best[1])
    return told | {"overlap": shared / (2 * k - shared), "precision": shared / k}
