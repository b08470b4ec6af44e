"""Which neurons belong to a class, and what is lost without them (2601.03115, 2602.15307)."""

from audio_lens.analysis.neurons.comparing import compare
from audio_lens.analysis.neurons.deactivating import deactivation, specificity
from audio_lens.analysis.neurons.dosing import dose
from audio_lens.analysis.neurons.injecting import inject
from audio_lens.analysis.neurons.logged import logged, right, site_of
from audio_lens.analysis.neurons.scoring import scores
from audio_lens.analysis.neurons.selection import Selection, select
from audio_lens.analysis.neurons.selectors import KINDS
from audio_lens.analysis.neurons.study import study

__all__ = [
    "KINDS",
    "Selection",
    "compare",
    "deactivation",
    "dose",
    "inject",
    "logged",
    "right",
    "scores",
    "select",
    "site_of",
    "specificity",
    "study",
]
