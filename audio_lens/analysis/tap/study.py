"""What ``audio-lens analyse tap`` and ``audio-lens tap`` run."""

from __future__ import annotations

from typing import Any

from audio_lens.analysis.tap.protocol import tap
from audio_lens.analysis.tap.report import Report
from audio_lens.items import Items, analysis
from audio_lens.models import HookedAudioTransformer


@analysis("tap")
def study(
    model: HookedAudioTransformer,
    items: Items,
    *,
    seed: int = 0,
    progress: bool | None = None,
    **options: Any,
) -> Report:
    """Where, when and in which directions is the answer carried: claims beside their controls?

    The pairs are the clips and their ``other_audio``.
    """
    return tap(model, items.pairs(stream="audio"), seed=seed, progress=progress, **options)
