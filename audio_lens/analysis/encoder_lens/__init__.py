"""The decoder on every stream of the encoder, and what a text comes from.

After Beyond Transcription (2508.15882) and DecoderLens (2310.03686).
"""

from audio_lens.analysis.encoder_lens.hallucination import hallucination
from audio_lens.analysis.encoder_lens.lens import analyse, commit, encoder_lens
from audio_lens.analysis.encoder_lens.loops import (
    Loop,
    compression_ratio,
    find_loop,
    is_looping,
    loops,
)
from audio_lens.analysis.encoder_lens.mixing import mix
from audio_lens.analysis.encoder_lens.saturation import saturation
from audio_lens.analysis.encoder_lens.streams import first_stable

__all__ = [
    "Loop",
    "analyse",
    "commit",
    "compression_ratio",
    "encoder_lens",
    "find_loop",
    "first_stable",
    "hallucination",
    "is_looping",
    "loops",
    "mix",
    "saturation",
]
