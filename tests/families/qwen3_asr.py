"""Qwen3-ASR: convolutions over 1 s, attention over 8 s, an MLP, and a dense Qwen3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.qwen3_asr import modeling_qwen3_asr as modeling

from audio_lens import HookedAudioTransformer
from families import chunked
from families.audio_llms import extracted, mel_clips
from families.base import AUDIO_TOKEN, END, PAD, TINY_LANGUAGE_MODEL, ready
from families.chunked import ChunkedEar
from families.whisper import EAR_SHAPE

CHUNK, PER_CHUNK = 100, 13
WINDOW = 200  # mel frames; of the tiny models, 800 of the released ones
TINY_EAR = {**EAR_SHAPE, "n_window_infer": WINDOW, "downsample_hidden_size": 6}
BATCHES: dict[str, dict] = {
    "one prompt, 173 mel frames": {"lengths": [173], "words": [5]},
    "one prompt, 199 mel frames": {"lengths": [199], "words": [5]},
    "one frame over a window": {"lengths": [201], "words": [5]},
    "a whole window": {"lengths": [WINDOW], "words": [5]},
    "a whole chunk": {"lengths": [CHUNK], "words": [5]},
    "windows and a part": {"lengths": [580], "words": [5]},
    "over 30 s": {"lengths": [3150], "words": [5]},
    "short clips": {"lengths": [73, 9], "padding": "right"},
    "right padding": {"lengths": [580, 373], "padding": "right"},
    "left padding": {"lengths": [201, 450], "padding": "left"},
    "several clips": {"lengths": [[160, 401], [373, 340, 180]], "words": [4, 8]},
    "one-token clip": {"lengths": [8], "words": [4]},
}
"""By mel frames; but for short clips, a last window has more positions than a vector register."""
NO_FLOAT64 = (*chunked.NO_FLOAT64, "a whole chunk")


def audio_tokens(n_mel: int) -> int:
    """Audio tokens of a clip of ``n_mel`` mel frames, and positions of the encoder."""
    rest = n_mel % CHUNK
    for _ in range(3):
        rest = (rest - 1) // 2 + 1
    return n_mel // CHUNK * PER_CHUNK + rest


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "eager", **overrides: Any
) -> transformers.Qwen3ASRForConditionalGeneration:
    """A random Qwen3-ASR; ``overrides`` go to the encoder's config where it has that name."""
    ear = {key: overrides.pop(key, value) for key, value in TINY_EAR.items()}
    text = {"model_type": "qwen3", "head_dim": 8, **TINY_LANGUAGE_MODEL, **overrides}
    config = transformers.Qwen3ASRConfig(
        audio_config={
            "model_type": "qwen3_asr_encoder",
            "output_dim": text["hidden_size"],
            **ear,
        },
        text_config=text,
        audio_token_id=AUDIO_TOKEN,
        pad_token_id=PAD,
        eos_token_id=END,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    model = transformers.Qwen3ASRForConditionalGeneration(config)
    return ready(model, seed, dtype, attn)


EAR = ChunkedEar(modeling, audio_tokens, audio_tokens, "input_features_mask", CHUNK)


def batch(lengths: Sequence[int | Sequence[int]] = (580, 201), **options: Any) -> dict[str, Tensor]:
    return EAR.batch(lengths, **options)


def features(model: HookedAudioTransformer, waves: list[np.ndarray]) -> dict[str, Tensor]:
    extractor = transformers.Qwen3ASRFeatureExtractor(feature_size=20)
    return extracted(extractor, waves, padding=True)


WHOLE_ROWS = st.integers(130, WINDOW)  # mel frames of a last window, which sums in one order


def draw(data: st.DataObject) -> tuple[dict, dict]:
    return chunked.draw(data, WINDOW, WHOLE_ROWS, downsample_hidden_size=st.integers(1, 6))


def reference(hf: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names, the encoder's packed sequence as a row per window."""
    projector = hf.model.multi_modal_projector
    leaving = {"connector.hook_pre": projector.linear_1, "connector.hook_out": projector}
    return EAR.reference(hf, batch, hf.config.audio_config.n_window_infer, leaving)


QWEN3_ASR = EAR.family(
    "qwen3_asr",
    {"windows of 3 s": {"n_window_infer": 300}},
    WINDOW,
    build=build,
    batch=batch,
    reference=reference,
    batches=BATCHES,
    no_float64=NO_FLOAT64,
    draw=draw,
    clips=mel_clips(audio_tokens, features, "input_features_mask"),
    reach_s=0.07,
    connector_reach_s=0.07,
    chunk_s=CHUNK / 100,
)
