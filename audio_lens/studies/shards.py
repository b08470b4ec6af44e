"""What a harvest computes: of every unit a shard of activations, written with its hash."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from audio_lens.items import Items
from audio_lens.items.collect import Asked, told_of_place
from audio_lens.items.shards import INDEX, TABLE, shard_bytes, table_key
from audio_lens.models import HookedAudioTransformer
from audio_lens.provenance import of_model, recalled
from audio_lens.studies.jobs import Numbers
from audio_lens.studies.places import Place
from audio_lens.studies.spec import Spec
from audio_lens.studies.store import Column, Layout

ROWS = "rows"  # what the store holds of every item: how many rows it has in the shards


@dataclass(frozen=True)
class Harvests:
    """`collect` of the items of a unit."""

    spec: Spec

    def _asked(self, model: HookedAudioTransformer) -> Asked:
        given = self.spec.arguments
        dtype = None if given["keep"] is None else getattr(torch, given["keep"])
        return Asked.of(model, given["sites"], given["layers"], given["pool"], dtype)

    def layout(self, model: HookedAudioTransformer, items: Items) -> Layout:
        asked, given = self._asked(model), self.spec.arguments
        told = {
            "sites": asked.written,
            "where": told_of_place(recalled(given["where"])),
            "pool": given["pool"] or "none",
            "dtype": given["keep"] or str(model.dtype).removeprefix("torch."),
            "meta": of_model(model) | {"items_hash": self.spec.digest},
        }
        return Layout({ROWS: Column((), ())}, {}, told)

    def run(self, model: HookedAudioTransformer, items: Items) -> list[Numbers]:
        """How many rows items have, and the rows."""
        asked, where = self._asked(model), recalled(self.spec.arguments["where"])
        part = asked.sites[0][0].positions_of
        layout, found = self.layout(model, items), []
        for batch in items.batches(model, self.spec.arguments["size"]):
            kept = asked.of_batch(model, batch, batch.rows, where)
            counts = torch.bincount(kept[table_key(part, "item")], minlength=len(items))
            values = {ROWS: counts[batch.rows].double().numpy()}
            found.append(Numbers(list(batch.rows), values, layout, kept))
        return found


def write_index(place: Place, layout: Layout, items: Items) -> None:
    """Say what the shards hold, as `collect` does, unless it is said."""
    if place.read(INDEX) is None:
        index = {**layout.told, "items": [item.told() for item in items]}
        place.write(INDEX, json.dumps(index, ensure_ascii=False, indent=1).encode())


def write_shard(place: Place, unit: int, rows: range, found: Sequence[Numbers]) -> None:
    """Write what the items of a unit gave."""
    parts: dict[str, list[Tensor]] = {}
    for one in found:
        for name, tensor in (one.tensors or {}).items():
            is_item = name.startswith(TABLE) and name.endswith(".item")
            parts.setdefault(name, []).append(_numbered(tensor, rows, one) if is_item else tensor)
    numbers = [rows[k] for one in found for k in one.rows]
    joined = {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}
    place.write(f"shard-{unit:06d}.safetensors", shard_bytes(joined, numbers))


def _numbered(column: Tensor, rows: range, one: Numbers) -> Tensor:
    """The items of a table's rows by their numbers in the study."""
    held = np.unique(column.numpy())  # by their places in what was run together
    placed = dict(zip(held.tolist(), (rows[k] for k in sorted(one.rows)), strict=True))
    return torch.tensor([placed[at] for at in column.tolist()])
