"""The map of a result as a plotly figure: heat map of two axes, bars of one."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int
from plotly.colors import sample_colorscale

from audio_lens.drawing.clips import Clip, mel_of
from audio_lens.drawing.labelled import Labelled
from audio_lens.drawing.rows import DIVERGING, SECONDS, STYLE, Panel, Rows, escaped, mel_axis
from audio_lens.errors import InputError

ACROSS = (
    "time",
    "position",
    "neuron",
    "head",
    "group",
    "layer",
    "frequency",
)  # the first runs along x
SHARES = ("effect", "recovery")  # quantities of which 1 is all there is to have
FAINTEST, STRONGEST = 0.25, 1.5  # ends of their colour scale: no noise in full colour
MARKED, LEAST_MARKED = 10, 0.1  # cells marked with their rank, if a tenth as strong as the first
ROW_PX, LEAST_PX, MOST_PX, BARS_PX, TITLE_PX = 26, 150, 560, 156, 40
CONTROL_MARKS = ("diamond-open", "x-thin-open", "circle-open", "square-open", "cross-thin-open")
LETTERS, LINE_PX, ALONE = 90, 18, 0.3  # a line under the title; width of a bar that stands alone
TOUCHING = 1e-6  # stretches closer than this meet


@dataclass(frozen=True)
class Axis:
    """One drawn axis of a map.

    Attributes:
        name: the axis of the result.
        order: for every drawn column the index of its coordinate; None in a gap.
        edges: bounds of the columns, of time in seconds and of frequency in mel; None for axes
            of numbers, which are drawn as names.
        coords: the coordinates of the result.
    """

    name: str
    order: list[int | None]
    edges: list[float] | None
    coords: list

    @staticmethod
    def of(result: Labelled, name: str) -> Axis:
        """The axis of a result.

        Raises:
            ValueError: if its windows lie in several clips, which have no common seconds.
        """
        coords = result.coords[name]
        edges: list[float] | None = None
        order: list[int | None] = list(range(len(coords)))
        if name == "time":
            _check_one_clip(result)
            edges, order = columns([(float(span.start_s), float(span.end_s)) for span in coords])
        elif name == "frequency":
            bounds = np.array([[band.low_hz, band.high_hz] for band in coords], dtype=float)
            edges, order = columns([tuple(pair) for pair in mel_of(bounds).tolist()])
        return Axis(name, order, edges, coords)

    @staticmethod
    def alone(result: Labelled) -> Axis:
        """Of a single number, which has none: one place under the name of what was measured."""
        return Axis("", [0], None, [result.meta.get("method", "value")])

    @property
    def names(self) -> list[str]:
        """What the coordinates are called."""
        return [str(at) for at in self.coords]

    @property
    def drawn(self) -> list[float] | list[str]:
        """What plotly places the columns by: their edges or names."""
        return [escaped(name) for name in self.names] if self.edges is None else self.edges

    @property
    def columns(self) -> list[tuple[int, float | str, float | None]]:
        """Coordinate, place (centre or name) and width of the columns that are no gaps."""
        if self.edges is None:
            return [(index, name, None) for index, name in enumerate(self.drawn)]
        bounds = zip(self.order, itertools.pairwise(self.edges), strict=True)
        return [(i, (low + high) / 2, high - low) for i, (low, high) in bounds if i is not None]

    @property
    def shown(self) -> list:
        """The coordinate of every drawn column; None in a gap."""
        return [None if index is None else self.coords[index] for index in self.order]

    @property
    def settings(self) -> dict[str, Any]:
        """Plotly's settings: seconds and Hz as numbers, anything else as names."""
        if self.name == "frequency":
            return mel_axis()
        title = {"title": {"text": SECONDS if self.name == "time" else escaped(self.name)}}
        return title if self.edges is not None else title | {"type": "category"}


