"""Corruptions keep the length, change what they say and nothing else, and can be made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from audio_lens import AudioError, Span
from audio_lens.audio import read
from audio_lens.corruptions import (
    Corruption,
    Noise,
    OtherUtterance,
    ReverberatedBy,
    Silence,
    Splice,
    TextSwap,
    TimeShuffle,
)

RATE = 16_000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (0.1 * draw.standard_normal(round(seconds * RATE))).astype(np.float32)


def ratio_db(clean: np.ndarray, changed: np.ndarray) -> float:
    """Signal to noise, measured."""
    added = changed.astype(np.float64) - clean
    return float(10 * np.log10(np.square(clean, dtype=np.float64).mean() / np.square(added).mean()))


def lag(clean: np.ndarray, heard: np.ndarray) -> int:
    """By how many samples the second comes later, by the phases of all frequencies."""
    padded = 2 * len(clean)
    cross = np.fft.rfft(heard, padded) * np.conj(np.fft.rfft(clean, padded))
    peak = int(np.fft.irfft(cross / (np.abs(cross) + 1e-9)).argmax())
    return peak - padded if peak > len(clean) else peak


CLEAN, OTHER = noise(1.0), noise(1.0, seed=1)
SPAN = (0.25, 0.6)
KINDS: dict[str, tuple[type[Corruption], tuple, dict[str, Any]]] = {
    "silence": (Silence, (), {}),
    "white noise": (Noise, (3.0,), {}),
    "noise of a clip": (Noise, (-5, OTHER[:2000], RATE), {}),
    "other utterance": (OtherUtterance, (OTHER, RATE), {}),
    "splice": (Splice, (OTHER,), {"sampling_rate": RATE}),
    "shuffle": (TimeShuffle, (0.05,), {}),
    "room": (ReverberatedBy, (np.array([1.0, 0.0, 0.5, -0.2]), RATE), {}),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Runs the test once per kind of corruption."""
    return request.param


def make(kind: str, **options: Any) -> Corruption:
    made, positional, usual = KINDS[kind]
    return made(*positional, **{**usual, **options})


# -------------------------------------------------------------------------------- all of them


@given(
    start=st.integers(0, 9000),
    length=st.integers(2000, 7000),
    kind=st.sampled_from(sorted(KINDS)),
    fade_s=st.sampled_from((0, 0.005, 0.5)),
)
def test_changes_what_it_says_and_nothing_else(
    start: int, length: int, kind: str, fade_s: float
) -> None:
    span = Span(start / RATE, (start + length) / RATE)
    result, [changed] = make(kind, span=span, fade_s=fade_s)(CLEAN, RATE)
    assert result.dtype == np.float32
    assert (changed.start_s, changed.end_s) == (span.start_s, span.end_s)
    inside = np.zeros(len(CLEAN), dtype=bool)
    inside[start : start + length] = True
    differs = result != CLEAN
    assert not differs[~inside].any()
    assert differs[inside].mean() > 0.95
    assert differs[start : start + 8].any() and differs[start + length - 8 : start + length].any()


def test_whole_clips(kind: str) -> None:
    span = {"span": (0, 1)} if kind == "splice" else {}
    before = CLEAN.copy()
    result, [changed] = make(kind, **span)(CLEAN, RATE)
    assert (changed.start_s, changed.end_s) == (0, 1)
    assert len(result) == len(CLEAN) and np.isfinite(result).all()
    assert (before == CLEAN).all()  # the given samples are left alone
    hard, _ = make(kind, **span, fade_s=0)(CLEAN, RATE)
    if kind != "shuffle":
        assert (result == hard).all()  # the ends of a clip are not faded


def test_same_at_every_call_and_described(kind: str) -> None:
    corruption = make(kind, span=SPAN)
    assert (corruption(CLEAN, RATE)[0] == corruption(CLEAN, RATE)[0]).all()
    assert repr(corruption) == corruption.describe()
    assert corruption.describe().startswith(type(corruption).__name__ + "(")
    assert "span=(0.25, 0.6)" in corruption.describe()
    assert len(corruption.describe()) < 200  # samples are told as a hash


@pytest.mark.parametrize(
    "corruption", [Silence(span=SPAN, fade_s=0.01), Noise(7, seed=3), TimeShuffle(0.1, seed=2)]
)
def test_made_again_from_its_description(corruption: Corruption) -> None:
    again = eval(corruption.describe())
    assert (again(CLEAN, RATE)[0] == corruption(CLEAN, RATE)[0]).all()


def test_descriptions_tell_clips_apart() -> None:
    told = {OtherUtterance(clip, RATE).describe() for clip in (CLEAN, OTHER)}
    assert len(told) == 2
    tensor = OtherUtterance(torch.from_numpy(CLEAN), RATE).describe()
    assert tensor in told


def test_labels_and_clips_of_spans() -> None:
    _, [changed] = Silence(span=Span(0.2, 0.4, "two", clip=1))(CLEAN, RATE)
    assert (changed.label, changed.clip) == ("Silence", 1)


