"""Qwen2.5-Omni's thinker: Whisper's ear in chunks of 2 s, pooled in pairs, and a Qwen2.5.

What the other Qwen ears that hear in chunks share with it is here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as modeling

from audio_lens import AudioInputs, HookedAudioTransformer
from families.base import (
    AUDIO_TOKEN,
    TINY_LANGUAGE_MODEL,
    Family,
    attentions,
    by_layer,
    decoder_attended,
    hidden_states,
    length_mask,
    padded_rows,
    prompts_about,
    random_words,
    randomise,
    run_hf,
    with_clips,
)

CHUNK = 200  # mel frames
TINY_EAR = {
    "num_mel_bins": 20,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "d_model": 32,
    "max_source_positions": CHUNK // 2,
}
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
NO_FLOAT64 = ("left padding", "short clips", "one-token clip")
"""Left padding gives NaN; the encoder's softmax is in float32, where a row with fewer keys than a
vector register holds is summed in another order than one that is padded with keys of no weight."""


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
    model.set_attn_implementation(attn)
    return randomise(model, seed).to(dtype)


# -------------------------------------------------------------------------------- inputs


def audio_tokens(n_mel: int) -> int:
    """Audio tokens of a clip of ``n_mel`` mel frames."""
    return ((n_mel - 1) // 2 + 1) // 2


def chunked_batch(
    tokens_of: Callable[[int], int],
    mask_key: str = "feature_attention_mask",
    multiple_of: int = 7,
    lengths: Sequence[int | Sequence[int]] = (450, 201),
    words: Sequence[int] = (6, 4),
    padding: str = "right",
    n_mels: int = 20,
    single_placeholder: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Prompts of so many words about clips of so many mel frames: one clip each, or several.

    Features are padded to a multiple of ``multiple_of`` frames beyond the longest clip.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = [[n] if isinstance(n, int) else list(n) for n in lengths]
    flat = [n for prompt in prompts for n in prompt]
    width = -(-max(flat) // multiple_of) * multiple_of
    features = torch.randn(len(flat), n_mels, width, generator=generator, dtype=dtype)
    rows = [
        with_clips(
            random_words(count, generator),
            [1 if single_placeholder else tokens_of(n) for n in prompt],
        )
        for count, prompt in zip(words, prompts, strict=True)
    ]
    tokens, mask = padded_rows(rows, padding)
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "input_features": features,
        mask_key: length_mask(flat, width),
    }


def batch(**options: Any) -> dict[str, Tensor]:
    return chunked_batch(audio_tokens, **options)


def clips(model: HookedAudioTransformer, waveforms: list[np.ndarray]) -> AudioInputs:
    """A prompt each."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=12)
    made = extractor(
        waveforms, sampling_rate=16_000, return_attention_mask=True, return_tensors="pt"
    )
    mask = made["attention_mask"]
    return model.as_inputs(
        {
            **prompts_about([audio_tokens(int(n)) for n in mask.sum(-1)]),
            "input_features": made["input_features"],
            "feature_attention_mask": mask,
        }
    )


WHOLE_ROWS = st.integers(40, CHUNK)  # mel frames of a last chunk, which sums in one order


