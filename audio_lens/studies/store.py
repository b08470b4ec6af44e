"""What a study has: arrays of numbers by item, unit by unit, with what failed beside them.

A unit of items is one chunk of every array. Its numbers are written first and its chunk of
``status`` last, so that a unit is done if and only if that chunk is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from audio_lens.files import OutputError
from audio_lens.items import Item, Items
from audio_lens.items.tables import CLIPS, item_of
from audio_lens.results.plain import coordinate
from audio_lens.studies.errors import StudyError
from audio_lens.studies.places import Place, need_zarr, place_of
from audio_lens.studies.spec import Spec
from audio_lens.timeline import Band, Span

DONE, REFUSED, KILLED = 1, 2, 3  # of an item's status; 0 is not done
ARRAYS, STATUS = "arrays.zarr", "status"
SPEC, ITEMS, LAYOUT = "spec.json", "items.jsonl", "layout.json"


@dataclass(frozen=True)
class Column:
    """An array of numbers, of which every item has its own.

    Attributes:
        dims: behind the items.
        shape: along them; an item that has less leaves the rest NaN.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Which numbers every item has.

    Attributes:
        columns: by name.
        coords: along dims that all items share.
        told: facts that hold for all: site, direction, versions, hash of the weights.
    """

    columns: Mapping[str, Column]
    coords: Mapping[str, list] = field(default_factory=dict)
    told: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The layout as a text."""
        coords = {dim: [coordinate(at) for at in along] for dim, along in self.coords.items()}
        columns = {name: dataclasses.asdict(column) for name, column in self.columns.items()}
        held = {"columns": columns, "coords": coords, "told": dict(self.told)}
        return json.dumps(held, indent=1).encode()

    @staticmethod
    def from_json(text: bytes) -> Layout:
        """The layout that `to_json` wrote."""
        held = json.loads(text)
        columns = {
            name: Column(tuple(x["dims"]), tuple(x["shape"])) for name, x in held["columns"].items()
        }
        coords = {dim: [_recalled(at) for at in along] for dim, along in held["coords"].items()}
        return Layout(columns, coords, held["told"])


def _recalled(at: Any) -> Any:
    """A coordinate of a layout; bands and spans are told by their bounds."""
    if not isinstance(at, dict):
        return at
    return (Band if "low_hz" in at else Span)(**at)


