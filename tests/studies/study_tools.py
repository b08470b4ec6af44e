"""Small studies, and whether two have the same numbers."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from audio_lens import HookedAudioTransformer, Item, studies
from audio_lens.items import demo_items
from audio_lens.items.item import heard
from audio_lens.studies.status import reports_of

LAYERS = {"site": "decoder.resid_pre", "axes": "layer", "layers": [2]}
HERE = Path(__file__).parent
PATH = os.pathsep.join([str(HERE), str(HERE.parent.parent)])  # for workers


def in_memory(item: Item) -> Item:
    (audio, rate), (other, _) = (heard(clip) for clip in (item.audio, item.other_audio))
    return item.replaced(audio=audio, other_audio=other, sampling_rate=rate)


def layers(table: Path, out: Path, **options) -> studies.Study:
    """A cheap study: cells by layer alone."""
    return studies.Study(
        table, out=out, **{"unit": 2, "batch": 1, "stream": "audio", **LAYERS, **options}
    )


def numbers(study: studies.Study) -> dict[str, np.ndarray]:
    data = studies.load(study.out).to_xarray()
    return {str(name): data[name].values for name in data.data_vars}


def same(one: studies.Study, other: studies.Study) -> bool:
    mine, its = numbers(one), numbers(other)
    return mine.keys() == its.keys() and all(
        np.array_equal(mine[name], its[name], equal_nan=True) for name in mine
    )


def all_items(folder: Path) -> Path:
    """A table of the sixteen items."""
    return demo_items().to_table(folder / "items.jsonl")


def by_case(table: Path, out: Path, case: str = "case", **options) -> studies.Study:
    """Items by a case of `studied`, one by one."""
    return studies.Study(
        table, out=out, **{"unit": 1, "case": f"studied:{case}", **LAYERS, **options}
    )


def workers(study: studies.Study) -> dict[int, int]:
    """How many units every process did."""
    found: dict[int, int] = {}
    for one in reports_of(study.store):
        pid = int(one.worker.rpartition("-")[2])
        found[pid] = found.get(pid, 0) + 1
    return found


def tried_again(study: studies.Study) -> int:
    """How many units were begun more than once."""
    return sum(study.store.attempts(unit) > 1 for unit in range(len(study.store)))


@contextmanager
def meanwhile(study: studies.Study, units: int, act: Callable[[], None]) -> Iterator[list[int]]:
    """Do something once so many units are done; what it held of units when it was done."""
    happened: list[int] = []

    def wait() -> None:
        while len(study.store.done()) < units:
            time.sleep(0.1)
        act()
        happened.append(len(study.store.done()))

    threading.Thread(target=wait, daemon=True).start()
    yield happened


def kill_one(study: studies.Study) -> None:
    """Kill a worker that has done something."""
    os.kill(next(pid for pid in workers(study) if psutil.pid_exists(pid)), signal.SIGKILL)


@functools.cache
def embedded_shapes() -> tuple[int, int]:
    """Widths of the shipped decoder: of its stream, and of its MLPs."""
    cfg = HookedAudioTransformer.from_pretrained("embedded").cfg.need_decoder
    return cfg.d_model, cfg.d_mlp
