"""From a patched site to the rows of the residual stream that it changes.

Every patch of one block, wherever it sits, ends up as an `Entry`: rows of the residual stream
entering a block that differ from the base run's. Patches inside a block become what they add to
the residual stream; the rest of the block then runs on the changed rows alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.models.layers import MLP, Attention, Block, GatedMLP, causal_mask
from audio_lens.patching.engine.trace import PackedRows, Source, Trace
from audio_lens.patching.sites import Site

Projected = tuple[Tensor, Tensor, Tensor]
KEYS = ("k", "v", "rot_k")
_ADDED = ("attn_out", "cross_attn_out", "mlp_out")
_STAGES = ("resid_pre", "resid_mid", "resid_mid_cross", "normalized_resid_mid")
_STAGES += ("resid_post", "normalized_resid_post")


@dataclass(frozen=True)
class Lanes:
    """Copies of rows of the base run, each with a patch of the same block.

    Attributes:
        row: which row of the base run (a prompt, or a clip in the encoder).
        where: the patched positions, of the site's own axis of positions.
        unit: the patched head or neuron; None for all.
    """

    row: Int[Tensor, " n"]
    where: Bool[Tensor, "n s"]
    unit: Int[Tensor, " n"] | None

    def __getitem__(self, index: Tensor) -> Lanes:
        return Lanes(self.row[index], self.where[index], _at(self.unit, index))


@dataclass(frozen=True)
class Entry:
    """Rows of the residual stream entering a block that differ from the base run's.

    Attributes:
        layer: the block; the number of blocks means what leaves the last.
        lane, position: where each changed row belongs.
        values: the rows.
        projected: their queries, keys and values in that block, where they are known.
    """

    layer: int
    lane: Int[Tensor, " m"]
    position: Int[Tensor, " m"]
    values: Float[Tensor, "m d"]
    projected: Projected | None = None

    def __getitem__(self, index: Tensor) -> Entry:
        projected = self.projected and tuple(x[index] for x in self.projected)
        return Entry(
            self.layer, self.lane[index], self.position[index], self.values[index], projected
        )

    def of_lanes(self, lanes: Int[Tensor, " n"]) -> Entry:
        """The same for lanes that have other numbers in a larger set."""
        return Entry(self.layer, lanes[self.lane], self.position, self.values, self.projected)


class Changes(ABC):
    """What patches of one site change; one block's tables are held at a time.

    Args:
        demanded: the positions that are read behind the last block; None for all.
    """

    def __init__(
        self, site: Site, base: Trace, source: Source, demanded: Bool[Tensor, "b t"] | None
    ):
        self.site, self.base, self.source, self.demanded = site, base, source, demanded
        self._tables: tuple[int, object] | None = None

    def entry(self, layer: int, lanes: Lanes) -> Entry:
        """The rows that patches of this block change."""
        if self._tables is None or self._tables[0] != layer:
            self._tables = None  # never two blocks at once
            self._tables = (layer, self._make_tables(layer))
        return self._entry(layer, lanes, self._tables[1])

    @abstractmethod
    def _make_tables(self, layer: int) -> object: ...

    @abstractmethod
    def _entry(self, layer: int, lanes: Lanes, tables: object) -> Entry: ...

    def attention(self, layer: int) -> Attention:
        """The attention whose site is patched."""
        return getattr(self.base.block(layer), self.site.sublayer)

    @property
    def stage(self) -> str:
        """Which sum of the residual stream this attention writes to."""
        return "resid_mid_cross" if self.site.sublayer == "cross_attn" else "resid_mid"

    # ---------------------------------------------------------------- shared steps

    def _base(self, layer: int, *names: str) -> list[Tensor]:
        """Activations of the base run, by their names in a block."""
        held = self.base.at(layer, names)
        return [held[name] for name in names]

    def _onwards(
        self, layer: int, values: Float[Tensor, "m d"], prompts: Int[Tensor, " m"]
    ) -> Float[Tensor, "m d"]:
        """The rest of a block for packed rows of the stream that its attention has written to."""
        context = PackedRows.of(self.base, prompts)
        return self.base.block(layer).onwards(self.stage, values[None], context)[0]

    def _read(self, where: Bool[Tensor, "n t"], row: Tensor, entered: int) -> Bool[Tensor, "n t"]:
        """Without the rows that nobody reads any more."""
        if entered < self.base.n_layers or self.demanded is None:
            return where
        return where & self.demanded[row]

    def _changed_rows(
        self, lanes: Lanes, differs: Bool[Tensor, "b t"] | Bool[Tensor, "b t u"], entered: int
    ) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
        """Lane and position of every patched row whose activation differs in the source."""
        by_lane = differs[lanes.row] if lanes.unit is None else _of_unit(differs, lanes)
        where = self._read(lanes.where & by_lane, lanes.row, entered)
        return where.nonzero(as_tuple=True)


# -------------------------------------------------------------------------------- whole rows


@dataclass
class _Table:
    """New rows of the residual stream entering a block, whatever the window."""

    layer: int
    values: Float[Tensor, "b t d"]
    differs: Bool[Tensor, "b t"]
    projected: Projected | None


class RowChanges(Changes):
    """Sites whose new rows depend on the position alone: streams, outputs, all units at once."""

    def _make_tables(self, layer: int) -> _Table:
        if self.site.sublayer:
            return self._table(layer + 1, *self._written(layer))
        new = self.source.at(layer, self.site.local_hook)
        (old,) = self._base(layer, self.site.local_hook)
        differs = (new != old).any(-1)
        if self.site.last == "resid_pre":
            return self._table(layer, new, differs)
        return self._table(layer + 1, self._behind(layer, new), differs)

    def _table(self, layer: int, values: Tensor, differs: Tensor) -> _Table:
        is_block = layer < self.base.n_layers
        projected = self.base.projected(layer, values) if is_block else None
        return _Table(layer, values, differs, projected)

    def _behind(self, layer: int, new: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The stream behind the block, from new values of the site."""
        block, context = self.base.block(layer), self.base.context
        if self.site.last == "mlp_out":
            return block.after_mlp(*self._base(layer, f"hook_{block.mlp_stage}"), new)
        if self.site.last == "attn_out":
            return block.onwards("resid_mid", self.base.residuals[layer] + new, context)
        if self.site.last == "cross_attn_out":
            (resid_mid,) = self._base(layer, "hook_resid_mid")
            return block.onwards("resid_mid_cross", resid_mid + new, context)
        return block.onwards(self.site.last, new, context)

    def _written(self, layer: int) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"]]:
        """The stream behind the block with what all units now write, and where that is new."""
        block = self.base.block(layer)
        if self.site.sublayer == "mlp":
            delta = _neuron_delta(self, layer)
            resid, mlp_out = self._base(layer, f"hook_{block.mlp_stage}", "hook_mlp_out")
            values = block.after_mlp(resid, mlp_out + F.linear(delta, block.mlp.W_out.T))
        else:
            delta = _head_delta(self, layer)
            is_result, attn = self.site.last == "result", self.attention(layer)
            written = delta.sum(2) if is_result else torch.einsum("bthe,hed->btd", delta, attn.W_O)
            (stream,) = self._base(layer, f"hook_{self.stage}")
            values = block.onwards(self.stage, stream + written, self.base.context)
        return values, (delta != 0).flatten(2).any(-1)

    def _entry(self, layer: int, lanes: Lanes, tables: _Table) -> Entry:
        lane, position = self._changed_rows(
            Lanes(lanes.row, lanes.where, None), tables.differs, tables.layer
        )
        at = lanes.row[lane], position
        projected = tables.projected and tuple(x[at] for x in tables.projected)
        return Entry(tables.layer, lane, position, tables.values[at], projected)


