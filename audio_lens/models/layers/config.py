"""The shape of one part of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch

from audio_lens.inputs import InputError

Value = TypeVar("Value")


def needed(value: Value | None, lacking: str) -> Value:
    """The value.

    Raises:
        InputError: if there is none; ``lacking`` says what that means.
    """
    if value is None:
        raise InputError(lacking)
    return value


@dataclass
class PartConfig:
    """Shape of one part (encoder, decoder), in TransformerLens's names.

    Attributes:
        n_ctx: the most positions the part takes; None for any number.
        attn_biases: the projections that have a bias.
        softmax_float32, scales_queries: where attention rounds in half precision.
        final_norm: whether a norm follows the last block.
        rotary_base: base of the rotary positions; None for none.
        rotary_frequencies: of rescaled rotary positions; None derives them from the base.
        rotary_factor: what cosines and sines of rescaled positions are multiplied by.
        rotary_dim: how many leading dimensions of a head turn; None for all.
        qk_norm: whether queries and keys of every head pass an RMS norm before they turn.
        attn_scale: what scores are multiplied by; None for ``d_head ** -0.5``.
        residual_multiplier: of everything a block adds to the residual stream.
        embed_multiplier, logits_divisor: of token embeddings and of logits.
        n_experts, n_experts_per_token: MLPs side by side, and how many of them a position uses.
        normalizes_experts: whether the weights of those that are used sum to 1.
    """

    n_layers: int
    n_heads: int
    d_model: int
    d_mlp: int
    n_ctx: int | None
    act_fn: str
    eps: float
    normalization_type: Literal["LN", "RMS"]
    d_head: int
    n_key_value_heads: int
    attn_biases: tuple[str, ...] = ("q", "v", "o")
    d_vocab: int | None = None
    causal: bool = False
    gated_mlp: bool = False
    mlp_bias: bool = True
    softmax_float32: bool = False
    scales_queries: bool = False
    final_norm: bool = True
    rotary_base: float | None = None
    rotary_frequencies: tuple[float, ...] | None = None
    rotary_factor: float = 1.0
    rotary_dim: int | None = None
    qk_norm: bool = False
    attn_scale: float | None = None
    residual_multiplier: float = 1.0
    embed_multiplier: float = 1.0
    logits_divisor: float = 1.0
    n_experts: int | None = None
    n_experts_per_token: int | None = None
    normalizes_experts: bool = True
    attn_only: bool = False
    model_name: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    @property
    def need_n_ctx(self) -> int:
        """The most positions.

        Raises:
            InputError: if the part takes any number.
        """
        return needed(self.n_ctx, "this part takes any number of positions: n_ctx is None")

    @property
    def need_d_vocab(self) -> int:
        """The size of the vocabulary.

        Raises:
            InputError: if the part has none.
        """
        return needed(self.d_vocab, "this part has no vocabulary: d_vocab is None")
