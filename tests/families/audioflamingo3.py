"""Audio Flamingo 3: windows, masked padding, pairs of frames pooled, an MLP, Qwen2."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from families.audio_llms import TINY_EAR, config, windowed_family
from families.base import AUDIO_TOKEN, TINY_LANGUAGE_MODEL, ready, whisper_biases

EAR = {"model_type": "audioflamingo3_encoder", **TINY_EAR}
LANGUAGE = {"model_type": "qwen2", "rope_parameters": None, **TINY_LANGUAGE_MODEL}


def tokens_of(n_mel: int) -> int:
    """Tokens of a window with so many mel frames."""
    return ((n_mel - 1) // 2 + 1) // 2


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "eager", **overrides: Any
) -> transformers.AudioFlamingo3ForConditionalGeneration:
    options = {"audio_token_id": AUDIO_TOKEN, **overrides}
    hf_config = config(transformers.AudioFlamingo3Config, EAR, LANGUAGE, options)
    model = transformers.AudioFlamingo3ForConditionalGeneration(hf_config)
    return ready(model, seed, dtype, attn)


AUDIOFLAMINGO3 = windowed_family(
    "audioflamingo3",
    tokens_of,
    build,
    {
        "128 mels": {"ear_num_mel_bins": 128},
        "no biases in the connector": {"projector_bias": False},
        "another activation in the connector": {"projector_hidden_act": "relu"},
        "slow rotation": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    },
    float16_biases=whisper_biases,
)
