"""What can be read from activations by linear means, and what is left once it is erased."""

from audio_lens.analysis.probes.directions import direction, reflection
from audio_lens.analysis.probes.erasing import erase
from audio_lens.analysis.probes.probing import probe
from audio_lens.analysis.probes.study import analyse, erased, layers

__all__ = ["analyse", "direction", "erase", "erased", "layers", "probe", "reflection"]
