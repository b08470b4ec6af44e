"""MOSS-Transcribe-Diarize: windows of Whisper, four frames to a token, seconds written between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from audio_lens import AudioInputs
from families.audio_llms import TINY_EAR, config, windowed_batch, windowed_family
from families.base import (
    AUDIO_TOKEN,
    TINY_LANGUAGE_MODEL,
    clips_of,
    decoder_attended,
    length_mask,
    ready,
)


def tokens_of(n_mel: int) -> int:
    """Tokens of a window with so many mel frames."""
    return -(-((n_mel - 1) // 2 + 1) // 4)


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "eager", **overrides: Any
) -> transformers.MossTranscribeDiarizeForConditionalGeneration:
    options = {"audio_token_id": AUDIO_TOKEN, "tie_word_embeddings": False, **overrides}
    ties = options.pop("tie_word_embeddings")
    text = {"model_type": "qwen3", "head_dim": 8, **TINY_LANGUAGE_MODEL}
    ear = {"model_type": "moss_transcribe_diarize_audio", **TINY_EAR}
    hf_config = config(transformers.MossTranscribeDiarizeConfig, ear, text, options)
    hf_config.tie_word_embeddings = hf_config.text_config.tie_word_embeddings = ties
    model = transformers.MossTranscribeDiarizeForConditionalGeneration(hf_config)
    return ready(model, seed, dtype, attn)


def batch(lengths: Sequence[int | Sequence[int]] = (201, 173), **options: Any) -> dict[str, Tensor]:
    """As the processor gives it: with a mask of every clip's samples."""
    samples = [160 * n for prompt in clips_of(lengths) for n in prompt]
    made = windowed_batch(tokens_of, lengths=lengths, **options)
    return {**made, "padding_mask": length_mask(samples, max(samples))}


def compared(name: str, tensor: Tensor, inputs: AudioInputs) -> Tensor:
    """Of the connector the groups that become tokens, which is all that Hugging Face computes."""
    if not name.startswith("connector") or tensor.ndim == 2:
        return decoder_attended(name, tensor, inputs)
    counts = [tokens_of(inputs.n_valid(segment)) for segment in range(len(tensor))]
    return tensor[length_mask(counts, tensor.shape[1]).bool()]


MOSS_TRANSCRIBE_DIARIZE = windowed_family(
    "moss_transcribe_diarize",
    tokens_of,
    build,
    {
        "no biases in the connector": {"projector_bias": False},
        "tied": {"tie_word_embeddings": True},
    },
    batch=batch,
    mask_of=compared,
    connector_reach_s=0.05,
)
