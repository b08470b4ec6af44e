"""What the audio LLMs under test share: a tiny Whisper-like ear, clips cut into windows, records.

The window of the tiny models is 2 s (200 mel frames), where the released ones have 30 s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn

from audio_lens import AudioInputs, HookedAudioTransformer
from families.base import (
    EVERYTHING,
    Family,
    attending,
    clips_of,
    decoder_of,
    draw_clips,
    draw_decoder,
    entering_blocks,
    length_mask,
    prompts,
    prompts_about,
    random_words,
    run_hf,
)

N_FRAMES = 200
TINY_EAR = {
    "num_mel_bins": 20,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_source_positions": N_FRAMES // 2,
}
WINDOW_S = N_FRAMES / 100
LONG_CLIPS = (0.75, 2.0, 4.3)  # seconds: within a window, a whole one, over two windows

BATCHES: dict[str, dict] = {
    "one prompt, 173 mel frames": {"lengths": [173], "words": [5]},
    "one prompt, 199 mel frames": {"lengths": [199], "words": [5]},
    "one frame over a window": {"lengths": [201], "words": [5]},
    "the whole window": {"lengths": [N_FRAMES], "words": [5]},
    "three windows": {"lengths": [2 * N_FRAMES + 45], "words": [5]},
    "right padding": {"lengths": [199, 373], "padding": "right"},
    "left padding": {"lengths": [431, 173], "padding": "left"},
    "several clips": {"lengths": [[60, 411], [173, 240, 17]], "words": [4, 8]},
    "one-token clip": {"lengths": [8], "words": [4]},
}
"""By mel frames (10 ms) of the clips; every family with windows has these."""


def config(make: type, ear: dict[str, Any], text: dict[str, Any], options: dict[str, Any]) -> Any:
    """A config of ear and language model; ``options`` go to the one that has the name, or to it."""
    ear = {key: options.pop(f"ear_{key}", value) for key, value in ear.items()}
    text = {key: options.pop(key, value) for key, value in text.items()}
    return make(audio_config=ear, text_config=text, **options)


# -------------------------------------------------------------------------------- inputs


def windows(n_mel: int) -> list[int]:
    """Mel frames in each window of a clip."""
    return [min(N_FRAMES, n_mel - start) for start in range(0, n_mel, N_FRAMES)]


def mel_batch(
    tokens_of: Callable[[int], int],
    n_frames: int,
    lengths: Sequence[int | Sequence[int]],
    words: Sequence[int] = (6, 4),
    padding: str = "right",
    n_mels: int = 20,
    single_placeholder: bool = False,
    mask_key: str = "feature_attention_mask",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Tensor]:
    """Prompts of so many words about clips of so many mel frames: one clip each, or several.

    Args:
        tokens_of: placeholders of a clip with so many mel frames.
        n_frames: mel frames of the features, padding included.
        single_placeholder: one placeholder per clip, as old processors wrote.
        options: of `prompts`.
    """
    generator = torch.Generator().manual_seed(seed)
    clips = clips_of(lengths)
    flat = [n for prompt in clips for n in prompt]
    features = torch.randn(len(flat), n_mels, n_frames, generator=generator, dtype=dtype)
    placeholders = [[1 if single_placeholder else tokens_of(n) for n in clip] for clip in clips]
    texts = [random_words(count, generator) for count in words]
    return {
        **prompts(texts, placeholders, padding, **options),
        "input_features": features,
        mask_key: length_mask(flat, n_frames),
    }


def windowed_batch(
    tokens_of: Callable[[int], int],
    lengths: Sequence[int | Sequence[int]] = (201, 173),
    words: Sequence[int] = (6, 4),
    padding: str = "right",
    n_mels: int = 20,
    around: tuple[int, ...] = (),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """What a processor that cuts clips into windows would return, at random.

    Args:
        tokens_of: placeholders of a window with so many mel frames.
        lengths: mel frames of the clip of each prompt, or of its clips.
        words: text tokens of each prompt.
        around: the tokens before and behind the placeholders of a clip.
    """
    generator = torch.Generator().manual_seed(seed)
    clips = clips_of(lengths)
    cut = [n for prompt in clips for clip in prompt for n in windows(clip)]
    texts = [random_words(count, generator) for count in words]
    placeholders = [[sum(map(tokens_of, windows(n))) for n in prompt] for prompt in clips]
    return {
        **prompts(texts, placeholders, padding, around=around),
        "input_features": torch.randn(len(cut), n_mels, N_FRAMES, generator=generator, dtype=dtype),
        "input_features_mask": length_mask(cut, N_FRAMES),
    }


def draw_windowed(data: Any) -> tuple[dict, dict]:
    """A shape of ear and Qwen2 or Llama, and clips over up to three windows."""
    layers = data.draw(st.integers(1, 3), "encoder_layers")
    model = {"ear_num_hidden_layers": layers, **draw_decoder(data)}
    return model, draw_clips(data, st.integers(8, 3 * N_FRAMES))


def extractor(model: HookedAudioTransformer) -> transformers.WhisperFeatureExtractor:
    """The feature extractor of a checkpoint with the tiny models' window."""
    return transformers.WhisperFeatureExtractor(
        feature_size=model.cfg.n_mels, chunk_length=int(WINDOW_S)
    )


