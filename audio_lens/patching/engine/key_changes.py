"""Patched keys and values: what a window holds changes what every later query finds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.models.layers import Attention, causal_mask
from audio_lens.patching.engine.changes import BlockEntry, Changes, LanePatches
from audio_lens.patching.engine.row_changes import written_by_all, written_by_each


@dataclass
class _Attended:
    """What an attention saw in the base run, and the source's keys and values."""

    q: Float[Tensor, "b t h e"]
    z: Float[Tensor, "b t h e"]
    stream: Float[Tensor, "b t d"]
    base: tuple[Tensor, Tensor]
    new: tuple[Tensor, Tensor]
    bias: Float[Tensor, "b h q k"] | None


class KeyChanges(Changes[_Attended]):
    """Keys and values: what a window holds changes what every later query finds."""

    def _make_tables(self, layer: int) -> _Attended:
        attn, prefix = self.attention(layer), self.site.sublayer
        z, stream = self._base(layer, f"{prefix}.hook_z", f"hook_{self.stage}")
        if attn.is_cross:  # reads a stage inside the block, which the trace does not hold
            (q,) = self._base(layer, "cross_attn.hook_q")
        else:
            q = self.base.projected(layer, self.base.residuals[layer])[0]
        k, v = self.base.keys_values(attn)
        new = self.source.at(layer, self.site.local_hook)
        if self.site.last == "k":
            new = attn.rotated_keys(new, self.base.context.rotary)
        # of the pair that is not patched, "new" is the base run's own tensor: `_differs` skips it
        new = (k, new) if self.site.last == "v" else (new, v)
        return _Attended(q, z, stream, (k, v), new, self.base.bias(attn, layer))

    def _entry(self, layer: int, lanes: LanePatches, tables: _Attended) -> BlockEntry:
        attn = self.attention(layer)
        # lanes in which no key differs drop out: ``patched`` are the numbers of the others
        where = lanes.where & self._differs(lanes, tables)
        patched = where.any(-1).nonzero()[:, 0]
        some = replace(lanes, where=where)[patched]
        read = self._reach(attn, some, tables.z.shape[1])
        read = self._read(read, some.row, layer + 1)
        lane, position = read.nonzero(as_tuple=True)
        if len(lane) == 0:
            return BlockEntry(layer + 1, lane, position, tables.stream[lane, position])
        first = int(position.min())  # no lane's query before this one sees a patched key
        z = self._attend(attn, some, tables, first)[lane, position - first]
        row = some.row[lane]
        old = self._heads(attn, tables.z, some)[lane, position]
        written = self._write(attn, z - old, None if some.unit is None else some.unit[lane])
        values = tables.stream[row, position] + written
        values = self._onwards(layer, values, row)
        return BlockEntry(layer + 1, patched[lane], position, values)

    def _differs(self, lanes: LanePatches, tables: _Attended) -> Bool[Tensor, "n s"]:
        """Where the source's keys or values of the lane's head are other ones."""
        found = torch.zeros_like(lanes.where)
        for new, old in zip(tables.new, tables.base, strict=True):
            if new is not old:
                differs = (new != old).any(-1)
                whole = lanes.unit is None
                found |= differs.any(-1)[lanes.row] if whole else lanes.of_unit(differs)
        return found

    def _reach(self, attn: Attention, lanes: LanePatches, n_queries: int) -> Bool[Tensor, "n t"]:
        """The queries that can see a patched key."""
        if not attn.causal:
            return lanes.where.new_ones(len(lanes.row), n_queries)
        return lanes.where.cummax(-1).values  # from its first patched key on

    def _attend(
        self, attn: Attention, lanes: LanePatches, tables: _Attended, first: int
    ) -> Float[Tensor, "n t2 g e"]:
        """``z`` of the lanes' heads, for queries from ``first`` on, with the patched keys."""
        k, v = (
            torch.where(lanes.where[..., None, None], _of_head(new, lanes), _of_head(old, lanes))
            for new, old in zip(tables.new, tables.base, strict=True)
        )
        q = self._heads(attn, tables.q, lanes)[:, first:]
        bias = self._bias(attn, lanes, tables.bias, first)
        return attn.mix(q, k, v, self._allowed(attn, lanes, first), bias)

    def _bias(
        self, attn: Attention, lanes: LanePatches, bias: Tensor | None, first: int
    ) -> Float[Tensor, "n g t2 k"] | None:
        """What is added to the scores of the lanes' heads."""
        if bias is None:
            return None
        return self._heads(attn, bias.transpose(1, 2), lanes).transpose(1, 2)[:, :, first:]

    def _allowed(self, attn: Attention, lanes: LanePatches, first: int) -> Tensor | None:
        allowed = self.base.context.memory_allowed if attn.is_cross else self.base.context.allowed
        if allowed is not None:
            own = allowed[lanes.row] if len(allowed) > 1 else allowed
            return own[:, :, first if allowed.shape[2] > 1 else 0 :]
        if attn.is_cross:
            return None
        n_keys = lanes.where.shape[1]
        return causal_mask(n_keys - first, n_keys, lanes.row.device) if attn.causal else None

    def _heads(self, attn: Attention, x: Float[Tensor, "b t h _"], lanes: LanePatches) -> Tensor:
        """The query heads that a lane's key-value head serves, ``n t g _``."""
        if lanes.unit is None:
            return x[lanes.row]
        grouped = x.unflatten(2, (attn.n_key_value_heads, attn.group))
        return grouped[lanes.row, :, lanes.unit]

    def _write(
        self, attn: Attention, delta: Float[Tensor, "m g e"], unit: Int[Tensor, " m"] | None
    ) -> Float[Tensor, "m d"]:
        if unit is None:
            return written_by_all(attn, delta)
        heads = (
            unit[:, None] * attn.group + torch.arange(attn.group, device=unit.device)
        ).flatten()
        return (
            written_by_each(attn, delta.flatten(0, 1), heads).unflatten(0, delta.shape[:2]).sum(1)
        )


def _of_head(x: Float[Tensor, "b s kv e"], lanes: LanePatches) -> Float[Tensor, "n s kv2 e"]:
    """The lanes' own key-value heads; all of them where no unit is named."""
    return x[lanes.row] if lanes.unit is None else x[lanes.row, :, lanes.unit][:, :, None]
