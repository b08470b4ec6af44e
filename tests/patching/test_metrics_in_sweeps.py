"""Metrics of people's own in a sweep: what they may do, give, and what is said when they fail."""

from __future__ import annotations

import pytest
import torch

from audio_lens import metrics, patching
from audio_lens.inputs import InputError
from patching.subjects import pair, tiny_model

NAME = "qwen2_audio"


def swept(metric, name=NAME, **options):
    asked = {"site": "decoder.mlp_out", "axes": ("layer", "position"), **pair(name), **options}
    return patching.sweep(tiny_model(name), metric=metric, **asked)


def attributed(metric, **options):
    asked = {"site": "decoder.mlp_out", "axes": ("layer", "position"), **pair(NAME), **options}
    return patching.attribute(tiny_model(NAME), metric=metric, **asked)


def same(found, expected):
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-9, atol=1e-12)


def difference(logits):
    return logits[:, -1, 5] - logits[:, -1, 6]


# ------------------------------------------------------------------ many runs at once


def test_runs_measured_at_once_give_what_each_gives_alone():
    one, other = metrics.logit_diff(5, 6), metrics.logit_diff(7, 8, position=-2)
    by_hand = metrics.read_at(lambda logits: logits[:, 5] - logits[:, 6], name="by hand")
    same(swept(one).values, swept(by_hand).values)
    at_once = swept({"one": one, "other": other}).values
    with_another = swept({"one": one, "other": other, "by hand": by_hand}).values
    same(at_once, with_another[:2])


# ------------------------------------------------------------------ two inputs


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("ask", [swept, attributed])
def test_sequences_that_only_one_of_the_runs_ends_with_are_refused(ask, direction):
    """Else the other run's score would be that of words it does not say."""
    runs = pair(NAME)
    other = {**runs["corrupted"], "input_ids": runs["corrupted"]["input_ids"].clone()}
    other["input_ids"][:, -2] += 1
    for odd in ("clean", "corrupted"):
        with pytest.raises(InputError, match="must end with the tokens scored"):
            ask(metrics.sequence_log_prob((7, 8)), **runs | {odd: other}, direction=direction)


# ------------------------------------------------------------------ in place


def forbidding(logits):
    """As processors of logits do."""
    logits[:, :, 6] = -1e4
    return logits[:, -1].log_softmax(-1)[:, 5]


def copying(logits):
    return forbidding(logits.clone())


@pytest.mark.parametrize("site", ["decoder.mlp_out", "encoder.mlp_out", "connector.out"])
def test_metrics_that_edit_their_logits_change_no_other(site):
    axes = ("position",) if site.startswith("connector") else ("layer", "position")
    built_in = metrics.logit_diff(5, 6)
    asked = {"first": forbidding, "difference": difference, "built in": built_in}
    found = swept(asked, site=site, axes=axes)
    honest = swept(asked | {"first": copying}, site=site, axes=axes)
    for baseline in ("clean", "corrupted", "values"):
        same(getattr(found, baseline), getattr(honest, baseline))


def test_metrics_that_edit_change_no_other_with_hooks_in_parts_and_in_attribution():
    model, asked = tiny_model(NAME), {"first": forbidding, "difference": difference}
    alone = swept(difference)
    with model.hooks([("decoder.blocks.0.hook_mlp_out", lambda x, hook: x)]):
        same(swept(asked).select(metric="difference").values, alone.values)
    estimate = attributed(asked).select(metric="difference")
    same(estimate.values, attributed(difference).values)
    inputs, source = pair(NAME)["corrupted"], pair(NAME)["clean"]
    patches = [patching.Patch("decoder.mlp_out", layer=1, source=source)]
    measured = patching.patch(model, inputs, patches, metric=asked)["difference"]
    same(measured, patching.patch(model, inputs, patches, metric=difference))


def test_poolers_and_readers_of_one_position_may_edit_too():
    def reset(logits):
        return logits.mul_(0).sum(-1)

    read = metrics.read_at(reset, name="reset")
    found = swept({"reset": read, "difference": metrics.logit_diff(5, 6)})
    same(found.select(metric="difference").values, swept(metrics.logit_diff(5, 6)).values)

    def first(logits):
        return logits[:, 0] * 1

    classes = {"site": "encoder.mlp_out", "name": "audio_spectrogram_transformer"}
    found = swept({"reset": reset, "first": first}, **classes).select(metric="first")
    same(found.values, swept(first, **classes).values)


