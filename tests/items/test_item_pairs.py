"""Items in pairs: made, given, and kept where a model tells the sides apart."""

from __future__ import annotations

import pytest
import torch
from speech import spoken_items

from audio_lens import HookedAudioTransformer, Item, ItemError, Items, corruptions, patching
from audio_lens.audio import read
from audio_lens.items.item import Spoiled
from audio_lens.models.embedded import clip_pairs, default_pair

SHIPPED = default_pair()


@pytest.fixture(scope="module")
def items() -> Items:
    return Items(
        Item(p.clean, p.question, p.answer, p.against, group=p.answer, other_audio=p.corrupted)
        for p in clip_pairs()
    )


def test_counterparts_that_items_bring(items: Items) -> None:
    pairs = items.pairs()
    assert pairs.corrupted[0].audio == SHIPPED.corrupted and pairs.corrupted[0].id == "0"
    assert pairs[1].clean is items[1] and len(pairs[[0, 2]]) == 2
    both = Items([items[0].replaced(other_text="Which digit is first?")])
    with pytest.raises(ItemError, match="brings other_audio and other_text: choose stream="):
        both.pairs()
    assert both.pairs(stream="audio").corrupted[0].text == items[0].text
    assert both.pairs(stream="text").corrupted[0].audio == SHIPPED.clean
    changed = both.pairs(stream="both").corrupted[0]
    assert (changed.audio, changed.text) == (SHIPPED.corrupted, "Which digit is first?")
    with pytest.raises(ItemError, match="it brings neither other_audio nor other_text"):
        Items([items[0].replaced(other_audio=None)]).pairs()
    with pytest.raises(ItemError, match=r"4 of 4 items .*\n  item '0': it brings no other_t"):
        items.pairs(stream="text")


def test_counterparts_that_are_made(items: Items) -> None:
    two = SHIPPED.swapped
    pairs = items[:1].pairs(corruptions.Silence(span=two))
    changed = pairs.corrupted[0]
    assert changed.clip["array"][round(two.centre_s * 16_000)] == 0
    assert isinstance(changed.audio, Spoiled) and changed.duration_s == items[0].duration_s
    assert changed.digest() != items[0].digest()
    swapped = items[:1].pairs(corruptions.TextSwap("second", "first"))
    assert swapped.corrupted[0].text == "Which digit is first?"
    each = items.pairs(lambda item: corruptions.Noise(5, seed=int(item.id)))
    assert len({item.clip["array"].tobytes() for item in each.corrupted}) == 4
    with pytest.raises(ItemError, match=r"3 of 4 items .*\n  item '0': 'last' occurs 0 times"):
        items.pairs(corruptions.TextSwap("last", "first"))
    with pytest.raises(ItemError, match=r"item '3': 9 to 10 s holds no sample of the clip"):
        items[3:].pairs(corruptions.Silence(span=(9, 10)))
    with pytest.raises(ItemError, match="got no corruption, but 3"):
        items.pairs(lambda item: 3)


def test_both_sides_given(items: Items) -> None:
    others = [Item(SHIPPED.corrupted, SHIPPED.question)]
    assert items[:1].pairs(others).corrupted[0].id == "0"
    with pytest.raises(ItemError, match="4 clean items and 1 corrupted make no pairs"):
        items.pairs(others)
    with pytest.raises(ItemError, match="leave it out"):
        items[:1].pairs(others, stream="audio")


def test_a_batch_of_pairs_is_swept_as_any_pair(
    items: Items, embedded: HookedAudioTransformer
) -> None:
    batches = list(items.pairs().batches(embedded))
    assert sorted(row for batch in batches for row in batch.rows) == [0, 1, 2, 3]
    batch = next(batch for batch in batches if batch.rows == [0])
    metric = items[batch.rows].metrics(embedded)["logit_diff"]
    result = patching.sweep(
        embedded, **batch.pair, site="decoder.resid_pre", axes=("layer",), metric=metric
    )
    assert result.recovery[0] == pytest.approx(1.0, abs=1e-4)


def test_pairs_are_kept_where_the_model_tells_them_apart(
    items: Items, embedded: HookedAudioTransformer
) -> None:
    wrong = items[0].replaced(id="wrong", answer="five")
    right_twice = items[0].replaced(id="twice", other_audio=None)
    longer = items[0].replaced(id="longer", other_text="Which digit is second, the second?")
    given = [*items, wrong, right_twice, longer]
    others = [*items.pairs().corrupted, items.pairs().corrupted[0]]
    quiet = corruptions.Noise(40)(read(SHIPPED.clean), 16_000)[0]
    others += [right_twice.replaced(audio=quiet, sampling_rate=16_000)]
    others += [longer.replaced(text=longer.other_text)]
    pairs, dropped = Items(given).pairs(others).kept(embedded)
    assert [pair.clean.id for pair in pairs] == ["0", "1", "2", "3"]
    assert dropped.counts == {
        "the sides do not fit together": 1,
        "the clean side is not answered rightly": 1,
        "the corrupted side is answered rightly too": 1,
    }
    assert dropped["the clean side is not answered rightly"] == ("wrong",)
    assert dropped.total == 3 and pairs.dropped is dropped and "1: the sides" in str(dropped)
    again, still = pairs.kept(embedded)
    assert len(again) == 4 and still == dropped
    with pytest.raises(ItemError, match=r"no pair of 1 is left \(1: the clean side"):
        Items([wrong]).pairs().kept(embedded)


def test_pairs_that_cannot_be_told_apart_are_named(
    items: Items, embedded: HookedAudioTransformer
) -> None:
    same = Items([items[0].replaced(other_audio=SHIPPED.clean)])
    with pytest.raises(ItemError, match="item '0': clean and corrupted do not differ"):
        list(same.pairs().batches(embedded))
    with pytest.raises(ItemError, match=r"no pair of 1 is left(.|\n)*do not differ"):
        same.pairs().kept(embedded)
    with pytest.raises(ItemError, match="is 2 tokens"):
        Items([items[0].replaced(answer="two nine")]).pairs().kept(embedded)


def test_pairs_split_as_their_clean_side(items: Items) -> None:
    first, second = items.pairs().split()
    assert {x.clean.group for x in first}.isdisjoint({x.clean.group for x in second})
    assert all(pair.clean.id == pair.corrupted.id for pair in [*first, *second])


@pytest.mark.real
def test_most_pairs_of_unseen_speakers_are_kept(embedded: HookedAudioTransformer) -> None:
    pairs, dropped = spoken_items(16).pairs(stream="audio").kept(embedded)
    assert len(pairs) >= 12 and len(pairs) + dropped.total == 16
    with torch.no_grad():
        for batch in pairs.batches(embedded):
            said = embedded(batch.pair.corrupted)[:, -1].argmax(-1)
            against = [embedded.to_single_token(pairs.clean[row].against) for row in batch.rows]
            assert (said == torch.tensor(against)).float().mean() > 0.7
