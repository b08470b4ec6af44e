"""Rows that are sums of few of known directions (METHODS toy I)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from audio_lens.analysis.autoencoders import Autoencoder

N, D, ON = 64, 32, 4  # directions, their entries, how many make a row


def directions() -> Tensor:
    return F.normalize(torch.randn(N, D, generator=torch.Generator().manual_seed(0)), dim=1)


def rows(count: int, seed: int = 1) -> Tensor:
    """Sums of four directions each, by amounts of 0.5 to 1.5."""
    return amounts(count, seed) @ directions()


def amounts(count: int, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.rand(count, N, generator=draw).topk(ON, 1).indices
    given = torch.rand(count, ON, generator=draw) + 0.5
    return torch.zeros(count, N).scatter_(1, chosen, given)


def born_dead(share: float = 0.7, **kept) -> Autoencoder:
    """Random directions of which a share never can be active."""
    draw = torch.Generator().manual_seed(3)
    drawn = F.normalize(torch.randn(N, D, generator=draw), dim=1)
    offsets = torch.zeros(N)
    offsets[: round(share * N)] = -100.0
    return Autoencoder(drawn.clone(), offsets, drawn, torch.zeros(D), **({"k": ON} | kept))


def mean_best_cosine(found: Autoencoder) -> float:
    """MMCS, over the latents that are active on rows that nobody trained on."""
    active = (found.encode(rows(4000, seed=2)) > 0).any(0)
    cosines = directions() @ F.normalize(found.directions[active], dim=1).mT
    return cosines.max(1).values.mean().item()
