"""Which latents are kept while an autoencoder is trained, and what their number costs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

EVERY = 61  # values of a batch, one of which is in a sample of them
SPARE = 16  # values of the sample that are looked at beyond those that are needed
BANDWIDTH = 0.1  # of thresholds whose gradient is taken, where vectors are √d long


class _Jump(torch.autograd.Function):
    """What lies above thresholds, and how much of each row does.

    The gradient of thresholds is taken by a rectangle around them (2407.14435).
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        active = torch.gt(values, threshold, out=torch.empty_like(values))
        ctx.save_for_backward(values, threshold, active)
        return values * active, active.sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        values, threshold, active = ctx.saved_tensors
        of_latents, of_counts = grads
        near = values.sub(threshold).abs_().lt_(BANDWIDTH / 2)
        lost = torch.addcmul(of_counts[:, None], of_latents, threshold).mul_(near).sum(0)
        return of_latents * active, -lost / BANDWIDTH


def jump(
    values: Float[Tensor, "n m"], threshold: Float[Tensor, " m"]
) -> tuple[Float[Tensor, "n m"], Float[Tensor, " n"]]:
    """The values above their latent's threshold, which is positive, and how many a row has."""
    return _Jump.apply(values, threshold)  # type: ignore[return-value]


def largest(values: Float[Tensor, "n m"], k: int) -> Float[Tensor, "n m"]:
    """The k largest of each row, where they are positive."""
    top, at = values.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(values).scatter(-1, at, top.relu())


def largest_of_all(values: Float[Tensor, "n m"], k: int) -> tuple[Float[Tensor, "n m"], float]:
    """The n·k largest of all rows together, where they are positive, and the smallest of them.

    It is infinite where none is positive.
    """
    least = _least(values.detach().flatten(), len(values) * k)
    under = torch.nextafter(least, torch.zeros_like(least)).item()  # its neighbour towards 0
    return F.threshold(values, under, 0.0), least.item()


def _least(values: Float[Tensor, " n"], most: int) -> Float[Tensor, ""]:
    """The smallest positive one among so many of the largest.

    They are looked for among what lies above the value that twice as many lie above in a sample:
    one pass over all values, and a search in few.
    """
    sample = values[::EVERY]
    rank = min(2 * most // EVERY + SPARE, len(sample))
    bound = sample.kthvalue(len(sample) - rank + 1).values.clamp(min=0)
    above = values[values > bound]
    if len(above) < most and bool(bound > 0):  # an odd sample
        above = values[values > 0]
    if not len(above):
        return values.new_tensor(torch.inf)
    return above.kthvalue(max(len(above) - most, 0) + 1).values
