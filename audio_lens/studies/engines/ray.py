"""Workers as actors of Ray: on one machine with several GPUs, on many nodes, on Kubernetes."""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from audio_lens.arguments import whole
from audio_lens.errors import AudioLensError, ExtraError
from audio_lens.progress import track
from audio_lens.studies.engines.engine import blocks
from audio_lens.studies.errors import StudyError
from audio_lens.studies.store import Store
from audio_lens.studies.worker import UnitReport, Worker

PATIENCE_S = 300.0  # with a cluster that gives no room to any worker
LOOK_EVERY_S = 5.0


@dataclass(frozen=True)
class Ray:
    """Runs a study on Ray. The cluster is that of RAY_ADDRESS, or else this machine.

    A worker that dies, or whose node does, gives its units back; another one is hired where there
    is room, and nobody waits for it. One that finds nothing left to do stays while others are at
    work, and takes the units of the next that dies.

    Attributes:
        workers: how many.
        gpus, cpus: of each.
        memory_gb: that Ray sets aside for each; None sets nothing aside.
        address: of the cluster, in place of RAY_ADDRESS.
        most_deaths: of workers, before the study stops. An item that kills its process takes four
            of them before it is left out.
        options: further ones of ``ray.init``.
    """

    workers: int = 2
    gpus: float | int = 0
    cpus: float | int = 1
    memory_gb: float | int | None = None
    address: str | None = None
    most_deaths: int = 20
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole("workers", self.workers, least=1)
        whole("most_deaths", self.most_deaths, least=0)

    def run(self, out: str, units: Sequence[int], progress: bool | None = None) -> None:
        """Run units; those of workers that died are run by others.

        Raises:
            StudyError: no room for a worker in five minutes, or too many that died.
            AudioLensError: what a worker raised.
            ExtraError: without Ray.
        """
        ray = _need_ray()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent home unasked
        if not ray.is_initialized():
            address = self.address or os.environ.get("RAY_ADDRESS") or "local"
            own = {"include_dashboard": False} if address == "local" else {}
            ray.init(address, **{"log_to_driver": False, **own, **self.options})
        store = Store.open(out)
        count = sum(len(store.rows(unit)) for unit in units)
        with track("study", count, "items", show=progress) as advance:
            _Shift(ray, self, store, blocks(units, self.workers), advance).work()


class Hand:
    """A worker as an actor. It is there before it loads a model, so that a cluster without room
    can be told from weights that take their time.
    """

    def __init__(self, out: str):
        self.out = out

    def is_here(self) -> bool:
        """Answered as soon as there is room."""
        return True

    def begin(self) -> None:
        """Load the model."""
        self.worker = Worker(self.out)

    def run(self, units: Sequence[int]) -> list[UnitReport]:
        """Run units, as `Worker.run`."""
        return self.worker.run(units)


@dataclass
class _Hired:
    """An actor, and what it is at.

    Attributes:
        actor: of Ray.
        here: comes back once the cluster had room for it.
        block: of units; None while it begins.
    """

    actor: Any
    here: Any
    block: list[int] | None = None


class _Shift:
    """Actors that take blocks of units until none is left."""

    def __init__(self, ray: Any, engine: Ray, store: Store, queue: list[list[int]], advance: Any):
        self.ray, self.engine, self.store, self.advance = ray, engine, store, advance
        self.queue = collections.deque(queue)
        self.actor = ray.remote(Hand).options(
            num_cpus=engine.cpus,
            num_gpus=engine.gpus,
            max_restarts=0,
            max_task_retries=0,
            **({} if engine.memory_gb is None else {"memory": int(engine.memory_gb * 1e9)}),
        )
        self.running: dict[Any, _Hired] = {}
        self.spare: _Hired | None = None  # one that has nothing to do, while others have
        self.deaths = self.done = 0
        self.heard = time.monotonic()

    def work(self) -> None:
        """Until no block is left that anybody works at."""
        for _ in range(min(self.engine.workers, len(self.queue))):
            self._hire()
        try:
            while self._is_at_work:
                ready, _ = self.ray.wait(list(self.running), num_returns=1, timeout=LOOK_EVERY_S)
                for ref in ready:
                    self._back(ref)
                self._check_room()
        finally:
            self._dismiss_spare()
            for hired in self.running.values():
                self._let_go(hired)

    @property
    def _is_busy(self) -> bool:
        return any(hired.block is not None for hired in self.running.values())

    @property
    def _is_at_work(self) -> bool:
        return bool(self.running) and (self._is_busy or bool(self.queue))

    def _check_room(self) -> None:
        """Raise where no worker is there, and none comes."""
        if self._is_busy or self.ray.wait([x.here for x in self.running.values()], timeout=0)[0]:
            self.heard = time.monotonic()
        elif time.monotonic() - self.heard > PATIENCE_S:
            raise StudyError(
                f"Ray gave no room to any worker in {PATIENCE_S:.0f} s: each asks for "
                f"{self.engine.cpus} CPUs and {self.engine.gpus} GPUs, and there are "
                f"{self.ray.available_resources()}"
            )

    def _hire(self) -> None:
        actor = self.actor.remote(self.store.place.url)
        here = actor.is_here.remote()
        self.running[actor.begin.remote()] = _Hired(actor, here)

    def _back(self, ref: Any) -> None:
        """A worker has begun, or has done its block, or has died."""
        hired = self.running.pop(ref)
        try:
            told = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, AudioLensError) else error) from None
        except self.ray.exceptions.RayError as error:
            self._bury(hired, error)
            return
        if hired.block is not None:
            items = sum(one.items for one in told)
            self.done += items
            self.advance(items, self.done)
        self._give_work(hired)

    def _give_work(self, hired: _Hired) -> None:
        """The next block; with none left one worker stays, and more than one are let go."""
        hired.block = None
        if self.queue:
            hired.block = self.queue.popleft()
            self.running[hired.actor.run.remote(hired.block)] = hired
        elif self.spare is None:
            self.spare = hired
        else:
            self.ray.kill(hired.actor)

    def _bury(self, hired: _Hired, error: Exception) -> None:
        """Put a dead worker's block back, for one who is free or another who is hired."""
        self.ray.kill(hired.actor)  # cut off it may live, and would hold its GPU
        self.deaths += 1
        if self.deaths > self.engine.most_deaths:
            raise StudyError(
                f"{self.deaths} workers died. What killed them is in Ray's logs; items that killed "
                f"one are named by the study's status"
            ) from error
        if hired.block is not None:
            self.queue.append(hired.block)
        spare, self.spare = self.spare, None
        if spare is not None:
            self._give_work(spare)
        elif self.queue:
            self._hire()

    def _dismiss_spare(self) -> None:
        if self.spare is not None:
            self.ray.kill(self.spare.actor)
            self.spare = None

    def _let_go(self, hired: _Hired) -> None:
        """Stop a worker; what it was at was tried without fault of its own."""
        self.ray.kill(hired.actor)
        done = self.store.done()
        for unit in hired.block or ():
            if unit not in done:
                self.store.give_back(unit)


def _need_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ExtraError("this engine needs Ray: pip install 'audio_lens[ray]'") from error
    return ray
