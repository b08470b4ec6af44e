"""Workers as actors of Ray: on one machine with several GPUs, on many nodes, on Kubernetes."""

from __future__ import annotations

import collections
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from audio_lens.errors import ExtraError
from audio_lens.progress import track
from audio_lens.studies.engines.engine import blocks
from audio_lens.studies.errors import StudyError
from audio_lens.studies.store import Store
from audio_lens.studies.worker import Worker

PATIENCE_S = 300.0  # with a cluster that gives no room to the first worker
LOOK_EVERY_S = 5.0


@dataclass(frozen=True)
class Ray:
    """Runs a study on Ray. The cluster is that of RAY_ADDRESS, or else this machine.

    A worker that dies gives its units back; another one is hired where there is room, and nobody
    waits for it.

    Attributes:
        workers: how many.
        gpus, cpus: of each.
        memory_gb: that Ray sets aside for each; None sets nothing aside.
        address: of the cluster, in place of RAY_ADDRESS.
        most_deaths: of workers, before the study stops.
        options: further ones of ``ray.init``.
    """

    workers: int = 2
    gpus: float | int = 0
    cpus: float | int = 1
    memory_gb: float | int | None = None
    address: str | None = None
    most_deaths: int = 20
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(self, out: str, units: Sequence[int], progress: bool | None = None) -> None:
        """Run units; those of workers that died are run by others.

        Raises:
            StudyError: no room for a worker in five minutes, or too many that died.
            ExtraError: without Ray.
        """
        ray = _need_ray()
        if not ray.is_initialized():
            quiet = {"log_to_driver": False, "include_dashboard": False}
            ray.init(address=self.address, **{**quiet, **self.options})
        store = Store.open(out)
        count = sum(len(store.rows(unit)) for unit in units)
        with track("study", count, "items", show=progress) as advance:
            _Shift(ray, self, out, blocks(units, self.workers), advance).work()


class _Shift:
    """Actors that take blocks of units until none is left."""

    def __init__(self, ray: Any, engine: Ray, out: str, queue: list[list[int]], advance: Any):
        self.ray, self.engine, self.out, self.advance = ray, engine, out, advance
        self.queue = collections.deque(queue)
        self.actor = ray.remote(Worker).options(
            num_cpus=engine.cpus,
            num_gpus=engine.gpus,
            max_restarts=0,
            max_task_retries=0,
            **({} if engine.memory_gb is None else {"memory": int(engine.memory_gb * 1e9)}),
        )
        self.running: dict[Any, tuple[Any, list[int] | None]] = {}  # None: not ready yet
        self.deaths = self.done = 0
        self.ready_at: float | None = None

    def work(self) -> None:
        """Until no block is left that anybody works at."""
        started = time.monotonic()
        for _ in range(min(self.engine.workers, len(self.queue))):
            self._hire()
        try:
            while self._is_at_work:
                ready, _ = self.ray.wait(list(self.running), num_returns=1, timeout=LOOK_EVERY_S)
                for ref in ready:
                    self._back(ref)
                if self.ready_at is None and time.monotonic() - started > PATIENCE_S:
                    raise StudyError(
                        f"Ray gave no room to any worker in {PATIENCE_S:.0f} s: each asks for "
                        f"{self.engine.cpus} CPUs and {self.engine.gpus} GPUs, and there are "
                        f"{self.ray.available_resources()}"
                    )
        finally:
            for actor, _ in self.running.values():
                self.ray.kill(actor)

    @property
    def _is_at_work(self) -> bool:
        busy = any(block is not None for _, block in self.running.values())
        return bool(self.running) and (busy or bool(self.queue))

    def _hire(self) -> None:
        actor = self.actor.remote(self.out)
        self.running[actor.process.remote()] = (actor, None)

    def _back(self, ref: Any) -> None:
        """A worker is ready, or has done its block, or has died."""
        actor, block = self.running.pop(ref)
        try:
            told = self.ray.get(ref)
        except self.ray.exceptions.RayActorError as error:
            self._bury(block, error)
            return
        self.ready_at = time.monotonic()
        if block is not None:
            items = sum(one.items for one in told)
            self.done += items
            self.advance(items, self.done)
        if self.queue:
            block = self.queue.popleft()
            self.running[actor.run.remote(block)] = (actor, block)
        else:
            self.ray.kill(actor)

    def _bury(self, block: list[int] | None, error: Exception) -> None:
        """Put a dead worker's block back and hire another; a worker that never began tells why."""
        if isinstance(error, self.ray.exceptions.ActorDiedError) and block is None:
            cause = getattr(error, "cause", None) or error
            if "Error" in str(error) and "creation task" in str(error):
                raise StudyError(f"a worker cannot begin: {cause}") from error
        self.deaths += 1
        if self.deaths > self.engine.most_deaths:
            raise StudyError(
                f"{self.deaths} workers died. What killed them is in Ray's logs; items that killed "
                f"one are named by the study's status"
            ) from error
        if block is not None:
            self.queue.append(block)
        self._hire()


def _need_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ExtraError("this engine needs Ray: pip install 'audio_lens[ray]'") from error
    return ray
