"""Labelled values that are no sweep: free axes, selection, averages, files and figures."""

import json
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


# -------------------------------------------------------------------------------- many items


def finding(**changes):
    """A ratio over two items by layer, its interval, and two controls, one of a single level."""
    coords = {"stimulus": ["a", "b"], "layer": [0, 2, 4]}
    along = {"layer": [0, 2, 4]}
    random = Result(torch.tensor([0.1, 0.0, math.nan]), ("layer",), along, n_kept=2)
    level = Result(torch.tensor(0.5), (), {}, low=torch.tensor(0.4), high=torch.tensor(0.6))
    fields = {
        "values": torch.arange(6.0).reshape(2, 3),
        "dims": ("stimulus", "layer"),
        "coords": coords,
        "estimate": torch.tensor([1.0, 2.0, 5.0]),
        "low": torch.tensor([0.5, 1.0, -math.inf]),
        "high": torch.tensor([1.5, 3.0, math.inf]),
        "controls": {"random_keys": random, "destroyed": level},
        "n_kept": 2,
        "dropped": {"wrong": 3, "too long": 1},
    }
    return Result(**(fields | changes))


def test_the_estimate_stands_for_the_mean_of_many():
    result = finding()
    assert [cell.value for cell in result.cells()] == [1.0, 2.0, 5.0]
    assert repr(result.cells()[1]) == "layer 2: 2 [1, 3]"
    assert result.interval.shape == (2, 3) and result.n_dropped == 4
    mean = result.mean()
    assert mean.values.tolist() == [1.0, 2.0, 5.0] and mean.low.tolist() == result.low.tolist()
    assert mean.estimate is None and mean.mean() is mean
    assert [cell.value for cell in finding(estimate=None).cells()] == [1.5, 2.5, 3.5]


def test_parts_of_many_items_take_their_controls_along():
    part = finding().select(layer=[4, 0])
    assert part.estimate.tolist() == [5.0, 1.0]
    assert part.controls["random_keys"].values[1] == pytest.approx(0.1)
    one = finding().select(layer=2)
    assert one.controls["random_keys"].values == 0.0 and one.controls["destroyed"].values == 0.5
    item = finding().select(stimulus="b")
    assert item.interval is None and [cell.value for cell in item.cells()] == [3.0, 4.0, 5.0]


def test_findings_are_saved_whole(tmp_path):
    result = finding()
    loaded = Result.load(result.save(tmp_path / "finding.nc"))
    for name in ("values", "estimate", "low", "high"):
        assert torch.equal(getattr(loaded, name), getattr(result, name))
    assert loaded.n_kept == 2 and loaded.dropped == result.dropped
    assert list(loaded.controls) == ["random_keys", "destroyed"]
    level, random = loaded.controls["destroyed"], loaded.controls["random_keys"]
    assert (level.values.item(), level.low.item(), level.dims) == (0.5, pytest.approx(0.4), ())
    assert random.values[2].isnan() and random.n_kept == 2 and random.coords == {"layer": [0, 2, 4]}
    data = result.to_xarray()
    assert data["control.random_keys"].sel(layer=2) == 0 and data["low"].sel(layer=0) == 0.5
    assert finding(controls={}).to_xarray().attrs.keys() >= {"n_kept", "dropped"}


def test_findings_are_told_in_json():
    told = json.loads(json.dumps(finding(meta={"model": "toy", "seed": "0"}).to_dict()))
    assert told["axes"] == ["layer"] and told["coords"] == {"layer": [0, 2, 4]}
    assert told["values"] == [1.0, 2.0, 5.0]
    assert told["interval"] == [[0.5, 1.0, None], [1.5, 3.0, None]]
    assert told["controls"]["random_keys"]["values"][2] is None
    assert told["controls"]["destroyed"]["values"] == 0.5
    assert (told["n_kept"], told["n_dropped"], told["model"], told["seed"]) == (2, 4, "toy", "0")
    spans = windowed().to_dict()["coords"]["time"]
    assert spans[1] == {"start_s": 0.1, "end_s": 0.25, "label": "seven"}
    assert shares().to_dict()["values"][0] == [3.0, 4.0, 5.0]


def test_controls_of_another_shape_are_refused():
    own = Result(torch.zeros(2), ("layer",), {"layer": [0, 1]})
    with pytest.raises(ValueError, match=r"control 'own' does not stand beside .*: its layer"):
        finding(controls={"own": own})
    with pytest.raises(ValueError, match="it has controls itself"):
        finding(controls={"own": finding()})
    with pytest.raises(ValueError, match="both bounds"):
        finding(high=None)
    with pytest.raises(ValueError, match="low has shape"):
        finding(low=torch.zeros(2))


def test_intervals_and_controls_are_drawn():
    bars, random, level = finding().plot().data
    assert list(bars.error_y.array) == [0.5, 1.0, 0.0]
    assert list(bars.error_y.arrayminus) == [0.5, 1.0, 0.0]
    assert (random.name, level.name) == ("random_keys", "destroyed")
    assert list(level.y) == [0.5] * 3 and level.error_y.array[0] == pytest.approx(0.1)
    assert (
        finding().plot().layout.showlegend and not shares().select(layer=0).plot().layout.showlegend
    )
    (reach,) = finding().figure().axes[0].collections
    assert reach.get_segments()[0][:, 1].tolist() == [0.5, 1.5]


def test_a_sweep_has_intervals_and_controls_too(tmp_path):
    zero = torch.tensor(0.0)
    sweep = SweepResult(
        torch.tensor([0.2, 0.4]),
        ("layer",),
        {"layer": [0, 1]},
        zero + 1,
        zero,
        "decoder.resid_pre",
        "denoise",
        low=torch.tensor([0.1, 0.3]),
        high=torch.tensor([0.3, 0.5]),
        controls={"identity": Result(torch.zeros(2), ("layer",), {"layer": [0, 1]})},
    )
    loaded = SweepResult.load(sweep.save(tmp_path / "sweep.nc")).select(layer=1)
    assert loaded.low == pytest.approx(0.3) and loaded.controls["identity"].values == 0
