"""Qwen3-ASR: clips under half a second, by its own feature extractor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from audio_lens import HookedAudioTransformer
from families.base import AUDIO_TOKEN
from families.qwen3_asr import audio_tokens, build


@pytest.fixture(params=["told by the shape", "named by the checkpoint"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> HookedAudioTransformer:
    """A model with and without a feature extractor in its directory."""
    hf = build()
    if request.param == "told by the shape":
        return HookedAudioTransformer.from_hf(hf)
    hf.save_pretrained(tmp_path)
    transformers.Qwen3ASRFeatureExtractor(feature_size=20).save_pretrained(tmp_path)
    loaded = HookedAudioTransformer.from_pretrained(tmp_path)
    assert type(loaded.feature_extractor) is transformers.Qwen3ASRFeatureExtractor
    return loaded


def prepared(model: HookedAudioTransformer, *n_samples: int) -> tuple:
    """Clips of so many samples, and inputs of one prompt about all of them."""
    clips = [np.random.default_rng(n).standard_normal(n).astype(np.float32) / 4 for n in n_samples]
    features, mask, _ = model.segments_of(clips)
    counts = [model.token_count(int(held.sum())) for held in mask]
    tokens = [5, *(token for count in counts for token in (*[AUDIO_TOKEN] * count, 6))]
    inputs = model.as_inputs(
        {
            "input_ids": torch.tensor([tokens]),
            "attention_mask": torch.ones(1, len(tokens), dtype=torch.long),
            "input_features": features[..., :100],
            "input_features_mask": mask[..., :100].long(),
        }
    )
    return clips, inputs


@pytest.mark.parametrize("n_samples", [161, 3200, 7999, 8000, 8160, 12_345])
def test_short_clips_are_heard_as_hugging_face_hears_them(
    model: HookedAudioTransformer, n_samples: int
) -> None:
    (clip,), inputs = prepared(model, n_samples)
    theirs = transformers.Qwen3ASRFeatureExtractor(feature_size=20)(
        clip, sampling_rate=16_000, padding=True, return_attention_mask=True
    )
    frames = int(theirs["attention_mask"].sum())
    assert frames == max(n_samples, 8000) // 160
    assert inputs.n_valid(0) == frames
    assert torch.equal(inputs.features[..., :100], theirs["input_features"])
    assert int((inputs.tokens == AUDIO_TOKEN).sum()) == audio_tokens(frames)


def test_a_short_clip_ends_where_its_samples_do(model: HookedAudioTransformer) -> None:
    clips, inputs = prepared(model, 4800, 12_000)
    heard = model.timeline(inputs)  # of a processor's mapping, which does not say more
    assert heard.duration_s(0) == pytest.approx(0.5)
    inputs.audio = clips
    timeline = model.timeline(inputs)
    assert timeline.duration_s(0) == pytest.approx(0.3)
    assert timeline.duration_s(1) == pytest.approx(0.75)
    row = timeline.rows[0]
    for part in ("encoder", "connector"):
        short, long = row.tracks[part]
        assert short.valid.sum() == audio_tokens(30) and long.valid.sum() == audio_tokens(75)
        assert short.seconds[:7].tolist() == pytest.approx([0.08 * i for i in range(7)])
    decoder = row.tracks["decoder"][0].seconds[inputs.tokens[0] == AUDIO_TOKEN]
    expected = [0.08 * i for i in range(7)] + [0.08 * i for i in range(audio_tokens(75))]
    assert decoder.tolist() == pytest.approx(expected)
