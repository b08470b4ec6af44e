"""The streams of an encoder in the place of its last one: what the rest of the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from audio_lens.edits import Edit, Put, intervene
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.models import HookedAudioTransformer

LOUDNESS = 0.05  # of noise that stands for a silent clip


def check_readable(model: HookedAudioTransformer) -> None:
    """Raise unless answers or text can be read of every stream of the model's encoder.

    Raises:
        InputError: naming what the model lacks.
    """
    cfg = model.cfg
    if cfg.encoder is None:
        raise InputError(f"{cfg.family} has no encoder whose streams its decoder could read")
    if cfg.output_kind is None:
        raise InputError(f"{cfg.family} is a bare encoder here: load a checkpoint with a head")
    if cfg.output_kind == "streams":
        named = ", ".join(name for name, _ in cfg.streams)
        raise InputError(f"{cfg.family} writes {named} side by side, which the lens does not read")
    taps = getattr(getattr(model, "connector", None), "taps", ())
    if taps:
        raise InputError(
            f"the connector of {cfg.model_name or cfg.family} reads blocks "
            f"{', '.join(map(str, taps))} of the encoder together: no stream can stand for all"
        )


def n_streams(model: HookedAudioTransformer) -> int:
    """How many streams there are: what enters each block, and what leaves the last."""
    return model.cfg.need_encoder.n_layers + 1


def streams_of(
    model: HookedAudioTransformer, inputs: AudioInputs
) -> list[Float[Tensor, "segments frames d"]]:
    """The stream that enters every block of the encoder, and the one that leaves the last."""
    n_layers = model.cfg.need_encoder.n_layers
    names = [f"encoder.blocks.{layer}.hook_resid_pre" for layer in range(n_layers)]
    names.append(f"encoder.blocks.{n_layers - 1}.hook_{last_stage(model)}")
    with torch.no_grad():
        _, cache = model.run_with_cache(
            inputs,
            names_filter=names,
            stop_at_layer=f"encoder.{n_layers}",
            return_cache_object=False,
        )
    return [cache[name] for name in names]


def in_place_of_last(
    model: HookedAudioTransformer, stream: Float[Tensor, "segments frames d"]
) -> Edit:
    """The edit that lets everything behind the encoder's blocks read a stream."""
    return Edit(
        f"encoder.{last_stage(model)}", Put(stream), layer=model.cfg.need_encoder.n_layers - 1
    )


def last_stage(model: HookedAudioTransformer) -> str:
    """The stage of the last block that the encoder's end reads."""
    return str(model.part("encoder").blocks[-1].last_stage)


def site_of_streams(model: HookedAudioTransformer) -> str:
    """The site of the streams behind the encoder's blocks, or else the decoder's."""
    has_blocks = model.cfg.encoder is not None and model.cfg.encoder.n_layers > 0
    return f"encoder.{last_stage(model)}" if has_blocks else "decoder.resid_post"


def first_stable(said: Shaped[Tensor, " streams *n"]) -> Int[Tensor, "*n"]:
    """From which stream on the same is said as of the last, up to it.

    What is left and taken up again counts from where it is taken up for good.
    """
    agrees = (said == said[-1]).flip(0).long()
    return len(said) - agrees.cumprod(0).sum(0)


def shuffled_before_last(
    said: Shaped[Tensor, "n streams"], seed: int
) -> Shaped[Tensor, "n streams"]:
    """What is said of each row's streams before the last, in random order."""
    draw = np.random.default_rng(seed)
    orders = np.stack([draw.permutation(said.shape[1] - 1) for _ in said])
    return torch.cat([said[:, :-1].gather(1, torch.as_tensor(orders)), said[:, -1:]], dim=1)


# -------------------------------------------------------------------------------- references


def reference_of(inputs: AudioInputs, kind: str, seed: int = 0) -> AudioInputs:
    """The same prompts about clips that say nothing, each as long as its own.

    Noise is white, as loud as the clip, and drawn anew from the seed for every clip, so that it
    does not depend on the batch.

    Raises:
        InputError: another kind, or inputs that hold no waveforms.
    """
    check_reference(kind)
    clips = [_MAKERS[kind](clip, seed) for clip in inputs.need_audio]
    return inputs.with_audio(clips, inputs.sampling_rate)


def check_reference(kind: str) -> None:
    """Raise unless there are references of this kind.

    Raises:
        InputError: naming those there are.
    """
    if kind not in _MAKERS:
        raise InputError(f"reference is {' or '.join(map(repr, _MAKERS))}, got {kind!r}")


def _silent(clip: Float[np.ndarray, " samples"], seed: int) -> Float[np.ndarray, " samples"]:
    return np.zeros_like(clip)


def _noisy(clip: Float[np.ndarray, " samples"], seed: int) -> Float[np.ndarray, " samples"]:
    noise = np.random.default_rng(seed).standard_normal(len(clip))
    loudness = float(np.sqrt(np.mean(np.square(clip, dtype=np.float64)))) or LOUDNESS
    return (noise * loudness).astype(clip.dtype)


_MAKERS = {"noise": _noisy, "silence": _silent}

# -------------------------------------------------------------------------------- text


def written(
    model: HookedAudioTransformer,
    inputs: AudioInputs,
    edits: Sequence[Edit] = (),
    max_new_tokens: int | None = None,
) -> list[str]:
    """What the model writes to every prompt with edits in force; of a CTC model, its transcript."""
    has_limit = max_new_tokens is not None and model.cfg.decoder is not None
    limit = {"max_new_tokens": max_new_tokens} if has_limit else {}
    with intervene(model, *edits) if edits else nullcontext():
        return model.generate(inputs, return_type="text", **limit)
