"""Results of three axes: curves over one axis, side by side, with intervals and controls."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from audio_lens.drawing.figures import numbers, shown_quantity
from audio_lens.drawing.labelled import Labelled
from audio_lens.drawing.rows import STYLE, escaped

COLOURS = qualitative.Safe  # told apart by colour-blind readers
DASHES = ("dot", "dash", "dashdot", "longdash", "longdashdot")
FAINT = 0.18


def curves_figure(result: Labelled, quantity: str | None = None) -> go.Figure:
    """A panel for each coordinate of one axis, in it a curve for each of another.

    The curves run over the layers, or else over the longest axis; of the others the first makes
    the panels. Bands are intervals of the first quantity; thin lines are controls that run along.

    Raises:
        ValueError: if the quantity is unknown.
    """
    quantity = shown_quantity(result, quantity)
    lengths = {axis: len(result.coords[axis]) for axis in result.axes}
    along = "layer" if "layer" in lengths else max(lengths, key=lambda axis: lengths[axis])
    panels, lines = (axis for axis in result.axes if axis != along)
    order = (panels, lines, along)
    named = [f"{panels} {at}" for at in result.coords[panels]]
    figure = make_subplots(
        cols=len(named),
        shared_yaxes=True,
        subplot_titles=[escaped(name) for name in named],
        x_title=escaped(along),
        y_title=escaped(result.quantities[quantity]),
    )
    drawn = {"": _cells(result, result, order)}
    drawn |= {
        name: _cells(control, result, order)
        for name, control in result.controls.items()
        if along in control.axes and quantity in control.quantities
    }
    x = [escaped(str(at)) for at in result.coords[along]]
    for column in range(len(named)):
        for line, name in enumerate(result.coords[lines]):
            for number, (control, cells) in enumerate(drawn.items()):
                label = control or f"{lines} {name}"
                for trace in _curve(cells[column, line], x, quantity, label, line, number):
                    is_first = not column and (not control or not line)
                    trace.update(showlegend=is_first and trace.fill is None)
                    figure.add_trace(trace, row=1, col=column + 1)
    figure.update_layout(STYLE | {"margin": None, "showlegend": True, "dragmode": "zoom"})
    return figure.update_layout(title=escaped(result.title)).update_xaxes(type="category")


def _cells(shown: Labelled, result: Labelled, order: tuple[str, ...]) -> np.ndarray:
    """Cells by the axes in an order; those that lack an axis stand at every place of it."""
    found = np.empty([len(shown.coords[axis]) for axis in shown.axes], dtype=object)
    found.flat[:] = shown.cells()
    found = found.transpose([shown.axes.index(axis) for axis in order if axis in shown.axes])
    places = tuple(slice(None) if axis in shown.axes else None for axis in order)
    return np.broadcast_to(found[places], [len(result.coords[axis]) for axis in order])


def _curve(
    cells: np.ndarray, x: list[str], quantity: str, label: str, line: int, number: int
) -> Iterator[go.Scatter]:
    """A line, and for a curve of the result itself its band."""
    colour = COLOURS[line % len(COLOURS)]
    y = numbers(cells, quantity)
    look = {"color": colour, "width": 2.5}
    if number:
        look = {"color": colour, "width": 1, "dash": DASHES[(number - 1) % len(DASHES)]}
    elif None not in {x for cell in cells for x in (cell.low, cell.high)}:
        low, high = (numbers(cells, side) for side in ("low", "high"))
        yield go.Scatter(
            x=[*x, *x[::-1]],
            y=[*high, *low[::-1]],
            fill="toself",
            fillcolor=colour.replace("rgb", "rgba").replace(")", f", {FAINT})"),
            mode="lines",
            line={"width": 0},
            hoverinfo="skip",
            legendgroup=label,
        )
    yield go.Scatter(
        x=x,
        y=y,
        name=escaped(label),
        legendgroup=label,
        mode="lines" if number else "lines+markers",
        line=look,
        customdata=[escaped(cell.place) for cell in cells],
        hovertemplate="%{customdata}<br>%{y:.3f}<extra>" + escaped(label) + "</extra>",
    )
