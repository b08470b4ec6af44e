"""Running many changed copies of a causal stack at once, and no row that did not change.

In a causal stack nothing before the first changed position differs at any block. The copies (lanes)
therefore run from that position on, with the base run's earlier keys and values; all their rows are
packed into one matrix for norms, projections and MLP, and lanes join at the block where their patch
enters. Behind the last block only the rows that a metric reads are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.models.layers import Attention, causal_mask
from audio_lens.patching.engine.changes import BlockEntry, Projected
from audio_lens.patching.engine.readout import Readout
from audio_lens.patching.engine.trace import PackedRows, Trace

_SPREAD = 1.5  # lanes attend together while the longest is at most so much longer than the shortest


@dataclass
class LaneRows:
    """LaneRows of several lanes, packed: lane and position of each."""

    lane: Int[Tensor, " m"]
    position: Int[Tensor, " m"]
    x: Float[Tensor, "m d"]

    def __getitem__(self, index: Tensor) -> LaneRows:
        return LaneRows(self.lane[index], self.position[index], self.x[index])

    @staticmethod
    def together(parts: Sequence[LaneRows]) -> LaneRows:
        if len(parts) == 1:
            return parts[0]
        lane, position, x = zip(*((p.lane, p.position, p.x) for p in parts), strict=True)
        return LaneRows(torch.cat(lane), torch.cat(position), torch.cat(x))


class CausalWalk:
    """Runs lanes through a causal stack from where they differ from a base run.

    Args:
        base: the base run.
        readout: what is read behind the last block.
    """

    def __init__(self, base: Trace, readout: Readout):
        self.base, self.readout = base, readout
        self.demanded = readout.demanded
        width = torch.arange(readout.width, device=self.demanded.device)
        # behind the last position that is read, nothing that a metric sees can depend on a row
        self.ends = (self.demanded * (width + 1)).amax(1)
        self._queries: tuple[int, Tensor] | None = None

    def run(self, entries: Sequence[BlockEntry], prompts: Int[Tensor, " n"]) -> LaneRows:
        """The final hidden states of the rows that are read and may differ from the base run's."""
        # rows at or behind a prompt's end are read by nobody, so they never enter
        entries = [e[e.position < self.ends[prompts[e.lane]]] for e in entries]
        lanes = _Extents.of(entries, prompts, self.ends)
        rows: LaneRows | None = None
        for layer in range(min((e.layer for e in entries), default=0), self.base.n_layers):
            joining = [e for e in entries if e.layer == layer and len(e.lane)]
            if joining or rows is not None:
                rows = self._block(layer, rows, joining, lanes)
        leaving = [
            LaneRows(e.lane, e.position, e.values) for e in entries if e.layer == self.base.n_layers
        ]
        if rows is None:
            rows = LaneRows(prompts[:0], prompts[:0], self.base.residuals[0][0, :0])
        done = LaneRows.together([rows, *leaving])
        read = self.demanded[prompts[done.lane], done.position]
        done = done if read.all() else done[read]
        return LaneRows(done.lane, done.position, self.base.stack.finish(done.x[None])[0])

    def _block(
        self, layer: int, rows: LaneRows | None, joining: Sequence[BlockEntry], lanes: _Extents
    ) -> LaneRows:
        """One block for the lanes under way and those that join here."""
        block = self.base.block(layer)
        rows, (q, k, v) = self._meeting(layer, rows, joining, lanes)
        # in the last block all rows give keys and values, but only those that are read need ask
        is_last = layer == self.base.n_layers - 1
        asking = self._asking(rows, lanes) if is_last else None
        wanted = rows if asking is None else rows[asking]
        q = q if asking is None else q[asking]
        z = self._attend(block.attn, wanted, q, rows, (k, v), lanes, only_read=is_last)
        resid_mid = wanted.x + block.attn.output(z[None])[0]
        context = PackedRows.of(self.base, lanes.prompts[wanted.lane])
        return LaneRows(
            wanted.lane, wanted.position, block.after_attention(resid_mid[None], context)[0]
        )

    def _asking(self, rows: LaneRows, lanes: _Extents) -> Tensor | None:
        """The rows that are read; None for all."""
        read = self.demanded[lanes.prompts[rows.lane], rows.position]
        return None if read.all() else read.nonzero()[:, 0]

    # ---------------------------------------------------------------- joining

    def _meeting(
        self, layer: int, rows: LaneRows | None, joining: Sequence[BlockEntry], lanes: _Extents
    ) -> tuple[LaneRows, Projected]:
        """The rows that run in a block, and their queries, keys and values."""
        new, held = ([] if rows is None else [rows]), []
        for entry in joining:
            if entry.projected is None and lanes.are_all_of(entry):
                # with those under way: few rows are projected at a fraction of the speed of many
                x = entry.values.to(self.base.residuals[layer].dtype)
                new.append(LaneRows(entry.lane, entry.position, x))
            else:
                held.append(self._join(layer, entry, lanes))
        if new:
            first = LaneRows.together(new)
            prompts = lanes.prompts[first.lane]
            own = self.base.projected_rows(layer, first.x, prompts, first.position)
            held.insert(0, (first, own))
        parts, projected = zip(*held, strict=True)
        q, k, v = (_end_to_end(x) for x in zip(*projected, strict=True))
        return LaneRows.together(parts), (q, k, v)

    def _join(self, layer: int, entry: BlockEntry, lanes: _Extents) -> tuple[LaneRows, Projected]:
        """All rows of the lanes that enter here: the base run's, with the changed ones written in.

        Where a row is the base run's, so are its queries, keys and values in this block.
        """
        lane, position, where = lanes.rows_of(entry)
        at = lanes.prompts[lane], position
        x = self.base.residuals[layer][at]
        k, v = self.base.keys_values(self.base.block(layer).attn)
        held = [self._base_queries(layer)[at], k[at], v[at]]
        # picked by index tensors, all four are copies, so the changed rows may be written in place
        for tensor, new in zip(
            [x, *held], [entry.values, *self._projected(entry, lanes)], strict=True
        ):
            tensor[where] = new.to(tensor.dtype)
        return LaneRows(lane, position, x), (held[0], held[1], held[2])

    def _projected(self, entry: BlockEntry, lanes: _Extents) -> Projected:
        row = lanes.prompts[entry.lane]
        return entry.projected or self.base.projected_rows(
            entry.layer, entry.values, row, entry.position
        )

    def _base_queries(self, layer: int) -> Float[Tensor, "b t h e"]:
        if self._queries is None or self._queries[0] != layer:
            self._queries = layer, self.base.queries(layer, self.base.residuals[layer])
        return self._queries[1]

    # ---------------------------------------------------------------- attention

    def _attend(
        self,
        attn: Attention,
        asking: LaneRows,
        q: Float[Tensor, "m h e"],
        rows: LaneRows,
        keys_values: tuple[Tensor, Tensor],
        lanes: _Extents,
        only_read: bool,
    ) -> Float[Tensor, "m h e"]:
        """Attention of packed rows, each over the keys of its own lane.

        The rows of every lane are written over the base run's keys and values; lanes of about the
        same length attend in one call.
        """
        base = self.base.keys_values(attn)
        z = torch.empty_like(q)
        for group in lanes.groups(rows):
            # rows are packed and attention wants ``lane position``: ``place`` is a lane's number in
            # the group (-1 outside), and ``slot`` a row's place in the two axes flattened
            place = torch.full_like(lanes.starts, -1)
            place[group] = torch.arange(len(group), device=group.device)
            prompts = lanes.prompts[group]
            end = int(self.ends[prompts].max())
            own, mine = place[rows.lane] >= 0, place[asking.lane] >= 0
            slot = place[rows.lane[own]] * end + rows.position[own]
            k, v = (
                _written_over(held[prompts, :end], slot, new[own])
                for held, new in zip(base, keys_values, strict=True)
            )
            where, lane = asking.position[mine], place[asking.lane[mine]]
            if only_read and not self.readout.reads_all:
                column = self.readout.slots[prompts[lane], where]
                wanted = self.readout.positions[prompts]
                first, allowed = 0, self._allowed_at(wanted, prompts, end)
                n_columns = wanted.shape[1]
            else:
                first = int(lanes.starts[group].min())
                column, n_columns = where - first, end - first
                allowed = self._allowed_from(first, prompts, end)
            slot = lane * n_columns + column
            # queries of rows that did not change stay 0: what they find is never taken out
            padded = q.new_zeros(len(group), n_columns, *q.shape[1:])
            mixed = attn.mix(_written_over(padded, slot, q[mine]), k, v, allowed)
            z[mine] = mixed.flatten(0, 1)[slot].to(z.dtype)
        return z

    def _allowed_from(self, first: int, prompts: Tensor, end: int) -> Bool[Tensor, "#n 1 q k"]:
        allowed = self.base.context.allowed
        if allowed is None:
            return causal_mask(end - first, end, prompts.device)
        return allowed[prompts, :, first:end, :end]

    def _allowed_at(
        self, positions: Int[Tensor, "n r"], prompts: Tensor, end: int
    ) -> Bool[Tensor, "n 1 r k"]:
        allowed = self.base.context.allowed
        if allowed is None:
            keys = torch.arange(end, device=prompts.device)
            return (keys <= positions[..., None])[:, None]
        return allowed[prompts[:, None], 0, positions][:, None, :, :end]


