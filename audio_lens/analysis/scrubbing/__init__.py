"""Causal scrubbing: does a hypothesis of what depends on what keep the model's answers?"""

from audio_lens.analysis.scrubbing.hypothesis import Hypothesis, Node
from audio_lens.analysis.scrubbing.lending import LendingError
from audio_lens.analysis.scrubbing.scrub import scrub
from audio_lens.analysis.scrubbing.study import study

__all__ = ["Hypothesis", "LendingError", "Node", "scrub", "study"]
