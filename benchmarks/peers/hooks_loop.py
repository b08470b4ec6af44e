"""Plain Hugging Face: one forward with one hook per cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.peers.method import Method
from benchmarks.peers.tasks import Cell, Task


class HooksLoop(Method):
    """The loop everybody writes first: every cell runs the model from the features on."""

    label = "Hugging Face loop"

    def prepare(self) -> None:
        self.source = self.task.source()
        self.call = self.base_call()
        self.task.hf_model(**self.call)

    def base_call(self) -> dict[str, Any]:
        """Keywords of the forward that every cell repeats."""
        return self.task.whole_call(self.task.corrupted)

    def patch(self, cells: Sequence[Cell]) -> list[float]:
        return [self._one(cell) for cell in cells]

    def _one(self, cell: Cell) -> float:
        module = self.task.hf_model.get_submodule(self.task.path(cell.layer))

        def write(module: Any, args: tuple) -> tuple:
            return (self.task.patched(args[0], cell, self.source), *args[1:])

        handle = module.register_forward_pre_hook(write)
        try:
            return self.task.difference(self.task.hf_model(**self.call).logits)
        finally:
            handle.remove()


class HooksLoopEncoderOnce(HooksLoop):
    """The same, with the encoder's output computed once and handed to every forward."""

    label = "HF loop, encoder once"

    @classmethod
    def refusal(cls, task: Task) -> str | None:
        return "cannot be" if task.part == "encoder" else None

    def base_call(self) -> dict[str, Any]:
        return self.task.call_behind_encoder(self.task.corrupted)


def cheapest_call(task: Task) -> dict[str, Any]:
    """Keywords of the corrupted forward, behind the encoder where the patch lies there."""
    inputs = task.corrupted
    return task.whole_call(inputs) if task.part == "encoder" else task.call_behind_encoder(inputs)
