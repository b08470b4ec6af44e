"""BEATs: patches of a spectrogram, bare or with its head, beside the published model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from audio_lens import AudioInputs, HookedAudioTransformer
from audio_lens.models.families.beats import HookedBeats
from families.base import (
    Family,
    attending,
    by_layer,
    entering_blocks,
    length_mask,
    randomise,
    run_hf,
)
from published.beats import TINY, Beats, SelfAttention

LONGEST = 9000  # samples of the tiny clips: three columns of eight patches


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "eager", **overrides: Any
) -> Beats:
    """A random BEATs; ``overrides`` go to its config."""
    model = randomise(Beats({**TINY, **overrides}), seed).to(dtype)
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.is_fused = attn == "sdpa"
    return model


def hooked(published: Beats) -> HookedBeats:
    """Our model of the published one's checkpoint."""
    return HookedBeats.from_published({"cfg": published.cfg, "model": published.state_dict()})


def batch(
    lengths: Sequence[int] = (LONGEST, 6000), seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Waveforms of so many samples, and where they are padded."""
    generator = torch.Generator().manual_seed(seed)
    waves = torch.randn(len(lengths), max(lengths), generator=generator, dtype=torch.float64)
    mask = length_mask(lengths, max(lengths))
    made = {"source": (waves / 10 * mask).to(dtype)}
    return made if mask.all() else {**made, "padding_mask": ~mask.bool()}


def reference(published: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names."""
    body = published.encoder
    out, found = run_hf(
        published,
        batch,
        entering=entering_blocks("encoder", body.layers),
        leaving={
            "encoder.hook_patches": published.patch_embedding,
            "encoder.hook_pos_embed": body.pos_conv,
            "encoder.hook_out": body,
            **by_layer(
                "encoder.blocks.{l}.hook_attn_out", [layer.self_attn for layer in body.layers]
            ),
            **by_layer("encoder.blocks.{l}.hook_mlp_out", [layer.fc2 for layer in body.layers]),
        },
        patterns=attending("encoder", body.layers),
    )
    found["encoder.hook_patches"] = found["encoder.hook_patches"].flatten(2).mT
    return {"hook_logits": out, **found} if hasattr(published, "predictor") else found


def draw(data: st.DataObject) -> tuple[dict, dict]:
    """Patches of other sizes, any width, and clips of any length."""
    patch = data.draw(st.sampled_from((12, 16, 20)), "patch")
    model = {
        "input_patch_size": patch,
        "embed_dim": data.draw(st.sampled_from((16, 32)), "d_patch"),
        "conv_bias": data.draw(st.booleans(), "patch_bias"),
        "conv_pos": data.draw(st.integers(1, 9), "position_kernel"),
        "deep_norm": data.draw(st.booleans(), "deep_norm"),
        "encoder_layers": data.draw(st.integers(1, 3), "n_layers"),
        "encoder_attention_heads": data.draw(st.sampled_from((1, 2, 4)), "n_heads"),
        "finetuned_model": data.draw(st.booleans(), "tuned"),
    }
    least = 160 * (patch - 1) + 400
    lengths = st.lists(st.integers(least, least + 3000), min_size=1, max_size=3)
    return model, {"lengths": data.draw(lengths, "lengths")}


def clips(model: HookedAudioTransformer, waves: list[np.ndarray]) -> AudioInputs:
    """As the model makes them."""
    return model.prepare(waves, sampling_rate=model.cfg.sampling_rate)


BEATS = Family(
    name="beats",
    build=build,
    hooked=hooked,
    batch=batch,
    reference=reference,
    models={
        "tiny": {},
        "bare": {"finetuned_model": False},
        "patches as wide as the stream, with a bias": {"embed_dim": 32, "conv_bias": True},
        "without deep norm": {"deep_norm": False},
        "all distances near": {"num_buckets": 320, "max_distance": 800},
        "odd positional kernel": {"conv_pos": 15},
        "another activation": {"activation_fn": "relu"},
        "patches that leave bins over": {"input_patch_size": 20},
    },
    batches={
        "unequal lengths": {},
        "no mask": {"lengths": (LONGEST, LONGEST)},
        "one column, three frames to a patch": {"lengths": (4720, 2800)},
        "one clip": {"lengths": (5000,)},
        "less padding than a frame": {"lengths": (6000, 5990, 5841)},
    },
    draw=draw,
    clips=clips,
    durations=((0.75,), (2.0,), (0.6, 1.9)),
    stem=lambda model, inputs: model.encoder.patches(inputs.features),
    reach_s=0.08,
    first_step_s=0.0125,
)
