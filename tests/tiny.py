"""Tiny random Hugging Face models and inputs for the tests: every parameter is random.

Hugging Face initialises biases to 0 and norms to 1, which hides swapped norms and lost biases.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

AUDIO_TOKEN = 90
PAD, START, END = 0, 1, 2
FIRST_WORD = 5  # ids from here on, but the audio token, are words
N_FRAMES = 220  # mel frames of the tiny models: 2.2 s
FAMILIES = ("whisper", "qwen2_audio")

_WHISPER = {
    "vocab_size": 100,
    "num_mel_bins": 20,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "d_model": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_source_positions": N_FRAMES // 2,
    "max_target_positions": 40,
    "decoder_start_token_id": START,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_EAR = {
    "num_mel_bins": 20,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "d_model": 32,
    "max_source_positions": N_FRAMES // 2,
}
_LANGUAGE = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}


# -------------------------------------------------------------------------------- models


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, in place: norm gains about 1, all else about 0; ready to run."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            is_gain = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_gain else 0.15 * noise)
    return model.eval()


def tiny_whisper_hf(
    seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "eager", **overrides: Any
) -> transformers.WhisperForConditionalGeneration:
    """A random Whisper; ``overrides`` go to its config."""
    config = transformers.WhisperConfig(**{**_WHISPER, **overrides})
    config._attn_implementation = attn
    return randomise(transformers.WhisperForConditionalGeneration(config), seed).to(dtype)


def tiny_qwen2_audio_hf(
    seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "eager", **overrides: Any
) -> transformers.Qwen2AudioForConditionalGeneration:
    """A random Qwen2-Audio; ``overrides`` go to the encoder's config where it has that name."""
    ear = {key: overrides.pop(key, value) for key, value in _EAR.items()}
    config = transformers.Qwen2AudioConfig(
        audio_config=transformers.Qwen2AudioEncoderConfig(**ear).to_dict(),
        text_config=transformers.Qwen2Config(**{**_LANGUAGE, **overrides}).to_dict(),
        audio_token_index=AUDIO_TOKEN,
        tie_word_embeddings=overrides.get("tie_word_embeddings", False),
    )
    model = transformers.Qwen2AudioForConditionalGeneration(config)
    model.set_attn_implementation(attn)
    return randomise(model, seed).to(dtype)


def tiny_hf(family: str, **options: Any) -> transformers.PreTrainedModel:
    """`tiny_whisper_hf` or `tiny_qwen2_audio_hf`."""
    return {"whisper": tiny_whisper_hf, "qwen2_audio": tiny_qwen2_audio_hf}[family](**options)


# -------------------------------------------------------------------------------- inputs


def hf_inputs(
    family: str,
    lengths: Sequence[int | Sequence[int]] = (201, 173),
    words: Sequence[int] = (6, 4),
    padding: str = "right",
    n_mels: int = 20,
    n_frames: int = N_FRAMES,
    single_placeholder: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """What a Hugging Face processor would return, at random.

    Args:
        lengths: mel frames of the clip of each prompt (or of its clips: Qwen2-Audio).
        words: text tokens of each prompt.
        padding: side of the shorter prompts that is padded, "left" or "right".
        single_placeholder: one audio token per clip, as old processors wrote.
    """
    generator = torch.Generator().manual_seed(seed)
    clips = [[n] if isinstance(n, int) else list(n) for n in lengths]
    flat = [n for prompt in clips for n in prompt]
    features = torch.randn(len(flat), n_mels, n_frames, generator=generator, dtype=dtype)
    rows = [
        torch.randint(FIRST_WORD, AUDIO_TOKEN, (count,), generator=generator).tolist()
        for count in words
    ]
    if family == "whisper":
        tokens, mask = _padded([[START, *row] for row in rows], padding)
        return {
            "input_features": features,
            "decoder_input_ids": tokens,
            "decoder_attention_mask": mask,
        }
    rows = [_with_clips(row, n, single_placeholder) for row, n in zip(rows, clips, strict=True)]
    tokens, mask = _padded(rows, padding)
    frames = torch.arange(n_frames) < torch.tensor(flat)[:, None]
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "input_features": features,
        "feature_attention_mask": frames.long(),
    }


def audio_tokens(n_mel: int) -> int:
    """Audio tokens Qwen2-Audio makes of a clip of ``n_mel`` mel frames."""
    return ((n_mel - 1) // 2 + 1) // 2


def _with_clips(row: list[int], lengths: Sequence[int], single: bool) -> list[int]:
    """A word, the clips with a word after each, and the remaining words."""
    made, words = row[:1], iter(row[1:])
    for n_mel in lengths:
        made += [AUDIO_TOKEN] * (1 if single else audio_tokens(n_mel))
        made += [next(words)]
    return made + list(words)


def _padded(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))

    def pad(row: list[int], filler: int) -> list[int]:
        gap = [filler] * (width - len(row))
        return gap + row if side == "left" else row + gap

    tokens = torch.tensor([pad(row, PAD) for row in rows])
    mask = torch.tensor([pad([1] * len(row), 0) for row in rows])
    return tokens, mask


# -------------------------------------------------------------------------------- real data


def data_dir() -> Path:
    """The folder of real speech and weights; skips the test where it is missing."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("AUDIO_LENS_DATA") or beside)
    if not (path / "fsdd").is_dir():
        pytest.skip(
            f"needs real speech and weights (fsdd/, models/ ...), which are not at {path}: "
            "set the environment variable AUDIO_LENS_DATA to the folder that holds them"
        )
    return path
