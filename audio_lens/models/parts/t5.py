"""T5's encoder (Raffel et al. 2019, arXiv:1910.10683): it reads text, for models that play it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from audio_lens.hooks import HookPoint
from audio_lens.models.config import check_switches
from audio_lens.models.layers import Attention, Context, PartConfig, PreNormBlock, RMSNorm, Stack

_UNDERSTOOD = """
    vocab_size d_model d_kv d_ff num_layers num_heads relative_attention_num_buckets
    relative_attention_max_distance layer_norm_epsilon feed_forward_proj
"""
_OF_THE_DECODER = "num_decoder_layers scale_decoder_outputs is_decoder is_encoder_decoder"
_OF_TRAINING = "dropout_rate initializer_factor classifier_dropout dense_act_fn is_gated_act"


@dataclass
class T5Config(PartConfig):
    """Shape of T5's encoder.

    Attributes:
        n_buckets, max_distance: of the relative position bias.
    """

    n_buckets: int = 32
    max_distance: int = 128


class T5Norm(RMSNorm):
    """An RMS norm whose mean square alone is in float32; its output has the precision of its gain.

    So it brings a stream that float32 weights widened back to the precision of the model.
    """

    def fused(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        mean_square = self._mean_square(x.to(self.precision))
        return self.weight * (x * mean_square.rsqrt()).to(self.weight.dtype)

    def written_out(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        mean_square = self._mean_square(x.to(self.precision))
        scale = mean_square.sqrt()
        edit = scale / self.hook_scale(scale.clone())  # 1 exactly, unless a hook writes the scale
        normalized = (x * mean_square.rsqrt() * edit).to(self.weight.dtype)
        return self.weight * self.hook_normalized(normalized)


class WideLinear(nn.Linear):
    """A linear map that may be wider than the model: transformers keeps it in float32."""

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return super().forward(x.to(self.weight.dtype))


class T5Attention(Attention):
    """Attention whose scores are not scaled, but biased by distance, alike in all blocks."""

    is_biased = True

    def __init__(self, cfg: T5Config, causal: bool):
        super().__init__(cfg, causal)
        self.hook_pos_bias = HookPoint(borrowed=True)  # of all blocks and rows

    def bias(self, x: Float[Tensor, "b q d"], context: Context) -> Float[Tensor, "b h q k"]:
        return self.hook_pos_bias(context.need_position_bias.expand(len(x), -1, -1, -1))


class T5Block(PreNormBlock):
    """A pre-norm block; in float16, sums that overflow are brought back from the infinities."""

    attention = T5Attention

    def __init__(self, cfg: T5Config):
        super().__init__(cfg)
        self.ln1, self.ln2 = T5Norm(cfg.d_model, cfg.eps), T5Norm(cfg.d_model, cfg.eps)
        self.mlp.fc_out = WideLinear(cfg.d_mlp, cfg.d_model, bias=False)

    def after_attention(self, resid_mid: Float[Tensor, "b t d"], context: Context) -> Tensor:
        return super().after_attention(_off_infinity(resid_mid), context)

    def leave(self, resid_post: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return super().leave(_off_infinity(resid_post))


def _off_infinity(resid: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
    if resid.dtype != torch.float16 or not resid.isinf().any():
        return resid
    limit = torch.finfo(torch.float16).max - 1000
    return resid.clamp(-limit, limit)


class T5Encoder(Stack):
    """Embedded tokens without positions, and blocks that share a bias by distance."""

    cfg: T5Config

    def __init__(self, cfg: T5Config):
        super().__init__(cfg, T5Block)
        self.ln_final = T5Norm(cfg.d_model, cfg.eps)
        self.token_embed = nn.Embedding(cfg.need_d_vocab, cfg.d_model)
        self.distance_embed = nn.Embedding(cfg.n_buckets, cfg.n_heads)

    def embed(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """The residual stream entering block 0."""
        return self.hook_embed(self.token_embed(tokens))

    def position_bias(self, n_tokens: int) -> Float[Tensor, "h t t"]:
        """What is added to the scores of every head, by query and key."""
        index = torch.arange(n_tokens, device=self.distance_embed.weight.device)
        buckets = self._buckets(index[None, :] - index[:, None])
        return rearrange(self.distance_embed(buckets), "q k h -> h q k")

    def _buckets(self, distance: Int[Tensor, "q k"]) -> Int[Tensor, "q k"]:
        """Rows of the table: near distances one by one, far ones in logarithmic steps.

        Later keys use the second half of the table. Steps are cut to whole numbers before they are
        counted on from the near ones (WavLM cuts the sum, which can round up).
        """
        n_side = self.cfg.n_buckets // 2
        n_near = n_side // 2
        size = distance.abs()
        steps = (size.float() / n_near).log() / math.log(self.cfg.max_distance / n_near)
        far = (n_near + (steps * (n_side - n_near)).long()).clamp(max=n_side - 1)
        return torch.where(size < n_near, size, far) + n_side * (distance > 0)


def t5_config(hf_config: Any, model_name: str) -> T5Config:
    """The shape of the encoder of a Hugging Face `T5Config`.

    Raises:
        LoadingError: for a switch that is not implemented.
    """
    check_switches(hf_config, f"{_UNDERSTOOD} {_OF_THE_DECODER} {_OF_TRAINING}".split())
    return T5Config(
        n_layers=hf_config.num_layers,
        n_heads=hf_config.num_heads,
        n_key_value_heads=hf_config.num_heads,
        d_model=hf_config.d_model,
        d_head=hf_config.d_kv,
        d_mlp=hf_config.d_ff,
        d_vocab=hf_config.vocab_size,
        n_ctx=None,
        act_fn=hf_config.dense_act_fn,
        eps=hf_config.layer_norm_epsilon,
        normalization_type="RMS",
        attn_biases=(),
        attn_scale=1.0,
        gated_mlp=hf_config.is_gated_act,
        mlp_bias=False,
        model_name=model_name,
        n_buckets=hf_config.relative_attention_num_buckets,
        max_distance=hf_config.relative_attention_max_distance,
    )


def t5_weight_names(theirs: str, ours: str) -> dict[str, str]:
    """The name table of a `T5EncoderModel`: ``theirs`` and ``ours`` are its prefixes."""
    attention = {a: f"attn.{a}_proj" for a in "qkvo"}
    mlp = {"wi": "mlp.fc_in", "wi_0": "mlp.gate", "wi_1": "mlp.fc_in", "wo": "mlp.fc_out"}
    block = {
        **{f"0.SelfAttention.{a}": b for a, b in attention.items()},
        "0.layer_norm": "ln1",
        **{f"1.DenseReluDense.{a}": b for a, b in mlp.items()},
        "1.layer_norm": "ln2",
    }
    first = f"{theirs}.encoder.block.0.layer.0.SelfAttention"
    return {
        f"{theirs}.shared": f"{ours}.token_embed",
        f"{theirs}.encoder.embed_tokens": f"{ours}.token_embed",
        f"{first}.relative_attention_bias": f"{ours}.distance_embed",
        **{
            f"{theirs}.encoder.block.{{l}}.layer.{a}": f"{ours}.blocks.{{l}}.{b}"
            for a, b in block.items()
        },
        f"{theirs}.encoder.final_layer_norm": f"{ours}.ln_final",
    }
