"""What a study will cost, before it does: from the model's config alone, without weights."""

from __future__ import annotations

import collections
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from audio_lens import patching
from audio_lens.arguments import whole
from audio_lens.errors import AudioLensError
from audio_lens.items import Item, Items
from audio_lens.models import TokenError
from audio_lens.models.loading.on_paper import on_paper
from audio_lens.patching.engine.work import rows_together
from audio_lens.studies.counting import counted
from audio_lens.studies.engines.engine import blocks
from audio_lens.studies.errors import StudyError, in_words
from audio_lens.studies.jobs import Sweeps
from audio_lens.studies.spec import HARVEST, Spec
from audio_lens.studies.status import reason

SAMPLE = 16  # items that are planned one by one; others by their seconds
START_S, HOST_S = 90.0, 0.03  # of a worker before its first item; of an item beside the device
BUSY = 0.95  # of all workers' time, below which fewer are proposed
UNIT_S = (60.0, 300.0)  # of work that is lost with a worker
BESIDE = 3  # files of a unit beside its arrays: status, report, attempts
RATES = {"cpu": 0.03, "cuda": 100.0}  # TFLOP a second of a worker where units are chosen
MOST_UNIT, FEWEST_UNITS = 64, 8  # where they are chosen
UNIT = 8  # of a model that only a loader makes
OF_METHODS = 32  # items of a unit: controls of methods compare these with each other
SIZE_OF_METHODS = 16  # items that run at once, where a method is not told
TOGETHER = 4  # items of equal layout: more save next to nothing


@dataclass(frozen=True)
class StudyPlan:
    """What a study costs, computed and not measured.

    Attributes:
        method: what runs.
        items, units, unit: how many there are, and how many items a unit holds.
        batch: at most so many items of equal layout are swept at once.
        sampled, refused: how many items were looked at, and how many of these cannot be used, by
            why.
        misread: how many of all items have answers that are no single tokens.
        cells: of all items, of a method the numbers that it gives; ``tflop`` of work with both
            unpatched runs.
        forwards: of a method, how many whole forwards of an item its work is.
        weights_gb, cell_gb, memory_gb: what the weights take, the largest cell (of a method, a
            batch that runs at once), and the budget of a sweep.
        storage_gb, files: of the numbers, before compression.
        workers, rate: how many, each with so many TFLOP a second.
        hours: until the last is done; ``busy`` the share of all their time in the method.
        proposed: the most workers, halving, that are busy enough.
        proposed_unit: how many items take one to five minutes.
        unit_s: seconds of the items of every unit.
    """

    method: str
    items: int
    units: int
    unit: int
    batch: int
    sampled: int
    refused: Mapping[str, int]
    misread: int
    cells: int
    forwards: float | None
    tflop: float
    weights_gb: float
    cell_gb: float
    memory_gb: float
    storage_gb: float
    files: int
    workers: int
    rate: float
    hours: float
    busy: float
    proposed: int
    proposed_unit: int
    unit_s: Sequence[np.ndarray] = field(default=(), repr=False)

    def at(self, workers: int) -> StudyPlan:
        """The plan with another number of workers, of which nothing is counted again."""
        hours, busy, fewer = _of_workers(self.unit_s, whole("workers", workers, least=1))
        return replace(self, workers=workers, hours=hours, busy=busy, proposed=fewer)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        told = {n: getattr(self, n) for n in self.__dataclass_fields__ if n != "unit_s"}
        return told | {"refused": dict(self.refused)}

    @property
    def warnings(self) -> list[str]:
        """What should be changed before this is run."""
        said = []
        if self.busy < BUSY:
            said.append(
                f"{self.workers} workers are busy {self.busy:.0%} of their time: take "
                f"{self.proposed}, or units of fewer items"
                if self.proposed < self.workers
                else f"workers are busy {self.busy:.0%} of their time: this is little work"
            )
        if self.forwards is None and self.cell_gb > self.memory_gb:
            said.append(
                f"a cell takes {self.cell_gb:.2f} GB, and memory_gb is {self.memory_gb:g}: sweeps "
                "will be refused"
            )
        if self.refused:
            said.append(
                f"{sum(self.refused.values())} of the {self.sampled} items that were looked at "
                "cannot be used"
            )
        if self.misread:
            said.append(
                f"{self.misread} of all {self.items} items have answers that are no single tokens "
                "and will have no numbers"
            )
        return said

    @property
    def _at_once(self) -> str:
        return f", up to {self.batch} of equal layout at once" if self.batch > 1 else ""

    @property
    def _how(self) -> str:
        """What the work is made of."""
        if self.forwards is None:
            return f"in {self.cells:,} cells"
        return f"as of {self.forwards:.3g} whole forwards of every item"

    @property
    def _memory(self) -> str:
        """What is needed beside the weights."""
        if self.forwards is None:
            return f"{self.memory_gb:g} GB for cells, of which the largest takes {self.cell_gb:.3g}"
        return f"about {self.cell_gb:.3g} GB for a batch"

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.method}: {self.items} items in {self.units} units of {self.unit} "
                f"({self.proposed_unit} take one to five minutes){self._at_once}",
                f"work: {self.tflop:,.4g} TFLOP {self._how} (computed from {self.sampled} items)",
                f"memory of a worker: {self.weights_gb:.3g} GB of weights, {self._memory}",
                f"storage: {self.storage_gb:.3g} GB in {self.files:,} files",
                f"time: {self.hours:.3g} hours with {self.workers} workers of {self.rate:g} TFLOP "
                f"a second, busy {self.busy:.1%}",
                *(
                    f"cannot be used, {count} of the sample: {why}"
                    for why, count in self.refused.items()
                ),
                *(f"warning: {one}" for one in self.warnings),
            ]
        )


