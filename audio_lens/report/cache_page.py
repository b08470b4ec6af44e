"""The page of a cache: norms and logit lens over layers and positions, with the sound."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int
from plotly.colors import sequential

from audio_lens import arguments
from audio_lens.analysis.logit_lens import Streams, check_vocabulary, read_streams, texts_of
from audio_lens.analysis.prompts import Prompt, token_label
from audio_lens.audio import AudioSource
from audio_lens.cache import AudioCache
from audio_lens.drawing.rows import STYLE, Panel, Rows, escaped
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models import HookedAudioTransformer
from audio_lens.models.kinds.ctc import ctc_of
from audio_lens.report.html import traces_json, write_page
from audio_lens.report.shown import Tiers, clip_of, notes_on
from audio_lens.timeline import Span

LAYER_PX, LEAST_PX, MOST_PX = 22, 120, 520
MOST_COLUMNS = 1500
LEAST_S = 0.1  # what a click on a shorter position plays
TICKS = [digit * 10.0**power for power in range(-6, 9) for digit in (1, 2, 5)]
BAR = {"thickness": 12, "len": 0.5, "y": 0, "yanchor": "bottom"}
NORMS_SHOWN = 98  # per cent of the norms that lie within the colours
BLUES = sequential.Blues  # safe for colour-blind readers
CHANCES = {
    "colorscale": [[i / (len(BLUES) - 1), colour] for i, colour in enumerate(BLUES)],
    "colorbar": BAR | {"title": {"text": "probability"}},
    "zmin": 0,
    "zmax": 1,
}

Inputs = AudioInputs | Mapping[str, Any]
Tokens = Sequence[str | int]


def cache_page(
    model: HookedAudioTransformer,
    inputs: Inputs,
    path: str | Path,
    *,
    cache: AudioCache | None = None,
    parts: str | Sequence[str] | None = None,
    lens: bool | None = None,
    tokens: Tokens = (),
    layers: Sequence[int] | None = None,
    row: int = 0,
    clip: int = 0,
    audio: AudioSource | None = None,
    words: Sequence[Span] = (),
    phones: Sequence[Span] = (),
    title: str = "What the layers hold",
) -> Path:
    """Write the residual streams of a run, layer by position, under the clip.

    Norms everywhere; where there is a vocabulary also the logit lens: what the model would write at
    each position if a layer were its last (final norm and unembedding applied to the stream), with
    probabilities. Positions that hold audio lie on the seconds of the clip, and a click plays them;
    text has columns of its own. The file needs no network.

    Args:
        model: the model.
        inputs: prompts, as the model takes them.
        path: the HTML file to write.
        cache: activations of a run on these inputs with `resid_pre` of every layer and the last
            residual stream; None runs the model on the prompt.
        parts: "encoder", "decoder" or both; None for all there are.
        lens: whether to read tokens; None where a part has a vocabulary.
        tokens: words that are one token, or token ids, whose probability is shown too.
        layers: whose input to show beside the output of the last, negative numbers from the end;
            None for all.
        row, clip: which prompt of the batch, and which clip of the prompt.
        audio: the clip, where the inputs hold no waveform.
        words, phones: labelled stretches of the clip, in seconds.
        title: headline of the page.

    Returns:
        The path written.

    Raises:
        InputError: a part, layer, prompt or clip that does not exist, a cache of other inputs, or
            a lens or tokens where no part has a vocabulary.
        HookNameError: a cache without the residual streams.
        TokenError: a word that is not one token.
    """
    arguments.text("title", title)
    prompt = Prompt.of(model, inputs, row, clip, audio)
    prompt = prompt.shown() if cache is None else prompt
    found = streams_shown(prompt, cache, parts, lens, tokens, layers)
    return write_streams(prompt, found, path, title, {"words": words, "phones": phones})


def write_streams(
    prompt: Prompt, found: Sequence[Streams], path: str | Path, title: str, tiers: Tiers
) -> Path:
    """Write what was read."""
    rows = Rows([clip_of(prompt, tiers)])
    drawings = [Drawing.of(prompt, streams, rows) for streams in found]
    views = [view for drawing in drawings for view in drawing.views]
    parts = {drawing.part: drawing.to_json(rows) for drawing in drawings}
    return write_page(
        path,
        "cache.html",
        rows,
        {"parts": parts, "views": views},
        height=parts[views[0]["part"]]["layout"]["height"],
        title=title,
        views=views,
        tables={streams.part: layer_lines(prompt, streams) for streams in found},
        facts=prompt.facts(),
        notes=_notes(drawings) + notes_on(prompt),
    )


def cache_figure(
    model: HookedAudioTransformer,
    inputs: Inputs,
    show: str = "norm",
    *,
    part: str | None = None,
    cache: AudioCache | None = None,
    row: int = 0,
    clip: int = 0,
    audio: AudioSource | None = None,
    words: Sequence[Span] = (),
    phones: Sequence[Span] = (),
) -> go.Figure:
    """Norms or the logit lens of a part under the clip, as a plotly figure for notebooks.

    Args:
        show: "norm", "lens" (the likeliest token and its probability), or a word that is one
            token, whose probability is shown.
        part: "encoder" or "decoder"; None is the part that makes the output.

    The rest, and the errors, are as of `cache_page`.
    """
    prompt = Prompt.of(model, inputs, row, clip, audio)
    prompt = prompt.shown() if cache is None else prompt
    tokens = () if show in ("norm", "lens") else (show,)
    part = model.output_part if part is None else part
    (streams,) = streams_shown(prompt, cache, part, show != "norm", tokens)
    rows = Rows([clip_of(prompt, {"words": words, "phones": phones})])
    drawing = Drawing.of(prompt, streams, rows)
    view = next(view for view in drawing.views if view["key"] == show)
    layout = rows.layout(drawing.panels, title_px=40)
    layout.update(title=escaped(f"{part}: {view['label']}"), margin=STYLE["margin"] | {"t": 50})
    return go.Figure([*rows.traces(0), *drawing.painted(view)], layout)


def streams_shown(
    prompt: Prompt,
    cache: AudioCache | None,
    parts: str | Sequence[str] | None,
    lens: bool | None,
    tokens: Tokens,
    layers: Sequence[int] | None = None,
) -> list[Streams]:
    """The streams of the parts wanted, what makes the output first.

    Without a cache the prompt is `Prompt.shown`.

    Raises:
        InputError: a part that does not exist or holds nothing, or a lens or tokens where no part
            has a vocabulary.
    """
    there = list(reversed(prompt.model.cfg.parts))
    wanted = there if parts is None else arguments.names("parts", parts)
    tokens = arguments.listed("tokens", tokens, (str, int), "words or token ids")
    unknown = [part for part in wanted if part not in there]
    if unknown or not wanted:
        raise InputError(f"no part {', '.join(unknown) or 'named'}: there is {', '.join(there)}")
    if lens is False and tokens:
        raise InputError("tokens= are read by the logit lens: leave out lens=False")
    if lens or tokens:
        check_vocabulary(prompt, wanted)
    empty = [part for part in wanted if not prompt.holds(part)]  # no text for a text encoder
    if empty and parts is not None:
        raise InputError(f"the {' and the '.join(empty)} has no positions to show in this prompt")
    wanted = [part for part in wanted if part not in empty]
    return read_streams(prompt, wanted, lens is not False, tokens, cache, layers)


# -------------------------------------------------------------------------------- columns


@dataclass(frozen=True)
class Columns:
    """The drawn columns of a part: stretches of the clip, then tokens of text.

    Attributes:
        edges: bounds of the stretches in seconds; none in a part without audio.
        spans: what a click on each stretch plays.
        of_position: the column of every position.
        names: what the columns are called, as plotly takes text.
    """

    edges: list[float]
    spans: list[list[float]]
    of_position: Int[np.ndarray, " positions"]
    names: list[str]

    @staticmethod
    def of(streams: Streams, duration_s: float) -> Columns:
        """The columns of the positions of some streams."""
        if not len(streams.audio):
            return Columns([], [], np.arange(len(streams.text)), list(map(escaped, streams.labels)))
        edges, of_audio = streams.audio.bins(duration_s, MOST_COLUMNS)
        n_audio = len(edges) - 1
        of_position = np.append(of_audio.numpy(), n_audio + np.arange(len(streams.text)))
        stretches = list(itertools.pairwise(edges.tolist()))
        names = [f"{(start + end) / 2:.2f} s" for start, end in stretches]
        return Columns(
            edges.round(6).tolist(),
            [_audible(*stretch, duration_s) for stretch in stretches],
            of_position,
            [*names, *map(escaped, streams.labels)],
        )

    @property
    def n_audio(self) -> int:
        return len(self.spans)

    @property
    def is_pooled(self) -> bool:
        """Whether a column stands for several positions."""
        return len(self.of_position) > len(self.names)

    def means(self, values: Float[np.ndarray, "s positions"]) -> Float[np.ndarray, "s columns"]:
        """Means over the positions of each column."""
        order = np.argsort(self.of_position, kind="stable")
        _, starts, counts = np.unique(
            self.of_position[order], return_index=True, return_counts=True
        )
        return np.add.reduceat(values[:, order], starts, axis=1) / counts

    def firsts(self, values: np.ndarray) -> np.ndarray:
        """Values at the first position of each column."""
        _, first = np.unique(self.of_position, return_index=True)
        return values[:, first]


def _audible(start: float, end: float, duration_s: float) -> list[float]:
    """The stretch, with what lies about it where it is too short to hear."""
    more = max(0.0, LEAST_S - (end - start)) / 2
    return [round(max(0.0, start - more), 6), round(min(duration_s, end + more), 6)]


# -------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Drawing:
    """How the streams of a part are drawn.

    Attributes:
        panels: of the clip's seconds and of the text, where there are.
        traces: a heat map for each, without its numbers.
        views: what can be shown: numbers ``z`` for every stream and column, and their colours.
    """

    part: str
    streams: list[str]
    columns: Columns
    panels: list[Panel]
    traces: list[go.Heatmap]
    views: list[dict[str, Any]]
    has_lens: bool

    @staticmethod
    def of(prompt: Prompt, streams: Streams, rows: Rows) -> Drawing:
        """The drawing of some streams."""
        columns = Columns.of(streams, prompt.seconds)
        panels, traces = _panels(streams, columns)
        for panel, trace in enumerate(traces):
            trace.update({"y": streams.names, "hoverongaps": False} | rows.axes(panel))
        views = _views(prompt, streams, columns)
        has_lens = streams.lens is not None
        return Drawing(streams.part, streams.names, columns, panels, traces, views, has_lens)

    def to_json(self, rows: Rows) -> dict[str, Any]:
        """The part for cache.js."""
        return {
            "traces": traces_json(self.traces),
            "layout": rows.layout(self.panels).to_plotly_json(),
            "names": self._by_trace(self.columns.names),
            "streams": self.streams,
            "edges": self.columns.edges,
        }

    def painted(self, view: dict[str, Any]) -> list[go.Heatmap]:
        """The traces with the numbers of a view."""
        texts = view.get("tokens")
        if texts is not None:
            texts = [[view["strings"][best[0]] for best in stream] for stream in texts]
        number = "norm 10^%{z:.2f}" if view["key"] == "norm" else "%{z:.3f}"
        token = "" if texts is None else "%{text} "
        hover = f"layer %{{y}}, %{{customdata}}<br>{token}{number}<extra></extra>"
        found = []
        for index, trace in enumerate(self.traces):
            names = self._by_trace(self.columns.names)[index]
            z = [self._by_trace(stream)[index] for stream in view["z"]]
            text = texts and [self._by_trace(stream)[index] for stream in texts]
            data = {"z": z, "text": text, "customdata": [names] * len(z), "hovertemplate": hover}
            found.append(go.Heatmap(trace).update(data | view["style"], showscale=index == 0))
        return found

    def _by_trace(self, of_columns: list) -> list[list]:
        n_audio = self.columns.n_audio
        return [some for some in (of_columns[:n_audio], of_columns[n_audio:]) if some]


def _panels(streams: Streams, columns: Columns) -> tuple[list[Panel], list[go.Heatmap]]:
    height = min(max(LAYER_PX * len(streams.names), LEAST_PX), MOST_PX)
    layers = {"title": {"text": "layer"}, "type": "category"}
    panels, traces = [], []
    if columns.n_audio:
        panels.append(Panel(height, yaxis=layers))
        meta = {"spans": columns.spans}
        traces.append(go.Heatmap(name="audio", x=columns.edges, meta=meta))
    if streams.labels:
        numbers = np.arange(len(streams.labels) + 1)
        labels = columns.names[columns.n_audio :]
        axis = {"tickvals": numbers[:-1], "ticktext": labels, "tickangle": -45, "automargin": True}
        panels.append(Panel(height, xaxis=axis, yaxis=layers, timed=False))
        traces.append(go.Heatmap(name="text", x=(numbers - 0.5).tolist()))
    return panels, traces


def _views(prompt: Prompt, streams: Streams, columns: Columns) -> list[dict[str, Any]]:
    """What can be shown of a part, the logit lens first."""
    norms = {
        "part": streams.part,
        "key": "norm",
        "label": "residual norm",
        **_norms(columns.means(streams.norms)),
    }
    if streams.lens is None:
        return [norms]
    tokens, probs = columns.firsts(streams.lens.tokens), columns.firsts(streams.lens.probs)
    kinds, index = np.unique(tokens, return_inverse=True)
    likeliest = {
        "part": streams.part,
        "key": "lens",
        "label": "logit lens",
        "z": _short(probs[..., 0]),
        "style": CHANCES,
        "tokens": index.reshape(tokens.shape).tolist(),
        "probs": _short(probs),
        "strings": [escaped(token_label(prompt.model, int(token))) for token in kinds],
        "blank": _blank(prompt, kinds),
    }
    watched = [
        {
            "part": streams.part,
            "key": name,
            "label": f"probability of {name!r}",
            "z": _short(columns.firsts(chances)),
            "style": CHANCES,
        }
        for name, chances in streams.lens.watched.items()
    ]
    return [likeliest, *watched, norms]


def _norms(norms: Float[np.ndarray, "streams columns"]) -> dict[str, Any]:
    """Logarithms of norms, with ticks that say the norms themselves."""
    logs = np.log10(np.maximum(norms, TICKS[0]))
    low, high = (float(x) for x in np.percentile(logs, [0, NORMS_SHOWN]))
    ticks = [tick for tick in TICKS if low <= np.log10(tick) <= high]
    bar = {"title": {"text": "norm"}, "tickvals": np.log10(ticks).tolist()}
    bar["ticktext"] = [f"{tick:g}" for tick in ticks]
    style = {"colorscale": "Cividis", "colorbar": BAR | bar, "zmin": low, "zmax": high}
    return {"z": _short(logs), "style": style}


def _blank(prompt: Prompt, tokens: Int[np.ndarray, " n"]) -> int:
    """Which of the tokens is CTC's blank, which is not written on cells; -1 for none."""
    if prompt.model.cfg.output_kind != "ctc":
        return -1
    found = np.flatnonzero(tokens == ctc_of(prompt.model.cfg).blank)
    return int(found[0]) if len(found) else -1


