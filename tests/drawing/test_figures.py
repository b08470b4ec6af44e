"""The map as a figure: its columns and colours, `SweepResult.plot` and `SweepResult.figure`."""

import sys

import numpy as np
import pytest
import torch

from audio_lens.drawing import figures
from audio_lens.patching.result import SweepResult
from audio_lens.timeline import Band, Span

RATE = 16_000
WINDOWS = [Span(i / 10, (i + 1) / 10) for i in range(5)]
NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, RATE // 2).astype(np.float32)
WORDS = [Span(0.1, 0.3, "costs $5 & <more>")]


def test_windows_that_touch_keep_their_bounds():
    edges, columns = figures.columns([(0.0, 0.1), (0.1, 0.25)])
    assert (edges, columns) == ([0.0, 0.1, 0.25], [0, 1])


def test_words_keep_their_bounds_with_a_gap_between():
    edges, columns = figures.columns([(0.5, 0.7), (0.1, 0.3)])
    assert (edges, columns) == ([0.1, 0.3, 0.5, 0.7], [1, None, 0])


def test_overlapping_windows_meet_between_their_centres():
    edges, columns = figures.columns([(i / 10, i / 10 + 0.2) for i in range(3)])
    assert edges == pytest.approx([0.05, 0.15, 0.25, 0.35]) and columns == [0, 1, 2]


def test_windows_of_several_clips_share_no_axis():
    with pytest.raises(ValueError, match="clips \\[0, 1\\]"):
        result(("time",), [[Span(0.0, 0.1), Span(0.0, 0.1, clip=1)]]).plot()


@pytest.mark.parametrize(
    "values, limit", [([0.01, -0.02], 0.25), ([0.5, -0.9], 0.9), ([40.0, np.nan], 1.5)]
)
def test_faint_maps_stay_faint_and_wild_cells_do_not_bleach(values, limit):
    assert figures.colour_limit(np.array(values), "effect") == limit


def test_colours_of_the_metric_reach_its_largest_size():
    assert figures.colour_limit(np.array([0.01, -40.0]), "value") == 40.0
    assert figures.colour_limit(np.array([np.nan]), "value") == 1.0


def result(dims, shape, **more):
    """A result with values 0, 1, 2 ...; of an axis its length or its coordinates."""
    coords = {
        d: list(range(n)) if isinstance(n, int) else n for d, n in zip(dims, shape, strict=True)
    }
    shape = [len(names) for names in coords.values()]
    values = torch.arange(float(np.prod(shape))).reshape(shape)
    baselines = (torch.full(shape[: "metric" in dims], x) for x in (4.0, 0.0))
    return SweepResult(values, dims, coords, *baselines, "decoder.attn.z", "noise", **more)


@pytest.mark.parametrize("dims", [("layer", "head"), ("head", "layer")])
def test_plot_puts_layers_upwards(dims):
    figure = result(dims, (2, 3)).plot("value")
    (heat,) = figure.data
    values = result(dims, (2, 3)).values
    np.testing.assert_array_equal(heat.z, values if dims[0] == "layer" else values.T)
    assert figure.layout.yaxis.title.text == "layer" and figure.layout.xaxis.title.text == "head"


def test_plot_can_stand_under_its_clip():
    figure = result(("layer", "time"), (3, WINDOWS)).plot(audio=NOISE, words=WORDS)
    assert [trace.name for trace in figure.data] == ["words", "wave", "mel", "map"]
    assert figure.data[-1].xaxis == "x4" and figure.layout.xaxis4.matches == "x"
    assert figure.data[-1].colorbar.len == figure.layout.yaxis4.domain[1]
    with pytest.raises(ValueError, match="pass audio="):
        result(("layer",), (3,)).plot(words=WORDS)


def test_plot_of_one_axis_is_bars():
    figure = result(("layer",), (5,)).plot()
    assert figure.data[0].type == "bar"
    assert list(figure.data[0].y) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_plot_says_which_axis_to_select_and_which_quantities_there_are():
    with pytest.raises(ValueError, match="layer, head, position"):
        result(("layer", "head", "position"), (1, 1, 1)).plot()
    with pytest.raises(ValueError, match="effect, recovery, value"):
        result(("layer",), (1,)).plot("loudness")


def test_plot_tells_places_numbers_and_baselines_of_its_metric():
    figure = result(("metric", "layer", "head"), (["kl", "logit"], 2, 3)).plot(metric="logit")
    (heat,) = figure.data
    assert list(heat.customdata[1][2]) == ["layer 1, head 2", -1.75, 2.75, 11.0]
    assert heat.meta["metric"] == "logit" and heat.meta["clean"] == 4
    for shown in ("customdata[0]", "recovery", "effect", "meta.metric", "meta.clean"):
        assert shown in heat.hovertemplate
    with pytest.raises(ValueError, match="kl, logit"):
        result(("metric", "layer"), (["kl", "logit"], 2)).plot()


