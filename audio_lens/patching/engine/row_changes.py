"""Patches whose new rows depend on the position alone, whatever the window.

New rows of a block are therefore made once, for all positions, and a cell picks its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fancy_einsum import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.errors import KindError
from audio_lens.models.layers import MLP, Attention, Block, GatedMLP
from audio_lens.patching.engine.changes import (
    BlockEntry,
    Changes,
    LanePatches,
    Projected,
    picked,
)

# -------------------------------------------------------------------------------- whole rows


@dataclass
class _Table:
    """New rows of the residual stream entering a block, whatever the window."""

    layer: int
    values: Float[Tensor, "b t d"]
    differs: Bool[Tensor, "b t"]
    projected: Projected | None


class RowChanges(Changes[_Table]):
    """Sites whose new rows depend on the position alone: streams, outputs, all units at once."""

    def _make_tables(self, layer: int) -> _Table:
        if self.site.sublayer:
            return self._table(layer + 1, *self._written(layer))
        new = self.source.at(layer, self.site.local_hook)
        (old,) = self._base(layer, self.site.local_hook)
        # compared exactly: a row that is the same in every bit changes nothing, any other might
        differs = (new != old).any(-1)
        if self.site.last == "resid_pre":
            return self._table(layer, new, differs)
        return self._table(layer + 1, self._behind(layer, new), differs)

    def _table(self, layer: int, values: Tensor, differs: Tensor) -> _Table:
        # a row's queries, keys and values depend on that row alone: once for all windows
        is_block = layer < self.base.n_layers
        projected = self.base.projected(layer, values) if is_block else None
        return _Table(layer, values, differs, projected)

    def _behind(self, layer: int, new: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The stream behind the block, from new values of the site."""
        block, context = self.base.block(layer), self.base.context
        if self.site.last == "mlp_out":
            (resid,) = self._base(layer, f"hook_{block.mlp_stage}")
            return block.after_mlp(resid, new)
        if self.site.last == "attn_out":
            return block.onwards("resid_mid", self.base.residuals[layer] + new, context)
        if self.site.last == "cross_attn_out":
            (resid_mid,) = self._base(layer, "hook_resid_mid")
            return block.onwards("resid_mid_cross", resid_mid + new, context)
        return block.onwards(self.site.last, new, context)

    def _written(self, layer: int) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"]]:
        """The stream behind the block with what all units now write, and where that is new."""
        # what units write is linear in what they give, so its change is all that is needed: the
        # bias, and units that do not change, are in the base run's sum already
        block = self.base.block(layer)
        if self.site.sublayer == "mlp":
            delta = _neuron_delta(self, layer)
            resid, mlp_out = self._base(layer, f"hook_{block.mlp_stage}", "hook_mlp_out")
            values = block.after_mlp(resid, mlp_out + delta @ _mlp_of(block).W_out)
        else:
            delta = _head_delta(self, layer)
            is_result, attn = self.site.last == "result", self.attention(layer)
            written = delta.sum(2) if is_result else written_by_all(attn, delta)
            (stream,) = self._base(layer, f"hook_{self.stage}")
            values = block.onwards(self.stage, stream + written, self.base.context)
        return values, (delta != 0).flatten(2).any(-1)

    def _entry(self, layer: int, lanes: LanePatches, tables: _Table) -> BlockEntry:
        # the tables hold all units together, so a lane's unit says nothing here
        lane, position = self._changed_rows(
            LanePatches(lanes.row, lanes.where, None), tables.differs, tables.layer
        )
        at = lanes.row[lane], position
        projected = picked(tables.projected, at)
        return BlockEntry(tables.layer, lane, position, tables.values[at], projected)


# -------------------------------------------------------------------------------- single units


@dataclass
class _UnitTable:
    """By how much what every unit gives changes, whatever the window.

    Attributes:
        delta: of a head a vector, of a neuron a number.
        streams: what the units' writing is added to: the residual stream, or for neurons that and
            the output of the MLP, which some blocks norm before they add it.
    """

    delta: Float[Tensor, "b t u *e"]
    differs: Bool[Tensor, "b t u"]
    streams: list[Float[Tensor, "b t d"]]


