"""Minimal pairs have equal shapes and say what differs, and when."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

import tiny
from audio_lens import HookedAudioTransformer, InputError, Span, metrics, minimal_pair, patching
from audio_lens.audio import load, read
from audio_lens.corruptions import Noise, OtherUtterance, Silence, TextSwap
from audio_lens.models.embedded import default_pair
from audio_lens.pairs import differences
from families.wav2vec2 import build

RATE = 16_000
SHIPPED = default_pair()
QUESTION = SHIPPED.question


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (0.1 * draw.standard_normal(round(seconds * RATE))).astype(np.float32)


def bounds(spans: list[Span]) -> list[tuple[float, float]]:
    return [(span.start_s, span.end_s) for span in spans]


# -------------------------------------------------------------------------------- what differs


@given(
    starts=st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True).map(sorted),
    length=st.integers(1, 900),
)
def test_differences_are_found_exactly(starts: list[int], length: int) -> None:
    one = noise(1.0)
    other = one.copy()
    for start in starts:
        other[1600 * start : 1600 * start + length] += 1
    expected = [(1600 * start / RATE, (1600 * start + length) / RATE) for start in starts]
    assert bounds(differences(one, other, RATE)) == expected


def test_near_differences_are_one() -> None:
    one = noise(1.0)
    other = one.copy()
    other[[100, 300, 5000]] += 1
    assert bounds(differences(one, other, RATE)) == [
        (100 / RATE, 301 / RATE),
        (5000 / RATE, 5001 / RATE),
    ]
    assert differences(one, one, RATE) == []


# -------------------------------------------------------------------------------- kinds of pairs


def test_a_corruption_of_a_stretch(embedded: HookedAudioTransformer) -> None:
    silence = Silence(span=SHIPPED.swapped)
    pair = minimal_pair(embedded, SHIPPED.clean, silence, text=QUESTION)
    assert bounds(pair.changed) == [(SHIPPED.swapped.start_s, SHIPPED.swapped.end_s)]
    assert pair.how == {"audio": silence.describe()}
    [one], [other] = pair.clean.audio, pair.corrupted.audio
    [(start_s, end_s)] = bounds(differences(one, other, RATE))
    assert pair.changed[0].start_s <= start_s < pair.changed[0].start_s + 0.001
    assert pair.changed[0].end_s - 0.001 < end_s <= pair.changed[0].end_s
    assert torch.equal(pair.clean.tokens, pair.corrupted.tokens)
    pair.clean.check_pairs_with(pair.corrupted, "clean", "corrupted")


def test_whole_clips(embedded: HookedAudioTransformer) -> None:
    for corruption in (Noise(0), OtherUtterance(SHIPPED.corrupted)):
        pair = minimal_pair(embedded, SHIPPED.clean, corruption, text=QUESTION)
        seconds = len(read(SHIPPED.clean)) / RATE
        assert bounds(pair.changed) == [(0, pytest.approx(seconds))]


def test_two_recordings(embedded: HookedAudioTransformer) -> None:
    pair = minimal_pair(embedded, SHIPPED.clean, SHIPPED.corrupted, text=QUESTION)
    assert pair.how == {"audio": "another recording", "length": "equally long"}
    other = next(w for w in SHIPPED.corrupted_words if w.label == SHIPPED.against)
    assert min(start for start, _ in bounds(pair.changed)) >= SHIPPED.swapped.start_s - 0.02
    assert max(end for _, end in bounds(pair.changed)) <= other.end_s + 0.02
    assert (pair.corrupted.audio[0] == read(SHIPPED.corrupted)).all()


@pytest.mark.parametrize("fit", ["pad", "cut"])
@pytest.mark.parametrize("longer", ["clean", "corrupted"])
def test_recordings_of_unequal_length(
    embedded: HookedAudioTransformer, fit: str, longer: str
) -> None:
    clips = {"clean": noise(1.0), "corrupted": noise(1.0, seed=1)}
    clips[longer] = np.concatenate([clips[longer], noise(0.25, seed=2)])
    shorter = "corrupted" if longer == "clean" else "clean"
    pair = minimal_pair(embedded, **clips, text=QUESTION, sampling_rate=RATE, fit=fit)
    held = {side: inputs.audio[0] for side, inputs in pair.items()}
    assert len(held["clean"]) == len(held["corrupted"]) == (20000 if fit == "pad" else 16000)
    for side, samples in held.items():
        kept = min(len(samples), len(clips[side]))
        assert (samples[:kept] == clips[side][:kept]).all()
        assert (samples[kept:] == 0).all()
    expected = {
        "pad": f"{shorter} padded with 0.2500 s of silence",
        "cut": f"{longer} cut by 0.2500 s",
    }
    assert pair.how["length"] == expected[fit]
    assert bounds(pair.changed) == [(0, len(held["clean"]) / RATE)]


def test_samples_of_another_rate(embedded: HookedAudioTransformer) -> None:
    clip = noise(1.0)
    pair = minimal_pair(embedded, clip, Silence(span=(0.5, 1)), text=QUESTION, sampling_rate=8_000)
    assert (pair.clean.audio[0] == load(clip, RATE, 8_000)).all()
    assert bounds(pair.changed) == [(0.5, 1.0)]


def test_two_texts(embedded: HookedAudioTransformer) -> None:
    swap = TextSwap("second", "first")
    pair = minimal_pair(embedded, SHIPPED.clean, text=QUESTION, corrupted_text=swap)
    assert pair.changed == [] and pair.how == {"text": swap.describe()}
    assert torch.equal(pair.clean.features, pair.corrupted.features)
    assert (pair.clean.tokens != pair.corrupted.tokens).sum() == 1
    written = minimal_pair(
        embedded, SHIPPED.clean, text=QUESTION, corrupted_text="Which digit is first?"
    )
    assert torch.equal(pair.corrupted.tokens, written.corrupted.tokens)
    assert written.how == {"text": f"{QUESTION!r} -> 'Which digit is first?'"}


def test_audio_and_text_at_once(embedded: HookedAudioTransformer) -> None:
    pair = minimal_pair(
        embedded, SHIPPED.clean, Silence(), text=QUESTION, corrupted_text=TextSwap("second", "last")
    )
    assert set(pair.how) == {"audio", "text"} and len(pair.changed) == 1
    assert (pair.corrupted.audio[0] == 0).all()
    assert not torch.equal(pair.clean.tokens, pair.corrupted.tokens)


def test_models_without_a_prompt() -> None:
    for hf in (tiny.tiny_hf("whisper"), build("Hubert")):
        model = HookedAudioTransformer.from_hf(hf)
        text = [tiny.START, 7] if model.cfg.decoder else None
        pair = minimal_pair(model, noise(0.5), Silence(), text=text, sampling_rate=RATE)
        assert bounds(pair.changed) == [(0, 0.5)]
        assert not torch.equal(pair.clean.features, pair.corrupted.features)


# -------------------------------------------------------------------------------- use


def test_stands_for_the_inputs_of_a_sweep(embedded: HookedAudioTransformer) -> None:
    pair = minimal_pair(embedded, SHIPPED.clean, Silence(span=SHIPPED.swapped), text=QUESTION)
    assert dict(pair) == {"clean": pair.clean, "corrupted": pair.corrupted}
    assert len(repr(pair)) < 300
    with pytest.raises(KeyError):
        pair["other"]
    elsewhere = Span(0.0, pair.changed[0].start_s, "before")
    result = patching.sweep(
        embedded,
        **pair,
        site="connector.out",
        axes="time",
        windows=[*pair.changed, elsewhere],
        metric=metrics.logit_diff(SHIPPED.answer, SHIPPED.against),
        progress=False,
    )
    inside, outside = result.recovery.tolist()
    assert abs(inside) > 10 * abs(outside)


def test_results_keep_how_it_was_made(embedded: HookedAudioTransformer, tmp_path: Path) -> None:
    pair = minimal_pair(embedded, SHIPPED.clean, Silence(span=(0.5, 0.75)), text=QUESTION)
    result = patching.sweep(
        embedded,
        **pair,
        axes="time",
        windows=[(0.4, 0.8)],
        layers=0,
        metric=metrics.logit_diff(SHIPPED.answer, SHIPPED.against),
        progress=False,
    )
    result.meta.update(pair.meta)
    result.save(tmp_path / "map.nc")
    kept = json.loads(patching.load(tmp_path / "map.nc").meta["pair"])
    assert kept["audio"] == pair.how["audio"]
    assert [Span(**span) for span in kept["changed"]] == pair.changed


# -------------------------------------------------------------------------------- what it refuses


def test_pairs_that_cannot_be(embedded: HookedAudioTransformer) -> None:
    clean = SHIPPED.clean
    with pytest.raises(InputError, match="do not differ"):
        minimal_pair(embedded, clean, text=QUESTION)
    with pytest.raises(InputError, match="do not differ"):
        minimal_pair(embedded, clean, clean, text=QUESTION)
    with pytest.raises(InputError, match="do not differ"):
        minimal_pair(embedded, clean, text=QUESTION, corrupted_text=QUESTION)
    with pytest.raises(InputError, match="equal tokens"):
        minimal_pair(embedded, clean, text=QUESTION, corrupted_text=QUESTION + " " + QUESTION)
    with pytest.raises(ValueError, match="occurs 0 times"):
        minimal_pair(embedded, clean, text=QUESTION, corrupted_text=TextSwap("ninth", "last"))
    with pytest.raises(InputError, match="pass text="):
        minimal_pair(embedded, clean, Silence(), corrupted_text=TextSwap("one", "two"))
    with pytest.raises(InputError, match="clip 1"):
        minimal_pair(embedded, clean, Silence(span=Span(0, 1, clip=1)), text=QUESTION)
    with pytest.raises((ValueError, TypeCheckError), match="fit"):
        minimal_pair(embedded, clean, SHIPPED.corrupted, text=QUESTION, fit="stretch")
