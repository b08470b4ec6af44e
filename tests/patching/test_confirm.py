"""Confirmation: exact values beside estimates, controls that behave as they must."""

from __future__ import annotations

import json
import math

import pytest
import scipy.stats
import torch

import tiny
from audio_lens import HookedAudioTransformer, InputError, metrics, patching
from audio_lens.patching.attribution.attribute import attribute
from audio_lens.patching.attribution.confirm import matched_noise, rank_correlation
from toys import Cue, copy_toy, prompt

SHARED = {"clean": prompt(Cue(1)), "corrupted": prompt(Cue(3)), "metric": metrics.logit_diff(1, 3)}


@pytest.fixture(scope="module")
def model():
    return HookedAudioTransformer.from_hf(tiny.tiny_hf("whisper", dtype=torch.float64))


@pytest.fixture(scope="module")
def pair():
    made = [tiny.hf_inputs("whisper", seed=seed, dtype=torch.float64) for seed in (0, 1, 2)]
    clean, corrupted, other = ({**made[0], "input_features": x["input_features"]} for x in made)
    return clean, corrupted, other


@pytest.fixture(scope="module")
def estimate(model, pair):
    clean, corrupted, _ = pair
    return attribute(
        model,
        clean=clean,
        corrupted=corrupted,
        site="encoder.resid_mid",
        windows=0.3,
        metric=metrics.logit_diff(7, 9),
    )


@pytest.fixture(scope="module")
def exact(model, estimate):
    return patching.sweep(model, progress=False, **estimate.request)


def test_rows_hold_the_exact_values_of_the_strongest(model, pair, estimate, exact):
    confirmation = estimate.confirm(model, top_k=5, other=pair[2], progress=False)
    strongest = estimate.top(5)
    assert [row.cell.place for row in confirmation.rows] == [cell.place for cell in strongest]
    truth = {cell.place: cell.effect for cell in exact.cells()}
    for row, cell in zip(confirmation.rows, strongest, strict=True):
        assert row.estimate == pytest.approx(cell.effect)
        assert row.exact == pytest.approx(truth[row.cell.place])
        assert row.controls["identity"] == pytest.approx(0, abs=1e-10)
        assert abs(row.controls["other_item"] - row.exact) > 0
        assert abs(row.controls["norm_matched_noise"] - row.exact) > 0
    assert confirmation.n_measured == 10 and confirmation.n_cells == len(truth)
    assert confirmation.report == []


def test_random_sites_are_other_cells_of_the_same_layers(model, estimate, exact):
    """Nine tenths of a layer's cells cannot be matched one to one: some partners are missing."""
    one, again = (
        estimate.confirm(model, top_k=8, controls=["random_sites"], progress=False)
        for _ in range(2)
    )
    by_layer = {}
    for cell in exact.cells():
        by_layer.setdefault(cell.layer, []).append(cell.effect)
    for row in one.rows:
        partner = row.controls["random_sites"]
        assert math.isnan(partner) or any(
            partner == pytest.approx(x) for x in by_layer[row.cell.layer]
        )
    assert one.to_dict() == again.to_dict()
    seeded = estimate.confirm(model, top_k=8, controls=["random_sites"], seed=1, progress=False)
    assert seeded.to_dict() != one.to_dict()


def test_all_cells_give_the_agreement_of_the_whole_map(model, estimate, exact):
    confirmation = estimate.confirm(model, top_k=4, controls=[], exact="all", progress=False)
    effects = [[cell.effect for cell in result.cells()] for result in (estimate, exact)]
    expected = scipy.stats.spearmanr(*effects).statistic
    assert confirmation.rank_correlation == pytest.approx(expected)
    best = {cell.place for cell in exact.top(4)}
    shared = len(best & {cell.place for cell in estimate.top(4)})
    assert confirmation.precision == shared / 4
    assert confirmation.overlap == shared / (8 - shared)
    assert confirmation.n_measured == confirmation.n_cells == len(effects[0])
    assert math.isnan(confirmation.threshold) and confirmation.beyond_controls == []


def test_a_planted_head_stands_out():
    toy = copy_toy()
    estimate = attribute(toy, site="attn.z", axes=("layer", "head"), **SHARED)
    controls = ["identity", "other_item", "random_sites"]
    options = {"controls": controls, "other": prompt(Cue(2)), "progress": False}
    confirmation = estimate.confirm(toy, top_k=1, **options)
    (row,) = confirmation.rows
    assert (row.estimate, row.exact, row.controls["identity"]) == pytest.approx((1, 1, 0))
    assert row.controls["other_item"] == pytest.approx(0.5)  # takes the wrong answer away
    assert row.controls["random_sites"] == 0
    assert confirmation.threshold < 0.5 and confirmation.beyond_controls == [row]


