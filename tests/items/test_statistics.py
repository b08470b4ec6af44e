"""Intervals that hold what they say, ratios of means, change points, and every control."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from audio_lens.items import Item, statistics
from audio_lens.items.statistics import ControlError, bootstrap, changepoint, ratio_of_means

NAN = float("nan")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------------- intervals


def test_a_mean_with_its_interval_is_scipys() -> None:
    values = normal(40, 3) + torch.tensor([0.0, 1.0, -2.0])
    found = bootstrap(values, resamples=4000)
    torch.testing.assert_close(found.value, values.mean(0))
    for cell in range(3):
        theirs = stats.bootstrap(
            (values[:, cell].numpy(),), np.mean, method="percentile", n_resamples=4000, rng=1
        ).confidence_interval
        assert found.low[cell] == pytest.approx(theirs.low, abs=0.03)
        assert found.high[cell] == pytest.approx(theirs.high, abs=0.03)
    assert found.interval.shape == (2, 3) and found.level == 0.95
    assert "intervals of 95%" in repr(found) and "[" in repr(bootstrap(values[:, 0]))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    held = 0
    for trial in range(200):
        found = bootstrap(normal(30, seed=trial), level=0.9, resamples=400)
        held += bool(found.low <= 0 <= found.high)
    assert 0.82 <= held / 200 <= 0.95


def test_groups_are_drawn_whole() -> None:
    """Twenty copies of two speakers' values say no more than two values."""
    speakers = torch.tensor([0.0, 1.0]).repeat(20)
    alone = bootstrap(speakers)
    by_speaker = bootstrap(speakers, groups=[0, 1] * 20)
    assert alone.high - alone.low < 0.35
    assert (by_speaker.low, by_speaker.high) == (0.0, 1.0)


