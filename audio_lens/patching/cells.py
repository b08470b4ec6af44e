"""The table of a sweep: one cell for every combination of its axes.

Everything that can be wrong with site, axes, windows or layers raises here, before any work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Int
from torch import Tensor

from audio_lens.arguments import numbers
from audio_lens.errors import InputError
from audio_lens.patching.interventions import PLACE_AXES, Interventions, Layers
from audio_lens.patching.spec import Bands, SweepSpec, Windows
from audio_lens.places import Ground
from audio_lens.results import in_words
from audio_lens.sites import Site, SiteError, unit_count
from audio_lens.timeline import Band, Seconds, Span, Timeline, Track

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

DEFAULT_WINDOW_S = 0.1
_WINDOW_FORMS = "a width in seconds, (width, stride), a list of spans, or 'position'"
_BAND_FORMS = "a list of bands or (low_hz, high_hz), or 'patch'"


@dataclass(frozen=True)
class CellTable:
    """Every cell of a sweep, in the order of its axes.

    `sites` are patched together as one. `positions` holds the distinct sets of positions, for each
    entry of the sites' batch axis (prompts in the decoder, segments of clips elsewhere); `covered`
    says which prompts have any of them.
    """

    sites: tuple[Site, ...]
    axes: tuple[str, ...]
    coords: dict[str, list]
    positions: Bool[Tensor, "sets batch t"]
    covered: Bool[Tensor, "sets rows"]
    cells: Interventions

    @staticmethod
    def of(
        model: HookedAudioTransformer, spec: SweepSpec, sites: tuple[Site, ...] | None = None
    ) -> CellTable:
        """The table of a sweep; everything that can be wrong with it raises here.

        Args:
            sites: some of the spec's; None for all, patched together.

        Raises:
            SiteError: sites, axes, windows or bands that do not go together.
            ValueError: windows or bands without positions, or layers out of range.
        """
        sites = spec.sites if sites is None else sites
        site, axes = _common(model, sites, spec.axes), spec.axes
        _check_axes(site, spec)
        coords: dict[str, list] = {}
        chosen = chosen_layers(site, spec.layers, axes, spec.layer_window)
        if "layer" in axes:
            coords["layer"] = list(chosen)
        if site.unit is not None and site.unit in axes:
            coords[site.unit] = list(range(unit_count(model, site)))
        where, sets = Positions(spec.timeline, site), {}
        if not where.valid.any():
            raise SiteError(f"no position of {site} holds anything: the clips are too short for it")
        if "time" in axes:
            windows = DEFAULT_WINDOW_S if spec.windows is None else spec.windows
            coords["time"] = where.spans(windows)
            sets["time"] = where.inside(coords["time"])
        elif "position" in axes:
            coords["position"], sets["position"] = where.one_by_one()
        elif "group" in axes:
            coords["group"], sets["group"] = where.groups(model, spec)
        if "frequency" in axes:
            coords["frequency"] = where.bands("patch" if spec.bands is None else spec.bands)
            sets["frequency"] = where.within(coords["frequency"])
        positions = where.kept_to(model, spec)
        for axis in (axis for axis in axes if axis in sets):
            both = positions[:, None] & sets[axis]
            positions = rearrange(both, "a b batch t -> (a b) batch t")
        return CellTable(
            sites=sites,
            axes=axes,
            coords={axis: coords[axis] for axis in axes},
            positions=positions,
            covered=where.covered(positions),
            cells=Interventions.of(site, axes, coords, chosen, spec.layer_window),
        )

    @property
    def site(self) -> Site:
        """The site, or the first of several."""
        return self.sites[0]

    @property
    def place_axes(self) -> list[str]:
        """The axes that split the positions, in order: `positions` has a set for every cell."""
        return [axis for axis in self.axes if axis in PLACE_AXES]

    @property
    def site_name(self) -> str:
        return " + ".join(map(str, self.sites))

    @property
    def part(self) -> str:
        return self.site.part

    def to(self, device: torch.device) -> CellTable:
        """The same table with its positions on a device."""
        return replace(self, positions=self.positions.to(device))

    def described(self, cell: int) -> str:
        """A cell by its number and its place on every axis, for people."""
        sizes = [len(self.coords[axis]) for axis in self.axes]
        at = np.unravel_index(cell, sizes)
        places = zip(self.axes, map(int, at), strict=True)
        return f"cell {cell} ({in_words({axis: self.coords[axis][i] for axis, i in places})})"

    def hook_names(self, cells: Sequence[int]) -> list[str]:
        """The hook points that some cells patch."""
        return self._hook_names({layer for c in cells for layer in self.cells[c].layers})

    @property
    def all_hook_names(self) -> list[str]:
        """The hook points that any cell patches."""
        return self._hook_names(self.cells.layers)

    def _hook_names(self, layers: Iterable[int | None]) -> list[str]:
        in_order = sorted(layers, key=str)
        return [site.hook_name(layer) for site in self.sites for layer in in_order]

    def where(self, cells: Sequence[int]) -> Bool[Tensor, "n batch t"]:
        """The patched positions of some cells."""
        chosen = self.cells.positions[list(cells)]
        return self.positions[chosen.to(self.positions.device)]

    def units(self, cells: Sequence[int]) -> Int[Tensor, " n"] | None:
        """The patched heads or neurons of some cells; None where all are."""
        if self.cells.unit is None:
            return None
        return self.cells.unit[list(cells)].to(self.positions.device)


def _common(model: HookedAudioTransformer, sites: tuple[Site, ...], axes: Sequence[str]) -> Site:
    """The site that stands for all of a union: they must lie on the same positions and units.

    Raises:
        SiteError: if they do not.
    """
    if not sites:
        raise SiteError("no site: name at least one")
    first, *others = sites
    for other in others:
        if other == first or sites.count(other) > 1:
            raise SiteError(f"{other} is named twice")
        if (other.part, other.positions_of) != (first.part, first.positions_of):
            raise SiteError(f"{first} and {other} do not lie on the same positions of one part")
        if first.n_layers is None:
            raise SiteError(f"{first} and {other} follow each other: patch one of them")
        units = [(site.unit, site.unit and unit_count(model, site)) for site in (first, other)]
        if first.unit in axes and units[0] != units[1]:
            raise SiteError(f"{first} and {other} do not have the same {first.unit}s")
    return first


def _check_axes(site: Site, spec: SweepSpec) -> None:
    axes = spec.axes
    has_frequency = spec.timeline.has_frequency(site.positions_of)
    known = (*site.axes, "group", *(["frequency"] if has_frequency else []))
    unknown = [axis for axis in axes if axis not in known]
    if unknown or not axes or len(set(axes)) < len(axes):
        raise SiteError(
            f"axes {axes} do not fit {site}: choose one or more of {', '.join(known)}, each once"
        )
    places = [axis for axis in axes if axis in ("time", "frequency")]
    if "position" in axes and places:
        raise SiteError(f"'position' and {places[0]!r} are two names of one axis: choose one")
    if "group" in axes and (places or "position" in axes):
        raise SiteError("groups are sets of positions: 'group' stands alone among such axes")
    if (spec.groups is not None) != ("group" in axes):
        raise SiteError("groups= and axis 'group' go together: give both or none")
    if spec.groups is not None and not spec.groups:
        raise SiteError("groups is empty: name at least one place")
    if spec.windows is not None and "time" not in axes:
        raise SiteError("windows belong to axis 'time', which is not among the axes")
    if spec.bands is not None and "frequency" not in axes:
        raise SiteError("bands belong to axis 'frequency', which is not among the axes")


def chosen_layers(
    site: Site, layers: int | Sequence[int] | None, axes: tuple[str, ...], layer_window: int
) -> Layers:
    if site.n_layers is None:
        if layers is not None or layer_window != 1:
            raise SiteError(f"{site} lies outside the blocks: it has no layers to choose")
        return (None,)
    if layer_window != 1 and "layer" not in axes:
        raise SiteError("layer_window goes with axis 'layer': without it all layers are patched")
    if not 1 <= layer_window <= site.n_layers:
        raise InputError(f"layer_window must lie in 1 to {site.n_layers}, got {layer_window}")
    last = site.n_layers - layer_window
    if layers is None:
        return tuple(range(last + 1))
    chosen = tuple(map(int, numbers("layers", layers)))
    is_known = all(0 <= layer <= last for layer in chosen)
    if not chosen or not is_known or len(set(chosen)) < len(chosen):
        raise InputError(f"layers must lie in 0 to {last}, each once; got {list(chosen)}")
    return chosen


class Positions:
    """Sets of positions of a site, for every entry of its batch axis.

    Raises:
        InputError: inputs without audio, for a site that carries some.
    """

    def __init__(self, timeline: Timeline, site: Site):
        self.site, self.part = site, site.positions_of
        self.rows = [timeline[row] for row in range(len(timeline))]
        self.entries = [
            (n, track) for n, row in enumerate(timeline.rows) for track in row.segments(self.part)
        ]
        if not self.entries:
            raise InputError(f"these inputs hold no audio, so there is no {self.site} to patch")
        self.valid = torch.stack([track.valid for _, track in self.entries])

    def everywhere(self) -> Bool[Tensor, "1 batch t"]:
        return torch.ones_like(self.valid)[None]

    def kept_to(self, model: HookedAudioTransformer, spec: SweepSpec) -> Bool[Tensor, "1 batch t"]:
        """The positions that all cells keep to."""
        if isinstance(spec.where, str) and spec.where == "all":
            return self.everywhere()
        return Ground.of(model, spec.base, self.part).held(spec.where)[None]

    def groups(
        self, model: HookedAudioTransformer, spec: SweepSpec
    ) -> tuple[list[str], Bool[Tensor, "sets batch t"]]:
        """The positions of every group, by its name.

        Raises:
            InputError: a group that selects nothing in any prompt.
        """
        ground, named = Ground.of(model, spec.base, self.part), dict(spec.groups or {})
        masks = {name: ground.mask(place) for name, place in named.items()}
        for name, mask in masks.items():
            if not mask.any():
                ground.held(named[name])  # raises
        return list(masks), torch.stack(list(masks.values()))

    def one_by_one(self) -> tuple[list[int], Bool[Tensor, "sets batch t"]]:
        """Every position that holds something in any row."""
        chosen = self.valid.any(0).nonzero().flatten()
        single = torch.eye(self.valid.shape[1], dtype=torch.bool)[chosen]
        return chosen.tolist(), repeat(single, "sets t -> sets batch t", batch=len(self.valid))

    def inside(self, spans: Sequence[Span]) -> Bool[Tensor, "sets batch t"]:
        """The positions of every span; a span without any raises."""
        sets = self._sets(spans, Track.inside)
        for span, found in zip(spans, sets, strict=True):
            if not found.any():
                self.rows[0].inside(self.part, replace(span, clip=0))  # raises if it has no time
                raise InputError(
                    f"no position of {self.site} lies in the window {span.start_s:g} to "
                    f"{span.end_s:g} s of clip {span.clip}; clips last "
                    + ", ".join(f"{self._longest(c).duration_s(c):g} s" for c in self._clips())
                )
        return sets

    def within(self, bands: Sequence[Band]) -> Bool[Tensor, "sets batch t"]:
        """The positions of every band; a band without any raises."""
        sets = self._sets(bands, Track.within)
        for band, found in zip(bands, sets, strict=True):
            if not found.any():
                middles = self.rows[0].hertz(self.part).unique()
                raise InputError(
                    f"no position of {self.site} lies in the band {band}; they lie at "
                    + ", ".join(f"{hertz:.0f}" for hertz in middles.tolist() if hertz == hertz)
                    + " Hz"
                )
        return sets

    def _sets(
        self, places: Sequence[Span | Band], holds: Callable[[Track, Any], Tensor]
    ) -> Bool[Tensor, "sets batch t"]:
        """The positions of every place, for each entry of the site's batch axis."""
        if not places:
            raise InputError(f"no window lies at {self.site}: these inputs hold no audio")
        return torch.stack(
            [torch.stack([holds(track, place) for _, track in self.entries]) for place in places]
        )

    def bands(self, bands: Bands) -> list[Band]:
        """The bands asked for."""
        if bands == "patch":
            return self.rows[0].bands(self.part)
        if isinstance(bands, str) or not isinstance(bands, Sequence) or not len(bands):
            raise InputError(f"bands {bands!r} is none of {_BAND_FORMS}")
        return [Band.of(band) for band in bands]

    def covered(self, sets: Bool[Tensor, "sets batch t"]) -> Bool[Tensor, "sets rows"]:
        """Which prompts hold something at any position of a set."""
        found = (sets & self.valid).any(-1)
        rows = torch.zeros(len(sets), len(self.rows), dtype=torch.bool)
        for entry, (n, _) in enumerate(self.entries):
            rows[:, n] |= found[:, entry]
        return rows

    def spans(self, windows: Windows) -> list[Span]:
        """The windows asked for, over every clip where no clip is named."""
        if windows == "position":
            return [span for clip in self._clips() for span in self._single_positions(clip)]
        if isinstance(windows, (int, float, Real)):
            return self._tiled(windows, windows)
        if isinstance(windows, str) or not isinstance(windows, Sequence) or not len(windows):
            raise InputError(f"windows {windows!r} is none of {_WINDOW_FORMS}")
        sizes = [one for one in windows if isinstance(one, (int, float, Real))]
        if not sizes:
            spans = (one for one in windows if not isinstance(one, (int, float, Real)))
            return [Span.of(span) for span in spans]
        if isinstance(windows, list) or len(windows) > min(2, len(sizes)):
            raise InputError(f"windows {windows!r} is none of {_WINDOW_FORMS}")
        return self._tiled(sizes[0], sizes[-1])

    def _tiled(self, width: Seconds, stride: Seconds) -> list[Span]:
        """Windows of one width over every clip."""
        return [
            span
            for clip in self._clips()
            for span in self._longest(clip).windows(self.part, width, stride, clip)
        ]

    def _clips(self) -> range:
        return range(max(row.n_clips for row in self.rows))

    def _longest(self, clip: int) -> Timeline:
        """The prompt in which this clip lasts longest."""
        having = [row for row in self.rows if clip < row.n_clips]
        return max(having, key=lambda row: row.duration_s(clip))

    def _single_positions(self, clip: int) -> list[Span]:
        """One span around the centre of every position of a clip."""
        row = self._longest(clip)
        seconds = row.seconds(self.part, clip)
        here = row.valid(self.part, clip) & (row.clips(self.part, clip) == clip)
        centres = seconds[here & seconds.isfinite()].unique()
        if len(centres) < 2:
            raise InputError(f"the {self.part} has too few positions in time for single ones")
        half = float(centres[1] - centres[0]) / 2
        return [Span(max(0.0, c - half), c + half, clip=clip) for c in centres.tolist()]
