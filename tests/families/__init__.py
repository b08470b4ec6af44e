"""The registry of model families under test; one file of this folder each.

A new family is one file that makes a `Family`, and one line here.
"""

from __future__ import annotations

from families.audio_spectrogram_transformer import AST
from families.audioflamingo3 import AUDIOFLAMINGO3
from families.base import Family
from families.beats import BEATS
from families.desta import DESTA2, DESTA25
from families.glmasr import GLMASR
from families.granite_speech import GRANITE_SPEECH
from families.kimi_audio import KIMI_AUDIO
from families.kyutai_stt import KYUTAI_STT
from families.llama_omni import LLAMA_OMNI, LLAMA_OMNI2
from families.moshi import MOSHI
from families.moss_transcribe_diarize import MOSS_TRANSCRIBE_DIARIZE
from families.musicflamingo import MUSICFLAMINGO
from families.musicgen import MUSICGEN
from families.qwen2_5_omni import QWEN2_5_OMNI
from families.qwen2_audio import QWEN2_AUDIO
from families.qwen3_asr import QWEN3_ASR
from families.qwen3_omni import QWEN3_OMNI
from families.qwen_audio import QWEN_AUDIO
from families.salmonn import SALMONN
from families.soundwave import SOUNDWAVE
from families.voxtral import VOXTRAL
from families.wav2vec2 import SPEECH_ENCODERS
from families.wavlm import WAVLM, WAVLM_CTC
from families.whisper import WHISPER, WHISPER_CLASSES

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        WHISPER,
        WHISPER_CLASSES,
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
        BEATS,
        SALMONN,
        DESTA2,
        DESTA25,
        LLAMA_OMNI,
        LLAMA_OMNI2,
        QWEN_AUDIO,
        KIMI_AUDIO,
        SOUNDWAVE,
        MOSHI,
        KYUTAI_STT,
        MUSICGEN,
    )
}