def test_another_statistic_is_bootstrapped_by_its_own() -> None:
    values = normal(60, 2)
    found = bootstrap(values, lambda x: x.median(0).values, resamples=300)
    torch.testing.assert_close(found.value, values.median(0).values)
    assert ((found.low < found.value) & (found.value < found.high)).all()
    grouped = bootstrap(values, lambda x: x.mean(0), groups=[i // 30 for i in range(60)])
    torch.testing.assert_close(grouped.value, bootstrap(values).value)


def test_what_an_item_lacks_is_left_out() -> None:
    values = torch.tensor([[1.0, NAN, NAN], [3.0, 5.0, NAN], [2.0, 5.0, NAN]])
    found = bootstrap(values)
    assert found.value[:2].tolist() == [2.0, 5.0] and found.value[2].isnan()
    assert found.low[1] == found.high[1] == 5.0 and found.low[2].isnan()


def test_one_item_has_no_interval() -> None:
    found = bootstrap(torch.tensor([[1.0, 2.0]]))
    assert found.value.tolist() == [1.0, 2.0] and found.interval.isnan().all()
    alone = bootstrap(torch.tensor([1.0, 2.0]), lambda x: x.mean(0), groups=["a", "a"])
    assert alone.low.isnan()


def test_a_ratio_of_means_is_not_ruled_by_small_denominators() -> None:
    over, under = torch.tensor([2.0, 4.0, 0.5]), torch.tensor([4.0, 8.0, 0.001])
    found = ratio_of_means(over, under)
    assert found.value == pytest.approx(6.5 / 12.001)
    same = ratio_of_means(normal(20, 4), torch.ones(20, 4, dtype=torch.float64))
    torch.testing.assert_close(same.low, bootstrap(normal(20, 4)).low)


def test_a_ratio_whose_denominator_may_be_nothing_is_unbounded() -> None:
    found = ratio_of_means(torch.ones(4), torch.tensor([1.0, -1.0, 1.0, -0.9]))
    assert found.low == -math.inf and found.high == math.inf
    known = ratio_of_means(torch.ones(4), -torch.ones(4))
    assert (known.low, known.value, known.high) == (-1.0, -1.0, -1.0)


def test_many_cells_are_bounded_in_memory() -> None:
    values = normal(5, 9000)
    found = bootstrap(values, resamples=1000)
    torch.testing.assert_close(found.low[8990:], bootstrap(values[:, 8990:], resamples=1000).low)


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: bootstrap(torch.zeros(0)), "no items"),
        (lambda: bootstrap(torch.zeros(2), groups=["a"]), "2 items need as many groups"),
        (lambda: bootstrap(torch.zeros(2), groups=["a", None]), "some have none"),
        (lambda: bootstrap(torch.zeros(2), level=1.0), "between 0 and 1"),
        (lambda: changepoint(torch.zeros(3, 2)), "make no two steps"),
        (lambda: changepoint(torch.zeros(3, 4), pieces="lines"), "make no two lines"),
        (lambda: changepoint(torch.zeros(3, 5), [1, 2]), "with 2 coordinates"),
        (lambda: changepoint(torch.full((3, 5), NAN)), "without NaN"),
        (lambda: changepoint(torch.zeros(3, 5), pieces="curves"), "pieces are one of"),
    ],
)
def test_what_does_not_fit_is_refused(call, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()


# -------------------------------------------------------------------------------- change points


@pytest.mark.parametrize("pieces", ["steps", "lines"])
def test_a_planted_change_is_found(pieces: str) -> None:
    steps = torch.arange(12.0).double()
    curve = torch.where(steps >= 7, 1.0, 0.0)
    if pieces == "lines":
        curve = torch.where(steps >= 7, 3 + 0.1 * steps, 0.1 * steps)
    curves = curve + 0.2 * normal(25, 12)
    found = changepoint(curves, (steps / 11).tolist(), pieces=pieces, resamples=300)
    assert found.at == pytest.approx(7 / 11) and found.low <= found.at <= found.high
    assert found.high - found.low <= 1 / 11 + 1e-9
    assert found.gain > 0.9 and found.p < 0.02


def test_no_change_has_a_large_p() -> None:
    noise = changepoint(normal(25, 10, seed=3), resamples=300)
    assert noise.p > 0.05 and noise.high - noise.low > 2
    flat = changepoint(torch.ones(4, 6))
    assert math.isnan(flat.at) and flat.p == 1.0 and flat.gain == 0.0
    line = changepoint(torch.arange(8.0).repeat(3, 1), pieces="lines")
    assert math.isnan(line.at) and line.p == 1.0


def test_change_points_of_one_item_have_no_interval() -> None:
    found = changepoint(torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0]]))
    assert found.at == 3.0 and math.isnan(found.low)


# -------------------------------------------------------------------------------- controls


def test_other_items_are_never_the_own_one() -> None:
    for count in (2, 3, 10):
        other = statistics.other_item(count, seed=count)
        assert sorted(other.tolist()) == list(range(count))
        assert (other != torch.arange(count)).all()
    labels = ["a", "b", "a", "c", "b"]
    other = statistics.other_item(5, labels)
    assert all(labels[i] != labels[j] for i, j in enumerate(other.tolist()))
    twins = statistics.other_item(4, ["a", "b", "a", "b"], same=True)
    assert twins.tolist() == [2, 3, 0, 1]