@dataclass(frozen=True)
class Map:
    """The drawn map of a result.

    Attributes:
        trace: heat map for two axes, bars for one; ``customdata`` holds the place and the
            quantities of every cell, ``meta`` the stretch of audio and of the spectrum that each
            column and row stand for (see `rows.Rows`), and the baselines.
        x, y: the axes across and upwards; y is None for bars.
        limits: where the colours of each quantity end, on both sides of zero.
        shades: the colours of bars, for each quantity.
        label: what the quantity shown is called.
    """

    trace: go.Heatmap | go.Bar
    x: Axis
    y: Axis | None
    limits: dict[str, float]
    shades: dict[str, list[str]]
    label: str

    @property
    def panel(self) -> Panel:
        """The row of a page or figure that holds the map."""
        timed = self.x.name == "time"
        if self.y is None:
            yaxis = {"title": {"text": escaped(self.label)}, "zeroline": True}
            return Panel(BARS_PX, self.x.settings, yaxis, timed)
        height = max(LEAST_PX, min(ROW_PX * len(self.y.order), MOST_PX))
        return Panel(height, self.x.settings, self.y.settings, timed)


def map_figure(
    result: Labelled, quantity: str | None = None, clip: Clip | None = None
) -> go.Figure:
    """The map of a result of one or two axes and one metric, under its clip if there is one."""
    drawn = draw_map(result, quantity)
    panel, title = drawn.panel, {"title": escaped(result.title)}
    if clip is None:
        layout = STYLE | {"margin": None, "xaxis": panel.xaxis, "yaxis": panel.yaxis}
        beside = control_traces(result, drawn, quantity)
        layout |= title | {"showlegend": bool(beside)}
        return go.Figure([drawn.trace.update(showlegend=False), *beside], go.Layout(layout))
    rows = Rows([clip])
    layout = rows.layout([panel], TITLE_PX).update(title, margin_t=TITLE_PX)
    trace = drawn.trace.update(rows.axes())
    if isinstance(trace, go.Heatmap):
        trace.update(colorbar=rows.beside(layout))
    beside = [control.update(rows.axes()) for control in control_traces(result, drawn, quantity)]
    layout.update(showlegend=bool(beside))
    before = [one.update(showlegend=False) for one in (*rows.traces(0), trace)]
    return go.Figure([*before, *beside], layout)


def say_below(figure: go.Figure, sentence: str) -> go.Figure:
    """Say what was found under the title of a figure."""
    lines = textwrap.wrap(escaped(sentence), LETTERS)
    top = {"y": 1, "yref": "container", "yanchor": "top", "pad": {"t": LINE_PX}}
    title = top | {"subtitle": {"text": "<br>".join(lines)}}
    return figure.update_layout(title=title, margin_t=TITLE_PX + LINE_PX * (3 + len(lines)))


def control_traces(result: Labelled, drawn: Map, quantity: str | None = None) -> list[go.Scatter]:
    """What controls gave, as marks over bars: of one axis, or the same over all of it."""
    if drawn.y is not None:
        return []
    quantity, traces = shown_quantity(result, quantity), []
    _, places, _ = zip(*drawn.x.columns, strict=True)
    for number, (name, control) in enumerate(result.controls.items()):
        if not set(control.axes) <= {drawn.x.name} or quantity not in control.quantities:
            continue
        cells = np.array(control.cells(), dtype=object)
        cells = (
            cells[[i for i, _, _ in drawn.x.columns]] if control.axes else cells.repeat(len(places))
        )
        traces.append(
            go.Scatter(
                name=name,
                x=places,
                y=numbers(cells, quantity),
                error_y=error_bars(cells, control, quantity),
                mode="markers",
                marker={"symbol": CONTROL_MARKS[number % len(CONTROL_MARKS)], "color": "#222"},
                hovertemplate=f"{escaped(name)} %{{y:.4g}}<extra></extra>",
                showlegend=True,
            )
        )
    return traces


def error_bars(cells: np.ndarray, result: Labelled, quantity: str) -> dict[str, Any] | None:
    """Plotly's error bars of the first quantity; None where no bound is known."""
    bounds = [(getattr(c, "low", None), getattr(c, "high", None)) for c in cells]
    if quantity != next(iter(result.quantities)) or all(None in pair for pair in bounds):
        return None
    at = numbers(cells, quantity)
    low, high = (np.array(side, dtype=float) for side in zip(*bounds, strict=True))
    below, above = (np.where(np.isfinite(x), x, 0) for x in (at - low, high - at))
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below}


