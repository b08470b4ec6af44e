"""Plotly figures: the map of a sweep, and a clip (words, waveform, log-mel) above it."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int8
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots
from transformers.audio_utils import hertz_to_mel, mel_filter_bank, spectrogram

from audio_lens.patching.result import Cell, SweepResult, describe_span
from audio_lens.timeline import Span

SCALE = "RdBu_r"  # diverging, safe for colour-blind readers, legible in grey
QUANTITIES = {"effect": "effect", "recovery": "recovery", "value": "metric"}
TITLES = {"time": "time in the clip (s)"}
ACROSS = ("time", "position", "neuron", "head", "layer")  # the first that is there runs along x
FAINTEST, STRONGEST = 0.25, 1.5  # ends of the colour scale of effect: no noise in full colour
HOVER = (
    "<b>%{customdata[0]}</b><br>effect %{customdata[1]:.3f}<br>"
    "recovery %{customdata[2]:.3f}<br>metric %{customdata[3]:.4g}<extra></extra>"
)

N_MELS, DB_RANGE, TICKS_HZ = 80, 80, (500, 1000, 2000, 4000, 8000)
MOST_FRAMES, ENVELOPE_BINS = 2000, 1500
WORDS_PX, WAVE_PX, MEL_PX, MAP_ROW_PX, MAP_PX = 26, 76, 150, 26, (150, 560)
BARS_AS_ROWS = 6
GAP_PX, AXIS_PX, MARGIN_PX = 8, 52, {"l": 70, "r": 20, "t": 10, "b": 46}


@dataclass(frozen=True)
class Map:
    """The drawn map of a sweep.

    Attributes:
        trace: heat map for two axes, bars for one.
        x, y: the axes of the sweep drawn across and upwards; y is "" for bars.
        windows: for every drawn column the stretch of audio it stands for; None between windows
            that do not touch; empty where the sweep has no time axis.
        rows: how many rows of a heat map it is as high as.
    """

    trace: go.Heatmap | go.Bar
    x: str
    y: str
    windows: list[Span | None]
    rows: int


@dataclass(frozen=True)
class Clip:
    """A named piece of audio to draw and to play, with what is said when."""

    name: str
    samples: Float[np.ndarray, " samples"]
    sampling_rate: int
    words: Sequence[Span] = ()

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sampling_rate


def sweep_figure(result: SweepResult, quantity: str = "effect") -> go.Figure:
    """The map of a result of one metric and one or two axes."""
    drawn = draw_map(result, quantity)
    figure = go.Figure(drawn.trace)
    style_map_axes(figure.layout.xaxis, figure.layout.yaxis, drawn, quantity)
    figure.update_layout(template="plotly_white", title=f"{result.site}, {result.direction}")
    return figure


def draw_map(result: SweepResult, quantity: str = "effect") -> Map:
    """The trace of a result of one metric and stimulus (or their mean).

    Raises:
        ValueError: unless the result has one or two axes, or if the quantity is unknown.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"unknown quantity {quantity!r}; there is {', '.join(QUANTITIES)}")
    if not 1 <= len(result.axes) <= 2:
        raise ValueError(
            f"a map has one or two axes, this result has {', '.join(result.axes) or 'none'}: "
            f"select one first, for instance {_example_selection(result)}"
        )
    cells = np.empty([len(result.coords[axis]) for axis in result.axes], dtype=object)
    cells.flat = result.cells()
    x = next(axis for axis in ACROSS if axis in result.axes)
    y = next((axis for axis in result.axes if axis != x), "")
    if not y:
        return _bars(cells, x, result, quantity)
    return _heat(cells.T if result.axes[0] == x else cells, x, y, result, quantity)


def _example_selection(result: SweepResult) -> str:
    axis = result.axes[0] if result.axes else "..."
    return f"result.select({axis}={result.coords.get(axis, [0])[0]!r})"


