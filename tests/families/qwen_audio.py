"""Qwen-Audio: Whisper's ear as far as the longest clip reaches, and clips between tags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from audio_lens import AudioInputs
from audio_lens.recipes.qwen_audio import HookedQwenAudio, qwen_audio_config, qwen_audio_of
from families.audio_llms import mel_batch, mel_clips
from families.base import (
    AUDIO_TOKEN,
    Family,
    attending,
    decoder_attended,
    draw_clips,
    entering_blocks,
    length_mask,
    randomise,
    run_hf,
)
from families.qwen2_audio import BATCHES, audio_tokens
from families.whisper import N_FRAMES, mel_features
from published.qwen_audio import QWenLMHeadModel, fuse

OPENING = AUDIO_TOKEN + 3312  # as far behind the placeholder as in the published vocabulary
TAGS = (OPENING, OPENING + 1)
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


def batch(lengths: Sequence[int | Sequence[int]] = (181, 173), **options: Any) -> dict[str, Tensor]:
    """Prompts about clips of so many mel frames, each between tags."""
    return mel_batch(audio_tokens, N_FRAMES, lengths, around=TAGS, **options)


def reference(published: QWenLMHeadModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names."""
    inner = published.transformer
    ear = inner.audio
    logits, found = run_hf(
        published,
        batch,
        {**entering_blocks("encoder", ear.blocks), **entering_blocks("decoder", inner.h)},
        {
            "encoder.hook_out": ear.ln_post,
            "connector.hook_out": ear.proj,
            "decoder.hook_out": inner.ln_f,
        },
        {**attending("encoder", ear.blocks, "attn"), **attending("decoder", inner.h, "attn")},
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
    return model, draw_clips(data, st.integers(4, N_FRAMES))


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
    batches={name: x for name, x in BATCHES.items() if name != "one prompt, 201 mel frames"},
    bfloat16=["right padding", "left padding"],
    mask_of=compared,
    draw=draw,
    clips=mel_clips(audio_tokens, mel_features, around=TAGS),
    durations=[(1.0,), (2.0,), (0.6, 1.9)],
)
