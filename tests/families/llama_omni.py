"""LLaMA-Omni and LLaMA-Omni2: openai's Whisper, five frames to a token, padding and all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from audio_lens.recipes.llama_omni import FIRST, SECOND, HookedLlamaOmni, llama_omni_of
from families.audio_llms import N_FRAMES, WINDOW_S, heard_and_written, mel_batch, mel_clips
from families.base import TINY_LANGUAGE_MODEL, Family, draw_clips, draw_decoder, randomise
from published.llama_omni import SPEECH, LlamaOmni, LlamaOmni2, Speaking, fuse

EAR = {"n_mels": 20, "n_ctx": N_FRAMES // 2, "width": 128, "n_heads": 2, "n_layers": 3}
TOKENS = N_FRAMES // 10
RELEASES = {LlamaOmni: FIRST, LlamaOmni2: SECOND}


def build(
    published: type[Speaking],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn: str = "eager",
    **overrides: Any,
) -> Speaking:
    """A random model; ``overrides`` go to the ear where it has that name, or to the text config."""
    ear = {key: overrides.pop(key, value) for key, value in EAR.items()}
    text = {**TINY_LANGUAGE_MODEL, **overrides}
    text.setdefault("head_dim", text["hidden_size"] // text["num_attention_heads"])
    model = published(RELEASES[published].text(**text, attn_implementation=attn))
    model.add_ear(ear)
    randomise(model, seed)
    with torch.no_grad():
        for name, parameter in model.model.speech_encoder.named_parameters():
            if "ln" in name and name.endswith("weight"):
                parameter += 1
    fuse(model, attn == "sdpa")
    return model.to(dtype)


def hooked(published: Speaking) -> HookedLlamaOmni:
    """Our model of its weights."""
    config = {
        **published.config.to_dict(),
        "speech_encoder_ds_rate": published.model.speech_projector.k,
        "speech_encoder_hidden_size": len(published.model.speech_encoder.ln_post.weight),
    }
    return llama_omni_of(config, published.state_dict(), RELEASES[type(published)])


def batch(
    lengths: Sequence[int | Sequence[int]] = (199, 173), n_frames: int = N_FRAMES, **options: Any
) -> dict[str, Tensor]:
    """Prompts about clips of so many mel frames, one placeholder for each clip."""
    return mel_batch(lambda n_mel: 1, n_frames, lengths, audio_token=SPEECH, **options)


def reference(published: Speaking, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names."""
    ear, projector = published.model.speech_encoder, published.model.speech_projector
    leaving = {
        "encoder.hook_out": ear,
        "connector.hook_pre": projector.linear1,
        "connector.hook_post": projector.relu,
        "connector.hook_out": projector,
    }
    return heard_and_written(published, batch, ear.blocks, leaving, "attn")


def draw(data: st.DataObject) -> tuple[dict, dict]:
    """Any shape of model, with any number of clips of any length."""
    width = data.draw(st.sampled_from((64, 128)), "width")
    model = {
        "width": width,
        "n_heads": width // 64,
        "n_layers": data.draw(st.integers(1, 3), "encoder_layers"),
        **draw_decoder(data),
    }
    return model, draw_clips(data, st.integers(1, N_FRAMES))


def features(model: HookedLlamaOmni, waves: list[np.ndarray]) -> dict[str, Tensor]:
    return model.extract_features(waves)


def family(name: str, published: type[Speaking], models: dict[str, dict]) -> Family:
    """LLaMA-Omni or LLaMA-Omni2."""
    make: Callable[..., Speaking] = partial(build, published)
    return Family(
        name=name,
        build=make,
        hooked=hooked,
        batch=batch,
        reference=reference,
        models={"tiny": {}, **models},
        model_batches={
            "128 mels": {"n_mels": 128},
            "frames left over": {"n_frames": N_FRAMES - 4, "lengths": [180, 173]},
        },
        batches={
            "one prompt, 173 mel frames": {"lengths": [173], "words": [5]},
            "the whole clip": {"lengths": [N_FRAMES], "words": [5]},
            "right padding": {"lengths": [199, 173], "padding": "right"},
            "left padding": {"lengths": [199, 173], "padding": "left"},
            "several clips": {"lengths": [[60, 101], [173, 40, 7]], "words": [4, 8]},
            "a clip of 10 ms": {"lengths": [1], "words": [4]},
        },
        no_float64=["left padding"],
        bfloat16=["right padding", "left padding"],
        draw=draw,
        clips=mel_clips(lambda n_mel: TOKENS, features, audio_token=SPEECH),
        durations=[(0.75,), (WINDOW_S,), (0.6, 1.9)],
        connector_reach_s=0.06,
        segment_s=WINDOW_S,
    )


LLAMA_OMNI = family(
    "llama_omni",
    LlamaOmni,
    {
        "128 mels": {"n_mels": 128},
        "no GQA": {"num_key_value_heads": 6},
        "wide heads": {"head_dim": 16},
        "rescaled rotation": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        "frames left over": {"n_ctx": N_FRAMES // 2 - 2},
    },
)
LLAMA_OMNI2 = family("llama_omni2", LlamaOmni2, {"tied": {"tie_word_embeddings": True}})
