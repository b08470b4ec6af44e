"""Hooked re-implementations of audio models, one file per family."""

from audio_lens.models.base import HookedAudioTransformer
from audio_lens.models.config import AudioConfig
from audio_lens.models.loading import LoadingError
from audio_lens.models.vocabulary import TokenError

__all__ = ["AudioConfig", "HookedAudioTransformer", "LoadingError", "TokenError"]
