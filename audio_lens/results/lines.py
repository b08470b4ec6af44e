"""Results as lines of a table: every cell with its interval, and how far controls reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from audio_lens.results.result import Result

MISSING = "\N{EN DASH}"


@dataclass(frozen=True)
class Line:
    """One row.

    Attributes:
        place: where the cell stands, in words; or the name of a control.
        numbers: in words, one for each metric.
    """

    place: str
    numbers: list[str]


def metrics_of(result: Result) -> list[str | None]:
    """The metrics of a result; of one alone None."""
    return list(result.coords["metric"]) if "metric" in result.dims else [None]


def metric_names(result: Result) -> list[str]:
    """What the columns of `lines` are called."""
    return [one or result.meta.get("metric", "value") for one in metrics_of(result)]


def lines(result: Result, most: int | None = None) -> list[Line]:
    """The cells in their order, with what all items give together.

    Args:
        result: of any axes.
        most: so many cells at most: those that are strongest in the first metric.
    """
    columns = [result.cells(metric) for metric in metrics_of(result)]
    kept = range(len(columns[0]))
    if most is not None and len(kept) > most:
        sizes = [abs(cell.value) if math.isfinite(cell.value) else -1.0 for cell in columns[0]]
        kept = sorted(sorted(kept, key=lambda i: -sizes[i])[:most])
    return [Line(columns[0][i].place, [_number(cells[i]) for cells in columns]) for i in kept]


def control_lines(result: Result) -> list[Line]:
    """The controls, each with its value, or the range of its cells."""
    return [
        Line(name, [_reach(_control_cells(control, metric)) for metric in metrics_of(result)])
        for name, control in result.controls.items()
    ]


def _control_cells(control: Result, metric: str | None) -> Sequence[Any]:
    return control.cells(metric if "metric" in control.dims else None)


def _reach(cells: Sequence[Any]) -> str:
    if len(cells) == 1:
        return _number(cells[0])
    known = [cell.value for cell in cells if math.isfinite(cell.value)]
    return f"{min(known):.3g} to {max(known):.3g}" if known else MISSING


def _number(cell: Any) -> str:
    """A value with its interval."""
    if not math.isfinite(cell.value):
        return MISSING
    low, high = getattr(cell, "low", None), getattr(cell, "high", None)
    known = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    return f"{cell.value:.3g} [{low:.3g}, {high:.3g}]" if known else f"{cell.value:.3g}"
