"""AST: patches of a spectrogram, any grid of them, bare or with the head for classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn

from audio_lens import AudioInputs, HookedAudioTransformer
from families.base import Family, attending, entering_blocks, randomise, run_hf

N_FRAMES, N_MELS = 213, 46  # frames of the tiny models: 2.13 s
PATCH, STRIDE = 16, 10  # as released: 4 rows of 20 patches
SMALL_PATCHES = {"patch_size": 6, "frequency_stride": 4, "time_stride": 5}
_TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "patch_size": PATCH,
    "frequency_stride": STRIDE,
    "time_stride": STRIDE,
    "max_length": N_FRAMES,
    "num_mel_bins": N_MELS,
    "num_labels": 7,
}


def build(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn: str = "eager",
    bare: bool = False,
    **overrides: Any,
) -> transformers.PreTrainedModel:
    """A random AST, ``bare`` or with its head; ``overrides`` go to its config."""
    config = transformers.ASTConfig(**{**_TINY, **overrides})
    config._attn_implementation = attn
    made = transformers.ASTModel if bare else transformers.ASTForAudioClassification
    return randomise(made(config), seed).to(dtype)


def batch(
    n_clips: int = 2,
    n_frames: int = N_FRAMES,
    n_mels: int = N_MELS,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Spectrograms."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_values": torch.randn(n_clips, n_frames, n_mels, generator=generator).to(dtype)}


def reference(hf: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names."""
    body = getattr(hf, "audio_spectrogram_transformer", hf)
    out, found = run_hf(
        hf,
        batch,
        entering=entering_blocks("encoder", body.layers),
        leaving={
            "frontend.hook_out": body.embeddings.patch_embeddings,
            "encoder.hook_out": body.layernorm,
            f"encoder.blocks.{len(body.layers) - 1}.hook_resid_post": body.layers[-1],
        },
        patterns=attending("encoder", body.layers, "attention"),
    )
    return found if hf is body else {"hook_logits": out.logits, **found}


def draw(data: st.DataObject) -> tuple[dict, dict]:
    """Any grid of patches."""
    patch = data.draw(st.integers(1, 12), "patch")
    n_mels = data.draw(st.integers(patch, 24), "n_mels")
    n_frames = data.draw(st.integers(patch, 40), "n_frames")
    model = {
        "patch_size": patch,
        "frequency_stride": data.draw(st.integers(1, 12), "frequency_stride"),
        "time_stride": data.draw(st.integers(1, 12), "time_stride"),
        "num_mel_bins": n_mels,
        "max_length": n_frames,
        "num_hidden_layers": data.draw(st.integers(1, 3), "n_layers"),
        "num_attention_heads": data.draw(st.sampled_from((1, 2, 4)), "n_heads"),
        "bare": data.draw(st.booleans(), "bare"),
    }
    return model, {"n_frames": n_frames, "n_mels": n_mels}


def clips(model: HookedAudioTransformer, waveforms: list[np.ndarray]) -> AudioInputs:
    """Through the real feature extractor."""
    return model.prepare(waveforms, sampling_rate=model.cfg.sampling_rate)


AST = Family(
    name="audio_spectrogram_transformer",
    build=build,
    batch=batch,
    reference=reference,
    models={
        "tiny": {},
        "bare": {"bare": True},
        "small patches": SMALL_PATCHES,
        "no biases of q, k, v": {"qkv_bias": False},
        "patches that do not overlap": {"frequency_stride": PATCH, "time_stride": PATCH},
        "128 mels, one row": {"num_mel_bins": 128, "patch_size": 128, "time_stride": 16},
        "speech commands: 128 frames": {"max_length": 128, "num_labels": 35},
        "other activation and eps": {"hidden_act": "relu", "layer_norm_eps": 1e-3},
    },
    model_batches={
        "128 mels, one row": {"n_mels": 128},
        "speech commands: 128 frames": {"n_frames": 128},
    },
    batches={"one clip": {"n_clips": 1}, "several clips": {"n_clips": 3}},
    draw=draw,
    clips=clips,
    durations=[(0.75,), (2.1,), (0.6, 1.9)],
    reach_s=0.005 * PATCH,
    first_step_s=0.0125,
)
