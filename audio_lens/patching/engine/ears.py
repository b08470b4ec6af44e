"""Runs of what hears, the encoder and ears beside it, and what they send on to the connector.

A connector may read the streams of several blocks of the encoder. A run that starts behind such a
block still needs its stream: it stands before the residual stream, side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.inputs import AudioInputs
from audio_lens.models.layers import Context
from audio_lens.models.loading.placement import moved
from audio_lens.patching.engine.trace import Trace, stack_of

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer


def ear_run(
    model: HookedAudioTransformer, part: str, inputs: AudioInputs, keep: Sequence[str] = ()
) -> Trace:
    """The run of an ear, cut to the positions that can matter.

    Args:
        keep: local names of activations to hold for every block.
    """
    return Trace.of(
        model, part, entrance(model, part, inputs), ear_context(model, part, inputs), keep
    )


def ear_context(model: HookedAudioTransformer, part: str, inputs: AudioInputs) -> Context:
    """What the blocks of an ear need beside the residual stream, cut to what can matter."""
    ear, own = model.heard_by(part, moved(inputs, model.device_of("encoder")))
    reach, context = _reach(model, part, inputs), ear.encoder_context(own)
    allowed, rotary, bias = context.allowed, context.rotary, context.position_bias
    return replace(
        context,
        allowed=None if allowed is None else allowed[..., :reach, :reach],
        rotary=None if rotary is None else (rotary[0][:, :reach], rotary[1][:, :reach]),
        position_bias=None if bias is None else bias[:, :reach, :reach],
    )


def entrance(
    model: HookedAudioTransformer, part: str, inputs: AudioInputs
) -> Float[Tensor, "segments t d"]:
    """The residual stream entering an ear's first block."""
    ear, own = model.heard_by(part, moved(inputs, model.device_of("encoder")))
    return ear.enter_encoder(own)[:, : _reach(model, part, inputs)]


def _reach(model: HookedAudioTransformer, part: str, inputs: AudioInputs) -> int:
    """How many of an ear's positions can matter: all, of one beside the encoder."""
    if part == "encoder":
        return model.encoder_reach(inputs)
    ear, own = model.heard_by(part, inputs)
    return ear.encoder_length(own)


# -------------------------------------------------------------------------------- what is sent on


def sent_from(model: HookedAudioTransformer, part: str) -> tuple[int, ...]:
    """The blocks of an ear whose streams are sent on."""
    return model.sent_from if part == "encoder" else (model.cfg.parts[part].n_layers - 1,)


def sent_before(model: HookedAudioTransformer, part: str, layer: int) -> list[int]:
    """Those of them that lie before a block; what leaves the last one is the stream itself."""
    return [block for block in sent_from(model, part)[:-1] if block < layer]


def entering(
    model: HookedAudioTransformer,
    part: str,
    residuals: Sequence[Float[Tensor, "b t d"]],
    layer: int,
) -> Float[Tensor, "b t sd"]:
    """What a run that starts at a block begins with.

    Args:
        residuals: the residual stream entering every block up to this one.
    """
    before = [residuals[block + 1] for block in sent_before(model, part, layer)]
    return _side_by_side([*before, residuals[min(layer, sent_from(model, part)[-1] + 1)]])


def sent_onwards(
    model: HookedAudioTransformer,
    part: str,
    begun: Float[Tensor, "b t begun_d"],
    context: Context,
    start: int = 0,
) -> Float[Tensor, "b t sd"]:
    """The streams that an ear sends on, from what enters a block."""
    stack = stack_of(model, part)
    *sent, resid = begun.split(stack.cfg.d_model, dim=-1)
    for block in sent_from(model, part)[len(sent) :]:
        resid = stack.run_blocks(resid, context, start, block + 1)
        start = max(start, block + 1)
        sent.append(resid)
    return _side_by_side(sent)


def _side_by_side(streams: Sequence[Float[Tensor, "b t d"]]) -> Float[Tensor, "b t sd"]:
    """Streams of blocks that may lie on several devices."""
    first, *others = streams
    return torch.cat([first, *(x.to(first.device) for x in others)], dim=-1) if others else first


def given_by(
    model: HookedAudioTransformer, part: str, sent: Float[Tensor, "b t sd"]
) -> Float[Tensor, "b t sd"]:
    """What an ear gives, as `send_heard` takes it, by the streams that it sends on."""
    return sent if part == "encoder" else stack_of(model, part).finish(sent)


def given_beside(
    model: HookedAudioTransformer, inputs: AudioInputs, part: str
) -> dict[str, Float[Tensor, "b t sd"]]:
    """What all ears give but one."""
    given = {}
    for name in model.cfg.is_heard_in:
        if name != part:
            begun, context = entrance(model, name, inputs), ear_context(model, name, inputs)
            given[name] = given_by(model, name, sent_onwards(model, name, begun, context))
    return given
