"""Rows of activations where they lie: in memory, in safetensors files, in an object store."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from audio_lens.buckets import Bucket, is_address
from audio_lens.errors import AudioLensError

INDEX = "activations.json"
TOLD = "shard"  # of a shard: its items and its hash
TABLE = "@"  # begins the keys of a shard that are columns of the table
_LENGTH = 8  # bytes at the head of a safetensors file, which say how long its header is
_FACTS = "__metadata__"  # in that header
_UNREADABLE = (SafetensorError, OSError, KeyError, TypeError, ValueError)


class ActivationsError(AudioLensError, ValueError):
    """Activations that are not there, or a folder that does not hold whole ones."""


@runtime_checkable
class Shard(Protocol):
    """Some rows of all sites, on disk or in memory."""

    def get_tensor(self, name: str) -> Tensor: ...

    def row(self, name: str, row: int) -> Tensor: ...

    def part(self, name: str, start: int, stop: int) -> Tensor: ...

    def count(self, name: str) -> int: ...


@runtime_checkable
class StoredShard(Shard, Protocol):
    """A shard that was written down."""

    @property
    def at(self) -> str:
        """Where it lies."""
        ...

    def items(self) -> list[int]:
        """The numbers of its items.

        Raises:
            ActivationsError: no whole shard.
        """
        ...

    def is_whole(self) -> bool:
        """Whether it holds what was written."""
        ...


@dataclass(frozen=True)
class HeldShard:
    """A shard in memory."""

    tensors: Mapping[str, Tensor] = field(repr=False)

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def row(self, name: str, row: int) -> Tensor:
        return self.tensors[name][row]

    def part(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][start:stop]

    def count(self, name: str) -> int:
        return len(self.tensors[name])


@dataclass(frozen=True)
class FileShard:
    """A shard in a safetensors file, of which no more is read than is asked for."""

    path: Path

    @functools.cached_property
    def _file(self) -> Any:
        return safe_open(self.path, "pt")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # open files go into no worker

    def get_tensor(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def row(self, name: str, row: int) -> Tensor:
        return self._file.get_slice(name)[row : row + 1][0]

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows, copied, so that the file is not held in memory behind them."""
        with safe_open(self.path, "pt") as file:
            return file.get_slice(name)[start:stop].clone()

    def count(self, name: str) -> int:
        with safe_open(self.path, "pt") as file:
            return file.get_slice(name).get_shape()[0]

    @property
    def at(self) -> str:
        return str(self.path)

    def items(self) -> list[int]:
        try:
            with safe_open(self.path, "pt") as file:
                return json.loads(file.metadata()[TOLD])["items"]
        except _UNREADABLE as error:
            raise _no_shard(self, error) from error

    def is_whole(self) -> bool:
        try:
            with safe_open(self.path, "pt") as file:
                told = json.loads(file.metadata()[TOLD])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return told["sha256"] == _hash_of(tensors, told["items"])
        except _UNREADABLE:
            return False


@dataclass(frozen=True)
class BucketShard:
    """A shard in an object store, of which no more is fetched than is asked for."""

    bucket: Bucket
    name: str

    @functools.cached_property
    def _header(self) -> tuple[dict[str, Any], int]:
        """What the file says of its tensors, and where they begin."""
        length = int.from_bytes(self.bucket.part(self.name, 0, _LENGTH), "little")
        text = self.bucket.part(self.name, _LENGTH, _LENGTH + length)
        return json.loads(text), _LENGTH + length

    def get_tensor(self, name: str) -> Tensor:
        return self.part(name, 0, self.count(name))

    def row(self, name: str, row: int) -> Tensor:
        return self.part(name, row, row + 1)[0]

    def part(self, name: str, start: int, stop: int) -> Tensor:
        header, begin = self._header
        told = header[name]
        count, *shape = told["shape"]
        first, last = told["data_offsets"]
        stop = min(stop, count)
        each = (last - first) // max(count, 1)
        bounds = (begin + first + start * each, begin + first + stop * each)
        data = self.bucket.part(self.name, *bounds) if bounds[1] > bounds[0] else b""
        return _tensor(data, told["dtype"], [max(stop - start, 0), *shape])

    def count(self, name: str) -> int:
        return self._header[0][name]["shape"][0]

    @property
    def at(self) -> str:
        return f"{self.bucket.url}/{self.name}"

    def items(self) -> list[int]:
        try:
            return json.loads(self._header[0][_FACTS][TOLD])["items"]
        except _UNREADABLE as error:
            raise _no_shard(self, error) from error

    def is_whole(self) -> bool:
        try:
            told = json.loads(self._header[0][_FACTS][TOLD])
            tensors = safetensors.torch.load(self.bucket.read(self.name) or b"")
        except _UNREADABLE:
            return False
        return told["sha256"] == _hash_of(tensors, told["items"])


def _no_shard(shard: StoredShard, error: Exception) -> ActivationsError:
    return ActivationsError(f"{shard.at} is no whole shard ({error}): delete it")


def _tensor(data: bytes, dtype: str, shape: list[int]) -> Tensor:
    """Bytes of a safetensors file as a tensor: read as a file of that tensor alone."""
    told = {"": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}
    header = json.dumps(told).encode()
    return safetensors.torch.load(len(header).to_bytes(_LENGTH, "little") + header + data)[""]


# -------------------------------------------------------------------------------- places


def stored_at(out: str | Path) -> tuple[bytes | None, list[StoredShard]]:
    """What a folder or an object store holds of activations: the index, None if none, and shards.

    Raises:
        BucketError: an object store that cannot be reached.
        ExtraError: naming the extra that an object store needs.
    """
    if is_address(out):
        bucket = Bucket(str(out))
        names = [name for name in bucket.names() if _is_shard(name)]
        return bucket.read(INDEX), [BucketShard(bucket, name) for name in names]
    folder = Path(out)
    index = (folder / INDEX).read_bytes() if (folder / INDEX).is_file() else None
    return index, [FileShard(path) for path in shard_paths(folder)]


def _is_shard(name: str) -> bool:
    return name.startswith("shard-") and name.endswith(".safetensors")


def key_of(site: str, layer: int | None) -> str:
    """The key of a shard under which a site lies at a layer."""
    return site if layer is None else f"{site}.{layer}"


def table_key(part: str, column: str) -> str:
    """The key of a shard under which a column of a part's table lies."""
    return f"{TABLE}{part}.{column}"


def shard_bytes(tensors: Mapping[str, Tensor], items: Sequence[int]) -> bytes:
    """A shard as a file, which holds the hash of what is in it."""
    told = {"items": list(items), "sha256": _hash_of(tensors, list(items))}
    # one entry: safetensors writes several in an order that differs from run to run
    return safetensors.torch.save(dict(tensors), {TOLD: json.dumps(told)})


def _hash_of(tensors: Mapping[str, Tensor], items: list[int]) -> str:
    digest = hashlib.sha256(json.dumps(items).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a folder, in order."""
    return sorted(folder.glob("shard-*.safetensors"))
