"""What a scrubbing says in plain words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.scrubbing.hypothesis import Hypothesis
from audio_lens.analysis.scrubbing.running import Scores
from audio_lens.results import Result

CLAIMED = 0.5  # what recovers less claims nothing that errors could hide
HIDDEN = 0.25  # by which an item's error may exceed that of the mean, in parts of the gap
CANNOT = (
    "Hypotheses whose features agree on these items cannot be told apart, and what was left out "
    "was resampled from these items alone."
)


def cancelling(result: Result) -> list[str]:
    """Where errors of single items are large and cancel in the mean."""
    spread, found = result.controls["spread"], []
    for metric in result.coords["metric"]:
        pairs = zip(result.cells(metric), spread.cells(metric), strict=True)
        for cell, error in pairs:
            hidden = error.value - abs(1 - cell.value)
            if cell.value > CLAIMED and hidden > HIDDEN:
                found.append(f"{metric}{_at(cell)}")
    return found


def told(
    result: Result,
    scores: Scores,
    hypothesis: Hypothesis,
    counts: Mapping[str, Sequence[int]],
    by_draw: Float[Tensor, "m draws"],
) -> Iterator[str]:
    """The sentences, one by one."""
    for number, metric in enumerate(scores.metrics):
        model, other = scores.model[:, number].mean(), scores.other[:, number].mean()
        yield (
            f"{metric}: {model:.3g} of the model itself, {other:.3g} of other items' outputs. Of "
            f"what lies between, the hypothesis recovers {_cells(result, metric)}; "
            f"{_controls(result, metric)}."
        )
        low, high = by_draw[number].min(), by_draw[number].max()
        yield f"{metric}: from draw to draw {low:.2f} to {high:.2f}."
        if model <= other:
            yield f"{metric}: other items' outputs do as well as the model: shares mean nothing."
    yield from _errors(result)
    for name, lenders in counts.items():
        yield (
            f"Node {name}: {min(lenders)} to {max(lenders)} items can lend to an item, "
            f"{statistics.median(lenders):g} in the middle."
        )
    own = [one.name for one in hypothesis.nodes if one.is_own]
    if own:
        yield (
            f"Node {', '.join(own)} keeps the item's own activation, which is right whatever it "
            "depends on: it says where something matters, and not what."
        )
    yield CANNOT


def _errors(result: Result) -> Iterator[str]:
    for metric in result.coords["metric"]:
        spread = result.controls["spread"]
        yield f"{metric}: an item is off by {_cells(spread, metric)} of that, in the mean of sizes."
    where = cancelling(result)
    if where:
        yield (
            f"Errors of single items cancel in {', '.join(where)}: they are far larger than that "
            "of the mean, some up and some down. The hypothesis gets the mean right and the items "
            "wrong."
        )


def _controls(result: Result, metric: str) -> str:
    named = {
        "empty": "the empty one",
        "own": "what it keeps of the item itself alone",
        "full": "everything at its sites",
    }
    there = [(name, said) for name, said in named.items() if name in result.controls]
    return ", ".join(f"{said} {_cells(result.controls[name], metric)}" for name, said in there)


def _cells(result: Result, metric: str) -> str:
    """One cell with its interval, or all of a curve."""
    cells = result.cells(metric)
    if len(cells) == 1:
        return _amount(cells[0])
    return " ".join(f"{cell.value:.2f}" for cell in cells) + " by block"


def _amount(cell: Any) -> str:
    if cell.low is None or not math.isfinite(cell.low):
        return f"{cell.value:.2f}"
    return f"{cell.value:.2f} [{cell.low:.2f}, {cell.high:.2f}]"


def _at(cell: Any) -> str:
    return f" at layer {cell.at['layer']}" if "layer" in cell.at else ""
