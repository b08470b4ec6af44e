"""From the items of a unit to numbers of each: a sweep of cells, or a method over items."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from torch import Tensor

from audio_lens import metrics, patching
from audio_lens.arguments import suggest
from audio_lens.errors import AudioLensError
from audio_lens.inputs import AudioInputs
from audio_lens.items import Item, Items
from audio_lens.items.findings import MEAN, RATIO_OF_MEANS, TOGETHER
from audio_lens.items.methods import METHODS
from audio_lens.items.pairs import Pairs, Stream
from audio_lens.models import HookedAudioTransformer
from audio_lens.patching import SweepResult
from audio_lens.provenance import of_model, recalled, steady
from audio_lens.results import Result, array
from audio_lens.studies.errors import StudyError
from audio_lens.studies.spec import SWEEP, Spec, named
from audio_lens.studies.store import Column, Layout

OWN_OF_SWEEPS = ("clean", "corrupted", "metric", "progress", "checkpoint", "memory_gb")
ONE_METRIC = ("logit_diff", "log_prob")  # the first that items allow
OF_A_UNIT = ("interval", "seed", "items_hash", "date")  # of what is told of a result
BASELINES, WINDOWS = ("clean", "corrupted"), ("time_start", "time_end")


@dataclass(frozen=True)
class Case:
    """What is swept for one item; made by a function of one's own, of model and item.

    Attributes:
        clean, corrupted: inputs of one prompt each.
        metric: of the answer.
        windows, source: as `patching.sweep` takes them, where they differ by item.
    """

    clean: AudioInputs
    corrupted: AudioInputs
    metric: Any
    windows: Any = None
    source: Any = None


@dataclass
class Numbers:
    """What some items of a unit gave.

    Attributes:
        rows: which of the items.
        values: by name, of these items.
        layout: of all numbers.
        tensors: of a harvest, what is written beside.
    """

    rows: list[int]
    values: dict[str, np.ndarray]
    layout: Layout = field(repr=False)
    tensors: Mapping[str, Tensor] | None = field(default=None, repr=False)


@runtime_checkable
class Job(Protocol):
    """What runs for the items of a unit."""

    def layout(self, model: HookedAudioTransformer, items: Items) -> Layout | None:
        """Which numbers items have, the longest first; None if running tells."""
        ...

    def run(self, model: HookedAudioTransformer, items: Items) -> list[Numbers]:
        """The numbers of items.

        Raises:
            AudioLensError: naming what cannot be computed of one of them.
        """
        ...


# -------------------------------------------------------------------------------- sweeps


@dataclass(frozen=True)
class Sweeps:
    """`patching.sweep` of every item, or of several of equal layout at once."""

    spec: Spec

    @functools.cached_property
    def _arguments(self) -> dict[str, Any]:
        given = {name: recalled(value) for name, value in self.spec.arguments.items()}
        return given | {"memory_gb": self.spec.memory_gb}

    def layout(self, model: HookedAudioTransformer, items: Items) -> Layout | None:
        """By the longest item that can be laid out."""
        for item in items:
            try:
                plan = self.plan(model, item)
            except AudioLensError:
                continue
            told = {"site": plan.table.site_name, "direction": plan.request.spec.direction}
            return _of_cells(plan.table.coords, told | {"meta": of_model(model)})
        return None

    def plan(self, model: HookedAudioTransformer, item: Item) -> patching.Plan:
        """The plan of one item's sweep.

        Raises:
            AudioLensError: an item that cannot be used.
        """
        ((_, given),) = self._cases(model, Items([item]))
        return patching.plan(model, **self._arguments | given)

    def run(self, model: HookedAudioTransformer, items: Items) -> list[Numbers]:
        with steady(model):
            return [
                _of_sweep(rows, patching.sweep(model, progress=False, **self._arguments | given))
                for rows, given in self._cases(model, items)
            ]

    def _cases(
        self, model: HookedAudioTransformer, items: Items
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Rows of items, and what a sweep of them takes beside what all take."""
        if self.spec.case is None:
            for rows in self._of_equal_windows(items):
                for batch in _pairs(items[rows], self.spec).batches(model, self.spec.batch):
                    own = [rows[k] for k in batch.rows]
                    yield own, {**batch.pair, "metric": _metric(model, items[own])}
            return
        make = named(self.spec.case)
        for row, item in enumerate(items):
            case = make(model, item)
            fields = {name: getattr(case, name) for name in Case.__dataclass_fields__}
            yield [row], {name: value for name, value in fields.items() if value is not None}

    def _of_equal_windows(self, items: Items) -> list[list[int]]:
        """Rows that may be swept together: of one length, where windows of time end with it."""
        rows = list(range(len(items)))
        if self.spec.batch == 1 or "time" not in self.spec.axes:
            return [rows]
        seconds = [item.duration_s for item in items]
        return [[k for k in rows if seconds[k] == one] for one in dict.fromkeys(seconds)]


def _pairs(items: Items, spec: Spec) -> Pairs[Items]:
    """Items beside the counterparts that the spec names."""
    return items.pairs(stream=cast(Stream | None, spec.stream))


