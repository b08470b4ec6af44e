"""Qwen2-Audio: Whisper's ear, pooled in pairs, one linear map, and a Qwen2 language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn

from families.audio_llms import heard_and_written, mel_batch, mel_clips
from families.base import (
    AUDIO_TOKEN,
    TINY_LANGUAGE_MODEL,
    Family,
    draw_clips,
    draw_decoder,
    ready,
    whisper_biases,
)
from families.whisper import N_FRAMES, TINY_EAR, mel_features


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "eager", **overrides: Any
) -> transformers.Qwen2AudioForConditionalGeneration:
    """A random Qwen2-Audio; ``overrides`` go to the encoder's config where it has that name."""
    ear = {key: overrides.pop(key, value) for key, value in TINY_EAR.items()}
    config = transformers.Qwen2AudioConfig(
        audio_config=transformers.Qwen2AudioEncoderConfig(**ear).to_dict(),
        text_config=transformers.Qwen2Config(**{**TINY_LANGUAGE_MODEL, **overrides}).to_dict(),
        audio_token_index=AUDIO_TOKEN,
        tie_word_embeddings=overrides.get("tie_word_embeddings", False),
    )
    model = transformers.Qwen2AudioForConditionalGeneration(config)
    return ready(model, seed, dtype, attn)


def audio_tokens(n_mel: int) -> int:
    """Audio tokens Qwen2-Audio makes of a clip of ``n_mel`` mel frames."""
    return ((n_mel - 1) // 2 + 1) // 2


def batch(
    lengths: Sequence[int | Sequence[int]] = (201, 173), n_frames: int = N_FRAMES, **options: Any
) -> dict[str, Tensor]:
    """Prompts about clips of so many mel frames, with options of `mel_batch`."""
    return mel_batch(audio_tokens, n_frames, lengths, **options)


def reference(hf: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names."""
    tower = hf.model.audio_tower
    leaving = {"encoder.hook_out": tower, "connector.hook_out": hf.model.multi_modal_projector}
    return heard_and_written(hf, batch, tower.layers, leaving)


def draw(data: st.DataObject) -> tuple[dict, dict]:
    """Any shape of model, with any number of clips of any length."""
    model = {
        "d_model": data.draw(st.sampled_from((8, 24)), "d_model"),
        "encoder_layers": data.draw(st.integers(1, 3), "encoder_layers"),
        **draw_decoder(data),
        "head_dim": data.draw(st.sampled_from((4, 10)), "head_dim"),
    }
    return model, draw_clips(data, st.integers(4, N_FRAMES))


BATCHES: dict[str, dict] = {
    "one prompt, 173 mel frames": {"lengths": [173], "words": [5]},
    "one prompt, 199 mel frames": {"lengths": [199], "words": [5]},
    "one prompt, 201 mel frames": {"lengths": [201], "words": [5]},
    "the whole clip": {"lengths": [N_FRAMES], "words": [5]},
    "right padding": {"lengths": [199, 173], "padding": "right"},
    "left padding": {"lengths": [199, 173], "padding": "left"},
    "several clips": {"lengths": [[60, 101], [173, 40, 7]], "words": [4, 8]},
    "one-token clip": {"lengths": [4], "words": [4]},
}
"""By mel frames; Qwen-Audio, which counts tokens alike, has these too."""


QWEN2_AUDIO = Family(
    name="qwen2_audio",
    build=build,
    batch=batch,
    reference=reference,
    models={
        "tiny": {},
        "128 mels": {"num_mel_bins": 128},
        "no GQA": {"num_key_value_heads": 6},
        "one key-value head": {"num_key_value_heads": 1},
        "wide heads": {"head_dim": 16},
        "slow rotation": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    },
    model_batches={"128 mels": {"n_mels": 128}},
    batches={
        **BATCHES,
        "one placeholder": {"lengths": [173], "words": [4], "single_placeholder": True},
        "one placeholder per clip, right": {
            "lengths": [[60, 101], 199],
            "words": [3, 6],
            "padding": "right",
            "single_placeholder": True,
        },
        "one placeholder per clip, left": {
            "lengths": [[60, 101], 4],
            "words": [6, 3],
            "padding": "left",
            "single_placeholder": True,
        },
    },
    no_float64=["left padding", "one placeholder per clip, left"],
    bfloat16=["right padding", "left padding"],
    float16_biases=whisper_biases,
    draw=draw,
    clips=mel_clips(audio_tokens, mel_features),
    durations=[(1.0,), (2.2,), (0.6, 2.1)],
)
