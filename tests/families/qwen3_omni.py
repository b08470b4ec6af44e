"""Qwen3-Omni's thinker: the ear of Qwen3-ASR, and a Qwen3 with experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling

from audio_lens import HookedAudioTransformer
from families import qwen3_asr
from families.audio_llms import extracted, mel_clips
from families.base import AUDIO_TOKEN, TINY_LANGUAGE_MODEL, by_layer, ready
from families.chunked import ChunkedEar
from families.qwen2_5_omni import thinker_config
from families.qwen3_asr import CHUNK, TINY_EAR, WINDOW, audio_tokens

EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 4,  # all: a change that goes to other experts is no slope
    "moe_intermediate_size": 24,
    "head_dim": 8,
}


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "eager", **overrides: Any
) -> transformers.Qwen3OmniMoeThinkerForConditionalGeneration:
    """A random thinker; ``overrides`` go to the encoder's config where it has that name."""
    ear = {key: overrides.pop(key, value) for key, value in TINY_EAR.items()}
    tied = overrides.pop("tie_word_embeddings", False)
    text = {**TINY_LANGUAGE_MODEL, **EXPERTS, **overrides}
    text.pop("tie_word_embeddings")
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta", 1e4),
        "mrope_section": [text["head_dim"] // 2 - 2, 1, 1],
        "mrope_interleaved": True,
    }
    config = thinker_config(
        transformers.Qwen3OmniMoeThinkerConfig,
        {**ear, "output_dim": text["hidden_size"]},
        text,
        audio_token_id=AUDIO_TOKEN,
        image_token_id=91,
        video_token_id=92,
        tie_word_embeddings=tied,
    )
    model = transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config)
    model.set_experts_implementation("eager")  # others do not know float64
    return ready(model, seed, dtype, attn)


EAR = ChunkedEar(modeling, audio_tokens, audio_tokens)


def batch(lengths: Sequence[int | Sequence[int]] = (580, 201), **options: Any) -> dict[str, Tensor]:
    return EAR.batch(lengths, **options)


def features(model: HookedAudioTransformer, waves: list[np.ndarray]) -> dict[str, Tensor]:
    extractor = transformers.WhisperFeatureExtractor(feature_size=20)
    return extracted(extractor, waves, padding=True, truncation=False)


def draw(data: st.DataObject) -> tuple[dict, dict]:
    """As of Qwen3-ASR, with any number of experts."""
    model, inputs = qwen3_asr.draw(data)
    n_experts = data.draw(st.integers(1, 7), "experts")
    model["num_experts"] = n_experts
    model["num_experts_per_tok"] = data.draw(st.integers(1, n_experts), "experts per token")
    model["norm_topk_prob"] = data.draw(st.booleans(), "normalized")
    return model, inputs


def reference(hf: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names, the encoder's packed sequence as a row per window."""
    tower, layers = hf.model.audio_tower, hf.model.language_model.layers
    routers = by_layer(
        "decoder.blocks.{l}.mlp.hook_router_logits", [layer.mlp.gate for layer in layers]
    )
    leaving = {
        "connector.hook_pre": tower.proj1,
        "connector.hook_out": tower.proj2,
        **routers,
        **by_layer("decoder.blocks.{l}.hook_mlp_out", [layer.mlp for layer in layers]),
    }
    found = EAR.reference(hf, batch, hf.config.audio_config.n_window_infer, leaving)
    for name in routers:
        found[name] = found[name].view(*batch["input_ids"].shape, -1)
    return found


QWEN3_OMNI = EAR.family(
    "qwen3_omni",
    {
        "windows of 3 s": {"n_window_infer": 300},
        "two of six experts": {"num_experts": 6, "num_experts_per_tok": 2},
        "one of four experts": {"num_experts_per_tok": 1},
        "weights that do not sum to 1": {"num_experts_per_tok": 2, "norm_topk_prob": False},
    },
    WINDOW,
    build=build,
    batch=batch,
    reference=reference,
    batches=qwen3_asr.BATCHES,
    no_float64=qwen3_asr.NO_FLOAT64,
    draw=draw,
    clips=mel_clips(audio_tokens, features),
    reach_s=0.07,
    connector_reach_s=0.07,
    chunk_s=CHUNK / 100,
)