def _metric(model: HookedAudioTransformer, items: Items) -> metrics.Metric:
    """What answers are measured by, where a case says nothing else."""
    found = items.metrics(model)
    return next(found[name] for name in ONE_METRIC if name in found)


def _of_cells(coords: Mapping[str, list], told: Mapping[str, Any]) -> Layout:
    """The layout of sweeps, by that of the longest."""
    shape = {axis: len(along) for axis, along in coords.items()}
    columns = {"value": Column(tuple(shape), tuple(shape.values()))}
    columns |= {name: Column((), ()) for name in BASELINES}
    if "time" in shape:
        columns |= {name: Column(("time",), (shape["time"],)) for name in WINDOWS}
    shared = {axis: list(along) for axis, along in coords.items() if axis != "time"}
    return Layout(columns, shared, told)


def _of_sweep(rows: list[int], result: SweepResult) -> Numbers:
    """The numbers of the stimuli of a sweep."""
    n = len(rows)
    shape = [len(result.coords[axis]) for axis in result.axes]
    values = {"value": array(result.values).reshape(n, *shape)}
    values |= {name: array(getattr(result, name)).reshape(n) for name in BASELINES}
    if "time" in result.axes:
        for name, field_ in zip(WINDOWS, ("start_s", "end_s"), strict=True):
            along = [getattr(span, field_) for span in result.coords["time"]]
            values[name] = np.tile(np.asarray(along), (n, 1))
    coords = {axis: result.coords[axis] for axis in result.axes}
    return Numbers(rows, values, _of_cells(coords, {}))


# -------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Methods:
    """A method over items (or their pairs), which gives a `Result` of them."""

    spec: Spec

    @functools.cached_property
    def _function(self) -> Callable[..., Any]:
        return method_of(self.spec.method)

    def layout(self, model: HookedAudioTransformer, items: Items) -> Layout | None:
        return None

    def run(self, model: HookedAudioTransformer, items: Items) -> list[Numbers]:
        given = {name: recalled(value) for name, value in self.spec.arguments.items()}
        over = _pairs(items, self.spec) if takes_pairs(self._function) else items
        result = self._function(model, over, progress=False, **given)
        if not isinstance(result, Result) or "stimulus" not in result.dims:
            raise StudyError(
                f"{self.spec.method} gives {type(result).__name__} that has no values of single "
                "items, and a study is made of these"
            )
        return [_of_result(result, items, model)]


def method_of(name: str) -> Callable[..., Any]:
    """A registered method, by its name.

    Raises:
        StudyError: no such method.
    """
    package = name.partition(".")[0]
    for module in (f"audio_lens.analysis.{package}", package):
        if name not in METHODS:
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(module)
    if name not in METHODS:
        raise StudyError(f"no method {name!r}; {suggest(name, [SWEEP, *METHODS])}")
    return METHODS[name].function


def check_joins(name: str) -> None:
    """Raise for a method that is known to say something of all its items at once.

    Raises:
        StudyError: naming it, with what to study in its place; or no such method.
    """
    method_of(name)
    if METHODS[name].whole:
        raise StudyError(
            f"no study of {name}, since units of items cannot be joined: {METHODS[name].whole}"
        )


def takes_pairs(function: Callable[..., Any]) -> bool:
    """Whether a method works on pairs, by what it calls its second argument."""
    return list(inspect.signature(function).parameters)[1].startswith("pair")


def column_of(control: str, field_: str) -> str:
    """What an array of a result, or of one of its controls, is called in a store."""
    prefix = f"control.{control}." if control else ""
    return prefix + {"values": "value"}.get(field_, field_)


def _check_joins(one: Result, name: str) -> None:
    """Raise unless what items give together is their mean, or a ratio of means."""
    if one.meta.get(TOGETHER) not in (MEAN, RATIO_OF_MEANS):
        what = f"of control {name!r} " if name else ""
        raise StudyError(
            f"the estimate {what}is no mean over items, so it cannot be joined from units"
        )


def _of_result(result: Result, items: Items, model: HookedAudioTransformer) -> Numbers:
    """The numbers of a result and of its controls."""
    place = {item.id: row for row, item in enumerate(items)}
    columns: dict[str, Column] = {}
    values: dict[str, np.ndarray] = {}
    for name, one in {"": result, **result.controls}.items():
        if "stimulus" not in one.dims:
            raise StudyError(f"control {name!r} has no values of single items")
        _check_joins(one, name)
        at, dims = one.dims.index("stimulus"), tuple(x for x in one.dims if x != "stimulus")
        for field_ in ("values", "weights"):
            held = getattr(one, field_)
            if held is not None:
                called = column_of(name, field_)
                values[called] = np.moveaxis(array(held), at, 0)
                columns[called] = Column(dims, values[called].shape[1:])
    coords = {dim: list(result.coords[dim]) for dim in result.dims if dim != "stimulus"}
    told = {
        "meta": {n: x for n, x in {**of_model(model), **result.meta}.items() if n not in OF_A_UNIT},
        "controls": list(result.controls),
    }
    rows = [place[name] for name in result.coords["stimulus"]]
    return Numbers(rows, values, Layout(columns, coords, told))
