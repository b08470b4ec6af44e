"""SweepResult: recovery and effect by hand, selection, averages, an exact round trip."""

import json
import logging
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audio_lens.patching.result import AXES, Cell, SweepResult, load
from audio_lens.timeline import Band, Span

WINDOWS = [Span(0.0, 0.1), Span(0.1, 0.2, "seven"), Span(0.2, 0.35, "")]


def layer_time(direction="denoise", **changes):
    """Two layers, three windows; clean 3, corrupted -1, so that 4 logits are a recovery of 1."""
    fields = {
        "values": torch.tensor([[-1.0, 3.0, 1.0], [-1.0, -3.0, math.nan]]),
        "dims": ("layer", "time"),
        "coords": {"layer": [0, 4], "time": list(WINDOWS)},
        "clean": torch.tensor(3.0),
        "corrupted": torch.tensor(-1.0),
        "site": "decoder.resid_pre",
        "direction": direction,
        "report": ["two layers"],
        "meta": {"model": "toy", "seed": "0"},
    }
    return SweepResult(**(fields | changes))


def two_stimuli():
    """Recovery 1 of a gap of 1, and 0 of a gap of 3: mean of ratios 1/2, ratio of means 1/4."""
    return SweepResult(
        values=torch.tensor([[[1.0]], [[0.0]]]),
        dims=("stimulus", "layer", "head"),
        coords={"stimulus": ["a", "b"], "layer": [0], "head": [2]},
        clean=torch.tensor([1.0, 3.0]),
        corrupted=torch.tensor([0.0, 0.0]),
        site="decoder.attn.z",
        direction="denoise",
    )


def two_metrics():
    return SweepResult(
        values=torch.tensor([[0.0, 1.0], [4.0, 2.0]]),
        dims=("metric", "position"),
        coords={"metric": ["logit", "kl"], "position": [5, 7]},
        clean=torch.tensor([1.0, 0.0]),
        corrupted=torch.tensor([0.0, 4.0]),
        site="decoder.resid_pre",
        direction="denoise",
    )


def same(one: SweepResult, other: SweepResult) -> bool:
    tensors = ("values", "clean", "corrupted")
    plain = ("dims", "coords", "site", "direction", "report", "meta")
    return all(
        torch.equal(getattr(one, name).nan_to_num(9e9), getattr(other, name).nan_to_num(9e9))
        and getattr(one, name).dtype == getattr(other, name).dtype
        for name in tensors
    ) and all(getattr(one, name) == getattr(other, name) for name in plain)


def test_recovery_and_effect_by_hand():
    expected = torch.tensor([[0.0, 1.0, 0.5], [0.0, -0.5, math.nan]])
    denoise, noise = layer_time(), layer_time("noise")
    torch.testing.assert_close(denoise.recovery, expected, equal_nan=True)
    torch.testing.assert_close(denoise.effect, expected, equal_nan=True)
    torch.testing.assert_close(noise.recovery, expected, equal_nan=True)
    torch.testing.assert_close(noise.effect, 1 - expected, equal_nan=True)


@pytest.mark.parametrize("gap", [0.0, 1e-7, 2e-4])
def test_alike_baselines_give_nan_and_a_warning(gap, caplog):
    with caplog.at_level(logging.WARNING):
        result = layer_time(corrupted=torch.tensor(3.0 - gap))
    assert result.recovery.isnan().all()
    assert "do not differ" in result.report[-1]
    assert "do not differ" in caplog.text
    assert result.top() == []


def test_a_small_metric_with_a_real_gap_is_not_alike():
    tiny = layer_time(
        values=torch.full((2, 3), 3e-3), clean=torch.tensor(3e-3), corrupted=torch.tensor(1e-3)
    )
    torch.testing.assert_close(tiny.recovery, torch.ones(2, 3))


def test_only_the_alike_stimulus_is_nan():
    result = two_stimuli()
    alike = SweepResult(**(vars(result) | {"clean": torch.tensor([1.0, 0.0])}))
    assert alike.recovery.isnan().flatten().tolist() == [False, True]
    assert "1 of 2" in alike.report[-1]


