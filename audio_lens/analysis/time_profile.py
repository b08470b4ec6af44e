"""When each token of a Q-Former listens.

Tokens that learned queries read from the audio have no order in time: a window of the timeline
cannot name them. What each of them attends to has one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.hooks import HookPoint
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models import HookedAudioTransformer
from audio_lens.models.parts.connectors import Connector
from audio_lens.running import evaluating

_READING = re.compile(r"connector\.(?:.+\.)?blocks\.(\d+)\.cross_attn\.hook_pattern")


@torch.no_grad()
def time_profile(
    model: HookedAudioTransformer,
    inputs: AudioInputs | Mapping[str, Any],
    layer: int | None = None,
    head: int | None = None,
) -> xr.DataArray:
    """How much each token of the connector listens to each moment of its clip.

    The pattern of the connector's cross-attention, averaged over what is not chosen; where queries
    read several layers of the encoder (DeSTA), these count as much as the connector lets them.
    ``(profile * profile.time).sum("time")`` is the mean moment of every token.

    Args:
        layer: block of the connector; None averages over those that read the audio.
        head: head of its cross-attention; None averages over all.

    Returns:
        ``(clip, token, time)``, rows sum to 1. ``time`` is the centre of every position of the
        encoder in seconds, ``audio`` (clip, time) whether it holds audio or padding, which some
        encoders hear too; tokens that a clip of a batch does not have are NaN.

    Raises:
        InputError: a connector without cross-attention or without that layer or head, prompts
            without audio, or clips in several segments.
    """
    inputs = model.as_inputs(inputs)
    names = _reading_blocks(model, layer)
    if not len(inputs.features):
        raise InputError("these prompts hold no audio")
    if inputs.segments_per_clip is not None:
        raise InputError(
            f"a clip in several segments has no single profile: profile up to "
            f"{model.cfg.segment_s:g} s at a time"
        )
    n_frames, found = model.encoder_length(inputs), []
    connector = model.connector
    if not isinstance(connector, Connector):
        raise InputError(f"{model.cfg.family} carries its audio by no connector of tokens")

    def keep(pattern: Tensor, hook: HookPoint) -> None:
        rows = connector.token_pattern(_of_head(pattern, head))
        found.append(F.pad(rows, (0, n_frames - rows.shape[-1])))  # fills up, or cuts what filled

    with evaluating(model), model.hooks([(name, keep) for name in names]):
        model.encode(inputs)
    heard = torch.stack(found).mean(0)
    return _labelled(heard / heard.sum(-1, keepdim=True), model, inputs)


def _reading_blocks(model: HookedAudioTransformer, layer: int | None) -> list[str]:
    """The hook names of the patterns that are averaged."""
    matches = {name: _READING.fullmatch(name) for name in model.hook_dict}
    reading = {int(match[1]): name for name, match in matches.items() if match}
    if not reading:
        raise InputError(
            f"the connector of {model.cfg.family} has no cross-attention, and so no time profile: "
            "its timeline says where tokens lie, if they lie in time"
        )
    if layer is not None and layer not in reading:
        raise InputError(
            f"block {layer} of the connector does not read the audio; those that do: "
            f"{', '.join(map(str, reading))}"
        )
    return list(reading.values()) if layer is None else [reading[layer]]


def _of_head(pattern: Float[Tensor, "b h q k"], head: int | None) -> Float[Tensor, "b q k"]:
    if head is None:
        return pattern.mean(1)
    if not 0 <= head < pattern.shape[1]:
        raise InputError(f"no head {head}: the connector's cross-attention has {pattern.shape[1]}")
    return pattern[:, head]


def _labelled(
    heard: Float[Tensor, "clips tokens frames"], model: HookedAudioTransformer, inputs: AudioInputs
) -> xr.DataArray:
    frames = [track for row in model.timeline(inputs).rows for track in row.segments("encoder")]
    is_audio: Bool[Tensor, "clips frames"] = torch.stack([track.valid for track in frames])
    entering = model.audio_places(inputs)
    enters = torch.zeros(heard.shape[:2], dtype=torch.bool)
    enters[entering.clip.cpu(), entering.index.cpu()] = True
    heard = heard.cpu().masked_fill(~enters[..., None], torch.nan)
    return xr.DataArray(
        (heard.float() if heard.dtype == torch.bfloat16 else heard).numpy(),
        dims=("clip", "token", "time"),
        coords={
            "clip": range(len(heard)),
            "token": range(heard.shape[1]),
            "time": ("time", frames[0].seconds.numpy(), {"units": "s"}),
            "audio": (("clip", "time"), is_audio.numpy()),
        },
        name="time_profile",
    )
