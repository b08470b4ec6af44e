"""What results of this package say in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from audio_lens.results import LabelledValue, Result

FLAT = 1e-9  # effects below it are none: what an unused block gives beside rounding


def amount(cell: Any) -> str:
    """A value with its interval: ``2.54 [2.27, 2.82]``."""
    if cell.low is None or not math.isfinite(cell.low):
        return f"{cell.value:.3g}"
    return f"{cell.value:.3g} [{cell.low:.3g}, {cell.high:.3g}]"


def moved(value: float) -> str:
    """Which way a metric goes that loses so much."""
    return "falls" if value > 0 else "rises"


def place_of(cell: LabelledValue, window: int = 1) -> str:
    """Blocks and head of a cell."""
    first = cell.at["layer"]
    blocks = f"block {first}" if window == 1 else f"blocks {first} to {first + window - 1}"
    head = cell.at.get("head")
    return blocks if head is None else f"head {head} of {blocks}"


def strongest(result: Result, metric: str, window: int, of: float) -> str:
    """Where a metric loses or gains most."""
    top = result.top(1, metric)
    if not top or abs(top[0].value) < FLAT:
        return f"{metric} stays as it is in every block"
    cell = top[0]
    return (
        f"{metric} {moved(cell.value)} most in {place_of(cell, window)}: by {amount(sized(cell))} "
        f"of {of:.3g}"
    )


def sized(cell: LabelledValue) -> LabelledValue:
    """The cell with its sign turned where that makes it positive."""
    if cell.value >= 0 or cell.low is None or cell.high is None:
        return cell if cell.value >= 0 else LabelledValue(-cell.value, cell.at)
    return LabelledValue(-cell.value, cell.at, -cell.high, -cell.low)


def largest(result: Result, metrics: Sequence[str]) -> str:
    """The largest cell of some metrics, in size."""
    tops = {metric: result.top(1, metric) for metric in metrics}
    told = (f"{metric} at most {abs(top[0].value):.2g}" for metric, top in tops.items() if top)
    return ", ".join(told)


def each(result: Result, metric: str) -> Iterator[str]:
    """Every value of a curve."""
    return (f"{cell.value:.3g}" for cell in result.cells(metric))
