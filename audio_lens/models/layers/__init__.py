"""Hooked layers shared by all families: attention, MLPs, norms, rotary positions, blocks.

Weights stay in Hugging Face layout (`nn.Linear`); TransformerLens's `W_Q`, `W_O` ... are views.
"""

from audio_lens.models.layers.attention import Attention
from audio_lens.models.layers.blocks import (
    Block,
    CrossAttentionBlock,
    Float16SafeBlock,
    PostNormBlock,
    PreNormBlock,
    Stack,
)
from audio_lens.models.layers.config import PartConfig, needed
from audio_lens.models.layers.context import Context, KVCache, causal_mask, padding_mask
from audio_lens.models.layers.mlp import MLP, GatedMLP, bias_of, multiplied
from audio_lens.models.layers.norms import NORMS, LayerNorm, RMSNorm
from audio_lens.models.layers.rotary import Angles, Rotary, rotate

__all__ = [
    "MLP",
    "NORMS",
    "Angles",
    "Attention",
    "Block",
    "Context",
    "CrossAttentionBlock",
    "Float16SafeBlock",
    "GatedMLP",
    "KVCache",
    "LayerNorm",
    "PartConfig",
    "PostNormBlock",
    "PreNormBlock",
    "RMSNorm",
    "Rotary",
    "Stack",
    "bias_of",
    "causal_mask",
    "multiplied",
    "needed",
    "padding_mask",
    "rotate",
]
