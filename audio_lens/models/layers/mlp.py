"""Hooked MLPs, plain and gated."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from audio_lens.hooks import HookPoint
from audio_lens.models.layers.config import PartConfig


def multiplied(x: Tensor, multiplier: float | int) -> Tensor:
    """Scaled, unless the scale is 1."""
    return x if multiplier == 1 else x * multiplier


def bias_of(linear: nn.Linear) -> Float[Tensor, " d"]:
    """The bias of a linear map; zeros where it has none."""
    return linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias


class MLP(nn.Module):
    """``fc_out(act(fc_in(x)))``."""

    def __init__(self, cfg: PartConfig):
        super().__init__()
        self.act, self.multiplier = ACT2FN[cfg.act_fn], cfg.residual_multiplier
        self.fc_in = nn.Linear(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias)
        self.fc_out = nn.Linear(cfg.d_mlp, cfg.d_model, bias=cfg.mlp_bias)
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.output(self.hook_post(self.act(self.hook_pre(self.fc_in(x)))))

    def output(self, post: Float[Tensor, "*b f"]) -> Float[Tensor, "*b d"]:
        """What the neurons write together to the residual stream."""
        return multiplied(self.fc_out(post), self.multiplier)

    @property
    def W_in(self) -> Float[Tensor, "d f"]:
        return self.fc_in.weight.T

    @property
    def W_out(self) -> Float[Tensor, "f d"]:
        return multiplied(self.fc_out.weight.T, self.multiplier)

    @property
    def b_out(self) -> Float[Tensor, " d"]:
        return multiplied(bias_of(self.fc_out), self.multiplier)


class GatedMLP(MLP):
    """``fc_out(act(gate(x)) * fc_in(x))``, with ``hook_gate`` at ``act(gate(x))``."""

    def __init__(self, cfg: PartConfig):
        super().__init__(cfg)
        self.gate = nn.Linear(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias)
        self.hook_gate, self.hook_pre_linear = HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        gate = self.hook_gate(self.act(self.hook_pre(self.gate(x))))
        return self.output(self.hook_post(gate * self.hook_pre_linear(self.fc_in(x))))

    @property
    def W_gate(self) -> Float[Tensor, "d f"]:
        return self.gate.weight.T
