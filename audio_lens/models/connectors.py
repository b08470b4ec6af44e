"""Connectors that several audio LLMs share: from the encoder's output to the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from audio_lens.hooks import HookPoint
from audio_lens.models.base import AudioConfig


@dataclass
class ConnectorConfig:
    """Shape of a connector that is an MLP.

    Attributes:
        d_mid: width between its two linear maps.
        n_stacked: how many encoder positions it reads as one.
    """

    d_mid: int
    act_fn: str
    bias: bool = True
    n_stacked: int = 1


@dataclass(kw_only=True)
class ConnectedConfig(AudioConfig):
    """Shape of an audio LLM whose connector is an MLP."""

    connector: ConnectorConfig


class MLPConnector(nn.Module):
    """``linear_2(act(linear_1(x)))`` at every position."""

    def __init__(self, cfg: ConnectorConfig, d_in: int, d_out: int):
        super().__init__()
        self.hook_in = HookPoint(borrowed=True)  # the encoder's hook_out
        self.linear_1 = nn.Linear(cfg.n_stacked * d_in, cfg.d_mid, bias=cfg.bias)
        self.act = ACT2FN[cfg.act_fn]
        self.linear_2 = nn.Linear(cfg.d_mid, d_out, bias=cfg.bias)
        self.hook_pre, self.hook_post, self.hook_out = HookPoint(), HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "segments t d_in"]) -> Float[Tensor, "segments t d_out"]:
        return self.mapped(self.hook_in(x))

    def mapped(self, x: Float[Tensor, "segments t d_in"]) -> Float[Tensor, "segments t d_out"]:
        """The MLP alone."""
        post = self.hook_post(self.act(self.hook_pre(self.linear_1(x))))
        return self.hook_out(self.leave(self.linear_2(post)))

    def leave(self, x: Float[Tensor, "segments t d_out"]) -> Float[Tensor, "segments t d_out"]:
        """From the MLP to the language model: as it is, here."""
        return x


class StackingConnector(MLPConnector):
    """Groups of neighbouring positions side by side, and the MLP of each group."""

    reads_part: ClassVar[str] = "encoder"  # whose positions `hook_in` has

    def __init__(self, cfg: ConnectorConfig, d_in: int, d_out: int):
        super().__init__(cfg, d_in, d_out)
        self.n_stacked = cfg.n_stacked
        self.hook_stacked = HookPoint()

    def forward(self, x: Float[Tensor, "segments t d_in"]) -> Float[Tensor, "segments t2 d_out"]:
        stacked = rearrange(self.hook_in(x), "b (t k) d -> b t (k d)", k=self.n_stacked)
        return self.mapped(self.hook_stacked(stacked))


def connector_weight_names(theirs: str) -> dict[str, str]:
    """The name table of a connector that is an MLP."""
    return {f"{theirs}.{name}": f"connector.{name}" for name in ("linear_1", "linear_2")}
