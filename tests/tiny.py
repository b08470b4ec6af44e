"""Tiny random models and inputs of Whisper and Qwen2-Audio, and the folder of real data.

What all families have in common, and every other family, is in `families`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import Tensor

from families import FAMILIES as ALL_FAMILIES
from families.base import AUDIO_TOKEN, END, FIRST_WORD, PAD, START, randomise
from families.qwen2_audio import audio_tokens
from families.qwen2_audio import build as tiny_qwen2_audio_hf
from families.whisper import N_FRAMES
from families.whisper import build as tiny_whisper_hf

__all__ = [
    "AUDIO_TOKEN",
    "END",
    "FAMILIES",
    "FIRST_WORD",
    "N_FRAMES",
    "PAD",
    "START",
    "audio_tokens",
    "data_dir",
    "hf_inputs",
    "randomise",
    "tiny_hf",
    "tiny_qwen2_audio_hf",
    "tiny_whisper_hf",
]

FAMILIES = ("whisper", "qwen2_audio")


def tiny_hf(family: str, **options: Any) -> transformers.PreTrainedModel:
    """A random Hugging Face model of the family."""
    return ALL_FAMILIES[family].build(**options)


def hf_inputs(family: str, *lengths: Any, **options: Any) -> dict[str, Tensor]:
    """What a Hugging Face processor would return, at random; see `families`."""
    return ALL_FAMILIES[family].batch(*lengths, **options)


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
