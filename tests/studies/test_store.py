"""The store of a study: several writers, one of them killed; and as many items as a set has."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from study_tools import PATH

from audio_lens import Items, studies
from audio_lens.items import demo_items
from audio_lens.studies.spec import Spec
from audio_lens.studies.status import status_of
from audio_lens.studies.store import DONE, Column, Layout, Store

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
    store = Store.create(tmp_path / "out", spec(2), list(many(5)))
    store.lay_out(LAYOUT)
    assert len(store) == 3 and store.left() == [0, 1, 2] and list(store.rows(2)) == [4]
    store._group["value"][0:2] = 1.0  # numbers without their status are not done
    assert store.left() == [0, 1, 2]
    store.commit(2, truth(2, 1), [DONE])
    assert store.done() == {2} and store.statuses().tolist() == [0, 0, 0, 0, 1]
    assert np.array_equal(store._group["value"][4], truth(2, 1)["value"][0])
    store.forget([2])
    assert store.left() == [0, 1, 2]
    again = Store.create(tmp_path / "out", spec(2), list(many(5)))
    assert [item.id for item in again.items] == [item.id for item in store.items]


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(studies.StudyError, match="cannot be read"):
        Store.create(tmp_path / "file" / "out", spec(2), list(many(2)))


@pytest.mark.slow
def test_two_writers_of_whom_one_is_killed_lose_nothing(tmp_path):
    out = tmp_path / "out"
    store = Store.create(out, spec(8), list(many(2500)))
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


@pytest.mark.slow
def test_a_set_of_5_760_items(tmp_path):
    table = many(5_760).to_table(tmp_path / "items.jsonl")
    process = psutil.Process()
    study = studies.Study(
        table,
        out=tmp_path / "out",
        site="decoder.resid_pre",
        axes="layer",
        stream="audio",
        unit=8,
        batch=1,
    )
    store = study.store
    store.lay_out(LAYOUT)
    before = process.memory_info().rss
    for unit in range(400):
        store.commit(unit, truth(unit, 8), np.full(8, DONE))
    assert process.memory_info().rss - before < 50e6  # no more after 3,200 items
    assert len(Store.open(study.out).left()) == 720 - 400
    assert status_of(store).done_items == 3200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4e6  # kilobytes
