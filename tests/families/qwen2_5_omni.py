"""Qwen2.5-Omni's thinker: Whisper's ear in chunks of 2 s, pooled in pairs, and a Qwen2.5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as modeling

from audio_lens import HookedAudioTransformer
from families import chunked
from families.audio_llms import extracted, mel_clips
from families.base import AUDIO_TOKEN, TINY_LANGUAGE_MODEL, ready
from families.chunked import NO_FLOAT64, ChunkedEar
from families.whisper import EAR_SHAPE

CHUNK = 200  # mel frames
TINY_EAR = {**EAR_SHAPE, "max_source_positions": CHUNK // 2}
TINY_EYE = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 48,
}
SPECIAL = {"audio_start_token_id": 93, "user_token_id": 94}
BATCHES: dict[str, dict] = {
    "one prompt, 173 mel frames": {"lengths": [173], "words": [5]},
    "one prompt, 199 mel frames": {"lengths": [199], "words": [5]},
    "one frame over a chunk": {"lengths": [201], "words": [5]},
    "a whole chunk": {"lengths": [CHUNK], "words": [5]},
    "chunks and a part": {"lengths": [450], "words": [5]},
    "over 30 s": {"lengths": [3150], "words": [5]},
    "short clips": {"lengths": [73, 9], "padding": "right"},
    "right padding": {"lengths": [450, 201], "padding": "right"},
    "left padding": {"lengths": [201, 450], "padding": "left"},
    "several clips": {"lengths": [[60, 401], [233, 240, 47]], "words": [4, 8], "padding": "right"},
    "one-token clip": {"lengths": [8], "words": [4]},
}
"""By mel frames (10 ms) of the clips; every ear that hears in chunks has these."""


def thinker_config(make: type, ear: dict, text: dict, **options: Any) -> Any:
    """A config of ear, language model and a tiny eye, which nobody uses."""
    config = make(audio_config=ear, text_config=text, vision_config=TINY_EYE, **SPECIAL, **options)
    config.vision_start_token_id = 96  # positions need it, and it has no default
    return config


def build(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn: str = "eager",
    n_window: int = CHUNK // 2,
    **overrides: Any,
) -> transformers.Qwen2_5OmniThinkerForConditionalGeneration:
    """A random thinker; ``overrides`` go to the encoder's config where it has that name."""
    ear = {key: overrides.pop(key, value) for key, value in TINY_EAR.items()}
    text = {**TINY_LANGUAGE_MODEL, **overrides}
    d_head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    theta = text.pop("rope_theta", 1e4)
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": theta,
        "mrope_section": [d_head // 2 - 2, 1, 1],
    }
    config = thinker_config(
        transformers.Qwen2_5OmniThinkerConfig,
        {**ear, "n_window": n_window, "output_dim": text["hidden_size"]},
        text,
        audio_token_index=AUDIO_TOKEN,
        image_token_index=91,
        video_token_index=92,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    model = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    return ready(model, seed, dtype, attn)


# -------------------------------------------------------------------------------- inputs


def audio_tokens(n_mel: int) -> int:
    """Audio tokens of a clip of ``n_mel`` mel frames."""
    return ((n_mel - 1) // 2 + 1) // 2


def frames_of(n_mel: int) -> int:
    """Encoder frames of so many mel frames."""
    return (n_mel - 1) // 2 + 1


EAR = ChunkedEar(modeling, frames_of, audio_tokens)


def batch(lengths: Sequence[int | Sequence[int]] = (450, 201), **options: Any) -> dict[str, Tensor]:
    return EAR.batch(lengths, **options)


def features(model: HookedAudioTransformer, waves: list[np.ndarray]) -> dict[str, Tensor]:
    extractor = transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=12)
    return extracted(extractor, waves)


WHOLE_ROWS = st.integers(40, CHUNK)  # mel frames of a last chunk, which sums in one order


def draw(data: st.DataObject) -> tuple[dict, dict]:
    return chunked.draw(data, CHUNK, WHOLE_ROWS)


def reference(hf: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names, the encoder's packed sequence as a row per chunk."""
    leaving = {"connector.hook_out": hf.model.audio_tower.proj}
    return EAR.reference(hf, batch, 2 * hf.config.audio_config.n_window, leaving)


QWEN2_5_OMNI = EAR.family(
    "qwen2_5_omni",
    {"chunks of 1 s": {"n_window": 50}, "slow rotation": {"rope_theta": 1e6}},
    CHUNK,
    build=build,
    batch=batch,
    reference=reference,
    batches=BATCHES,
    no_float64=NO_FLOAT64,
    draw=draw,
    clips=mel_clips(audio_tokens, features),
    chunk_s=CHUNK / 100,
)