def planned(spec: Spec, items: Items, workers: int, rate: float | int) -> StudyPlan:
    """The plan of a study; see `Study.explain`.

    Raises:
        StudyError: a harvest, a method that cannot be counted, a model of a loader, or no item that
            can be used.
        LoadingError: a config that cannot be read.
    """
    whole("workers", workers, least=1)
    if not rate > 0 or not math.isfinite(rate):
        raise StudyError(f"tflops is the rate of a worker, above 0, got {rate!r}")
    model = _on_paper(spec)
    found = Sample.of(spec, model, items, SAMPLE)
    seconds = np.array([item.duration_s for item in items])
    tflop = found.at(seconds, found.tflop)
    costs = tflop / rate
    by_unit = [costs[i : i + spec.unit] for i in range(0, len(costs), spec.unit)]
    hours, busy, fewer = _of_workers(by_unit, workers)
    size = sum(x.numel() * x.element_size() for x in model.parameters())
    return StudyPlan(
        method=spec.method,
        items=len(items),
        units=len(by_unit),
        unit=spec.unit,
        batch=spec.batch,
        sampled=found.looked_at,
        refused=found.refused,
        misread=_misread(model, items),
        cells=round(float(found.at(seconds, found.cells).sum())),
        forwards=found.forwards,
        tflop=float(tflop.sum()),
        weights_gb=size / 1e9,
        cell_gb=found.largest / 1e9,
        memory_gb=float(spec.memory_gb),
        storage_gb=8e-9 * len(items) * max(found.cells),
        files=len(by_unit) * (found.arrays + BESIDE),
        workers=workers,
        rate=float(rate),
        hours=hours,
        busy=busy,
        proposed=fewer,
        proposed_unit=_unit(float(costs.mean()) + HOST_S),
        unit_s=by_unit,
    )


def _of_workers(units: Sequence[np.ndarray], workers: int) -> tuple[float, float, int]:
    """Hours and busy share with so many workers, and with how many of them it is large enough."""
    hours, busy = simulated(units, workers)
    fewer = workers
    while fewer > 1 and simulated(units, fewer)[1] < BUSY:
        fewer //= 2
    return hours, busy, fewer