def test_strongest_cells_are_marked_by_rank_and_faint_ones_are_not():
    values = torch.tensor([[0.0, 1.0, 0.02], [-2.0, 0.0, float("nan")]])
    found = SweepResult(
        values, ("layer", "head"), {"layer": [0, 1], "head": [0, 1, 2]},
        torch.tensor(1.0), torch.tensor(0.0), "decoder.attn.z", "denoise",
    )  # fmt: skip
    assert [list(row) for row in found.plot().data[0].text] == [["", "2", ""], ["1", "", ""]]


def test_scale_is_diverging_with_zero_in_its_middle():
    (heat,) = result(("layer", "head"), (2, 3)).plot().data
    assert heat.zmin == -heat.zmax and heat.zmid == 0
    assert heat.colorscale[0][1] == "rgb(5,48,97)" and heat.colorscale[-1][1] == "rgb(103,0,31)"


def test_bands_are_drawn_in_hertz():
    bands = [Band(2000, 4000), Band(100, 1000)]
    figure = result(("frequency", "time"), (bands, [Span(0, 0.1), Span(0.1, 0.2)])).plot("value")
    (heat,) = figure.data
    assert [list(row) for row in heat.z] == [[2, 3], [None, None], [0, 1]]
    assert figure.layout.yaxis.title.text == "Hz" and len(heat.y) == 4
    assert heat.meta["bands"] == [[100, 1000], None, [2000, 4000]]


# ------------------------------------------------------------------------ for papers


@pytest.mark.parametrize(
    "suffix, start", [("pdf", b"%PDF"), ("png", b"\x89PNG"), ("svg", b"<?xml")]
)
def test_figure_is_written_in_the_format_of_its_name(tmp_path, suffix, start):
    path = tmp_path / f"map.{suffix}"
    result(("layer", "time"), (3, WINDOWS)).figure(path, audio=NOISE, words=WORDS)
    written = path.read_bytes()
    assert written.startswith(start)
    if suffix == "svg":
        assert b"costs $5 &amp; &lt;more&gt;</text>" in written and b"layer</text>" in written
    if suffix == "pdf":
        assert b"/TrueType" in written or b"/Type0" in written


def test_figure_puts_the_clip_above_on_the_same_seconds():
    drawn = result(("layer", "time"), (3, WINDOWS)).figure(audio=NOISE, words=WORDS, phones=WORDS)
    drawn.draw_without_rendering()
    *rows, bar = drawn.axes
    assert len(rows) == 5
    assert {ax.get_xlim() for ax in rows} == {(0.0, 0.5)}
    assert (
        len({(round(ax.get_position().x0, 6), round(ax.get_position().x1, 6)) for ax in rows}) == 1
    )
    assert rows[-1].get_xlabel() == "time in the clip (s)" and bar.get_ylabel() == "effect"


@pytest.mark.parametrize(
    "dims, shape",
    [
        (("layer",), (5,)),
        (("layer", "head"), (4, 40)),
        (("time",), (WINDOWS[::2],)),
        (("time", "head"), (WINDOWS[::2], 2)),
        (("frequency", "time"), ([Band(100, 1000), Band(1500, 4000)], WINDOWS)),
        (("layer", "frequency"), (2, [Band(100, 1000), Band(1000, 4000)])),
        (("frequency",), ([Band(100, 1000), Band(1500, 4000)],)),
    ],
)
@pytest.mark.parametrize("audio", [None, NOISE], ids=["alone", "clip"])
def test_every_map_can_be_a_figure(dims, shape, audio):
    found = result(dims, shape)
    assert found.plot().data
    ax = found.figure(audio=audio).axes[0 if audio is None else 2]
    edges = figures.Axis.of(found, "time").edges if audio is None and "time" in dims else None
    assert edges is None or ax.get_xlim() == pytest.approx((edges[0], edges[-1]), abs=0.05)


def test_figure_refuses_what_does_not_fit(monkeypatch):
    found = result(("layer", "time"), (3, WINDOWS))
    with pytest.raises(ValueError, match="pass audio="):
        found.figure(words=WORDS)
    with pytest.raises(ValueError, match=r"reach to 0\.50 s"):
        found.figure(audio=NOISE[:100])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"audio_lens\[figures\]"):
        found.figure()
