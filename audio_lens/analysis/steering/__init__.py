"""Directions that steer: found, saved, swept, watched while a model writes, and what else does it.

Beside them the baselines that leave activations alone: late states put back (2606.18924), contrast
with the audio absent (2506.07233), gated correction by the same audio (2606.05161).
"""

from audio_lens.analysis.steering.back_patching import back_patch
from audio_lens.analysis.steering.contrasting import contrast, decode
from audio_lens.analysis.steering.directions import Direction, Toward
from audio_lens.analysis.steering.finding import KINDS, direction, directions
from audio_lens.analysis.steering.monitoring import Written, monitor, write
from audio_lens.analysis.steering.rules import AAD, GACL, TAD, Rule
from audio_lens.analysis.steering.study import study
from audio_lens.analysis.steering.sweeping import sweep

__all__ = [
    "AAD",
    "GACL",
    "KINDS",
    "TAD",
    "Direction",
    "Rule",
    "Toward",
    "Written",
    "back_patch",
    "contrast",
    "decode",
    "direction",
    "directions",
    "monitor",
    "study",
    "sweep",
    "write",
]
