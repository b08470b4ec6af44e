"""One process of a study: it holds the model, and runs units one after the other."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from audio_lens.errors import AudioLensError
from audio_lens.items import Items
from audio_lens.models import HookedAudioTransformer
from audio_lens.provenance import versions, weights_hash
from audio_lens.studies.errors import StudyError, in_words
from audio_lens.studies.jobs import Job, Methods, Numbers, Sweeps
from audio_lens.studies.shards import Harvests, write_index, write_shard
from audio_lens.studies.spec import HARVEST, Spec
from audio_lens.studies.store import DONE, KILLED, REFUSED, Layout, Store

MOST_ATTEMPTS = 3  # of a unit, before its items run alone; then of nothing more
LOOKED_AT, MOST_FAILED = 200, 0.05  # of so many items, a worker stops when more than so many fail
TOO_LARGE = (MemoryError, torch.OutOfMemoryError)
MODEL, PROBES, AGREE = "model.json", 5, 2e-3  # of the first item's largest logits, relative


@dataclass(frozen=True)
class UnitReport:
    """What a unit cost.

    Attributes:
        unit: which.
        items: how many it holds; ``failed`` of them have no numbers.
        start, end: seconds since the epoch.
        busy_s: of these, in the method itself.
        worker: host and process.
    """

    unit: int
    items: int
    failed: int
    start: float
    end: float
    busy_s: float
    worker: str


class Worker:
    """Holds the model of one process and runs units of the study at a place.

    Raises:
        StudyError: no study there, a model that does not fit into memory, or one with other weights
            or answers than the first worker had.
        LoadingError, HubError: a model that cannot be loaded.
    """

    def __init__(self, out: str | Path):
        self.store = Store.open(out)
        self.spec = self.store.spec
        self.job = _job_of(self.spec)
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        self.model = self._loaded()
        self._seen = self._failed = 0
        self._layout = self._laid_out()
        self._check_model()

    def run(self, units: Sequence[int]) -> list[UnitReport]:
        """Run units that are not done; what each cost.

        Raises:
            StudyError: too many items that fail.
        """
        return list(self.each(units))

    def each(self, units: Sequence[int]) -> Iterator[UnitReport]:
        """The same, one at a time; a unit is written while the next runs."""
        with ThreadPoolExecutor(1) as behind:
            writing: Future[None] | None = None
            done = self.store.done()
            for unit in units:
                if unit in done:
                    continue
                start = time.time()
                with self._tried(unit) as tries:
                    found, status, busy_s = self._computed(unit, alone=tries > MOST_ATTEMPTS)
                if writing is not None:
                    writing.result()
                failed = int((status != DONE).sum())
                told = UnitReport(unit, len(status), failed, start, time.time(), busy_s, self.name)
                writing = behind.submit(self._write, told, found, status)
                yield told
                self._check_failures(status)
            if writing is not None:
                writing.result()

    @contextmanager
    def _tried(self, unit: int, row: int | None = None) -> Iterator[int]:
        """Count a try, and take it back where it ends by no fault of the unit: by a signal."""
        count = self.store.attempt(unit, row)
        try:
            yield count
        except (KeyboardInterrupt, SystemExit):
            self.store.give_back(unit, row)
            raise

    # ---------------------------------------------------------------- one unit

    def _computed(self, unit: int, alone: bool) -> tuple[list[Numbers], np.ndarray, float]:
        """Numbers and status of a unit's items, and seconds in the method."""
        rows = self.store.rows(unit)
        status = np.full(len(rows), DONE, "i1")
        start = time.perf_counter()
        run = self._alone if alone else self._together
        found = run(rows, list(range(len(rows))), status)
        busy_s = time.perf_counter() - start
        if found and self._layout is None:
            self._layout = self.store.lay_out(found[0].layout)
        for k in set(np.flatnonzero(status == DONE)) - {k for one in found for k in one.rows}:
            self._refuse(rows, int(k), status, "the method left it out")
        return found, status, busy_s

    def _together(self, rows: range, chosen: list[int], status: np.ndarray) -> list[Numbers]:
        """Numbers of all that can be used, at once; why others cannot is noted."""
        try:
            return self._run(rows, chosen)
        except StudyError:
            raise
        except (AudioLensError, *TOO_LARGE, OSError) as error:
            if len(chosen) == 1:
                self._refuse(rows, chosen[0], status, in_words(error))
                return []
        good = [k for k in chosen if self._is_usable(rows, k, status)]
        if 0 < len(good) < len(chosen):
            return self._together(rows, good, status)
        return [x for k in good for x in self._together(rows, [k], status)]

    def _is_usable(self, rows: range, k: int, status: np.ndarray) -> bool:
        """Whether the model takes an item by itself; why not is noted."""
        try:
            Items([self.store.items[rows[k]]]).usable(self.model)
        except AudioLensError as error:
            self._refuse(rows, k, status, in_words(error))
            return False
        return True

    def _alone(self, rows: range, good: list[int], status: np.ndarray) -> list[Numbers]:
        """Items of a unit that killed its workers, one by one: one that was tried is the killer."""
        found = []
        for k in good:
            unit = rows[0] // self.spec.unit
            if self.store.attempts(unit, rows[k]):
                status[k] = KILLED
                self.store.fail(rows[k], f"killed its worker {MOST_ATTEMPTS} times")
                continue
            with self._tried(unit, rows[k]):
                found += self._together(rows, [k], status)
            self.store.give_back(unit, rows[k])
        return found

    def _run(self, rows: range, good: list[int]) -> list[Numbers]:
        """Numbers of some items, by their places in the unit."""
        found = self.job.run(self.model, self.store.items[[rows[k] for k in good]])
        for one in found:
            one.rows = [good[row] for row in one.rows]
        return found

    def _refuse(self, rows: range, k: int, status: np.ndarray, why: str) -> None:
        status[k] = REFUSED
        self.store.fail(rows[k], why)

    def _arrays(self, rows: range, found: list[Numbers]) -> dict[str, np.ndarray]:
        """Every array of a unit; what an item does not have stays NaN."""
        if self._layout is None:
            return {}
        arrays = {
            name: np.full((len(rows), *column.shape), np.nan)
            for name, column in self._layout.columns.items()
        }
        for one in found:
            for name, values in one.values.items():
                self._put(arrays, name, one.rows, values)
        return arrays

    def _put(
        self, arrays: dict[str, np.ndarray], name: str, rows: list[int], values: np.ndarray
    ) -> None:
        room = arrays.get(name)
        if room is None or room.ndim != values.ndim:
            raise StudyError(f"{name} was not laid out, and some items have it")
        if any(x > y for x, y in zip(values.shape[1:], room.shape[1:], strict=True)):
            raise StudyError(
                f"{name} of an item is {list(values.shape[1:])}, larger than was laid out, "
                f"{list(room.shape[1:])}"
            )
        within = tuple(slice(size) for size in values.shape[1:])
        room[(rows, *within)] = values

    def _write(self, told: UnitReport, found: list[Numbers], status: np.ndarray) -> None:
        rows = self.store.rows(told.unit)
        numbers = self._arrays(rows, found)
        if self.spec.method == HARVEST and found:
            write_shard(self.store.place, told.unit, rows, found)
        self.store.place.write(f"units/{told.unit:07d}.json", json.dumps(asdict(told)).encode())
        self.store.commit(told.unit, numbers, status)

    def _check_failures(self, status: np.ndarray) -> None:
        """Stop a study whose items mostly cannot be used, before it costs more."""
        self._seen += len(status)
        self._failed += int((status != DONE).sum())
        share = self._failed / self._seen
        if self._seen - len(status) < LOOKED_AT <= self._seen and share > MOST_FAILED:
            why = next(iter(self.store.failures().values()), "").splitlines()[:1]
            raise StudyError(
                f"{self._failed} of the first {self._seen} items have no numbers, such as: "
                f"{why}. Mend the items, or leave them out, before going on"
            )

    # ---------------------------------------------------------------- the model

    def _loaded(self) -> HookedAudioTransformer:
        try:
            return self.spec.load()
        except TOO_LARGE as error:
            place = self.spec.device or "cpu"
            raise StudyError(
                f"{self.spec.model} does not fit into the memory of {place}: {in_words(error)}. "
                "dtype='bfloat16' takes half of float32; explain() tells what weights take"
            ) from error

    def _laid_out(self) -> Layout | None:
        held = self.store.layout
        if held is None:
            made = self.job.layout(self.model, self.store.items)
            held = None if made is None else self.store.lay_out(made)
        if self.spec.method == HARVEST and held is not None:
            write_index(self.store.place, held, self.store.items)
        return held

    def _check_model(self) -> None:
        """Raise unless the model is, and answers, as that of the first worker."""
        mine = {"weights": weights_hash(self.model), "logits": self._probe(), **versions()}
        held = self.store.place.read(MODEL)
        if held is None:
            self.store.place.write(MODEL, json.dumps(mine, indent=1).encode())
            return
        its = json.loads(held)
        if its["weights"] != mine["weights"]:
            raise StudyError(
                f"{self.spec.model} has other weights (or another dtype) here than the study "
                f"began with: {mine['weights']}, not {its['weights']}"
            )
        if not np.allclose(its["logits"], mine["logits"], rtol=AGREE, atol=AGREE):
            raise StudyError(
                f"the model answers otherwise here ({self.name}) than where the study began: "
                f"largest logits {mine['logits']}, not {its['logits']}. Versions there: "
                f"{ {name: its[name] for name in versions()} }"
            )

    @torch.no_grad()
    def _probe(self) -> list[float]:
        """The largest logits of the first item that can be used."""
        for item in self.store.items:
            try:
                logits = self.model(Items([item]).prepare(self.model))
            except AudioLensError:
                continue
            last = logits.reshape(-1, logits.shape[-1])[-1].float()
            return last.topk(min(PROBES, len(last))).values.tolist()
        return []


def _job_of(spec: Spec) -> Job:
    """What a spec runs."""
    if spec.method == HARVEST:
        return Harvests(spec)
    return Sweeps(spec) if spec.is_sweep else Methods(spec)
