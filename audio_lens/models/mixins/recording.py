"""Activations of what a model writes, step after step, as those of one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from audio_lens.hooks import DeadHookError, HookFn, local_name, position_dim

_EMPTY = {"hook_attn_scores": -torch.inf, "hook_pattern": 0.0}  # of keys that come later


class Recording:
    """What hook points saw while a model wrote.

    Args:
        names: of the points.
        is_named: whether they were asked for one by one, so that all of them must run.
    """

    def __init__(self, names: Sequence[str], is_named: bool):
        self.names, self.is_named = names, is_named
        self._seen: dict[str, list[Tensor]] = {}

    def hooks(self) -> list[tuple[str, HookFn]]:
        """What keeps the activations, in TransformerLens form."""
        return [(name, self._keeper(name)) for name in self.names]

    def _keeper(self, name: str) -> HookFn:
        def keep(tensor: Tensor, hook: Any) -> None:
            self._seen.setdefault(name, []).append(tensor.detach())

        keep.only_reads = True
        return keep

    def joined(self) -> dict[str, Tensor]:
        """The activations, of prompt and continuation where they grew.

        Raises:
            DeadHookError: points asked for by name that did not run, or nothing that ran.
        """
        missing = [name for name in self.names if name not in self._seen]
        if missing and (self.is_named or not self._seen):
            raise DeadHookError(
                f"these points did not run while the model wrote: {', '.join(missing[:5])}"
            )
        return {name: _as_one(name, self._seen[name]) for name in self.names if name in self._seen}


def _as_one(name: str, steps: list[Tensor]) -> Tensor:
    """The steps of a point one after the other; the queries of earlier ones see no later key."""
    dim = position_dim(name)
    if len(steps) == 1 or dim is None:
        return steps[0]
    last = local_name(name)
    if last in _EMPTY:
        n_keys = steps[-1].shape[-1]
        steps = [F.pad(x, (0, n_keys - x.shape[-1]), value=_EMPTY[last]) for x in steps]
    return torch.cat(steps, dim=dim)
