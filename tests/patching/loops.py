"""The slow, obvious way to patch, which every sweep is held against.

One full forward with hooks for every cell. Positions come from `model.timeline`, and nothing is
shared between cells but the activations to patch in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from audio_lens import HookedAudioTransformer, metrics, patching
from audio_lens.inputs import AudioInputs
from audio_lens.patching import Site, SweepResult
from audio_lens.timeline import Timeline, Track

Cell = Mapping[str, Any]  # coordinate by axis
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative
ENGINE_ONLY = ("axes", "windows", "cells_per_forward", "memory_gb", "verify")


def assert_exact(
    model: HookedAudioTransformer, choose: Callable[[int], Sequence[int]] = range, **options: Any
) -> SweepResult:
    """Run ``patching.sweep(model, **options)`` and compare cells of it with the loop.

    Args:
        choose: which cells to compare, of so many; all.
    """
    result = patching.sweep(model, progress=False, **options)
    assert_equals_loop(model, result, choose, **options)
    return result


def assert_few_exact(
    model: HookedAudioTransformer, choose: Callable[[int], Sequence[int]], **options: Any
) -> SweepResult:
    """Run just some cells of a sweep, together, and compare two of them with the loop."""
    plan = patching.plan(model, **options)
    chosen = list(choose(len(plan)))
    result = plan.run(only=chosen, progress=False)
    assert_equals_loop(model, result, lambda n: chosen[:2], **options)
    return result


def assert_equals_loop(
    model: HookedAudioTransformer,
    result: SweepResult,
    choose: Callable[[int], Sequence[int]] = range,
    **options: Any,
) -> None:
    """Compare cells of a result with the loop, NaN for NaN.

    Differences count relative to the largest value (1 at least: logits are of that order, and
    differences of logits inherit their rounding).
    """
    cells = cells_of(result)
    chosen = list(choose(len(cells)))
    asked = {name: option for name, option in options.items() if name not in ENGINE_ONLY}
    slow = loop(model, [cells[i] for i in chosen], **asked)
    fast = result.values.reshape(*slow.shape[:-1], len(cells))[..., chosen]
    assert fast.dtype == slow.dtype
    assert torch.equal(fast.isnan(), slow.isnan()), "other stimuli are NaN than lack the cell"
    scale = max(1.0, slow.nan_to_num().abs().max().item())
    worst = (fast - slow).nan_to_num().abs().amax((0, 1)) / scale
    off = [(cells[i], gap.item()) for i, gap in zip(chosen, worst, strict=True)]
    off = [(cell, gap) for cell, gap in off if not gap <= TOLERANCE[model.dtype]]
    assert not off, f"{len(off)} of {len(chosen)} cells differ from the loop: {off[:3]}"


def evenly(count: int) -> Callable[[int], list[int]]:
    """Chooses about so many cells, evenly spaced, first and last among them."""
    return lambda n: sorted({round(i * (n - 1) / max(1, count - 1)) for i in range(count)})


def cells_of(result: SweepResult) -> list[Cell]:
    """The coordinates of every cell, in the order of the values."""
    coords = (result.coords[axis] for axis in result.axes)
    return [dict(zip(result.axes, at, strict=True)) for at in itertools.product(*coords)]


def loop(
    model: HookedAudioTransformer,
    cells: Sequence[Cell],
    *,
    clean: Any,
    corrupted: Any,
    site: str | Sequence[str],
    metric: Any,
    direction: str = "denoise",
    layers: int | Sequence[int] | None = None,
    layer_window: int = 1,
    source: Any = None,
) -> Tensor:
    """The metrics of every cell's run, ``metrics rows cells``; rows is 1 for scalar metrics.

    Stimuli that hold none of a cell's positions are NaN.
    """
    clean, corrupted = model.as_inputs(clean), model.as_inputs(corrupted)
    base, other = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    sites = [Site.parse(name, model) for name in ([site] if isinstance(site, str) else site)]
    timeline = model.timeline(base)
    mode = "explicit" if any(one.reads_attention for one in sites) else model.attn_mode
    values = []
    with torch.no_grad(), model.attention(mode):
        given = other if source is None else source
        measures = bound(metric, model, base, model(clean))
        patched = [
            [(one, name) for one in sites for name in hook_names(one, cell, layers, layer_window)]
            for cell in cells
        ]
        names = sorted({name for points in patched for _, name in points})
        taken = activations(model, given, names)
        for cell, points in zip(cells, patched, strict=True):
            hooks = [
                (name, overwriting(one, cell, places(timeline, one, cell), taken[name]))
                for one, name in points
            ]
            logits = model.run_with_hooks(base, fwd_hooks=hooks)
            value = torch.stack([torch.as_tensor(measure(logits)) for measure in measures])
            if value.ndim == 2:
                there = torch.stack([holding(timeline, one, cell) for one in sites]).any(0)
                value = value.where(there, torch.nan)
            values.append(value.reshape(len(measures), -1))
    return torch.stack(values, dim=-1)


def bound(metric: Any, model: HookedAudioTransformer, base: AudioInputs, clean: Tensor) -> list:
    """Every metric as a function of logits."""
    several = metric.values() if isinstance(metric, Mapping) else [metric]
    return [
        one.bind(model, base, clean) if isinstance(one, metrics.Metric) else one for one in several
    ]


def activations(model: HookedAudioTransformer, source: Any, names: Sequence[str]) -> Any:
    """What is patched in, by hook name: of a run, or as given."""
    is_given = isinstance(source, Mapping) and model.features_key not in source
    return source if is_given else model.run_with_cache(source, names_filter=list(names))[1]


def hook_names(
    site: Site, cell: Cell, layers: int | Sequence[int] | None, layer_window: int
) -> list[str]:
    """The hook points a cell patches: one per block."""
    if site.n_layers is None:
        return [site.hook_name(None)]
    if "layer" in cell:
        chosen = range(cell["layer"], cell["layer"] + layer_window)
    elif layers is None:
        chosen = range(site.n_layers)
    else:
        chosen = [layers] if isinstance(layers, int) else layers
    return [site.hook_name(layer) for layer in chosen]


def entries(timeline: Timeline, site: Site) -> list[tuple[int, Track]]:
    """Row and track of every entry of the site's batch axis."""
    part = site.positions_of
    return [(n, track) for n, row in enumerate(timeline.rows) for track in row.segments(part)]


