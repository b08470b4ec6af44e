"""Whisper: every size, distilled decoders, untied heads."""

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
    END,
    EVERYTHING,
    PAD,
    START,
    Family,
    attentions,
    encoder_and_decoder_of,
    hidden_states,
    padded_rows,
    random_words,
    randomise,
)

N_FRAMES = 220  # mel frames of the tiny models: 2.2 s
EAR_SHAPE = {
    "num_mel_bins": 20,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "d_model": 32,
}
TINY_EAR = {**EAR_SHAPE, "max_source_positions": N_FRAMES // 2}
_REST = {
    "vocab_size": 100,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_target_positions": 40,
    "decoder_start_token_id": START,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "eager", **overrides: Any
) -> transformers.WhisperForConditionalGeneration:
    """A random Whisper; ``overrides`` go to its config."""
    config = transformers.WhisperConfig(**{**TINY_EAR, **_REST, **overrides})
    config._attn_implementation = attn
    return randomise(transformers.WhisperForConditionalGeneration(config), seed).to(dtype)


def batch(
    lengths: Sequence[int] = (N_FRAMES, N_FRAMES),
    words: Sequence[int] = (6, 4),
    padding: str = "right",
    n_mels: int = 20,
    n_frames: int = N_FRAMES,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """A clip for each of ``lengths``, all heard to their end; so many words after the start."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(lengths), n_mels, n_frames, generator=generator, dtype=dtype)
    tokens, mask = padded_rows([[START, *random_words(n, generator)] for n in words], padding)
    return {
        "input_features": features,
        "decoder_input_ids": tokens,
        "decoder_attention_mask": mask,
    }


@torch.no_grad()
def reference(hf: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names; positions are said to Hugging Face, which counts padding on the left."""
    positions = (batch["decoder_attention_mask"].cumsum(1) - 1).clamp(min=0)
    if not batch["decoder_attention_mask"][:, 0].all():
        batch = {**batch, "decoder_position_ids": positions}
    out = hf(**batch, **EVERYTHING)
    return {"hook_logits": out.logits, **encoder_and_decoder_of(out)}


def draw(data: st.DataObject) -> tuple[dict, dict]:
    """Any shape of model, with prompts of any length."""
    heads = st.sampled_from((1, 2, 4))
    model = {
        "d_model": data.draw(st.sampled_from((8, 24, 40)), "d_model"),
        "encoder_layers": data.draw(st.integers(1, 3), "encoder_layers"),
        "decoder_layers": data.draw(st.integers(1, 3), "decoder_layers"),
        "encoder_attention_heads": data.draw(heads, "encoder_heads"),
        "decoder_attention_heads": data.draw(heads, "decoder_heads"),
        "encoder_ffn_dim": data.draw(st.integers(1, 50), "d_mlp"),
        "activation_function": data.draw(st.sampled_from(("gelu", "relu")), "act"),
    }
    words = data.draw(st.lists(st.integers(0, 8), min_size=2, max_size=2), "words")
    return model, {"words": words}


def mel_features(model: HookedAudioTransformer, waveforms: list[np.ndarray]) -> dict[str, Tensor]:
    """``features`` and ``mask`` by Whisper's feature extractor, as wide as the model's."""
    model.feature_extractor = transformers.WhisperFeatureExtractor(feature_size=model.cfg.n_mels)
    return model.extract_features(waveforms)


def clips(model: HookedAudioTransformer, waveforms: list[np.ndarray]) -> AudioInputs:
    """A start token each."""
    made = mel_features(model, waveforms)
    return model.as_inputs(
        {
            "input_features": made["features"],
            "attention_mask": made["mask"],
            "decoder_input_ids": torch.full((len(waveforms), 1), START),
        }
    )


WHISPER = Family(
    name="whisper",
    build=build,
    batch=batch,
    reference=reference,
    models={
        "tiny": {},
        "distil: one decoder layer": {"encoder_layers": 4, "decoder_layers": 1},
        "large-v3: 128 mels": {"num_mel_bins": 128},
        "untied": {"tie_word_embeddings": False},
        "other head counts": {"encoder_attention_heads": 2, "decoder_attention_heads": 8},
    },
    model_batches={"large-v3: 128 mels": {"n_mels": 128}},
    batches={
        "one prompt": {"lengths": [N_FRAMES], "words": [5]},
        "one token": {"words": [0, 0]},
        "right padding": {"padding": "right"},
        "left padding": {"padding": "left"},
    },
    no_float64=["left padding"],
    bfloat16=["right padding", "left padding"],
    float16_biases=lambda hf: [layer.fc2.bias for layer in hf.model.encoder.layers[:2]],
    draw=draw,
    clips=clips,
    durations=[(1.0,), (2.2,), (0.6, 2.1)],
)


# -------------------------------------------------------------------------------- with classes


def build_classifier(
    seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "eager", **overrides: Any
) -> transformers.WhisperForAudioClassification:
    """A random Whisper encoder with a head for classes; ``overrides`` go to its config."""
    head = {"num_labels": 7, "classifier_proj_size": 24}
    config = transformers.WhisperConfig(**{**TINY_EAR, **_REST, **head, **overrides})
    config._attn_implementation = attn
    return randomise(transformers.WhisperForAudioClassification(config), seed).to(dtype)


def spectrograms(
    n_clips: int = 2, n_mels: int = 20, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Features of so many clips."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_features": torch.randn(n_clips, n_mels, N_FRAMES, generator=generator).to(dtype)}


@torch.no_grad()
def classified(hf: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names."""
    out = hf(**batch, **EVERYTHING)
    return {
        "hook_logits": out.logits,
        **hidden_states("encoder", out.hidden_states),
        **attentions("encoder", out.attentions),
    }


def heard(model: HookedAudioTransformer, waveforms: list[np.ndarray]) -> AudioInputs:
    """Clips, by Whisper's feature extractor."""
    made = mel_features(model, waveforms)
    return model.as_inputs({"input_features": made["features"], "attention_mask": made["mask"]})


WHISPER_CLASSES = Family(
    name="whisper_classes",
    build=build_classifier,
    batch=spectrograms,
    reference=classified,
    models={
        "tiny": {},
        "128 mels": {"num_mel_bins": 128},
        "one class": {"num_labels": 1},
        "other heads": {"encoder_attention_heads": 2, "classifier_proj_size": 5},
    },
    model_batches={"128 mels": {"n_mels": 128}},
    batches={"one clip": {"n_clips": 1}, "three clips": {"n_clips": 3}},
    float16_biases=lambda hf: [layer.fc2.bias for layer in hf.encoder.layers[:2]],
    clips=heard,
    durations=[(1.0,), (0.6, 2.1)],
)
