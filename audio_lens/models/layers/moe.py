"""Mixtures of experts: MLPs of which every position uses a few, chosen by a router."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN

from audio_lens.hooks import HookPoint
from audio_lens.models.layers.blocks import PreNormBlock
from audio_lens.models.layers.config import PartConfig, needed

_NONE = "this part has no experts: n_experts and n_experts_per_token are None"


def _n_experts(cfg: PartConfig) -> int:
    return needed(cfg.n_experts, _NONE)


class Experts(nn.Module):
    """Gated MLPs side by side; each is ``down(act(gate(x)) * up(x))``, without biases.

    Weights are stacked as in Hugging Face: gate over up in `gate_up_proj` (``experts 2f d``), and
    `down_proj` (``experts d f``).
    """

    def __init__(self, cfg: PartConfig):
        super().__init__()
        self.act = ACT2FN[cfg.act_fn]
        n_experts = _n_experts(cfg)
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * cfg.d_mlp, cfg.d_model))
        self.down_proj = nn.Parameter(torch.empty(n_experts, cfg.d_model, cfg.d_mlp))

    def forward(
        self,
        x: Float[Tensor, "n d"],
        indices: Int[Tensor, "n chosen"],
        weights: Float[Tensor, "n chosen"],
    ) -> Float[Tensor, "n d"]:
        """The weighted sum of what the chosen experts make of each position."""
        total = torch.zeros_like(x)
        for expert in indices.unique().tolist():
            position, rank = (indices == expert).nonzero(as_tuple=True)
            written = self.one(expert, x[position]) * weights[position, rank, None]
            total.index_add_(0, position, written)
        return total

    def one(self, expert: int, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """What a single expert makes of positions."""
        gate, up = F.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return F.linear(self.act(gate) * up, self.down_proj[expert])


class MixtureOfExperts(nn.Module):
    """A router that gives every position to its most probable experts, and sums what they write.

    `hook_router_logits` and `hook_expert_weights` (their softmax) are over all experts, and
    `hook_expert_indices` are the chosen ones; what runs is chosen and weighed by the values as the
    hooks leave them, as in TransformerLens: raising the weight of an expert routes to it.
    """

    def __init__(self, cfg: PartConfig):
        super().__init__()
        self.n_chosen = needed(cfg.n_experts_per_token, _NONE)
        self.is_normalized = cfg.normalizes_experts
        self.router = nn.Linear(cfg.d_model, _n_experts(cfg), bias=False)
        self.experts = Experts(cfg)
        self.hook_router_logits = HookPoint()
        self.hook_expert_weights, self.hook_expert_indices = HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        logits = self.hook_router_logits(self.router(x))
        weights = self.hook_expert_weights(logits.softmax(-1, dtype=torch.float32))
        indices = self.hook_expert_indices(weights.topk(self.n_chosen, dim=-1).indices)
        chosen = weights.gather(-1, indices)
        if self.is_normalized:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        chosen = chosen.to(x.dtype)
        return self.experts(*(y.flatten(0, 1) for y in (x, indices, chosen))).view_as(x)

    @property
    def b_out(self) -> Float[Tensor, " d"]:
        """Experts have no bias."""
        return self.experts.down_proj.new_zeros(self.experts.down_proj.shape[1])


class MixtureBlock(PreNormBlock):
    """A pre-norm block whose MLP is a mixture of experts."""

    def make_mlp(self, cfg: PartConfig) -> nn.Module:
        return MixtureOfExperts(cfg)
