"""Connectors that several audio LLMs share: from the encoder's output to the language model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from audio_lens.hooks import HookPoint
from audio_lens.models.config import AudioConfig
from audio_lens.models.layers import LayerNorm


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


class Connector(nn.Module, ABC):
    """What carries the encoder's output to the language model, with hooks at both ends.

    Subclasses define `carry`; those that also are another module (a Q-Former) name that behind
    `Connector` among their bases. Unless they say otherwise, every ``frames_per_token`` positions
    of the encoder become one token, and what is left over becomes none.

    Attributes:
        taps: blocks of the encoder whose `hook_resid_post` it reads in place of the encoder's
            output; none for the output.
        reads_apart: whether a token is made of its own ``frames_per_token`` positions alone, so
            that padding behind them says nothing.
        reads_part: the part whose positions `hook_in` has: "connector" says that every position
            of the output is made of that position of the input alone.
    """

    taps: tuple[int, ...] = ()
    reads_apart: ClassVar[bool] = False
    reads_part: ClassVar[str] = "encoder"

    def __init__(self, *arguments: Any, frames_per_token: int = 1):
        super().__init__(*arguments)
        self.frames_per_token = frames_per_token
        self.hook_in = HookPoint(borrowed=True)  # the encoder's hook_out
        self.hook_out = HookPoint(borrowed=True)  # carry may hand on what it was given

    def forward(
        self, x: Float[Tensor, "segments frames d_in"], *others: Tensor
    ) -> Float[Tensor, "segments t d_out"]:
        """What enters the language model.

        Args:
            x: the encoder's output, or what the taps gave side by side.
            others: outputs of further ears, or what else a family's connector needs.
        """
        x = self.hook_in(x)
        pieces = x.chunk(len(self.taps), dim=-1) if self.taps else (x,)
        return self.hook_out(self.carry(*pieces, *others))

    @abstractmethod
    def carry(self, *heard: Tensor) -> Float[Tensor, "segments t d_out"]:
        """From what is heard (``segments frames d`` each) to tokens of the language model."""

    def token_count(self, n_frames: int) -> int:
        """Tokens that so many encoder positions become."""
        return n_frames // self.frames_per_token

    def token_seconds(self, frames: Float[Tensor, " frames"]) -> Float[Tensor, " tokens"]:
        """Centres of the tokens in seconds, given those of the encoder's positions.

        NaN where tokens have no time.
        """
        count = self.token_count(len(frames))
        return frames[: count * self.frames_per_token].unflatten(0, (count, -1)).mean(-1)

    def token_pattern(self, pattern: Float[Tensor, "b q k"]) -> Float[Tensor, "b t s"]:
        """What tokens read of encoder positions, from a pattern of cross-attention: the same."""
        return pattern


class LinearConnector(Connector):
    """One linear map at every position."""

    reads_apart = True
    reads_part = "connector"

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.linear = nn.Linear(d_in, d_out)

    def carry(self, x: Float[Tensor, "segments t d_in"]) -> Float[Tensor, "segments t d_out"]:
        return self.linear(x)


class MLPConnector(Connector):
    """``linear_2(act(linear_1(x)))`` at every position."""

    reads_apart = True
    reads_part = "connector"

    def __init__(self, cfg: ConnectorConfig, d_in: int, d_out: int):
        super().__init__(frames_per_token=cfg.n_stacked)
        self.linear_1 = nn.Linear(cfg.n_stacked * d_in, cfg.d_mid, bias=cfg.bias)
        self.act = ACT2FN[cfg.act_fn]
        self.linear_2 = nn.Linear(cfg.d_mid, d_out, bias=cfg.bias)
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    def carry(self, x: Float[Tensor, "segments t d_in"]) -> Float[Tensor, "segments t d_out"]:
        return self.linear_2(self.hook_post(self.act(self.hook_pre(self.linear_1(x)))))


class StackingConnector(MLPConnector):
    """Groups of neighbouring positions side by side, and the MLP of each group.

    Positions that do not fill a group are left out.
    """

    reads_part = "encoder"

    def __init__(self, cfg: ConnectorConfig, d_in: int, d_out: int):
        super().__init__(cfg, d_in, d_out)
        self.hook_stacked = HookPoint()

    def carry(self, x: Float[Tensor, "segments t d_in"]) -> Float[Tensor, "segments t2 d_out"]:
        whole = x[:, : self.token_count(x.shape[1]) * self.frames_per_token]
        stacked = rearrange(whole, "b (t k) d -> b t (k d)", k=self.frames_per_token)
        return super().carry(self.hook_stacked(stacked))


class NormedConnector(StackingConnector):
    """Groups of frames, an MLP, and a layer norm of what it gives."""

    def __init__(self, cfg: ConnectorConfig, d_in: int, d_out: int, eps: float):
        super().__init__(cfg, d_in, d_out)
        self.norm = LayerNorm(d_out, eps)

    def carry(self, x: Float[Tensor, "segments t d_in"]) -> Float[Tensor, "segments t2 d_out"]:
        return self.norm(super().carry(x))


def connector_weight_names(theirs: str) -> dict[str, str]:
    """The name table of a connector that is an MLP."""
    return {f"{theirs}.{name}": f"connector.{name}" for name in ("linear_1", "linear_2")}
