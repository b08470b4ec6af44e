"""What a study found: arrays by item, read lazily; single items; means with intervals."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from audio_lens.files import write
from audio_lens.items import Items
from audio_lens.items.findings import found_by_name
from audio_lens.patching import SweepResult
from audio_lens.results import Result
from audio_lens.results.labels import netcdf
from audio_lens.studies.errors import StudyError
from audio_lens.studies.jobs import BASELINES, WINDOWS, column_of
from audio_lens.studies.places import need_zarr
from audio_lens.studies.store import ARRAYS, DONE, Layout, Store
from audio_lens.timeline import Span

SAME_S = 1e-6  # of windows that begin together


def load(out: str | Path) -> StudyResult:
    """What the study at a place has found so far.

    Raises:
        StudyError: no study there, or none of whose units is done.
    """
    return StudyResult(Store.open(out))


class StudyResult:
    """Numbers of every item that is done; the others are left out."""

    def __init__(self, store: Store):
        self.store = store
        layout = store.layout
        if layout is None or not store.done():
            raise StudyError(f"nothing is done yet of the study at {store.place.url}")
        self.layout: Layout = layout
        self._group = need_zarr().open_group(store.place.zarr(ARRAYS, True), mode="r")
        statuses = store.statuses()
        self.rows: list[int] = np.flatnonzero(statuses == DONE).tolist()
        self.n_left = int((statuses == 0).sum())
        if not self.rows:
            raise StudyError(f"no item of the study at {store.place.url} has numbers")

    def __len__(self) -> int:
        """How many items have numbers."""
        return len(self.rows)

    def __repr__(self) -> str:
        spec = self.store.spec
        return (
            f"StudyResult({spec.method}: {len(self)} of {len(self.store.items)} items, "
            f"{len(self.failed)} without numbers)"
        )

    @functools.cached_property
    def items(self) -> Items:
        """The items that have numbers."""
        return self.store.items[self.rows]

    @property
    def failed(self) -> dict[str, str]:
        """Why items have no numbers, by their names."""
        names = [item.id for item in self.store.items]
        return {names[row]: why for row, why in sorted(self.store.failures().items())}

    def to_xarray(self) -> xr.Dataset:
        """All numbers by item and by name, read when they are used.

        Along "item" stand id, text, answer, against, group and every label; of sweeps ``value``,
        ``clean``, ``corrupted``, and ``time_start`` and ``time_end`` of every item's windows, NaN
        beyond the clip.
        """
        data = xr.open_zarr(self.store.place.zarr(ARRAYS, True), consolidated=False, chunks=None)
        data = data.drop_vars("status").isel(item=self.rows)
        along = {d: x for d, x in self.layout.coords.items() if d in data.dims and _plain(x)}
        told = {"method": self.store.spec.method, "spec": self.store.spec.to_json()}
        return data.assign_coords({**self._columns(), **along}).assign_attrs(told)

    def _columns(self) -> dict[str, tuple[str, list]]:
        """What is known of every item."""
        fields = ("id", "text", "answer", "against", "group")
        columns = {name: [getattr(item, name) for item in self.items] for name in fields}
        labels = dict.fromkeys(name for item in self.items for name in item.labels)
        columns |= {name: [item.labels.get(name) for item in self.items] for name in labels}
        known = {n: x for n, x in columns.items() if any(one is not None for one in x)}
        filled = {n: ["" if one is None else one for one in x] for n, x in known.items()}
        return {n: ("item", x) for n, x in filled.items()}

    def save(self, path: str | Path) -> Path:
        """Write all numbers as netCDF.

        Raises:
            OutputError: a path that cannot be written.
        """
        return write(path, netcdf(self.to_xarray().load()))

    # ---------------------------------------------------------------- one item

    def item(self, name: str) -> SweepResult:
        """The sweep of one item.

        Raises:
            StudyError: no such item, one without numbers, or a study of another method.
        """
        if not self.store.spec.is_sweep:
            raise StudyError(f"{self.store.spec.method} has no sweeps: see .result()")
        row = self._row(name)
        values = {n: np.asarray(self._group[n][row]) for n in self.layout.columns}
        coords: dict[str, list] = dict(self.layout.coords)
        dims = self.layout.columns["value"].dims
        if "time" in dims:
            starts, ends = (values[n][~np.isnan(values[n])].tolist() for n in WINDOWS)
            coords["time"] = [Span(a, b) for a, b in zip(starts, ends, strict=True)]
        within = tuple(slice(len(coords[dim])) for dim in dims)
        return SweepResult(
            torch.tensor(values["value"][within]),
            dims,
            {dim: coords[dim] for dim in dims},
            *(torch.tensor(values[n]) for n in BASELINES),
            site=self.layout.told["site"],
            direction=self.layout.told["direction"],
            meta=dict(self.layout.told["meta"]) | {"item": name},
        )

    def _row(self, name: str) -> int:
        for row, item in enumerate(self.store.items):
            if item.id == name:
                if row in self.rows:
                    return row
                why = self.store.failures().get(row, "it is not done yet")
                raise StudyError(f"item {name!r} has no numbers: {why}")
        raise StudyError(f"no item {name!r} in the study at {self.store.place.url}")

    # ---------------------------------------------------------------- all items

    def result(self, by: str | None = None, seed: int = 0) -> Result:
        """What all items give together, with intervals over items, and the controls beside.

        Of a sweep, the effects: 0 where patching changed nothing, 1 where it moved the run the
        whole way; a ratio of means. Windows of time are those of the longest clip, and each is the
        mean over the clips that have it.

        Args:
            by: a label whose values are drawn in place of items, such as "group".
            seed: of the intervals.

        Raises:
            ItemError: items that lack the label.
        """
        groups = None if by is None else self.items.values(by)
        spec = self.store.spec
        notes = {**self.layout.told.get("meta", {}), "method": spec.method}
        dropped = {why: n for why, n in self._dropped().items()}
        told: dict[str, Any] = {"meta": notes, "dropped": dropped}
        if spec.is_sweep:
            return self._effects(groups, by, seed, told)
        controls = {
            name: self._joined(name, groups, by, seed) for name in self.layout.told["controls"]
        }
        return self._joined("", groups, by, seed, controls=controls, **told)

    def mean(self, by: str) -> dict[Any, Result]:
        """`result` of the items of each value of a label.

        Raises:
            ItemError: items that lack the label.
        """
        values = self.items.values(by)
        parts = {}
        for one in dict.fromkeys(values):
            part = StudyResult.__new__(StudyResult)
            part.__dict__ |= {n: x for n, x in self.__dict__.items() if n != "items"}
            part.rows = [row for row, value in zip(self.rows, values, strict=True) if value == one]
            parts[one] = part.result()
        return parts

    def _dropped(self) -> dict[str, int]:
        lost = len(self.failed)
        return ({"without numbers": lost} if lost else {}) | (
            {"not done yet": self.n_left} if self.n_left else {}
        )

    def _numbers(self, name: str) -> torch.Tensor:
        return torch.tensor(np.asarray(self._group[name][:])[self.rows])

    def _joined(
        self,
        control: str,
        groups: Sequence[Hashable] | None,
        by: str | None,
        seed: int,
        **beside: Any,
    ) -> Result:
        """A result of all items' values, or one of its controls."""
        values = self._numbers(column_of(control, "values"))
        dims = self.layout.columns[column_of(control, "values")].dims
        axes = {dim: self.layout.coords[dim] for dim in dims}
        weights = column_of(control, "weights")
        under = self._numbers(weights) if weights in self.layout.columns else None
        if under is not None:
            values = torch.where(under == 0, values.nan_to_num(0.0), values * under)
        return found_by_name(
            values,
            axes,
            [item.id for item in self.items],
            groups=groups,
            by=by,
            denominators=under,
            seed=seed,
            **beside,
        )

    def _effects(
        self, groups: Sequence[Hashable] | None, by: str | None, seed: int, told: dict[str, Any]
    ) -> Result:
        """Effects of a sweep, as ratio of means over items."""
        values, clean, corrupted = (self._numbers(name) for name in ("value", *BASELINES))
        shape = (len(values), *[1] * (values.ndim - 1))
        clean, corrupted = clean.reshape(shape), corrupted.reshape(shape)
        is_noise = self.layout.told["direction"] == "noise"
        if self.layout.told["direction"] == "edit":
            moved, under, called = values - corrupted, None, "change"
        else:
            moved = clean - values if is_noise else values - corrupted
            under, called = (clean - corrupted).expand_as(values), "effect"
        dims = self.layout.columns["value"].dims
        axes = {dim: self.layout.coords.get(dim, []) for dim in dims}
        if "time" in dims:
            axes["time"] = self._windows()
            there = torch.arange(len(axes["time"]))
            moved = moved.index_select(1 + dims.index("time"), there)
            under = None if under is None else under.index_select(1 + dims.index("time"), there)
        told["meta"] |= {"value": called, "title": f"{self.layout.told['site']}, {called}"}
        names = [item.id for item in self.items]
        return found_by_name(
            moved, axes, names, groups=groups, by=by, denominators=under, seed=seed, **told
        )

    def _windows(self) -> list[Span]:
        """The windows of the longest clip, the last of which may end earlier in others.

        Raises:
            StudyError: windows that begin at other seconds in other clips.
        """
        starts, ends = (self._numbers(name).numpy() for name in WINDOWS)
        there = ~np.isnan(starts).all(0)
        starts, ends = starts[:, there], ends[:, there]
        first, last = np.nanmin(starts, 0), np.nanmax(starts, 0)
        if (last - first > SAME_S).any():
            raise StudyError(
                "windows begin at other seconds in other clips, so that a mean over items says "
                "nothing: see single items (.item), or sweep groups of positions"
            )
        return [Span(*bounds) for bounds in zip(first, np.nanmax(ends, 0), strict=True)]


def _plain(along: list) -> bool:
    """Whether coordinates are numbers or texts."""
    return all(isinstance(at, (int, float, str)) for at in along)
