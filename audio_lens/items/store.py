"""Where collected activations go: shards in a folder, each written as a whole, or memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio_lens import files
from audio_lens.items.activations import Activations
from audio_lens.items.shards import (
    INDEX,
    ActivationsError,
    FileShard,
    HeldShard,
    shard_bytes,
    shard_paths,
)

SAME = ("sites", "where", "pool", "dtype", "items")  # what a run must share to go on with another


@dataclass
class Store:
    """Shards that grow batch by batch.

    Attributes:
        index: what is collected.
        folder: where to; None keeps all in memory.
        shard_bytes: how large a shard grows, about.
        done: numbers of the items that are there.
    """

    index: dict[str, Any]
    folder: Path | None
    shard_bytes: int
    done: set[int] = field(default_factory=set)
    _held: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)
    _items: list[int] = field(default_factory=list)

    @staticmethod
    def open(index: dict[str, Any], folder: Path | None, shard_bytes: int) -> Store:
        """A new store, or one that goes on in its folder.

        Raises:
            ActivationsError: a folder that holds something else, or other activations.
            OutputError: a folder that cannot be made or written.
        """
        store = Store(index, folder, shard_bytes)
        if folder is None:
            return store
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.OutputError(f"{folder} cannot be made a folder: {error}") from error
        if (folder / INDEX).is_file():
            _check_same(folder, json.loads((folder / INDEX).read_text(encoding="utf-8")), index)
            store.done = {item for path in shard_paths(folder) for item in FileShard(path).items()}
        elif others := [path.name for path in folder.iterdir() if not path.name.startswith(".")]:
            raise ActivationsError(f"{folder} holds {others[0]} already: name an empty folder")
        else:
            files.write(folder / INDEX, json.dumps(index, ensure_ascii=False, indent=1).encode())
        return store

    def add(self, items: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Keep what a batch of items gave; a shard that is full is written.

        Raises:
            OutputError: a full disk; what was written before stays.
        """
        for name, tensor in tensors.items():
            self._held.setdefault(name, []).append(tensor)
        self._items += items
        held = sum(x.numel() * x.element_size() for parts in self._held.values() for x in parts)
        if self.folder is not None and held >= self.shard_bytes:
            self._write(self.folder)
        self.done.update(items)

    def _joined(self) -> dict[str, Tensor]:
        return {name: torch.cat(self._held.pop(name)).contiguous() for name in list(self._held)}

    def _write(self, folder: Path) -> None:
        paths = shard_paths(folder)
        number = int(paths[-1].stem.partition("-")[2]) + 1 if paths else 0
        data = shard_bytes(self._joined(), self._items)
        files.write(folder / f"shard-{number:06d}.safetensors", data)
        self._items = []

    def finished(self) -> Activations:
        """All that was collected."""
        if self.folder is None:
            return Activations(self.index, [HeldShard(self._joined())])
        if self._items:
            self._write(self.folder)
        return Activations.load(self.folder)


def _check_same(folder: Path, there: dict[str, Any], index: dict[str, Any]) -> None:
    """Raise unless what a folder holds is of the same call."""
    now = json.loads(json.dumps(index))
    odd = [name for name in SAME if there.get(name) != now[name]]
    for name in ("weights_hash", "items_hash"):
        if there.get("meta", {}).get(name) != now["meta"][name]:
            odd.append({"weights_hash": "weights", "items_hash": "clips"}[name])
    if odd:
        raise ActivationsError(
            f"{folder} holds activations of other {', '.join(odd)}: name another folder, or load "
            "what is there with Activations.load"
        )
