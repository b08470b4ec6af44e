"""Voxtral: nothing masked in the encoder, four frames to a token, padding heard to the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from audio_lens import AudioInputs, HookedAudioTransformer
from families import audio_llms
from families.audio_llms import N_FRAMES, TINY_EAR, config, windowed_family
from families.base import AUDIO_TOKEN, TINY_LANGUAGE_MODEL, prompts_about, ready, whisper_biases

EAR = {"model_type": "voxtral_encoder", **TINY_EAR, "intermediate_size": 4 * 32}
LANGUAGE = {
    "model_type": "llama",
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    **TINY_LANGUAGE_MODEL,
}
PER_WINDOW = N_FRAMES // 8


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "eager", **overrides: Any
) -> transformers.VoxtralForConditionalGeneration:
    options = {"audio_token_id": AUDIO_TOKEN, **overrides}
    hf_config = config(transformers.VoxtralConfig, EAR, LANGUAGE, options)
    model = transformers.VoxtralForConditionalGeneration(hf_config)
    model = ready(model, seed, torch.float32, attn)
    table = model.model.audio_tower.embed_positions
    half = dtype in (torch.float16, torch.bfloat16)
    model.to(dtype)
    if half:
        table.float()  # as from_pretrained leaves it
    return model


def batch(**options: Any) -> dict[str, Tensor]:
    """Whole windows of features; the processor says nothing of how much of them is audio."""
    made = audio_llms.windowed_batch(lambda n_mel: PER_WINDOW, **options)
    return {name: tensor for name, tensor in made.items() if name != "input_features_mask"}


def reference(hf: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Hugging Face runs the projector over all windows at once."""
    found = audio_llms.reference(hf, batch)
    by_window = {
        name: tensor.unflatten(0, (-1, PER_WINDOW))
        for name, tensor in found.items()
        if name.startswith("connector")
    }
    return {**found, **by_window}


def clips(model: HookedAudioTransformer, waves: list[np.ndarray]) -> AudioInputs:
    """The features of a whole clip, cut into windows, as `VoxtralProcessor` makes them."""
    extract = audio_llms.extractor(model)
    features = []
    for wave in waves:
        made = extract(
            wave,
            sampling_rate=16_000,
            padding=True,
            truncation=False,
            pad_to_multiple_of=N_FRAMES * 160,
            return_tensors="pt",
        )
        features.append(made["input_features"][0].unflatten(-1, (-1, N_FRAMES)).transpose(0, 1))
    prompts = prompts_about([PER_WINDOW * len(windows) for windows in features])
    return model.as_inputs({**prompts, "input_features": torch.cat(features)})


VOXTRAL = windowed_family(
    "voxtral",
    lambda n_mel: PER_WINDOW,
    build,
    {
        "128 mels": {"ear_num_mel_bins": 128},
        "wide heads": {"head_dim": 16},
        "another activation in the connector": {"projector_hidden_act": "relu"},
    },
    batch=batch,
    reference=reference,
    float16_biases=whisper_biases,
    clips=clips,
    connector_reach_s=0.05,
)
