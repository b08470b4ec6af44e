"""The edges between what writes and what reads, and runs in which only some of them are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from fancy_einsum import einsum
from jaxtyping import Bool, Float
from torch import Tensor, nn

from audio_lens.analysis.paths.nodes import (
    AUDIO,
    LOGITS,
    MLP,
    TEXT,
    Nodes,
    Receiver,
    Sender,
)
from audio_lens.analysis.paths.streams import Streams
from audio_lens.combining import Either, Without
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.models import HookedAudioTransformer
from audio_lens.models.layers import Attention, Block, Context
from audio_lens.places import AUDIO as AUDIO_PLACE
from audio_lens.timeline import Span

Edge = tuple[str, str]  # a sender and a receiver


@dataclass(frozen=True, eq=False)
class Graph:
    """Everything that writes, everything that reads, and the edges between them.

    Attributes:
        nodes: of the model.
        windows: stretches of the clip, in seconds, that are senders of their own.

    Raises:
        InputError: a decoder that hears by cross-attention.
    """

    nodes: Nodes
    windows: tuple[Span, ...] = ()

    @staticmethod
    def of(model: HookedAudioTransformer, windows: Sequence[Span] = ()) -> Graph:
        nodes = Nodes(model)
        if nodes.is_crossed:
            raise InputError(
                f"edges are scored where audio enters the residual stream, and {model.cfg.family} "
                "hears by cross-attention: use path, whose senders are its heads (L0C0)"
            )
        return Graph(nodes, tuple(windows))

    @cached_property
    def senders(self) -> list[Sender]:
        """In the order of the run."""
        blocks = [one for one in self.nodes.all() if one.stage]
        return [*self._entering, *blocks]

    @property
    def _entering(self) -> list[Sender]:
        if not self.windows:
            return [Sender(AUDIO), Sender(TEXT)]
        known = self.windows[0]
        for window in self.windows[1:]:
            known = Either(known, window)
        stretches = [
            Sender(AUDIO, where=window, label=f"audio {window.start_s:.2f}-{window.end_s:.2f} s")
            for window in self.windows
        ]
        rest = Sender(AUDIO, where=Without(AUDIO_PLACE, known), label=AUDIO)
        return [*stretches, rest, Sender(TEXT)]

    @cached_property
    def receivers(self) -> list[Receiver]:
        """In the order of the run."""
        return self.nodes.receivers()

    @cached_property
    def exists(self) -> Bool[Tensor, "s r"]:
        """Whether a sender writes before a receiver reads."""
        sent, read = (
            torch.tensor([node.stage for node in some]) for some in (self.senders, self.receivers)
        )
        return sent[:, None] < read

    def edges(self, kept: Bool[Tensor, "s r"] | None = None) -> list[Edge]:
        """Edges by name; all, where none are given."""
        places = (self.exists if kept is None else kept & self.exists).nonzero().tolist()
        return [(self.senders[s].name, self.receivers[r].name) for s, r in places]

    def mask(self, edges: Sequence[Edge]) -> Bool[Tensor, "s r"]:
        """Where edges are.

        Raises:
            InputError: an edge that the model does not have.
        """
        rows = {sender.name: n for n, sender in enumerate(self.senders)}
        columns = {receiver.name: n for n, receiver in enumerate(self.receivers)}
        kept = torch.zeros_like(self.exists)
        for sender, receiver in edges:
            if sender not in rows or receiver not in columns:
                raise InputError(f"this model has no edge {sender} -> {receiver}")
            kept[rows[sender], columns[receiver]] = True
        if (kept & ~self.exists).any():
            odd = self._named((kept & ~self.exists).nonzero()[0].tolist())
            raise InputError(f"no edge runs backwards: {odd}")
        return kept

    def _named(self, place: Sequence[int]) -> str:
        return f"{self.senders[place[0]]} -> {self.receivers[place[1]]}"

    # ---------------------------------------------------------------- what hangs together

    @cached_property
    def feeds(self) -> Bool[Tensor, "r s"]:
        """Whether what a receiver reads goes into what a sender writes."""
        found = torch.zeros(len(self.receivers), len(self.senders), dtype=torch.bool)
        for r, receiver in enumerate(self.receivers):
            for s, sender in enumerate(self.senders):
                found[r, s] = self._is_of(receiver, sender)
        return found

    def _is_of(self, receiver: Receiver, sender: Sender) -> bool:
        if (receiver.kind, receiver.layer) != (sender.kind, sender.layer):
            return False
        if receiver.kind == MLP or receiver.side == "q":
            return receiver.head in (-1, sender.head)
        return sender.head // self.nodes.blocks[sender.layer].attn.group == receiver.head

    def connected(self, kept: Bool[Tensor, "s r"]) -> Bool[Tensor, "s r"]:
        """The edges that lie on some way from what enters to the logits."""
        kept = kept & self.exists
        reached = torch.tensor([sender.stage == 0 for sender in self.senders])
        useful = torch.tensor([receiver.kind == LOGITS for receiver in self.receivers])
        for _ in range(3 * len(self.nodes.blocks) + 1):
            arrives = (kept & reached[:, None]).any(0)
            reached = reached | (self.feeds & arrives[:, None]).any(0)
            leads = (kept & useful).any(1)
            useful = useful | (self.feeds & leads).any(1)
        return kept & reached[:, None] & useful

    # ---------------------------------------------------------------- runs

    @torch.no_grad()
    def run(
        self, streams: Streams, inputs: AudioInputs, kept: Bool[Tensor, "s r"]
    ) -> Float[Tensor, "b t d"]:
        """The last residual stream of a run in which every receiver reads a sum of its own.

        Over kept edges it reads what the sender writes in this run; over all others, what the
        sender writes in the run that ``streams`` looks at. What enters is the other run's.
        """
        sent: list[Tensor] = [streams.change(one) for one in self.senders if one.stage == 0]
        share = kept.T.to(sent[0])  # r s
        model = self.nodes.model
        with model.running(inputs):
            context = model.decoder_context(inputs, None)
            first = 0
            for layer, block in enumerate(self.nodes.blocks):
                count = block.attn.n_heads + 2 * block.attn.n_key_value_heads
                read = self._read(streams, first, count, share, sent)
                sent += self._heads(streams, layer, block, read, context)
                (resid,) = self._read(streams, first + count, 1, share, sent)
                before = streams.own[f"decoder.blocks.{layer}.hook_mlp_out"]
                sent.append(block.mlp(block.ln2(resid)) - before)
                first += count + 1
        return self._read(streams, first, 1, share, sent)[0]

    def _read(
        self,
        streams: Streams,
        first: int,
        count: int,
        share: Float[Tensor, "r s"],
        sent: Sequence[Float[Tensor, "b t d"]],
    ) -> Float[Tensor, "count b t d"]:
        """What receivers of one stage read."""
        own = share[first : first + count, : len(sent)]
        added = einsum("r s, s b t d -> r b t d", own, torch.stack(list(sent)))
        return streams.stream(self.receivers[first]) + added

    def _heads(
        self,
        streams: Streams,
        layer: int,
        block: Block,
        read: Float[Tensor, "r b t d"],
        context: Context,
    ) -> list[Float[Tensor, "b t d"]]:
        """How what the heads of a block write differs from the run that is looked at."""
        attn, x = block.attn, block.ln1(read)
        given = []
        for part, linear in zip(x.split(sizes_of(attn)), linears_of(attn), strict=True):
            weight = linear.weight.reshape(len(part), attn.d_head, -1)
            made = einsum("h b t d, h e d -> b t h e", part, weight)
            bias = linear.bias
            given.append(made if bias is None else made + bias.reshape(len(part), attn.d_head))
        q, k, v = given
        q = attn.rotated_queries(q, context.rotary)
        k = attn.rotated_keys(k, context.rotary)
        z = attn.mix(q, k, v, context.allowed)
        change = z - streams.own[f"decoder.blocks.{layer}.attn.hook_z"]
        return [change[:, :, head] @ attn.W_O[head].to(z) for head in range(attn.n_heads)]


def sizes_of(attn: Attention) -> list[int]:
    """How many heads queries, keys and values have."""
    return [attn.n_heads, attn.n_key_value_heads, attn.n_key_value_heads]


def linears_of(attn: Attention) -> list[nn.Linear]:
    """What makes queries, keys and values of a normed stream."""
    return [cast(nn.Linear, one) for one in (attn.q_proj, attn.k_proj, attn.v_proj)]