def test_spans_beyond_the_clip_are_cut_off() -> None:
    result, [changed] = Silence(span=(0.9, 3))(CLEAN, RATE)
    assert (changed.start_s, changed.end_s) == (0.9, 1.0)
    assert result[-1] == 0


def test_fades_lie_within_the_span() -> None:
    ones = np.ones(RATE, dtype=np.float32)
    result, _ = Silence(span=(0.5, 0.6), fade_s=0.01)(ones, RATE)
    inside = result[8000:9600]
    assert (np.diff(inside[:160]) < 0).all() and (np.diff(inside[-160:]) > 0).all()
    assert (inside[160:-160] == 0).all() and inside[0] < 1 and inside[-1] < 1
    assert np.abs(np.diff(result)).max() < 0.01  # no click
    at_start, _ = Silence(span=(0, 0.1), fade_s=0.01)(ones, RATE)
    assert (at_start[: 1600 - 160] == 0).all()


def test_files_and_channels(tmp_path: Path) -> None:
    path = tmp_path / "other.wav"
    soundfile.write(path, OTHER, RATE, subtype="FLOAT")
    stereo = np.stack([CLEAN, CLEAN], axis=1)
    for corruption in (OtherUtterance(path), OtherUtterance(str(path))):
        assert (corruption(stereo, RATE)[0] == OTHER).all()
        assert str(path) in corruption.describe()


# -------------------------------------------------------------------------------- one by one


@pytest.mark.parametrize("snr_db", [-10, 0, 4.5, 30.0])
@pytest.mark.parametrize("clip", [None, OTHER, OTHER[:777]])
def test_noise_has_the_ratio(snr_db: float, clip: np.ndarray | None) -> None:
    result, _ = Noise(snr_db, clip, RATE)(CLEAN, RATE)
    assert ratio_db(CLEAN, result) == pytest.approx(snr_db, abs=1e-3)


