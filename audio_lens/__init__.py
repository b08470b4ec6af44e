"""audio_lens: see, patch and time every activation of models that listen."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from audio_lens import metrics, patching, report
    from audio_lens.audio import AudioError
    from audio_lens.cache import AudioCache
    from audio_lens.hooks import DeadHookError, HookNameError, HookPoint
    from audio_lens.inputs import AudioInputs, InputError
    from audio_lens.models import HookedAudioTransformer, LoadingError, TokenError
    from audio_lens.timeline import Span, Timeline

_HOME = {
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
    "Span": "timeline",
    "Timeline": "timeline",
}
_MODULES = ("metrics", "patching", "report")

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
    "metrics",
    "patching",
    "report",
]


def __getattr__(name: str) -> Any:
    """Import on first use: torch and transformers take seconds, the command line's help none."""
    if name in _MODULES:
        return importlib.import_module(f"audio_lens.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"audio_lens.{_HOME[name]}"), name)
    raise AttributeError(f"module 'audio_lens' has no attribute {name!r}")
