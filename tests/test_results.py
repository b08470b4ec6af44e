"""Labelled values that are no sweep: free axes, selection, averages, files and figures."""

import math
import pickle

import pytest
import torch

from audio_lens.patching.result import SweepResult
from audio_lens.results import Result
from audio_lens.timeline import Band, Span

WINDOWS = [Span(0.0, 0.1), Span(0.1, 0.25, "seven")]


def shares(**changes):
    """Two items, two groups, three layers; values 0, 1, 2 ..."""
    fields = {
        "values": torch.arange(12.0).reshape(2, 2, 3),
        "dims": ("stimulus", "group", "layer"),
        "coords": {"stimulus": ["a", "b"], "group": ["audio", "text"], "layer": [0, 2, 4]},
        "report": ["two items"],
        "meta": {"model": "toy"},
        "recipe": {"arguments": {"k": 3}},
    }
    return Result(**(fields | changes))


def windowed():
    coords = {"alpha": [0.5, 2.0], "time": WINDOWS}
    return Result(torch.tensor([[1.0, -3.0], [math.nan, 2.0]]), ("alpha", "time"), coords)


def banded():
    coords = {"metric": ["kl", "logit"], "frequency": [Band(0, 100, "low"), Band(100, 400)]}
    return Result(torch.eye(2), ("metric", "frequency"), coords)


def test_free_axes_are_selected_and_averaged():
    assert shares().axes == ("group", "layer")
    assert shares().select(group="text", layer=[4, 0]).values.tolist() == [[5.0, 3.0], [11.0, 9.0]]
    mean = shares().mean()
    assert mean.dims == ("group", "layer") and mean.values[0].tolist() == [3.0, 4.0, 5.0]
    assert mean.mean() is mean


def test_cells_tell_their_place_and_rank_by_size():
    first, second, third = windowed().top()
    assert repr(first) == 'alpha 0.5, 0.10\N{EN DASH}0.25 s "seven": -3'
    assert (second.value, third.value) == (2.0, 1.0)
    assert second.at == {"alpha": 2.0, "time": WINDOWS[1]}
    assert [cell.value for cell in shares().cells()] == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


@pytest.mark.parametrize("make", [shares, windowed, banded])
def test_saved_results_load_unchanged(make, tmp_path):
    result = make()
    loaded = Result.load(result.save(tmp_path / "result.nc"))
    assert torch.equal(loaded.values.nan_to_num(9e9), result.values.nan_to_num(9e9))
    for name in ("dims", "coords", "report", "meta", "recipe"):
        assert getattr(loaded, name) == getattr(result, name)


def test_a_pickle_of_a_selection_holds_no_more_than_it():
    wide = torch.zeros(1000, 1000)
    assert len(pickle.dumps(Result(wide[3, :2], ("head",), {"head": [0, 1]}))) < 2000
    kept = pickle.loads(pickle.dumps(shares()))
    assert torch.equal(kept.values, shares().values) and kept.coords == shares().coords


def test_several_metrics_must_be_named():
    assert banded().of_metric("kl").meta == {"metric": "kl"}
    with pytest.raises(ValueError, match="kl, logit"):
        banded().top()


def test_parts_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="shape"):
        shares(values=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="before the axes"):
        shares(dims=("group", "stimulus", "layer"))
    with pytest.raises(ValueError, match="no dimension 'head'"):
        shares().select(head=1)


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="no saved result"):
        Result.load(tmp_path / "none.nc")
    zero = torch.tensor(0.0)
    sweep = SweepResult(torch.zeros(1), ("layer",), {"layer": [0]}, zero + 1, zero, "a.b", "noise")
    with pytest.raises(ValueError, match="more than a result: clean, corrupted, recovery"):
        Result.load(sweep.save(tmp_path / "sweep.nc"))


def test_values_are_drawn_with_the_scale_of_their_size():
    figure = windowed().plot()
    (heat,) = figure.data
    assert heat.zmax == 3.0 and heat.meta["metric"] == "metric"
    assert list(heat.customdata[0][1]) == ['alpha 0.5, 0.10\N{EN DASH}0.25 s "seven"', -3.0]
    assert "meta.clean" not in heat.hovertemplate
    assert figure.layout.title.text == "alpha by time"
    assert windowed().figure().axes[0].get_ylabel() == "alpha"
    with pytest.raises(ValueError, match="there is value"):
        windowed().plot("effect")
