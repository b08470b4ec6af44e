"""Edges between named nodes, drawn: what stands between circuits and their figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go


def plot_edges(circuit: Any) -> go.Figure:
    """A circuit as a figure: `drawing.circuits.Edges` says what is asked of it."""
    from audio_lens.drawing.circuits import circuit_figure  # plotly takes long to import

    return circuit_figure(circuit)
