"""Subspaces that others are held against: random ones, anywhere or where activations vary most."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.subspaces.bases import principal
from audio_lens.analysis.subspaces.exchange import Spot
from audio_lens.analysis.subspaces.subspace import Subspace, orthonormal
from audio_lens.items import Items, collect, statistics

LARGE = 0.9  # of the variance, which the largest directions hold
ROOM = 2  # times as many directions as are drawn from them, at least


def random_like(subspace: Subspace, seed: int) -> Subspace:
    """A random subspace of the same rank; every one is as likely as any other."""
    return Subspace(statistics.random_direction(subspace.basis, seed), kind="random")


def largest(
    spot: Spot, items: Items, rank: int, size: int, progress: bool | None
) -> Float[Tensor, "d m"]:
    """The directions in which activations at a spot vary most, the first of them first.

    The fewest that hold 0.9 of the variance, or twice ``rank`` where these are more; none of a
    single row.

    Args:
        spot: where.
        items: whose activations; as many as the spot has places.
        rank: how many directions are to be drawn from them.
        size: of the batches.
    """
    layers = None if spot.layer is None else [spot.layer]
    acts = collect(
        spot.model, items, str(spot.site), spot.place, layers=layers, size=size, progress=progress
    )
    rows = acts.array(str(spot.site), spot.layer).double()
    rows = rows - rows.mean(0)
    if not rows.any():
        return rows[:0].mT
    directions, strengths = principal(torch.linalg.qr(rows)[1])  # has the same directions
    held = strengths.square().cumsum(0) / strengths.square().sum()
    return directions[:, : max(int((held < LARGE).sum()) + 1, ROOM * rank)]


def random_within(directions: Float[Tensor, "d m"], rank: int, seed: int) -> Subspace:
    """A random subspace of the span of some directions.

    Where these are fewer than ``rank``, it is all of them and random ones beside them.
    """
    d, m = directions.shape
    draw = torch.Generator().manual_seed(seed)
    if m < rank:
        others = torch.randn(d, rank - m, generator=draw, dtype=torch.float64)
        basis = orthonormal(torch.cat([directions.double(), others], dim=1))
    else:
        turned = torch.linalg.qr(torch.randn(m, rank, generator=draw, dtype=torch.float64))[0]
        basis = directions.double() @ turned
    return Subspace(basis.float(), kind="random")