def _end_to_end(parts: Sequence[Tensor]) -> Tensor:
    """All rows one after the other; a single part is not copied."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _written_over(
    held: Float[Tensor, "n t h e"], slot: Int[Tensor, " m"], new: Float[Tensor, "m h e"]
) -> Float[Tensor, "n t h e"]:
    """``held`` (a copy) with rows written at flat places."""
    return held.flatten(0, 1).index_copy_(0, slot, new).view(held.shape)


@dataclass
class _Extents:
    """From where to where the lanes of a run reach.

    Attributes:
        prompts: the prompt of each lane.
        starts: the first position of each lane that differs from the base run.
        ends: behind the last position that is read, of every prompt.
    """

    prompts: Int[Tensor, " n"]
    starts: Int[Tensor, " n"]
    ends: Int[Tensor, " b"]

    @staticmethod
    def of(entries: Sequence[BlockEntry], prompts: Int[Tensor, " n"], ends: Tensor) -> _Extents:
        starts = ends[prompts]
        for entry in entries:
            starts = starts.scatter_reduce(0, entry.lane, entry.position, "amin")
        return _Extents(prompts, starts, ends)

    def are_all_of(self, entry: BlockEntry) -> bool:
        """Whether an entry changes every row that its lanes have."""
        lanes = entry.lane.unique()
        lengths = self.ends[self.prompts[lanes]] - self.starts[lanes]
        return int(lengths.sum()) == len(entry.lane)

    def rows_of(self, entry: BlockEntry) -> tuple[Tensor, Tensor, Tensor]:
        """Lane and position of every row of an entry's lanes, and which of them it changes."""
        lanes = entry.lane.unique()
        starts = self.starts[lanes]
        lengths = self.ends[self.prompts[lanes]] - starts
        # lanes of unequal lengths end to end: row i of the pack is position i - offset + start
        offsets = lengths.cumsum(0) - lengths
        index = torch.arange(len(lanes), device=lanes.device).repeat_interleave(lengths)
        position = torch.arange(len(index), device=lanes.device) - (offsets - starts)[index]
        rank = torch.zeros_like(self.starts)
        rank[lanes] = offsets - starts
        return lanes[index], position, rank[entry.lane] + entry.position

    def groups(self, rows: LaneRows) -> Iterator[Int[Tensor, " g"]]:
        """Lanes of about the same length."""
        lanes = rows.lane.unique()
        lengths = (self.ends[self.prompts[lanes]] - self.starts[lanes]).tolist()
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        while order:
            longest = lengths[order[0]]
            group = [i for i in order if lengths[i] * _SPREAD >= longest]
            order = order[len(group) :]
            yield lanes[group]
