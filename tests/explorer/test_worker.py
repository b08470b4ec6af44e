"""The worker: one thing at a time, what is urgent first, what is superseded ends."""

from __future__ import annotations

import queue
import threading

import pytest

from audio_lens import InputError
from audio_lens.explorer.worker import Job, Worker


@pytest.fixture
def worker():
    return Worker()


def events(worker, steps, **options):
    """The events of a job, once it is done."""
    found = queue.Queue()
    worker.submit(Job(iter(steps), found.put, **options))
    return list(iter(lambda: found.get(timeout=10), None))


def test_events_come_in_order_and_end(worker):
    steps = [{"event": str(i)} for i in range(3)]
    assert events(worker, steps) == steps


def test_errors_are_told_and_the_worker_goes_on(worker):
    def failing():
        yield {"event": "first"}
        raise InputError("what is wrong")

    assert events(worker, failing())[-1] == {"event": "error", "message": "what is wrong"}
    assert events(worker, [{"event": "next"}]) == [{"event": "next"}]


def test_what_is_urgent_runs_between_steps_and_the_superseded_ends(worker):
    begun, go_on, order, ends = threading.Event(), threading.Event(), [], queue.Queue()

    def slow(name):
        for step in range(3):
            begun.set()
            go_on.wait(10)
            order.append(f"{name} {step}")
            yield {"event": name}

    replies = {"old": [], "new": []}

    def reply(name):
        return lambda event: ends.put(name) if event is None else replies[name].append(event)

    worker.submit(Job(slow("old"), reply("old"), key="map", is_urgent=False))
    assert begun.wait(10)
    worker.submit(Job(slow("new"), reply("new"), key="map", is_urgent=False))
    worker.submit(Job(iter([{"event": "edit"}]), lambda event: order.append("edit")))
    go_on.set()
    assert {ends.get(timeout=10), ends.get(timeout=10)} == {"old", "new"}
    assert order == ["old 0", "edit", "edit", "new 0", "new 1", "new 2"]
    assert [event["event"] for event in replies["old"]] == ["old", "superseded"]
