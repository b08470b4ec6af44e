"""Which latents are kept while an autoencoder is trained, and what their number costs."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

SPARE = 4  # times k, of a row's largest values
BANDWIDTH = 0.1  # of thresholds whose gradient is taken, where vectors are √d long


class _Jump(torch.autograd.Function):
    """What lies above thresholds; their gradient by a rectangle around them (2407.14435)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(values, threshold)
        return values * (values > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        values, threshold = ctx.saved_tensors
        near = ((values - threshold).abs() < BANDWIDTH / 2) * grads[0]
        return grads[0] * (values > threshold), -(threshold / BANDWIDTH) * near.sum(0)


class _Count(torch.autograd.Function):
    """How many of each row lie above thresholds; their gradient by the same rectangle."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(values, threshold)
        return (values > threshold).sum(-1).to(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        values, threshold = ctx.saved_tensors
        near = ((values - threshold).abs() < BANDWIDTH / 2) * grads[0][:, None]
        return None, -near.sum(0) / BANDWIDTH


def jump(values: Float[Tensor, "n m"], threshold: Float[Tensor, " m"]) -> Float[Tensor, "n m"]:
    """The values that lie above their latent's threshold."""
    return _Jump.apply(values, threshold)  # type: ignore[return-value]


def count(values: Float[Tensor, "n m"], threshold: Float[Tensor, " m"]) -> Float[Tensor, " n"]:
    """How many values of each row lie above their latent's threshold."""
    return _Count.apply(values, threshold)  # type: ignore[return-value]


def largest(values: Float[Tensor, "n m"], k: int) -> Float[Tensor, "n m"]:
    """The k largest of each row, where they are positive."""
    top, at = values.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(values).scatter(-1, at, top.relu())


def largest_of_all(values: Float[Tensor, "n m"], k: int) -> Float[Tensor, "n m"]:
    """The n·k largest of all rows together, where they are positive."""
    n, m = values.shape
    each = min(SPARE * k, m)  # of a row, among which its share is looked for: much less to sort
    top, at = values.topk(each, dim=-1, sorted=False)
    chosen = torch.zeros(n * each, dtype=torch.bool, device=values.device)
    chosen[top.detach().flatten().topk(n * k, sorted=False).indices] = True
    chosen = chosen.reshape(n, each)
    if each < m and bool(chosen.all(1).any()):  # a row that may hold more of them
        top, at, chosen = _of_whole_rows(values, k)
    return torch.zeros_like(values).scatter(-1, at, top.relu() * chosen)


def _of_whole_rows(values: Float[Tensor, "n m"], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """All values, where they stand in their rows, and which are the n·k largest."""
    n, m = values.shape
    chosen = torch.zeros(n * m, dtype=torch.bool, device=values.device)
    chosen[values.detach().flatten().topk(n * k, sorted=False).indices] = True
    at = torch.arange(m, device=values.device).expand(n, m)
    return values, at, chosen.reshape(n, m)