# ------------------------------------------------------------------ what they give


@pytest.mark.parametrize(
    "metric",
    [
        lambda logits: logits[:, -1, 5] > logits[:, -1, 6],
        lambda logits: logits[:, -1].argmax(-1),
        lambda logits: logits[0, -1].argmax(-1).item(),
    ],
)
def test_truth_values_and_whole_numbers_are_numbers(metric):
    found, expected = swept(metric), swept(lambda x: torch.as_tensor(metric(x)).double())
    assert found.values.dtype == torch.float64
    for baseline in ("clean", "corrupted", "values"):
        same(getattr(found, baseline), getattr(expected, baseline))


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (lambda logits: logits[:, -1, 5].to(torch.complex64), "real numbers, got torch.complex64"),
        (lambda logits: logits[:, -1], "a scalar or one value per row .* got shape"),
        (lambda logits: None, "fails on the (clean|corrupted) run: "),
        (lambda logits: "yes", "fails on the (clean|corrupted) run: "),
        (lambda logits: logits[:, 0, 10**6], "fails on the .* run: IndexError: "),
        (lambda logits: logits[:, -1, 5] * torch.nan, "not finite on the (clean|corrupted) run"),
    ],
)
@pytest.mark.parametrize("ask", [swept, attributed])
def test_what_is_no_number_stops_at_the_unpatched_runs(ask, metric, said):
    calls = []

    def counted(logits):
        calls.append(1)
        return metric(logits)

    with pytest.raises(metrics.MetricError, match=said):
        ask({"asked": counted})
    assert len(calls) <= 2


def failing_at(call: int, error: Exception):
    calls = []

    def metric(logits):
        calls.append(1)
        if len(calls) == call:
            raise error
        return difference(logits)

    return metric


@pytest.mark.parametrize(
    ("call", "place"),
    [
        (1, "the corrupted run"),
        (2, "the clean run"),
        (3, r"cell 0 \(layer 0, position 0\)"),
        (5, r"cell 2 \(layer 0, position 2\)"),
    ],
)
def test_a_metric_that_fails_says_where(call, place):
    error = ZeroDivisionError("nothing to share")
    with pytest.raises(metrics.MetricError, match=f"'mine' fails on {place}: ") as raised:
        swept({"mine": failing_at(call, error)}, cells_per_forward=1)
    assert "ZeroDivisionError: nothing to share" in str(raised.value)
    assert raised.value.__cause__ is error


def test_a_cell_of_another_shape_is_named():
    calls = []

    def metric(logits):
        calls.append(1)
        return difference(logits)[: 2 if len(calls) < 4 else 1]

    with pytest.raises(metrics.MetricError, match=r"got shape \(1,\) \(on cell 1 \(layer 0, "):
        swept({"mine": metric}, cells_per_forward=1)


def test_a_failing_metric_of_attribution_and_patch_says_where():
    error = KeyError("x")
    for call, place in ((1, "the clean run"), (3, "the run that is patched")):
        with pytest.raises(metrics.MetricError, match=f"fails on {place}: KeyError"):
            attributed({"mine": failing_at(call, error)})
    runs = pair(NAME)
    patches = [patching.Patch("decoder.mlp_out", layer=1, source=runs["clean"])]
    with pytest.raises(metrics.MetricError, match="fails on the patched run: KeyError"):
        patching.patch(
            tiny_model(NAME), runs["corrupted"], patches, metric={"mine": failing_at(1, error)}
        )


# ------------------------------------------------------------------ verify


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_cells_that_are_not_finite_in_both_are_verified(odd):
    honest = swept(difference)
    baselines = torch.stack([honest.clean, honest.corrupted])

    def outside(logits):
        value = difference(logits)
        is_baseline = (value - baselines).abs().min(0).values < 1e-9
        return value.where(is_baseline, odd)

    found = swept(outside, verify=1_000)
    n_odd = (~found.values.isfinite()).sum() - (~honest.values.isfinite()).sum()
    assert n_odd > 10
    assert "verified by whole forwards" in found.report[-1]
