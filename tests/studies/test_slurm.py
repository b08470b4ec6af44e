"""Studies as arrays of tasks: on a real Slurm of one node where there is one, and on none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from study_tools import PATH, all_items, by_case, kill_one, meanwhile, same, tried_again, workers

from audio_lens import studies
from audio_lens.studies import StudyError
from audio_lens.studies.engines import slurm

pytest.importorskip("zarr")
pytest.importorskip("submitit")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]
LOCAL = studies.Slurm(workers=2, cluster="local", wait=True, hours=0.5)
NEEDED = ("sbatch", "slurmctld", "slurmd", "munged")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return all_items(tmp_path_factory.mktemp("t"))


@pytest.fixture(scope="module")
def here(table: Path, tmp_path_factory: pytest.TempPathFactory) -> studies.Study:
    """The study in this process."""
    study = by_case(table, tmp_path_factory.mktemp("here") / "out")
    study.run()
    return study


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks import what tests define, and are looked at often."""
    monkeypatch.setenv("PYTHONPATH", PATH)
    monkeypatch.setattr(slurm, "LOOK_EVERY_S", 0.5)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Slurm of one node, which is this machine."""
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    if lacking or os.geteuid() != 0:
        pytest.skip(f"no Slurm to start: {', '.join(lacking) or 'not root'} (apt: slurm-wlm munge)")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    text = (Path(__file__).parent / "slurm.conf").read_text()
    told = {
        "HOST": socket.gethostname().partition(".")[0],
        "DIR": str(folder),
        "CPUS": str(os.cpu_count()),
        "MEMORY": str(int(psutil.virtual_memory().total / 1e6 * 0.5)),
    }
    for name, value in told.items():
        text = text.replace(name, value)
    conf = folder / "slurm.conf"
    conf.write_text(text)
    os.environ["SLURM_CONF"] = str(conf)
    shutil.copy(_munge_key(), folder / "munge.key")
    is_munge_here = Path("/run/munge/munge.socket.2").exists()
    if not is_munge_here:
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True)
    daemons = [
        subprocess.Popen(["slurmctld", "-D", "-f", str(conf)]),
        subprocess.Popen(["slurmd", "-D", "-f", str(conf)]),
    ]
    try:
        _wait_for_idle()
        yield
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
        if not is_munge_here:
            os.kill(int(Path("/run/munge/munged.pid").read_text()), signal.SIGTERM)
        os.environ.pop("SLURM_CONF")


def _munge_key() -> Path:
    key = Path("/etc/munge/munge.key")
    if not key.exists():
        subprocess.run(["mungekey", "--create"], check=True)
    return key


def _wait_for_idle() -> None:
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        told = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True)
        if told.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    pytest.fail(f"the node is {told.stdout.strip()} after a minute: {told.stderr}")


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


def test_an_array_of_slurm(node, table, here, tmp_path):
    study = by_case(table, tmp_path / "out", "slow")
    engine = studies.Slurm(workers=2, hours=0.5, options={"mem_gb": 2})
    study.run(engine)
    with pytest.raises(StudyError, match="in the queue already"):
        study.run(engine)
    _until(lambda: len(study.store.done()) >= 3)
    both = _running()
    kill_one(study)
    _until(lambda: len(both & _running()) < len(both))
    (other,) = both & _running()
    subprocess.run(["scancel", "-s", "USR2", other], check=True)
    submitted = json.loads(study.store.place.read("slurm.json"))
    _until(lambda: not slurm._queued(submitted))
    assert study.store.left()  # of the killed task
    assert study.run(replace(engine, wait=True)).is_done
    assert same(study, here) and tried_again(study) <= 2


def _running() -> set[str]:
    """Tasks that run."""
    asked = ["squeue", "-h", "-t", "R", "-o", "%i"]
    return set(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split())


def _until(happens) -> None:
    limit = time.monotonic() + 400
    while not happens():
        assert time.monotonic() < limit
        time.sleep(0.5)


def test_an_object_store_needs_a_folder_for_logs():
    with pytest.raises(StudyError, match="folder="):
        studies.Slurm().run("s3://bucket/study", [0])