class Store:
    """A study's place, laid out for a spec; made by `create`, found by `open`."""

    def __init__(self, place: Place, spec: Spec):
        self.place, self.spec = place, spec

    @staticmethod
    def create(out: str | Path, spec: Spec, rows: Sequence[Mapping[str, Any]]) -> Store:
        """Lay out a place; one that was laid out for the same spec goes on.

        Args:
            out: the place.
            spec: what is computed.
            rows: of the items, as `rows_of` gives them.

        Raises:
            StudyError: a place that belongs to another study, naming what differs.
            OutputError: a place that cannot be written.
        """
        need_zarr()
        place = place_of(out)
        held = place.read(SPEC)
        if held is None:
            place.write(ITEMS, "".join(json.dumps(row) + "\n" for row in rows).encode())
            store = Store(place, spec)
            store._array(STATUS, (len(rows),), (), "i1", 0)
            place.write(SPEC, spec.to_json().encode())
            return store
        theirs = Spec.from_json(held)
        if theirs.identity != spec.identity:
            said = "\n  ".join(spec.differences(theirs))
            raise StudyError(
                f"{place.url} holds another study:\n  {said}\nName another place (out=), or take "
                "the study as it was"
            )
        return Store(place, theirs)

    @staticmethod
    def sizes(out: str | Path, unit: int | None, batch: int | None) -> tuple[int, int] | None:
        """Items of a unit and of a batch, those not given as in the study that a place holds.

        None for a place without one.
        """
        held = place_of(out).read(SPEC)
        if held is None:
            return None
        spec = Spec.from_json(held)
        return unit or spec.unit, batch or spec.batch

    @staticmethod
    def open(out: str | Path) -> Store:
        """A place that is laid out.

        Raises:
            StudyError: no study there.
        """
        place = place_of(out)
        held = place.read(SPEC)
        if held is None:
            raise StudyError(f"no study at {place.url}")
        return Store(place, Spec.from_json(held))

    # ---------------------------------------------------------------- items and units

    @functools.cached_property
    def items(self) -> Items:
        """All items, in the order in which they are computed: the longest first."""
        held = self.place.read(ITEMS)
        if held is None:
            raise StudyError(f"{self.place.url} has lost {ITEMS}")
        rows = map(json.loads, held.decode().splitlines())
        return Items(item_of(row, Path("/"), Path("/")) for row in rows)

    def __len__(self) -> int:
        """How many units there are."""
        return -(-len(self.items) // self.spec.unit)

    def rows(self, unit: int) -> range:
        """Which of the items a unit holds."""
        return range(len(self.items))[unit * self.spec.unit : (unit + 1) * self.spec.unit]

    def done(self) -> set[int]:
        """Units that are done, by what is written."""
        return {int(name) for name in self.place.names(f"{ARRAYS}/{STATUS}/c") if name.isdigit()}

    def left(self) -> list[int]:
        """Units that are not done."""
        done = self.done()
        return [unit for unit in range(len(self)) if unit not in done]

    # ---------------------------------------------------------------- numbers

    @property
    def layout(self) -> Layout | None:
        """Which numbers every item has; None before the first worker has said so."""
        held = self.place.read(LAYOUT)
        return None if held is None else Layout.from_json(held)

    def lay_out(self, layout: Layout) -> Layout:
        """Make the arrays, unless they are there; the layout that holds.

        Raises:
            StudyError: arrays that are there for other numbers.
        """
        held = self.layout
        if held is None:
            for name, column in layout.columns.items():
                self._array(name, (len(self.items), *column.shape), column.dims, "f8", np.nan)
            self.place.write(LAYOUT, layout.to_json())
            return layout
        if held.columns != layout.columns:
            raise StudyError(
                f"the arrays at {self.place.url} are for other numbers than this worker has: "
                f"{held.columns} and {layout.columns}"
            )
        return held

    def _array(
        self,
        name: str,
        shape: tuple[int, ...],
        dims: tuple[str, ...],
        dtype: str,
        fill: float | int,
    ) -> None:
        """Make an array whose chunks are units, unless it is there."""
        zarr = need_zarr()
        with _told_of(self.place):
            group = zarr.open_group(self.place.zarr(ARRAYS), mode="a", zarr_format=3)
            with contextlib.suppress(zarr.errors.ContainsArrayError):
                group.create_array(
                    name,
                    shape=shape,
                    chunks=(self.spec.unit, *shape[1:]),
                    dtype=dtype,
                    fill_value=fill,
                    dimension_names=("item", *dims),
                    config={"write_empty_chunks": True},
                )

    @functools.cached_property
    def _group(self) -> Any:
        return need_zarr().open_group(self.place.zarr(ARRAYS), mode="r+", zarr_format=3)

    def commit(
        self, unit: int, numbers: Mapping[str, np.ndarray], status: Sequence[int] | np.ndarray
    ) -> None:
        """Write what a unit has; its status last."""
        rows = self.rows(unit)
        with _told_of(self.place):
            for name, values in numbers.items():
                self._group[name][rows.start : rows.stop] = values
            self._group[STATUS][rows.start : rows.stop] = np.asarray(status, "i1")

    def forget(self, units: Iterable[int]) -> None:
        """Take back that units are done, and what is known of their failures."""
        for unit in units:
            self.place.remove(f"{ARRAYS}/{STATUS}/c/{unit}")
            for folder in ("failures", "attempts"):
                for name in self.place.names(folder):
                    if name.startswith(f"{unit:07d}."):
                        self.place.remove(f"{folder}/{name}")

    def statuses(self) -> np.ndarray:
        """The status of every item."""
        return np.asarray(self._group[STATUS][:])

    # ---------------------------------------------------------------- what went wrong

    def attempt(self, unit: int, row: int | None = None) -> int:
        """Note that a unit, or one of its items alone, is tried; how often it is now."""
        name = _attempts(unit, row)
        count = self.attempts(unit, row) + 1
        self.place.write(name, str(count).encode())
        return count

    def attempts(self, unit: int, row: int | None = None) -> int:
        """How often a unit, or one of its items alone, was tried."""
        held = self.place.read(_attempts(unit, row))
        return 0 if held is None else int(held)

    def give_back(self, unit: int, row: int | None = None) -> None:
        """Take back a try that ended without fault of the unit."""
        count = self.attempts(unit, row)
        if count:
            self.place.write(_attempts(unit, row), str(count - 1).encode())

    def fail(self, row: int, why: str) -> None:
        """Note why an item has no numbers."""
        unit = row // self.spec.unit
        self.place.write(f"failures/{unit:07d}.{row}.txt", why.encode())

    def failures(self) -> dict[int, str]:
        """Why items have no numbers, by their rows."""
        found = {}
        for name in self.place.names("failures"):
            held = self.place.read(f"failures/{name}")
            if held is not None:
                found[int(name.split(".")[1])] = held.decode()
        return found


def _attempts(unit: int, row: int | None) -> str:
    return f"attempts/{unit:07d}.{'all' if row is None else row}"


def rows_of(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Items as rows of a table, their clips by whole paths.

    Raises:
        StudyError: a clip that is in memory.
    """
    folders: dict[str, str] = {}  # of which many items share few
    return [_row_of(item, folders) for item in items]


def _row_of(item: Item, folders: dict[str, str]) -> dict[str, Any]:
    row = item.told()
    for name in CLIPS:
        clip = getattr(item, name)
        if clip is None:
            continue
        if not isinstance(clip, (str, Path)):
            raise StudyError(
                f"the clip of {item.name} is in memory, where workers cannot hear it: write the "
                "items down with items.to_table(path), and pass that path"
            )
        folder, file = os.path.split(str(clip))
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        row[name] = os.path.join(folders[folder], file)
    return row


@contextlib.contextmanager
def _told_of(place: Place) -> Any:
    """Say where a disk is full or may not be written."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{place.url} cannot be written: {error}") from error
