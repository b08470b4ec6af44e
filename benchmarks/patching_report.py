"""The tables of `benchmarks.patching`, and how sweeps grow with the size of the model."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table

from benchmarks.patching_measure import Comparison, Outcome, compare
from benchmarks.peers.tasks import LLMShape, WhisperShape, make_task

PLOT_SUFFIXES = (".html", ".png")


# -------------------------------------------------------------------------------- tables


def device_name(device: str) -> str:
    """The processor, as far as it tells."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} CPU"


def header_line(header: dict[str, Any]) -> str:
    """Device and versions in one line."""
    return ", ".join(f"{name} {value}" for name, value in header.items())


def table(found: Comparison) -> Table:
    """One row's methods."""
    title = (
        f"{found.name}, {found.size}: {found.n_cells} cells, at least "
        f"{found.gflop_per_cell:.3g} GFLOP each, {found.gflops:.0f} GFLOP/s"
    )
    caption = (
        f"attribution of all cells: {found.attribution_forwards:.2f} forwards, by its arithmetic "
        f"at least {found.least_attribution_forwards:.2f}"
    )
    made = Table(
        Column("", no_wrap=True),
        *(f"{found.clock},\nms a cell", "over\nthe limit", "over the\nroofline"),
        *("cells/s,\nend to end", "x audio_lens,\nend to end", "a cell\nalone"),
        *("largest\nerror", "peak\nMiB", "cells\nrun"),
        title=title,
        caption=caption,
    )
    for outcome in found.outcomes.values():
        made.add_row(outcome.label, *_columns(outcome))
    return made


def _columns(outcome: Outcome) -> list[str]:
    if outcome.absent is not None:
        return [f"[dim]{outcome.absent}"]
    return [
        _short(outcome.cell_s, 1000),
        _short(outcome.over_limit),
        _short(outcome.over_roofline),
        _short(outcome.cells_per_s),
        _short(outcome.times_own),
        _short(outcome.times_own_cell),
        f"{outcome.error:.0e}",
        "" if outcome.peak_mib is None else f"{outcome.peak_mib:.0f}",
        str(outcome.cells_run),
    ]


def _short(number: float | None, scale: float = 1) -> str:
    """Three digits, without an exponent."""
    if number is None:
        return ""
    number *= scale
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


# -------------------------------------------------------------------------------- growth

_EAR = WhisperShape(2, 64, 2, frames=120, n_mels=16)
_MIDDLE = LLMShape(4, 192, 4, 2, 768, _EAR)
GROWTH = {
    "layers": {n: replace(_MIDDLE, layers=n) for n in (2, 4, 8, 16)},
    "audio positions": {
        n: replace(_MIDDLE, ear=replace(_EAR, frames=2 * n)) for n in (30, 60, 120, 240)
    },
    "heads": {n: replace(_MIDDLE, heads=n, kv_heads=n // 2) for n in (2, 4, 8, 16)},
}
_ROW_OF = {"layers": "lm-resid", "audio positions": "lm-resid", "heads": "lm-heads"}


def measure_growth(
    device: str, dtype: torch.dtype, repeats: int, sample: int
) -> dict[str, dict[int, dict[str, float]]]:
    """Seconds of a whole sweep by what grows, its size and method."""
    return {
        axis: {
            n: _sweep_seconds(_ROW_OF[axis], shape, device, dtype, repeats, sample)
            for n, shape in shapes.items()
        }
        for axis, shapes in GROWTH.items()
    }


def _sweep_seconds(
    name: str, shape: LLMShape, device: str, dtype: torch.dtype, repeats: int, sample: int
) -> dict[str, float]:
    task = make_task(name, shape, "growing", device, dtype)
    found = compare(name, task, ["audio_lens", "loop-encoder-once", "expert"], repeats, sample)
    return {outcome.label: outcome.sweep_s for outcome in found.outcomes.values()}


def draw_growth(growth: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """One panel for each of what grows, both axes logarithmic."""
    (_draw_html if path.suffix == ".html" else _draw_png)(growth, path)


def _lines(sizes: dict[int, dict[str, float]]) -> dict[str, tuple[list[int], list[float]]]:
    """By method, sizes and seconds."""
    labels = next(iter(sizes.values()))
    return {label: (list(sizes), [sizes[n][label] for n in sizes]) for label in labels}


def _draw_html(growth: dict, path: Path) -> None:
    from plotly import colors
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(1, len(growth), shared_yaxes=True, y_title="seconds a sweep")
    for column, (axis, sizes) in enumerate(growth.items(), start=1):
        for n, (label, (x, y)) in enumerate(_lines(sizes).items()):
            line = {"color": colors.qualitative.D3[n]}
            shown = go.Scatter(
                x=x, y=y, name=label, line=line, legendgroup=label, showlegend=column == 1
            )
            figure.add_trace(shown, 1, column)
        figure.update_xaxes(type="log", title=axis, tickvals=list(sizes), row=1, col=column)
    figure.update_yaxes(type="log")
    figure.write_html(path, include_plotlyjs=True)


def _draw_png(growth: dict, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(growth), figsize=(11, 3.6), sharey=True, squeeze=False)
    for panel, (axis, sizes) in zip(panels[0], growth.items(), strict=True):
        for label, (x, y) in _lines(sizes).items():
            panel.loglog(x, y, marker="o", label=label)
        panel.set_xticks(list(sizes), [str(n) for n in sizes])
        panel.set_xticks([], minor=True)
        panel.set_xlabel(axis)
    panels[0, 0].set_ylabel("seconds a sweep")
    panels[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
