"""A study: one method over many items, here or on many machines, resumed by the same call."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from audio_lens import patching
from audio_lens.arguments import suggest, whole
from audio_lens.items import Items, demo_items
from audio_lens.items.methods import METHODS
from audio_lens.items.tables import CLIPS
from audio_lens.provenance import is_own, recorded
from audio_lens.studies.engines import Engine, Here
from audio_lens.studies.errors import StudyError
from audio_lens.studies.jobs import OWN_OF_SWEEPS, check_joins, method_of, takes_pairs
from audio_lens.studies.planning import StudyPlan, planned, sizes
from audio_lens.studies.spec import HARVEST, SWEEP, Spec, named
from audio_lens.studies.status import Status, status_of
from audio_lens.studies.store import DONE, Store, rows_of

DEMO = "demo"  # in place of a table: the shipped items
TFLOPS = 100.0  # a second, of a worker: a stated rate and no measured one
OF_HARVESTS = ("sites", "where", "layers", "pool", "keep", "size")
OWN_OF_METHODS = ("model", "items", "pairs", "pair", "progress")


class Study:
    """A method over the items of a table, whose numbers are kept unit by unit at a place.

    Making it again with the same arguments goes on with what is there; with other ones it is
    refused. Nothing runs before `run`, and no weights are loaded.

    Args:
        items: a table, as `Items.from_table` reads it; `Items` whose clips are files; or "demo",
            the shipped ones.
        model: as ``from_pretrained`` takes it.
        out: a folder, or the address of an object store (``s3://bucket/folder``).
        method: "patching.sweep", or a method of `audio_lens.analysis` that gives values of every
            item: itself or its name, such as "knockout.knock_out".
        case: of sweeps: a function of model and item that gives a `Case`, as "module:function".
            None sweeps every item beside its counterpart, by the logit difference of its answers.
        stream: which counterpart makes the pairs: "audio", "text" or "both".
        loader: a function that makes the model in place of ``from_pretrained``, likewise named.
        dtype, device: of the model's weights: "bfloat16", "cuda".
        unit: how many items are committed together. Whatever stops a worker, no more than its unit
            is lost. None: one to five minutes of work by the plan, and at most 64 items; of a
            method 32.
        batch: at most so many items of equal layout are swept at once, which is faster and equal
            within rounding. None: 4, unless the cells of one item fill the device; 1 has the bits
            of a loop.
        threads: of every worker.
        memory_gb: of every sweep.
        skip_bad: leave out rows of the table that cannot be used, and tell of them, in place of
            raising.
        arguments: of the method: ``site=``, ``axes=``, ``windows=`` ... of sweeps.

    Raises:
        StudyError: an argument that the method does not take or that no file holds, clips in
            memory, or a place that belongs to another study.
        ItemError: a table that cannot be used.
        BucketError: an object store that cannot be reached.
        LoadingError: a config that cannot be read, where ``unit`` or ``batch`` is None.
        OutputError: a place that cannot be written.
        ExtraError: naming the extra that a study needs.
    """

    def __init__(
        self,
        items: str | Path | Items,
        model: str = "embedded",
        *,
        out: str | Path,
        method: str | Callable[..., Any] = SWEEP,
        case: str | None = None,
        stream: str | None = None,
        loader: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        unit: int | None = None,
        batch: int | None = None,
        threads: int = 1,
        memory_gb: float | int = 2.0,
        skip_bad: bool = False,
        **arguments: Any,
    ):
        for name, value in {"unit": unit, "batch": batch, "threads": threads}.items():
            if value is not None or name == "threads":
                whole(name, value, least=1)
        for path in filter(None, (case, loader)):
            named(path)
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise StudyError(f"dtype is a name such as 'bfloat16', got {dtype!r}")
        called = method if isinstance(method, str) else _name_of(method)
        _check_arguments(called, case, stream, arguments)
        rows = _read(items, skip_bad)
        ordered = sorted(rows, key=lambda item: (-item.duration_s, item.text or ""))
        told = rows_of(ordered)
        spec = Spec(
            items=str(items) if items == DEMO else _path_of(items),
            digest=_digest(told),
            model=str(model),
            method=called,
            arguments=recorded(arguments),
            dtype=dtype,
            device=device,
            loader=loader,
            case=case,
            stream=stream,
            threads=threads,
            memory_gb=memory_gb,
        )
        self.skipped = rows.skipped
        if unit is None or batch is None:
            unit, batch = Store.sizes(out, unit, batch) or sizes(spec, Items(ordered), unit, batch)
        self.store = Store.create(out, replace(spec, unit=unit, batch=min(batch, unit)), told)

    @classmethod
    def open(cls, out: str | Path) -> Study:
        """The study at a place.

        Raises:
            StudyError: no study there.
        """
        study = cls.__new__(cls)
        study.store, study.skipped = Store.open(out), ()
        return study

    @property
    def spec(self) -> Spec:
        """What is computed."""
        return self.store.spec

    @property
    def out(self) -> str:
        """Where it lies."""
        return self.store.place.url

    def __repr__(self) -> str:
        return f"Study({self.spec.method} of {len(self.store.items)} items at {self.out})"

    def explain(self, workers: int = 1, tflops: float | int = TFLOPS) -> StudyPlan:
        """What a study will cost, from the model's config alone: no weights are read.

        Of a sweep, work, cells and memory are the engine's own counts for some of the items, and
        those of items between them by their seconds. A method is run for two of them on a stand-in
        of the model with as many blocks and heads and random weights, and its products are counted:
        how many whole forwards of an item they are holds for all items. Hours and the share of time
        in which workers are busy are simulated from that: they are as good as the rate that is
        given.

        Args:
            workers: how many run at a time.
            tflops: TFLOP a second that a worker reaches: often no more than 40 % of its peak.

        Raises:
            StudyError: a harvest, a method that cannot be counted (such as one that goes by what
                is answered rightly), a model of a loader, or no item that can be used.
            LoadingError: a config that cannot be read.
        """
        return planned(self.spec, self.store.items, workers, tflops)

    def run(
        self,
        engine: Engine | None = None,
        *,
        limit: int | None = None,
        progress: bool | None = None,
    ) -> Status:
        """Run what is not done; stopped, the same call goes on.

        Args:
            engine: `Here` (None), `Ray`, `Slurm`, or one of your own.
            limit: at most so many items, rounded up to units: for a trial.
            progress: as in `patching.sweep`.

        Raises:
            StudyError: too many items that fail, or a worker that cannot begin.
        """
        left = self.store.left()
        if limit is not None:
            left = left[: -(-whole("limit", limit, least=1) // self.spec.unit)]
        if left:
            (Here() if engine is None else engine).run(self.out, left, progress)
        return self.status()

    def status(self) -> Status:
        """What is done, what failed and why, how fast it goes, and how long it still takes."""
        return status_of(self.store)

    def retry(self) -> int:
        """Take back units with items that failed, so that `run` computes them again; how many."""
        failed = [
            unit
            for unit in sorted(self.store.done())
            if (self.store.statuses()[slice(*_ends(self.store.rows(unit)))] != DONE).any()
        ]
        self.store.forget(failed)
        return len(failed)


def _ends(rows: range) -> tuple[int, int]:
    return rows.start, rows.stop


def _read(items: str | Path | Items, skip_bad: bool) -> Items:
    if isinstance(items, Items):
        return items
    return demo_items() if items == DEMO else Items.from_table(items, skip_bad=skip_bad)


def _path_of(items: str | Path | Items) -> str:
    return "" if isinstance(items, Items) else str(Path(items).resolve())


def _name_of(method: Callable[..., Any]) -> str:
    """What a method is registered as."""
    if method is patching.sweep:
        return SWEEP
    for name, known in METHODS.items():
        if known.function is method:
            return name
    raise StudyError(
        f"{getattr(method, '__name__', method)} is no method over items that gives a Result; "
        f"there are {', '.join([SWEEP, *sorted(METHODS)])}"
    )


def _check_arguments(
    method: str, case: str | None, stream: str | None, given: Mapping[str, Any]
) -> None:
    """Raise for what the method does not take, or no file holds."""
    is_sweep = method == SWEEP
    if not is_sweep and method != HARVEST:
        check_joins(method)
    takes = [] if method == HARVEST else _parameters(method)
    own = (*OWN_OF_SWEEPS, "model") if is_sweep else OWN_OF_METHODS
    known = OF_HARVESTS if method == HARVEST else [name for name in takes if name not in own]
    for name in given:
        if name not in known:
            raise StudyError(f"{method} in a study takes no {name!r}; {suggest(name, known)}")
    if case is not None and not is_sweep:
        raise StudyError(f"case= is of sweeps; {method} takes items as they are")
    if (
        stream is not None
        and not is_sweep
        and (method == HARVEST or not takes_pairs(method_of(method)))
    ):
        raise StudyError(f"stream= makes pairs, and {method} takes items")
    lost = [name for name, value in recorded(given).items() if is_own(value)]
    if lost:
        raise StudyError(
            f"no file holds {', '.join(lost)}, and workers read a study from a file: use numbers, "
            "texts, edits, metrics of audio_lens, or case='module:function'"
        )


def _parameters(method: str) -> list[str]:
    """What a method takes."""
    function = patching.sweep if method == SWEEP else method_of(method)
    return list(inspect.signature(function).parameters)


def _digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """A hash of what is asked of which clips, these by their sizes: nothing is read."""
    digest = hashlib.sha256()
    for row in rows:
        sizes = {name: os.stat(row[name]).st_size for name in CLIPS if name in row}
        digest.update(json.dumps({**row, **sizes}, sort_keys=True).encode())
    return digest.hexdigest()[:16]
