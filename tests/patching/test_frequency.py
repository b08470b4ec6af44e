"""Sweeps over time and frequency: the patches of AST's spectrogram, held against the loop."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from audio_lens import Band, HookedAudioTransformer, Span, metrics, patching
from audio_lens.patching import Patch, SiteError, SweepResult
from families.audio_spectrogram_transformer import SMALL_PATCHES, batch, build

GRID = {"max_length": 61, "num_mel_bins": 18, **SMALL_PATCHES}  # 4 rows of 12 patches
WINDOWS = [Span(0.0, 0.11, "first"), Span(0.2, 0.41), Span(0.5, 0.7)]
BANDS = [Band(0, 900, "low"), Band(900, 8000)]
METRIC = metrics.logit_diff("LABEL_2", "LABEL_5")


@functools.cache
def model_of() -> HookedAudioTransformer:
    return HookedAudioTransformer.from_hf(build(dtype=torch.float64, **GRID))


def pair(n_clips: int = 1) -> dict[str, dict[str, Tensor]]:
    options = {"n_clips": n_clips, "n_frames": 61, "n_mels": 18, "dtype": torch.float64}
    return {"clean": batch(seed=1, **options), "corrupted": batch(seed=2, **options)}


def sweep(**options: Any) -> SweepResult:
    given = {"site": "encoder.resid_pre", "metric": METRIC, "progress": False, **pair(), **options}
    return patching.sweep(model_of(), **given)


def places(span: Span | None, band: Band | None) -> Tensor:
    """The positions of a cell, from what the timeline says of each."""
    timeline = model_of().timeline(pair()["clean"])
    seconds, hertz = timeline.seconds("encoder"), timeline.hertz("encoder")
    found = seconds.isfinite()
    if span is not None:
        found = found & (seconds >= span.start_s) & (seconds < span.end_s)
    if band is not None:
        found = found & (hertz >= band.low_hz) & (hertz < band.high_hz)
    return found


def one_patch(
    layer: int, where: Tensor, n_clips: int = 1, activation: str = "hook_resid_pre", unit: Any = ...
) -> Tensor:
    """The metric of one forward with clean values in the corrupted run."""
    model, runs = model_of(), pair(n_clips)
    name = f"encoder.blocks.{layer}.{activation}"
    _, clean = model.run_with_cache(runs["clean"], names_filter=name)

    def overwrite(x: Tensor, hook: Any) -> Tensor:
        changed = x.clone()
        changed[:, where, unit] = clean[name][:, where, unit]
        return changed

    logits = model.run_with_hooks(runs["corrupted"], fwd_hooks=[(name, overwrite)])
    return METRIC.bind(model, runs["corrupted"])(logits).detach()


@pytest.mark.parametrize("axes", list(itertools.permutations(("layer", "time", "frequency"))))
def test_time_and_frequency_in_any_order(axes: tuple[str, ...]) -> None:
    result = sweep(axes=axes, windows=WINDOWS, bands=BANDS)
    assert result.dims == axes
    for cell in result.cells():
        expected = one_patch(cell.layer, places(cell.span, cell.band))
        assert cell.value == pytest.approx(expected.item(), abs=1e-10)


def test_each_row_of_patches_by_default() -> None:
    result = sweep(axes=("layer", "frequency"))
    bands = result.coords["frequency"]
    assert bands == model_of().timeline(pair()["clean"]).bands("encoder")
    assert len(bands) == 4
    assert all(int(places(None, band).sum()) == 12 for band in bands)
    for cell in result.cells():
        expected = one_patch(cell.layer, places(None, cell.band))
        assert cell.value == pytest.approx(expected.item(), abs=1e-10)


def test_single_patches() -> None:
    """By "position" in time and "patch" in frequency: as many cells as there are patches."""
    by_place = sweep(axes=("frequency", "time"), windows="position", bands="patch", layers=1)
    by_position = sweep(axes="position", layers=1)
    assert by_place.values.shape == (4, 12)
    torch.testing.assert_close(by_place.values.flatten(), by_position.values[2:])
    assert by_position.coords["position"] == list(range(50))


def test_heads_and_several_stimuli() -> None:
    result = sweep(
        site="encoder.attn.z",
        axes=("head", "frequency", "time"),
        layers=2,
        windows=WINDOWS[:2],
        bands=BANDS,
        **pair(2),
    )
    assert result.values.shape == (2, 4, 2, 2)
    for head, band, span in itertools.product(range(4), BANDS, WINDOWS[:2]):
        expected = one_patch(2, places(span, band), 2, "attn.hook_z", head)
        value = result.select(head=head, frequency=band, time=span).values
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)


def test_special_positions_lie_in_no_window_and_no_band() -> None:
    """All windows and bands together leave the class token to the corrupted run."""
    everything = sweep(
        axes=("time", "frequency"), windows=[(0.0, 1.0)], bands=[(0, 8000)], layers=0
    )
    expected = one_patch(0, places(None, None))
    assert everything.values.item() == pytest.approx(expected.item(), abs=1e-10)


def test_refined_windows() -> None:
    result = sweep(axes=("layer", "frequency", "time"), windows=0.3, bands=BANDS, refine=0.02)
    single = sweep(axes=("layer", "frequency", "time"), windows="position", bands=BANDS)
    assert result.widths is not None
    narrow = result.widths <= 0.051
    assert narrow.any()
    for cell, is_single in zip(result.cells(), narrow.flatten().tolist(), strict=True):
        if is_single:
            at = {"layer": cell.layer, "frequency": cell.band, "time": cell.span.centre_s}
            assert cell.value == pytest.approx(single.select(**at).values.item(), abs=1e-10)


def test_attribution_and_its_confirmation() -> None:
    """Estimates of the same cells, in the same order."""
    options = {
        "axes": ("frequency", "layer", "time"),
        "windows": WINDOWS,
        "bands": BANDS,
        "site": "encoder.resid_pre",
        "metric": METRIC,
        **pair(),
    }
    estimate = patching.attribute(model_of(), method="ig", steps=30, **options)
    exact = sweep(**options)
    assert estimate.dims == exact.dims and estimate.coords == exact.coords
    joint = torch.stack([estimate.effect.flatten(), exact.effect.flatten()])
    assert torch.corrcoef(joint)[0, 1] > 0.5
    confirmed = estimate.confirm(model_of(), top_k=3, progress=False)
    for row in confirmed.rows:
        expected = one_patch(row.cell.layer, places(row.cell.span, row.cell.band))
        effect = (expected - exact.corrupted) / (exact.clean - exact.corrupted)
        assert row.exact == pytest.approx(effect.item(), rel=1e-6)  # kept in float32


def test_patch_takes_time_and_frequency() -> None:
    model, runs = model_of(), pair()
    both = Patch("resid_pre", 1, time=WINDOWS[1], frequency=BANDS[0], source=runs["clean"])
    value = patching.patch(model, runs["corrupted"], [both], metric=METRIC)
    torch.testing.assert_close(value, one_patch(1, places(WINDOWS[1], BANDS[0])))
    rows = Patch("resid_pre", 1, frequency=[(0, 900), (900, 8000)], source=runs["clean"])
    value = patching.patch(model, runs["corrupted"], [rows], metric=METRIC)
    torch.testing.assert_close(value, one_patch(1, places(None, None)))
    with pytest.raises(ValueError, match="position"):
        mixed = Patch("resid_pre", 1, frequency=(0, 900), position=3, source=runs["clean"])
        patching.patch(model, runs["corrupted"], [mixed])


# -------------------------------------------------------------------------------- results


def test_labels_in_hertz_survive_a_file(tmp_path: Path) -> None:
    result = sweep(axes=("layer", "time", "frequency"), windows=WINDOWS, bands=BANDS)
    data = result.to_xarray()
    assert data["frequency"].values.tolist() == [450, 4450]
    assert data["frequency_low"].values.tolist() == [0, 900]
    assert data["frequency_high"].values.tolist() == [900, 8000]
    again = patching.load(result.save(tmp_path / "map.nc"))
    assert again.coords == result.coords
    assert torch.equal(again.values, result.values)


def test_bands_have_names() -> None:
    result = sweep(axes=("layer", "time", "frequency"), windows=WINDOWS, bands=BANDS)
    named = [result.select(frequency=name) for name in ("low", 500.0, BANDS[0])]
    assert all(torch.equal(one.values, result.values[..., 0]) for one in named)
    [cell] = result.top(1)
    assert str(cell.band) in cell.place and "Hz" in cell.place
    assert cell.to_dict()["high_hz"] == cell.band.high_hz
    with pytest.raises(ValueError, match="no frequency 9000"):
        result.select(frequency=9000.0)


@pytest.mark.parametrize(
    "axes", [("frequency",), ("time", "frequency"), ("layer", "frequency"), ("head", "frequency")]
)
def test_a_map_can_be_drawn(axes: tuple[str, ...]) -> None:
    site = "encoder.attn.z" if "head" in axes else "encoder.resid_pre"
    figure = sweep(site=site, axes=axes, layers=None if "layer" in axes else 1).plot()
    assert "Hz" in figure.to_json()


def test_plan_says_how_many() -> None:
    planned = patching.plan(
        model_of(), axes=("layer", "frequency"), metric=METRIC, site="encoder.resid_pre", **pair()
    )
    assert "3 layers x 4 frequencies" in planned.explain()


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"axes": ("position", "frequency")}, SiteError, "position"),
        ({"axes": ("layer", "time"), "bands": "patch"}, SiteError, "bands belong"),
        ({"axes": "frequency", "bands": []}, ValueError, "low_hz"),
        ({"axes": "frequency", "bands": [(10, 11)]}, ValueError, "no position .* 10.11 Hz"),
        ({"axes": "frequency", "bands": [(300, 200)]}, ValueError, "above"),
    ],
)
def test_refusals(options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        sweep(**options)


def test_other_families_have_no_such_axis() -> None:
    model = HookedAudioTransformer.from_hf(tiny.tiny_hf("whisper"))
    inputs = tiny.hf_inputs("whisper")
    with pytest.raises(SiteError, match="choose one or more of layer, time, position"):
        patching.sweep(
            model,
            clean=inputs,
            corrupted=inputs,
            site="encoder.resid_pre",
            axes=("layer", "frequency"),
            metric=metrics.log_prob(7),
        )
