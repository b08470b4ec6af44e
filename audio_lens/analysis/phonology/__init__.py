"""Whether speech sounds add up: [b] as [d] - [t] + [p] in the activations of a model."""

from audio_lens.analysis.phonology.arithmetic import analogies, consistency
from audio_lens.analysis.phonology.features import ARPABET, features, kinds_of
from audio_lens.analysis.phonology.sounds import Sounds, sounds

__all__ = ["ARPABET", "Sounds", "analogies", "consistency", "features", "kinds_of", "sounds"]
