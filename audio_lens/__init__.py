"""audio_lens: see, patch and time every activation of models that listen."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audio_lens import corruptions, metrics, patching, report
    from audio_lens.alignment import Alignment, AlignmentError, align, read_textgrid
    from audio_lens.audio import AudioError
    from audio_lens.cache import AudioCache
    from audio_lens.hooks import DeadHookError, HookNameError, HookPoint
    from audio_lens.inputs import AudioInputs, InputError
    from audio_lens.models import HookedAudioTransformer, LoadingError, TokenError
    from audio_lens.pairs import Pair, minimal_pair
    from audio_lens.synthesis import Spoken, SynthesisError, can_speak, speak
    from audio_lens.timeline import Band, Span, Timeline

_HOME = {
    "Alignment": "alignment",
    "AlignmentError": "alignment",
    "align": "alignment",
    "read_textgrid": "alignment",
    "AudioError": "audio",
    "AudioCache": "cache",
    "DeadHookError": "hooks",
    "HookNameError": "hooks",
    "HookPoint": "hooks",
    "AudioInputs": "inputs",
    "InputError": "inputs",
    "HookedAudioTransformer": "models",
    "LoadingError": "models",
    "TokenError": "models",
    "Pair": "pairs",
    "minimal_pair": "pairs",
    "Spoken": "synthesis",
    "SynthesisError": "synthesis",
    "can_speak": "synthesis",
    "speak": "synthesis",
    "Band": "timeline",
    "Span": "timeline",
    "Timeline": "timeline",
}
_MODULES = ("corruptions", "metrics", "patching", "report")

__all__ = [
    "Alignment",
    "AlignmentError",
    "AudioCache",
    "AudioError",
    "AudioInputs",
    "Band",
    "DeadHookError",
    "HookNameError",
    "HookPoint",
    "HookedAudioTransformer",
    "InputError",
    "LoadingError",
    "Pair",
    "Span",
    "Spoken",
    "SynthesisError",
    "Timeline",
    "TokenError",
    "align",
    "can_speak",
    "corruptions",
    "metrics",
    "minimal_pair",
    "patching",
    "read_textgrid",
    "report",
    "speak",
]


def __getattr__(name: str) -> Any:
    """Import on first use: torch and transformers take seconds, the command line's help none."""
    if name in _MODULES:
        return importlib.import_module(f"audio_lens.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"audio_lens.{_HOME[name]}"), name)
    raise AttributeError(f"module 'audio_lens' has no attribute {name!r}")
