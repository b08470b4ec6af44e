"""A circuit as a figure: nodes by layer and part of the block, edges by their scores."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import plotly.graph_objects as go

from audio_lens.drawing.rows import STYLE, escaped

RAISES, LOWERS = "#2166ac", "#b2182b"
WIDEST, DRAWN = 6.0, 400  # pixels; edges that are drawn one by one
_IN_BLOCK = re.compile(r"L(\d+)([HG]?)(\d*)")
LOGITS = "logits"


@runtime_checkable
class Edges(Protocol):
    """What a figure asks of a circuit.

    Attributes:
        edges: names of senders and receivers.
        weights: a score for each.
    """

    edges: tuple[tuple[str, str], ...]
    weights: tuple[float, ...]
    n_layers: int

    @property
    def seconds(self) -> Mapping[str, tuple[float, float]]:
        """Where audio nodes lie in the clip, by name."""
        ...

    def __len__(self) -> int: ...


def circuit_figure(circuit: Edges) -> go.Figure:
    """Nodes by layer (from left to right) and part; wide edges have large scores.

    The ends of edges at keys and values stand below the heads. Of a large circuit the
    `DRAWN` strongest edges are drawn, and the title says so. The seconds of audio nodes are in
    their ``meta``, as pages play them.
    """
    order = np.argsort(-np.abs(np.array(circuit.weights)), kind="stable")[:DRAWN]
    edges = [circuit.edges[n] for n in order]
    weights = [circuit.weights[n] for n in order]
    names = list(dict.fromkeys(_node(name) for edge in edges for name in edge))
    at = _places(names, circuit.n_layers)
    largest = max(map(abs, weights), default=0.0) or 1.0
    figure = go.Figure()
    for (sender, receiver), weight in zip(edges, weights, strict=True):
        (x0, y0), (x1, y1) = at[_node(sender)], at[_node(receiver)]
        figure.add_trace(
            go.Scatter(
                x=[x0, (x0 + x1) / 2, x1],
                y=[y0, (y0 + y1) / 2, y1],
                mode="lines",
                line={
                    "width": 0.4 + WIDEST * abs(weight) / largest,
                    "color": LOWERS if weight < 0 else RAISES,
                    "shape": "spline",
                },
                opacity=0.25 + 0.7 * abs(weight) / largest,
                hovertemplate=escaped(f"{sender} to {receiver}: {weight:.3g}") + "<extra></extra>",
            )
        )
    figure.add_trace(_marks(names, at, circuit.seconds))
    shown = "" if len(edges) == len(circuit) else f", the {len(edges)} strongest drawn"
    figure.update_layout(STYLE | {"margin": {"l": 20, "r": 20, "t": 50, "b": 46}})
    figure.update_layout(title=f"{len(circuit)} edges{shown}")
    ticks = list(range(circuit.n_layers))
    figure.update_xaxes(title="layer", tickvals=ticks, zeroline=False)
    return figure.update_yaxes(visible=False)


def _node(name: str) -> str:
    """A receiver's node: of queries their head, of keys and values their group."""
    return name.removesuffix(".q")


def _places(names: Sequence[str], n_layers: int) -> dict[str, tuple[float, float]]:
    """Heads above their groups of keys and values, MLPs at the top; what enters at the left."""
    entering = [n for n in names if n != LOGITS and not _IN_BLOCK.match(n)]
    places = {name: (-1.0, float(2 * row)) for row, name in enumerate(entering)}
    matched = (_IN_BLOCK.match(name) for name in names if re.match(r"L\d+H", name))
    heads = [int(found[3]) for found in matched if found is not None]
    top = max(heads, default=0) + 2.0
    for name in names:
        found = _IN_BLOCK.match(name)
        if found is None:
            continue
        layer = int(found[1])
        if name.endswith(".mlp"):
            places[name] = layer + 0.45, top
        elif found[2] == "H":
            places[name] = float(layer), float(found[3])
        else:
            shift = 0.12 if name.endswith("v") else -0.12
            places[name] = layer + shift, -1.5 - float(found[3])
    return places | {LOGITS: (float(n_layers), top / 2)}


def _marks(
    names: Sequence[str],
    at: Mapping[str, tuple[float, float]],
    seconds: Mapping[str, tuple[float, float]],
) -> go.Scatter:
    x, y = zip(*(at[name] for name in names), strict=True) if names else ((), ())
    return go.Scatter(
        x=x,
        y=y,
        mode="markers+text",
        text=[escaped(name) for name in names],
        textposition="top center",
        textfont={"size": 9},
        marker={"size": 9, "color": "#3b4a54"},
        hovertemplate="%{text}<extra></extra>",
        meta={"spans": [list(seconds[n]) if n in seconds else None for n in names]},
    )
