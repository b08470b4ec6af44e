"""Studies on a real Ray: equal to one process bit for bit, whoever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from study_tools import (
    PATH,
    by_case,
    kill_one,
    meanwhile,
    numbers,
    same,
    tried_again,
    workers,
)

from audio_lens import Items, studies

pytest.importorskip("zarr")
ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
SMALL = {"object_store_memory": 100_000_000}
TWO = studies.Ray(workers=2, options={"num_cpus": 2, **SMALL})


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers import what tests define."""
    monkeypatch.setenv("PYTHONPATH", PATH)


@pytest.fixture(scope="module", autouse=True)
def ended():
    yield
    ray.shutdown()


def test_a_killed_actor_costs_a_unit_at_most(table, here, tmp_path):
    study = by_case(table, tmp_path / "out", "slow")
    with meanwhile(study, 4, lambda: kill_one(study)) as happened:
        assert study.run(TWO).is_done
    assert happened and happened[0] < 16
    assert same(study, here) and tried_again(study) <= 1
    assert len(workers(study)) >= 2


def test_two_actors_share_the_work(table, here, tmp_path):
    study = by_case(table, tmp_path / "out", "slow")
    assert study.run(TWO).is_done and same(study, here)
    shares = workers(study)
    assert len(shares) == 2 and min(shares.values()) >= 3


def test_items_that_kill_and_items_that_cannot_be_used(table, here, tmp_path):
    items = list(Items.from_table(table))
    deadly, long, lost = 3, 6, 9
    items[deadly] = items[deadly].replaced(labels=dict(items[deadly].labels) | {"deadly": True})
    items[long] = items[long].replaced(answer="three four")
    clip = tmp_path / "lost.wav"
    clip.write_bytes(Path(items[lost].audio).read_bytes())
    items[lost] = items[lost].replaced(audio=clip)
    poisoned = Items(items).to_table(tmp_path / "items.jsonl")
    study = by_case(poisoned, tmp_path / "out", "deadly", unit=2)
    clip.unlink()
    status = study.run(TWO)
    assert status.is_done and status.n_failed == 3
    found = studies.load(study.out)
    names = {row: items[row].id for row in (deadly, long, lost)}
    assert set(found.failed) == set(names.values())
    assert "killed its worker" in found.failed[names[deadly]]
    assert "three four" in found.failed[names[long]]
    assert "lost.wav" in found.failed[names[lost]]
    statuses = dict(zip([x.id for x in study.store.items], study.store.statuses(), strict=True))
    assert [statuses[names[row]] for row in (deadly, long, lost)] == [3, 2, 2]
    whole = studies.load(here.out)
    for item in found.items:
        assert found.item(item.id).values.equal(whole.item(item.id).values)


@pytest.mark.parametrize(
    "method, options",
    [("grounding.stream_share", {}), ("knockout.knock_out", {"layers": [3, 4]})],
)
def test_methods_on_two_actors_are_those_of_one_process(table, tmp_path, method, options):
    few = Items.from_table(table)[:4].to_table(tmp_path / "few.jsonl")
    own = {"method": method, "unit": 2, **options}
    alone, shared = (studies.Study(few, out=tmp_path / name, **own) for name in ("one", "two"))
    alone.run()
    shared.run(TWO)
    assert len(workers(shared)) == 2 and same(alone, shared)
    mine, its = (studies.load(study.out).result() for study in (alone, shared))
    assert mine.values.equal(its.values) and mine.estimate.equal(its.estimate)


def test_a_killed_driver_leaves_nobody_and_one_worker_goes_on(table, here, tmp_path):
    ray.shutdown()
    out = tmp_path / "out"
    study = by_case(table, out, "slow")
    code = (
        "from audio_lens import studies; "
        f"studies.Study.open({str(out)!r}).run(studies.Ray(workers=2, options="
        f"{ {'num_cpus': 2, **SMALL} }))"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    limit = time.monotonic() + 400
    while len(study.store.done()) < 6 and time.monotonic() < limit:
        time.sleep(0.1)
    pids, done = list(workers(study)), study.store.done()
    driver.kill()
    driver.wait()
    assert 6 <= len(done) < 16
    limit = time.monotonic() + 60
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < limit:
        time.sleep(0.2)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    before = {unit: study.store.place.read(f"units/{unit:07d}.json") for unit in done}
    again = by_case(table, out, "slow")
    assert again.run(studies.Ray(workers=1, options={"num_cpus": 2, **SMALL})).is_done
    assert same(again, here) and tried_again(again) <= 2
    after = {unit: study.store.place.read(f"units/{unit:07d}.json") for unit in done}
    assert before == after  # nothing was computed twice
    ray.shutdown()


def test_a_node_that_dies_is_done_without(table, here, tmp_path):
    ray.shutdown()
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, **SMALL}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1, **SMALL) for _ in range(2)]
    study = by_case(table, tmp_path / "out", "slow")

    def kill() -> None:
        for held in nodes[-1].all_processes["raylet"]:
            raylet = psutil.Process(held.process.pid)
            for process in [raylet, *raylet.children(recursive=True)]:
                if process.is_running():
                    os.kill(process.pid, signal.SIGKILL)

    try:
        with meanwhile(study, 4, kill) as happened:
            assert study.run(studies.Ray(workers=2, address=cluster.address)).is_done
        assert happened and happened[0] < 14  # each had more to do
        assert same(study, here) and tried_again(study) <= 1
        assert len(workers(study)) == 2  # nobody came in place of the one that was killed
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_cluster_without_room_says_so(table, tmp_path, monkeypatch):
    from audio_lens.studies.engines import ray as engine

    ray.shutdown()
    monkeypatch.setattr(engine, "PATIENCE_S", 3.0)
    monkeypatch.setattr(engine, "LOOK_EVERY_S", 1.0)
    study = by_case(table, tmp_path / "out")
    with pytest.raises(studies.StudyError, match=r"no room to any worker.*64 CPUs"):
        study.run(studies.Ray(workers=1, cpus=64, options={"num_cpus": 1, **SMALL}))


def test_what_a_worker_raises_is_told_as_it_is(table, tmp_path):
    study = by_case(table, tmp_path / "out", loader="studied:embedded")
    study.store.place.write("model.json", b'{"weights": "of another", "logits": []}')
    with pytest.raises(studies.StudyError, match="other weights"):
        study.run(TWO)
    assert not numbers_are_there(study)


def numbers_are_there(study: studies.Study) -> bool:
    try:
        return bool(numbers(study))
    except studies.StudyError:
        return False
