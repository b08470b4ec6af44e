"""audio_lens: one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from audio_lens import patching
from benchmarks.peers.method import Method
from benchmarks.peers.tasks import Cell, Task


class AudioLens(Method):
    """`patching.sweep`; `prepare` is a sweep of a single cell, to know what the others add."""

    label = "audio_lens"
    takes_every_cell = True

    def prepare(self) -> None:
        whole = {"axes": "layer", "windows": None, "layers": self.task.layers[-1]}
        patching.sweep(self.task.model, **sweep_arguments(self.task) | whole, progress=False)

    def patch(self, cells: Sequence[Cell]) -> list[float]:
        result = patching.sweep(self.task.model, **sweep_arguments(self.task), progress=False)
        return result.values.flatten().tolist()

    def warm_up(self) -> None:
        self.prepare()


def sweep_arguments(task: Task) -> dict[str, Any]:
    """The arguments of `patching.sweep` and `patching.attribute`."""
    return {
        "clean": task.clean,
        "corrupted": task.corrupted,
        "site": task.row.site,
        "axes": task.row.axes,
        "windows": task.windows,
        "metric": task.metric,
    }
