"""Models put together from an encoder, a connector and a language model."""

from audio_lens.models.compose.assemble import Placeholder, compose
from audio_lens.models.compose.model import ComposedConfig, CompositionError, HookedComposed

__all__ = ["ComposedConfig", "CompositionError", "HookedComposed", "Placeholder", "compose"]
