"""What a method is: a way to run the cells of a task."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from benchmarks.peers.tasks import Cell, Task


class Method(ABC):
    """A way to run a task: baselines and caches first, then cells.

    Making the object wraps models and is not timed; `prepare` and `patch` are, apart.

    Attributes:
        label: what it is called in the table.
        package: what must be installed; empty for nothing beyond audio_lens's own dependencies.
        takes_every_cell: whether `patch` runs the whole sweep, end to end; `prepare` then runs
            one with a single cell.
        is_even: whether all cells cost it alike, so that a small sample tells their mean.
    """

    label: ClassVar[str]
    package: ClassVar[str] = ""
    takes_every_cell: ClassVar[bool] = False
    is_even: ClassVar[bool] = True

    def __init__(self, task: Task):
        self.task = task

    @classmethod
    def absence(cls, task: Task) -> str | None:
        """Why there is nothing to measure for this task; None where there is."""
        if cls.package and importlib.util.find_spec(cls.package) is None:
            return "not installed"
        return cls.refusal(task)

    @classmethod
    def refusal(cls, task: Task) -> str | None:
        """Why an installed method cannot do this task: no reason here."""
        return None

    @abstractmethod
    def prepare(self) -> None:
        """Both unpatched runs, and whatever is kept of them."""

    @abstractmethod
    def patch(self, cells: Sequence[Cell]) -> list[float]:
        """The metric of every cell's run; the cells are one of `batches`."""

    def batches(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """Cells that run together: every one alone, here."""
        return [[cell] for cell in cells]

    def warm_up(self) -> None:
        """Run a little of everything once."""
        self.prepare()
        self.patch(self.batches(self.task.cells)[0])
