"""Qwen-Audio: Whisper's ear as far as the longest clip reaches, and clips between tags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from audio_lens import AudioInputs, HookedAudioTransformer
from audio_lens.recipes.qwen_audio import HookedQwenAudio, qwen_audio_config, qwen_audio_of
from families.audio_llms import enclosed
from families.base import (
    AUDIO_TOKEN,
    Family,
    by_layer,
    decoder_attended,
    length_mask,
    padded_rows,
    random_words,
    randomise,
    run_hf,
    with_clips,
)
from families.whisper import N_FRAMES, mel_features
from published.qwen_audio import QWenLMHeadModel, fuse

OPENING = AUDIO_TOKEN + 3312  # as far behind the placeholder as in the published vocabulary
EAR = {
    "n_mels": 20,
    "n_ctx": N_FRAMES // 2,
    "n_state": 32,
    "n_head": 4,
    "n_layer": 3,
    "avg_pool": True,
    "add_audio_bos_eos_token": True,
    "audio_start_id": OPENING,
}
LANGUAGE = {
    "vocab_size": OPENING + 2,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": 512,
    "no_bias": True,
}


def config(**overrides: Any) -> dict[str, Any]:
    """As ``config.json`` has it; ``overrides`` go to the ear where it has that name."""
    ear = {key: overrides.pop(key, value) for key, value in EAR.items()}
    made = {**LANGUAGE, **overrides}
    made["kv_channels"] = made["hidden_size"] // made["num_attention_heads"]
    return {**made, "audio": {**ear, "output_dim": made["hidden_size"]}}


def build(
    seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "eager", **overrides: Any
) -> QWenLMHeadModel:
    model = randomise(QWenLMHeadModel(config(**overrides)), seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln" in name and name.endswith("weight"):
                parameter += 1
    fuse(model, attn == "sdpa")
    return model.to(dtype)


def hooked(published: QWenLMHeadModel) -> HookedQwenAudio:
    """Our model of its weights."""
    return qwen_audio_of(qwen_audio_config(published.config), published.state_dict())


def audio_tokens(n_mel: int) -> int:
    """Audio tokens of a clip of ``n_mel`` mel frames."""
    return ((n_mel - 1) // 2 + 1) // 2


def batch(
    lengths: Sequence[int | Sequence[int]] = (181, 173),
    words: Sequence[int] = (6, 4),
    padding: str = "right",
    n_mels: int = 20,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Prompts of so many words about clips of so many mel frames: one clip each, or several."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [[n] if isinstance(n, int) else list(n) for n in lengths]
    flat = [n for prompt in prompts for n in prompt]
    features = torch.randn(len(flat), n_mels, N_FRAMES, generator=generator, dtype=dtype)
    rows = [
        with_clips(random_words(count, generator), [audio_tokens(n) for n in prompt])
        for count, prompt in zip(words, prompts, strict=True)
    ]
    tokens, mask = padded_rows([enclosed(row, (OPENING, OPENING + 1)) for row in rows], padding)
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "input_features": features,
        "feature_attention_mask": length_mask(flat, N_FRAMES),
    }


def reference(published: QWenLMHeadModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names."""
    inner = published.transformer
    ear = inner.audio
    logits, found = run_hf(
        published,
        batch,
        entering={
            **by_layer("encoder.blocks.{l}.hook_resid_pre", ear.blocks),
            **by_layer("decoder.blocks.{l}.hook_resid_pre", inner.h),
        },
        leaving={
            "encoder.hook_out": ear.ln_post,
            "connector.hook_out": ear.proj,
            "decoder.hook_out": inner.ln_f,
        },
        patterns={
            **by_layer("encoder.blocks.{l}.attn.hook_pattern", [x.attn for x in ear.blocks]),
            **by_layer("decoder.blocks.{l}.attn.hook_pattern", [x.attn for x in inner.h]),
        },
    )
    return {"hook_logits": logits, **found}


def compared(name: str, tensor: Tensor, inputs: AudioInputs) -> Tensor:
    """Of the ear and the connector what is no padding."""
    if not name.startswith(("encoder", "connector")):
        return decoder_attended(name, tensor, inputs)
    tensor = tensor.transpose(1, 2) if name.endswith("hook_pattern") else tensor
    is_pooled = name in ("encoder.hook_out", "connector.hook_out")
    counts = [(inputs.n_valid(clip) - 1) // 2 + 1 for clip in range(len(tensor))]
    counts = [n // 2 for n in counts] if is_pooled else counts
    return tensor[length_mask(counts, tensor.shape[1]).bool()]


def draw(data: st.DataObject) -> tuple[dict, dict]:
    """Any shape of model, with any number of clips of any length."""
    model = {
        "n_state": data.draw(st.sampled_from((8, 24)), "n_state"),
        "n_layer": data.draw(st.integers(1, 3), "encoder_layers"),
        "hidden_size": data.draw(st.sampled_from((24, 48)), "hidden_size"),
        "num_hidden_layers": data.draw(st.integers(1, 3), "decoder_layers"),
        "num_attention_heads": data.draw(st.sampled_from((1, 2, 6)), "heads"),
    }
    prompt = st.lists(st.integers(4, N_FRAMES), min_size=1, max_size=2)
    lengths = data.draw(st.lists(prompt, min_size=1, max_size=2), "lengths")
    return model, {"lengths": lengths, "words": [3 + len(clips) for clips in lengths]}


def clips(model: HookedAudioTransformer, waveforms: list[np.ndarray]) -> AudioInputs:
    """A prompt each."""
    made = mel_features(model, waveforms)
    rows = [with_clips([7, 8, 9], [audio_tokens(int(n))]) for n in made["mask"].sum(1)]
    tokens, mask = padded_rows([enclosed(row, (OPENING, OPENING + 1)) for row in rows], "left")
    return model.as_inputs(
        {
            "input_ids": tokens,
            "attention_mask": mask,
            "input_features": made["features"],
            "feature_attention_mask": made["mask"],
        }
    )


QWEN_AUDIO = Family(
    name="qwen_audio",
    build=build,
    hooked=hooked,
    batch=batch,
    reference=reference,
    models={
        "tiny": {},
        "80 mels": {"n_mels": 80},
        "one head": {"num_attention_heads": 1},
        "slow rotation": {"rotary_emb_base": 1000000},
    },
    model_batches={"80 mels": {"n_mels": 80}},
    batches={
        "one prompt, 173 mel frames": {"lengths": [173], "words": [5]},
        "one prompt, 199 mel frames": {"lengths": [199], "words": [5]},
        "the whole clip": {"lengths": [N_FRAMES], "words": [5]},
        "right padding": {"lengths": [199, 173], "padding": "right"},
        "left padding": {"lengths": [199, 173], "padding": "left"},
        "several clips": {"lengths": [[60, 101], [173, 40, 7]], "words": [4, 8]},
        "one-token clip": {"lengths": [4], "words": [4]},
    },
    bfloat16=["right padding", "left padding"],
    mask_of=compared,
    draw=draw,
    clips=clips,
    durations=[(1.0,), (2.0,), (0.6, 1.9)],
)
