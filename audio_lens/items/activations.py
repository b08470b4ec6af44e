"""Activations of many items, with a table of what each row is; read from disk when asked for."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.utils.data import Dataset

from audio_lens.arguments import suggest
from audio_lens.items.item import OWN_FIELDS, Label
from audio_lens.items.shards import (
    INDEX,
    ActivationsError,
    Shard,
    StoredShard,
    key_of,
    stored_at,
    table_key,
)

COLUMNS = ("item", "row", "position", "second")
PIECE = 256  # rows that are read together, where rows are read in random order


class Activations:
    """Activations of items at some sites: a row for every position, or one pooled for each item.

    Rows are in the order of the items, then of segments, then of positions, whatever the shards.

    Args:
        index: what was collected: sites, items, model.
        shards: where the rows lie.
    """

    def __init__(self, index: Mapping[str, Any], shards: Sequence[Shard]):
        self.index, self.shards = dict(index), list(shards)
        self._kept: frozenset[int] | None = None  # numbers of items; None for all

    @staticmethod
    def load(folder: str | Path) -> Activations:
        """What `collect` wrote to a folder, or `studies.harvest` to one or to an object store.

        Of an object store rows are fetched when they are asked for, no more of them at a time.

        Args:
            folder: or the address of an object store (``s3://bucket/folder``).

        Raises:
            ActivationsError: a folder without activations, with unfinished ones (collect again: it
                goes on), or with a shard that cannot be read.
            BucketError: an object store that cannot be reached.
            ExtraError: naming the extra that an object store needs.
        """
        told, shards = stored_at(folder)
        if told is None:
            raise ActivationsError(f"{folder} holds no activations: there is no {INDEX}")
        index = json.loads(told)
        done = [item for shard in shards for item in shard.items()]
        lacking = len(set(range(len(index["items"]))) - set(done))
        if lacking:
            raise ActivationsError(
                f"{folder} lacks {lacking} of {len(index['items'])} items: collect again, with the "
                "same arguments, and it goes on"
            )
        return Activations(index, shards)

    def check(self) -> None:
        """Read every shard, and compare it with the hash that was written into it.

        Raises:
            ActivationsError: naming shards that hold something else now: a flipped byte, say.
        """
        stored = [shard for shard in self.shards if isinstance(shard, StoredShard)]
        odd = [shard.at for shard in stored if not shard.is_whole()]
        if odd:
            raise ActivationsError(
                f"{len(odd)} of {len(stored)} shards do not hold what was written: "
                f"{', '.join(odd)}. Delete them and collect again"
            )

    def __repr__(self) -> str:
        shapes = ", ".join(self.sites)
        return f"Activations({len(self.items)} items; {shapes})"

    # ---------------------------------------------------------------- what there is

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites, as ``part.activation``."""
        return tuple(self.index["sites"])

    @property
    def meta(self) -> dict[str, str]:
        """The model, its weights, the items and the versions that they come from."""
        return self.index["meta"]

    @property
    def items(self) -> list[dict[str, Any]]:
        """What is known of every item, but for its clip."""
        rows = enumerate(self.index["items"])
        return [item for number, item in rows if self._kept is None or number in self._kept]

    def layers(self, site: str | None = None) -> list[int]:
        """The layers that were collected of a site; none where it lies outside the blocks.

        Raises:
            ActivationsError: no such site.
        """
        return [layer for layer in self._site(site)["layers"] if layer is not None]

    def rows(self, site: str | None = None) -> int:
        """How many rows a site has."""
        return len(self._order(self._part(site))[0])

    def __len__(self) -> int:
        """Rows of the first site."""
        return self.rows()

    def _site(self, site: str | None) -> dict[str, Any]:
        name = self.sites[0] if site is None else site
        if name not in self.index["sites"]:
            raise ActivationsError(f"{name!r} was not collected; {suggest(name, self.sites)}")
        return self.index["sites"][name]

    def _part(self, site: str | None) -> str:
        return self._site(site)["positions_of"]

    def _key(self, site: str | None, layer: int | None) -> str:
        name, known = self.sites[0] if site is None else site, self._site(site)["layers"]
        if layer is None and len(known) == 1:
            layer = known[0]
        if layer is not None and layer < 0:
            layer += 1 + max((one for one in known if one is not None), default=-1)
        if layer not in known:
            raise ActivationsError(f"{name} was collected at layers {known}, not at {layer}")
        return key_of(name, layer)

    # ---------------------------------------------------------------- rows

    def array(self, site: str | None = None, layer: int | None = None) -> Shaped[Tensor, " n *_"]:
        """All rows of a site at a layer: ``n d``, or ``n heads d`` where it has heads.

        Args:
            site: one of those collected; None takes the first.
            layer: may be left out where there is one; negative counts from the last.

        Raises:
            ActivationsError: what was not collected.
        """
        shards, rows = self._order(self._part(site))
        key = self._key(site, layer)
        pieces, place = [], np.empty(len(rows), dtype=np.int64)
        start = 0
        for number, shard in enumerate(self.shards):
            wanted = np.flatnonzero(shards == number)
            if len(wanted):
                pieces.append(shard.get_tensor(key)[torch.as_tensor(rows[wanted])])
                place[wanted] = np.arange(start, start + len(wanted))
                start += len(wanted)
        return torch.cat(pieces)[torch.as_tensor(place)]

    def __getitem__(self, at: str | int | tuple[str, int]) -> Shaped[Tensor, " n *_"]:
        """``acts["encoder.resid_post", 3]``, or a site of one layer, or a layer of one site."""
        if isinstance(at, tuple):
            return self.array(*at)
        return self.array(layer=at) if isinstance(at, int) else self.array(at)

    def table(self, site: str | None = None) -> dict[str, np.ndarray]:
        """What every row of a site is.

        Columns are ``item`` (its number), ``row`` (which segment of the item), ``position`` (in
        the part; -1 where positions were pooled), ``second`` (in the clip; NaN for text, the mean
        where pooled), the item's ``id`` and ``group``, and its labels.
        """
        part = self._part(site)
        columns = {name: self._column(part, name) for name in COLUMNS}
        known = {name for item in self.items for name in item.get("labels", {})}
        labels = [name for name in (*OWN_FIELDS, *sorted(known)) if name not in COLUMNS]
        facts = [_facts(item) for item in self.index["items"]]
        numbers = columns["item"]
        for label in labels:
            if any(label in fact for fact in facts):
                columns[label] = np.array([facts[i].get(label) for i in numbers], dtype=object)
        return columns

    def values(self, label: str, site: str | None = None) -> list[Label]:
        """A label of every row's item.

        Raises:
            ActivationsError: a label that an item lacks.
        """
        facts = [_facts(item) for item in self.index["items"]]
        found = [facts[i].get(label) for i in self._column(self._part(site), "item")]
        if any(one is None for one in found):
            known = {name for fact in facts for name in fact}
            raise ActivationsError(f"items have no {label!r}; {suggest(label, sorted(known))}")
        return [one for one in found if one is not None]

    def filter(
        self, keep: Callable[[Mapping[str, Any]], bool] | None = None, **labels: Any
    ) -> Activations:
        """The rows of some items: for whose facts ``keep`` is true, and whose labels are these.

        Raises:
            ActivationsError: if that leaves none.
        """
        chosen = set()
        for number, item in enumerate(self.index["items"]):
            fact = _facts(item)
            fits = all(
                fact.get(name) in (value if isinstance(value, (list, tuple, set)) else [value])
                for name, value in labels.items()
            )
            if fits and (keep is None or keep(fact)):
                chosen.add(number)
        kept = frozenset(chosen if self._kept is None else chosen & self._kept)
        if not kept:
            raise ActivationsError(f"no item is left of {len(self.items)}")
        part = Activations(self.index, self.shards)
        part._kept = kept
        return part

    @functools.cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        """The table of all shards, by part and column, and where each row lies."""
        columns: dict[str, list[np.ndarray]] = {}
        for part in {self._part(site) for site in self.sites}:
            for number, shard in enumerate(self.shards):
                held = {n: shard.get_tensor(table_key(part, n)).numpy() for n in COLUMNS}
                count = len(held["item"])
                held |= {"shard": np.full(count, number), "at": np.arange(count)}
                for name, column in held.items():
                    columns.setdefault(f"{part}.{name}", []).append(column)
        return {name: np.concatenate(column) for name, column in columns.items()}

    @functools.cached_property
    def _sorted(self) -> dict[str, np.ndarray]:
        """For every part the order of its rows."""
        found = {}
        for part in {self._part(site) for site in self.sites}:
            item, row, position = (self._columns[f"{part}.{name}"] for name in COLUMNS[:3])
            order = np.lexsort((position, row, item))
            if self._kept is not None:
                order = order[np.isin(item[order], list(self._kept))]
            found[part] = order
        return found

    def _column(self, part: str, name: str) -> np.ndarray:
        return self._columns[f"{part}.{name}"][self._sorted[part]]

    def _order(self, part: str) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The shard of every row, and its place there."""
        return self._column(part, "shard"), self._column(part, "at")

    # ---------------------------------------------------------------- for others

    def to_xarray(self, site: str | None = None, layer: int | None = None) -> xr.DataArray:
        """The rows as a DataArray, with the table as coordinates of ``row``."""
        values = self.array(site, layer)
        dims = ["row", *(f"unit_{i}" for i in range(values.ndim - 2)), "d"]
        dims = dims[:1] if values.ndim == 1 else dims
        name = "segment"  # the column row, since the dimension has its name
        columns = self.table(site)
        coords = {name if c == "row" else c: ("row", column) for c, column in columns.items()}
        wide = values.float() if values.dtype == torch.bfloat16 else values
        return xr.DataArray(wide.numpy(), coords, dims, self._key(site, layer), dict(self.meta))

    def dataset(
        self, site: str | None = None, layer: int | None = None, label: str | None = None
    ) -> Rows:
        """The rows as a torch ``Dataset``, read one by one; with a label, as pairs with it."""
        labels = None if label is None else self.values(label, site)
        return Rows(self.shards, self._key(site, layer), *self._order(self._part(site)), labels)

    def pieces(
        self, site: str | None = None, layer: int | None = None, size: int = PIECE
    ) -> list[Piece]:
        """The rows in pieces of up to ``size`` that lie together on disk, read one by one.

        Together they are all rows, in the order in which they lie there. No table is read, so
        that memory does not grow with it.

        Raises:
            ActivationsError: what was not collected.
        """
        key, item = self._key(site, layer), table_key(self._part(site), COLUMNS[0])
        return [
            Piece(shard, key, item, start, min(start + size, count), self._kept)
            for shard in self.shards
            for count in [shard.count(key)]
            for start in range(0, count, size)
        ]

    def chunks(self, site: str | None = None, layer: int | None = None) -> Iterator[Tensor]:
        """The rows shard by shard, in the order in which they lie on disk: for one pass."""
        key, (shards, rows) = self._key(site, layer), self._order(self._part(site))
        for number, shard in enumerate(self.shards):
            wanted = np.sort(rows[shards == number])
            if len(wanted):
                yield shard.get_tensor(key)[torch.as_tensor(wanted)]


@dataclass(frozen=True)
class Piece:
    """Some rows of one site at one layer that lie together in a shard.

    Attributes:
        key: of the rows in the shard.
        item: of the numbers of their items.
        start, stop: which rows of the shard.
        kept: numbers of the items whose rows are taken; None for all.
    """

    shard: Shard = field(repr=False)
    key: str
    item: str
    start: int
    stop: int
    kept: frozenset[int] | None = None

    def read(self) -> Shaped[Tensor, " n *_"]:
        """The rows."""
        rows = self.shard.part(self.key, self.start, self.stop)
        if self.kept is None:
            return rows
        wanted = np.isin(self.items().numpy(), list(self.kept))
        return rows[torch.as_tensor(wanted)]

    def items(self) -> Int[Tensor, " n"]:
        """The number of every row's item, of all rows that lie there."""
        return self.shard.part(self.item, self.start, self.stop)


@dataclass(frozen=True)
class Rows(Dataset):
    """Rows of one site at one layer, as torch's loaders take them."""

    shards: Sequence[Shard] = field(repr=False)
    key: str
    shard: Int[np.ndarray, " n"] = field(repr=False)
    at: Int[np.ndarray, " n"] = field(repr=False)
    labels: Sequence[Label] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = self.shards[self.shard[index]].row(self.key, int(self.at[index]))
        return row if self.labels is None else (row, self.labels[index])


def _facts(item: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: item[name] for name in OWN_FIELDS if name in item}
    return own | item.get("labels", {})