def places(timeline: Timeline, site: Site, cell: Cell) -> list[Tensor | slice]:
    """The positions a cell patches in every entry of the site's batch axis."""
    tracks = [track for _, track in entries(timeline, site)]
    if "time" in cell:
        return [in_window(track, cell["time"]) for track in tracks]
    where = torch.tensor([cell["position"]]) if "position" in cell else slice(None)
    return [where] * len(tracks)


def in_window(track: Track, span: patching.Span) -> Tensor:
    """The positions of one entry whose centres lie inside a window of its clip."""
    here = [
        index
        for index, (second, clip) in enumerate(
            zip(track.seconds.tolist(), track.clip.tolist(), strict=True)
        )
        if clip == span.clip and span.start_s - 1e-9 <= second < span.end_s - 1e-9
    ]
    return torch.tensor([index for index in here if track.valid[index]], dtype=torch.long)


def holding(timeline: Timeline, site: Site, cell: Cell) -> Tensor:
    """Which rows hold something (no padding) at the cell's positions."""
    there = torch.zeros(len(timeline), dtype=torch.bool)
    for (row, track), where in zip(
        entries(timeline, site), places(timeline, site, cell), strict=True
    ):
        there[row] |= track.valid[where].any()
    return there


def overwriting(site: Site, cell: Cell, where: Sequence[Tensor | slice], source: Tensor):
    """A hook that writes the source's values over a cell's elements."""

    def overwrite(x, hook):
        x = x.clone()
        for entry, positions in enumerate(where):
            index: list = [slice(None)] * x.ndim
            index[0], index[site.position_dim] = entry, positions
            if site.unit in cell:
                index[site.unit_dim] = cell[site.unit]
            x[tuple(index)] = source[tuple(index)]
        return x

    return overwrite