def sizes(spec: Spec, items: Items, unit: int | None, batch: int | None) -> tuple[int, int]:
    """How many items make a unit, and how many of equal layout are swept at once, if not given.

    A unit takes one to five minutes of a worker of the device's kind (`RATES`), holds no more than
    `MOST_UNIT` items, and leaves `FEWEST_UNITS` of them to share out. Items are swept together
    where the cells of one do not fill what the device computes at once, and memory allows it.

    Raises:
        StudyError, LoadingError: as `planned`.
    """
    share = max(1, len(items) // FEWEST_UNITS)
    if not spec.is_sweep:
        return unit or _even(len(items), OF_METHODS), batch or 1
    if spec.loader is not None or (spec.case is not None and unit is not None):
        return unit or min(UNIT, share), batch or 1
    found = Sample.of(spec, _on_paper(spec), items, FEWEST_UNITS)
    kind = "cpu" if spec.device is None else torch.device(spec.device).type
    seconds = np.array([item.duration_s for item in items])
    item_s = float(found.at(seconds, found.tflop).mean()) / RATES.get(kind, RATES["cpu"])
    is_full = kind != "cpu" and max(found.rows) >= rows_together(torch.device(kind))
    has_room = TOGETHER * found.largest < spec.memory_gb * 1e9 / 2
    together = TOGETHER if spec.case is None and not is_full and has_room else 1
    return unit or min(_unit(item_s + HOST_S), MOST_UNIT, share), batch or together


def _even(count: int, most: int) -> int:
    """How many items make a unit, so that the last one is no smaller than it must be."""
    return -(-count // -(-count // most))


def _on_paper(spec: Spec) -> Any:
    """The model without its weights.

    Raises:
        StudyError: one that a loader makes.
        LoadingError: a config that cannot be read.
    """
    if spec.loader is not None:
        raise StudyError("a plan is made from a config, and loader= makes a model of its own")
    return on_paper(spec.model, None if spec.dtype is None else getattr(torch, spec.dtype))


def _misread(model: Any, items: Items) -> int:
    """How many items have answers that the model does not write as one token."""
    if model.cfg.output_kind != "tokens":
        return 0
    known: dict[str, bool] = {}
    for said in {x for item in items for x in (item.answer, item.against) if x is not None}:
        try:
            model.to_single_token(said)
            known[said] = True
        except TokenError:
            known[said] = False
    return sum(not all(known.get(x, True) for x in (i.answer, i.against) if x) for i in items)


def simulated(units: Sequence[np.ndarray], workers: int) -> tuple[float, float]:
    """Hours until the last unit is done, and the share of all workers' time in the method.

    Blocks of units are taken as engines share them out; a worker starts before its first, and every
    item has some work beside the device, which is not counted as busy.

    Args:
        units: seconds of the items of each.
    """
    free = [START_S] * workers
    for block in blocks(range(len(units)), workers):
        took = sum(float(units[unit].sum()) + HOST_S * len(units[unit]) for unit in block)
        heapq.heapreplace(free, free[0] + took)
    end = max(free)
    return end / 3600, sum(float(unit.sum()) for unit in units) / (workers * end)


def _unit(item_s: float) -> int:
    """How many items take one to five minutes: one where an item takes longer."""
    return max(1, round(math.sqrt(UNIT_S[0] * UNIT_S[1]) / item_s))


@dataclass
class Sample:
    """Some items that were planned one by one.

    Attributes:
        seconds, loops, tflop, cells, rows: of those that can be used; ``loops`` are operations of
            one whole forward, ``rows`` positions of all cells.
        largest: bytes of a cell; of a method, of what runs at once.
        refused: the others, by why.
        forwards: of a method.
        arrays: that a study keeps.
    """

    seconds: list[float] = field(default_factory=list)
    loops: list[float] = field(default_factory=list)
    tflop: list[float] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    largest: float = 0.0
    refused: collections.Counter[str] = field(default_factory=collections.Counter)
    forwards: float | None = None
    arrays: int = 0

    @property
    def looked_at(self) -> int:
        """How many items there are of both kinds."""
        return len(self.seconds) + sum(self.refused.values())

    @staticmethod
    def of(spec: Spec, model: Any, items: Items, count: int) -> Sample:
        """Items evenly from the longest to the shortest.

        Raises:
            StudyError: none of which can be used, or a method that cannot be counted.
        """
        if spec.method == HARVEST:
            raise StudyError("a harvest is one forward of every item, and has no plan")
        sample, good = Sample(), []
        look = Sweeps(spec).plan if spec.is_sweep else _forward
        for row in np.unique(np.linspace(0, len(items) - 1, count).round().astype(int)).tolist():
            try:
                plan = look(model, items[row])
            except AudioLensError as error:
                sample.refused[reason(in_words(error))] += 1
                continue
            sample._add(items[row].duration_s, plan)
            good.append(row)
        if not good:
            told = "; ".join(f"{count} items: {why}" for why, count in sample.refused.items())
            raise StudyError(f"no item of the sample can be used: {told}")
        sample.arrays = 3 + 2 * ("time" in spec.axes)
        if not spec.is_sweep:
            middle = max(0, len(good) // 2 - 1)
            sample._count(spec, model, items[good[middle : middle + 2]])
        return sample

    def _add(self, seconds: float, plan: patching.Plan) -> None:
        schedule = plan.schedule
        work = schedule.flops(range(len(plan))) + 2 * schedule.costs.loop
        self.seconds.append(seconds)
        self.loops.append(schedule.costs.loop)
        self.tflop.append(work / 1e12)
        self.cells.append(len(plan))
        self.rows.append(len(plan) * schedule.costs.rows(0))
        self.largest = max(self.largest, float(schedule.largest_cell))

    def _count(self, spec: Spec, model: Any, items: Items) -> None:
        """Turn whole forwards into the work of a method."""
        told = counted(spec, model, items)
        self.forwards, self.arrays = told.forwards, told.arrays
        self.tflop = [work * told.forwards / 1e12 for work in self.loops]
        self.cells = [told.numbers] * len(self.cells)
        self.largest *= spec.arguments.get("size", SIZE_OF_METHODS)

    def at(self, seconds: np.ndarray, values: Sequence[float | int]) -> np.ndarray:
        """Values of items of any length: of those of one length the mean."""
        lengths, of = np.unique(self.seconds, return_inverse=True)
        means = np.bincount(of, np.asarray(values, float)) / np.bincount(of)
        return np.interp(seconds, lengths, means)


def _forward(model: Any, item: Item) -> patching.Plan:
    """A plan of one cell, which knows what a whole forward of the item costs.

    Raises:
        AudioLensError: an item that cannot be used.
    """
    inputs = Items([item]).usable(model).prepare(model)
    part = "encoder" if model.cfg.decoder is None else "decoder"
    return patching.plan(
        model,
        clean=inputs,
        corrupted=inputs,
        site=f"{part}.resid_pre",
        axes="layer",
        layers=[0],
        metric=_of_all,
    )


def _of_all(logits: torch.Tensor) -> torch.Tensor:
    """A metric, where a plan needs one."""
    return logits.flatten(1).sum(1)
