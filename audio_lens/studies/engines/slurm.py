"""Workers as tasks of a Slurm array, submitted by submitit."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from audio_lens.arguments import number, whole
from audio_lens.errors import ExtraError
from audio_lens.progress import track
from audio_lens.studies.errors import StudyError
from audio_lens.studies.store import Store
from audio_lens.studies.worker import Worker

MOST_TASKS = 1000  # of an array, where a site has not raised Slurm's own bound
LOOK_EVERY_S = 10.0
SUBMITTED = "slurm.json"
PER_WORKER = 2  # tasks, so that one that ends early takes another


@dataclass(frozen=True)
class Slurm:
    """Submits a study as a Slurm array. Once its tasks have ended, the same call submits only what
    is not done.

    Attributes:
        workers: tasks that run at a time.
        gpus, cpus: of each.
        hours: that a task may take; one that is stopped is queued again and goes on, three times
            at most where its time was up, however often where another job took its place.
        partition: of the cluster.
        wait: stay until all is done, or no task is left; else return once it is submitted.
        folder: for submitit's logs, which all nodes see; None is beside the study.
        options: further ones of ``submitit.AutoExecutor.update_parameters``.
        cluster: of submitit: "slurm", or "local" and "debug" for trials.
    """

    workers: int = 2
    gpus: int = 0
    cpus: int = 1
    hours: float | int = 4.0
    partition: str | None = None
    wait: bool = False
    folder: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    cluster: str = "slurm"

    def __post_init__(self) -> None:
        whole("workers", self.workers, least=1)
        number("hours", self.hours, above=0)  # Slurm takes none as no limit

    def run(self, out: str, units: Sequence[int], progress: bool | None = None) -> None:
        """Submit tasks for units.

        Raises:
            StudyError: an object store without ``folder``; tasks of this study that are in the
                queue already; or (waiting) tasks that ended with units undone.
            ExtraError: without submitit.
        """
        submitit = _need_submitit()
        if self.folder is None and "://" in out:
            raise StudyError("name a folder= for submitit's logs, which all nodes see")
        store = Store.open(out)
        if self.cluster == "slurm":
            _check_queue(store)
        executor = submitit.AutoExecutor(self.folder or f"{out}/slurm/%j", cluster=self.cluster)
        executor.update_parameters(**self._parameters())
        jobs = executor.map_array(
            Task(), *zip(*((out, x) for x in self._shares(units)), strict=True)
        )
        store.place.write(SUBMITTED, json.dumps([job.job_id for job in jobs]).encode())
        if self.wait:
            is_left = functools.partial(_are_left, jobs, self.cluster == "slurm")
            _wait(store, units, is_left, jobs[0].paths.folder, progress)

    def _shares(self, units: Sequence[int]) -> list[list[int]]:
        """Units of every task; of several machines more tasks than run at a time."""
        tasks = min(MOST_TASKS, self.workers * (PER_WORKER if self.cluster == "slurm" else 1))
        size = -(-len(units) // tasks)
        return [list(units[i : i + size]) for i in range(0, len(units), size)]

    def _parameters(self) -> dict[str, Any]:
        given: dict[str, Any] = {
            "timeout_min": math.ceil(60 * self.hours),
            "cpus_per_task": self.cpus,
        }
        given |= {"gpus_per_node": self.gpus} if self.gpus else {}
        if self.cluster == "slurm":
            given |= {"slurm_array_parallelism": self.workers}
            given |= {} if self.partition is None else {"slurm_partition": self.partition}
        return given | dict(self.options)


class Task:
    """What a task of the array does; stopped in time, it is queued again with the same units."""

    def __call__(self, out: str, units: Sequence[int]) -> int:
        """Run units that are not done; how many were."""
        return len(Worker(out).run(units))

    def checkpoint(self, out: str, units: Sequence[int]) -> Any:
        """What submitit queues when the task is stopped: the store knows what is done."""
        return _need_submitit().helpers.DelayedSubmission(Task(), out, units)


def _check_queue(store: Store) -> None:
    """Raise where tasks of a study wait or run: others would compute the same units."""
    held = store.place.read(SUBMITTED)
    if held is not None and (queued := _queued(json.loads(held))):
        raise StudyError(
            f"tasks of this study are in the queue already ({', '.join(queued[:3])}): wait for "
            "them, or take them away with scancel, and run the study again"
        )


def _queued(jobs: Sequence[str]) -> list[str]:
    """Which tasks Slurm still has, waiting or running."""
    arrays = ",".join(dict.fromkeys(job.partition("_")[0] for job in jobs))
    asked = ["squeue", "--noheader", "--format=%i", f"--jobs={arrays}"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise StudyError("there is no Slurm here: no command squeue is found") from error
    if told.returncode and "Invalid job id" not in told.stderr:
        raise StudyError(f"Slurm does not tell its queue: {told.stderr.strip()}")
    return told.stdout.split()


def _are_left(jobs: Sequence[Any], is_slurm: bool) -> bool:
    """Whether any task waits or runs; a killed one's result never comes, so nobody waits for it."""
    if is_slurm:
        return bool(_queued([job.job_id for job in jobs]))
    return not all(job.done() for job in jobs)


def _wait(
    store: Store,
    units: Sequence[int],
    is_left: Callable[[], bool],
    logs: Path,
    progress: bool | None,
) -> None:
    """Until the store has all units, or no task is left."""
    wanted, known = set(units), 0
    with track("study", len(wanted), "units", show=progress) as advance:
        while True:
            goes_on = is_left()  # before looking at what is done: tasks may end in between
            done = len(wanted & store.done())
            advance(done - known, done)
            known = done
            if done == len(wanted):
                return
            if not goes_on:
                raise StudyError(
                    f"no task is left and {len(wanted) - known} units are not done: see the logs "
                    f"in {logs}, and run the study again to submit what is left"
                )
            time.sleep(LOOK_EVERY_S)


def _need_submitit() -> Any:
    try:
        import submitit
        import submitit.helpers
    except ImportError as error:
        raise ExtraError("this engine needs submitit: pip install 'audio_lens[slurm]'") from error
    return submitit
