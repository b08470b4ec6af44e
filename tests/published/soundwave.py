"""Soundwave (Zhang et al. 2025, arXiv 2502.12900) as published, of torch's and transformers' parts.

After `Soundwave.py` of FreedomIntelligence/Soundwave; parameters bear the names of the released
checkpoint. At the released size (Llama-3.1-8B, Whisper large: d = 4096, e = 1280, v tokens) these
are, beside `lm_head.weight` and Llama's own under `model.`:

    model.audio_tower.*                        WhisperEncoder's (earlier code: a checkpoint apart)
    model.mm_projector1.weight, bias           (d, 2 e), (d)
    model.asr_transformer_encoder.layers.0.self_attn.in_proj_weight, in_proj_bias    (3 d, d), (3 d)
    model.asr_transformer_encoder.layers.0.self_attn.out_proj.weight, bias           (d, d), (d)
    model.asr_transformer_encoder.layers.0.linear1.weight, bias                      (2 d, d), (2 d)
    model.asr_transformer_encoder.layers.0.linear2.weight, bias                      (d, 2 d), (d)
    model.asr_transformer_encoder.layers.0.norm1, norm2.weight, bias                 (d)
    model.out_norm.weight, bias                (d)
    model.audio_feature_head.weight            (v, d)
    model.lbm.encoder_attn.in_proj_weight, in_proj_bias                              (3 d, d), (3 d)
    model.lbm.encoder_attn.out_proj.weight, bias                                     (d, d), (d)
    model.lbm.atten_layer_norm.weight, bias    (d)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder


class Heard(NamedTuple):
    """What one clip becomes: `tokens` (kept, d), `kept` (kept), `logits` (frames, vocabulary)."""

    tokens: Tensor
    kept: Tensor
    logits: Tensor


class LookBack(nn.Module):
    """Kept frames ask all frames, of which the mask hides those that were dropped."""

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.encoder_attn = nn.MultiheadAttention(d_model, n_heads, batch_first=True)
        self.atten_layer_norm = nn.LayerNorm(d_model)

    def forward(self, kept: Tensor, frames: Tensor, hidden: Tensor) -> Tensor:
        found, _ = self.encoder_attn(
            kept, frames, frames, key_padding_mask=hidden, average_attn_weights=False
        )
        return self.atten_layer_norm(found + kept)


class Soundwave(transformers.LlamaForCausalLM):
    """Llama whose inner model carries the ear and everything between; one clip per prompt."""

    def __init__(
        self, text: transformers.LlamaConfig, ear: transformers.WhisperConfig, placeholder: int
    ):
        super().__init__(text)
        width, heads, inner = text.hidden_size, text.num_attention_heads, self.model
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, norm_first=True)
        inner.audio_tower = WhisperEncoder(ear)
        inner.mm_projector1 = nn.Linear(2 * ear.d_model, width)
        inner.asr_transformer_encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        inner.out_norm = nn.LayerNorm(width)
        inner.audio_feature_head = nn.Linear(width, text.vocab_size, bias=False)
        inner.lbm = LookBack(width, heads)
        self.placeholder = placeholder

    def hear(self, features: Tensor, kept: Tensor | None = None) -> Heard:
        """One clip's mel features (1, mels, frames); ``kept`` overrules which frames go on."""
        inner = self.model
        frames = inner.audio_tower(features).last_hidden_state
        stacked = torch.cat([frames[:, 0::2], frames[:, 1::2]], dim=-1)
        adapted = inner.asr_transformer_encoder(inner.mm_projector1(stacked))  # (1, t, d): time is
        adapted = inner.out_norm(adapted)[0]  # the axis torch takes for the batch
        logits = inner.audio_feature_head(adapted)
        labels = logits.argmax(-1)
        changes = torch.ones_like(labels, dtype=torch.bool)
        changes[1:] = labels[1:] != labels[:-1]
        if kept is not None:
            changes = torch.isin(torch.arange(len(labels)), kept)
        tokens = inner.lbm(adapted[changes], adapted, ~changes)
        return Heard(tokens, changes.nonzero()[:, 0], logits)

    def answer(
        self, tokens: Tensor, features: Tensor, kept: Tensor | None = None, **wanted: Any
    ) -> tuple[Any, Heard]:
        """The language model's output for a prompt (t) with one placeholder, and what it heard."""
        heard = self.hear(features, kept)
        words, at = self.model.embed_tokens(tokens), int((tokens == self.placeholder).nonzero())
        prompt = torch.cat([words[:at], heard.tokens, words[at + 1 :]])
        return self(inputs_embeds=prompt[None], **wanted), heard
