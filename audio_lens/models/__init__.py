"""Hooked re-implementations of audio models, one file per family."""

import importlib
import pkgutil

from audio_lens.models.base import HookedAudioTransformer
from audio_lens.models.config import AudioConfig, LoadingError
from audio_lens.models.vocabulary import TokenError

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    if not _module.ispkg:
        importlib.import_module(_module.name)  # families enter themselves into the registry

__all__ = ["AudioConfig", "HookedAudioTransformer", "LoadingError", "TokenError"]
