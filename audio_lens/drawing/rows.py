"""Rows of a page on one axis of seconds: what is said, waveform, spectrogram, and what is below."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Int8
from plotly.basedatatypes import BaseTraceType

from audio_lens.drawing import clips as sound
from audio_lens.drawing.clips import Clip
from audio_lens.timeline import describe_span

SECONDS = "time in the clip (s)"
DIVERGING = "RdBu_r"  # centred on zero, safe for colour-blind readers
MEL_COLOURS = {"colorscale": "Greys", "zmin": -sound.DB_RANGE, "zmax": 0}
DIFFERENCE_COLOURS = {"colorscale": DIVERGING, "zmin": -40, "zmax": 40}  # dB
TIER_PX, WAVE_PX, MEL_PX = 26, 76, 150
GAP_PX, AXIS_PX, MARGIN_PX = 8, 52, {"l": 74, "r": 100, "t": 10, "b": 46}
BACKGROUND, WAVE_COLOUR, SAID_COLOURS = "#f4f4f2", "#3b4a54", ("#e3dccb", "#8a7f66")
STYLE = {
    "template": "plotly_white",
    "margin": MARGIN_PX,
    "showlegend": False,
    "dragmode": "pan",
    "plot_bgcolor": BACKGROUND,
    "font": {"family": "system-ui, sans-serif", "size": 12},
}
FIXED = {"fixedrange": True, "showgrid": False, "zeroline": False}
NO_TICKS = {"showticklabels": False}


@dataclass(frozen=True)
class Panel:
    """A row under the spectrogram: its height, and plotly's settings of its axes.

    Attributes:
        timed: whether its x axis is the seconds of the clip; panels that are not come last.
    """

    height_px: int
    xaxis: dict[str, Any] = field(default_factory=dict)
    yaxis: dict[str, Any] = field(default_factory=dict)
    timed: bool = True


class Rows:
    """The rows above the panels, for clips that share their seconds.

    Of two clips the difference comes as a third. Traces tell in ``meta`` what they play when
    clicked: ``{"spans": [[start_s, end_s], ...]}`` has a stretch (or None) for every point, of a
    heat map for every column; ``{"seek": True}`` plays from the click on.
    """

    def __init__(self, clips: Sequence[Clip]):
        self.clips, self.hop = list(clips), sound.hop_of(clips)
        self.mels = sound.log_mels(clips, self.hop)
        if len(clips) == 2:
            self.clips.append(clips[0].minus(clips[1]))
            self.mels.append(_difference(*self.mels))
        self.tiers = sound.tier_names(clips)
        self.seconds = max(clip.seconds for clip in clips)

    def axes(self, panel: int = 0) -> dict[str, str]:
        """The axes of traces that belong into a panel."""
        return _axes(len(self.tiers) + 2 + panel)

    def traces(self, clip: int) -> list[BaseTraceType]:
        """A trace per tier, by its name, and "wave" and "mel" of a clip."""
        shown = self.clips[clip]
        tiers = [_tier(tier, shown.tiers.get(tier, ())) for tier in self.tiers]
        drawn = [*tiers, _waveform(shown), self._spectrogram(clip)]
        return [trace.update(_axes(row)) for row, trace in enumerate(drawn)]

    def layout(self, panels: Sequence[Panel], title_px: int = 0) -> go.Layout:
        """Axes and style of all rows; ``meta.bottom`` is where those in seconds end (paper).

        Args:
            title_px: how much higher the figure is, for a title.
        """
        above = [
            *(
                Panel(TIER_PX, yaxis={"tickvals": [0], "ticktext": [escaped(tier)]})
                for tier in self.tiers
            ),
            Panel(WAVE_PX, yaxis=NO_TICKS | {"title": {"text": "wave"}}),
            Panel(MEL_PX, yaxis=mel_axis()),
        ]
        rows = [*above, *panels]
        n_timed = sum(row.timed for row in rows)
        gaps = [AXIS_PX if row >= n_timed else GAP_PX for row in range(1, len(rows))]
        total = sum(row.height_px for row in rows) + sum(gaps)
        settings: dict[str, Any] = {}
        top = total
        for number, (row, gap) in enumerate(zip(rows, [*gaps, 0], strict=True)):
            x, y = _axes(number).values()
            domain = [(top - row.height_px) / total, top / total]
            if row.timed:
                bottom = domain[0]
            seconds = self._seconds_axis(number, n_timed) if row.timed else {}
            settings[_long(x)] = {"anchor": y, "showgrid": False} | seconds | row.xaxis
            settings[_long(y)] = {"anchor": x, "domain": domain} | FIXED | row.yaxis
            top -= row.height_px + gap
        height = total + MARGIN_PX["t"] + MARGIN_PX["b"] + title_px
        return go.Layout(height=height, meta={"bottom": bottom}, **STYLE, **settings)

    def beside(self, layout: go.Layout, panel: int = 0) -> dict[str, Any]:
        """Where the colour bar of a panel stands: beside it, as high as it is."""
        bottom, top = layout.to_plotly_json()[_long(self.axes(panel)["yaxis"])]["domain"]
        return {"y": bottom, "yanchor": "bottom", "len": top - bottom}

    def _seconds_axis(self, number: int, n_timed: int) -> dict[str, Any]:
        """Only the last row in seconds shows them."""
        axis = {"range": [0, self.seconds], "zeroline": False}
        axis |= {"matches": "x"} if number else {}
        return axis | ({"title": {"text": SECONDS}} if number == n_timed - 1 else NO_TICKS)

    def _spectrogram(self, clip: int) -> go.Heatmap:
        rate = self.clips[clip].sampling_rate
        return go.Heatmap(
            name="mel",
            z=self.mels[clip],
            x0=0,
            dx=self.hop / rate,
            y=sound.mel_centres(rate),
            showscale=False,
            hovertemplate="%{x:.2f} s: %{z} dB<extra></extra>",
            meta={"seek": True},
            **(DIFFERENCE_COLOURS if clip == 2 else MEL_COLOURS),
        )


def escaped(text: str) -> str:
    """Text as plotly takes it, which knows some HTML."""
    return html.escape(text, quote=False)


def mel_axis() -> dict[str, Any]:
    """Hz on the mel scale."""
    names = [f"{hz / 1000:g}k" for hz in sound.TICKS_HZ]
    ticks = sound.mel_of(sound.TICKS_HZ)
    return {"tickvals": ticks, "ticktext": names, "title": {"text": "Hz"}}


def _axes(row: int) -> dict[str, str]:
    number = "" if row == 0 else str(row + 1)
    return {"xaxis": f"x{number}", "yaxis": f"y{number}"}


def _long(axis: str) -> str:
    """The axis' name in a layout: ``xaxis3`` of ``x3``."""
    return f"{axis[0]}axis{axis[1:]}"


