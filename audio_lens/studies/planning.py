"""What a study will cost, before it does: from the model's config alone, without weights."""

from __future__ import annotations

import collections
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from audio_lens import patching
from audio_lens.arguments import whole
from audio_lens.errors import AudioLensError
from audio_lens.items import Items
from audio_lens.models.loading.on_paper import on_paper
from audio_lens.studies.engines.engine import blocks
from audio_lens.studies.errors import StudyError, in_words
from audio_lens.studies.jobs import Sweeps
from audio_lens.studies.spec import SWEEP, Spec
from audio_lens.studies.status import reason

SAMPLE = 16  # items that are planned one by one; others by their seconds
START_S, HOST_S = 90.0, 0.03  # of a worker before its first item; of an item beside the device
BUSY = 0.95  # of all workers' time, below which fewer are proposed
UNIT_S = (60.0, 300.0)  # of work that is lost with a worker
BESIDE = 3  # files of a unit beside its arrays: status, report, attempts


@dataclass(frozen=True)
class StudyPlan:
    """What a study costs, computed and not measured.

    Attributes:
        items, units, unit: how many there are, and how many items a unit holds.
        sampled, refused: how many items were looked at, and how many of these cannot be used, by
            why.
        cells: of all items; ``tflop`` of work with both unpatched runs.
        weights_gb, cell_gb, memory_gb: what the weights take, the largest cell, and the budget of a
            sweep.
        storage_gb, files: of the numbers, before compression.
        workers, rate: how many, each with so many TFLOP a second.
        hours: until the last is done; ``busy`` the share of all their time in the method.
        proposed: the most workers, halving, that are busy enough.
        proposed_unit: how many items take one to five minutes.
    """

    items: int
    units: int
    unit: int
    sampled: int
    refused: Mapping[str, int]
    cells: int
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
    proposed_unit: int = field(default=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        told = {name: getattr(self, name) for name in self.__dataclass_fields__}
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
        if self.cell_gb > self.memory_gb:
            said.append(
                f"a cell takes {self.cell_gb:.2f} GB, and memory_gb is {self.memory_gb:g}: sweeps "
                "will be refused"
            )
        if self.refused:
            said.append(
                f"{sum(self.refused.values())} of the {self.sampled} items that were looked at "
                "cannot be used"
            )
        return said

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.items} items in {self.units} units of {self.unit} "
                f"({self.proposed_unit} take one to five minutes)",
                f"work: {self.tflop:,.4g} TFLOP in {self.cells:,} cells (computed from "
                f"{self.sampled} items)",
                f"memory of a worker: {self.weights_gb:.3g} GB of weights, {self.memory_gb:g} GB "
                f"for cells, of which the largest takes {self.cell_gb:.3g}",
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
    """The plan of a study of sweeps; see `Study.explain`.

    Raises:
        StudyError: a method that is no sweep, a model of a loader, or no item that can be used.
        LoadingError: a config that cannot be read.
    """
    whole("workers", workers, least=1)
    if not rate > 0 or not math.isfinite(rate):
        raise StudyError(f"tflops is the rate of a worker, above 0, got {rate!r}")
    if spec.method != SWEEP:
        raise StudyError(
            f"what {spec.method} costs is not known before it runs: run(limit=...) computes a few "
            "items, and status() tells their pace"
        )
    if spec.loader is not None:
        raise StudyError("a plan is made from a config, and loader= makes a model of its own")
    model: Any = on_paper(spec.model, None if spec.dtype is None else getattr(torch, spec.dtype))
    found = _Sample.of(spec, model, items)
    seconds = np.array([item.duration_s for item in items])
    tflop = found.at(seconds, found.tflop)
    costs = tflop / rate
    by_unit = [costs[i : i + spec.unit] for i in range(0, len(costs), spec.unit)]
    hours, busy = simulated(by_unit, workers)
    fewer = workers
    while fewer > 1 and simulated(by_unit, fewer)[1] < BUSY:
        fewer //= 2
    size = sum(x.numel() * x.element_size() for x in model.parameters())
    arrays = 3 + 2 * ("time" in _axes(spec))
    return StudyPlan(
        items=len(items),
        units=len(by_unit),
        unit=spec.unit,
        sampled=found.looked_at,
        refused=found.refused,
        cells=round(float(found.at(seconds, found.cells).sum())),
        tflop=float(tflop.sum()),
        weights_gb=size / 1e9,
        cell_gb=found.largest / 1e9,
        memory_gb=float(spec.memory_gb),
        storage_gb=8e-9 * len(items) * max(found.cells),
        files=len(by_unit) * (arrays + BESIDE),
        workers=workers,
        rate=float(rate),
        hours=hours,
        busy=busy,
        proposed=fewer,
        proposed_unit=_unit(float(costs.mean()) + HOST_S),
    )


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


def _axes(spec: Spec) -> list[str]:
    axes = spec.arguments.get("axes", ())
    return [axes] if isinstance(axes, str) else list(axes)


@dataclass
class _Sample:
    """Some items that were planned one by one.

    Attributes:
        seconds, tflop, cells: of those that can be used.
        largest: bytes of a cell.
        refused: the others, by why.
    """

    seconds: list[float] = field(default_factory=list)
    tflop: list[float] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    largest: float = 0.0
    refused: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def looked_at(self) -> int:
        return len(self.seconds) + sum(self.refused.values())

    @staticmethod
    def of(spec: Spec, model: Any, items: Items) -> _Sample:
        """Items evenly from the longest to the shortest.

        Raises:
            StudyError: none of which can be used.
        """
        sample, sweeps = _Sample(), Sweeps(spec)
        for row in np.unique(np.linspace(0, len(items) - 1, SAMPLE).round().astype(int)).tolist():
            try:
                plan = sweeps.plan(model, items[row])
            except AudioLensError as error:
                sample.refused[reason(in_words(error))] += 1
                continue
            sample._add(items[row].duration_s, plan)
        if not sample.seconds:
            told = "; ".join(f"{count} items: {why}" for why, count in sample.refused.items())
            raise StudyError(f"no item of the sample can be used: {told}")
        return sample

    def _add(self, seconds: float, plan: patching.Plan) -> None:
        schedule = plan.schedule
        work = schedule.flops(range(len(plan))) + 2 * schedule.costs.loop
        self.seconds.append(seconds)
        self.tflop.append(work / 1e12)
        self.cells.append(len(plan))
        self.largest = max(self.largest, float(schedule.largest_cell))

    def at(self, seconds: np.ndarray, values: Sequence[float | int]) -> np.ndarray:
        """Values of items of any length: of those of one length the mean."""
        lengths, of = np.unique(self.seconds, return_inverse=True)
        means = np.bincount(of, np.asarray(values, float)) / np.bincount(of)
        return np.interp(seconds, lengths, means)
