"""Static figures for papers: the map of a result, under its clip if given, by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from audio_lens.arguments import number, path_of
from audio_lens.drawing import clips as sound
from audio_lens.drawing.clips import Clip
from audio_lens.drawing.figures import Axis, Map, draw_map, shown_quantity
from audio_lens.drawing.labelled import Labelled
from audio_lens.drawing.rows import BACKGROUND, DIVERGING, SAID_COLOURS, SECONDS, WAVE_COLOUR
from audio_lens.errors import ExtraError, InputError
from audio_lens.files import write
from audio_lens.timeline import Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# text stays text, in PDF (TrueType) and in SVG
STYLE = {"pdf.fonttype": 42, "svg.fonttype": "none", "font.size": 8, "axes.linewidth": 0.6}
TIER_IN, WAVE_IN, MEL_IN, ROW_IN, MAP_IN, BARS_IN = 0.18, 0.35, 0.8, 0.16, (0.9, 3.5), 0.9
AXIS_IN = 0.45  # ticks and title of an axis
MOST_TICKS, DARK = 16, 0.6  # named columns; share of the colour scale from which text is white
DPI = 300
LEAST_IN, MOST_IN = 0.5, 100.0


def map_figure(
    result: Labelled,
    path: str | Path | None = None,
    quantity: str | None = None,
    clip: Clip | None = None,
    width_in: float = 6.0,
) -> Figure:
    """The map of a result of one metric, under its clip if any; see `results.Result.figure`.

    Raises:
        ImportError: without matplotlib.
        ValueError: as of `draw_map`.
        OutputError: a path that cannot be written; the old file stays.
    """
    number("width_in", width_in, least=LEAST_IN, most=MOST_IN, unit="inches")
    matplotlib = _matplotlib()
    quantity = shown_quantity(result, quantity)
    drawn = draw_map(result, quantity)
    with matplotlib.rc_context(STYLE):
        figure = _figure(drawn, quantity, clip, width_in)
        if path is not None:
            _save(figure, path)
    return figure


def _save(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format of the suffix; without one, in matplotlib's, which it adds."""
    path = path_of("path", path)
    suffix = path.suffix or f".{figure.canvas.get_default_filetype()}"
    known = figure.canvas.get_supported_filetypes()
    if suffix.removeprefix(".").lower() not in known:
        raise InputError(f"{suffix} is not supported: name one of {', '.join(sorted(known))}")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format=suffix.removeprefix("."))
    write(path.with_name(f"{path.stem}{suffix}"), drawn.getvalue())


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ExtraError(
            "figures for papers need matplotlib: pip install 'audio_lens[figures]'"
        ) from error
    return matplotlib


def _figure(drawn: Map, quantity: str, clip: Clip | None, width_in: float) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    above = [] if clip is None else [*[TIER_IN] * len(clip.tiers), WAVE_IN, MEL_IN]
    heights = [*above, _height_in(drawn)]
    is_timed = drawn.x.name == "time"
    n_axes = 1 if is_timed or clip is None else 2
    engine = ConstrainedLayoutEngine(h_pad=0.02, hspace=0)
    figure = Figure((width_in, sum(heights) + AXIS_IN * n_axes), layout=engine)
    *rows, ax = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    if clip is not None:
        _draw_clip(rows, clip)
        _share_seconds([*rows, ax] if is_timed else rows, clip)
    if drawn.y is None:
        _draw_bars(ax, drawn, quantity)
    else:
        colours = _draw_heat(ax, drawn, drawn.y, quantity)
        part = heights[-1] / sum(heights)
        bar = figure.colorbar(colours, ax=[*rows, ax], shrink=part, anchor=(0, 0), aspect=25 * part)
        bar.set_label(drawn.label)
    return figure


def _height_in(drawn: Map) -> float:
    if drawn.y is None:
        return BARS_IN
    least, most = MAP_IN
    return min(max(ROW_IN * len(drawn.y.order), least), most)


def _colours(drawn: Map, quantity: str) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    limit = drawn.limits[quantity]
    return ScalarMappable(Normalize(-limit, limit), DIVERGING)


def _draw_heat(ax: Axes, drawn: Map, up: Axis, quantity: str) -> Any:
    """The cells with the ranks of the strongest; returns what a colour bar shows."""
    colours = _colours(drawn, quantity)
    z = np.array(drawn.trace["z"], dtype=float)
    x, y = _dress(ax.xaxis, drawn.x), _dress(ax.yaxis, up)
    ax.set_facecolor(BACKGROUND)
    ax.pcolormesh(x, y, z, cmap=colours.cmap, norm=colours.norm, edgecolor="face", linewidth=0.1)
    text = np.array(drawn.trace["text"])
    for row, column in zip(*np.nonzero(text), strict=True):
        is_dark = abs(colours.norm(z[row, column]) - 0.5) > DARK / 2
        at = float(x[column] + x[column + 1]) / 2, float(y[row] + y[row + 1]) / 2
        _write(ax, at, str(text[row, column]), color="white" if is_dark else "black")
    return colours


