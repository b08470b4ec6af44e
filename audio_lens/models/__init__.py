"""Hooked re-implementations of audio models, one file per family."""

from audio_lens.catalogue import Catalogue
from audio_lens.models import compose, families
from audio_lens.models.base import HookedAudioTransformer
from audio_lens.models.compose import CompositionError, HookedComposed, Placeholder
from audio_lens.models.config import AudioConfig, LoadingError
from audio_lens.models.layers import PartConfig
from audio_lens.models.loading.lora import LoraError
from audio_lens.models.loading.placement import PlacementError
from audio_lens.models.mixins.vocabulary import TokenError
from audio_lens.models.part import Part
from audio_lens.models.parts.codecs import HookedCodec
from audio_lens.models.parts.connectors import (
    Connector,
    ConnectorConfig,
    LinearConnector,
    MLPConnector,
    StackingConnector,
)
from audio_lens.models.parts.language_model import LanguageModel

__all__ = [
    "AudioConfig",
    "Catalogue",
    "CompositionError",
    "Connector",
    "ConnectorConfig",
    "HookedAudioTransformer",
    "HookedCodec",
    "HookedComposed",
    "LanguageModel",
    "LinearConnector",
    "LoadingError",
    "LoraError",
    "MLPConnector",
    "Part",
    "PartConfig",
    "Placeholder",
    "PlacementError",
    "StackingConnector",
    "TokenError",
    "compose",
    "families",
]