def shown_quantity(result: Labelled, quantity: str | None) -> str:
    """The quantity to draw: the first for None.

    Raises:
        ValueError: for one that the result does not have.
    """
    known = result.quantities
    if quantity is not None and quantity not in list(known):
        raise InputError(f"unknown quantity {quantity!r}; there is {', '.join(known)}")
    return next(iter(known)) if quantity is None else quantity


def draw_map(result: Labelled, quantity: str | None = None) -> Map:
    """The trace of a result of one metric and stimulus (or their mean).

    Raises:
        ValueError: unless the result has one or two axes, or if the quantity is unknown.
    """
    quantity = shown_quantity(result, quantity)
    if len(result.axes) > 2:
        raise InputError(
            f"a map has one or two axes, this result has {', '.join(result.axes)}: "
            f"select one first, for instance {_example_selection(result)}"
        )
    cells = np.empty([len(result.coords[axis]) for axis in result.axes], dtype=object)
    cells.flat[:] = result.cells()
    first = next(iter(result.axes), None)
    across = next((axis for axis in ACROSS if axis in result.axes), first)
    up = next((axis for axis in result.axes if axis != across), None)
    x = Axis.alone(result) if across is None else Axis.of(result, across)
    y = None if up is None else Axis.of(result, up)
    cells = np.atleast_1d(cells)
    if y is None:
        cells = cells[[index for index, _, _ in x.columns]]
    elif first == across:
        cells = cells.T
    tables = {name: numbers(cells, name) for name in result.quantities}
    limits = {name: colour_limit(table, name) for name, table in tables.items()}
    label = result.quantities[quantity]
    if y is None:
        shades = {name: _shades(table, limits[name]) for name, table in tables.items()}
        return Map(
            _bars(result, cells, x, quantity, shades[quantity]), x, None, limits, shades, label
        )
    heat = _heat(result, cells, x, y, quantity, limits[quantity])
    return Map(heat, x, y, limits, {}, label)


def _example_selection(result: Labelled) -> str:
    axis = result.axes[0]
    return f"result.select({axis}={result.coords[axis][0]!r})"


def _check_one_clip(result: Labelled) -> None:
    clips = sorted({span.clip for span in result.coords["time"]})
    if len(clips) > 1:
        raise InputError(
            f"windows of clips {clips} cannot share an axis: select(time=[...]) those of one clip"
        )


def _meta(result: Labelled, x: Axis, y: Axis | None) -> dict[str, Any]:
    bands = x if x.name == "frequency" else y if y and y.name == "frequency" else None
    return {
        "spans": [s and [s.start_s, s.end_s] for s in x.shown] if x.name == "time" else [],
        "bands": [b and [b.low_hz, b.high_hz] for b in bands.shown] if bands else [],
        "metric": escaped(result.meta.get("metric", "metric")),
        **{name: _rounded(number) for name, number in result.baselines().items()},
    }


def _shades(table: np.ndarray, limit: float) -> list[str]:
    """The colour of every bar."""
    shares = np.clip(0.5 + np.nan_to_num(table) / limit / 2, 0, 1)
    return [str(colour) for colour in sample_colorscale(DIVERGING, shares)]


def _heat(
    result: Labelled, cells: np.ndarray, x: Axis, y: Axis, quantity: str, limit: float
) -> go.Heatmap:
    def arranged(table: np.ndarray) -> list[list]:
        return [
            [None if None in (row, column) else table[row, column] for column in x.order]
            for row in y.order
        ]

    names = result.quantities
    marks = ranks(numbers(cells, next(iter(names))))
    return go.Heatmap(
        name="map",
        x=x.drawn,
        y=y.drawn,
        z=arranged(numbers(cells, quantity)),
        customdata=[[cell and _hover(cell, names) for cell in row] for row in arranged(cells)],
        text=[[str(rank or "") for rank in row] for row in arranged(marks)],
        texttemplate="%{text}",
        textfont={"size": 11},
        colorscale=DIVERGING,
        zmin=-limit,
        zmax=limit,
        zmid=0,
        hovertemplate=_hover_template(result),
        hoverongaps=False,
        colorbar={"title": escaped(names[quantity]), "thickness": 12},
        meta=_meta(result, x, y),
    )


