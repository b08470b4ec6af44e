"""What a model makes of its final hidden states: logits, streams of them, a loss."""

from __future__ import annotations

from collections.abc import Set
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.config import TEXT
from audio_lens.models.layers import Stack
from audio_lens.models.mixins.host import Host

ReturnType = Literal["logits", "loss", "both", None]


class Writing(Host):
    """The output of a `HookedAudioTransformer`; mixed into it."""

    writes_behind: ClassVar[bool] = (
        False  # whether its further decoders read final hidden states only
    )

    @property
    def output_part(self) -> str:
        """The part that makes the output."""
        return "encoder" if self.cfg.decoder is None else "decoder"

    @property
    def output_stack(self) -> Stack:
        """The module of the part that makes the output."""
        return getattr(self, self.output_part)

    @property
    def pools(self) -> bool:
        """Whether the output is one row of logits per clip, not one per position."""
        return self.cfg.output_kind == "classes"

    def read_out(self, hidden: Float[Tensor, "b t d"], inputs: AudioInputs) -> Tensor:
        """The output of final hidden states: logits, or the states themselves without a head."""
        if self.cfg.output_kind is None:
            return hidden
        logits, divisor = self.output_stack.unembed(hidden), self.cfg.output.logits_divisor
        return logits if divisor == 1 else logits / divisor

    def read_rows(
        self,
        hidden: Float[Tensor, "m d"],
        inputs: AudioInputs,
        prompt: Int[Tensor, " m"],
        position: Int[Tensor, " m"],
    ) -> Float[Tensor, "m v"]:
        """The output of final hidden states that stand at positions of prompts of the inputs."""
        return self.read_out(hidden[None], inputs)[0]

    def _output(
        self, hidden: Float[Tensor, "b t d"], inputs: AudioInputs, return_type: ReturnType
    ) -> Any:
        logits = self.read_out(hidden, inputs)
        if self.cfg.output_kind is not None:
            logits = self.hook_logits(logits)
        elif return_type in ("loss", "both"):
            raise InputError("a bare encoder has no loss: load a checkpoint with a head")
        if return_type in ("logits", None):
            return logits if return_type else None
        loss = self.loss(logits, inputs)
        return loss if return_type == "loss" else (logits, loss)

    def loss(self, logits: Float[Tensor, "b t v"], inputs: AudioInputs) -> Float[Tensor, ""]:
        """Mean next-token cross-entropy over text that follows an attended token.

        Raises:
            InputError: if there is no such target (a prompt of one token), or several streams.
        """
        if self.cfg.streams:
            named = ", ".join(name for name, _ in self.cfg.streams)
            raise InputError(f"no loss of several streams ({named}): compare model.stream(logits)")
        is_target = inputs.attended[:, :-1] & self.is_text(inputs)[:, 1:]
        if not is_target.any():
            raise InputError("no token to predict: the loss needs at least two text tokens")
        predicted = logits[:, :-1][is_target]
        precise = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
        return F.cross_entropy(precise, inputs.tokens[:, 1:][is_target])

    def is_text(self, inputs: AudioInputs) -> Bool[Tensor, "b t"]:
        """True at attended tokens that are text."""
        return inputs.attended

    def text_of(self, inputs: AudioInputs) -> Int[Tensor, "b t"] | None:
        """What stands at every position of the decoder, as ids of the tokenizer; None for codes."""
        is_text = self.cfg.output_kind != "streams" or TEXT in dict(self.cfg.streams)
        return inputs.tokens if is_text else None

    def stream(self, logits: Float[Tensor, "*b v"], name: str) -> Float[Tensor, "*b n"]:
        """The columns of the logits that belong to one of the streams the model writes.

        Raises:
            InputError: if there is no such stream.
        """
        return logits[..., self.cfg.columns(name)]

    def written_beside(self, streams: Set[str] | None) -> tuple[str, ...]:
        """The parts beside the decoder that write some of these streams (None for all).

        None where these are written from the decoder's final hidden states.
        """
        is_plain = self.writes_behind or streams == {TEXT}
        return () if is_plain else tuple(self.cfg.further_decoders)

    def output_attended(self, inputs: AudioInputs) -> Bool[Tensor, "b t"]:
        """True at positions of the output that hold something, False at padding."""
        if self.cfg.decoder is not None:
            return inputs.attended
        if self.pools:
            return torch.ones(len(inputs), 1, dtype=torch.bool, device=inputs.device)
        rows = [row.segments("encoder")[0].valid for row in self.timeline(inputs).rows]
        return torch.stack(rows).to(inputs.device)
