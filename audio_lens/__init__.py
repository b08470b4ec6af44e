"""audio_lens: see, patch and time every activation of models that listen."""

from audio_lens.audio import AudioError
from audio_lens.cache import AudioCache
from audio_lens.hooks import DeadHookError, HookNameError, HookPoint
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models import HookedAudioTransformer, LoadingError, TokenError
from audio_lens.timeline import Span, Timeline

__all__ = [
    "AudioCache",
    "AudioError",
    "AudioInputs",
    "DeadHookError",
    "HookNameError",
    "HookPoint",
    "HookedAudioTransformer",
    "InputError",
    "LoadingError",
    "Span",
    "Timeline",
    "TokenError",
]
