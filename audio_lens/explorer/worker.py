"""One thread that has the model: what is asked runs at once, long work in steps in between."""

from __future__ import annotations

import functools
import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from audio_lens.errors import AudioLensError

Event = dict[str, Any]
log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """Work that gives events, step by step.

    Attributes:
        key: work of the same key supersedes it; None for work that nothing supersedes.
        reply: takes every event, and None at the end; called in the worker's thread.
        is_urgent: whether it goes before work that is not.
    """

    steps: Iterator[Event]
    reply: Callable[[Event | None], None]
    key: Hashable = None
    is_urgent: bool = True
    is_cancelled: bool = False


class Worker:
    """Runs jobs in one thread, so that one of them has the model at a time.

    An urgent job runs to its end; of the others each does a step in turn while none is urgent.
    """

    def __init__(self) -> None:
        self._urgent: deque[Job] = deque()
        self._others: deque[Job] = deque()
        self._there = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="explorer", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Have a job done; one of the same key that is under way ends."""
        with self._there:
            if job.key is not None:
                self._cancel(lambda key: key == job.key)
            (self._urgent if job.is_urgent else self._others).append(job)
            self._there.notify()

    def cancel(self, wanted: Callable[[Any], bool]) -> None:
        """End jobs by their keys."""
        with self._there:
            self._cancel(wanted)

    def _cancel(self, wanted: Callable[[Any], bool]) -> None:
        for job in (*self._urgent, *self._others):
            if job.key is not None and wanted(job.key):
                job.is_cancelled = True

    def _work(self) -> None:
        while True:
            with self._there:
                self._there.wait_for(lambda: self._urgent or self._others)
                queue = self._urgent or self._others
                job = queue[0]
            goes_on = _step(job)
            with self._there:
                queue.remove(job)
                if goes_on:
                    (queue.appendleft if job.is_urgent else queue.append)(job)


def _step(job: Job) -> bool:
    """Do a step; whether there may be more."""
    try:
        event = {"event": "superseded"} if job.is_cancelled else next(job.steps, None)
    except AudioLensError as error:
        event = {"event": "error", "message": " ".join(str(error).split())}
    except Exception as error:
        log.exception("the explorer failed")
        event = {"event": "error", "message": f"{type(error).__name__}: {error}"}
    if event is not None:
        _reply(job, event)
    if event is None or event["event"] in ("superseded", "error"):
        _end(job)
        return False
    return True


def _end(job: Job) -> None:
    close = getattr(job.steps, "close", None)
    if close is not None:
        close()
    _reply(job, None)


def _reply(job: Job, event: Event | None) -> None:
    """Tell whoever asked; where nobody is there any more, the job ends."""
    try:
        job.reply(event)
    except Exception:
        log.debug("nobody takes %s any more", job.key, exc_info=True)
        job.is_cancelled = True


@functools.cache
def shared_worker() -> Worker:
    """The worker of this process."""
    return Worker()
