"""Results of three axes as curves, of none as one bar, and what was found below their titles."""

import pytest
import torch

from audio_lens.results import Result

COORDS = {"stream": ["audio", "text"], "layer": [0, 1, 2], "group": ["own <b>", "last"]}


def made(**beside) -> Result:
    values = torch.arange(12.0).reshape(2, 3, 2)
    bounds = {"low": values - 1, "high": values + 1}
    return Result(values, tuple(COORDS), COORDS, **bounds, **beside)


def test_three_axes_are_curves_in_panels_with_bands():
    figure = made().plot()
    lines = [trace for trace in figure.data if trace.fill is None]
    assert [list(line.y) for line in lines[:2]] == [[0, 2, 4], [1, 3, 5]]
    assert [line.xaxis for line in lines] == ["x", "x", "x2", "x2"]
    assert [line.name for line in lines[:2]] == ["group own &lt;b&gt;", "group last"]
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    assert list(bands[0].y) == [1, 3, 5, 3, 1, -1]


def test_controls_along_the_layers_are_thin_lines():
    level = Result(
        torch.ones(2, 3), ("stream", "layer"), {n: COORDS[n] for n in ("stream", "layer")}
    )
    gap = Result(torch.ones(2), ("stream",), {"stream": COORDS["stream"]})
    figure = made(controls={"level": level, "gap": gap}).plot()
    names = [trace.name for trace in figure.data if trace.line.dash]
    assert names == ["level"] * 4
    assert sum(bool(trace.showlegend) for trace in figure.data) == 3


def test_three_axes_without_intervals_must_be_selected_from():
    with pytest.raises(ValueError, match="select one first"):
        Result(torch.zeros(2, 3, 2), tuple(COORDS), COORDS).plot()


def test_a_single_number_is_a_bar_with_its_controls():
    control = Result(torch.tensor(0.9).double(), (), {})
    share = Result(
        torch.tensor(0.5).double(),
        (),
        {},
        low=torch.tensor(0.4),
        high=torch.tensor(0.7),
        controls={"behaviour": control},
        report=["The audio makes 0.5 of <it>."],
        meta={"method": "share"},
    )
    figure = share.plot()
    bar, mark = figure.data
    assert (list(bar.x), list(bar.y)) == (["share"], [0.5])
    assert list(mark.y) == pytest.approx([0.9])
    assert bar.error_y.array[0] == pytest.approx(0.2)
    assert figure.layout.title.subtitle.text == "The audio makes 0.5 of &lt;it&gt;."
