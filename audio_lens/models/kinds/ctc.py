"""How a model spells by CTC, asked of any model."""

from __future__ import annotations

from audio_lens.inputs import InputError
from audio_lens.models.config import AudioConfig
from audio_lens.models.kinds.encoder_only import CTCConfig, EncoderOnlyConfig


def ctc_of(cfg: AudioConfig) -> CTCConfig:
    """How the CTC head of a model spells: its blank, and how it was trained.

    Raises:
        InputError: a model without a CTC head.
    """
    if not isinstance(cfg, EncoderOnlyConfig):
        raise InputError(f"{cfg.family} has no CTC head")
    return cfg.need_ctc
