"""What a sweep has computed so far, on disk, so that an interrupted one can go on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from audio_lens.errors import AudioLensError


class CheckpointError(AudioLensError, ValueError):
    """A checkpoint that belongs to another sweep, or is none."""


class Checkpoint:
    """A file that holds the values of finished cells.

    Args:
        path: where; its folder must exist.
        identity: what makes the sweep this one and no other; values of a file that says otherwise
            are never mixed in.

    Raises:
        CheckpointError: if there is no folder to write to.
    """

    def __init__(self, path: str | Path, identity: dict[str, str]):
        self.path, self.identity = Path(path), identity
        if self.path.is_dir() or not self.path.parent.is_dir():
            raise CheckpointError(f"no file can be written at {self.path}")

    def load(
        self, baselines: Float[Tensor, "runs ..."]
    ) -> tuple[Float[Tensor, "..."], Bool[Tensor, " cells"]] | None:
        """Values and which cells are finished; None where nothing was saved.

        Args:
            baselines: the metrics of both unpatched runs; others mean another model.

        Raises:
            CheckpointError: if the file holds another sweep.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                held = json.loads((file.metadata() or {}).get("identity", "{}"))
                saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise CheckpointError(f"{self.path} is no checkpoint of a sweep: {error}") from error
        other = [key for key in self.identity if held.get(key) != self.identity[key]]
        if other:
            raise CheckpointError(
                f"{self.path} belongs to another sweep ({', '.join(other)} differ): name another "
                "file, or delete it"
            )
        if not torch.allclose(saved["baselines"], baselines, rtol=1e-3, atol=1e-6):
            raise CheckpointError(
                f"{self.path} was made with another model: clean and corrupted metrics were "
                f"{saved['baselines'].flatten().tolist()}, now {baselines.flatten().tolist()}"
            )
        return saved["values"], saved["done"]

    def save(
        self,
        values: Float[Tensor, "..."],
        done: Bool[Tensor, " cells"],
        baselines: Float[Tensor, "runs ..."],
    ) -> None:
        """Write everything; the old file stays until the new one is whole."""
        tensors = {"values": values, "done": done, "baselines": baselines}
        beside = self.path.with_name(self.path.name + ".part")
        save_file(
            {name: x.contiguous() for name, x in tensors.items()},
            beside,
            metadata={"identity": json.dumps(self.identity)},
        )
        os.replace(beside, self.path)
