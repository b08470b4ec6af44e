"""Audio Flamingo 3: windows, masked padding, pairs of frames pooled, an MLP, Qwen2."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from families.audio_llms import (
    BATCHES,
    LONG_CLIPS,
    TINY_EAR,
    WINDOW_S,
    config,
    draw_windowed,
    reference,
    windowed_batch,
    windowed_clips,
)
from families.base import AUDIO_TOKEN, TINY_LANGUAGE_MODEL, Family, randomise

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
    model.set_attn_implementation(attn)
    return randomise(model, seed).to(dtype)


def batch(**options: Any) -> dict[str, Tensor]:
    return windowed_batch(tokens_of, **options)


AUDIOFLAMINGO3 = Family(
    name="audioflamingo3",
    build=build,
    batch=batch,
    reference=reference,
    models={
        "tiny": {},
        "128 mels": {"ear_num_mel_bins": 128},
        "no biases in the connector": {"projector_bias": False},
        "another activation in the connector": {"projector_hidden_act": "relu"},
        "slow rotation": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    },
    model_batches={"128 mels": {"n_mels": 128}},
    batches=BATCHES,
    no_float64=("left padding",),
    float16_biases=lambda hf: [layer.fc2.bias for layer in hf.model.audio_tower.layers[:2]],
    draw=draw_windowed,
    clips=windowed_clips(tokens_of),
    durations=[LONG_CLIPS[:1], LONG_CLIPS[1:2], LONG_CLIPS],
    segment_s=WINDOW_S,
)
