"""Labelled values: what was measured, by named dimensions, with seconds and Hz along them."""

from audio_lens.results.labels import BATCH_DIMS, STRETCHES, LabelledValue, array, in_words
from audio_lens.results.result import Result
from audio_lens.results.stored import numbers_of

__all__ = ["BATCH_DIMS", "STRETCHES", "LabelledValue", "Result", "array", "in_words", "numbers_of"]
