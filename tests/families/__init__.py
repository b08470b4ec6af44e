"""The registry of model families under test; one file of this folder each.

A new family is one file that makes a `Family`, and one line here.
"""

from __future__ import annotations

from families.audio_spectrogram_transformer import AST
from families.audioflamingo3 import AUDIOFLAMINGO3
from families.base import Family
from families.glmasr import GLMASR
from families.granite_speech import GRANITE_SPEECH
from families.moss_transcribe_diarize import MOSS_TRANSCRIBE_DIARIZE
from families.musicflamingo import MUSICFLAMINGO
from families.qwen2_5_omni import QWEN2_5_OMNI
from families.qwen2_audio import QWEN2_AUDIO
from families.qwen3_asr import QWEN3_ASR
from families.qwen3_omni import QWEN3_OMNI
from families.voxtral import VOXTRAL
from families.wav2vec2 import SPEECH_ENCODERS
from families.wavlm import WAVLM, WAVLM_CTC
from families.whisper import WHISPER

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        WHISPER,
        QWEN2_AUDIO,
        AUDIOFLAMINGO3,
        MUSICFLAMINGO,
        VOXTRAL,
        GLMASR,
        GRANITE_SPEECH,
        MOSS_TRANSCRIBE_DIARIZE,
        QWEN2_5_OMNI,
        QWEN3_ASR,
        QWEN3_OMNI,
        *SPEECH_ENCODERS,
        WAVLM,
        WAVLM_CTC,
        AST,
    )
}
