"""The page of attention: choose a head, see its pattern over the seconds of a clip, and listen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sequential

from audio_lens.analysis.attention import ClipAttention, check_heads, read_attention, sites_of
from audio_lens.analysis.prompts import Prompt
from audio_lens.arguments import text, whole
from audio_lens.audio import AudioSource
from audio_lens.cache import AudioCache
from audio_lens.drawing.rows import STYLE, Panel, Rows, escaped
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models import HookedAudioTransformer
from audio_lens.report.html import traces_json, write_page
from audio_lens.report.packing import LETTERS, TOP_LEVEL, fitted, letters_of
from audio_lens.report.shown import Tiers, clip_of, notes_on
from audio_lens.timeline import Span

ROOM_PER_S, LEAST_ROOM_S = 35_000, 10  # compressed bytes for patterns; a 10 s clip stays < 3 MB
PROFILE_PX, TOKEN_PX, MOST_PX, SQUARE_PX = 70, 18, 620, 420
NEXT = "what comes next"  # what the last row decides
LABEL_LETTERS, MOST_LABELS = 22, 40
BLUES = sequential.Blues  # safe for colour-blind readers
SCALE = [[(i / (len(BLUES) - 1)) ** 2, colour] for i, colour in enumerate(BLUES)]  # of roots
HOW = (
    "Darker: more of the attention of the row's query falls there. Click a row or a token to see "
    "and hear where it listened."
)
HOW_READ = (
    "Darker: more of the attention of what plays there falls on the row's word. Click a row or a "
    "word to see and hear where it is read."
)
SHARES = (0.25, 0.5, 0.75, 0.9)  # how much of a query's attention a click plays

Inputs = AudioInputs | Mapping[str, Any]


def attention_page(
    model: HookedAudioTransformer,
    inputs: Inputs,
    path: str | Path,
    *,
    cache: AudioCache | None = None,
    sites: str | Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    answer: int | None = None,
    row: int = 0,
    clip: int = 0,
    audio: AudioSource | None = None,
    words: Sequence[Span] = (),
    phones: Sequence[Span] = (),
    title: str = "Where the heads listen",
) -> Path:
    """Write the patterns of attention heads under their clip's waveform and spectrogram.

    The file needs no network and holds all heads of the chosen layers; layer, head and site are
    chosen on the page. Clicking a token (or, in an encoder, a moment) shows the stretches of the
    clip that get most of its attention and plays them. Where all heads are too much for 3 MB (of
    a 10 s clip), the seconds are cut coarser and then layers are left out; the page says so.

    Args:
        model: the model.
        inputs: prompts, as the model takes them.
        path: the HTML file to write.
        cache: activations of a run on these inputs that hold patterns (``attention=True``, or by
            name); None runs the model on the prompt.
        sites: some of "encoder.attn" (or of another ear), "decoder.cross_attn" and "decoder.attn"
            (of an audio LLM, to its audio); None for all there are. In models whose encoder reads
            text, the cross-attention of the moments of the clip to its words.
        layers, heads: numbers to show, negative ones from the end; None for all.
        answer: how many tokens the model writes first, which then are shown behind the prompt
            (not with a cache); None is 64, or none for models that write no tokens.
        row, clip: which prompt of the batch, and which clip of the prompt.
        audio: the clip, where the inputs hold no waveform.
        words, phones: labelled stretches of the clip, in seconds.
        title: headline of the page.

    Returns:
        The path written.

    Raises:
        InputError: a site, layer, head, prompt or clip that does not exist, a cache of other
            inputs, or an answer beside a cache.
        ValueError: layers that were asked for and do not fit.
        HookNameError: a cache without patterns.
    """
    text("title", title)
    given = Prompt.of(model, inputs, row, clip, audio)
    waits = given.n_ahead > 0  # steps of the clip enter while the model writes
    prompt = prompt_shown(given, cache, answer) if waits else given
    chosen = sites_of(prompt, sites)
    check_heads(model, chosen, layers, heads)
    prompt = prompt if waits else prompt_shown(given, cache, answer)
    tiers = {"words": words, "phones": phones}
    found = read_attention(prompt, chosen, layers, heads, cache)
    return write_attention(prompt, found, path, title, tiers, keeps_layers=layers is not None)


def write_attention(
    prompt: Prompt,
    found: Sequence[ClipAttention],
    path: str | Path,
    title: str,
    tiers: Tiers,
    keeps_layers: bool,
) -> Path:
    """Write what was read, made so small that the page stays under 3 MB for 10 s.

    Raises:
        ValueError: if that would leave out layers that are to be kept.
    """
    room = int(ROOM_PER_S * max(LEAST_ROOM_S, prompt.seconds))
    fitting = fitted(found, room, keeps_layers)
    rows = Rows([clip_of(prompt, tiers)])
    views = [_view(one, rows) for one in fitting]
    return write_page(
        path,
        "attention.html",
        rows,
        {"views": views, "letters": LETTERS, "most": LABEL_LETTERS},
        height=views[0]["layout"]["height"],
        title=title,
        sites=[one.name for one in fitting],
        shares=SHARES,
        facts=_facts(prompt, fitting),
        notes=_notes(fitting) + _left_out(found, fitting) + notes_on(prompt),
    )


def attention_figure(
    model: HookedAudioTransformer,
    inputs: Inputs,
    layer: int,
    head: int,
    *,
    site: str | None = None,
    cache: AudioCache | None = None,
    answer: int | None = None,
    row: int = 0,
    clip: int = 0,
    audio: AudioSource | None = None,
    words: Sequence[Span] = (),
    phones: Sequence[Span] = (),
) -> go.Figure:
    """One head's pattern under waveform and spectrogram, as a plotly figure for notebooks.

    Args:
        layer, head: which head; negative numbers count from the end.
        site: see `attention_page`; None is the part that writes, where it attends to audio.

    The rest, and the errors, are as of `attention_page`.
    """
    given = Prompt.of(model, inputs, row, clip, audio)
    chosen = sites_of(given, site)[:1]
    check_heads(model, chosen, [layer], [head])
    prompt = prompt_shown(given, cache, answer)
    (found,) = read_attention(prompt, chosen, [layer], [head], cache)
    rows = Rows([clip_of(prompt, {"words": words, "phones": phones})])
    pattern = found.share[0, 0]
    heat = go.Heatmap(
        x=found.edges,
        z=pattern,
        zmax=max(float(pattern.max()), 1e-9),
        customdata=[[escaped(query.label)] * pattern.shape[1] for query in found.queries],
        hovertemplate="%{customdata}<br>at %{x:.2f} s: %{z:.3f}<extra></extra>",
        **_heat_style(found),
        **rows.axes(),
    )
    layout = rows.layout([_pattern_panel(found)], title_px=40)
    title = f"{found.site}, layer {found.layers[0]}, head {found.heads[0]}"
    layout.update(title=title, margin={**STYLE["margin"], "t": 50})
    return go.Figure([*rows.traces(0), heat], layout)


def prompt_shown(prompt: Prompt, cache: AudioCache | None, answer: int | None) -> Prompt:
    """The prompt that is shown: as the cache knows it, or alone and with the model's answer.

    Raises:
        InputError: an answer beside a cache, or of a model that writes none.
    """
    writes = "decoder" in prompt.model.cfg.parts
    if answer is not None:
        whole("answer", answer, least=0)
    if answer is not None and (cache is not None or not writes):
        why = "a cache is of a run that was made" if writes else "this model writes no tokens"
        raise InputError(f"answer= has nothing to do here: {why}")
    if cache is not None:
        return prompt
    return prompt.shown(answer) if writes else prompt.alone()


# -------------------------------------------------------------------------------- drawing


def _view(attention: ClipAttention, rows: Rows) -> dict[str, Any]:
    """One site for attention.js."""
    heat = go.Heatmap(name="attention", x=attention.edges, z=[], **_heat_style(attention))
    profile = go.Bar(
        name="profile",
        marker={"color": BLUES[6]},
        hovertemplate="%{x:.2f} s: %{y:.1%}<extra></extra>",
        meta={"spans": np.stack([attention.edges[:-1], attention.edges[1:]], axis=1).tolist()},
    )
    percent = {"title": {"text": "share"}, "rangemode": "tozero", "tickformat": ".1~%", "nticks": 3}
    panels = [Panel(PROFILE_PX, yaxis=percent), _pattern_panel(attention)]
    return {
        "site": attention.site,
        "timed": attention.is_timed,
        **_told(attention),
        "layers": attention.layers,
        "heads": attention.heads,
        "edges": attention.edges.round(6).tolist(),
        "queries": [{"label": query.label, "span": query.span} for query in attention.queries],
        "decides": [] if attention.is_timed or attention.is_read else _decided(attention),
        "shares": letters_of(attention),
        "peaks": attention.peaks().tolist(),
        "on_audio": attention.on_audio.round(4).tolist(),
        "summary": [
            [one.layer, one.head, one.on_audio, one.entropy, one.peak_s]
            for one in attention.summary()
        ],
        "traces": traces_json([profile.update(rows.axes(0)), heat.update(rows.axes(1))]),
        "layout": rows.layout(panels).to_plotly_json(),
    }


def _facts(prompt: Prompt, found: Sequence[ClipAttention]) -> dict[str, str]:
    """What there is to say of the prompt; its words where a site reads them."""
    facts = prompt.facts()
    if all(one.site.startswith("encoder.") for one in found):
        facts.pop("prompt", None)
    return facts


def _decided(attention: ClipAttention) -> list[str]:
    """The token behind each, which a row decides."""
    return [*(query.label for query in attention.queries[1:]), NEXT]


def _told(attention: ClipAttention) -> dict[str, str]:
    """How to read the rows, what share of attention they have, and the table of the heads."""
    if attention.is_read:
        how, share = HOW_READ, "of the attention of all steps is on it"
    else:
        how, share = HOW, "of its attention is on the clip"
    return {"how": how, "share_of": share, "share_head": attention.share_head}


def _heat_style(attention: ClipAttention) -> dict[str, Any]:
    y = _query_edges(attention)
    return {
        "y": y,
        "colorscale": SCALE,
        "zmin": 0,
        "colorbar": {"thickness": 12, "title": "share", "len": 0.5, "y": 0, "yanchor": "bottom"},
        "hoverongaps": False,
    }


def _query_edges(attention: ClipAttention) -> np.ndarray:
    """Where rows begin and end: seconds, or numbers of tokens."""
    if attention.is_timed:
        return attention.edges
    return np.arange(len(attention.queries) + 1) - 0.5


def _pattern_panel(attention: ClipAttention) -> Panel:
    """The row of the page that holds the pattern: tokens downwards, seconds upwards."""
    if attention.is_timed:
        return Panel(SQUARE_PX, yaxis={"title": {"text": "frame at (s)"}})
    n = len(attention.queries)
    shown = range(0, n, -(-n // MOST_LABELS))
    labels = [escaped(_cut(attention.queries[i].label)) for i in shown]
    axis = {"range": [n - 0.5, -0.5], "tickvals": list(shown), "ticktext": labels}
    return Panel(min(max(n, 4) * TOKEN_PX, MOST_PX), yaxis=axis | {"automargin": True})


def _cut(label: str) -> str:
    return (
        label
        if len(label) <= LABEL_LETTERS
        else f"{label[: LABEL_LETTERS - 1]}\N{HORIZONTAL ELLIPSIS}"
    )


def _notes(found: Sequence[ClipAttention]) -> list[str]:
    """How patterns were made small, and how to read them."""
    notes = [
        "A share says how much of a query's attention falls into a stretch of the clip (of a row "
        "that is a word: how much of the attention of a stretch falls on it); what is missing to "
        "100 % falls on padding, on text or on other clips.",
        "Entropy is of how attention spreads over the positions of the clip; share on audio, "
        "entropy and peak are means over the queries shown, taken before anything is rounded.",
        f"Patterns are kept as square roots in {TOP_LEVEL + 1} steps up to the largest share of "
        "each head, so that small shares keep their detail.",
        "A click plays the shortest time that holds the chosen part of what a query gives to the "
        "clip; stretches below 0.1 s are played a little longer.",
    ]
    if any(one.is_read for one in found):
        notes.append(
            "In steps to text a row is a word, and its share in a stretch the mean of what the "
            "steps there give to it. Its entropy is of how that spreads over the steps."
        )
    if any(not (one.is_timed or one.is_read) for one in found):
        notes.append(
            "A row of tokens is what the model attends to at that token, while it decides on the "
            "next one. Text in front of the audio cannot attend to it and is left out."
        )
    for one in found:
        width = (one.edges[-1] - one.edges[0]) / (len(one.edges) - 1)
        of_keys = "" if one.is_read else "attention to the positions in them is added up"
        of_queries = "attention from them is averaged" if one.is_timed or one.is_read else ""
        notes.append(
            f"{one.site}: {len(one.edges) - 1} stretches of about {1000 * width:.0f} ms; "
            f"{', '.join(filter(None, (of_keys, of_queries)))}."
        )
    return notes


def _left_out(found: Sequence[ClipAttention], fitting: Sequence[ClipAttention]) -> list[str]:
    """Which layers are not on the page."""
    notes = []
    for every, shown in zip(found, fitting, strict=True):
        lacking = [str(layer) for layer in every.layers if layer not in shown.layers]
        if lacking:
            notes.append(
                f"{every.site}: layers {', '.join(lacking)} were left out to keep the file small; "
                "layers= brings them."
            )
    return notes
