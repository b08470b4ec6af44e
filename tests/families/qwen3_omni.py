"""Qwen3-Omni's thinker: the ear of Qwen3-ASR, and a Qwen3 with experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling

from audio_lens import AudioInputs, HookedAudioTransformer
from families import qwen3_asr
from families.base import (
    AUDIO_TOKEN,
    TINY_LANGUAGE_MODEL,
    Family,
    attentions,
    by_layer,
    hidden_states,
    prompts_about,
    randomise,
    run_hf,
)
from families.qwen2_5_omni import (
    chunked_batch,
    eager_patterns,
    in_rows,
    padded_patterns,
    segments,
    thinker_config,
)
from families.qwen3_asr import CHUNK, PER_CHUNK, TINY_EAR, WINDOW, audio_tokens

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
    model.set_attn_implementation(attn)
    model.set_experts_implementation("eager")  # others do not know float64
    return randomise(model, seed).to(dtype)


def batch(**options: Any) -> dict[str, Tensor]:
    return chunked_batch(audio_tokens, **{"lengths": (580, 201), **options})


def clips(model: HookedAudioTransformer, waveforms: list[np.ndarray]) -> AudioInputs:
    """A prompt each."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=20)
    made = extractor(
        waveforms,
        sampling_rate=16_000,
        padding=True,
        truncation=False,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = made["attention_mask"]
    return model.as_inputs(
        {
            **prompts_about([audio_tokens(int(n)) for n in mask.sum(-1)]),
            "input_features": made["input_features"],
            "feature_attention_mask": mask,
        }
    )


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
    n_window = hf.config.audio_config.n_window_infer
    routers = [layer.mlp.gate for layer in layers]
    with eager_patterns(modeling, tower) as kept:
        out, found = run_hf(
            hf,
            batch,
            entering=by_layer("encoder.blocks.{l}.hook_resid_pre", tower.layers),
            leaving={
                "encoder.hook_out": tower.ln_post,
                "connector.hook_pre": tower.proj1,
                "connector.hook_out": tower.proj2,
                **by_layer("decoder.blocks.{l}.mlp.hook_router_logits", routers),
                **by_layer("decoder.blocks.{l}.hook_mlp_out", [layer.mlp for layer in layers]),
            },
            output_hidden_states=True,
            output_attentions=True,
        )
    mels = batch["feature_attention_mask"].sum(1).tolist()
    counts = [audio_tokens(n) for n in segments(mels, n_window)]
    width = n_window // CHUNK * PER_CHUNK
    for name, tensor in found.items():
        if name.startswith(("encoder", "connector")):
            found[name] = in_rows(tensor, counts, width)
        elif name.endswith("hook_router_logits"):
            found[name] = tensor.view(*batch["input_ids"].shape, -1)
    return {
        "hook_logits": out.logits,
        **found,
        **padded_patterns(kept, width),
        **hidden_states("decoder", out.hidden_states),
        **attentions("decoder", out.attentions),
    }


QWEN3_OMNI = Family(
    name="qwen3_omni",
    build=build,
    batch=batch,
    reference=reference,
    models={
        "tiny": {},
        "128 mels": {"num_mel_bins": 128},
        "windows of 3 s": {"n_window_infer": 300},
        "two of six experts": {"num_experts": 6, "num_experts_per_tok": 2},
        "one of four experts": {"num_experts_per_tok": 1},
        "weights that do not sum to 1": {"num_experts_per_tok": 2, "norm_topk_prob": False},
        "no GQA": {"num_key_value_heads": 6},
        "wide heads": {"head_dim": 16},
        "tied": {"tie_word_embeddings": True},
    },
    model_batches={"128 mels": {"n_mels": 128}},
    batches=qwen3_asr.BATCHES,
    no_float64=qwen3_asr.NO_FLOAT64,
    bfloat16=["right padding", "left padding"],
    float16_biases=lambda hf: [layer.fc2.bias for layer in hf.model.audio_tower.layers[:2]],
    mask_of=qwen3_asr.mask_of,
    draw=draw,
    clips=clips,
    durations=[(0.75,), (2.0,), (4.3,), (0.6, 2.01, 5.2)],
    reach_s=0.07,
    connector_reach_s=0.07,
    segment_s=WINDOW / 100,
    chunk_s=CHUNK / 100,
)
