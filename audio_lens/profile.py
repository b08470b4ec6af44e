"""The former name of `audio_lens.analysis.time_profile`."""

from audio_lens.analysis.time_profile import time_profile

__all__ = ["time_profile"]