def test_magnitudes_are_ranked_against_magnitudes(model, pair):
    clean, corrupted, _ = pair
    estimate = attribute(
        model,
        clean=clean,
        corrupted=corrupted,
        site="decoder.cross_attn.q",
        axes=("layer", "head"),
        metric=metrics.logit_diff(7, 9),
        method="atp*",
    )
    found = estimate.confirm(model, top_k=3, controls=[], exact="all", progress=False)
    exact = patching.sweep(model, progress=False, **estimate.request)
    effects = [torch.tensor([cell.effect for cell in x.cells()]) for x in (estimate, exact)]
    expected = scipy.stats.spearmanr(effects[0], effects[1].abs()).statistic
    assert found.rank_correlation == pytest.approx(expected)


def test_one_of_several_metrics_is_confirmed(model, pair):
    clean, corrupted, _ = pair
    several = {"difference": metrics.logit_diff(7, 9), "answer": metrics.log_prob(7)}
    options = {"clean": clean, "corrupted": corrupted, "site": "decoder.attn.z", "axes": "layer"}
    estimate = attribute(model, metric=several, **options)
    found = estimate.confirm(model, top_k=2, controls=[], metric="answer", progress=False)
    exact = patching.sweep(model, metric=several["answer"], progress=False, **options)
    truth = {cell.place: cell.effect for cell in exact.cells()}
    for row in found.rows:
        assert row.exact == pytest.approx(truth[row.cell.place])
    with pytest.raises(ValueError, match="name one of the metrics"):
        estimate.confirm(model, progress=False)


def test_confirmation_prints_as_a_table(model, estimate):
    confirmation = estimate.confirm(model, top_k=3, progress=False)
    lines = str(confirmation).splitlines()
    assert all(name in lines[0] for name in ("estimate", "exact", "identity", "random_sites"))
    assert lines[1].startswith(confirmation.rows[0].cell.place)
    assert "cells measured: rank correlation" in lines[4]
    assert "other_item left out" in lines[5] == confirmation.report[0]
    made = json.loads(json.dumps(confirmation.to_dict()))
    assert made["rows"][0]["estimate"] == confirmation.rows[0].estimate


def test_attention_has_no_noise_control(model, pair):
    clean, corrupted, _ = pair
    estimate = attribute(
        model,
        clean=clean,
        corrupted=corrupted,
        site="decoder.cross_attn.pattern",
        axes=("layer", "head"),
        metric=metrics.logit_diff(7, 9),
    )
    confirmation = estimate.confirm(model, top_k=2, progress=False)
    assert list(confirmation.rows[0].controls) == ["identity", "random_sites"]
    assert "norm_matched_noise left out" in confirmation.report[1]
    with pytest.raises(ValueError, match="weights"):
        estimate.confirm(model, controls=["norm_matched_noise"], progress=False)


# -------------------------------------------------------------------------------- pieces


def test_noise_keeps_mean_and_norm_of_every_vector():
    generator = torch.Generator().manual_seed(0)
    activation = 3 + 2 * torch.randn(2, 5, 4, 16, generator=generator)
    noise = matched_noise(activation, generator)
    assert torch.allclose(noise.mean(-1), activation.mean(-1), atol=1e-5)
    assert torch.allclose(noise.norm(dim=-1), activation.norm(dim=-1), rtol=1e-5)
    assert (noise - activation).abs().max() > 1


def test_rank_correlation_shares_ranks_of_ties():
    a = torch.tensor([1.0, 2.0, 2.0, -3.0, 5.0, 2.0])
    b = torch.tensor([0.5, 0.1, 0.7, 0.1, 2.0, 0.0])
    assert rank_correlation(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert rank_correlation(a, a**3) == pytest.approx(1.0)
    assert math.isnan(rank_correlation(a, torch.ones(6)))


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_k": 0}, "at least 1"),
        ({"exact": "some"}, "exact"),
        ({"controls": ["zero"]}, "no control 'zero'"),
        ({"controls": ["other_item"]}, "needs the inputs of another item"),
        ({"controls": ["identity"], "other": prompt(Cue(2))}, "not among controls"),
    ],
)
def test_what_cannot_be_confirmed_is_refused(options, says):
    estimate = attribute(copy_toy(), site="attn.z", axes=("layer", "head"), **SHARED)
    with pytest.raises((ValueError, TypeError), match=says):
        estimate.confirm(copy_toy(), progress=False, **options)


def test_parts_of_an_attribution_are_refused(model, estimate):
    for part in (estimate.select(layer=1), estimate.mean()):
        with pytest.raises(ValueError, match="before select or mean"):
            part.confirm(model, progress=False)


def test_runs_that_are_alike_are_refused():
    same = {**SHARED, "corrupted": SHARED["clean"]}
    estimate = attribute(copy_toy(), site="attn.z", axes=("layer", "head"), **same)
    with pytest.raises(ValueError, match="nothing to confirm"):
        estimate.confirm(copy_toy(), progress=False)


def test_another_item_must_have_the_same_shape(estimate, model):
    longer = tiny.hf_inputs("whisper", words=(9, 4), dtype=torch.float64)
    with pytest.raises(InputError, match="equal"):
        estimate.confirm(model, top_k=1, controls=["other_item"], other=longer, progress=False)
