"""Kimi-Audio (arXiv 2504.18425) as its published code computes it, under its checkpoint's names.

After MoonshotAI's ``modeling_moonshot_kimia.py`` and ``kimia_infer``. Two models: the language
model with its two streams, in safetensors at the root of the checkpoint, and the whole of
whisper-large-v3 in its folder ``whisper-large-v3``, of which the encoder is used. The index of
Kimi-Audio-7B-Instruct lists 453 tensors of 19,532,673,280 bytes in bfloat16: those of
`MoonshotKimiaForCausalLM` at `PUBLISHED` sizes, and 34 more of 128 bytes, one a layer (the
frequencies of its rotary positions).

The published forward holds one prompt; here every row of a batch is treated like that prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, WhisperConfig, WhisperForConditionalGeneration
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
)

HOP, SAMPLES_PER_TOKEN, FRAMES_PER_TOKEN = 160, 1280, 4
PUBLISHED = {
    "vocab_size": 168_448,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "kimia_mimo_layers": 6,
    "kimia_mimo_transformer_from_layer_index": 21,
    "kimia_mimo_audiodelaytokens": 6,
    "kimia_adaptor_input_dim": 5120,
    "kimia_token_offset": 152_064,
    "kimia_media_begin": 151_661,
    "kimia_media_end": 151_663,
}


class VQAdaptor(nn.Module):
    """From four stacked frames of Whisper to the width of the language model."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        width = config.hidden_size
        self.layers = nn.Sequential(
            nn.Linear(config.kimia_adaptor_input_dim, width),
            nn.SiLU(),
            nn.Dropout(0.0),
            nn.Linear(width, width),
            nn.LayerNorm(width, eps=config.rms_norm_eps),
        )

    def forward(self, frames: Tensor) -> Tensor:
        return self.layers(frames)


class MoonshotKimiaModel(nn.Module):
    """Two streams of tokens and the audio become one residual stream, which parts in two again."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = self._layers(config.num_hidden_layers)
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mimo_layers = self._layers(config.kimia_mimo_layers)
        self.mimo_norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.vq_adaptor = VQAdaptor(config)
        self.rotary_emb = Qwen2RotaryEmbedding(config)

    def _layers(self, count: int) -> nn.ModuleList:
        return nn.ModuleList(Qwen2DecoderLayer(self.config, layer_idx=0) for _ in range(count))

    def forward(
        self,
        input_ids: Tensor,
        text_input_ids: Tensor,
        whisper_input_feature: Sequence[Tensor],
        is_continuous_mask: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states of the text stream and of the audio stream, ``b t d`` each.

        ``whisper_input_feature`` has ``tokens 4d`` of every clip, in the order of the prompts.
        """
        hidden = self.embed(
            input_ids, text_input_ids, whisper_input_feature, is_continuous_mask.bool()
        )
        steps = torch.arange(input_ids.shape[1])[None]
        shared = {
            "attention_mask": _causal(input_ids, attention_mask, hidden.dtype),
            "position_embeddings": self.rotary_emb(hidden, steps),
        }
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, **shared)
            if index == self.config.kimia_mimo_transformer_from_layer_index:
                spoken = hidden.clone()
        for layer in self.mimo_layers:
            spoken = layer(spoken, **shared)
        return self.norm(hidden), self.mimo_norm(spoken)

    def embed(
        self,
        input_ids: Tensor,
        text_input_ids: Tensor,
        whisper_input_feature: Sequence[Tensor],
        is_continuous: Tensor,
    ) -> Tensor:
        """What enters the first layer: both streams summed, with the audio in its places."""
        embedded = self.embed_tokens(input_ids)
        begins = (input_ids == self.config.kimia_media_begin).nonzero().tolist()
        ends = (input_ids == self.config.kimia_media_end).nonzero().tolist()
        frames = embedded.new_zeros(*input_ids.shape, self.config.kimia_adaptor_input_dim)
        for (row, begin), (_, end), clip in zip(begins, ends, whisper_input_feature, strict=True):
            frames[row, begin + 1 : end] = clip[: end - begin - 1]
        heard = self.vq_adaptor(frames)
        joined = (embedded + heard) * torch.sqrt(torch.tensor(2.0, dtype=heard.dtype))
        embedded = torch.where(is_continuous[..., None], joined, embedded)
        has_text = text_input_ids.any(1)[:, None, None]
        return torch.where(has_text, embedded + self.embed_tokens(text_input_ids), embedded)


class MoonshotKimiaForCausalLM(nn.Module):
    """The language model with a head for each stream, both over the whole vocabulary."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.model = MoonshotKimiaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mimo_output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Logits of the audio stream and of the text stream, ``b t vocab`` each, in that order."""
        text, audio = self.model(**inputs)
        return self.mimo_output(audio), self.lm_head(text)


class KimiAudio(nn.Module):
    """Whisper's encoder before the language model, as ``kimia_infer`` runs them."""

    def __init__(self, config: Qwen2Config, whisper: WhisperConfig):
        super().__init__()
        self.alm = MoonshotKimiaForCausalLM(config)
        self.whisper = WhisperForConditionalGeneration(whisper)

    def forward(
        self,
        input_features: Tensor,
        input_features_mask: Tensor,
        is_continuous_mask: Tensor,
        **inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Logits of the audio stream and of the text stream.

        ``input_features`` are ``segments mels frames`` of the windows of 30 s of all clips, padded
        with silence, which is heard; ``input_features_mask`` tells it from audio.
        """
        samples = [HOP * n for n in input_features_mask.sum(1).tolist()]
        heard = self.whisper.model.encoder(input_features).last_hidden_state
        kept = [
            stacked(frames[: FRAMES_PER_TOKEN * token_count(n)])
            for frames, n in zip(heard, samples, strict=True)
        ]
        return self.alm(
            whisper_input_feature=_clips(kept, inputs["input_ids"], self.alm.model.config),
            is_continuous_mask=is_continuous_mask,
            **inputs,
        )


def token_count(n_samples: int) -> int:
    """Discrete tokens, and stacked frames, of so many samples at 16 kHz."""
    return (n_samples - 1) // SAMPLES_PER_TOKEN + 1


def stacked(frames: Tensor) -> Tensor:
    """Four neighbouring frames side by side: ``... t d`` to ``... t/4 4d``."""
    return frames.reshape(*frames.shape[:-2], -1, FRAMES_PER_TOKEN * frames.shape[-1])


def _clips(segments: Sequence[Tensor], tokens: Tensor, config: Qwen2Config) -> list[Tensor]:
    """Segments of clips put together, as many as fill the room of each clip in the prompts."""
    begins = (tokens.flatten() == config.kimia_media_begin).nonzero().flatten().tolist()
    ends = (tokens.flatten() == config.kimia_media_end).nonzero().flatten().tolist()
    remaining, clips = list(segments), []
    for begin, end in zip(begins, ends, strict=True):
        clip = [remaining.pop(0)]
        while sum(map(len, clip)) < end - begin - 1:
            clip.append(remaining.pop(0))
        clips.append(torch.cat(clip))
    return clips


def _causal(input_ids: Tensor, attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: nothing where a position may look, else very little."""
    n = input_ids.shape[1]
    allowed = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
    if attention_mask is not None:
        allowed = allowed & attention_mask.bool()[:, None, None]
    allowed = allowed | torch.eye(n, dtype=torch.bool)  # padding looks at itself: no NaN
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
