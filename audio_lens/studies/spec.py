"""What a study computes, as JSON: all that a worker needs but weights and clips."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from audio_lens.models import HookedAudioTransformer
from audio_lens.provenance import recalled
from audio_lens.studies.errors import StudyError

SWEEP, HARVEST = "patching.sweep", "items.collect"
OUTSIDE = ("items",)  # of the fields: where things lie, which changes no value


@dataclass(frozen=True)
class Spec:
    """What a study computes.

    Attributes:
        items: the table.
        digest: of the items, by what is asked of which clips.
        model: as ``from_pretrained`` takes it.
        dtype, device: of the weights; None keeps the checkpoint's, and takes the CPU.
        loader: a function that makes the model in its place, as "module:function".
        method: "patching.sweep", or a registered method of `audio_lens.analysis`.
        arguments: of the method, as results record them.
        case: of sweeps: a function that makes of model and item what is swept, as
            "module:function"; None takes items beside their counterparts.
        stream: which counterpart makes pairs: "audio", "text", "both"; None takes the one there is.
        unit: how many items are committed together.
        batch: at most so many items of equal layout run together.
        threads: of every worker.
        memory_gb: of every sweep; how cells are packed depends on it, and with that the last bits.
    """

    items: str
    digest: str
    model: str
    method: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    device: str | None = None
    loader: str | None = None
    case: str | None = None
    stream: str | None = None
    unit: int = 8
    batch: int = 1
    threads: int = 1
    memory_gb: float | int = 2.0

    @property
    def is_sweep(self) -> bool:
        """Whether cells are patched, or a method runs."""
        return self.method == SWEEP

    @property
    def axes(self) -> list[str]:
        """Of sweeps."""
        said = recalled(self.arguments.get("axes", ()))
        return [said] if isinstance(said, str) else list(said)

    @property
    def identity(self) -> str:
        """A hash of what is computed, wherever the table lies."""
        told = {n: x for n, x in dataclasses.asdict(self).items() if n not in OUTSIDE}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The spec as a text."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str | bytes) -> Spec:
        """The spec that `to_json` wrote."""
        return Spec(**json.loads(text))

    def differences(self, other: Spec) -> list[str]:
        """Where two specs compute something else, in words."""
        mine, its = self._flat(), other._flat()
        return [
            f"{name} was {its.get(name)!r} and is {mine.get(name)!r}"
            for name in dict.fromkeys([*its, *mine])
            if its.get(name) != mine.get(name)
        ]

    def _flat(self) -> dict[str, Any]:
        """All that is computed, arguments among it."""
        told = {n: x for n, x in dataclasses.asdict(self).items() if n not in OUTSIDE}
        return told | told.pop("arguments")

    def load(self) -> HookedAudioTransformer:
        """The model, with as many threads as a worker has.

        Raises:
            LoadingError, HubError: as ``from_pretrained``.
        """
        torch.set_num_threads(self.threads)
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        if self.loader is None:
            return HookedAudioTransformer.from_pretrained(self.model, dtype, self.device)
        model = named(self.loader)()
        if dtype is not None:
            model = model.to(dtype)
        return model if self.device is None else model.to(self.device)


def named(path: str) -> Callable[..., Any]:
    """A function by "module:function".

    Raises:
        StudyError: no such module or function.
    """
    module, _, name = path.partition(":")
    if not name:
        raise StudyError(f"name a function as 'module:function', got {path!r}")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise StudyError(
            f"no function {path!r} can be imported: {error}. Every worker imports it, so it must "
            "lie in a module on the Python path"
        ) from error