def test_noise_has_the_ratio_to_the_stretch() -> None:
    clean = CLEAN * np.repeat([1.0, 0.01], RATE // 2).astype(np.float32)
    result, _ = Noise(6, span=(0.5, 1.0), fade_s=0)(clean, RATE)
    assert ratio_db(clean[8000:], result[8000:]) == pytest.approx(6, abs=1e-3)


def test_noise_by_seed() -> None:
    runs = [Noise(0, seed=seed)(CLEAN, RATE)[0] for seed in (0, 0, 1)]
    assert (runs[0] == runs[1]).all() and not (runs[0] == runs[2]).any()
    spectrum = np.abs(np.fft.rfft(runs[0] - CLEAN)) ** 2
    low, high = spectrum[:4000].mean(), spectrum[4000:].mean()
    assert low == pytest.approx(high, rel=0.1)  # white


def test_noise_of_a_clip_goes_round() -> None:
    clip = np.arange(1.0, 8.0)
    added = Noise(0, clip, RATE)(CLEAN, RATE)[0].astype(np.float64) - CLEAN
    steps = added / np.abs(added).min()
    assert np.allclose(np.roll(clip, -int(np.round(steps[0])) + 1), steps[:7], atol=1e-2)
    assert np.allclose(added[7:], added[:-7], atol=1e-6)


def test_other_utterance_is_cropped_or_padded() -> None:
    longer, shorter = noise(1.5, seed=2), noise(0.4, seed=2)
    assert (OtherUtterance(longer, RATE)(CLEAN, RATE)[0] == longer[:RATE]).all()
    result, _ = OtherUtterance(shorter, RATE)(CLEAN, RATE)
    assert (result[:6400] == shorter).all() and (result[6400:] == 0).all()
    part, _ = OtherUtterance(longer, RATE, span=(0.5, 1), fade_s=0)(CLEAN, RATE)
    assert (part[8000:] == longer[8000:RATE]).all()


def test_splice_puts_a_word_in_place() -> None:
    result, [changed] = Splice(
        OTHER, source=(0.1, 0.3), sampling_rate=RATE, span=(0.5, 0.8), fade_s=0
    )(CLEAN, RATE)
    assert (result[8000:11200] == OTHER[1600:4800]).all()
    assert (result[11200:12800] == 0).all()  # the source was shorter
    assert (result[:8000] == CLEAN[:8000]).all() and (result[12800:] == CLEAN[12800:]).all()
    assert (changed.start_s, changed.end_s) == (0.5, 0.8)
    same, _ = Splice(OTHER, sampling_rate=RATE, span=(0.5, 0.8), fade_s=0)(CLEAN, RATE)
    assert (same[8000:12800] == OTHER[8000:12800]).all()


def test_splice_resamples() -> None:
    time = np.arange(2 * RATE) / (2 * RATE)
    tone = np.sin(2 * np.pi * 200 * time)
    result, _ = Splice(tone, sampling_rate=2 * RATE, span=(0.25, 0.75), fade_s=0)(CLEAN, RATE)
    expected = np.sin(2 * np.pi * 200 * np.arange(4000, 12000) / RATE)
    assert np.abs(result[4000:12000] - expected).max() < 1e-3


def test_shuffle_keeps_sounds_and_moves_all() -> None:
    marks = np.arange(1, 11) / 16
    marked = np.repeat(marks, 1600).astype(np.float32)
    result, _ = TimeShuffle(0.1, fade_s=0)(marked, RATE)
    pieces = result.reshape(10, 1600)
    assert (pieces == pieces[:, :1]).all()
    assert sorted(pieces[:, 0]) == list(marks)
    assert (pieces[:, 0] != marks).all()
    assert not (TimeShuffle(0.1, seed=1, fade_s=0)(marked, RATE)[0] == result).all()


def test_shuffle_of_uneven_pieces() -> None:
    result, _ = TimeShuffle(0.03, span=(0.1, 0.75), fade_s=0)(CLEAN, RATE)
    assert np.array_equal(np.sort(result), np.sort(CLEAN))
    assert not (result[1600:12000] == CLEAN[1600:12000]).any()


def test_shuffle_has_no_clicks() -> None:
    ones = np.ones(RATE, dtype=np.float32)
    result, _ = TimeShuffle(0.1, fade_s=0.01)(ones, RATE)
    assert np.abs(np.diff(result)).max() < 0.02


def test_room() -> None:
    click = np.zeros(1000, dtype=np.float32)
    click[100] = 1
    response = np.array([0.0, 0.1, 1.0, 0.0, -0.5])  # direct sound third
    result, _ = ReverberatedBy(response, RATE)(click, RATE)
    expected = np.zeros(1000)
    expected[100], expected[102] = 1, -0.5
    assert np.allclose(result, expected / np.sqrt(1.25), atol=1e-6)  # as loud as before
    same, _ = ReverberatedBy(np.array([0.0, 2.0]), RATE)(CLEAN, RATE)
    assert np.allclose(same, CLEAN, atol=1e-6)


def test_text_swap() -> None:
    swap = TextSwap("seven", "two")
    assert swap("It says seven.") == "It says two."
    assert eval(swap.describe()) == swap


@pytest.mark.real
def test_real_rooms_and_noise(data_dir: Path) -> None:
    clip = read(data_dir / "speech" / "librispeech_61-70968-0000.flac")
    for room in range(1, 5):
        heard, _ = ReverberatedBy(data_dir / "rir" / f"rir{room}.wav")(clip, RATE)
        assert abs(lag(clip, heard)) <= 2  # words stay where they are
        loudness = [np.sqrt(np.square(x, dtype=np.float64).mean()) for x in (clip, heard)]
        assert loudness[0] == pytest.approx(loudness[1], rel=1e-3)
    noisy, _ = Noise(10, data_dir / "rir" / "noise2.wav")(clip, RATE)
    assert ratio_db(clip, noisy) == pytest.approx(10, abs=1e-2)


# -------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Silence(span=(0.5, 0.5)), "end after it starts"),
        (lambda: Silence(fade_s=-1), "fade_s"),
        (lambda: Silence(fade_s=float("nan")), "fade_s"),
        (lambda: Noise(float("inf")), "snr_db"),
        (lambda: Noise(5, "nowhere.wav"), "no audio file"),
        (lambda: Noise(5, OTHER), "sampling_rate="),
        (lambda: OtherUtterance(np.full(10, np.nan), RATE), "NaN"),
        (lambda: OtherUtterance("nowhere.wav"), "no audio file"),
        (lambda: Splice(OTHER, sampling_rate=RATE), "needs span="),
        (lambda: Splice(OTHER, (0, 0.5), RATE, span=(0.2, 0.6)), "widen the span"),
        (lambda: TimeShuffle(0), "width_s"),
        (lambda: ReverberatedBy(np.zeros(0), RATE), "no samples"),
        (lambda: TextSwap("two", "two"), "two different texts"),
        (lambda: TextSwap("", "two"), "two different texts"),
        (lambda: TextSwap("two", "six")("one"), "occurs 0 times"),
        (lambda: TextSwap("two", "six")("two or two"), "occurs 2 times"),
    ],
)
def test_options_that_cannot_be_meant(make: Any, message: str) -> None:
    with pytest.raises((ValueError, AudioError), match=message):
        make()


@pytest.mark.parametrize(
    ("corruption", "clip", "message"),
    [
        (Silence(span=(1.5, 2)), CLEAN, "holds no sample of the clip"),
        (Silence(), np.zeros(0), "no samples"),
        (Silence(), np.array([np.nan]), "NaN"),
        (Noise(5), np.zeros(100), "silent"),
        (Noise(5, np.zeros(100), RATE), CLEAN, "silent"),
        (ReverberatedBy(np.zeros(100), RATE), CLEAN, "silent"),
        (TimeShuffle(0.6), CLEAN[:8000], "1 pieces"),
        (TimeShuffle(1e-6), CLEAN, "of a sample at least"),
        (OtherUtterance(OTHER[:8000], RATE, span=(0.6, 1)), CLEAN, "is over at 0.5 s"),
        (Splice(OTHER[:100], (0.5, 0.6), RATE, span=(0.2, 0.6)), CLEAN, "the other clip"),
    ],
)
def test_clips_it_cannot_change(corruption: Corruption, clip: np.ndarray, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        corruption(clip, RATE)