def test_noise_has_mean_and_norm_of_its_source() -> None:
    source = normal(2, 5, 16).float() * 3 + 1
    noise = statistics.norm_matched_noise(source, seed=7)
    torch.testing.assert_close(noise.mean(-1), source.mean(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(noise.norm(dim=-1), source.norm(dim=-1))
    assert noise.dtype == source.dtype
    alike = torch.nn.functional.cosine_similarity(
        noise - noise.mean(-1, keepdim=True), source - source.mean(-1, keepdim=True), dim=-1
    )
    assert alike.abs().mean() < 0.5
    assert torch.equal(statistics.identity(source), source)


def test_random_sites_are_others_of_the_same_kind() -> None:
    heads = [(layer, head) for layer in range(3) for head in range(4)]
    found = statistics.random_sites([(0, 1), (0, 2), (2, 3)], heads, alike=lambda place: place[0])
    assert sorted(layer for layer, _ in found) == [0, 0, 2]
    assert not set(found) & {(0, 1), (0, 2), (2, 3)} and len(set(found)) == 3


def test_random_keys_are_others_and_as_many() -> None:
    keys = torch.zeros(2, 30, dtype=torch.bool)
    keys[0, 3:9], keys[1, 5:7] = True, True
    among = torch.ones_like(keys)
    among[:, 25:] = False
    found = statistics.random_keys(keys, among)
    assert (
        found.sum(1).tolist() == [6, 2] and not (found & keys).any() and not (found & ~among).any()
    )
    assert not statistics.empty(keys).any()


def test_random_directions_have_the_same_size() -> None:
    direction = normal(32) * 5
    drawn = statistics.random_direction(direction)
    assert drawn.norm() == pytest.approx(float(direction.norm()))
    basis = statistics.random_direction(torch.linalg.qr(normal(32, 4))[0])
    torch.testing.assert_close(basis.T @ basis, torch.eye(4).double())
    signs = [statistics.random_direction(normal(3), seed=s)[0] > 0 for s in range(100)]
    assert 30 < sum(signs) < 70


def test_permuted_labels_are_the_same_ones_elsewhere() -> None:
    labels = ["a"] * 5 + ["b"] * 5
    found = statistics.permuted_labels(labels)
    assert sorted(found) == labels and found != labels
    groups = [0, 0, 0, 0, 1] * 2
    found = statistics.permuted_labels(labels, groups)
    for group in (0, 1):
        own = [i for i, g in enumerate(groups) if g == group]
        assert sorted(found[i] for i in own) == sorted(labels[i] for i in own)


def test_destroying_alone_recovers_half_a_logit_difference() -> None:
    clean, corrupted = torch.tensor([8.0, 10.0]), torch.tensor([-8.0, -10.0])
    assert statistics.destroyed(clean, corrupted) == pytest.approx(0.5)
    assert statistics.destroyed(clean, corrupted * 0.5) == pytest.approx(1 / 3)
    assert statistics.destroyed(clean, corrupted, "log_prob") == 0.0


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: statistics.other_item(1), "two items or more, here is 1"),
        (lambda: statistics.other_item(3, ["a"] * 3), "no other item has another label than 0"),
        (lambda: statistics.other_item(3, ["a", "b", "c"], same=True), "has the same label than 0"),
        (lambda: statistics.norm_matched_noise(torch.ones(3, 1)), "two numbers or more"),
        (lambda: statistics.random_sites([1, 2], [1, 2, 3]), "2 wanted, and 1 others"),
        (lambda: statistics.random_keys(*[torch.ones(2, 3).bool()] * 2), "row 0 has 3 keys, and 0"),
        (lambda: statistics.random_direction(torch.ones(1)), "1 in 1 dimensions"),
        (lambda: statistics.random_direction(torch.ones(2, 3)), "3 in 2 dimensions"),
        (lambda: statistics.permuted_labels(["a", "a"]), "the 2 labels are all the same"),
        (lambda: statistics.permuted_labels(["a", "b"], ["x", "y"]), "within every group"),
        (lambda: statistics.destroyed(torch.ones(2), torch.ones(2)), "do not differ"),
    ],
)
def test_a_control_that_cannot_be_drawn_says_why(call, told: str) -> None:
    with pytest.raises(ControlError, match=told):
        call()


def test_no_audio_is_silence_of_the_same_length() -> None:
    item = Item(np.ones(800, np.float32), "what?", answer="a", sampling_rate=8_000, id="x")
    silent = statistics.no_audio(item)
    assert silent.duration_s == item.duration_s and not silent.clip["array"].any()
    assert (silent.id, silent.text, silent.answer) == ("x", "what?", "a")
    assert item.clip["array"].all()


def test_every_control_is_there_and_told() -> None:
    assert set(statistics.CONTROLS) <= set(statistics.__all__)
    assert len(statistics.CONTROLS) == 11 and all(statistics.CONTROLS.values())
    with pytest.raises(ValueError, match="not of 'kl'"):
        statistics.destroyed(torch.ones(1), torch.zeros(1), "kl")
