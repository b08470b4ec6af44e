"""Qwen3-ASR: convolutions over 1 s, attention over 8 s, an MLP, and a dense Qwen3."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.qwen3_asr import modeling_qwen3_asr as modeling

from audio_lens import AudioInputs, HookedAudioTransformer
from families import qwen2_5_omni as chunks
from families.base import (
    AUDIO_TOKEN,
    END,
    PAD,
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
    at_valid,
    chunked_batch,
    eager_patterns,
    in_rows,
    padded_patterns,
    segments,
)

CHUNK, PER_CHUNK = 100, 13
WINDOW = 200  # mel frames; of the tiny models, 800 of the released ones
TINY_EAR = {
    "num_mel_bins": 20,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "d_model": 32,
    "n_window_infer": WINDOW,
    "downsample_hidden_size": 6,
}
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
NO_FLOAT64 = (*chunks.NO_FLOAT64, "a whole chunk")


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
    model.set_attn_implementation(attn)
    return randomise(model, seed).to(dtype)


def batch(**options: Any) -> dict[str, Tensor]:
    options = {"lengths": (580, 201), **options}
    return chunked_batch(audio_tokens, "input_features_mask", CHUNK, **options)


def clips(model: HookedAudioTransformer, waveforms: list[np.ndarray]) -> AudioInputs:
    """A prompt each."""
    extractor = transformers.Qwen3ASRFeatureExtractor(feature_size=20)
    made = extractor(
        waveforms,
        sampling_rate=16_000,
        padding=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = made["attention_mask"]
    return model.as_inputs(
        {
            **prompts_about([audio_tokens(int(n)) for n in mask.sum(-1)]),
            "input_features": made["input_features"],
            "input_features_mask": mask,
        }
    )


WHOLE_ROWS = st.integers(130, WINDOW)  # mel frames of a last window, which sums in one order


def draw(data: st.DataObject) -> tuple[dict, dict]:
    return chunks.drawn(data, WINDOW, WHOLE_ROWS, downsample_hidden_size=st.integers(1, 6))


def mask_of(name: str, tensor: Tensor, inputs: AudioInputs) -> Tensor:
    return at_valid(name, tensor, inputs, audio_tokens, audio_tokens)


def reference(hf: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names, the encoder's packed sequence as a row per window."""
    tower, projector = hf.model.audio_tower, hf.model.multi_modal_projector
    n_window = hf.config.audio_config.n_window_infer
    with eager_patterns(modeling, tower) as kept:
        out, found = run_hf(
            hf,
            batch,
            entering=by_layer("encoder.blocks.{l}.hook_resid_pre", tower.layers),
            leaving={
                "encoder.hook_out": tower.ln_post,
                "connector.hook_pre": projector.linear_1,
                "connector.hook_out": projector,
            },
            output_hidden_states=True,
            output_attentions=True,
        )
    mels = batch["input_features_mask"].sum(1).tolist()
    counts = [audio_tokens(n) for n in segments(mels, n_window)]
    width = n_window // CHUNK * PER_CHUNK
    return {
        "hook_logits": out.logits,
        **{name: in_rows(packed, counts, width) for name, packed in found.items()},
        **padded_patterns(kept, width),
        **hidden_states("decoder", out.hidden_states),
        **attentions("decoder", out.attentions),
    }


QWEN3_ASR = Family(
    name="qwen3_asr",
    build=build,
    batch=batch,
    reference=reference,
    models={
        "tiny": {},
        "128 mels": {"num_mel_bins": 128},
        "windows of 3 s": {"n_window_infer": 300},
        "no GQA": {"num_key_value_heads": 6},
        "wide heads": {"head_dim": 16},
        "tied": {"tie_word_embeddings": True},
    },
    model_batches={"128 mels": {"n_mels": 128}},
    batches=BATCHES,
    no_float64=NO_FLOAT64,
    bfloat16=["right padding", "left padding"],
    float16_biases=lambda hf: [layer.fc2.bias for layer in hf.model.audio_tower.layers[:2]],
    mask_of=mask_of,
    draw=draw,
    clips=clips,
    durations=[(0.75,), (2.0,), (4.3,), (0.6, 2.01, 5.2)],
    reach_s=0.07,
    connector_reach_s=0.07,
    segment_s=WINDOW / 100,
    chunk_s=CHUNK / 100,
)
