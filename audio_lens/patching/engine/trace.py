"""A run kept so that others may differ from it, and where patched activations come from.

A trace holds the residual stream entering every block and the keys and values; any other
activation of a block is computed again when somebody asks, one block at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

import torch
from einops import rearrange
from fancy_einsum import einsum
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.errors import InputError
from audio_lens.hooks import HookFn, HookPoint, local_name
from audio_lens.inputs import AudioInputs
from audio_lens.models.layers import Attention, Block, Context, KVCache, Stack
from audio_lens.sites import in_blocks

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

_SPREAD = 1.5  # prompts are read together while one asks at most so many times as often


def is_known(stack: Stack) -> bool:
    """Whether all that its blocks do is what `Block` and `Attention` say, one after the other.

    Only such stacks can be taken apart; others run from block to block.
    """
    blocks = blocks_of(stack)
    attentions = [attn for block in blocks for attn in (block.attn, *crosses_of(block))]
    return (
        type(stack).run_blocks is Stack.run_blocks
        and all(type(block).forward is Block.forward for block in blocks)
        and all(type(attn).forward is Attention.forward for attn in attentions)
        and all(type(attn).mix is Attention.mix for attn in attentions)
    )


def stack_of(model: HookedAudioTransformer, part: str) -> Stack:
    """The blocks of a part and what stands around them."""
    return getattr(model, part)


def blocks_of(stack: Stack) -> list[Block]:
    """The blocks of a stack: those of a kind of their own, which `is_known` tells, too."""
    return cast("list[Block]", list(stack.blocks))


def crosses_of(block: Block) -> list[Attention]:
    """The cross-attention of a block; none where it has none."""
    cross = getattr(block, "cross_attn", None)
    return [] if cross is None else [cross]


@dataclass
class Trace:
    """A run through the blocks of one part.

    Attributes:
        part: which.
        context: masks, rotary positions, memory; its cache holds all keys and values.
        residuals: the residual stream entering every block, and the one leaving the last.
        kept: activations of every block that were asked for beforehand, by full name.
    """

    model: HookedAudioTransformer
    part: str
    context: Context
    residuals: list[Float[Tensor, "b t d"]]
    kept: dict[str, Tensor]

    @staticmethod
    def of(
        model: HookedAudioTransformer,
        part: str,
        resid: Float[Tensor, "b t d"],
        context: Context,
        keep: Sequence[str] = (),
    ) -> Trace:
        """Run every block from the residual stream entering the first.

        Args:
            keep: local names of activations to hold for every block.
        """
        context = replace(context, past=KVCache())
        residuals, kept = [resid], {}
        stack = stack_of(model, part)
        layers = range(len(stack.blocks))
        names = [f"{part}.blocks.{layer}.{name}" for layer in layers for name in keep]
        with model.hooks([(name, keeping(kept, name)) for name in names]):
            for layer in layers:
                residuals.append(stack.run_blocks(residuals[-1], context, layer, layer + 1))
        return Trace(model, part, context, residuals, kept)

    @staticmethod
    def of_decoder(
        model: HookedAudioTransformer,
        inputs: AudioInputs,
        encoded: Tensor | None,
        keep: Sequence[str] = (),
    ) -> Trace:
        """The decoder's run."""
        resid = model.enter_decoder(inputs, encoded)
        return Trace.of(model, "decoder", resid, model.decoder_context(inputs, encoded), keep)

    @property
    def stack(self) -> Stack:
        return stack_of(self.model, self.part)

    @property
    def n_layers(self) -> int:
        return len(self.stack.blocks)

    @functools.cached_property
    def _is_known(self) -> bool:
        return is_known(self.stack)

    def block(self, layer: int) -> Block:
        return cast("Block", self.stack.blocks[layer])

    @property
    def past(self) -> KVCache:
        """The keys and values of all its attentions.

        Raises:
            ValueError: where the context came without a cache; `Trace.of` gives one.
        """
        if self.context.past is None:
            raise InputError("this run kept no keys and values")
        return self.context.past

    def keys_values(self, attn: Attention) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values that this attention saw, ``b k kv e`` each.

        Raises:
            ValueError: if they were forgotten.
        """
        held = self.past.get(attn.name)
        if held is None:
            raise InputError(f"the keys and values of {attn.name} are not held")
        return held

    def projected(self, layer: int, resid: Float[Tensor, "b t d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a residual stream entering a block."""
        block = self.block(layer)
        return block.attn.project(block.reads(resid), self.context.rotary)

    def queries(self, layer: int, resid: Float[Tensor, "b t d"]) -> Float[Tensor, "b t h e"]:
        """Queries alone of a residual stream entering a block."""
        block = self.block(layer)
        q = block.attn.queries(block.reads(resid))
        return block.attn.rotated_queries(q, self.context.rotary)

    def projected_rows(
        self,
        layer: int,
        resid: Float[Tensor, "m d"],
        row: Int[Tensor, " m"],
        position: Int[Tensor, " m"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same for packed rows, ``m h e`` each."""
        block = self.block(layer)
        rotary = self.rotary_of(row, position)
        q, k, v = block.attn.project(block.reads(resid[None]), rotary)
        return q[0], k[0], v[0]

    def bias(self, attn: Attention, layer: int) -> Float[Tensor, "b h q k"] | None:
        """What is added to the scores of a block's attention."""
        if attn.is_cross:
            return None
        return attn.bias(self.block(layer).reads(self.residuals[layer]), self.context)

    def rotary_of(
        self, row: Int[Tensor, " m"], position: Int[Tensor, " m"]
    ) -> tuple[Tensor, Tensor] | None:
        """Rotary positions of packed rows."""
        if self.context.rotary is None:
            return None
        cos, sin = self.context.rotary
        at = torch.zeros_like(row) if len(cos) == 1 else row
        return cos[at, position][None], sin[at, position][None]

    def at(self, layer: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Activations of a block under its local names, ``attn.hook_z`` ..."""
        held = {"hook_resid_pre": self.residuals[layer]}
        if self._is_known:
            held[f"hook_{self.block(layer).last_stage}"] = self.residuals[layer + 1]
        for cross in crosses_of(self.block(layer)):
            k, v = self.keys_values(cross)
            held |= {"cross_attn.hook_k": k, "cross_attn.hook_v": v}
        for name in names:
            if self._full(layer, name) in self.kept:
                held[name] = self.kept[self._full(layer, name)]
        missing = [name for name in names if name not in held]
        held |= self._run_again(layer, missing) if missing else {}
        return {name: held[name] for name in names}

    def _full(self, layer: int, name: str) -> str:
        return f"{self.part}.blocks.{layer}.{name}"

    def _run_again(self, layer: int, names: Sequence[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        hooks = [(self._full(layer, name), keeping(found, name)) for name in names]
        block, resid, context = self.block(layer), self.residuals[layer], self._context_again(layer)
        is_first = type(block).forward is Block.forward and all(
            n.startswith("attn.") for n in names
        )
        with self.model.hooks(hooks):
            if is_first:  # nothing of the block but its attention is asked for
                block.attn(block.reads(resid), context)
            else:
                block(resid, context)
        return found

    def _context_again(self, layer: int) -> Context:
        """A context for running a block once more, which remembers what the memory gave."""
        crosses = crosses_of(self.block(layer))
        held = {cross.name: self.keys_values(cross) for cross in crosses}
        return replace(self.context, past=KVCache(held))

    @property
    def n_positions(self) -> int:
        return self.residuals[0].shape[1]

    @property
    def n_bytes(self) -> int:
        """Memory that is held."""
        held = [*self.residuals, *self.kept.values()]
        return sum(x.nbytes for x in held) + self.past.n_bytes

    def forget(self) -> None:
        """Drop everything that is held."""
        self.residuals.clear()
        self.kept.clear()
        self.context = replace(self.context, past=KVCache(), memory=None)

    def forget_keys_values(self) -> None:
        """Drop the keys and values of self-attention, which only a base run needs."""
        crosses = [attn for block in blocks_of(self.stack) for attn in crosses_of(block)]
        kept = {cross.name: self.keys_values(cross) for cross in crosses}
        self.context = replace(self.context, past=KVCache(kept))


def heard(encoded: Float[Tensor, "b s d"] | None) -> Float[Tensor, "b s d"]:
    """What an encoder gave, of a model that has one.

    Raises:
        ValueError: for None.
    """
    if encoded is None:
        raise InputError("nothing is heard without an encoder")
    return encoded


def keeping(kept: dict[str, Tensor], name: str) -> HookFn:
    """A hook that puts what it sees into a dict, under a name."""

    def keep(tensor: Tensor, hook: HookPoint) -> None:
        kept[name] = tensor

    keep.only_reads = True
    return keep


@runtime_checkable
class Source(Protocol):
    """Where patched activations come from."""

    def at(self, layer: int | None, name: str) -> Tensor:
        """The activation of a hook point, by its block and its name in there."""
        ...


@dataclass
class RunSource:
    """Activations of a run of the model."""

    trace: Trace

    def at(self, layer: int | None, name: str) -> Tensor:
        return self.trace.at(in_blocks(layer), [name])[name]


@dataclass
class ConnectorSource:
    """What goes into the connector and what comes out."""

    activations: Mapping[str, Tensor]

    def at(self, layer: int | None, name: str) -> Tensor:
        return self.activations[name]


@dataclass
class GivenSource:
    """Activations somebody holds, by full hook name.

    Attributes:
        like: a tensor of the model, for device and dtype.
        reach: how many of the part's positions the engine computes; None for all.
    """

    part: str
    activations: Mapping[str, Tensor]
    like: Tensor
    reach: int | None

    def at(self, layer: int | None, name: str) -> Tensor:
        path = [self.part, *([] if layer is None else ["blocks", str(layer)]), name]
        activation = self.activations[".".join(path)].to(self.like)
        if local_name(name) in ("hook_pattern", "hook_attn_scores"):
            keys = activation.shape[-1] if ".cross_attn" in f".{name}" else self.reach
            return activation[:, :, : self.reach, :keys]
        is_memory = name in ("cross_attn.hook_k", "cross_attn.hook_v")
        return activation if is_memory else activation[:, : self.reach]


@dataclass
class HeldSource:
    """Activations of another source, each fetched once."""

    activations: Mapping[tuple[int | None, str], Tensor]

    @staticmethod
    def of(source: Source, places: Iterable[tuple[int | None, str]]) -> HeldSource:
        return HeldSource({place: source.at(*place) for place in places})

    def at(self, layer: int | None, name: str) -> Tensor:
        return self.activations[layer, name]


@dataclass
class PackedRows(Context):
    """A context for rows picked from several prompts and packed into one.

    Attributes:
        prompts: that of every row.
    """

    prompts: Int[Tensor, " m"] = field(kw_only=True)

    @staticmethod
    def of(trace: Trace, prompts: Tensor) -> PackedRows:
        own = trace.context
        return PackedRows(
            memory=own.memory, memory_allowed=own.memory_allowed, past=own.past, prompts=prompts
        )

    def read(self, attn: Attention, q: Float[Tensor, "1 m h e"]) -> Float[Tensor, "1 m h e"]:
        k, v = attn.memory_keys_values(self)
        allowed = self.memory_allowed
        if len(k) == 1:
            return attn.mix(q, k, v, allowed)
        z = torch.empty_like(q)
        for group in self._alike(len(k)):
            rank = torch.full((len(k),), -1, device=group.device)
            rank[group] = torch.arange(len(group), device=group.device)
            rank = rank[self.prompts]
            order = rank.argsort(stable=True)[int((rank < 0).sum()) :]
            # prompt by prompt, each with as many places as the one with most rows
            counts = rank[order].bincount()
            first, most = counts.cumsum(0) - counts, int(counts.max())
            index = torch.arange(len(order), device=group.device)
            place = rank[order] * most + index - first[rank[order]]
            padded = q.new_zeros(len(group) * most, *q.shape[2:])
            padded[place] = q[0, order]
            asked = padded.unflatten(0, (len(group), most))
            readable = allowed if allowed is None or len(allowed) == 1 else allowed[group]
            # all of them in order are not picked: that would copy every prompt's memory
            own = (k, v) if len(group) == len(k) else (k[group], v[group])
            found = attn.mix(asked, *own, readable)
            z[0, order] = found.flatten(0, 1)[place].to(z.dtype)
        return z

    def _alike(self, n: int) -> Iterator[Int[Tensor, " g"]]:
        """The prompts that any rows are of; those with about as many are read together."""
        counts = self.prompts.bincount(minlength=n).tolist()
        left = sorted((prompt for prompt in range(n) if counts[prompt]), key=lambda p: -counts[p])
        while left:
            group = [p for p in left if counts[p] * _SPREAD >= counts[left[0]]]
            left = left[len(group) :]
            yield torch.tensor(sorted(group), device=self.prompts.device)


@dataclass
class AbsorbedMemory(Context):
    """A context whose memory differs in every row, read without forming keys and values.

    With few queries, ``(q W_K) X`` and ``(a X) W_V`` cost less than ``X W_K`` and ``X W_V``. A
    bias of the keys shifts all scores of a query alike, so softmax does not see it.
    """

    def read(self, attn: Attention, q: Float[Tensor, "b t h e"]) -> Float[Tensor, "b t h e"]:
        if q.shape[1] >= attn.d_head or attn.group > 1:
            return super().read(attn, q)
        memory = self.need_memory
        asked = einsum(
            "batch query head d_head, head d_model d_head -> batch query head d_model",
            q * attn.scale,
            attn.W_K,
        )
        scores = einsum(
            "batch query head d_model, batch key d_model -> batch query head key",
            asked,
            memory,
        )
        if self.memory_allowed is not None:
            scores = scores.masked_fill(~self.memory_allowed, -torch.inf)
        found = einsum(
            "batch query head key, batch key d_model -> batch query head d_model",
            attn.pattern_of(scores),
            memory,
        )
        z = einsum(
            "batch query head d_model, head d_model d_head -> batch query head d_head",
            found,
            attn.W_V,
        )
        bias = attn.v_proj.bias
        return z if bias is None else z + rearrange(bias, "(h e) -> h e", h=attn.n_heads)
