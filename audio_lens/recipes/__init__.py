"""Published models that transformers does not have, put together from their published pieces.

One file each: the shape, the connector, the name table of the published weights, applied strictly,
and a function that loads it. No code of a checkpoint is run.
"""

from audio_lens.recipes.desta import desta2, desta25
from audio_lens.recipes.kimi_audio import kimi_audio
from audio_lens.recipes.llama_omni import llama_omni, llama_omni2
from audio_lens.recipes.openai_whisper import openai_whisper
from audio_lens.recipes.qwen_audio import qwen_audio
from audio_lens.recipes.salmonn import salmonn
from audio_lens.recipes.soundwave import soundwave

__all__ = [
    "desta2",
    "desta25",
    "kimi_audio",
    "llama_omni",
    "llama_omni2",
    "openai_whisper",
    "qwen_audio",
    "salmonn",
    "soundwave",
]
