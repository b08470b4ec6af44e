"""Workers as tasks of a Slurm array, submitted by submitit."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from audio_lens.errors import ExtraError
from audio_lens.progress import track
from audio_lens.studies.errors import StudyError
from audio_lens.studies.store import Store
from audio_lens.studies.worker import Worker

MOST_TASKS = 1000  # of an array, where a site has not raised Slurm's own bound
LOOK_EVERY_S = 10.0
PER_WORKER = 2  # tasks, so that one that ends early takes another


@dataclass(frozen=True)
class Slurm:
    """Submits a study as a Slurm array. The same call later submits only what is not done.

    Attributes:
        workers: tasks that run at a time.
        gpus, cpus: of each.
        hours: that a task may take; one that is stopped is queued again and goes on.
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

    def run(self, out: str, units: Sequence[int], progress: bool | None = None) -> None:
        """Submit tasks for units.

        Raises:
            StudyError: an object store without ``folder``, or (waiting) tasks that ended with
                units undone.
            ExtraError: without submitit.
        """
        submitit = _need_submitit()
        if self.folder is None and "://" in out:
            raise StudyError("name a folder= for submitit's logs, which all nodes see")
        executor = submitit.AutoExecutor(
            folder=self.folder or f"{out}/slurm/%j",
            cluster=self.cluster,
            **({"slurm_python": sys.executable} if self.cluster == "slurm" else {}),
        )
        executor.update_parameters(**self._parameters())
        tasks = _shares(units, min(MOST_TASKS, PER_WORKER * self.workers))
        jobs = executor.map_array(Task(), [out] * len(tasks), tasks)
        if self.wait:
            _wait(out, units, jobs, progress)

    def _parameters(self) -> dict[str, Any]:
        given: dict[str, Any] = {
            "timeout_min": round(60 * self.hours),
            "cpus_per_task": self.cpus,
            "gpus_per_node": self.gpus,
        }
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


def _shares(units: Sequence[int], tasks: int) -> list[list[int]]:
    size = max(1, -(-len(units) // tasks))
    return [list(units[i : i + size]) for i in range(0, len(units), size)]


def _wait(out: str, units: Sequence[int], jobs: Sequence[Any], progress: bool | None) -> None:
    """Until the store has all units, or no task is left: a killed task's result never comes."""
    store, wanted, known = Store.open(out), set(units), 0
    with track("study", len(wanted), "units", show=progress) as advance:
        while True:
            done = len(wanted & store.done())
            advance(done - known, done)
            known = done
            if done == len(wanted):
                return
            if all(job.done() for job in jobs) and len(wanted & store.done()) == known:
                raise StudyError(
                    f"no task is left and {len(wanted) - known} units are not done: see the logs "
                    f"in {jobs[0].paths.folder}, and run the study again to submit what is left"
                )
            time.sleep(LOOK_EVERY_S)


def _need_submitit() -> Any:
    try:
        import submitit
        import submitit.helpers
    except ImportError as error:
        raise ExtraError("this engine needs submitit: pip install 'audio_lens[slurm]'") from error
    return submitit