# -------------------------------------------------------------------------------- single units


class UnitChanges(Changes):
    """Single heads or neurons whose new output depends on the position alone."""

    def _make_tables(self, layer: int) -> tuple[Tensor, Bool[Tensor, "b t u"], list[Tensor]]:
        if self.site.sublayer == "mlp":
            delta, stage = _neuron_delta(self, layer), self.base.block(layer).mlp_stage
            return delta, delta != 0, self._base(layer, f"hook_{stage}", "hook_mlp_out")
        delta = _head_delta(self, layer)
        return delta, (delta != 0).any(-1), self._base(layer, f"hook_{self.stage}")

    def _entry(self, layer: int, lanes: Lanes, tables: tuple) -> Entry:
        delta, differs, streams = tables
        lane, position = self._changed_rows(lanes, differs, layer + 1)
        row, unit = lanes.row[lane], lanes.unit[lane]
        *before, last = (stream[row, position] for stream in streams)
        last = last + self._write(layer, delta[row, position, unit], unit)
        if before:
            values = self.base.block(layer).after_mlp(before[0][None], last[None])[0]
        else:
            values = self._onwards(layer, last, row)
        return Entry(layer + 1, lane, position, values)

    def _write(self, layer: int, delta: Tensor, unit: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        if self.site.last == "result":
            return delta
        if self.site.sublayer == "mlp":
            return delta[:, None] * self.base.block(layer).mlp.W_out[unit]
        return write_heads(self.attention(layer), delta, unit)


def write_heads(
    attn: Attention, z: Float[Tensor, "m e"], head: Int[Tensor, " m"]
) -> Float[Tensor, "m d"]:
    """What each row's head writes to the residual stream."""
    W_O = attn.W_O
    written = z.new_empty(len(z), W_O.shape[-1])
    for h in head.unique().tolist():
        own = head == h
        written[own] = z[own] @ W_O[h]
    return written


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
    mlp, new = of.base.block(layer).mlp, of.source.at(layer, of.site.local_hook)
    is_gated = isinstance(mlp, GatedMLP)
    names = ["mlp.hook_post", *(["mlp.hook_pre", "mlp.hook_pre_linear"] if is_gated else [])]
    held = of.base.at(layer, names)
    if of.site.last == "pre":
        new = mlp.act(new) * (held["mlp.hook_pre_linear"] if is_gated else 1)
    elif of.site.last == "pre_linear":
        new = mlp.act(held["mlp.hook_pre"]) * new
    return new - held["mlp.hook_post"]


# -------------------------------------------------------------------------------- keys and values


@dataclass
class _Attended:
    """What an attention saw in the base run, and the source's keys and values."""

    q: Float[Tensor, "b t h e"]
    z: Float[Tensor, "b t h e"]
    stream: Float[Tensor, "b t d"]
    base: tuple[Tensor, Tensor]
    new: tuple[Tensor, Tensor]
    bias: Float[Tensor, "b h q k"] | None


class KeyChanges(Changes):
    """Keys and values: what a window holds changes what every later query finds."""

    def _make_tables(self, layer: int) -> _Attended:
        attn, prefix = self.attention(layer), self.site.sublayer
        z, stream = self._base(layer, f"{prefix}.hook_z", f"hook_{self.stage}")
        if attn.is_cross:
            (q,) = self._base(layer, "cross_attn.hook_q")
        else:
            q = self.base.projected(layer, self.base.residuals[layer])[0]
        k, v = self.base.keys_values(attn)
        new = self.source.at(layer, self.site.local_hook)
        if self.site.last == "k":
            new = attn.rotated_keys(new, self.base.context.rotary)
        new = (k, new) if self.site.last == "v" else (new, v)
        return _Attended(q, z, stream, (k, v), new, self.base.bias(attn, layer))

    def _entry(self, layer: int, lanes: Lanes, tables: _Attended) -> Entry:
        attn = self.attention(layer)
        where = lanes.where & self._differs(lanes, tables)
        patched = where.any(-1).nonzero()[:, 0]
        some = Lanes(lanes.row[patched], where[patched], _at(lanes.unit, patched))
        read = self._reach(attn, some, tables.z.shape[1])
        read = self._read(read, some.row, layer + 1)
        lane, position = read.nonzero(as_tuple=True)
        if len(lane) == 0:
            return Entry(layer + 1, lane, position, tables.stream[lane, position])
        first = int(position.min())
        z = self._attend(attn, some, tables, first)[lane, position - first]
        row = some.row[lane]
        old = self._heads(attn, tables.z, some)[lane, position]
        written = self._write(attn, z - old, None if some.unit is None else some.unit[lane])
        values = tables.stream[row, position] + written
        values = self._onwards(layer, values, row)
        return Entry(layer + 1, patched[lane], position, values)

    def _differs(self, lanes: Lanes, tables: _Attended) -> Bool[Tensor, "n s"]:
        """Where the source's keys or values of the lane's head are other ones."""
        found = torch.zeros_like(lanes.where)
        for new, old in zip(tables.new, tables.base, strict=True):
            if new is not old:
                differs = (new != old).any(-1)
                whole = lanes.unit is None
                found |= differs.any(-1)[lanes.row] if whole else _of_unit(differs, lanes)
        return found

    def _reach(self, attn: Attention, lanes: Lanes, n_queries: int) -> Bool[Tensor, "n t"]:
        """The queries that can see a patched key."""
        if not attn.causal:
            return lanes.where.new_ones(len(lanes.row), n_queries)
        return lanes.where.cummax(-1).values

    def _attend(
        self, attn: Attention, lanes: Lanes, tables: _Attended, first: int
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
        self, attn: Attention, lanes: Lanes, bias: Tensor | None, first: int
    ) -> Float[Tensor, "n g t2 k"] | None:
        """What is added to the scores of the lanes' heads."""
        if bias is None:
            return None
        return self._heads(attn, bias.transpose(1, 2), lanes).transpose(1, 2)[:, :, first:]

    def _allowed(self, attn: Attention, lanes: Lanes, first: int) -> Tensor | None:
        allowed = self.base.context.memory_allowed if attn.is_cross else self.base.context.allowed
        if allowed is not None:
            own = allowed[lanes.row] if len(allowed) > 1 else allowed
            return own[:, :, first if allowed.shape[2] > 1 else 0 :]
        if attn.is_cross:
            return None
        n_keys = lanes.where.shape[1]
        return causal_mask(n_keys - first, n_keys, lanes.row.device) if attn.causal else None

    def _heads(self, attn: Attention, x: Float[Tensor, "b t h _"], lanes: Lanes) -> Tensor:
        """The query heads that a lane's key-value head serves, ``n t g _``."""
        if lanes.unit is None:
            return x[lanes.row]
        grouped = x.unflatten(2, (attn.n_key_value_heads, attn.group))
        return grouped[lanes.row, :, lanes.unit]

    def _write(
        self, attn: Attention, delta: Float[Tensor, "m g e"], unit: Int[Tensor, " m"] | None
    ) -> Float[Tensor, "m d"]:
        if unit is None:
            return torch.einsum("mhe,hed->md", delta, attn.W_O)
        heads = (
            unit[:, None] * attn.group + torch.arange(attn.group, device=unit.device)
        ).flatten()
        return write_heads(attn, delta.flatten(0, 1), heads).unflatten(0, delta.shape[:2]).sum(1)


def _at(unit: Tensor | None, index: Tensor) -> Tensor | None:
    return None if unit is None else unit[index]


def _of_unit(x: Bool[Tensor, "b s u"], lanes: Lanes) -> Bool[Tensor, "n s"]:
    """Every lane's row and unit."""
    steps = torch.arange(x.shape[1], device=x.device)
    return x[lanes.row[:, None], steps, lanes.unit[:, None]]


def _of_head(x: Float[Tensor, "b s kv e"], lanes: Lanes) -> Float[Tensor, "n s kv2 e"]:
    """The lanes' own key-value heads; all of them where no unit is named."""
    return x[lanes.row] if lanes.unit is None else x[lanes.row, :, lanes.unit][:, :, None]


def is_entered(site: Site, block: Block) -> bool:
    """Whether patches of a block's site are known to be changes of its residual stream."""
    if site.sublayer:
        return site.sublayer in ("attn", "cross_attn") or type(block.mlp) in (MLP, GatedMLP)
    return site.last in (*_ADDED, *_STAGES)


def kept_for(site: Site, block: Block) -> tuple[list[str], list[str]]:
    """What to hold of every block, of the base run and of the source, so that no block runs twice.

    Patterns, scores, results and neurons are too large for that: those are made block by block.
    """
    if site.reads_attention or site.sublayer == "mlp" or site.last == "result":
        return [], []
    if not site.sublayer:
        is_held = site.last in ("resid_pre", block.last_stage)
        own = [] if is_held else [site.local_hook]
        of_stream = {"cross_attn_out": "resid_mid", "mlp_out": block.mlp_stage}
        return [*own, *(f"hook_{of_stream[n]}" for n in [site.last] if n in of_stream)], own
    prefix = site.sublayer
    stage = "hook_resid_mid_cross" if prefix == "cross_attn" else "hook_resid_mid"
    is_memory = prefix == "cross_attn" and site.last in KEYS
    asked = ["cross_attn.hook_q"] if is_memory else []
    return [f"{prefix}.hook_z", stage, *asked], [] if is_memory else [site.local_hook]


def changes_of(
    site: Site,
    base: Trace,
    source: Source,
    by_unit: bool,
    demanded: Bool[Tensor, "b t"] | None = None,
) -> Changes:
    """The changes of a site, unit by unit or all units at once."""
    if site.last in KEYS:
        return KeyChanges(site, base, source, demanded)
    return (UnitChanges if by_unit else RowChanges)(site, base, source, demanded)