def _heat(cells: np.ndarray, x: str, y: str, result: SweepResult, quantity: str) -> Map:
    edges, order = _columns(result, x)
    z = _numbers(cells, quantity)
    limit = colour_limit(z, quantity)
    trace = go.Heatmap(
        z=[[None if column is None else row[column] for column in order] for row in z.tolist()],
        x=edges,
        y=_names(result, y),
        customdata=[[_hover(None if c is None else row[c]) for c in order] for row in cells],
        colorscale=SCALE,
        zmin=-limit,
        zmax=limit,
        zmid=0,
        hovertemplate=HOVER,
        hoverongaps=False,
        colorbar={"title": QUANTITIES[quantity]},
    )
    return Map(trace, x, y, _windows(result, x, order), len(cells))


def _bars(cells: np.ndarray, x: str, result: SweepResult, quantity: str) -> Map:
    edges, order = _columns(result, x)
    drawn = [at for at, column in enumerate(order) if column is not None]
    kept = [order[at] for at in drawn]
    z = _numbers(cells, quantity)[kept]
    shades = np.clip(0.5 + np.nan_to_num(z) / colour_limit(z, quantity) / 2, 0, 1)
    timed = x == "time"
    trace = go.Bar(
        x=[(edges[at] + edges[at + 1]) / 2 for at in drawn] if timed else edges,
        width=[edges[at + 1] - edges[at] for at in drawn] if timed else None,
        y=z,
        customdata=[_hover(cells[column]) for column in kept],
        marker={"color": sample_colorscale(SCALE, shades), "line": {"color": "#888", "width": 1}},
        hovertemplate=HOVER,
    )
    return Map(trace, x, "", _windows(result, x, kept), BARS_AS_ROWS)


def _numbers(cells: np.ndarray, quantity: str) -> Float[np.ndarray, "*rows columns"]:
    return np.vectorize(lambda cell: getattr(cell, quantity), otypes=[float])(cells)


def _hover(cell: Cell | None) -> list | None:
    if cell is None:
        return None
    numbers = (cell.effect, cell.recovery, cell.value)
    return [html.escape(cell.place, quote=False), *(_rounded(number) for number in numbers)]


def _rounded(number: float) -> float | None:
    return float(f"{number:.5g}") if math.isfinite(number) else None


def colour_limit(values: np.ndarray, quantity: str) -> float:
    """Where the colour scale ends on both sides of zero.

    For effect and recovery between 0.25 and 1.5, so that a map of nothing looks like nothing and
    one wild cell does not bleach the rest; for the metric itself its largest size.
    """
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if finite.size else 1.0
    if quantity == "value":
        return largest or 1.0
    return min(max(largest, FAINTEST), STRONGEST)


def _names(result: SweepResult, axis: str) -> list[str]:
    return [str(number) for number in result.coords[axis]]


def _columns(result: SweepResult, axis: str) -> tuple[list, list[int | None]]:
    """Edges (time) or names of the columns, and which coordinate each column shows."""
    if axis == "time":
        return window_columns(result.coords["time"])
    return _names(result, axis), list(range(len(result.coords[axis])))


def _windows(result: SweepResult, axis: str, order: list[int | None]) -> list[Span | None]:
    if axis != "time":
        return []
    return [None if column is None else result.coords["time"][column] for column in order]


def window_columns(spans: Sequence[Span]) -> tuple[list[float], list[int | None]]:
    """Edges in seconds of the drawn columns and the index of the window in each, by time.

    Windows that do not overlap keep their bounds, with an empty column (None) between those that
    do not touch. Overlapping ones meet half way between their centres.

    Raises:
        ValueError: if the windows lie in several clips, which have no common seconds.
    """
    clips = sorted({span.clip for span in spans})
    if len(clips) > 1:
        raise ValueError(
            f"windows of clips {clips} cannot share an axis: select(time=[...]) those of one clip"
        )
    order = sorted(range(len(spans)), key=lambda i: (spans[i].centre_s, spans[i].start_s))
    ordered = [spans[i] for i in order]
    if any(b.start_s < a.end_s - 1e-6 for a, b in itertools.pairwise(ordered)):
        return _edges_between_centres(ordered), list(order)
    edges, columns = [ordered[0].start_s], []
    for index, span in zip(order, ordered, strict=True):
        if span.start_s > edges[-1] + 1e-6:
            edges.append(span.start_s)
            columns.append(None)
        edges.append(span.end_s)
        columns.append(index)
    return edges, columns


