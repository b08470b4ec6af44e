"""Attention of positions to themselves alone."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.hooks import HookPoint
from audio_lens.models.layers.attention import Attention
from audio_lens.models.layers.blocks import PreNormBlock
from audio_lens.models.layers.config import PartConfig
from audio_lens.models.layers.context import Context


class LoneAttention(Attention):
    """Attention of every position to itself alone: `hook_pattern` is 1 there and 0 elsewhere.

    Queries and keys could change nothing, so there are none. A hook may write the pattern.
    """

    def __init__(self, cfg: PartConfig, causal: bool):
        super().__init__(cfg, causal)
        del self.q_proj, self.k_proj, self.hook_q, self.hook_k, self.hook_attn_scores
        self.hook_z = HookPoint(borrowed=True)  # the values themselves, where no pattern is

    def forward(self, x: Float[Tensor, "b t d"], context: Context) -> Float[Tensor, "b t d"]:
        v = self.hook_v(self._split(self.v_proj(x)))
        return self.output(self.hook_z(self._weighed(v) if self._is_explicit() else v))

    def _is_explicit(self) -> bool:
        if self.attn_mode == "auto":
            return self.hook_pattern.has_hooks()
        return self.attn_mode == "explicit"

    def _weighed(self, v: Float[Tensor, "b t h e"]) -> Float[Tensor, "b t h e"]:
        own = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
        return self.weigh(self.hook_pattern(own.repeat(len(v), self.n_heads, 1, 1)), v)


class LoneBlock(PreNormBlock):
    """A pre-norm block in which positions see nothing of each other."""

    attention = LoneAttention
