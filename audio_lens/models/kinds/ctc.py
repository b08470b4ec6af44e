"""How a model spells by CTC, asked of any model."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from audio_lens.inputs import InputError
from audio_lens.models.config import AudioConfig
from audio_lens.models.kinds.encoder_only import CTCConfig


@runtime_checkable
class _MaySpell(Protocol):
    """What configs of families have whose checkpoints may have a CTC head."""

    ctc: CTCConfig | None


def ctc_of(cfg: AudioConfig) -> CTCConfig:
    """How the CTC head of a model spells: its blank, and how it was trained.

    Raises:
        InputError: a model without a CTC head.
    """
    ctc = cfg.ctc if isinstance(cfg, _MaySpell) else None
    if ctc is None:
        raise InputError(f"{cfg.model_name} has no CTC head")
    return ctc
