"""TransformerLens 4.3: its bridge over the audio LLM, built without its loader.

The loader would look for a checkpoint and may install packages; the bridge itself takes a model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from benchmarks.peers.method import Method
from benchmarks.peers.tasks import Cell, Task, twin


class TransformerLens(Method):
    """`run_with_hooks` per cell, the audio written into the embeddings by a hook."""

    label = "TransformerLens bridge"
    package = "transformer_lens"

    @classmethod
    def refusal(cls, task: Task) -> str | None:
        return "no adapter" if task.row.kind == "whisper" else None

    def __init__(self, task: Task):
        from transformer_lens.model_bridge.sources import _bridge_builder

        super().__init__(task)
        model = twin(task.hf_model)
        self.bridge = _bridge_builder.build_bridge_from_module(
            model, type(model).__name__, hf_config=model.config
        )

    def prepare(self) -> None:
        self.source = self.task.source()
        self.embeds = self.task.merged(self.task.corrupted)
        self._run([])

    def patch(self, cells: Sequence[Cell]) -> list[float]:
        return [self._one(cell) for cell in cells]

    def _one(self, cell: Cell) -> float:
        site = "attn.hook_z" if self.task.row.patched else "hook_resid_pre"
        write = functools.partial(self._write, cell=cell)
        return self.task.difference(self._run([(f"blocks.{cell.layer}.{site}", write)]))

    def _run(self, hooks: list) -> Tensor:
        heard = ("hook_embed", lambda x, hook: self.embeds)
        tokens = self.task.corrupted["input_ids"]
        return self.bridge.run_with_hooks(tokens, fwd_hooks=[heard, *hooks], use_cache=False)

    def _write(self, x: Tensor, hook: Any, cell: Cell) -> Tensor:
        return self.task.patched(x.flatten(2), cell, self.source).reshape(x.shape)