def drawn(
    data: st.DataObject, segment: int, last: st.SearchStrategy, **more: st.SearchStrategy
) -> tuple[dict, dict]:
    """Any shape of model, with any number of clips of any length.

    Args:
        segment: mel frames of a row of the encoder.
        last: those of the last row of a clip.
        more: what else to draw of the model.
    """
    heads = data.draw(st.sampled_from((4, 6)), "heads")
    divisors = {4: (1, 2, 4), 6: (1, 2, 3, 6)}[heads]
    model = {
        "d_model": data.draw(st.sampled_from((8, 24)), "d_model"),
        "encoder_layers": data.draw(st.integers(1, 3), "encoder_layers"),
        "hidden_size": data.draw(st.sampled_from((24, 48)), "hidden_size"),
        "num_hidden_layers": data.draw(st.integers(1, 3), "decoder_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": data.draw(st.sampled_from(divisors), "kv_heads"),
        "head_dim": data.draw(st.sampled_from((6, 10)), "head_dim"),
        **{name: data.draw(values, name) for name, values in more.items()},
    }
    clip = st.builds(lambda full, rest: full * segment + rest, st.integers(0, 2), last)
    prompt = st.lists(clip, min_size=1, max_size=2)
    lengths = data.draw(st.lists(prompt, min_size=1, max_size=2), "lengths")
    return model, {"lengths": lengths, "words": [3 + len(clips) for clips in lengths]}


def draw(data: st.DataObject) -> tuple[dict, dict]:
    return drawn(data, CHUNK, WHOLE_ROWS)


# -------------------------------------------------------------------------------- references


def segments(lengths: Sequence[int], width: int) -> list[int]:
    """Mel frames of every segment of every clip."""
    return [min(width, n - start) for n in lengths for start in range(0, n, width)]


def in_rows(packed: Tensor, counts: Sequence[int], width: int) -> Tensor:
    """What Hugging Face packs in one sequence, as a row per segment, padded with zeros."""
    rows = packed.new_zeros(len(counts), width, *packed.shape[1:])
    for row, piece in zip(rows, packed.split(list(counts)), strict=True):
        row[: len(piece)] = piece
    return rows


@contextmanager
def eager_patterns(modeling: ModuleType, tower: nn.Module) -> Iterator[dict[int, list[Tensor]]]:
    """While inside, the patterns of the encoder's eager attention: by layer, one per segment.

    The ``attentions`` that Hugging Face returns for these encoders are outputs, not patterns.
    """
    kept: dict[int, list[Tensor]] = {}
    layers = {layer.self_attn: index for index, layer in enumerate(tower.layers)}
    attend = modeling.eager_attention_forward

    def attend_and_keep(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, pattern = attend(module, *args, **kwargs)
        if module in layers:
            kept.setdefault(layers[module], []).append(pattern[0])
        return out, pattern

    with mock.patch.object(modeling, "eager_attention_forward", attend_and_keep):
        yield kept


def padded_patterns(kept: dict[int, list[Tensor]], width: int) -> dict[str, Tensor]:
    """Patterns of every layer, ``segments h q k``, under our names."""
    named = {}
    for layer, pieces in kept.items():
        whole = pieces[0].new_zeros(len(pieces), len(pieces[0]), width, width)
        for row, piece in zip(whole, pieces, strict=True):
            row[:, : piece.shape[1], : piece.shape[2]] = piece
        named[f"encoder.blocks.{layer}.attn.hook_pattern"] = whole
    return named


def at_valid(
    name: str, tensor: Tensor, inputs: AudioInputs, frames_of: Callable, tokens_of: Callable
) -> Tensor:
    """What is compared: positions that hold audio, or attended tokens."""
    if not name.startswith(("encoder", "connector")):
        return decoder_attended(name, tensor, inputs)
    is_frame = "blocks" in name
    by_position = tensor.transpose(1, 2) if name.endswith("hook_pattern") else tensor
    counts = [
        (frames_of if is_frame else tokens_of)(inputs.n_valid(segment))
        for segment in range(len(inputs.features))
    ]
    return by_position[length_mask(counts, by_position.shape[1]).bool()]


def frames_of(n_mel: int) -> int:
    """Encoder frames of so many mel frames."""
    return (n_mel - 1) // 2 + 1


def mask_of(name: str, tensor: Tensor, inputs: AudioInputs) -> Tensor:
    return at_valid(name, tensor, inputs, frames_of, audio_tokens)


def reference(hf: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under our names, the encoder's packed sequence as a row per chunk."""
    tower = hf.model.audio_tower
    chunk = 2 * hf.config.audio_config.n_window
    with eager_patterns(modeling, tower) as kept:
        out, found = run_hf(
            hf,
            batch,
            entering=by_layer("encoder.blocks.{l}.hook_resid_pre", tower.layers),
            leaving={"encoder.hook_out": tower.ln_post, "connector.hook_out": tower.proj},
            output_hidden_states=True,
            output_attentions=True,
        )
    mels = segments(batch["feature_attention_mask"].sum(1).tolist(), chunk)
    frames, tokens = [frames_of(n) for n in mels], [audio_tokens(n) for n in mels]
    rows = {
        name: in_rows(packed, frames, chunk // 2)
        if "blocks" in name
        else in_rows(packed, tokens, chunk // 4)
        for name, packed in found.items()
    }
    return {
        "hook_logits": out.logits,
        **rows,
        **padded_patterns(kept, chunk // 2),
        **hidden_states("decoder", out.hidden_states),
        **attentions("decoder", out.attentions),
    }


QWEN2_5_OMNI = Family(
    name="qwen2_5_omni",
    build=build,
    batch=batch,
    reference=reference,
    models={
        "tiny": {},
        "128 mels": {"num_mel_bins": 128},
        "chunks of 1 s": {"n_window": 50},
        "no GQA": {"num_key_value_heads": 6},
        "wide heads": {"head_dim": 16},
        "tied": {"tie_word_embeddings": True},
        "slow rotation": {"rope_theta": 1e6},
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
    segment_s=CHUNK / 100,
    chunk_s=CHUNK / 100,
)
