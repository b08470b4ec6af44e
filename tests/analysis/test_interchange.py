"""Interchange: a planted rotation, a loop by hand, real speech of unseen speakers."""

from __future__ import annotations

import pytest
import torch

from analysis.said import CUE, said_items
from audio_lens import Edit, ItemError, Items, edits, intervene
from audio_lens.analysis import interchange
from audio_lens.analysis.interchange.sources import Sources
from audio_lens.analysis.subspaces.exchange import Spot
from audio_lens.errors import InputError
from audio_lens.items import ANALYSES, ControlError, demo_items, rerun
from audio_lens.sites import SiteError
from items.speech import spoken_items
from toys import TEXT_CLASS, DormantToy, SubspaceToy

SITE = "decoder.resid_pre"


@pytest.fixture(scope="module")
def toy() -> SubspaceToy:
    return SubspaceToy(gain=2.0)


@pytest.fixture(scope="module")
def pairs():
    return said_items(range(1)).pairs()


@pytest.fixture(scope="module")
def learned(toy, pairs):
    return interchange.das(
        toy, pairs, SITE, CUE, layer=1, rank=3, steps=200, rate=0.1, progress=False
    )


def _losses(text: str) -> list[float]:
    """Of a shuffled mapping and of the true one, as the report tells them."""
    words = text.replace(",", " ").split()
    return [float(word) for word in words[1:] if word[0].isdigit()]


# -------------------------------------------------------------------------------- toys


def test_das_finds_the_planted_subspace(learned, toy):
    """Three directions of 32, though who speaks changes as well."""
    assert learned.basis.shape == (32, 3) and learned.angles(toy.planted).max() < 5
    assert (learned.site, learned.layer, learned.kind) == (SITE, 1, "das")
    assert learned.meta["model"] == "toy" and learned.meta["pairs"] == "12"


def test_what_was_learned_exchanges_the_answer_and_nothing_random_does(learned, toy, pairs):
    result = interchange.iia(toy, pairs, SITE, CUE, learned)
    assert result.estimate.tolist() == [1, 1] and result.coords["pairs"] == ["changed", "unchanged"]
    assert result.controls["random_direction"].estimate[0] <= 0.2
    assert result.controls["whole_site"].estimate.tolist() == [1, 1]
    assert result.report[0].startswith("3 directions exchanged: the answer follows in 1.00")
    assert not any("pathway" in text for text in result.report)


def test_too_few_directions_are_not_enough(toy, pairs):
    result = interchange.iia(toy, pairs, SITE, CUE, toy.planted[:, :1], layer=1)
    assert result.select(pairs="changed").estimate < 0.7


def test_all_is_exchanged_up_to_the_layer_that_reads_it(toy, pairs):
    result = interchange.iia(toy, pairs, SITE, CUE)
    assert result.select(pairs="changed").estimate.tolist() == [1, 1, 0]
    assert result.select(pairs="unchanged").estimate.tolist() == [1, 1, 1]
    again = rerun(result, toy, pairs)
    assert torch.equal(again.values, result.values) and again.report == result.report


