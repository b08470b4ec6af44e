"""Where along its layers a curve of information rises: critical layer, onset, peak."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.inputs import InputError

ALPHA = 0.2  # how far above chance a layer counts, against chance
Number = float | int
LANDMARKS = ("critical", "onset", "peak")


def threshold(chance: float, alpha: float = ALPHA) -> float:
    """The share of right items above which a layer counts: ``(1 + alpha)`` times chance.

    Raises:
        InputError: a chance that is none.
    """
    if not 0 < chance < 1:
        raise InputError(f"chance lies between 0 and 1, got {chance}")
    return (1 + alpha) * chance


def critical_layer(
    curves: Float[Tensor, "*b layers"],
    chance: float,
    *,
    layers: Sequence[Number] | None = None,
    alpha: float = ALPHA,
    excess: bool = False,
) -> Float[Tensor, "*b"]:
    """The mean layer, weighted by the information of those above the threshold (2506.05140).

    A mean over all layers above it moves with the width of the curve, not with its onset alone:
    read `onset` beside it.

    Args:
        curves: the information score of each layer.
        chance: the share of items that a choice by lot gets right.
        layers: coordinates of the layers; None counts from 0.
        alpha: see `threshold`.
        excess: weigh by how far a layer is above the threshold, in place of its score.

    Returns:
        NaN where no layer is above the threshold.
    """
    curves = torch.as_tensor(curves).double()
    tau, at = threshold(chance, alpha), _coordinates(curves, layers)
    weights = torch.where(curves > tau, curves - tau if excess else curves, 0.0)
    return (weights * at).sum(-1) / weights.sum(-1)  # 0 / 0 is NaN


def onset(
    curves: Float[Tensor, "*b layers"],
    chance: float,
    *,
    layers: Sequence[Number] | None = None,
    alpha: float = ALPHA,
) -> Float[Tensor, "*b"]:
    """The first layer from which on the information stays above the threshold; NaN for none."""
    curves = torch.as_tensor(curves).double()
    stays = (curves > threshold(chance, alpha)).flip(-1).cummin(-1).values.flip(-1)
    first = _coordinates(curves, layers)[stays.int().argmax(-1)]
    return first.masked_fill(~stays.any(-1), torch.nan)


def peak(
    curves: Float[Tensor, "*b layers"], *, layers: Sequence[Number] | None = None
) -> Float[Tensor, "*b"]:
    """The layer of most information, the first of several."""
    curves = torch.as_tensor(curves).double()
    return _coordinates(curves, layers)[curves.argmax(-1)]


def landmarks(
    curves: Float[Tensor, "*b layers"], chance: float, alpha: float = ALPHA, excess: bool = False
) -> Float[Tensor, "*b 3"]:
    """Critical layer, onset and peak of each curve."""
    critical = critical_layer(curves, chance, alpha=alpha, excess=excess)
    return torch.stack([critical, onset(curves, chance, alpha=alpha), peak(curves)], -1)


def _coordinates(curves: Tensor, layers: Sequence[Number] | None) -> Float[Tensor, " layers"]:
    count = curves.shape[-1]
    at = torch.as_tensor(list(range(count)) if layers is None else list(layers)).double()
    if len(at) != count:
        raise InputError(f"{count} layers need as many coordinates, got {len(at)}")
    return at
