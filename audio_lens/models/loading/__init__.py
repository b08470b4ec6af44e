"""From checkpoints to hooked models: files, weights, adapters, devices."""

from audio_lens.models.config import LoadingError
from audio_lens.models.loading.checkpoints import (
    EMBEDDED,
    embedded_path,
    load_pretrained,
    processor_of,
    read_model,
    take_over,
)
from audio_lens.models.registry import FAMILIES, family_of

__all__ = [
    "EMBEDDED",
    "FAMILIES",
    "LoadingError",
    "embedded_path",
    "family_of",
    "load_pretrained",
    "processor_of",
    "read_model",
    "take_over",
]