def _short(numbers: np.ndarray) -> list:
    return np.round(numbers.astype(float), 3).tolist()


def layer_lines(prompt: Prompt, streams: Streams) -> list[dict[str, Any]]:
    """A line for every stream: its mean norm, and what it would write."""
    lines = [
        {"layer": name, "norm": float(norm)}
        for name, norm in zip(streams.names, streams.norms.mean(1), strict=True)
    ]
    if streams.lens is None:
        return lines
    texts = texts_of(prompt, streams)
    return [line | {"text": text} for line, text in zip(lines, texts, strict=True)]


def _notes(drawings: Sequence[Drawing]) -> list[str]:
    """How to read the page."""
    notes = [
        "Layer l is the residual stream that layer l reads; out is the one behind the last layer.",
        "Norms are lengths of the vectors (L2); their colours are logarithmic and end where "
        f"{NORMS_SHOWN} % of them lie below, so that one large column does not take them all.",
        f"A click plays at least {LEAST_S:g} s about the position.",
    ]
    if any(drawing.has_lens for drawing in drawings):
        notes.append(
            "The logit lens applies the final norm and the unembedding to each stream. It tells "
            "what would be written behind a position; early layers often write in another basis, "
            "so that its words there mean little."
        )
    for drawing in drawings:
        if not drawing.has_lens:
            notes.append(f"{drawing.part}: norms only, nothing was read as tokens.")
        if drawing.columns.is_pooled:
            notes.append(
                f"{drawing.part}: a column holds several positions; norms are their means, tokens "
                "those of the first."
            )
    return notes