def _difference(
    one: Int8[np.ndarray, "mels frames_1"], two: Int8[np.ndarray, "mels frames_2"]
) -> Int8[np.ndarray, "mels frames"]:
    frames = max(one.shape[1], two.shape[1])
    quiet = {"mode": "constant", "constant_values": -sound.DB_RANGE}
    one, two = (np.pad(mel, ((0, 0), (0, frames - mel.shape[1])), **quiet) for mel in (one, two))
    return one - two  # both lie in -80 to 0, so that int8 holds it


def _tier(name: str, spans: Sequence) -> go.Bar:
    return go.Bar(
        name=name,
        orientation="h",
        base=[span.start_s for span in spans],
        x=[span.end_s - span.start_s for span in spans],
        y=[0] * len(spans),
        width=1,
        text=[escaped(span.label or "") for span in spans],
        textposition="inside",
        insidetextanchor="middle",
        hovertext=[escaped(describe_span(span)) for span in spans],
        hovertemplate="%{hovertext}<extra></extra>",
        marker={"color": SAID_COLOURS[0], "line": {"color": SAID_COLOURS[1], "width": 1}},
        meta={"spans": [[span.start_s, span.end_s] for span in spans]},
    )


def _waveform(clip: Clip) -> go.Scatter:
    step, levels = sound.envelope(clip.samples, clip.sampling_rate)
    loudest = max(np.abs(levels).max(), 1e-9)
    return go.Scatter(
        name="wave",
        x0=0,
        dx=step,
        y=(levels / loudest * 127).round().astype(np.int8),
        mode="lines",
        line={"color": WAVE_COLOUR, "width": 1},
        hovertemplate="%{x:.2f} s<extra></extra>",
        meta={"seek": True},
    )
