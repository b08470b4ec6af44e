"""The table of a sweep: one cell for every combination of its axes.

Everything that can be wrong with site, axes, windows or layers raises here, before any work.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from einops import repeat
from jaxtyping import Bool
from torch import Tensor

from audio_lens.inputs import AudioInputs
from audio_lens.patching.sites import Site, SiteError
from audio_lens.timeline import Span, Timeline

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

Windows = float | tuple[float, float] | Sequence["Span | tuple[float, float]"] | Literal["position"]
DEFAULT_WINDOW_S = 0.1


@dataclass(frozen=True)
class Intervention:
    """What one row of a forward has patched: blocks, units (None: all) and a set of positions."""

    layers: tuple[int | None, ...]
    unit: int | None
    positions: int  # row of `CellTable.positions`


@dataclass(frozen=True)
class CellTable:
    """Every cell of a sweep, in the order of its axes.

    `positions` holds the distinct sets of positions, for each entry of the site's batch axis
    (prompts, or clips in encoder and connector).
    """

    site: Site
    axes: tuple[str, ...]
    coords: dict[str, list]
    positions: Bool[Tensor, "sets batch t"]
    cells: list[Intervention]

    @staticmethod
    def lay_out(
        model: HookedAudioTransformer,
        inputs: AudioInputs,
        site: Site,
        axes: Sequence[str],
        windows: Windows | None,
        layers: Sequence[int] | None,
    ) -> CellTable:
        """The table of a sweep; everything that can be wrong with it raises here."""
        axes = (axes,) if isinstance(axes, str) else tuple(axes)
        _check_axes(site, axes, windows)
        coords: dict[str, list] = {}
        chosen = _chosen_layers(site, layers)
        if "layer" in axes:
            coords["layer"] = list(chosen)
        if site.unit in axes:
            coords[site.unit] = list(range(_unit_count(model, site)))
        where = _Positions(model.timeline(inputs), site, inputs)
        if "time" in axes:
            coords["time"], positions = where.of_windows(windows)
        elif "position" in axes:
            coords["position"], positions = where.one_by_one()
        else:
            positions = where.all()
        cells = list(_cells(site, axes, coords, chosen))
        return CellTable(site, axes, {axis: coords[axis] for axis in axes}, positions, cells)


def _check_axes(site: Site, axes: tuple[str, ...], windows: Windows | None) -> None:
    unknown = [axis for axis in axes if axis not in site.axes]
    if unknown or not axes or len(set(axes)) < len(axes):
        raise SiteError(
            f"axes {axes} do not fit {site}: choose one or more of {', '.join(site.axes)}, each "
            "once"
        )
    if "time" in axes and "position" in axes:
        raise SiteError("'time' and 'position' are two names of one axis: choose one")
    if windows is not None and "time" not in axes:
        raise SiteError("windows belong to axis 'time', which is not among the axes")


def _chosen_layers(site: Site, layers: Sequence[int] | None) -> tuple[int | None, ...]:
    if site.n_layers is None:
        if layers is not None:
            raise SiteError(f"{site} lies outside the blocks: it has no layers to choose")
        return (None,)
    chosen = tuple(range(site.n_layers)) if layers is None else tuple(layers)
    if not chosen or not all(0 <= layer < site.n_layers for layer in chosen):
        raise ValueError(f"layers must lie in 0 to {site.n_layers - 1}, got {chosen}")
    return chosen


def _unit_count(model: HookedAudioTransformer, site: Site) -> int:
    cfg = model.cfg.parts[site.part]
    if site.unit == "neuron":
        return cfg.d_mlp
    is_key_value = site.activation.rpartition(".")[2] in ("k", "v", "rot_k")
    return cfg.n_key_value_heads if is_key_value else cfg.n_heads


def _cells(
    site: Site, axes: tuple[str, ...], coords: dict[str, list], layers: tuple[int | None, ...]
) -> Iterator[Intervention]:
    for place in itertools.product(*(range(len(coords[axis])) for axis in axes)):
        at = dict(zip(axes, place, strict=True))
        yield Intervention(
            layers=(coords["layer"][at["layer"]],) if "layer" in at else layers,
            unit=at.get(site.unit),
            positions=at.get("time", at.get("position", 0)),
        )


@dataclass
class _Positions:
    """Sets of positions of a site, for every entry of its batch axis."""

    timeline: Timeline
    site: Site
    inputs: AudioInputs

    def _entries(self) -> list[tuple[Timeline, int | None]]:
        """Per entry of the batch axis: its prompt, and its clip where clips run one by one."""
        rows = [self.timeline[row] for row in range(len(self.timeline))]
        if self.site.positions_of == "decoder":
            return [(row, None) for row in rows]
        return [(row, clip) for row in rows for clip in range(row.n_clips)]

    def _width(self) -> int:
        row, clip = self._entries()[0]
        return len(row.valid(self.site.positions_of, clip or 0))

    def all(self) -> Bool[Tensor, "1 batch t"]:
        return torch.ones(1, len(self._entries()), self._width(), dtype=torch.bool)

    def one_by_one(self) -> tuple[list[int], Bool[Tensor, "sets batch t"]]:
        """Every position that holds something in any row."""
        valid = torch.stack(
            [row.valid(self.site.positions_of, clip or 0) for row, clip in self._entries()]
        )
        chosen = valid.any(0).nonzero().flatten().tolist()
        single = torch.eye(self._width(), dtype=torch.bool)[chosen]
        return chosen, repeat(single, "sets t -> sets batch t", batch=len(valid))

    def of_windows(self, windows: Windows | None) -> tuple[list[Span], Bool[Tensor, "s b t"]]:
        """The windows as Spans, with their positions; one without any raises."""
        part = self.site.positions_of
        spans = self._spans(part, DEFAULT_WINDOW_S if windows is None else windows)
        sets = torch.zeros(len(spans), len(self._entries()), self._width(), dtype=torch.bool)
        for i, span in enumerate(spans):
            for entry, (row, clip) in enumerate(self._entries()):
                if clip is None or clip == span.clip:
                    sets[i, entry] = row.inside(part, span)
            if not sets[i].any():
                longest = max(row.duration_s(span.clip) for row, _ in self._entries())
                raise ValueError(
                    f"no position of {self.site} lies in the window {span.start_s:g} to "
                    f"{span.end_s:g} s of clip {span.clip} ({longest:g} s long)"
                )
        return spans, sets

    def _spans(self, part: str, windows: Windows) -> list[Span]:
        longest = max((row for row, _ in self._entries()), key=lambda row: row.duration_s())
        if windows == "position":
            return _single_position_spans(longest, part)
        if isinstance(windows, (int, float)):
            return longest.windows(part, float(windows))
        if isinstance(windows, tuple) and all(isinstance(w, (int, float)) for w in windows):
            return longest.windows(part, *windows)
        if isinstance(windows, str) or not len(windows):
            raise ValueError(
                "windows is a width in seconds, (width, stride), a list of spans, or 'position'; "
                f"got {windows!r}"
            )
        return [Span.of(window) for window in windows]


def _single_position_spans(timeline: Timeline, part: str) -> list[Span]:
    """One span around the centre of every position of the first clip."""
    seconds, valid = timeline.seconds(part), timeline.valid(part)
    centres = seconds[valid & seconds.isfinite() & (timeline.clips(part) == 0)]
    if len(centres) < 2:
        raise ValueError(f"the {part} has too few positions in time for single-position windows")
    half = float(centres[1] - centres[0]) / 2
    return [Span(max(0.0, c - half), c + half) for c in centres.tolist()]
