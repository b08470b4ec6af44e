"""Hooked re-implementations of audio models, one file per family."""

from audio_lens.models import compose, families
from audio_lens.models.base import HookedAudioTransformer
from audio_lens.models.config import AudioConfig, LoadingError
from audio_lens.models.mixins.vocabulary import TokenError

__all__ = [
    "AudioConfig",
    "HookedAudioTransformer",
    "LoadingError",
    "TokenError",
    "compose",
    "families",
]
