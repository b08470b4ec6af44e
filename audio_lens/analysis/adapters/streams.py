"""Streams of a part, and what holds beside a model with its adapter: the same without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.adapters.groups import n_blocks
from audio_lens.inputs import AudioInputs
from audio_lens.models import HookedAudioTransformer
from audio_lens.models.loading.lora import LoraLinear

NO_ADAPTER = "no_adapter"
Found = TypeVar("Found")


def part_to_read(model: HookedAudioTransformer, part: str | None) -> str:
    """A part with blocks; None takes the encoder, or else the decoder.

    Raises:
        InputError: another part, or one without blocks.
    """
    if part is None:
        encoder = model.cfg.encoder
        part = "encoder" if encoder is not None and encoder.n_layers > 0 else "decoder"
    n_blocks(model, part)
    return part


def stages_of(model: HookedAudioTransformer, part: str) -> list[str]:
    """The stage of every block that the next one reads."""
    return [str(block.last_stage) for block in model.part(part).blocks]


@torch.no_grad()
def kept(
    model: HookedAudioTransformer, inputs: AudioInputs, part: str, names: Sequence[str]
) -> dict[str, Tensor]:
    """Activations of a part; nothing runs behind an encoder."""
    stop = f"encoder.{model.cfg.need_encoder.n_layers}" if part == "encoder" else None
    _, cache = model.run_with_cache(
        inputs,
        names_filter=list(names),
        stop_at_layer=stop,
        return_type=None,
        return_cache_object=False,
    )
    return {name: cache[name] for name in names}


def streams_of_part(
    model: HookedAudioTransformer, inputs: AudioInputs, part: str
) -> list[Float[Tensor, "rows t d"]]:
    """The stream that enters every block of a part, and the one that leaves the last."""
    stages = stages_of(model, part)
    names = [f"{part}.blocks.{layer}.hook_resid_pre" for layer in range(len(stages))]
    names.append(f"{part}.blocks.{len(stages) - 1}.hook_{stages[-1]}")
    return list(kept(model, inputs, part, names).values())


def is_adapted(model: HookedAudioTransformer) -> bool:
    """Whether a live adapter is on the model, and switched on."""
    return any(isinstance(one, LoraLinear) and one.enabled for one in model.modules())


def beside_none(
    model: HookedAudioTransformer, controls: bool, make: Callable[[str], Found]
) -> tuple[Found, dict[str, Found]]:
    """What is found of a model, and as a control of the same without its adapter, if it has one.

    Args:
        make: from what progress says to what is found, of the model as it is then.
    """
    own = make("")
    if not (controls and is_adapted(model)):
        return own, {}
    with model.lora_disabled():
        return own, {NO_ADAPTER: make(NO_ADAPTER)}
