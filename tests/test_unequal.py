"""Clips of a sample, rows of unequal length, and prompts with and without audio side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from audio_lens import HookedAudioTransformer, InputError, metrics, minimal_pair, patching
from audio_lens.audio import AudioError
from audio_lens.corruptions import Silence
from families import FAMILIES

RATE = 16_000
QUESTION = "Which digit is first?"
SWEPT = [
    ("decoder.resid_pre", ("layer", "time"), {"windows": 0.2}),
    ("encoder.resid_pre", ("layer", "time"), {"windows": 0.2}),
    ("connector.out", ("time",), {"windows": 0.2}),
    ("encoder.attn.z", ("head",), {}),
]


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


# -------------------------------------------------------------------------------- shortest clips


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "musicgen"])
@torch.no_grad()
def test_the_shortest_clips_are_heard_or_refused(name: str) -> None:
    """Each number of samples gives numbers, or an error of ours that tells its length."""
    model = FAMILIES[name].hooked(FAMILIES[name].build())
    if model.feature_extractor is None:
        model.feature_extractor = model.make_feature_extractor()
    for n_samples in (1, 2, 160, 400):
        clip = np.full(n_samples, 0.1, np.float32)
        try:
            if model.takes_question:
                clip = model._checked_clip(clip, model.cfg.sampling_rate)
                features, *_ = model._heard([clip], 1)
            else:
                text = {"text": [5, 6]} if name == "whisper" else {}
                features = model.prepare(clip, sampling_rate=model.cfg.sampling_rate, **text)
                features = model(features)
        except (AudioError, InputError) as error:
            assert any(word in str(error) for word in ("samples", "ms long")), error
        else:
            assert features.isfinite().all()


@pytest.mark.parametrize("rest", [1, 2])
def test_a_window_of_one_sample_behind_a_clip(rest: int) -> None:
    model = HookedAudioTransformer.from_hf(FAMILIES["moss_transcribe_diarize"].build())
    model.feature_extractor = model.make_feature_extractor()
    window = model.cfg.need_n_frames * model.cfg.hop
    _, mask, per_clip = model.segments_of([noise((window + rest) / RATE)])
    assert per_clip == (2,)
    assert mask.sum(1).tolist() == [model.cfg.n_frames, 1]


# -------------------------------------------------------------------------------- timelines


def test_rows_of_unequal_length_are_asked_one_by_one(embedded: HookedAudioTransformer) -> None:
    inputs = embedded.prepare([noise(1), noise(0.5)], [QUESTION, "How many ?"], RATE)
    timeline = embedded.timeline(inputs)
    for part in ("encoder", "connector", "decoder"):
        asked = (timeline.seconds, timeline.valid, lambda p: timeline.positions(p, 0, 0.2))
        for ask in (*asked, lambda p: timeline.windows(p, 0.2)):
            with pytest.raises(ValueError, match=r"rows of this batch differ.*timeline\[row\]"):
                ask(part)
        assert timeline.has_time(part)
    assert timeline.n_clips == 1
    for row, seconds in enumerate((1.0, 0.5)):
        alone = embedded.timeline(inputs[row])
        assert timeline[row].duration_s() == alone.duration_s() == seconds
        assert timeline[row].audio_span == alone.audio_span
        own = timeline[row].seconds("encoder")[timeline[row].valid("encoder")]
        assert own.max() < seconds


def test_rows_without_audio_have_their_text_in_place(embedded: HookedAudioTransformer) -> None:
    inputs = embedded.prepare([[], [noise(1)]], QUESTION, RATE)
    timeline = embedded.timeline(inputs)
    assert timeline.has_time("decoder") and timeline.has_time("encoder")
    assert not timeline[0].has_time("decoder")
    n_tokens = int(inputs.attended[0].sum())
    assert len(timeline[0].text_span) == n_tokens
    assert timeline[0].valid("decoder").sum() == n_tokens
    with pytest.raises(ValueError, match=r"holds 0 clip"):
        timeline[0].duration_s()


# -------------------------------------------------------------------------------- sweeps


@pytest.mark.parametrize(("site", "axes", "options"), SWEPT)
@pytest.mark.parametrize("clips", [(1.0, 0.5), (None, 1.0)], ids=["unequal", "text beside audio"])
def test_maps_of_a_batch_are_those_of_its_rows(
    embedded: HookedAudioTransformer,
    clips: tuple[float | None, float],
    site: str,
    axes: tuple[str, ...],
    options: dict[str, Any],
) -> None:
    """Windows that a row has are as they are alone, those it lacks are NaN."""
    sides = [
        embedded.prepare([[noise(s, 2 * i + seed)] if s else [] for i, s in enumerate(clips)],
                         QUESTION, RATE)
        for seed in (0, 1)
    ]  # fmt: skip
    asked = {"site": site, "axes": axes, "metric": metrics.logit_diff("seven", "two"), **options}

    def swept(rows: list[int]) -> torch.Tensor:
        clean, corrupted = (side[rows] for side in sides)
        return patching.sweep(embedded, clean=clean, corrupted=corrupted, **asked).values

    together = swept([0, 1])
    for row, seconds in enumerate(clips):
        if seconds is None:
            assert together[row].isnan().all()
            continue
        alone, found = swept([row]).flatten(0, 0).squeeze(0), together[row]
        own = found[..., : alone.shape[-1]]
        assert torch.allclose(own, alone.view(own.shape), atol=2e-3)
        assert found[..., alone.shape[-1] :].isnan().all()


# -------------------------------------------------------------------------------- pairs


def test_pairs_of_one_sample(embedded: HookedAudioTransformer) -> None:
    lone, asked = np.array([0.1]), {"text": QUESTION, "sampling_rate": RATE}
    padded = minimal_pair(embedded, noise(1), lone, **asked)
    assert padded.how["length"] == "corrupted padded with 0.9999 s of silence"
    for clean, options in ((lone, {}), (noise(1), {"fit": "cut"})):
        with pytest.raises(AudioError, match="too short for one audio token"):
            minimal_pair(embedded, clean, lone if options else Silence(), **asked, **options)


def test_pairs_of_several_questions_and_of_text_alone(embedded: HookedAudioTransformer) -> None:
    texts, others = [QUESTION, "Which digit is last?"], ["Which digit is last?", QUESTION]
    pair = minimal_pair(embedded, noise(1), Silence(), text=texts, sampling_rate=RATE)
    assert pair.clean.clips_per_row == pair.corrupted.clips_per_row == (1, 1)
    assert pair.clean.text == pair.corrupted.text
    alone = minimal_pair(embedded, None, text=texts[0], corrupted_text=others[0])
    assert alone.changed == [] and alone.clean.clips_per_row == (0,)
    with pytest.raises(InputError, match="no clip to corrupt"):
        minimal_pair(embedded, None, Silence(), text=QUESTION)
