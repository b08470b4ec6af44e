"""Positions and seconds: the formulas of every family, held against what the model computes."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from audio_lens import HookedAudioTransformer, Span, Timeline

RATE = 16_000
FRAME_REACH_S = 0.0325  # an encoder frame reads five mel frames, 10 ms apart, of 12.5 ms each side
TOKEN_REACH_S = 0.0425  # an audio token reads two such frames, 20 ms apart


@functools.cache
def model_of(family: str, encoder_layers: int = 1) -> HookedAudioTransformer:
    hf_model = tiny.tiny_hf(family, encoder_layers=encoder_layers)
    model = HookedAudioTransformer.from_hf(hf_model)
    model.feature_extractor = transformers.WhisperFeatureExtractor(feature_size=20)
    return model


def inputs_of(model: HookedAudioTransformer, clip: np.ndarray) -> dict:
    """One prompt about one clip, by the real feature extractor."""
    made = model.extract_features([clip.astype(np.float32)])
    features, mask = made["features"], made["mask"]
    if model.cfg.family == "whisper":
        tokens = torch.tensor([[tiny.START]])
        return {"input_features": features, "attention_mask": mask, "decoder_input_ids": tokens}
    audio = [tiny.AUDIO_TOKEN] * tiny.audio_tokens(int(mask.sum()))
    tokens = torch.tensor([[7, *audio, 8]])
    return {"input_features": features, "feature_attention_mask": mask, "input_ids": tokens}


def timeline_of(family: str, **options) -> Timeline:
    return model_of(family).timeline(tiny.hf_inputs(family, **options))


def qwen_timeline(lengths, **options) -> Timeline:
    return timeline_of("qwen2_audio", lengths=lengths, **options)


# -------------------------------------------------------------------------------- formulas


@settings(max_examples=25)
@given(n_samples=st.integers(500, 35_200))
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_formulas(family, n_samples):
    """Against the mask of the real feature extractor."""
    model = model_of(family)
    timeline = model.timeline(inputs_of(model, np.zeros(n_samples)))
    n_mel = math.ceil(n_samples / 160)
    n_frames = (n_mel - 1) // 2 + 1
    assert timeline.duration_s() == pytest.approx(n_mel / 100)
    seconds, valid = timeline.seconds("encoder"), timeline.valid("encoder")
    assert len(seconds) == tiny.N_FRAMES // 2
    np.testing.assert_allclose(seconds, 0.02 * np.arange(len(seconds)), atol=1e-12)
    assert valid.tolist() == [i < n_frames for i in range(len(valid))]
    if family == "whisper":
        return
    n_tokens = n_frames // 2
    expected = 0.04 * np.arange(tiny.N_FRAMES // 4) + 0.01
    np.testing.assert_allclose(timeline.seconds("connector"), expected, atol=1e-12)
    assert int(timeline.valid("connector").sum()) == n_tokens
    heard = timeline.seconds("decoder")[timeline.audio_span]
    np.testing.assert_allclose(heard, expected[:n_tokens], atol=1e-12)


@settings(max_examples=20)
@given(frame=st.integers(3, 190))
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_click_moves_the_positions_the_map_names_and_no_other(family, frame):
    """Through the real feature extractor, convolutions, pooling and connector (no attention)."""
    model, click_s = model_of(family, encoder_layers=0), frame / 100
    before = np.zeros(2 * RATE)
    before[-400] = 1.0  # the loudest place of both clips: features are relative to it
    after = before.copy()
    after[160 * frame] += 0.5
    with torch.no_grad():
        caches = [model.run_with_cache(inputs_of(model, clip))[1] for clip in (before, after)]
    timeline = model.timeline(inputs_of(model, before))

    def moved(name: str) -> list[bool]:
        return (caches[0][name] - caches[1][name]).abs().amax(-1).squeeze(0).gt(1e-6).tolist()

    def named(part: str, reach_s: float) -> list[bool]:
        return ((timeline.seconds(part) - click_s).abs() < reach_s).tolist()

    assert moved("encoder.hook_embed") == named("encoder", FRAME_REACH_S)
    if family == "qwen2_audio":
        assert moved("connector.hook_out") == named("connector", TOKEN_REACH_S)
        assert moved("decoder.hook_embed") == named("decoder", TOKEN_REACH_S)


def test_valid_frames_are_those_qwen2_audio_attends_to():
    model = model_of("qwen2_audio")
    inputs = tiny.hf_inputs("qwen2_audio", lengths=[(101, 74)], words=[6])
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter="encoder.blocks.0.attn.hook_pattern")
    attended = cache["encoder", "pattern", 0].sum(dim=(1, 2)) > 0
    timeline = model.timeline(inputs)
    for clip in range(2):
        assert torch.equal(attended[clip], timeline.valid("encoder", clip))


def test_features_without_a_mask_count_as_all_valid():
    timeline = timeline_of("whisper")
    assert timeline.valid("encoder").all()
    assert timeline.duration_s() == tiny.N_FRAMES / 100


# -------------------------------------------------------------------------------- prompts and clips


def test_several_clips_in_one_prompt():
    timeline = qwen_timeline([(101, 75)], words=[6])
    first, second = slice(1, 26), slice(27, 46)  # a word, 25 tokens, a word, 19 tokens, four words
    assert timeline.n_clips == 2
    assert timeline.audio_span == timeline.clip_span(0) == first
    assert timeline.clip_span(1) == second
    assert timeline.text_span.tolist() == [0, 26, 46, 47, 48, 49]
    seconds = timeline.seconds("decoder")
    assert seconds[first.start] == seconds[second.start] == 0.01
    assert torch.isnan(seconds[timeline.text_span]).all()
    assert timeline.positions("decoder", 0.0, 0.08, clip=1) == slice(27, 29)
    assert timeline.positions("decoder", Span(0.0, 0.08, clip=1)) == slice(27, 29)
    assert timeline.positions("connector", 0.0, 9.0, clip=1) == slice(0, 19)
    assert (timeline.duration_s(0), timeline.duration_s(1)) == (1.01, 0.75)
    assert int(timeline.valid("encoder", 1).sum()) == 38
    assert all(span.clip == 1 for span in timeline.windows("decoder", 0.3, clip=1))
    with pytest.raises(ValueError, match=r"clip 2 does not exist; the prompt holds 2 clip"):
        timeline.positions("encoder", 0.0, 0.1, clip=2)
    with pytest.raises(ValueError, match="clip 2 does not exist"):
        timeline.duration_s(2)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_of_prompts_is_known(padding):
    timeline = qwen_timeline([101, 75], words=(5, 4), padding=padding)
    assert len(timeline) == 2
    gap = 7  # the second prompt is shorter by six audio tokens and a word
    start = 1 + (gap if padding == "left" else 0)
    assert timeline[0].audio_span == slice(1, 26)
    assert timeline[1].audio_span == slice(start, start + 19)
    attended = timeline[1].valid("decoder")
    assert int(attended.sum()) == len(attended) - gap
    assert not attended[:gap].any() if padding == "left" else not attended[-gap:].any()
    assert all(attended[timeline[1].text_span])


def test_rows_that_differ_must_be_asked_one_by_one():
    timeline = qwen_timeline([101, 75], words=(5, 4))
    for ask in (
        lambda t: t.audio_span,
        lambda t: t.text_span,
        lambda t: t.seconds("decoder"),
        lambda t: t.valid("encoder"),
        lambda t: t.duration_s(),
        lambda t: t.windows("encoder", 0.1),
        lambda t: t.positions("connector", 0.0, 0.1),
    ):
        with pytest.raises(ValueError, match=r"the rows of this batch differ in .*timeline\[row\]"):
            ask(timeline)
        assert ask(timeline[1]) is not None
    with pytest.raises(ValueError, match="differ in clips"):
        qwen_timeline([(101, 75), 75], words=(5, 5)).n_clips  # noqa: B018
    alike = qwen_timeline([101, 101], words=(5, 5))
    assert alike.audio_span == slice(1, 26)
    with pytest.raises(IndexError):
        alike[2]


def test_whisper_text_has_no_time():
    timeline = timeline_of("whisper")
    assert timeline.has_time("encoder") and not timeline.has_time("decoder")
    assert torch.isnan(timeline[0].seconds("decoder")).all()
    assert timeline[1].text_span.tolist() == [0, 1, 2, 3, 4]
    for ask in (
        lambda: timeline[0].positions("decoder", 0.0, 1.0),
        lambda: timeline[0].windows("decoder", 0.1),
        lambda: timeline[0].audio_span,
    ):
        with pytest.raises(ValueError, match=r"no time; address them by position.*time: encoder"):
            ask()
    with pytest.raises(ValueError, match="no part named 'connector'; this model has encoder"):
        timeline.seconds("connector")


# -------------------------------------------------------------------------------- seconds given


def test_positions_of_seconds():
    """A position belongs to a window if its centre lies in [start, end)."""
    timeline = qwen_timeline([201], words=[5])
    assert timeline.positions("encoder", 0.1 * 3, 0.4) == slice(15, 20)
    assert timeline.positions("encoder", 0.2, 0.1 * 3) == slice(10, 15)
    assert timeline.positions("encoder", 0.28, 0.3) == slice(14, 15)
    assert timeline.positions("encoder", -5, 100) == slice(0, 101)
    assert timeline.positions("connector", 0.05, 0.13) == slice(1, 3)
    assert timeline.positions("decoder", 0.05, 0.13) == slice(2, 4)
    assert timeline.positions("decoder", Span(0.05, 0.13, "word")) == slice(2, 4)
    assert timeline.positions("encoder", np.float64(0), 1) == slice(0, 50)
    for start, end in ((0.281, 0.299), (5, 6), (-2, -1), (2.005, 2.02)):
        with pytest.raises(
            ValueError, match=r"no position of the encoder lies between .*2.01 s long"
        ):
            timeline.positions("encoder", start, end)
    with pytest.raises(ValueError, match="start_s and end_s, or a Span"):
        timeline.positions("encoder", 0.5)


def test_spans_are_checked():
    assert Span.of((0, 2)) == Span(0.0, 2.0) and Span(1, 2).centre_s == 1.5
    word = Span(0.1, 0.2, "two")
    assert Span.of(word) is word
    for start, end in ((1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.0, math.inf)):
        with pytest.raises(ValueError, match="span"):
            Span(start, end)


def bounds(spans: list[Span]) -> list[tuple[float, float]]:
    return [(span.start_s, span.end_s) for span in spans]


def test_windows():
    timeline = qwen_timeline([101], words=[5])  # 1.01 s
    assert bounds(timeline.windows("encoder", 0.4)) == [(0, 0.4), (0.4, 0.8), (0.8, 1.01)]
    overlapping = [(0, 0.6), (0.3, 0.9), (0.6, 1.01), (0.9, 1.01)]
    assert bounds(timeline.windows("encoder", 0.6, 0.3)) == overlapping
    assert bounds(timeline.windows("connector", 0.2, 0.5)) == [(0, 0.2), (0.5, 0.7)]
    assert bounds(timeline.windows("decoder", 5)) == [(0, 1.01)]
    narrow = timeline.windows("encoder", 0.01)
    assert len(narrow) == 51 and bounds(narrow[1:2]) == [(0.02, 0.03)]
    for width, stride in ((0, None), (-0.1, None), (0.1, 0), (math.nan, None)):
        with pytest.raises(ValueError, match="must be a positive number of seconds"):
            timeline.windows("encoder", width, stride)


@settings(max_examples=60)
@given(n_mel=st.integers(3, 220), width=st.floats(0.01, 3.0), overlap=st.sampled_from([1, 2, 3]))
def test_windows_tile_the_clip(n_mel, width, overlap):
    """Every valid position lies in one window; with overlap, in at most that many and in one."""
    timeline = qwen_timeline([n_mel], words=[3])
    for part in ("encoder", "connector", "decoder"):
        spans = timeline.windows(part, width, width / overlap)
        covered = torch.stack([timeline.inside(part, span) for span in spans]).sum(0)
        here = timeline.valid(part) & torch.isfinite(timeline.seconds(part))
        assert not covered[~here].any()
        assert (covered[here] >= 1).all() and (covered[here] <= overlap).all()
        assert all(span.end_s <= timeline.duration_s() for span in spans)
        assert all(timeline.inside(part, span).any() for span in spans)