def _edges_between_centres(ordered: list[Span]) -> list[float]:
    centres = [span.centre_s for span in ordered]
    between = [(a + b) / 2 for a, b in itertools.pairwise(centres)]
    return [2 * centres[0] - between[0], *between, 2 * centres[-1] - between[-1]]


def style_map_axes(xaxis, yaxis, drawn: Map, quantity: str) -> None:
    """Titles and ticks of the map's axes: seconds as numbers, layers and heads as names."""
    xaxis.title = TITLES.get(drawn.x, drawn.x)
    yaxis.title = drawn.y or QUANTITIES[quantity]
    if drawn.x != "time":
        xaxis.type = "category"
    if drawn.y:
        yaxis.type = "category"


def page_figure(drawn: Map, quantity: str, clips: Sequence[Clip]) -> go.Figure:
    """Words, waveform and log-mel of the clips (the first one visible) above the map.

    Traces are named "words", "wave", "mel" and "map"; the ``meta`` of the first three is the
    index of their clip. All rows share the seconds axis, except a map without time, which has
    its own. Dotted lines continue the words of the first clip through everything in time.
    """
    figure = make_subplots(rows=4, cols=1)
    for index, clip in enumerate(clips):
        for row, trace in enumerate([_words(clip), _waveform(clip), _mel(clip)], start=1):
            figure.add_trace(trace.update(meta=index, visible=index == 0), row=row, col=1)
    figure.add_trace(drawn.trace.update(name="map"), row=4, col=1)
    figure.update_layout(
        template="plotly_white",
        margin=MARGIN_PX,
        showlegend=False,
        dragmode="pan",
        plot_bgcolor="#f4f4f2",
        font={"family": "system-ui, sans-serif", "size": 12},
    )
    timed = drawn.x == "time"
    words_px = WORDS_PX if any(clip.words for clip in clips) else 1
    heights = [words_px, WAVE_PX, MEL_PX, _map_px(drawn.rows)]
    domains = _stack_rows(figure, heights, GAP_PX if timed else AXIS_PX)
    _style_clip_axes(figure, 4 if timed else 3, max(clip.seconds for clip in clips))
    style_map_axes(figure.layout.xaxis4, figure.layout.yaxis4, drawn, quantity)
    bottom = domains[-1 if timed else -2][0]
    figure.update_layout(shapes=_word_edges(clips[0].words, bottom))
    bar = {"thickness": 12, "len": domains[-1][1], "y": 0, "yanchor": "bottom"}
    figure.update_traces(colorbar=bar, selector={"type": "heatmap", "name": "map"})
    return figure


def _map_px(rows: int) -> int:
    least, most = MAP_PX
    return max(least, min(MAP_ROW_PX * rows, most))


def _stack_rows(figure: go.Figure, heights: list[int], last_gap: int) -> list[tuple]:
    """Lay out the rows from the top, ``last_gap`` pixels above the last; their domains."""
    gaps = [*[GAP_PX] * (len(heights) - 2), last_gap, 0]
    total = sum(heights) + sum(gaps)
    domains, top = [], total
    for row, (height, gap) in enumerate(zip(heights, gaps, strict=True), start=1):
        domains.append(((top - height) / total, top / total))
        figure.update_yaxes(domain=domains[-1], row=row)
        top -= height + gap
    figure.update_layout(height=total + MARGIN_PX["t"] + MARGIN_PX["b"])
    return domains


def _style_clip_axes(figure: go.Figure, timed: int, seconds: float) -> None:
    """The first ``timed`` rows share the axis of seconds, written under the last of them."""
    for row in range(1, timed + 1):
        figure.update_xaxes(
            range=[0, seconds],
            matches="x" if row > 1 else None,
            showgrid=False,
            showticklabels=row == timed,
            row=row,
        )
    figure.update_xaxes(title=TITLES["time"], row=timed)
    figure.update_yaxes(fixedrange=True, showgrid=False, zeroline=False)
    figure.update_yaxes(showticklabels=False, row=1)
    figure.update_yaxes(showticklabels=False, title="wave", row=2)
    ticks = hertz_to_mel(np.array(TICKS_HZ, dtype=float), mel_scale="slaney")
    names = [f"{hz / 1000:g}k" for hz in TICKS_HZ]
    figure.update_yaxes(tickvals=ticks, ticktext=names, title="Hz", row=3)