def _draw_bars(ax: Axes, drawn: Map, quantity: str) -> None:
    """Bars with the ranks of the strongest."""
    z = np.array(drawn.trace.y, dtype=float)
    edges = _dress(ax.xaxis, drawn.x)
    kept = [at for at, index in enumerate(drawn.x.order) if index is not None]
    centres, widths = ((edges[1:] + edges[:-1]) / 2)[kept], np.diff(edges)[kept]
    ax.bar(
        centres,
        z,
        widths,
        color=_colours(drawn, quantity).to_rgba(z),
        edgecolor="0.5",
        linewidth=0.5,
    )
    bounds = drawn.trace.to_plotly_json().get("error_y") or {}
    if "array" in bounds:
        reach = np.array([bounds["arrayminus"], bounds["array"]], dtype=float)
        ax.errorbar(centres, z, reach, fmt="none", ecolor="0.2", elinewidth=0.8, capsize=2)
    ax.axhline(0, color="0.3", linewidth=0.5)
    ax.set_ylabel(drawn.label)
    ax.margins(y=0.2)
    text = np.array(drawn.trace["text"])
    for at in np.flatnonzero(text):
        _write(ax, (centres[at], max(z[at], 0.0)), text[at], va="bottom")


def _write(ax: Axes, at: tuple[float, float], text: str, **look: Any) -> None:
    look = {"ha": "center", "va": "center", **look}
    ax.annotate(text, at, fontsize=6, **look)


def literal(text: str) -> str:
    """Text as matplotlib takes it, to which dollars begin a formula."""
    return text.replace("$", r"\$")


def _dress(axis: Any, drawn: Axis) -> np.ndarray:
    """Title and ticks of an axis; returns the edges of its columns."""
    if drawn.name == "frequency":
        _dress_hertz(axis)
    else:
        axis.set_label_text(SECONDS if drawn.name == "time" else literal(drawn.name))
    if drawn.edges is not None:
        return np.array(drawn.edges)
    every = -(-len(drawn.coords) // MOST_TICKS)
    axis.set_ticks(range(0, len(drawn.coords), every), list(map(literal, drawn.names[::every])))
    return np.arange(len(drawn.coords) + 1) - 0.5


def _dress_hertz(axis: Any) -> None:
    names = [f"{hertz / 1000:g}" for hertz in sound.TICKS_HZ]
    axis.set_ticks(sound.mel_of(sound.TICKS_HZ), names)
    axis.set_label_text("kHz")


def _draw_clip(rows: Sequence[Axes], clip: Clip) -> None:
    """Tiers, waveform and spectrogram."""
    *tiers, wave, mel = rows
    for ax, (name, spans) in zip(tiers, clip.tiers.items(), strict=True):
        _draw_tier(ax, name, spans)
    step, samples = sound.envelope(clip.samples, clip.sampling_rate)
    wave.plot(np.arange(len(samples)) * step, samples, color=WAVE_COLOUR, linewidth=0.4)
    wave.set_yticks([])
    hop = sound.hop_of([clip])
    (levels,) = sound.log_mels([clip], hop)
    seconds = (np.arange(levels.shape[1] + 1) - 0.5) * hop / clip.sampling_rate
    centres = sound.mel_centres(clip.sampling_rate)
    half = (centres[1] - centres[0]) / 2
    edges = np.append(centres - half, centres[-1] + half)
    mel.pcolormesh(seconds, edges, levels, cmap="Greys", vmin=-sound.DB_RANGE, rasterized=True)
    _dress_hertz(mel.yaxis)
    mel.set_ylim(edges[0], edges[-1])


def _draw_tier(ax: Axes, name: str, spans: Sequence[Span]) -> None:
    ax.set_yticks([0], [literal(name)])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(-0.5, 0.5)
    fill, line = SAID_COLOURS
    for span in spans:
        width = span.end_s - span.start_s
        ax.barh(0, width, 1, span.start_s, color=fill, edgecolor=line, linewidth=0.5)
        _write(ax, (span.centre_s, 0.0), span.label or "", parse_math=False)


def _share_seconds(timed: Sequence[Axes], clip: Clip) -> None:
    """One axis of seconds, written under the last row, with the bounds of the first tier."""
    for ax in timed:
        ax.set_xlim(0, clip.seconds)
        for at in clip.bounds:
            ax.axvline(at, color=SAID_COLOURS[1], linewidth=0.4, linestyle=":")
        if ax is not timed[-1]:
            ax.tick_params(labelbottom=False, bottom=False)
            ax.spines[:].set_visible(False)
    timed[-1].set_xlabel(SECONDS)
