"""WavLM: wav2vec 2.0 with attention biased by distance, through a gate that reads the stream."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from audio_lens.hooks import HookPoint
from audio_lens.models.families.wav2vec2 import HookedWav2Vec2, SpeechEncoder, hf_classes
from audio_lens.models.families.wav2vec2_config import SpeechEncoderConfig
from audio_lens.models.layers import Attention, Block, Context, PostNormBlock, PreNormBlock


class GatedBiasAttention(Attention):
    """Attention whose scores are biased by distance, as much as a gate lets through.

    Each head gates the bias of each query by what its share of the block's input says.
    """

    is_biased = True

    def __init__(self, cfg: SpeechEncoderConfig, causal: bool):
        super().__init__(cfg, causal)
        self.gru_rel_pos_linear = nn.Linear(cfg.d_head, 8)
        self.gru_rel_pos_const = nn.Parameter(torch.ones(1, cfg.n_heads, 1, 1))
        self.hook_pos_bias = HookPoint()

    def bias(self, x: Float[Tensor, "b q d"], context: Context) -> Float[Tensor, "b h q k"]:
        shares = rearrange(x, "b q (h e) -> b h q e", h=self.n_heads)
        gates = rearrange(self.gru_rel_pos_linear(shares), "b h q (gate n) -> b h q gate n", gate=2)
        first, second = gates.sum(-1).sigmoid().chunk(2, dim=-1)
        gate = first * (second * self.gru_rel_pos_const - 1) + 2
        return self.hook_pos_bias(gate * context.position_bias)


class WavLMPostNormBlock(PostNormBlock):
    attention = GatedBiasAttention


class WavLMPreNormBlock(PreNormBlock):
    attention = GatedBiasAttention


class WavLMEncoder(SpeechEncoder):
    """A speech encoder with a table of biases by distance, which all blocks share."""

    def __init__(self, cfg: SpeechEncoderConfig):
        super().__init__(cfg)
        self.distance_embed = nn.Embedding(cfg.need_distances[0], cfg.n_heads)

    @staticmethod
    def block_type(cfg: SpeechEncoderConfig) -> type[Block]:
        return WavLMPreNormBlock if cfg.final_norm else WavLMPostNormBlock

    def position_bias(self, n_frames: int) -> Float[Tensor, "h t t"]:
        """The bias of every head by query and key, before any gate."""
        index = torch.arange(n_frames, device=self.distance_embed.weight.device)
        buckets = self._buckets(index[None, :] - index[:, None])
        return rearrange(self.distance_embed(buckets), "q k h -> h q k")

    def _buckets(self, distance: Int[Tensor, "q k"]) -> Int[Tensor, "q k"]:
        """Rows of the table: near distances one by one, far ones in logarithmic steps.

        Later keys use the second half of the table.
        """
        n_buckets, max_distance = self.cfg.need_distances
        n_side = n_buckets // 2
        n_near = n_side // 2
        size = distance.abs()
        steps = math.log(max_distance / n_near)
        far = n_near + (size.float() / n_near).log() / steps * (n_side - n_near)
        far = far.long().clamp(max=n_side - 1)
        return torch.where(size < n_near, size, far) + n_side * (distance > 0)


class HookedWavLM(HookedWav2Vec2):
    """WavLM with every activation hooked: bare, or with a head for CTC or the class of a clip."""

    model_types = ("wavlm",)
    hf_class = hf_classes("WavLM")
    encoder_type = WavLMEncoder
    weight_names: ClassVar = {
        **HookedWav2Vec2.weight_names,
        "encoder.layers.0.attention.rel_attn_embed": "encoder.distance_embed",
        "encoder.layers.{l}.attention": "encoder.blocks.{l}.attn",
        "encoder.layers.{l}.attention.gru_rel_pos_linear": (
            "encoder.blocks.{l}.attn.gru_rel_pos_linear"
        ),
    }
