"""Soundwave: pairs of Whisper's frames, adapted, shrunk to some of them, and Llama."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn

from audio_lens import AudioInputs, HookedAudioTransformer
from audio_lens.recipes.soundwave import HookedSoundwave, soundwave_of
from families.audio_llms import N_FRAMES, WINDOW_S, extracted, extractor
from families.base import (
    AUDIO_TOKEN,
    EVERYTHING,
    TINY_LANGUAGE_MODEL,
    Family,
    attending,
    decoder_attended,
    decoder_of,
    entering_blocks,
    length_mask,
    prompts,
    prompts_about,
    random_words,
    ready,
    recorded,
)
from families.whisper import EAR_SHAPE
from published.soundwave import Soundwave

EAR = {
    **EAR_SHAPE,
    "max_source_positions": N_FRAMES // 2,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 8,
    "vocab_size": 60,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
}
FRAMES = N_FRAMES // 4


def build(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn: str = "eager",
    looks_back: bool = True,
    **overrides: Any,
) -> Soundwave:
    """The published model; ``overrides`` go to the ear (``ear_*``) or the language model.

    Without ``looks_back`` kept frames find nothing in each other.
    """
    ear = {key: overrides.pop(f"ear_{key}", value) for key, value in EAR.items()}
    text = transformers.LlamaConfig(**{**TINY_LANGUAGE_MODEL, **overrides})
    model = Soundwave(text, transformers.WhisperConfig(**ear), AUDIO_TOKEN)
    model.model.audio_tower.set_attn_implementation(attn)
    model = ready(model, seed, dtype, attn)
    if not looks_back:
        for parameter in model.model.lbm.encoder_attn.out_proj.parameters():
            parameter.data.zero_()
    return model


def hooked(published: nn.Module) -> HookedSoundwave:
    """Our model of the published one's weights."""
    ear = published.model.audio_tower.config
    return soundwave_of(published.state_dict(), published.config, ear, token_id=AUDIO_TOKEN)


# -------------------------------------------------------------------------------- inputs


def some_frames(counts: Sequence[int]) -> Tensor:
    """So many frames of each clip, spread over it and beyond its end; -1 behind the last."""
    kept = torch.full((len(counts), max(counts)), -1)
    for row, count in enumerate(counts):
        kept[row, :count] = torch.linspace(row, FRAMES - 1, count).long()
    return kept


