"""LoRA adapters: in which blocks they learn most, and what they do to each layer."""

from audio_lens.analysis.adapters.aligning import alignment
from audio_lens.analysis.adapters.classifying import classifier_lens
from audio_lens.analysis.adapters.contributing import contributions
from audio_lens.analysis.adapters.counting import directions
from audio_lens.analysis.adapters.erasing import erasure
from audio_lens.analysis.adapters.groups import layer_groups
from audio_lens.analysis.adapters.study import study
from audio_lens.analysis.adapters.sweeping import FrozenError, sweep
from audio_lens.analysis.adapters.training import train
from audio_lens.analysis.adapters.wearing import load, save, take_off

__all__ = [
    "FrozenError",
    "alignment",
    "classifier_lens",
    "contributions",
    "directions",
    "erasure",
    "layer_groups",
    "load",
    "save",
    "study",
    "sweep",
    "take_off",
    "train",
]
