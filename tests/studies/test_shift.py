"""How workers share units out on Ray, by a Ray that does what the test says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from audio_lens import studies
from audio_lens.studies.engines.ray import _Shift
from audio_lens.studies.places import Folder
from audio_lens.studies.spec import Spec
from audio_lens.studies.store import Store


class Gone(Exception):
    """What is raised for a worker that died."""


class Trial:
    """A Ray of actors by number, whose calls come back in the order that is told.

    Args:
        told: a letter and the number of an actor: "b" it has begun, "r" it has run its block,
            "d" it is dead.
    """

    exceptions = SimpleNamespace(RayError=Gone, RayTaskError=type("Task", (Exception,), {}))

    def __init__(self, told: str):
        self.told = iter(told.split())
        self.hired = itertools.count()
        self.killed: list[int] = []
        self.ran: list[tuple[int, list[int]]] = []

    def remote(self, _: type) -> Trial:
        return self

    def options(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda out: self._actor(next(self.hired)))

    def _actor(self, number: int) -> SimpleNamespace:
        def run(block: Sequence[int]) -> tuple[str, int]:
            self.ran.append((number, list(block)))
            return ("r", number)

        return SimpleNamespace(
            number=number,
            is_here=SimpleNamespace(remote=lambda: ("h", number)),
            begin=SimpleNamespace(remote=lambda: ("b", number)),
            run=SimpleNamespace(remote=run),
        )

    def wait(self, refs: Sequence[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        if not refs or refs[0][0] == "h":
            return list(refs), []
        told = next(self.told)
        self.is_dead = told[0] == "d"
        (ref,) = [x for x in refs if x[1] == int(told[1]) and told[0] in ("d", x[0])]
        return [ref], []

    def get(self, ref: tuple[str, int]) -> list[Any]:
        if self.is_dead:
            raise Gone
        return [SimpleNamespace(items=1)] if ref[0] == "r" else []

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.number)


@pytest.fixture
def worked(tmp_path: Path) -> Callable[..., Trial]:
    """What becomes of so many blocks of one unit."""
    store = Store(Folder(tmp_path), Spec("", "digest", "embedded", "patching.sweep", unit=1))

    def work(told: str, units: int, workers: int = 2, most_deaths: int = 20) -> Trial:
        ray = Trial(told)
        engine = studies.Ray(workers=workers, most_deaths=most_deaths)
        _Shift(ray, engine, store, [[unit] for unit in range(units)], lambda *_: None).work()
        assert next(ray.told, None) is None
        return ray

    return work


def test_one_that_is_free_takes_the_last_block_of_a_dead_one(worked):
    ray = worked("b0 b1 r0 d1 r0", units=2)
    assert ray.ran == [(0, [0]), (1, [1]), (0, [1])]
    assert next(ray.hired) == 2 and set(ray.killed) == {0, 1}  # nobody else was hired


def test_no_more_than_one_waits_for_a_death(worked):
    ray = worked("b0 b1 b2 r0 r1 r2", units=3, workers=3)
    assert ray.killed == [1, 2, 0] or ray.killed == [1, 0, 2]


def test_another_is_hired_where_blocks_are_left(worked):
    ray = worked("b0 d1 b2 r2 r2 r0", units=3)
    assert ray.ran == [(0, [0]), (2, [1]), (2, [2])]
    assert next(ray.hired) == 3


def test_nobody_waits_for_one_that_has_no_room(worked):
    ray = worked("b0 b1 d1 r0 r0 r0", units=3)
    assert ray.ran == [(0, [0]), (1, [1]), (0, [2]), (0, [1])]
    assert set(ray.killed) == {0, 1, 2}


def test_a_free_one_that_died_unseen_is_replaced(worked):
    ray = worked("b0 b1 r0 d1 d0 b2 r2", units=2)
    assert ray.ran == [(0, [0]), (1, [1]), (0, [1]), (2, [1])]


def test_workers_that_all_die_end_the_study(worked):
    with pytest.raises(studies.StudyError, match="2 workers died"):
        worked("d0 d1", units=2, most_deaths=1)
