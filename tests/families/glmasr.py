"""GLM-ASR: an encoder with partly rotary positions, nothing masked, four frames to a token."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from families.audio_llms import N_FRAMES, config, windowed_family
from families.base import AUDIO_TOKEN, ready
from families.voxtral import LANGUAGE

EAR = {
    "model_type": "glmasr_encoder",
    "num_mel_bins": 20,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 4 * 32,
    "max_position_embeddings": N_FRAMES // 2,
    "rope_parameters": None,
}


def tokens_of(n_mel: int) -> int:
    """Tokens of a window with so many mel frames."""
    return ((n_mel - 1) // 2 + 1) // 4


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "eager", **overrides: Any
) -> transformers.GlmAsrForConditionalGeneration:
    options = {"audio_token_id": AUDIO_TOKEN, "tie_word_embeddings": False, **overrides}
    ties = options.pop("tie_word_embeddings")
    hf_config = config(transformers.GlmAsrConfig, EAR, LANGUAGE, options)
    hf_config.tie_word_embeddings = hf_config.text_config.tie_word_embeddings = ties
    model = transformers.GlmAsrForConditionalGeneration(hf_config)
    return ready(model, seed, dtype, attn)


GLMASR = windowed_family(
    "glmasr",
    tokens_of,
    build,
    {
        "128 mels": {"ear_num_mel_bins": 128},
        "tied": {"tie_word_embeddings": True},
        "no shared keys in the encoder": {"ear_num_key_value_heads": None},
        "whole heads turn": {
            "ear_rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500.0,
                "partial_rotary_factor": 1.0,
            }
        },
    },
    connector_reach_s=0.05,
)
