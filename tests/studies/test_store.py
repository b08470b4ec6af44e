"""The store of a study: several writers, one of them killed; and as many items as a set has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
from study_tools import PATH

from audio_lens import Items, studies
from audio_lens.items import demo_items
from audio_lens.studies.spec import Spec
from audio_lens.studies.status import status_of
from audio_lens.studies.store import DONE, Column, Layout, Store, rows_of

pytest.importorskip("zarr")
SHAPE = (4, 5)
LAYOUT = Layout({"value": Column(("layer", "time"), SHAPE), "clean": Column((), ())}, {})
WRITER = """
import sys
from test_store import write_all
write_all(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
"""


def spec(unit: int) -> Spec:
    return Spec("", "digest", "embedded", "patching.sweep", unit=unit)


def truth(unit: int, count: int) -> dict[str, np.ndarray]:
    """What a unit holds."""
    drawn = np.random.default_rng(unit)
    return {"value": drawn.normal(size=(count, *SHAPE)), "clean": drawn.normal(size=count)}


def write_all(out: str, first: int, step: int) -> None:
    """Write every so manieth unit that is left."""
    store = Store.open(out)
    store.lay_out(LAYOUT)
    for unit in store.left()[first::step]:
        count = len(store.rows(unit))
        store.attempt(unit)
        store.commit(unit, truth(unit, count), np.full(count, DONE))


def many(count: int) -> Items:
    """Items that share the clips of the shipped ones."""
    shipped = demo_items()
    return Items(shipped[row % 16].replaced(id=f"item {row}") for row in range(count))


def test_units_are_chunks_and_status_comes_last(tmp_path):
    store = Store.create(tmp_path / "out", spec(2), rows_of(many(5)))
    store.lay_out(LAYOUT)
    assert len(store) == 3 and store.left() == [0, 1, 2] and list(store.rows(2)) == [4]
    store._group["value"][0:2] = 1.0  # numbers without their status are not done
    assert store.left() == [0, 1, 2]
    store.commit(2, truth(2, 1), [DONE])
    assert store.done() == {2} and store.statuses().tolist() == [0, 0, 0, 0, 1]
    assert np.array_equal(store._group["value"][4], truth(2, 1)["value"][0])
    store.forget([2])
    assert store.left() == [0, 1, 2]
    again = Store.create(tmp_path / "out", spec(2), rows_of(many(5)))
    assert [item.id for item in again.items] == [item.id for item in store.items]


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(studies.StudyError, match="cannot be read"):
        Store.create(tmp_path / "file" / "out", spec(2), rows_of(many(2)))


@pytest.mark.slow
def test_two_writers_of_whom_one_is_killed_lose_nothing(tmp_path):
    out = tmp_path / "out"
    store = Store.create(out, spec(8), rows_of(many(2500)))
    path = {"PYTHONPATH": os.pathsep.join([PATH, os.environ.get("PYTHONPATH", "")])}
    both = [
        subprocess.Popen([sys.executable, "-c", WRITER, out, str(k), "2"], env=os.environ | path)
        for k in range(2)
    ]
    while len(store.done()) < 60:
        assert any(one.poll() is None for one in both)
        time.sleep(0.05)
    both[1].send_signal(signal.SIGKILL)
    assert both[0].wait() == 0
    assert 0 < len(store.left()) < 313
    write_all(str(out), 0, 1)
    assert not store.left()
    for unit in range(len(store)):
        rows = store.rows(unit)
        for name, values in truth(unit, len(rows)).items():
            assert np.array_equal(store._group[name][rows.start : rows.stop], values)
    assert sum(store.attempts(unit) > 1 for unit in range(len(store))) <= 1


def long_table(folder: Path, count: int) -> Path:
    """A table of so many items, which share the clips of the shipped ones."""
    few = many(16).to_table(folder / "few.jsonl").read_text().splitlines()
    rows = [{**json.loads(line), "hash": None} for line in few]
    table = folder / "items.jsonl"
    with table.open("w") as file:
        for k in range(count):
            file.write(json.dumps(rows[k % 16] | {"id": f"item {k}"}) + "\n")
    return table


@pytest.mark.slow
@pytest.mark.unchecked
def test_a_set_of_57_602_items(tmp_path):
    table, out = long_table(tmp_path, 57_602), tmp_path / "out"
    with table.open("a") as file:
        file.writelines(json.dumps({"id": name, "audio": f"{name}.wav"}) + "\n" for name in "ab")
    asked = {"site": "decoder.resid_pre", "axes": "layer", "stream": "audio", "skip_bad": True}
    asked |= {"unit": 8, "batch": 1}
    process = psutil.Process()
    imported, header_s = process.memory_info().rss, seconds_of_a_header()
    study, took = timed(lambda: studies.Study(table, out=out, **asked))
    assert took / 57_602 < 15 * header_s  # three are opened, and the rest is reading and writing
    assert len(study.skipped) == 2 and "line 57604: no audio file at" in study.skipped[1]
    store = study.store
    store.lay_out(LAYOUT)
    before = process.memory_info().rss

    def commit() -> None:
        for unit in range(400):
            store.commit(unit, truth(unit, 8), np.full(8, DONE))

    assert timed(commit)[1] / 400 < 0.015
    assert process.memory_info().rss - before < 50e6  # no more after 3,200 items
    done, took = timed(Store.open(out).done)
    assert took < 1 and len(done) == 400 and len(store.left()) == 7201 - 400
    status, took = timed(lambda: status_of(store))
    assert took < 1 and status.done_items == 3200
    plan, took = timed(lambda: study.explain(workers=64))
    assert plan.items == 57_602 and plan.sampled == 16 and plan.units == 7201
    assert took / 57_602 < 5 * header_s
    with pytest.raises(studies.StudyError, match="unit was 8 and is 16"):
        Store.create(out, replace(study.spec, unit=16), [])
    assert process.memory_info().rss - imported < 250e6


def seconds_of_a_header() -> float:
    """The yardstick: CPU seconds that soundfile takes for the header of a clip."""
    clip = demo_items()[0].audio
    return timed(lambda: [soundfile.info(clip) for _ in range(2000)])[1] / 2000


def timed(act: Callable[[], Any]) -> tuple[Any, float]:
    """What something gives, and the seconds of CPU that it took."""
    start = time.process_time()
    return act(), time.process_time() - start
