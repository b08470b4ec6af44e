"""nnsight 0.8: a trace per cell, and one in which the unchanged blocks are skipped by hand.

Batched invokes would share a forward among cells, but nnsight refuses them for audio.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.peers.hooks_loop import cheapest_call
from benchmarks.peers.method import Method
from benchmarks.peers.tasks import Cell, Task, twin


class NNsight(Method):
    """A plain trace per cell."""

    label = "nnsight"
    package = "nnsight"

    def __init__(self, task: Task):
        from nnsight import NNsight as Wrapped

        super().__init__(task)
        self.traced = Wrapped(twin(task.hf_model))

    def prepare(self) -> None:
        self.source = self.task.source()
        self.call = cheapest_call(self.task)
        self.task.hf_model(**self.call)

    def patch(self, cells: Sequence[Cell]) -> list[float]:
        return [self._one(cell) for cell in cells]

    def _one(self, cell: Cell) -> float:
        traced, task, source = self.traced, self.task, self.source
        module = _find(traced, task.path(cell.layer))
        skipped = self.skipped(cell)
        with traced.trace(**self.call):
            for block, replacement in skipped:
                block.skip(replacement)
            module.input = task.patched(module.input, cell, source)
            logits = traced.output.logits.save()
        return task.difference(logits)

    def skipped(self, cell: Cell) -> list[tuple[Any, Any]]:
        """Blocks that do not run, and what stands for their output: none here."""
        return []


class NNsightSkips(NNsight):
    """The blocks before the patched one take their output from the unpatched run."""

    label = "nnsight, skips by hand"
    is_even = False

    def prepare(self) -> None:
        self.source = self.task.source()
        self.call = cheapest_call(self.task)
        paths = {layer: self.task.block_path(layer) for layer in self.task.layers}
        self.entering = self.task.inputs_of(paths, self.call)

    def skipped(self, cell: Cell) -> list[tuple[Any, Any]]:
        return [
            (_find(self.traced, self.task.block_path(layer)), self.entering[layer + 1])
            for layer in range(cell.layer)
        ]


def _find(envoy: Any, path: str) -> Any:
    """The wrapped module at a dotted path."""
    for name in path.split("."):
        envoy = envoy[int(name)] if name.isdigit() else getattr(envoy, name)
    return envoy
