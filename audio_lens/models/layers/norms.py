"""Layer norm and RMS norm with hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from audio_lens.hooks import HookPoint


class Norm(nn.Module, ABC):
    """A norm with TransformerLens's hooks: `hook_scale`, then `hook_normalized` before the gain.

    The fused kernel runs unless one of the two is hooked.
    """

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        if self.hook_scale.has_hooks() or self.hook_normalized.has_hooks():
            return self.written_out(x)
        return self.fused(x)

    @abstractmethod
    def fused(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """The norm by a fused kernel."""

    @abstractmethod
    def written_out(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """The norm step by step, past both hooks."""


class LayerNorm(Norm):
    """Layer norm with gain and bias."""

    def __init__(self, d_model: int, eps: float):
        super().__init__(d_model, eps)
        self.bias = nn.Parameter(torch.zeros(d_model))

    def fused(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def written_out(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = precise - precise.mean(-1, keepdim=True)
        scale = self.hook_scale((centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        normalized = self.hook_normalized(centred / scale)
        return (normalized * self.weight + self.bias).to(x.dtype)


class RMSNorm(Norm):
    """Root-mean-square norm, in float32 as Hugging Face's language models compute it.

    Attributes:
        precision: what it computes in, whatever the stream is in.
    """

    precision = torch.float32

    def fused(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        precise = x.to(self.precision)
        return self.gain * (precise * torch.rsqrt(self._mean_square(precise))).to(x.dtype)

    def written_out(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        precise = x.to(self.precision)
        mean_square = self._mean_square(precise)
        scale = mean_square.sqrt()
        edit = scale / self.hook_scale(scale.clone())  # 1 exactly, unless a hook writes the scale
        normalized = (precise * torch.rsqrt(mean_square) * edit).to(x.dtype)
        return self.gain * self.hook_normalized(normalized)

    @property
    def gain(self) -> Float[Tensor, " d"]:
        """What the normalized stream is multiplied by."""
        return self.weight

    def _mean_square(self, precise: Float[Tensor, "*b d"]) -> Float[Tensor, "*b 1"]:
        return precise.pow(2).mean(-1, keepdim=True) + self.eps


class PreciseRMSNorm(RMSNorm):
    """An RMS norm whose gain, too, multiplies in its precision."""

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return super().forward(x.to(self.precision)).to(x.dtype)

    @property
    def gain(self) -> Float[Tensor, " d"]:
        return self.weight.to(self.precision)


NORMS = {"LN": LayerNorm, "RMS": RMSNorm}
