"""The tables of `benchmarks.patching`."""

from __future__ import annotations

import platform
from typing import Any

import torch
from rich.table import Column, Table

from benchmarks.patching_measure import OWN, Comparison, Outcome

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
    least = found.runs_s + found.cells_s
    caption = (
        f"at the row's shapes, {found.rows_together} rows together: products "
        f"{found.gflops_here:.0f} GFLOP/s, attention {found.attention_gflops:.0f}; "
        f"{_held(found)}\n"
        f"end to end at least {_short(least)} s, {found.runs_s / least:.0%} of them for the two "
        f"unpatched runs; audio_lens takes {found.over_floor:.2f} of that\n"
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


def _held(found: Comparison) -> str:
    """The limit of the row, and whether audio_lens keeps it."""
    limit, taken = f"limit {found.most:.2f} of the roofline", found.outcomes[OWN].over_roofline
    if taken is None:
        return f"{limit}, not told: the unpatched runs take nearly all"
    return f"{limit}: {'kept' if taken <= found.most else 'missed'} with {taken:.2f}"


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