def batch(
    lengths: Sequence[int] = (173, 91),
    kept: Sequence[int] = (15, 13),
    words: Sequence[int] = (5, 7),
    padding: str = "left",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Prompts about a clip each, of so many mel frames, of which so many frames are kept."""
    generator = torch.Generator().manual_seed(seed)
    texts = [random_words(count, generator) for count in words]
    made = prompts(texts, [[count] for count in kept], padding)
    features = torch.randn(len(texts), EAR["num_mel_bins"], N_FRAMES, generator=generator)
    return {
        **made,
        "input_features": features.to(dtype),
        "feature_attention_mask": length_mask(lengths, N_FRAMES),
        "position_ids": (made["attention_mask"].cumsum(1) - 1).clamp(min=0),
        "kept": some_frames(kept),
    }


def clips(model: HookedAudioTransformer, waves: list[np.ndarray]) -> AudioInputs:
    """Every third frame of each clip is kept, whatever it sounds like."""
    made = extracted(extractor(model), waves)
    kept = torch.arange(0, FRAMES, 3).repeat(len(waves), 1)
    return model.as_inputs(
        {
            **prompts_about([kept.shape[1]] * len(waves)),
            "input_features": made["features"],
            "feature_attention_mask": made["mask"],
            "kept": kept,
        }
    )


# -------------------------------------------------------------------------------- reference


def reference(published: Soundwave, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prompt by prompt, as the published code has it, and put side by side."""
    rows = []
    for index, kept in enumerate(batch["kept"]):
        attended = batch["attention_mask"][index].bool()
        tokens, features = batch["input_ids"][index], batch["input_features"][index]
        row = answer(published, tokens[attended], features[None], kept[kept >= 0])
        rows.append({name: placed(name, x, attended, len(kept)) for name, x in row.items()})
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def answer(
    published: Soundwave, tokens: Tensor, features: Tensor, kept: Tensor | None = None
) -> dict[str, Tensor]:
    """Everything the published code computes of one prompt; ``kept`` None leaves that to it."""
    inner, found = published.model, {}
    tower, adapter, look_back = inner.audio_tower, inner.asr_transformer_encoder, inner.lbm
    layer, is_first = adapter.layers[0], torch.ones_like(tokens, dtype=torch.bool)
    is_first[1:] = (tokens[1:] != AUDIO_TOKEN) | (tokens[:-1] != AUDIO_TOKEN)
    with recorded(
        found,
        entering={
            **entering_blocks("encoder", tower.layers),
            "connector.blocks.0.hook_resid_pre": layer,
            "connector.hook_stacked": inner.mm_projector1,
            "connector.hook_kept": look_back,
        },
        leaving={
            "encoder.hook_out": tower,
            "connector.blocks.0.hook_resid_post": layer,
            "connector.blocks.0.hook_attn_out": layer.self_attn,
            "connector.hook_frames": inner.out_norm,
            "connector.hook_cross_attn_out": look_back.encoder_attn,
            "connector.hook_out": look_back,
        },
        patterns={
            **attending("encoder", tower.layers),
            "connector.cross_attn.hook_pattern": look_back.encoder_attn,
        },
    ):
        out, _ = published.answer(tokens[is_first], features, kept, **EVERYTHING)
    made = {**{name: tensor for name, (tensor,) in found.items()}, **decoder_of(out)}
    if published.config._attn_implementation == "eager":
        read = layer.norm1(made["connector.blocks.0.hook_resid_pre"])
        _, own = layer.self_attn(read, read, read, average_attn_weights=False)  # t h 1 1
        made["connector.blocks.0.attn.hook_pattern"] = own[..., 0, 0].T.diag_embed()[None]
    else:
        made = {name: x for name, x in made.items() if not name.endswith("hook_pattern")}
    return made


def of_kept(name: str) -> bool:
    """Whether an activation lies on the frames that are kept."""
    of_frames = ("connector.blocks", "connector.hook_stacked", "connector.hook_frames")
    return name.startswith("connector") and not name.startswith(of_frames)


def placed(name: str, tensor: Tensor, attended: Tensor, n_kept: int) -> Tensor:
    """As in a batch: prompts at their attended positions, kept frames before the padding."""
    if of_kept(name):
        return F.pad(tensor, (0, 0, 0, n_kept - tensor.shape[-2]))[None]
    if name.startswith(("encoder", "connector")):
        return tensor
    made = tensor.new_zeros(*tensor.shape[:-2], len(attended), tensor.shape[-1])
    made[..., attended, :] = tensor
    if not name.endswith("hook_pattern"):
        return made
    whole = made.new_zeros(*made.shape[:-1], len(attended))
    whole[..., attended] = made
    return whole


def compared(name: str, tensor: Tensor, inputs: AudioInputs) -> Tensor:
    """Of prompts what is attended, of kept frames those that there are."""
    if not of_kept(name):
        return decoder_attended(name, tensor, inputs)
    by_position = tensor.transpose(1, 2) if name.endswith("hook_pattern") else tensor
    return by_position[inputs.extra["kept"] >= 0]


def draw(data: st.DataObject) -> tuple[dict, dict]:
    """A shape of ear and Llama, and any number of frames of a clip."""
    model = {
        "ear_encoder_layers": data.draw(st.integers(1, 3), "encoder_layers"),
        "ear_d_model": data.draw(st.sampled_from((16, 40)), "d_model"),
        "hidden_size": data.draw(st.sampled_from((24, 48)), "hidden_size"),
        "num_hidden_layers": data.draw(st.integers(1, 3), "decoder_layers"),
        "num_attention_heads": 6,
        "num_key_value_heads": data.draw(st.sampled_from((1, 2, 3, 6)), "key_value_heads"),
    }
    length = data.draw(st.integers(1, N_FRAMES), "length")
    kept = data.draw(st.integers(1, FRAMES), "kept")
    return model, {"lengths": [length], "kept": [kept], "words": [4]}


SOUNDWAVE = Family(
    name="soundwave",
    build=build,
    batch=batch,
    reference=reference,
    hooked=hooked,
    models={
        "tiny": {},
        "no GQA": {"num_key_value_heads": 6},
        "other widths": {"hidden_size": 24, "num_attention_heads": 4, "ear_d_model": 24},
        "llama 3's rotary positions": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    },
    batches={
        "equally long prompts": {},
        "left padding": {"words": [7, 5]},
        "right padding": {"words": [7, 5], "padding": "right"},
        "one clip": {"lengths": [200], "kept": [20], "words": [5]},
        "one frame": {"lengths": [173], "kept": [1], "words": [5]},
        "all frames": {"lengths": [199], "kept": [FRAMES], "words": [5]},
    },
    no_float64=("left padding", "right padding"),  # float32 softmax over rows of another length
    mask_of=compared,
    draw=draw,
    clips=clips,
    durations=((0.75,), (2.0,), (0.6, 1.9)),
    impulse_model={"looks_back": False},
    segment_s=WINDOW_S,
)
