"""LoRA adapters: in which blocks they learn most, and what they do to each layer."""

from audio_lens.analysis.adapters import wearing
from audio_lens.analysis.adapters.groups import layer_groups
from audio_lens.analysis.adapters.sweep import FrozenError, sweep
from audio_lens.analysis.adapters.training import train
from audio_lens.analysis.adapters.wearing import load, save, take_off
from audio_lens.models import LoraError

__all__ = [
    "FrozenError",
    "LoraError",
    "layer_groups",
    "load",
    "save",
    "sweep",
    "take_off",
    "train",
    "wearing",
]