def extracted(extract: Callable, waves: list[np.ndarray], **options: Any) -> dict[str, Tensor]:
    """``features`` and ``mask`` of clips by a Hugging Face extractor."""
    made = extract(
        waves, sampling_rate=16_000, return_attention_mask=True, return_tensors="pt", **options
    )
    return {"features": made["input_features"], "mask": made["attention_mask"]}


def mel_clips(
    tokens_of: Callable[[int], int],
    extract: Callable[[HookedAudioTransformer, list[np.ndarray]], dict[str, Tensor]],
    mask_key: str = "feature_attention_mask",
    **options: Any,
) -> Callable[[HookedAudioTransformer, list[np.ndarray]], AudioInputs]:
    """For `Family.clips`: a prompt about each clip, of which ``extract`` makes features and mask.

    Args:
        options: of `prompts`.
    """

    def inputs(model: HookedAudioTransformer, waves: list[np.ndarray]) -> AudioInputs:
        made = extract(model, waves)
        counts = [tokens_of(int(n)) for n in made["mask"].sum(-1)]
        features = {"input_features": made["features"], mask_key: made["mask"]}
        return model.as_inputs({**prompts_about(counts, **options), **features})

    return inputs


def windowed_features(model: HookedAudioTransformer, waves: list[np.ndarray]) -> dict[str, Tensor]:
    """Every window of a clip extracted on its own."""
    samples = N_FRAMES * 160
    cut = [wave[at : at + samples] for wave in waves for at in range(0, len(wave), samples)]
    made = extracted(extractor(model), cut)
    return {"input_features": made["features"], "input_features_mask": made["mask"]}


def windowed_prompts(tokens_of: Callable[[int], int], waves: list[np.ndarray]) -> dict[str, Tensor]:
    """A prompt about each clip, with the placeholders of all of its windows."""
    mels = [-(-len(wave) // 160) for wave in waves]
    return prompts_about([sum(map(tokens_of, windows(n))) for n in mels])


# -------------------------------------------------------------------------------- references


def heard_and_written(
    hf: nn.Module,
    batch: dict[str, Any],
    layers: Sequence[nn.Module],
    leaving: dict[str, nn.Module],
    attention: str = "self_attn",
) -> dict[str, Tensor]:
    """Under our names: streams and patterns of encoder and language model, and what is named."""
    out, found = run_hf(
        hf,
        batch,
        entering=entering_blocks("encoder", layers),
        leaving=leaving,
        patterns=attending("encoder", layers, attention),
        **EVERYTHING,
    )
    return {**found, **decoder_of(out)}


def reference(hf: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Everything that Hugging Face's encoder, projector and language model compute."""
    tower, projector = hf.model.audio_tower, hf.model.multi_modal_projector
    leaving = {
        "encoder.hook_out": tower,
        "connector.hook_pre": projector.linear_1,
        "connector.hook_post": projector.act,
        "connector.hook_out": projector,
    }
    return heard_and_written(hf, batch, tower.layers, leaving)


# -------------------------------------------------------------------------------- families


def windowed_family(
    name: str,
    tokens_of: Callable[[int], int],
    build: Callable[..., nn.Module],
    models: dict[str, dict],
    **options: Any,
) -> Family:
    """An entry for a model that cuts clips into windows; ``options`` are what differs."""

    def batch(**of_batch: Any) -> dict[str, Tensor]:
        return windowed_batch(tokens_of, **of_batch)

    def clips(model: HookedAudioTransformer, waves: list[np.ndarray]) -> AudioInputs:
        prompts = windowed_prompts(tokens_of, waves)
        return model.as_inputs({**prompts, **windowed_features(model, waves)})

    usual = {
        "batch": batch,
        "reference": reference,
        "model_batches": {"128 mels": {"n_mels": 128}},
        "batches": BATCHES,
        "no_float64": ("left padding",),
        "draw": draw_windowed,
        "clips": clips,
        "durations": [LONG_CLIPS[:1], LONG_CLIPS[1:2], LONG_CLIPS],
        "segment_s": WINDOW_S,
    }
    return Family(name=name, build=build, models={"tiny": {}, **models}, **{**usual, **options})
