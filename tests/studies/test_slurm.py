"""Studies as tasks of submitit, on this machine in place of a Slurm."""

from __future__ import annotations

import os
import signal

import psutil
import pytest
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
    assert same(study, here) and tried_again(study) == 1


def test_an_object_store_needs_a_folder_for_logs():
    with pytest.raises(StudyError, match="folder="):
        studies.Slurm().run("s3://bucket/study", [0])
