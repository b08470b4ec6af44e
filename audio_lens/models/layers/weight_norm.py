"""Convolutions with weight norm (arXiv:1602.07868), which is computed in every run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class WeightNormConv(nn.Module):
    """A convolution over time whose taps have a gain each, and a direction of norm 1.

    The kernel is made of both whenever it is used: in the precision that the model has then, and
    with gradients to both.
    """

    def __init__(self, d: int, kernel: int, padding: int, groups: int):
        super().__init__()
        self.padding, self.groups = padding, groups
        self.weight_g = nn.Parameter(torch.empty(1, 1, kernel))
        self.weight_v = nn.Parameter(torch.empty(d, d // groups, kernel))
        self.bias = nn.Parameter(torch.empty(d))

    @property
    def weight(self) -> Float[Tensor, "o i k"]:
        """The kernel."""
        return torch.ops.aten._weight_norm(self.weight_v, self.weight_g, 2)

    def forward(self, x: Float[Tensor, "b d t"]) -> Float[Tensor, "b d t2"]:
        return F.conv1d(x, self.weight, self.bias, padding=self.padding, groups=self.groups)


def with_gains(tensors: dict[str, Tensor], conv: str) -> dict[str, Tensor]:
    """The tensors, of which those of a convolution are named ``weight_g`` and ``weight_v``.

    Where weight norm was removed, the gains are what the kernel itself amounts to.

    Args:
        conv: the name of the convolution.
    """
    modern = {f"{conv}.parametrizations.weight.original{i}": kind for i, kind in enumerate("gv")}
    found = {
        f"{conv}.weight_{modern[key]}" if key in modern else key: x for key, x in tensors.items()
    }
    kernel = found.pop(f"{conv}.weight", None)
    if kernel is not None:
        found[f"{conv}.weight_g"] = kernel.norm(dim=(0, 1), keepdim=True)
        found[f"{conv}.weight_v"] = kernel
    return found
