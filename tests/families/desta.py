"""DeSTA2 and DeSTA2.5-Audio: queries of several blocks of Whisper, mixed into Llama's prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn

from audio_lens import HookedAudioTransformer
from audio_lens.recipes.desta import HookedDesta2, HookedDesta25
from families.base import (
    AUDIO_TOKEN,
    EVERYTHING,
    TINY_LANGUAGE_MODEL,
    Family,
    attending,
    clips_of,
    decoder_of,
    draw_clips,
    entering_blocks,
    length_mask,
    prompts,
    random_words,
    randomise,
    run_hf,
    side_by_side,
)
from families.whisper import EAR_SHAPE
from published.desta import Desta, Desta2, Desta25, Size

N_FRAMES, QUERIES, BLOCKS = 200, 5, 5
EAR = {
    **EAR_SHAPE,
    "encoder_layers": BLOCKS,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 24,
    "max_source_positions": N_FRAMES // 2,
    "max_target_positions": 8,
    "vocab_size": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
LLAMA3_POSITIONS = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TARGETS = (1, 2, 4)  # as published: numbers of hidden states, or of layers


# -------------------------------------------------------------------------------- models


def build(
    published: type[Desta],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn: str = "eager",
    targets: Sequence[int] = TARGETS,
    connector_layers: int = 2,
    **overrides: Any,
) -> Desta:
    """A random model; ``overrides`` go to Llama, or with ``ear_`` before their names to Whisper."""
    ear = {key: overrides.pop(f"ear_{key}", value) for key, value in EAR.items()}
    text = transformers.LlamaConfig(**{**TINY_LANGUAGE_MODEL, **overrides})
    size = Size(tuple(targets), QUERIES, connector_layers, d_inner=40)
    model = published(transformers.WhisperConfig(**ear), text, size)
    for part in (model.ear.whisper, model.language):
        part.set_attn_implementation(attn)
    return about_one(randomise(model, seed), seed).to(dtype)


def about_one(model: nn.Module, seed: int) -> nn.Module:
    """The gains that `randomise` does not know by name."""
    for name, module in model.named_modules():
        if name.endswith("LayerNorm") or name.endswith("proj.0"):
            module.weight.data += 1
    return model


def hooked(model: Desta) -> HookedAudioTransformer:
    """Ours, with the connector's weights as published."""
    state, targets = model.ear.connector.state_dict(), model.ear.targets
    if isinstance(model, Desta2):
        taps = tuple(target - 1 for target in targets)  # the first hidden state enters layer 0
        ours = HookedDesta2.of(state, model.ear.whisper, model.language, taps)
    else:
        state = {f"perception.connector.{name}": tensor for name, tensor in state.items()}
        ours = HookedDesta25.of(state, model.ear.whisper, model.language, targets)
    ours.audio_token_id = AUDIO_TOKEN
    return ours


# -------------------------------------------------------------------------------- inputs


def batch(
    lengths: Sequence[int | Sequence[int]] = (173, 60),
    words: Sequence[int] = (6, 4),
    padding: str = "right",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Prompts of so many words about clips of so many mel frames: one clip each, or several."""
    generator = torch.Generator().manual_seed(seed)
    clips = clips_of(lengths)
    flat = [n for prompt in clips for n in prompt]
    texts = [random_words(count, generator) for count in words]
    features = torch.randn(len(flat), EAR["num_mel_bins"], N_FRAMES, generator=generator)
    return {
        **prompts(texts, [[QUERIES] * len(prompt) for prompt in clips], padding),
        "input_features": features.to(dtype),
        "feature_attention_mask": length_mask(flat, N_FRAMES),
    }


def starts(tokens: Tensor) -> list[tuple[int, int]]:
    """Row and position where the vectors of each clip begin."""
    return [tuple(place) for place in (tokens == AUDIO_TOKEN).nonzero()[::QUERIES].tolist()]


# -------------------------------------------------------------------------------- reference


def reference(model: Desta, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names, where the queries of all blocks stand side by side."""
    encoder, bert = model.ear.whisper.model.encoder, model.ear.connector.qformer.layer
    is_eager = encoder.config._attn_implementation == "eager"
    n_taps, tokens = len(model.ear.targets), batch["input_ids"]
    read = encoder.layers[: max(model.ear.targets) + isinstance(model, Desta25)]
    out, found = run_hf(
        model,
        {
            "input_ids": tokens,
            "attention_mask": batch["attention_mask"],
            "features": batch["input_features"],
            "starts": starts(tokens),
        },
        entering={
            **entering_blocks("encoder", read),
            **entering_blocks("connector", bert),
        },
        leaving={"encoder.hook_out": read[-1], "connector.hook_out": model.ear.connector},
        patterns={
            **attending("encoder", read),
            **attending("connector", bert, "attention.self"),
            **attending("connector", bert, "crossattention.self", "cross_attn"),
        },
        **{**EVERYTHING, "output_attentions": is_eager},
    )
    states = {
        name: of_clips(tensor, n_taps) if name.startswith("connector.blocks") else tensor
        for name, tensor in found.items()
        if is_eager or not name.endswith("hook_pattern")
    }
    return {**states, **decoder_of(out)}


def of_clips(tensor: Tensor, n_taps: int) -> Tensor:
    """What was computed block after block for a batch; patterns are zero between blocks."""
    by_clip = tensor.unflatten(0, (n_taps, -1)).transpose(0, 1)  # clip tap ...
    return side_by_side(by_clip.flatten(0, 1), len(by_clip))


def draw(data: st.DataObject) -> tuple[dict, dict]:
    """Any shape, any blocks that are read, and prompts about one or two clips."""
    targets = st.lists(st.integers(1, BLOCKS - 1), min_size=1, max_size=4, unique=True)
    model = {
        "targets": sorted(data.draw(targets, "targets")),
        "connector_layers": data.draw(st.integers(1, 3), "connector_layers"),
        "ear_encoder_attention_heads": data.draw(st.sampled_from((1, 2, 8)), "heads"),
        "num_hidden_layers": data.draw(st.integers(1, 2), "decoder_layers"),
    }
    return model, draw_clips(data, st.integers(1, N_FRAMES))


def family(name: str, published: type[Desta]) -> Family:
    made: Callable[..., Desta] = functools.partial(build, published)
    return Family(
        name=name,
        build=made,
        batch=batch,
        hooked=hooked,
        reference=reference,
        models={
            "tiny": {},
            "the last block": {"targets": (2, BLOCKS - 1)},
            "one block": {"targets": (3,)},
            "many layers in the connector": {"connector_layers": 6},
            "rescaled positions": {"rope_parameters": LLAMA3_POSITIONS},
        },
        batches={
            "one prompt": {"lengths": [173], "words": [5]},
            "the whole window": {"lengths": [N_FRAMES], "words": [5]},
            "right padding": {},
            "left padding": {"padding": "left"},
            "several clips": {"lengths": [[60, 199], [173, 24, 17]], "words": [4, 8]},
        },
        no_float64=("left padding",),
        draw=draw,
    )


DESTA2, DESTA25 = family("desta2", Desta2), family("desta25", Desta25)
