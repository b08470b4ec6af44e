"""Attention edited: is it used, by which blocks and heads, and what is lost without it."""

from audio_lens.analysis.knockout.heads import audio_specialists
from audio_lens.analysis.knockout.knocking import knock_out
from audio_lens.analysis.knockout.reading import mass, negative_scores
from audio_lens.analysis.knockout.rolling import rollout
from audio_lens.analysis.knockout.study import study
from audio_lens.analysis.knockout.zeroing import value_zeroing

__all__ = [
    "audio_specialists",
    "knock_out",
    "mass",
    "negative_scores",
    "rollout",
    "study",
    "value_zeroing",
]
