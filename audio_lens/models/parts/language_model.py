"""The language models of audio LLMs: Llama's shape, and what Qwen, Mistral and Granite change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from audio_lens.hooks import HookPoint
from audio_lens.models.config import LoadingError, check_part, check_switches, declared
from audio_lens.models.layers import Block, PartConfig, PreNormBlock, Rotary, Stack, multiplied

_QKV = ("q", "k", "v")
_KINDS: dict[str, dict[str, Any]] = {  # of transformers' text configs
    "llama": {"attn_biases": ()},
    "mistral": {"attn_biases": ()},
    "qwen2": {"attn_biases": _QKV},
    "qwen2_5_omni_text": {"attn_biases": _QKV},
    "qwen3": {"attn_biases": (), "qk_norm": True},
    "qwen3_omni_moe_text": {"attn_biases": (), "qk_norm": True},
    "granite": {"attn_biases": ()},
}
_UNDERSTOOD = """
    attention_bias attention_multiplier decoder_sparse_step embedding_multiplier head_dim hidden_act
    hidden_size intermediate_size layer_types logits_scaling max_position_embeddings
    max_window_layers mlp_bias mlp_only_layers moe_intermediate_size norm_topk_prob
    num_attention_heads num_experts num_experts_per_tok num_hidden_layers num_key_value_heads
    residual_multiplier rms_norm_eps rope_parameters sliding_window use_sliding_window vocab_size
"""
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # do not depend on the length of a prompt


class LanguageModel(Stack):
    """RMS norms, rotary positions, grouped keys and values, gated MLPs; audio merged into text."""

    def __init__(self, cfg: PartConfig, block: type[Block] = PreNormBlock):
        super().__init__(cfg, block)
        self.token_embed = nn.Embedding(cfg.need_d_vocab, cfg.d_model)
        self.rotary = Rotary(cfg)
        self.hook_token_embed, self.hook_audio_embed = HookPoint(), HookPoint()
        self.unembed = nn.Linear(cfg.d_model, cfg.need_d_vocab, bias=False)

    def merge(
        self,
        tokens: Int[Tensor, "b t"],
        is_audio: Bool[Tensor, "b t"],
        audio: Float[Tensor, "n d"] | None,
    ) -> Float[Tensor, "b t d"]:
        """Token embeddings with the audio written over its placeholders, in order."""
        embed = self.hook_token_embed(self.token_embed(tokens))
        if audio is not None:
            audio = self.hook_audio_embed(audio.to(embed.dtype))
            embed = embed.masked_scatter(is_audio[..., None], audio)
        return self.hook_embed(multiplied(embed, self.cfg.embed_multiplier))


def language_model_config(text: Any, model_name: str | None) -> PartConfig:
    """The shape of a transformers text config.

    Raises:
        LoadingError: a language model, or a feature of one, that is not implemented.
    """
    if text.model_type not in _KINDS:
        raise LoadingError(
            f"the language model is a {text.model_type!r}; implemented: {', '.join(_KINDS)}"
        )
    _check_features(text)
    cfg = PartConfig(
        n_layers=text.num_hidden_layers,
        n_heads=text.num_attention_heads,
        n_key_value_heads=text.num_key_value_heads,
        d_model=text.hidden_size,
        d_head=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        d_mlp=text.intermediate_size,
        n_ctx=text.max_position_embeddings,
        act_fn=text.hidden_act,
        eps=text.rms_norm_eps,
        normalization_type="RMS",
        model_name=model_name or "",
        d_vocab=text.vocab_size,
        causal=True,
        gated_mlp=True,
        mlp_bias=False,
        softmax_float32=True,
        attn_scale=declared(text, "attention_multiplier", None),
        residual_multiplier=float(declared(text, "residual_multiplier", 1.0)),
        embed_multiplier=float(declared(text, "embedding_multiplier", 1.0)),
        logits_divisor=float(declared(text, "logits_scaling", 1.0)),
        **_KINDS[text.model_type],
        **_rotary(text),
    )
    check_part("language model", cfg)
    return cfg


def weight_names(theirs: str, head: str) -> dict[str, str]:
    """The name table of a language model: ``theirs`` is its prefix, ``head`` its unembedding."""
    block = {
        "self_attn.q_proj": "attn.q_proj",
        "self_attn.k_proj": "attn.k_proj",
        "self_attn.v_proj": "attn.v_proj",
        "self_attn.o_proj": "attn.o_proj",
        "self_attn.q_norm": "attn.q_norm",
        "self_attn.k_norm": "attn.k_norm",
        "input_layernorm": "ln1",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.fc_in",
        "mlp.down_proj": "mlp.fc_out",
        "post_attention_layernorm": "ln2",
    }
    return {
        f"{theirs}.embed_tokens": "decoder.token_embed",
        **{f"{theirs}.layers.{{l}}.{a}": f"decoder.blocks.{{l}}.{b}" for a, b in block.items()},
        f"{theirs}.norm": "decoder.ln_final",
        head: "decoder.unembed",
    }


def _check_features(text: Any) -> None:
    """Raise on what this implementation does not know."""
    check_switches(text, _UNDERSTOOD.split())
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    is_sliding = text.model_type == "mistral" and text.sliding_window
    if kinds or is_sliding:
        named = ", ".join(sorted(kinds)) or "sliding_attention"
        raise LoadingError(f"attention of kind {named} is not implemented")
    biased = [n for n in ("attention_bias", "mlp_bias") if declared(text, n, False)]
    if biased:
        raise LoadingError(f"{', '.join(biased)} of a {text.model_type} is not implemented")


def _rotary(text: Any) -> dict[str, Any]:
    """How positions turn queries and keys, in `PartConfig`'s names.

    Raises:
        LoadingError: for rotary positions that are not implemented.
    """
    rope: Mapping[str, Any] = text.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in _STATIC_ROPE:
        raise LoadingError(f"rotary positions of type {kind!r} are not implemented")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise LoadingError("a partial_rotary_factor of the language model is not implemented")
    if kind == "default":
        return {"rotary_base": float(rope["rope_theta"])}
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](text, device="cpu")
    return {
        "rotary_base": float(rope["rope_theta"]),
        "rotary_frequencies": tuple(frequencies.tolist()),
        "rotary_factor": float(factor),
    }
