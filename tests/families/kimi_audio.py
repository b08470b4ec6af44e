"""Kimi-Audio: Whisper beside discrete tokens, text summed in, blocks that speak behind a fork."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen2Config, WhisperConfig

from audio_lens import AudioInputs, HookedAudioTransformer
from audio_lens.recipes.kimi_audio import HookedKimiAudio, kimi_audio_of
from audio_lens.recipes.kimi_audio_config import kimi_audio_config
from families.audio_llms import (
    N_FRAMES,
    draw_windowed,
    windowed_batch,
    windowed_family,
    windowed_features,
    windowed_prompts,
)
from families.base import (
    AUDIO_TOKEN,
    END,
    PAD,
    START,
    attending,
    decoder_attended,
    entering_blocks,
    randomise,
    run_hf,
)
from families.whisper import EAR_SHAPE
from published.kimi_audio import FRAMES_PER_TOKEN, PUBLISHED, KimiAudio, stacked

EAR = {
    **EAR_SHAPE,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 16,
    "max_source_positions": N_FRAMES // 2,
    "max_target_positions": 8,
    "vocab_size": 60,
    "pad_token_id": PAD,
    "bos_token_id": START,
    "eos_token_id": END,
    "decoder_start_token_id": START,
}
FIRST_SPECIAL, FIRST_CODE, D_STREAM = 95, 130, 150  # words, special tokens, discrete tokens
BEGIN, CLOSE, BLANK = FIRST_SPECIAL + 18, FIRST_SPECIAL + 20, FIRST_SPECIAL + 23
LANGUAGE = {
    **PUBLISHED,
    "vocab_size": D_STREAM,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "kimia_mimo_layers": 2,
    "kimia_mimo_transformer_from_layer_index": 1,
    "kimia_adaptor_input_dim": FRAMES_PER_TOKEN * EAR["d_model"],
    "kimia_token_offset": FIRST_CODE,
    "kimia_media_begin": BEGIN,
    "kimia_media_end": CLOSE,
}
"""As the published ``config.json`` has it, but small."""


def tokens_of(n_mel: int) -> int:
    """Tokens of a window with so many mel frames."""
    return -(-((n_mel - 1) // 2 + 1) // FRAMES_PER_TOKEN)


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "eager", **overrides: Any
) -> KimiAudio:
    """The published models; ``overrides`` go to Whisper (``ear_*``) or the language model."""
    ear = {key: overrides.pop(f"ear_{key}", value) for key, value in EAR.items()}
    config = Qwen2Config(**{**LANGUAGE, **overrides}, attn_implementation=attn)
    model = KimiAudio(config, WhisperConfig(**ear, attn_implementation=attn))
    return randomise(model, seed).to(dtype)


def hooked(published: KimiAudio) -> HookedKimiAudio:
    """Our model of the published weights."""
    config = published.alm.model.config.to_dict()
    cfg = kimi_audio_config(config, published.whisper.config.to_dict())
    return kimi_audio_of(cfg, published.alm.state_dict(), published.whisper.state_dict())


# -------------------------------------------------------------------------------- inputs


def in_two_streams(made: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Prompts with placeholders as both streams: the words are text, discrete tokens speech.

    Where the one stream says something, the other holds anything but the marks of a clip.
    """
    generator = torch.Generator().manual_seed(seed)

    def anything(first: int, stop: int) -> Tensor:
        return torch.randint(first, stop, made["input_ids"].shape, generator=generator)

    is_heard = made["input_ids"] == AUDIO_TOKEN
    is_mark = (made["input_ids"] == BEGIN) | (made["input_ids"] == CLOSE)
    spoken = torch.where(is_mark, made["input_ids"], anything(CLOSE + 1, D_STREAM))
    is_word = ~is_heard & ~is_mark
    return {
        **made,
        "input_ids": torch.where(is_heard, anything(FIRST_CODE, D_STREAM), spoken),
        "text_input_ids": torch.where(is_word, made["input_ids"], anything(1, D_STREAM)),
        "is_continuous_mask": is_heard,
    }


def batch(seed: int = 0, **options: Any) -> dict[str, Tensor]:
    """Prompts about clips of so many mel frames, as `windowed_batch` takes them."""
    made = windowed_batch(tokens_of, around=(BEGIN, CLOSE), seed=seed, **options)
    return in_two_streams(made, seed)


def clips(model: HookedAudioTransformer, waves: list[np.ndarray]) -> AudioInputs:
    """One prompt per clip, with some discrete tokens."""
    prompts = in_two_streams(windowed_prompts(tokens_of, waves))
    return model.as_inputs({**prompts, **windowed_features(model, waves)})


# -------------------------------------------------------------------------------- reference


def reference(published: KimiAudio, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names; the adaptor is also held against what it makes of all frames."""
    ear, inner = published.whisper.model.encoder, published.alm.model
    stacks = {"encoder": ear.layers, "decoder": inner.layers, "speaker": inner.mimo_layers}
    entering, patterns = {}, {}
    for part, layers in stacks.items():
        entering |= entering_blocks(part, layers)
        patterns |= attending(part, layers)
    leaving = {
        "encoder.hook_out": ear,
        "decoder.hook_out": inner.norm,
        "speaker.hook_out": inner.mimo_norm,
        "decoder.hook_audio_embed": inner.vq_adaptor,
    }
    (audio, text), found = run_hf(published, batch, entering, leaving, patterns)
    heard = found["decoder.hook_audio_embed"][batch["is_continuous_mask"].bool()]
    with torch.no_grad():
        carried = inner.vq_adaptor(stacked(found["encoder.hook_out"]))
    return {
        **found,
        "decoder.hook_audio_embed": heard,
        "connector.hook_out": carried,
        "hook_logits": torch.cat([text, audio], dim=-1),
    }


def compared(name: str, tensor: Tensor, inputs: AudioInputs) -> Tensor:
    """The speaker lies on the positions of the decoder."""
    if name == "decoder.hook_audio_embed":
        return tensor
    return decoder_attended(name.replace("speaker.", "decoder."), tensor, inputs)


def draw(data: Any) -> tuple[dict, dict]:
    """Any fork of any number of layers, and clips over up to three windows."""
    model, batch_options = draw_windowed(data)
    model["ear_encoder_layers"] = model.pop("ear_num_hidden_layers")
    forks = st.integers(0, model["num_hidden_layers"] - 1)
    model["kimia_mimo_transformer_from_layer_index"] = data.draw(forks, "fork")
    model["kimia_mimo_layers"] = data.draw(st.integers(1, 3), "speaker_layers")
    return model, batch_options


KIMI_AUDIO = windowed_family(
    "kimi_audio",
    tokens_of,
    build,
    {
        "the first layer alone is shared": {"kimia_mimo_transformer_from_layer_index": 0},
        "all layers are shared": {"kimia_mimo_transformer_from_layer_index": 3},
        "one layer speaks": {"kimia_mimo_layers": 1, "num_key_value_heads": 6},
        "another base of rotary positions": {"rope_theta": 10_000.0},
    },
    batch=batch,
    reference=reference,
    hooked=hooked,
    no_float64=(),
    mask_of=compared,
    draw=draw,
    clips=clips,
    connector_reach_s=0.05,
)