def _words(clip: Clip) -> go.Bar:
    return go.Bar(
        name="words",
        orientation="h",
        base=[word.start_s for word in clip.words],
        x=[word.end_s - word.start_s for word in clip.words],
        y=[0] * len(clip.words),
        width=1,
        text=[html.escape(word.label or "", quote=False) for word in clip.words],
        textposition="inside",
        insidetextanchor="middle",
        customdata=[[word.start_s, word.end_s] for word in clip.words],
        hovertext=[html.escape(describe_span(word), quote=False) for word in clip.words],
        hovertemplate="%{hovertext}<extra></extra>",
        marker={"color": "#e3dccb", "line": {"color": "#8a7f66", "width": 1}},
    )


def _word_edges(words: Sequence[Span], bottom: float) -> list[dict]:
    line = {"color": "rgba(60, 50, 30, 0.45)", "width": 1, "dash": "dot"}
    return [
        {"type": "line", "x0": at, "x1": at, "y0": bottom, "y1": 1, "yref": "paper", "line": line}
        for word in words
        for at in (word.start_s, word.end_s)
    ]


def _waveform(clip: Clip) -> go.Scatter:
    seconds, levels = envelope(clip.samples, clip.sampling_rate)
    line = {"color": "#3b4a54", "width": 1}
    return go.Scatter(name="wave", x=seconds, y=levels, mode="lines", line=line, hoverinfo="skip")


def envelope(
    samples: Float[np.ndarray, " samples"], sampling_rate: int
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Seconds and levels to draw a waveform by: lowest and highest sample of short stretches."""
    size = math.ceil(len(samples) / ENVELOPE_BINS)
    padded = np.pad(samples, (0, -len(samples) % size), mode="edge").reshape(-1, size)
    levels = np.stack([padded.min(axis=1), padded.max(axis=1)], axis=1).ravel()
    seconds = np.repeat((np.arange(len(padded)) + 0.5) * size / sampling_rate, 2)
    return seconds.astype(np.float32), levels.astype(np.float32)


def _mel(clip: Clip) -> go.Heatmap:
    hop = max(clip.sampling_rate // 100, math.ceil(len(clip.samples) / MOST_FRAMES))
    low, high = hertz_to_mel(np.array([0.0, clip.sampling_rate / 2]), mel_scale="slaney")
    return go.Heatmap(
        name="mel",
        z=log_mel(clip, hop),
        x0=0,
        dx=hop / clip.sampling_rate,
        y=np.linspace(low, high, N_MELS + 2)[1:-1],
        colorscale="Greys",
        zmin=-DB_RANGE,
        zmax=0,
        showscale=False,
        hovertemplate="%{x:.2f} s: %{z} dB<extra></extra>",
    )


def log_mel(clip: Clip, hop: int) -> Int8[np.ndarray, "mels frames"]:
    """Log-mel spectrogram in whole dB below its loudest point, 25 ms windows every ``hop``."""
    length = clip.sampling_rate // 40
    mel = spectrogram(
        np.pad(clip.samples, (0, max(0, length - len(clip.samples)))),
        np.hanning(length + 1)[:-1],
        frame_length=length,
        hop_length=hop,
        power=2.0,
        mel_filters=mel_filter_bank(
            num_frequency_bins=length // 2 + 1,
            num_mel_filters=N_MELS,
            min_frequency=0.0,
            max_frequency=clip.sampling_rate / 2,
            sampling_rate=clip.sampling_rate,
            norm="slaney",
            mel_scale="slaney",
        ),
        log_mel="dB",
        db_range=DB_RANGE,
    )
    return (mel - mel.max()).round().astype(np.int8)