class UnitChanges(Changes[_UnitTable]):
    """Single heads or neurons whose new output depends on the position alone."""

    def _make_tables(self, layer: int) -> _UnitTable:
        if self.site.sublayer == "mlp":
            delta, stage = _neuron_delta(self, layer), self.base.block(layer).mlp_stage
            streams = self._base(layer, f"hook_{stage}", "hook_mlp_out")
            return _UnitTable(delta, delta != 0, streams)
        delta = _head_delta(self, layer)
        return _UnitTable(delta, (delta != 0).any(-1), self._base(layer, f"hook_{self.stage}"))

    def _entry(self, layer: int, lanes: LanePatches, tables: _UnitTable) -> BlockEntry:
        lane, position = self._changed_rows(lanes, tables.differs, layer + 1)
        row, unit = lanes.row[lane], lanes.units[lane]
        *before, last = (stream[row, position] for stream in tables.streams)
        last = last + self._write(layer, tables.delta[row, position, unit], unit)
        if before:
            values = self.base.block(layer).after_mlp(before[0][None], last[None])[0]
        else:
            values = self._onwards(layer, last, row)
        return BlockEntry(layer + 1, lane, position, values)

    def _write(self, layer: int, delta: Tensor, unit: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        if self.site.last == "result":
            return delta
        if self.site.sublayer == "mlp":
            return delta[:, None] * _mlp_of(self.base.block(layer)).W_out[unit]
        return written_by_each(self.attention(layer), delta, unit)


def written_by_all(attn: Attention, z: Float[Tensor, "*rows h e"]) -> Float[Tensor, "*rows d"]:
    """What all heads together write to the residual stream, but for the bias."""
    return einsum("... head d_head, head d_head d_model -> ... d_model", z, attn.W_O)


def written_by_each(
    attn: Attention, z: Float[Tensor, "m e"], head: Int[Tensor, " m"]
) -> Float[Tensor, "m d"]:
    """What each row's head writes to the residual stream."""
    heads, counts = head.unique_consecutive(return_counts=True)
    if len(heads) > 2 * attn.n_heads:  # not in order: many short products
        order = head.argsort(stable=True)
        return written_by_each(attn, z[order], head[order])[order.argsort()]
    # head by head: W_O[head] would copy a whole matrix for every row
    W_O = attn.W_O
    every = torch.arange(attn.n_heads, device=heads.device)
    if torch.equal(heads, every) and (counts == counts[0]).all():
        return torch.bmm(z.unflatten(0, (len(heads), -1)), W_O).flatten(0, 1)
    runs = zip(heads.tolist(), z.split(counts.tolist()), strict=True)
    written = [rows @ W_O[h] for h, rows in runs]
    return torch.cat(written) if written else z.new_empty(0, W_O.shape[-1])


def _head_delta(of: Changes, layer: int) -> Float[Tensor, "b t h _"]:
    """By how much the heads' ``z`` (or ``result``) of every position changes."""
    attn, prefix, base = of.attention(layer), of.site.sublayer, of.base
    new = of.source.at(layer, of.site.local_hook)
    if of.site.last == "result":
        return new - base.at(layer, [of.site.local_hook])[of.site.local_hook]
    z_name = f"{prefix}.hook_z"
    z = base.at(layer, [z_name])[z_name]
    if of.site.last == "z":
        return new - z
    # what lies behind the patched step runs again, on the base run's keys and values
    k, v = base.keys_values(attn)
    if of.site.last == "pattern":
        return attn.weigh(new, v) - z
    if of.site.last == "attn_scores":
        return attn.weigh(attn.pattern_of(new), v) - z
    q = new if of.site.last == "rot_q" else attn.rotated_queries(new, base.context.rotary)
    allowed = base.context.memory_allowed if attn.is_cross else base.context.allowed
    return attn.mix(q, k, v, allowed, base.bias(attn, layer)) - z


def _neuron_delta(of: Changes, layer: int) -> Float[Tensor, "b t f"]:
    """By how much what enters the MLP's output matrix changes."""
    mlp, new = _mlp_of(of.base.block(layer)), of.source.at(layer, of.site.local_hook)
    is_gated = isinstance(mlp, GatedMLP)
    names = ["mlp.hook_post", *(["mlp.hook_pre", "mlp.hook_pre_linear"] if is_gated else [])]
    held = of.base.at(layer, names)
    if of.site.last == "pre":
        new = mlp.act(new) * (held["mlp.hook_pre_linear"] if is_gated else 1)
    elif of.site.last == "gate":
        new = new * held["mlp.hook_pre_linear"]
    elif of.site.last == "pre_linear":
        new = mlp.act(held["mlp.hook_pre"]) * new
    return new - held["mlp.hook_post"]


def _mlp_of(block: Block) -> MLP:
    """The MLP of a block whose neurons are patched, gated or not.

    Raises:
        TypeError: for one of another kind, which `is_entered` keeps out.
    """
    if not isinstance(block.mlp, MLP):
        raise KindError(f"the neurons of a {type(block.mlp).__name__} cannot be taken apart")
    return block.mlp