def test_the_same_seed_learns_the_same(toy, pairs):
    one, two, other = (
        interchange.das(toy, pairs, SITE, CUE, layer=0, rank=2, steps=3, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.basis, two.basis) and not torch.equal(one.basis, other.basis)
    assert not any(parameter.requires_grad for parameter in toy.parameters())


def test_das_learns_in_front_of_the_decoder_as_well(toy, pairs):
    found = interchange.das(toy, pairs, "connector.out", "all", rank=3, steps=3, progress=False)
    assert (found.site, found.layer, found.rank) == ("connector.out", None, 3)


def test_cells_are_single_edits(toy, pairs):
    """Against hooks by hand, with the lenders that were drawn."""
    result = interchange.iia(toy, pairs, SITE, CUE, toy.planted[:, :2], layer=1, seed=3)
    kept, _ = pairs.kept(toy)
    (batch,) = kept.batches(toy)
    spot = Spot.of(toy, kept.clean, SITE, CUE, 1)
    sources = Sources.of([spot], kept, batch)
    draw = interchange.accuracy.np.random.default_rng(3)
    lenders = sources.drawn(len(kept), "changed", draw)
    values = result.select(pairs="changed").values
    for row, lender in enumerate(lenders):
        swap = edits.Swap(toy.planted[:, :2], sources.states[0][[lender]])
        with torch.no_grad(), intervene(toy, Edit(SITE, swap, layer=1, where=CUE)):
            said = toy(batch.pair.clean[[row]])[0, -1].argmax()
        assert bool(values[row]) == (str(int(said)) == sources.answers[lender])


@pytest.mark.slow
def test_a_search_is_held_against_its_controls():
    toy, pairs = SubspaceToy(gain=8.0), said_items(range(2)).pairs()
    result = interchange.align(
        toy, pairs, SITE, CUE, layer=1, ranks=[3], steps=60, progress=False, seed=1
    )
    assert result.select(rank=3, pairs="changed").estimate == 1
    assert set(result.controls) == {
        *("random_direction", "whole_site"),
        *("permuted_labels", "untrained"),
    }
    unlearned = result.controls["untrained"].select(rank=3)
    assert unlearned.select(pairs="changed").estimate < 0.6
    assert not any("pathway" in text for text in result.report)
    assert result.controls["permuted_labels"].select(pairs="changed").estimate.item() < 0.5
    assert len({name.split(":")[0] for name in result.coords["stimulus"]}) == 1  # one speaker
    wrong, true = _losses(result.report[1])
    assert wrong > 5 * true


def test_a_pathway_that_sleeps_is_learned_and_warned_of(pairs):
    """DAS finds directions at the cue that exchange the answer; all of the cue does not (0)."""
    toy = DormantToy()
    found = interchange.das(
        toy, pairs, SITE, CUE, layer=1, rank=3, steps=80, rate=0.1, progress=False
    )
    result = interchange.iia(toy, pairs, SITE, CUE, found)
    changed = result.select(pairs="changed")
    assert changed.estimate >= 0.8 and changed.controls["whole_site"].estimate == 0
    assert result.report[1].startswith("changed pairs: the subspace does more")


def test_a_shuffled_mapping_keeps_no_answer(pairs):
    for seed in range(5):
        mapping = interchange.shuffled(pairs, seed)
        assert sorted(mapping) == sorted(mapping.values()) == ["0", "1", "2", "3"]
        assert all(key != value for key, value in mapping.items())
    alone = said_items(range(1))[:1]
    alone = type(alone)(item.replaced(against=None) for item in alone)
    with pytest.raises(ControlError, match="two answers"):
        interchange.shuffled(alone.pairs())


def both_asked() -> Items:
    """Every class by every speaker: items that ask for the class, and some that ask who speaks.

    The toy answers with the class whatever is asked, so that these are right where both agree.
    """
    rows = [(one, asks) for one in said_items() for asks in ("class", "speaker")]
    return Items(
        item.replaced(
            id=f"{item.id}, {asks}",
            answer=item.labels[asks],
            against=None,
            labels={**item.labels, "asks": asks},
        )
        for item, asks in rows[::3]
    )


def test_a_subspace_carries_its_attribute_and_no_other(toy):
    """The class causes the answer; exchanging who speaks leaves it alone, so it isolates."""
    speakers = toy.turned[:, TEXT_CLASS][:, :3]
    subspaces = {"class": toy.planted, "speaker": speakers}
    result = interchange.ravel(toy, both_asked(), SITE, CUE, subspaces, layer=1, size=64)
    scores = result.select(attribute="class").estimate
    assert scores[0] == 1 and scores[2] == scores[:2].mean()
    who = result.select(attribute="speaker").estimate
    assert who.tolist() == [0, 1, 0.5]
    assert result.controls["whole_site"].select(attribute="class").estimate[0] == 1
    assert result.controls["random_direction"].estimate[0, 0] < 0.5
    assert result.n_dropped and result.report[1].startswith("speaker: the answer becomes")


def test_bad_attributes_say_why(toy):
    items, planted = both_asked(), {"class": toy.planted}
    with pytest.raises(ItemError, match="no label 'asks'"):
        interchange.ravel(toy, said_items(), SITE, CUE, planted, layer=1)
    with pytest.raises(ItemError, match="no item asks for 'speaker'"):
        both = {"class": toy.planted, "speaker": toy.planted}
        interchange.ravel(toy, items.filter(asks="class"), SITE, CUE, both, layer=1)
    with pytest.raises(InputError, match="there are none"):
        interchange.ravel(toy, items, SITE, CUE, {}, layer=1)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"rank": 33}, InputError, "rank 33 is too many"),
        ({"rank": 0}, InputError, "rank"),
        ({"layer": None}, SiteError, "say which by layer="),
        ({"mapping": {"0": "1"}}, InputError, "says nothing of 1, 2, 3"),
    ],
)
def test_bad_searches_say_why(toy, pairs, change, error, said):
    asked = {"site": SITE, "where": CUE, "layer": 1, "rank": 2, "steps": 1} | change
    with pytest.raises(error, match=said):
        interchange.das(toy, pairs, **asked)


def test_bad_exchanges_say_why(toy, pairs):
    with pytest.raises(InputError, match="no control 'luck'"):
        interchange.iia(toy, pairs, SITE, CUE, controls=["luck"])
    with pytest.raises(InputError, match="32 entries, those of the subspace 5"):
        interchange.iia(toy, pairs, SITE, CUE, torch.eye(5, 2), layer=0)
    with pytest.raises(InputError, match="there are none"):
        interchange.align(toy, pairs, SITE, CUE, layer=0, ranks=[])


# -------------------------------------------------------------------------------- real speech


def second(item):
    return (item.words[1].start_s - 0.02, item.words[1].start_s + 0.64)


@pytest.fixture(scope="module")
def speech():
    return spoken_items(60, seed=5, takes=range(20)).pairs()


@pytest.mark.real
@pytest.mark.slow
def test_the_answer_is_at_the_word_until_it_is_read(embedded, speech):
    changed = interchange.iia(embedded, speech, SITE, second).select(pairs="changed").estimate
    assert (changed[:4] >= 0.95).all() and (changed[4:] <= 0.2).all()


@pytest.mark.real
@pytest.mark.slow
def test_eight_directions_exchange_the_answer_for_another_speaker(embedded, speech):
    asked = {"layer": 0, "steps": 60, "progress": False}
    one = interchange.align(embedded, speech, SITE, second, ranks=[1], controls=[], **asked)
    controls = ["random_direction", "permuted_labels"]
    result = interchange.align(
        embedded, speech, SITE, second, ranks=[8], controls=controls, **asked
    )
    assert one.select(pairs="changed").estimate.item() <= 0.2
    eight = result.select(pairs="changed")
    assert eight.estimate.item() >= 0.85
    assert eight.controls["random_direction"].estimate.item() <= 0.05
    wrong, true = _losses(result.report[1])
    assert wrong > 5 * true


@pytest.mark.real
@pytest.mark.slow
def test_the_study_runs_on_the_shipped_clips(embedded):
    told = ANALYSES["interchange"].function(embedded, demo_items(), progress=False)
    assert set(told) == {"iia", "align"} and told["align"].coords["rank"] == [1, 8]
