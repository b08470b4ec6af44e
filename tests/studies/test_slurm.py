"""Studies as arrays of tasks: on a real Slurm of one node, and by submitit where there is none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest
from slurm_node import lacking, slurm_node, until
from study_tools import PATH, by_case, kill_one, meanwhile, same, tried_again, workers

from audio_lens import studies
from audio_lens.studies import StudyError
from audio_lens.studies.engines import slurm

pytest.importorskip("zarr")
pytest.importorskip("submitit")
pytestmark = pytest.mark.slow
LOCAL = studies.Slurm(workers=2, cluster="local", wait=True, hours=0.5)


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks import what tests define, and are looked at often."""
    monkeypatch.setenv("PYTHONPATH", PATH)
    monkeypatch.setattr(slurm, "LOOK_EVERY_S", 0.5)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Slurm of one node, which is this machine."""
    if why := lacking():
        pytest.skip(f"no Slurm to start: {why}")
    with slurm_node(tmp_path_factory.mktemp("slurm")):
        yield


def test_an_array_of_slurm(node, table, here, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "PER_WORKER", 1)  # two tasks of eight units
    study = by_case(table, tmp_path / "out", "slow")
    engine = studies.Slurm(workers=2, hours=0.5)
    study.run(engine)
    with pytest.raises(StudyError, match="in the queue already"):
        study.run(engine)
    until(lambda: len(workers(study)) == 2, 400)
    killed, other = workers(study)
    # scancel itself ends late: the task that it asks to stop is back in the queue before
    with subprocess.Popen(["scancel", "-s", "USR2", _task(other)]) as notice:
        os.kill(killed, signal.SIGKILL)
        submitted = json.loads(study.store.place.read("slurm.json"))
        until(lambda: not slurm._queued(submitted), 400)
        notice.terminate()
    left = study.store.left()
    assert 0 < len(left) <= 8  # what the killed task had
    before = workers(study)
    assert len(before) == 3  # both, and the one that was stopped and went on
    assert study.run(replace(engine, wait=True)).is_done
    assert same(study, here) and tried_again(study) <= 1
    assert sum(workers(study).values()) == sum(before.values()) + len(left)


def _task(pid: int) -> str:
    """The task of Slurm that a process is."""
    told = psutil.Process(pid).environ()
    return f"{told['SLURM_ARRAY_JOB_ID']}_{told['SLURM_ARRAY_TASK_ID']}"


def test_tasks_without_slurm(table, here, tmp_path):
    study = by_case(table, tmp_path / "out", "slow")

    def stop() -> None:
        os.kill(next(pid for pid in workers(study) if psutil.pid_exists(pid)), signal.SIGUSR2)

    with meanwhile(study, 3, stop) as happened:
        assert study.run(LOCAL).is_done
    assert happened and happened[0] < 16 and same(study, here)
    assert tried_again(study) == 0  # a task that is told to stop gives its unit back
    assert len(workers(study)) == 3  # two, and the one that went on


def test_a_killed_task_is_submitted_again(table, here, tmp_path):
    study = by_case(table, tmp_path / "out", "slow")
    with meanwhile(study, 3, lambda: kill_one(study)), pytest.raises(StudyError, match="not done"):
        study.run(LOCAL)
    left = study.store.left()
    assert 0 < len(left) < 8
    assert study.run(LOCAL).is_done
    assert same(study, here) and tried_again(study) <= 1


def test_an_object_store_needs_a_folder_for_logs():
    with pytest.raises(StudyError, match="folder="):
        studies.Slurm().run("s3://bucket/study", [0])
