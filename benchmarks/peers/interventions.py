"""pyvene 0.1.8: an intervenable model per block, a forward per cell.

A new wrapper removes all forward hooks of the model it wraps, so it gets a model object of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from benchmarks.peers.hooks_loop import cheapest_call
from benchmarks.peers.method import Method
from benchmarks.peers.tasks import Cell, Task, twin


class Pyvene(Method):
    """A function as intervention on the input of the patched module."""

    label = "pyvene"
    package = "pyvene"

    def __init__(self, task: Task):
        import pyvene

        super().__init__(task)
        model = twin(task.hf_model)
        self.wrapped = {
            layer: pyvene.IntervenableModel(
                {
                    "component": _component(task.path(layer)),
                    "intervention": lambda base, source: self._written(base),
                },
                model,
            )
            for layer in task.layers
        }
        self.cell = task.cells[0]

    def prepare(self) -> None:
        self.source = self.task.source()
        self.call = cheapest_call(self.task)
        self.task.hf_model(**self.call)

    def patch(self, cells: Sequence[Cell]) -> list[float]:
        return [self._one(cell) for cell in cells]

    def _one(self, cell: Cell) -> float:
        self.cell = cell
        call = {**self.call}
        if "inputs_embeds" in call:  # pyvene writes into the tensor that a module receives
            call["inputs_embeds"] = call["inputs_embeds"].clone()
        _, patched = self.wrapped[cell.layer](call)
        return self.task.difference(patched.logits)

    def _written(self, base: Tensor) -> Tensor:
        return self.task.patched(base, self.cell, self.source)


def _component(path: str) -> str:
    """A dotted path as pyvene writes it: indices in brackets."""
    names = path.split(".")
    return "".join(f"[{n}]" if n.isdigit() else f".{n}" for n in names).lstrip(".") + ".input"
