"""What a sweep has done so far, in a folder: one file for every arm and seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from audio_lens import files
from audio_lens.errors import InputError

INDEX = "sweep.json"
TEST, RETAINED, LOSS = "values.test", "values.retained", "loss"  # names of tensors, beside weights


@dataclass(frozen=True)
class Trained:
    """One arm with one seed.

    Attributes:
        values: metrics of every item that is tested.
        retained: of every item on which nothing should be lost.
        loss: of every step, in nats.
        n_trained: how many parameters were.
    """

    values: Float[Tensor, "n metrics"]
    retained: Float[Tensor, "m metrics"] | None
    loss: list[float]
    n_trained: int


@dataclass
class Runs:
    """Arms and seeds that are done.

    Attributes:
        folder: where they are written; None keeps them in memory alone.
    """

    folder: Path | None
    _held: dict[str, Trained] = field(default_factory=dict)

    @staticmethod
    def open(folder: Path | None, asked: Mapping[str, Any]) -> Runs:
        """A folder for runs of one sweep: a new one, or one with some of them.

        Raises:
            InputError: a folder that holds something else, or runs of another sweep.
            OutputError: a folder that cannot be made or written.
        """
        if folder is None:
            return Runs(None)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.OutputError(f"{folder} cannot be made a folder: {error}") from error
        index, now = folder / INDEX, json.loads(json.dumps(asked))
        if index.is_file():
            there = json.loads(index.read_text(encoding="utf-8"))
            odd = [name for name in now if there.get(name) != now[name]]
            if odd:
                raise InputError(
                    f"{folder} holds runs of a sweep with other {', '.join(odd)}: name another "
                    "folder"
                )
        elif others := [path.name for path in folder.iterdir() if not path.name.startswith(".")]:
            raise InputError(f"{folder} holds {others[0]} already: name an empty folder")
        else:
            files.write(index, json.dumps(now, indent=1).encode())
        return Runs(folder)

    def find(self, name: str) -> Trained | None:
        """A run that is done; None else."""
        if self.folder is None or not (path := self._path(name)).is_file():
            return self._held.get(name)
        with safe_open(path, "pt") as data:
            there = set(data.keys())
            retained = data.get_tensor(RETAINED) if RETAINED in there else None
            count = int((data.metadata() or {})["trained"])
            return Trained(data.get_tensor(TEST), retained, data.get_tensor(LOSS).tolist(), count)

    def add(
        self, name: str, run: Trained, weights: Mapping[str, Tensor], head: Mapping[str, str]
    ) -> None:
        """Keep a run with the weights that were trained.

        Raises:
            OutputError: a full disk; what was written before stays.
        """
        self._held[name] = run
        if self.folder is None:
            return
        values = {TEST: run.values, LOSS: torch.tensor(run.loss, dtype=torch.float64)}
        values |= {} if run.retained is None else {RETAINED: run.retained}
        told = {"trained": str(run.n_trained), **head}
        files.write(self._path(name), safetensors.torch.save({**values, **weights}, told))

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{quote(name, safe='')}.safetensors"
