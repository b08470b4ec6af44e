"""Results as plain numbers and strings, for JSON."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from audio_lens.timeline import Band, Span


def plain(values: Tensor, low: Tensor | None, high: Tensor | None) -> dict[str, Any]:
    """Nested lists of values and of both bounds, None for NaN and what is not finite."""
    found: dict[str, Any] = {"values": _finite(values.tolist())}
    bounds = None if low is None or high is None else [low.tolist(), high.tolist()]
    return found | {"interval": _finite(bounds)}


def coordinate(at: Any) -> Any:
    """A coordinate as JSON holds it: spans and bands by their bounds and labels."""
    if isinstance(at, Span):
        clip = {"clip": at.clip} if at.clip else {}
        return {"start_s": at.start_s, "end_s": at.end_s, "label": at.label} | clip
    if isinstance(at, Band):
        return {"low_hz": at.low_hz, "high_hz": at.high_hz, "label": at.label}
    return at


def _finite(numbers: Any) -> Any:
    if isinstance(numbers, list):
        return [_finite(number) for number in numbers]
    return numbers if numbers is None or math.isfinite(numbers) else None
