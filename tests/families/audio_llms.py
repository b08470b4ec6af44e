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
    attentions,
    by_layer,
    hidden_states,
    length_mask,
    padded_rows,
    prompts_about,
    random_words,
    run_hf,
    with_clips,
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
    clips = [[n] if isinstance(n, int) else list(n) for n in lengths]
    cut = [n for prompt in clips for clip in prompt for n in windows(clip)]
    rows = []
    for count, prompt in zip(words, clips, strict=True):
        placeholders = [sum(map(tokens_of, windows(n))) for n in prompt]
        rows.append(enclosed(with_clips(random_words(count, generator), placeholders), around))
    tokens, mask = padded_rows(rows, padding)
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "input_features": torch.randn(len(cut), n_mels, N_FRAMES, generator=generator, dtype=dtype),
        "input_features_mask": length_mask(cut, N_FRAMES),
    }


def enclosed(row: list[int], around: tuple[int, ...], audio_token: int = 90) -> list[int]:
    """The row with the first of ``around`` before each run of placeholders, the second behind."""
    if not around:
        return row
    begin, end = around
    made: list[int] = []
    for before, token, after in zip([None, *row[:-1]], row, [*row[1:], None], strict=True):
        is_audio = token == audio_token
        made += [begin] * (is_audio and before != audio_token) + [token]
        made += [end] * (is_audio and after != audio_token)
    return made


def draw_windowed(data: Any) -> tuple[dict, dict]:
    """A shape of ear and Qwen2 or Llama, and clips over up to three windows."""
    heads = data.draw(st.sampled_from((4, 6)), "heads")
    divisors = {4: (1, 2, 4), 6: (1, 2, 3, 6)}[heads]
    model = {
        "ear_num_hidden_layers": data.draw(st.integers(1, 3), "encoder_layers"),
        "hidden_size": data.draw(st.sampled_from((24, 48)), "hidden_size"),
        "num_hidden_layers": data.draw(st.integers(1, 3), "decoder_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": data.draw(st.sampled_from(divisors), "key_value_heads"),
    }
    clips = st.lists(st.integers(8, 3 * N_FRAMES), min_size=1, max_size=2)
    lengths = data.draw(st.lists(clips, min_size=1, max_size=2), "lengths")
    return model, {"lengths": lengths, "words": [3 + len(prompt) for prompt in lengths]}


def extractor(model: HookedAudioTransformer) -> transformers.WhisperFeatureExtractor:
    """The feature extractor of a checkpoint with the tiny models' window."""
    return transformers.WhisperFeatureExtractor(
        feature_size=model.cfg.n_mels, chunk_length=int(WINDOW_S)
    )


def windowed_clips(
    tokens_of: Callable[[int], int],
) -> Callable[[HookedAudioTransformer, list[np.ndarray]], AudioInputs]:
    """For `Family.clips`: every window of a clip extracted on its own."""

    def inputs(model: HookedAudioTransformer, waves: list[np.ndarray]) -> AudioInputs:
        samples = N_FRAMES * 160
        cut = [wave[at : at + samples] for wave in waves for at in range(0, len(wave), samples)]
        made = extractor(model)(
            cut, sampling_rate=16_000, return_attention_mask=True, return_tensors="pt"
        )
        mels = [-(-len(wave) // 160) for wave in waves]
        prompts = prompts_about([sum(map(tokens_of, windows(n))) for n in mels])
        return model.as_inputs(
            {
                **prompts,
                "input_features": made["input_features"],
                "input_features_mask": made["attention_mask"],
            }
        )

    return inputs


# -------------------------------------------------------------------------------- references


def reference(hf: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Everything that Hugging Face's encoder, projector and language model compute."""
    tower, projector = hf.model.audio_tower, hf.model.multi_modal_projector
    out, found = run_hf(
        hf,
        batch,
        entering=by_layer("encoder.blocks.{l}.hook_resid_pre", tower.layers),
        leaving={
            "encoder.hook_out": tower,
            "connector.hook_pre": projector.linear_1,
            "connector.hook_post": projector.act,
            "connector.hook_out": projector,
        },
        patterns=by_layer(
            "encoder.blocks.{l}.attn.hook_pattern", [layer.self_attn for layer in tower.layers]
        ),
        output_hidden_states=True,
        output_attentions=True,
    )
    return {
        "hook_logits": out.logits,
        **found,
        **hidden_states("decoder", out.hidden_states),
        **attentions("decoder", out.attentions),
    }