def _bars(result: Labelled, cells: np.ndarray, x: Axis, quantity: str, shades: list[str]) -> go.Bar:
    names, meta = result.quantities, _meta(result, x, None)
    marks = ranks(numbers(cells, next(iter(names))))
    _, places, widths = zip(*x.columns, strict=True)
    without_gaps = {
        name: [at for at in meta[name] if at is not None] for name in ("spans", "bands")
    }
    return go.Bar(
        name="map",
        x=places,
        width=(None if x.name else ALONE) if x.edges is None else widths,
        y=numbers(cells, quantity),
        error_y=error_bars(cells, result, quantity),
        customdata=[_hover(cell, names) for cell in cells],
        text=[str(rank or "") for rank in marks] if x.name else None,
        textposition="outside",
        cliponaxis=False,
        marker={"color": shades, "line": {"color": "#888", "width": 1}},
        hovertemplate=_hover_template(result),
        meta=meta | without_gaps,
    )


def _hover(cell: Any, names: Iterable[str]) -> list:
    """What a cell tells: its place and its quantities."""
    return [escaped(cell.place), *(_rounded(getattr(cell, name)) for name in names)]


def _hover_template(result: Labelled) -> str:
    """How plotly tells it; the metric has its name, and the baselines behind it."""
    beside = ", ".join(f"{name} %{{meta.{name}:.4g}}" for name in result.baselines())
    lines = ["<b>%{customdata[0]}</b>"]
    for column, name in enumerate(result.quantities, start=1):
        number = f"%{{customdata[{column}]:{'.3f' if name in SHARES else '.4g'}}}"
        lines.append(f"{'%{meta.metric}' if name == 'value' else name} {number}")
        if name == "value" and beside:
            lines[-1] += f" ({beside})"
    return "<br>".join(lines) + "<extra></extra>"


def numbers(cells: np.ndarray, quantity: str) -> Float[np.ndarray, "*axes"]:
    """A quantity of every cell."""
    return np.vectorize(lambda cell: getattr(cell, quantity), otypes=[float])(cells)


def ranks(table: Float[np.ndarray, "*axes"]) -> Int[np.ndarray, "*axes"]:
    """The ranks, from 1 on, of the cells that are largest in size; 0 for all others."""
    sizes = np.nan_to_num(np.abs(table))
    order = np.argsort(-sizes, axis=None, kind="stable")[:MARKED]
    strong = [cell for cell in order if sizes.flat[cell] > LEAST_MARKED * sizes.max()]
    found = np.zeros(table.shape, dtype=int)
    found.flat[strong] = np.arange(1, len(strong) + 1)
    return found


def _rounded(number: float) -> float | None:
    return float(f"{number:.4g}") if math.isfinite(number) else None


def colour_limit(values: np.ndarray, quantity: str) -> float:
    """Where the colour scale ends on both sides of zero.

    For effect and recovery between 0.25 and 1.5, so that a map of nothing looks like nothing and
    one wild cell does not bleach the rest; for the metric itself, and others, its largest size.
    """
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if finite.size else 1.0
    if quantity in SHARES:
        return min(max(largest, FAINTEST), STRONGEST)
    return largest or 1.0


def columns(
    stretches: Sequence[tuple[float, float]],
) -> tuple[list[float], list[int | None]]:
    """Edges of the drawn columns and the index of the stretch in each, in order of their centres.

    Stretches that do not overlap keep their bounds, with an empty column (None) between those
    that do not touch. Overlapping ones meet half way between their centres.
    """
    order = sorted(range(len(stretches)), key=lambda i: (sum(stretches[i]), stretches[i]))
    ordered = [stretches[i] for i in order]
    if any(b[0] < a[1] - TOUCHING for a, b in itertools.pairwise(ordered)):
        return _edges_between_centres(ordered), list(order)
    edges, indices = [ordered[0][0]], []
    for index, (low, high) in zip(order, ordered, strict=True):
        if low > edges[-1] + TOUCHING:
            edges.append(low)
            indices.append(None)
        edges.append(high)
        indices.append(index)
    return edges, indices


def _edges_between_centres(ordered: list[tuple[float, float]]) -> list[float]:
    centres = [sum(stretch) / 2 for stretch in ordered]
    between = [(a + b) / 2 for a, b in itertools.pairwise(centres)]
    return [2 * centres[0] - between[0], *between, 2 * centres[-1] - between[-1]]
