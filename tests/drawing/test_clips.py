"""Clips: what is heard, what is drawn of it, and the difference of two."""

import itertools

import numpy as np
import pytest

from audio_lens.drawing import clips
from audio_lens.drawing.clips import Clip
from audio_lens.drawing.rows import Panel, Rows
from audio_lens.timeline import Span

RATE = 16_000


def tone(hertz, seconds=1.0, level=1.0):
    t = np.arange(int(RATE * seconds)) / RATE
    return (level * np.where(t > 0.5, np.sin(2 * np.pi * hertz * t), 0)).astype(np.float32)


def test_waveform_keeps_extremes_and_times():
    samples = np.zeros(10 * RATE, dtype=np.float32)
    samples[3 * RATE], samples[7 * RATE] = 0.9, -0.8
    step, levels = clips.envelope(samples, RATE)
    assert len(levels) <= 2 * clips.ENVELOPE_BINS
    assert step * levels.argmax() == pytest.approx(3, abs=0.01)
    assert step * levels.argmin() == pytest.approx(7, abs=0.01)


def test_spectrogram_puts_a_tone_at_its_time_and_pitch():
    (mel,) = clips.log_mels([Clip("tone", tone(2000), RATE)], 160)
    band, frame = np.unravel_index(mel[:, :95].argmax(), mel[:, :95].shape)
    places = clips.mel_centres(RATE)
    (at_2k,) = clips.mel_of(np.array([2000.0]))
    assert places[band] == pytest.approx(at_2k, abs=places[1] - places[0])
    assert frame * 0.01 > 0.5
    assert mel[:, :45].max() == -clips.DB_RANGE


@pytest.mark.parametrize("samples", [np.zeros(100), np.zeros(RATE), np.ones(7)])
def test_short_and_silent_clips_can_be_drawn(samples):
    (mel,) = clips.log_mels([Clip("clip", samples.astype(np.float32), RATE)], 160)
    assert mel.size and (samples.any() or (mel == -clips.DB_RANGE).all())


def test_spectrograms_of_a_pair_share_their_levels():
    loud, quiet = (Clip("clip", tone(1000, level=level), RATE) for level in (1.0, 0.1))
    one, two = clips.log_mels([loud, quiet], 160)
    assert (one.max(), two.max()) == (0, -20)
    assert Rows([loud, quiet]).mels[2].max() == pytest.approx(20, abs=1)


def test_difference_of_unequal_clips_ends_as_the_longer():
    words = [Span(0.1, 0.2, "a"), Span(0.3, 0.4, "b")]
    long = Clip("long", tone(500), RATE, {"words": words})
    short = Clip("short", tone(500, 0.75), RATE, {"words": [words[0], Span(0.3, 0.4, "c")]})
    rows = Rows([short, long])
    difference = rows.clips[2]
    assert difference.seconds == rows.seconds == 1.0
    assert not difference.samples[: int(0.75 * RATE)].any() and difference.samples[-200:].any()
    assert [span.label for span in difference.tiers["words"]] == ["a", "c / b"]
    assert rows.mels[2].shape == rows.mels[1].shape


def test_rows_lie_below_each_other():
    clip = Clip("clip", tone(500), RATE, {"words": [Span(0, 1, "one")], "phones": []})
    rows = Rows([clip])
    layout = rows.layout([Panel(100), Panel(80, timed=False)]).to_plotly_json()
    domains = [layout[f"yaxis{n}"]["domain"] for n in ("", 2, 3, 4, 5, 6)]
    assert domains[0][1] == 1 and domains[-1][0] == pytest.approx(0)
    assert all(upper[0] > lower[1] for upper, lower in itertools.pairwise(domains))
    assert layout["meta"]["bottom"] == domains[4][0]
    assert layout["xaxis5"]["title"]["text"] == "time in the clip (s)"
    assert rows.axes(1) == {"xaxis": "x6", "yaxis": "y6"}