def test_alike_baselines_are_logged_once_and_not_by_what_is_made_of_the_result(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        result = replace(two_stimuli(), clean=torch.tensor([1.0, 0.0]))
    assert len(caplog.records) == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        part = result.select(stimulus="b").select(layer=0)
        load(result.save(tmp_path / "map.nc")).select(stimulus=["b"]).top()
    assert not caplog.records
    assert "1 of 1" in part.report[-1]


def test_top_is_sorted_by_absolute_effect_and_leaves_out_nan():
    top = layer_time().top(3)
    assert [cell.effect for cell in top] == [1.0, 0.5, -0.5]
    assert top[0].layer == 0 and top[0].span == WINDOWS[1]
    assert len(layer_time().top(100)) == 5


def test_cells_print_for_people_and_for_machines():
    cell = layer_time().top(1)[0]
    place = 'layer 0, 0.10\N{EN DASH}0.20 s "seven"'
    assert repr(cell) == f"{place}: effect +1.000 (recovery +1.000, value 3)"
    assert cell.to_dict() == {
        "layer": 0, "start_s": 0.1, "end_s": 0.2, "label": "seven", "clip": 0,
        "value": 3.0, "recovery": 1.0, "effect": 1.0, "change": 4.0,
    }  # fmt: skip
    assert json.dumps(Cell(1.0, math.nan, math.nan, 0.5, head=3).to_dict()).count("null") == 2


def test_stimuli_are_averaged_as_a_ratio_of_means():
    result = two_stimuli()
    assert result.mean().axes == ("layer", "head") == result.axes
    assert result.mean().recovery.item() == pytest.approx(1 / 4)
    assert result.top()[0].effect == pytest.approx(1 / 4)
    assert same(result.mean().mean(), result.mean())


def test_a_cell_is_averaged_over_the_stimuli_that_have_it():
    """Stimulus b lacks the second window, so there a alone counts, in the baselines too."""
    result = SweepResult(
        values=torch.tensor([[1.0, 0.5], [0.0, math.nan]]),
        dims=("stimulus", "time"),
        coords={"stimulus": ["a", "b"], "time": WINDOWS[:2]},
        clean=torch.tensor([1.0, 3.0]),
        corrupted=torch.tensor([0.0, 0.0]),
        site="encoder.out",
        direction="denoise",
    )
    assert [cell.effect for cell in result.cells()] == pytest.approx([1 / 4, 1 / 2])
    assert [cell.span for cell in result.top()] == [WINDOWS[1], WINDOWS[0]]
    assert result.mean().values.isnan().tolist() == [False, True]
    assert list(result.plot().data[0].y) == pytest.approx([1 / 4, 1 / 2])


def test_a_stimulus_without_baselines_is_left_out_and_noted(caplog):
    with caplog.at_level(logging.WARNING):
        result = replace(two_stimuli(), clean=torch.tensor([1.0, math.nan]))
    assert "not finite for 1 of 2" in result.report[-1] and "not finite" in caplog.text
    assert result.top()[0].effect == 1.0


@pytest.mark.parametrize("clean", [math.nan, math.inf])
def test_a_baseline_that_is_not_finite_is_noted(clean):
    result = layer_time(clean=torch.tensor(clean), report=[])
    assert result.recovery.isnan().all() and result.top() == []
    assert "not finite for 1 of 1" in result.report[0]


def test_several_metrics_must_be_named():
    result = two_metrics()
    with pytest.raises(ValueError, match="logit, kl"):
        result.top()
    assert [cell.position for cell in result.top(metric="kl")] == [7, 5]
    assert [cell.effect for cell in result.top(metric="kl")] == [0.5, 0.0]


def test_select_by_number_span_label_and_seconds():
    result = layer_time()
    row = result.select(layer=4)
    assert row.dims == ("time",) and row.values[:2].tolist() == [-1.0, -3.0]
    for name in (WINDOWS[1], "seven", 0.15):
        assert result.select(time=name).values.tolist() == [3.0, -3.0]
    assert result.select(layer=0, time=0.0).values.item() == -1.0
    kept = result.select(layer=[4, 0], time=[0.15])
    assert kept.values.tolist() == [[-3.0], [3.0]] and kept.coords["layer"] == [4, 0]
    assert two_stimuli().select(stimulus="b").clean.item() == 3.0


def test_select_explains_what_is_wrong():
    result = layer_time()
    with pytest.raises(ValueError, match="has layer, time"):
        result.select(head=1)
    with pytest.raises(ValueError, match="no layer 9; there is 0, 4"):
        result.select(layer=9)
    twice = [Span(0.0, 1.0, "a"), Span(1.0, 2.0, "a"), Span(2.0, 3.0)]
    with pytest.raises(ValueError, match="2 of time fit 'a'"):
        layer_time(coords={"layer": [0, 4], "time": twice}).select(time="a")


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"direction": "sideways"}, "direction"),
        ({"dims": ("layer", "stimulus")}, "before the axes"),
        ({"dims": ("layer", "tone")}, "unknown axes"),
        ({"coords": {"layer": [0], "time": list(WINDOWS)}}, "shape"),
        ({"clean": torch.zeros(2)}, "clean has shape"),
    ],
)
def test_parts_that_do_not_fit_raise(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        layer_time(**changes)


def test_xarray_is_labelled_in_seconds():
    data = layer_time().to_xarray()
    assert set(data.data_vars) == {"value", "recovery", "clean", "corrupted"}
    assert data["value"].sel(layer=4, time=0.15, method="nearest").item() == -3.0
    assert data["time_end"].values.tolist() == [0.1, 0.2, 0.35]
    assert data["time_label"].values.tolist() == ["", "seven", ""]
    assert json.loads(data.attrs["meta"])["model"] == "toy"


@pytest.mark.parametrize("make", [layer_time, two_stimuli, two_metrics])
def test_saved_results_load_unchanged(make, tmp_path):
    result = make()
    assert same(load(result.save(tmp_path / "map.nc")), result)


def test_bfloat16_comes_back_as_float32(tmp_path):
    result = two_stimuli()
    halves = {name: getattr(result, name).bfloat16() for name in ("values", "clean", "corrupted")}
    assert same(load(replace(result, **halves).save(tmp_path / "map.nc")), result)


def test_plotly_is_imported_only_to_plot():
    code = "import sys, audio_lens.patching.result; print('plotly' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


labels = st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
spans = st.builds(
    lambda start, width, label, clip: Span(start, start + width, label, clip),
    st.floats(0, 30),
    st.floats(0.01, 2),
    labels,
    st.integers(0, 3),
)
bands = st.builds(
    lambda low, width, label: Band(low, low + width, label),
    st.floats(0, 8000),
    st.floats(1, 500),
    labels,
)


@st.composite
def results(draw):
    axes = draw(st.permutations(AXES))[: draw(st.integers(1, 3))]
    batch = [dim for dim in ("metric", "stimulus") if draw(st.booleans())]
    coords = {dim: [f"{dim} {i}" for i in range(draw(st.integers(1, 3)))] for dim in batch}
    numbers = st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True)
    stretches = {"time": spans, "frequency": bands}
    stretches = {axis: st.lists(some, min_size=1, max_size=3) for axis, some in stretches.items()}
    coords |= {axis: draw(stretches.get(axis, numbers)) for axis in axes}
    shape = [len(names) for names in coords.values()]
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    make = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    values = torch.randn(shape, generator=make, dtype=dtype)
    values[torch.rand(shape, generator=make) < 0.2] = math.nan
    baseline = torch.randn(shape[: len(batch)], generator=make, dtype=dtype)
    direction = draw(st.sampled_from(["denoise", "noise"]))
    return SweepResult(
        values, tuple(coords), coords, baseline, baseline - 1, "encoder.mlp_out", direction,
        report=draw(st.lists(st.text(max_size=9), max_size=2)), meta={"seed": "1"},
    )  # fmt: skip


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(results())
def test_any_result_survives_the_file(tmp_path, result):
    assert same(load(result.save(tmp_path / "map.nc")), result)


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="no saved sweep"):
        load(tmp_path / "none.nc")
    (tmp_path / "text.nc").write_text("not netCDF")
    with pytest.raises(ValueError, match="does not hold"):
        load(tmp_path / "text.nc")
