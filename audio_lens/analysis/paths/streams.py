"""What two runs wrote to the residual stream, and what of it arrives where the rest is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens import edits, places
from audio_lens.analysis.paths.nodes import (
    AUDIO,
    CROSS,
    EMBED,
    ENTERING,
    HEAD,
    LOGITS,
    MLP,
    TEXT,
    Nodes,
    Receiver,
    Sender,
)
from audio_lens.edits import Edit
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.models.layers import Attention
from audio_lens.patching.engine.trace import crosses_of

_ATTENTION = {HEAD: "attn", CROSS: "cross_attn"}


def _point(layer: int, name: str) -> str:
    return f"decoder.blocks.{layer}.{name}"


@dataclass(eq=False)
class Streams:
    """The residual stream of one run at every stage, and how another run's writes differ.

    All is position by position: `at` keeps some positions of every row.

    Attributes:
        nodes: of the model.
        inputs: of the run that is looked at.
        own: activations of that run, by hook point.
        other: those of the other run.
        rows: the positions that were kept; None for all.
    """

    nodes: Nodes
    inputs: AudioInputs
    own: dict[str, Float[Tensor, "b t *_"]]
    other: dict[str, Float[Tensor, "b t *_"]]
    rows: Int[Tensor, "b r"] | None = None
    masks: dict[str, Bool[Tensor, "b t"]] = field(default_factory=dict)

    @staticmethod
    @torch.no_grad()
    def of(nodes: Nodes, inputs: AudioInputs, other: AudioInputs) -> Streams:
        """Of two runs of inputs of one layout.

        Raises:
            InputError: hooks or edits in force, which would act in the frozen runs as well.
        """
        model = nodes.model
        if model.list_hooks(dir="fwd"):
            raise InputError("paths are followed in the model as it is: take hooks and edits off")
        names = _names(nodes)
        own, its = (
            model.run_with_cache(one, names_filter=names, return_cache_object=False)[1]
            for one in (inputs, other)
        )
        return Streams(nodes, inputs, own, its)

    def at(self, positions: Int[Tensor, "b r"]) -> Streams:
        """The same at some positions of every row."""
        prompts = torch.arange(len(positions), device=positions.device)[:, None]
        own, other = (
            {name: x[prompts, positions] for name, x in run.items()}
            for run in (self.own, self.other)
        )
        return Streams(self.nodes, self.inputs, own, other, positions)

    # ---------------------------------------------------------------- what is there

    @cached_property
    def nothing(self) -> Float[Tensor, "b t d"]:
        return torch.zeros_like(self.own[_point(0, "hook_resid_pre")])

    def stream(self, receiver: Receiver) -> Float[Tensor, "b t d"]:
        """The residual stream that a receiver reads."""
        return self.own[_stream_name(self.nodes, receiver)]

    def change_of(self, receiver: Receiver) -> Float[Tensor, "b t d"]:
        """How the stream that a receiver reads differs in the other run."""
        name = _stream_name(self.nodes, receiver)
        return self.other[name] - self.own[name]

    def attention(self, node: Sender | Receiver) -> Attention:
        block = self.nodes.blocks[node.layer]
        return block.attn if node.kind == HEAD else crosses_of(block)[0]

    def change(self, sender: Sender) -> Float[Tensor, "b t d"]:
        """What a sender writes in the other run, less what it writes in this one."""
        if sender.kind in ENTERING:
            name = _point(0, "hook_resid_pre")
            entered = self.other[name] - self.own[name]
            if sender.kind == EMBED and sender.where is None:
                return entered
            return entered * self._mask(sender)[..., None]
        if sender.kind == MLP:
            name = _point(sender.layer, "hook_mlp_out")
            return self.other[name] - self.own[name]
        name = _point(sender.layer, f"{_ATTENTION[sender.kind]}.hook_z")
        z = self.other[name][:, :, sender.head] - self.own[name][:, :, sender.head]
        return z @ self.attention(sender).W_O[sender.head].to(z)

    def _mask(self, sender: Sender) -> Bool[Tensor, "b t"]:
        if sender.name not in self.masks:
            model = self.nodes.model
            where = sender.where if sender.where is not None else "audio"
            if sender.where is None and sender.kind == TEXT:
                where = ~places.AUDIO
            if sender.where is not None and sender.kind in (AUDIO, TEXT):
                named = places.AUDIO if sender.kind == AUDIO else ~places.AUDIO
                where = _both(sender.where, named)
            mask = places.locate(model, self.inputs, "decoder.resid_pre", where)
            self.masks[sender.name] = mask if self.rows is None else mask.gather(1, self.rows)
        return self.masks[sender.name]

    # ---------------------------------------------------------------- what arrives

    def arriving(
        self, senders: Sequence[Sender], receivers: Sequence[Receiver], strict: bool
    ) -> dict[Receiver, Float[Tensor, "b t d"]]:
        """How the streams that receivers read change, when senders give what the other run's do.

        All other heads give what they give in this run, and so do the MLPs if ``strict``; else
        they follow. Nothing moves between positions then, so that no block has to run.
        """
        waiting = sorted(receivers, key=lambda receiver: receiver.stage)
        sending = sorted(senders, key=lambda sender: sender.stage)
        found, delta, stage = {}, self.nothing, 0
        while waiting:
            while waiting and waiting[0].stage == stage:
                found[waiting.pop(0)] = delta
            own = []
            while sending and sending[0].stage == stage:
                own.append(sending.pop(0))
            layer, sublayer = divmod(stage - 1, 3)
            follows = (
                not strict and stage and sublayer == 2 and not own and delta is not self.nothing
            )
            for sender in own:
                delta = delta + self.change(sender)
            if follows and waiting:
                delta = delta + self._followed(layer, delta)
            stage += 1
        return found

    def _followed(self, layer: int, delta: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """How an MLP's output changes with what it reads."""
        block = self.nodes.blocks[layer]
        before = self.own[_point(layer, f"hook_{block.mlp_stage}")]
        return block.mlp(block.ln2(before + delta)) - self.own[_point(layer, "hook_mlp_out")]

    def edit(self, receiver: Receiver, delta: Float[Tensor, "b t d"]) -> Edit:
        """The edit that gives a receiver a changed stream to read, and nobody else."""
        block, layer = self.nodes.blocks[receiver.layer], receiver.layer
        resid = self.stream(receiver) + delta
        if receiver.kind == MLP:
            put = edits.Put(block.mlp(block.ln2(resid)))
            return Edit("decoder.mlp_out", put, layer=layer)
        attn: Any = self.attention(receiver)
        norm: Any = block.ln_cross if receiver.kind == CROSS else block.ln1
        x = norm(resid)
        given = (
            attn.queries(x)
            if receiver.side == "q"
            else attn.keys_values(x)["kv".index(receiver.side)]
        )
        site = f"decoder.{_ATTENTION[receiver.kind]}.{receiver.side}"
        return Edit(site, edits.Put(given), layer=layer, head=receiver.head)


def _both(one: Any, other: Any) -> Any:
    """Where two places overlap."""
    return places.Without(one, places.Outside(other))


def _stream_name(nodes: Nodes, receiver: Receiver) -> str:
    if receiver.kind == LOGITS:
        return _point(receiver.layer - 1, "hook_resid_post")
    stage = "resid_pre"
    if receiver.kind == MLP:
        stage = nodes.blocks[receiver.layer].mlp_stage
    if receiver.kind == CROSS:
        stage = "resid_mid"
    return _point(receiver.layer, f"hook_{stage}")


def _names(nodes: Nodes) -> list[str]:
    """The activations that are kept of a run."""
    found = {_stream_name(nodes, receiver) for receiver in nodes.receivers()}
    for layer, block in enumerate(nodes.blocks):
        found |= {_point(layer, "attn.hook_z"), _point(layer, "hook_mlp_out")}
        if crosses_of(block):
            found.add(_point(layer, "cross_attn.hook_z"))
    return sorted(found)
