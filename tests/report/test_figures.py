"""Figures: columns of windows, the drawn clip, and `SweepResult.plot`."""

import numpy as np
import pytest
import torch

from audio_lens.patching.result import SweepResult
from audio_lens.report import figures
from audio_lens.timeline import Span

RATE = 16_000


def test_windows_that_touch_keep_their_bounds():
    edges, columns = figures.window_columns([Span(0.0, 0.1), Span(0.1, 0.25)])
    assert (edges, columns) == ([0.0, 0.1, 0.25], [0, 1])


def test_words_keep_their_bounds_with_a_gap_between():
    edges, columns = figures.window_columns([Span(0.5, 0.7, "b"), Span(0.1, 0.3, "a")])
    assert (edges, columns) == ([0.1, 0.3, 0.5, 0.7], [1, None, 0])


def test_overlapping_windows_meet_between_their_centres():
    spans = [Span(i / 10, i / 10 + 0.2) for i in range(3)]
    edges, columns = figures.window_columns(spans)
    assert edges == pytest.approx([0.05, 0.15, 0.25, 0.35]) and columns == [0, 1, 2]


def test_windows_of_several_clips_share_no_axis():
    with pytest.raises(ValueError, match="clips \\[0, 1\\]"):
        figures.window_columns([Span(0.0, 0.1), Span(0.0, 0.1, clip=1)])


@pytest.mark.parametrize(
    "values, limit", [([0.01, -0.02], 0.25), ([0.5, -0.9], 0.9), ([40.0, np.nan], 1.5)]
)
def test_faint_maps_stay_faint_and_wild_cells_do_not_bleach(values, limit):
    assert figures.colour_limit(np.array(values), "effect") == limit


def test_colours_of_the_metric_reach_its_largest_size():
    assert figures.colour_limit(np.array([0.01, -40.0]), "value") == 40.0
    assert figures.colour_limit(np.array([np.nan]), "value") == 1.0


def test_waveform_keeps_extremes_and_times():
    samples = np.zeros(10 * RATE, dtype=np.float32)
    samples[3 * RATE], samples[7 * RATE] = 0.9, -0.8
    seconds, levels = figures.envelope(samples, RATE)
    assert len(levels) <= 2 * figures.ENVELOPE_BINS
    assert seconds[levels.argmax()] == pytest.approx(3, abs=0.01)
    assert seconds[levels.argmin()] == pytest.approx(7, abs=0.01)


def test_spectrogram_puts_a_tone_at_its_time_and_pitch():
    t = np.arange(RATE) / RATE
    tone = np.where(t > 0.5, np.sin(2 * np.pi * 2000 * t), 0).astype(np.float32)
    heat = figures._mel(figures.Clip("tone", tone, RATE))
    mel, frame = np.unravel_index(heat.z[:, :95].argmax(), heat.z[:, :95].shape)
    at_2k = figures.hertz_to_mel(2000.0, mel_scale="slaney")
    assert heat.y[mel] == pytest.approx(at_2k, abs=heat.y[1] - heat.y[0])
    assert frame * heat.dx > 0.5
    assert heat.z[:, :45].max() == -figures.DB_RANGE


@pytest.mark.parametrize("samples", [np.zeros(100), np.zeros(RATE), np.ones(7)])
def test_short_and_silent_clips_can_be_drawn(samples):
    mel = figures.log_mel(figures.Clip("clip", samples.astype(np.float32), RATE), 160)
    assert np.isfinite(mel).all()


def result(dims, shape):
    coords = {dim: list(range(n)) for dim, n in zip(dims, shape, strict=True)}
    values = torch.arange(float(np.prod(shape))).reshape(shape)
    return SweepResult(
        values, dims, coords, torch.tensor(4.0), torch.tensor(0.0), "decoder.attn.z", "noise"
    )


@pytest.mark.parametrize("dims", [("layer", "head"), ("head", "layer")])
def test_plot_puts_layers_upwards(dims):
    figure = result(dims, (2, 3)).plot("value")
    (heat,) = figure.data
    values = result(dims, (2, 3)).values
    np.testing.assert_array_equal(heat.z, values if dims[0] == "layer" else values.T)
    assert figure.layout.yaxis.title.text == "layer" and figure.layout.xaxis.title.text == "head"


def test_plot_of_one_axis_is_bars():
    figure = result(("layer",), (5,)).plot()
    assert figure.data[0].type == "bar"
    assert list(figure.data[0].y) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_plot_says_which_axis_to_select_and_which_quantities_there_are():
    with pytest.raises(ValueError, match="layer, head, position"):
        result(("layer", "head", "position"), (1, 1, 1)).plot()
    with pytest.raises(ValueError, match="effect, recovery, value"):
        result(("layer",), (1,)).plot("loudness")
