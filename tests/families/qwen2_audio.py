"""Qwen2-Audio: Whisper's ear, pooled in pairs, one linear map, and a Qwen2 language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn

from audio_lens import AudioInputs, HookedAudioTransformer
from families.base import (
    AUDIO_TOKEN,
    TINY_LANGUAGE_MODEL,
    Family,
    attentions,
    by_layer,
    hidden_states,
    length_mask,
    padded_rows,
    prompts_about,
    random_words,
    randomise,
    run_hf,
    with_clips,
)
from families.whisper import N_FRAMES, TINY_EAR, mel_features


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "eager", **overrides: Any
) -> transformers.Qwen2AudioForConditionalGeneration:
    """A random Qwen2-Audio; ``overrides`` go to the encoder's config where it has that name."""
    ear = {key: overrides.pop(key, value) for key, value in TINY_EAR.items()}
    config = transformers.Qwen2AudioConfig(
        audio_config=transformers.Qwen2AudioEncoderConfig(**ear).to_dict(),
        text_config=transformers.Qwen2Config(**{**TINY_LANGUAGE_MODEL, **overrides}).to_dict(),
        audio_token_index=AUDIO_TOKEN,
        tie_word_embeddings=overrides.get("tie_word_embeddings", False),
    )
    model = transformers.Qwen2AudioForConditionalGeneration(config)
    model.set_attn_implementation(attn)
    return randomise(model, seed).to(dtype)


def audio_tokens(n_mel: int) -> int:
    """Audio tokens Qwen2-Audio makes of a clip of ``n_mel`` mel frames."""
    return ((n_mel - 1) // 2 + 1) // 2


def batch(
    lengths: Sequence[int | Sequence[int]] = (201, 173),
    words: Sequence[int] = (6, 4),
    padding: str = "right",
    n_mels: int = 20,
    n_frames: int = N_FRAMES,
    single_placeholder: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Prompts of so many words about clips of so many mel frames: one clip each, or several.

    With ``single_placeholder`` there is one audio token per clip, as old processors wrote.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = [[n] if isinstance(n, int) else list(n) for n in lengths]
    flat = [n for prompt in prompts for n in prompt]
    features = torch.randn(len(flat), n_mels, n_frames, generator=generator, dtype=dtype)
    rows = [
        with_clips(
            random_words(count, generator),
            [1 if single_placeholder else audio_tokens(n) for n in prompt],
        )
        for count, prompt in zip(words, prompts, strict=True)
    ]
    tokens, mask = padded_rows(rows, padding)
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "input_features": features,
        "feature_attention_mask": length_mask(flat, n_frames),
    }


def reference(hf: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names."""
    tower = hf.model.audio_tower
    attention = [layer.self_attn for layer in tower.layers]
    out, found = run_hf(
        hf,
        batch,
        entering=by_layer("encoder.blocks.{l}.hook_resid_pre", tower.layers),
        leaving={
            "encoder.hook_out": tower,
            "connector.hook_out": hf.model.multi_modal_projector,
        },
        patterns=by_layer("encoder.blocks.{l}.attn.hook_pattern", attention),
        output_hidden_states=True,
        output_attentions=True,
    )
    return {
        "hook_logits": out.logits,
        **found,
        **hidden_states("decoder", out.hidden_states),
        **attentions("decoder", out.attentions),
    }


def draw(data: st.DataObject) -> tuple[dict, dict]:
    """Any shape of model, with any number of clips of any length."""
    heads = data.draw(st.sampled_from((4, 6)), "heads")
    divisors = {4: (1, 2, 4), 6: (1, 2, 3, 6)}[heads]
    model = {
        "d_model": data.draw(st.sampled_from((8, 24)), "d_model"),
        "hidden_size": data.draw(st.sampled_from((24, 48)), "hidden_size"),
        "encoder_layers": data.draw(st.integers(1, 3), "encoder_layers"),
        "num_hidden_layers": data.draw(st.integers(1, 3), "decoder_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": data.draw(st.sampled_from(divisors), "kv_heads"),
        "head_dim": data.draw(st.sampled_from((4, 10)), "head_dim"),
    }
    prompt = st.lists(st.integers(4, N_FRAMES), min_size=1, max_size=2)
    lengths = data.draw(st.lists(prompt, min_size=1, max_size=2), "lengths")
    return model, {"lengths": lengths, "words": [3 + len(clips) for clips in lengths]}


def clips(model: HookedAudioTransformer, waveforms: list[np.ndarray]) -> AudioInputs:
    """A prompt each."""
    made = mel_features(model, waveforms)
    return model.as_inputs(
        {
            **prompts_about([audio_tokens(int(n)) for n in made["mask"].sum(-1)]),
            "input_features": made["features"],
            "feature_attention_mask": made["mask"],
        }
    )


QWEN2_AUDIO = Family(
    name="qwen2_audio",
    build=build,
    batch=batch,
    reference=reference,
    models={
        "tiny": {},
        "128 mels": {"num_mel_bins": 128},
        "no GQA": {"num_key_value_heads": 6},
        "one key-value head": {"num_key_value_heads": 1},
        "wide heads": {"head_dim": 16},
        "slow rotation": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    },
    model_batches={"128 mels": {"n_mels": 128}},
    batches={
        "one prompt, 173 mel frames": {"lengths": [173], "words": [5]},
        "one prompt, 199 mel frames": {"lengths": [199], "words": [5]},
        "one prompt, 201 mel frames": {"lengths": [201], "words": [5]},
        "the whole clip": {"lengths": [N_FRAMES], "words": [5]},
        "right padding": {"lengths": [199, 173], "padding": "right"},
        "left padding": {"lengths": [199, 173], "padding": "left"},
        "several clips": {"lengths": [[60, 101], [173, 40, 7]], "words": [4, 8]},
        "one-token clip": {"lengths": [4], "words": [4]},
        "one placeholder": {"lengths": [173], "words": [4], "single_placeholder": True},
        "one placeholder per clip, right": {
            "lengths": [[60, 101], 199],
            "words": [3, 6],
            "padding": "right",
            "single_placeholder": True,
        },
        "one placeholder per clip, left": {
            "lengths": [[60, 101], 4],
            "words": [6, 3],
            "padding": "left",
            "single_placeholder": True,
        },
    },
    no_float64=["left padding", "one placeholder per clip, left"],
    bfloat16=["right padding", "left padding"],
    float16_biases=lambda hf: [layer.fc2.bias for layer in hf.model.audio_tower.layers[:2]],
    draw=draw,
    clips=clips,
    durations=[(1.0,), (2.2,), (0.6, 2.1)],
)
