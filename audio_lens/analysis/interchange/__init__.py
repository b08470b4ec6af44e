"""Interchange interventions: does a run answer as the one whose activations it takes?"""

from audio_lens.analysis.interchange.accuracy import iia
from audio_lens.analysis.interchange.aligning import align
from audio_lens.analysis.interchange.das import das
from audio_lens.analysis.interchange.ravel import ravel
from audio_lens.analysis.interchange.sources import shuffled
from audio_lens.analysis.interchange.study import study

__all__ = ["align", "das", "iia", "ravel", "shuffled", "study"]
