"""Which directions carry the answer: bases from pairs, and what exchanging them does."""

from audio_lens.analysis.subspaces.bases import basis, both_sides, differences
from audio_lens.analysis.subspaces.curve import curve, elbow
from audio_lens.analysis.subspaces.effects import effects, transfer
from audio_lens.analysis.subspaces.study import study
from audio_lens.analysis.subspaces.subspace import Subspace, orthonormal

__all__ = [
    "Subspace",
    "basis",
    "both_sides",
    "curve",
    "differences",
    "effects",
    "elbow",
    "orthonormal",
    "study",
    "transfer",
]
