"""The page of results over items: their figures, intervals and controls, and what they are of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from audio_lens.arguments import listed, text
from audio_lens.drawing.figures import ACROSS
from audio_lens.errors import InputError
from audio_lens.report.html import write_drawn
from audio_lens.results import Result
from audio_lens.results.lines import Line, control_lines, lines, metric_names, metrics_of

DRAWN = 2  # axes of a figure, or three where one of them makes a few panels of curves
MOST_CURVES = 12  # in all panels
SIZE = {"autosize": True, "height": 420, "margin": {"l": 74, "r": 100, "t": 104, "b": 64}}
MOST_LINES, MOST_FIGURES = 200, 200  # of a result


def result_page(
    results: Result | Mapping[str, Result],
    path: str | Path,
    *,
    title: str = "What was found",
    question: str = "",
) -> Path:
    """Write results of methods over items as one page, with figures that need no network.

    Every result has its figure, a table of its cells with their intervals and of its controls, how
    many items were kept and left out, its notes, and what it was made from. Of a result of more
    than two axes the page chooses among the others.

    Args:
        results: one result, or several by name.
        path: the HTML file to write.
        title: headline of the page.
        question: what is asked, below it.

    Returns:
        The path written.

    Raises:
        ValueError: no results, or one of more than 200 figures (select a part of it).
        OutputError: a path that cannot be written; an old page stays.
    """
    text("title", title)
    text("question", question)
    named = results if isinstance(results, Mapping) else {title: results}
    listed("results", named.values(), Result, "results")
    if not named:
        raise InputError("no results: a page needs at least one")
    sections = [Section(text("a name", name), result) for name, result in named.items()]
    figures = [list(section.figures()) for section in sections]
    return write_drawn(
        path,
        "result.html",
        {"results": figures},
        title=title,
        question=question,
        sections=sections,
    )


@dataclass(frozen=True)
class Section:
    """What the page shows of a result.

    Attributes:
        name: what the result is called.
    """

    name: str
    result: Result

    @property
    def choices(self) -> dict[str, list[str]]:
        """What can be chosen to be drawn: facets, and the names of what they have."""
        return {facet: [str(one) for one in known] for facet, known in self._facets().items()}

    def figures(self) -> Iterator[dict[str, Any]]:
        """The figure of every choice; of a result without axes, one bar."""
        facets, result = self._facets(), _of_an_axis(self.result, self.name)
        chosen = [
            dict(zip(facets, one, strict=True)) for one in itertools.product(*facets.values())
        ]
        if len(chosen) > MOST_FIGURES:
            raise InputError(
                f"{self.name} has {len(chosen)} figures, by {', '.join(facets)}: select a part"
            )
        for choice in chosen:
            parts = {facet: at for facet, at in choice.items() if facet != "metric"}
            drawn = result.select(**parts).plot(metric=choice.get("metric"))
            drawn.update_layout(**SIZE)
            yield {
                "facets": {facet: str(at) for facet, at in choice.items()},
                "figure": drawn.to_dict(),
            }

    def _facets(self) -> dict[str, list]:
        """The coordinates of what a figure cannot hold: the metric, and a third axis and more."""
        metrics = {"metric": metrics_of(self.result)} if "metric" in self.result.dims else {}
        places = {axis: place for place, axis in enumerate(ACROSS)}
        order = sorted(self.result.axes, key=lambda axis: places.get(axis, len(places)))
        left = [axis for axis in self.result.axes if axis in order[DRAWN:]]
        has_bands = self.result.low is not None
        if has_bands and len(order) == DRAWN + 1 and self._curves() <= MOST_CURVES:
            left = []
        return metrics | {axis: self.result.coords[axis] for axis in left}

    def _curves(self) -> int:
        """How many curves there are beside the axis that they run over."""
        lengths = {axis: len(self.result.coords[axis]) for axis in self.result.axes}
        along = "layer" if "layer" in lengths else max(lengths, key=lambda axis: lengths[axis])
        return math.prod(length for axis, length in lengths.items() if axis != along)

    # ---------------------------------------------------------------- the table

    @property
    def columns(self) -> list[str]:
        return metric_names(self.result)

    @property
    def lines(self) -> list[Line]:
        return lines(self.result, MOST_LINES)

    @property
    def controls(self) -> list[Line]:
        return control_lines(self.result)

    @property
    def caption(self) -> str:
        """Head of the column of places."""
        n_cells = len(self.result.cells(metrics_of(self.result)[0]))
        cut = f", the strongest {MOST_LINES} of {n_cells}" if n_cells > MOST_LINES else ""
        return f"{' by '.join(self.result.axes)}{cut}"

    # ---------------------------------------------------------------- what it is of

    @property
    def facts(self) -> dict[str, str]:
        """How many items it is of, and what it was made from."""
        kept = {} if self.result.n_kept is None else {"items": str(self.result.n_kept)}
        left = {f"left out: {why}": str(n) for why, n in self.result.dropped.items() if n}
        return kept | left | self.result.meta

    @property
    def notes(self) -> list[str]:
        return self.result.report


def _of_an_axis(result: Result, name: str) -> Result:
    """The result; one without axes as one of a single cell, so that it can be drawn."""
    if result.axes:
        return result
    together = {one: getattr(result, one) for one in ("values", "estimate", "low", "high")}
    return replace(
        result,
        dims=(*result.dims, "result"),
        coords=result.coords | {"result": [name]},
        **{one: None if held is None else held[..., None] for one, held in together.items()},
    )
