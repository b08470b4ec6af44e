"""What an engine is, and how units are shared out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

BLOCKS = 8  # for every worker: many more than workers, so that none waits long for the last


@runtime_checkable
class Engine(Protocol):
    """Brings workers to the units of a study; a further one is a class with this method."""

    def run(self, out: str, units: Sequence[int], progress: bool | None = None) -> None:
        """Run units of the study at a place.

        Args:
            out: the place; a `Worker` is made of it.
            units: which are not done.
            progress: as in `patching.sweep`.
        """


def blocks(units: Sequence[int], workers: int) -> list[list[int]]:
    """Units that a worker takes together, in order."""
    size = max(1, len(units) // (workers * BLOCKS))
    return [list(units[i : i + size]) for i in range(0, len(units), size)]
