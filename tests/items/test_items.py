"""Items: what each holds, parts of many, splits that keep speakers apart, batches unpadded."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from speech import spoken_items

from audio_lens import AudioInputs, HookedAudioTransformer, Item, ItemError, Items
from audio_lens.audio import AudioError
from audio_lens.models.embedded import default_pair

SHIPPED = default_pair()


def tone(seconds: float = 0.5, rate: int = 16_000) -> np.ndarray:
    return (0.1 * np.sin(np.arange(round(seconds * rate)) / 20)).astype(np.float32)


def named(*ids: str, **fields: object) -> Items:
    return Items(Item(tone(), id=name, sampling_rate=16_000, **fields) for name in ids)


# -------------------------------------------------------------------------------- one item


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"answer": "one", "against": "one"}, "both 'one'"),
        ({"options": ["a", "a"]}, "options repeat"),
        ({"options": "ab"}, "a list of texts"),
        ({"answer": "c", "options": ["a", "b"]}, "answer 'c' is none of the options"),
        ({"against": "c", "options": ["a", "b"]}, "against 'c' is none"),
        ({"labels": {"speaker": [1]}}, "label 'speaker' is text or a number"),
        ({"labels": {"age": float("nan")}}, "label 'age' is text or a number"),
        ({"audio": None}, "no audio"),
    ],
)
def test_an_item_says_what_is_wrong_with_it(fields: dict, told: str) -> None:
    with pytest.raises(ItemError, match=told):
        Item(**({"audio": "clip.wav", "id": "x"} | fields))


def test_values_are_labels_or_fields() -> None:
    item = Item(tone(), answer="one", labels={"speaker": "theo"}, group="g", id="x")
    assert item.value("speaker") == "theo" and item.value("answer") == "one"
    with pytest.raises(ItemError, match=r"item 'x' has no label 'speeker'.*speaker"):
        item.value("speeker")


def test_a_hash_is_of_what_is_heard_and_said(tmp_path) -> None:
    in_memory = Item(tone(), answer="one", sampling_rate=16_000)
    soundfile.write(tmp_path / "a.flac", (tone() * 32768).astype(np.int16), 16_000)
    soundfile.write(tmp_path / "b.wav", (tone() * 32768).astype(np.int16), 16_000)
    assert in_memory.digest() == in_memory.replaced(words=()).digest()
    flac, wav = (in_memory.replaced(audio=tmp_path / name) for name in ("a.flac", "b.wav"))
    assert flac.digest() == wav.digest()
    changes = ({"answer": "two"}, {"sampling_rate": 8000}, {"audio": tone() * 0.5}, {"id": "y"})
    assert len({in_memory.replaced(**c).digest() for c in ({}, *changes)}) == 5


def test_a_clip_knows_how_long_it_is(tmp_path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(0.25, 8000), 8000)
    assert Item(tmp_path / "a.wav").duration_s == 0.25
    assert Item(tone(0.5), sampling_rate=16_000).duration_s == 0.5
    assert Item({"bytes": (tmp_path / "a.wav").read_bytes()}).duration_s == 0.25
    with pytest.raises(AudioError, match="without a sampling rate"):
        _ = Item(tone()).duration_s


# -------------------------------------------------------------------------------- many


def test_items_have_names_of_their_own() -> None:
    assert [item.id for item in Items([Item(tone()), Item(tone())])] == ["0", "1"]
    with pytest.raises(ItemError, match="items 0 and 2 are both called 'a'"):
        named("a", "b", "a")
    with pytest.raises(ItemError, match="no items"):
        Items([])


def test_parts_of_items() -> None:
    items = named("a", "b", "c")
    assert items[1].id == "b" and items[-1].id == "c"
    for rows in ([0, 2], [True, False, True], slice(None, None, 2), np.array([0, 2])):
        assert [item.id for item in items[rows]] == ["a", "c"]
    with pytest.raises(ItemError, match="a mask of 2 for 3 items"):
        items[[True, False]]
    with pytest.raises(ItemError, match="no items"):
        items[[]]


def test_items_are_filtered_by_labels() -> None:
    items = Items(Item(tone(), labels={"n": n, "odd": n % 2}) for n in range(4))
    assert [item.value("n") for item in items.filter(odd=1)] == [1, 3]
    assert [item.value("n") for item in items.filter(lambda x: x.id > "0", n=[0, 1])] == [1]
    assert {value: len(part) for value, part in items.by("odd").items()} == {0: 2, 1: 2}
    with pytest.raises(ItemError, match="none of the 4 items is left with"):
        items.filter(odd=2)
    with pytest.raises(ItemError, match="no label 'even'"):
        items.filter(even=1)
    with pytest.raises(ItemError, match="4 items have no group, such as item '0'"):
        items.by("group")


@given(
    keys=st.lists(
        st.tuples(st.integers(0, 5), st.none() | st.integers(0, 6)), min_size=2, max_size=24
    ),
    seed=st.integers(0, 99),
)
def test_no_label_and_no_group_is_on_both_sides(keys: list, seed: int) -> None:
    items = Items(
        Item("a.wav", labels={"digit": d}, group=None if g is None else str(g)) for d, g in keys
    )
    try:
        sides = items.split("digit", seed=seed)
    except ItemError as error:
        assert "splits nothing" in str(error)
        return
    assert sorted(x.id for side in sides for x in side) == sorted(x.id for x in items)
    for label in ("digit", "group"):
        first, second = ({x.value(label) for x in side} - {None} for side in sides)
        assert first.isdisjoint(second)


def test_a_split_is_about_as_large_as_asked_and_repeats_itself() -> None:
    items = Items(Item("a.wav", group=str(i % 20)) for i in range(100))
    sides = items.split(share=0.2, seed=3)
    assert len(sides[1]) == 20
    assert [x.id for x in sides[1]] == [x.id for x in items.split(share=0.2, seed=3)[1]]
    assert [x.id for x in sides[1]] != [x.id for x in items.split(share=0.2, seed=4)[1]]


def test_a_label_that_splits_nothing_is_refused() -> None:
    one_speaker = Items(Item("a.wav", group="theo", labels={"digit": i}) for i in range(4))
    for by in ("group", "digit", "id"):
        with pytest.raises(ItemError, match="splits nothing"):
            one_speaker.split(by)
    with pytest.raises(ValueError, match="between 0 and 1"):
        one_speaker.split(share=1.0)
    with pytest.raises(ItemError, match="have no group"):
        named("a", "b").split()


# -------------------------------------------------------------------------------- for a model


def test_batches_hold_every_item_once_and_pad_nothing(embedded: HookedAudioTransformer) -> None:
    lengths = (1.0, 1.4, 1.0, 1.0, 1.4, 1.01)
    texts = ["Which digit is second?", "Which digit is first?", *["Which digit is last?"] * 4]
    items = Items(
        Item(tone(s), text, sampling_rate=16_000) for s, text in zip(lengths, texts, strict=True)
    )
    batches = list(items.batches(embedded, size=2))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(6))
    assert max(map(len, batches)) == 2 and len(batches) < 6
    with torch.no_grad():
        for batch in batches:
            assert batch.inputs.attended.all()
            together = embedded(batch.inputs)
            for place, row in enumerate(batch.rows):
                alone = embedded(items[[row]].prepare(embedded))
                torch.testing.assert_close(together[place : place + 1], alone)
    with pytest.raises(ValueError, match="1 or more"):
        next(items.batches(embedded, size=0))


def test_not_everything_waits_for_company(embedded: HookedAudioTransformer) -> None:
    items = Items(
        Item(tone(1 + i * 0.04), SHIPPED.question, sampling_rate=16_000) for i in range(12)
    )
    taken = iter(items.batches(embedded, size=1))
    assert next(taken).rows == [0]
    few = list(items.batches(embedded, size=20))
    assert [batch.rows for batch in few] == [[i] for i in range(12)]


@pytest.mark.parametrize("family", ["whisper", "qwen2_audio"])
def test_joined_inputs_are_their_rows(
    family: str, model: HookedAudioTransformer, inputs: dict
) -> None:
    whole = model.as_inputs(inputs)
    joined = AudioInputs.joined([whole[[0]], whole[[1]]])
    assert joined.digest() == whole.digest() and joined.clips_per_row == whole.clips_per_row
    assert torch.equal(model(joined), model(whole))


def test_what_cannot_be_joined_says_so(embedded: HookedAudioTransformer) -> None:
    one, other = (
        embedded.prepare(tone(s), SHIPPED.question, sampling_rate=16_000) for s in (1.0, 1.4)
    )
    with pytest.raises(ValueError, match="not as long"):
        AudioInputs.joined([one, other])
    with pytest.raises(ValueError, match="no inputs"):
        AudioInputs.joined([])


def test_an_item_that_cannot_be_prepared_is_named(embedded: HookedAudioTransformer) -> None:
    items = Items([Item(SHIPPED.clean, SHIPPED.question), Item("gone.wav", "Which?", id="lost")])
    with pytest.raises(ItemError, match=r"item 'lost' cannot be prepared: no audio file at gone"):
        list(items.batches(embedded))
    with pytest.raises(ItemError, match=r"item '1' has no text, and others have"):
        Items([items[0], Item(SHIPPED.clean)]).prepare(embedded)


def test_what_a_model_cannot_take_is_found_at_once(
    embedded: HookedAudioTransformer, tmp_path, caplog
) -> None:
    rows = []
    for name, other in (("good", tone()), ("deaf", np.full(8000, np.nan)), ("long", tone(6.0))):
        soundfile.write(tmp_path / f"{name}.wav", other, 16_000, subtype="FLOAT")
        row = {"id": name, "audio": str(SHIPPED.clean), "text": SHIPPED.question}
        rows.append(json.dumps(row | {"other_audio": f"{name}.wav"}))
    (tmp_path / "items.jsonl").write_text("\n".join(rows))
    items = Items.from_table(tmp_path / "items.jsonl")
    with pytest.raises(ItemError) as raised:
        items.usable(embedded)
    for part in ("2 items", "item 'deaf' (items.jsonl line 2) cannot", "holds NaN", "long"):
        assert part in str(raised.value)
    usable = items.usable(embedded, skip_bad=True)
    assert [item.id for item in usable] == ["good"] and len(usable.skipped) == 2
    assert "item 'long' (items.jsonl line 3)" in caplog.text
    with pytest.raises(ItemError, match=r"'good' \(items.jsonl line 1\) has no answer"):
        items.check_answers(embedded)
    told = Items([usable[0].replaced(answer="two nine"), usable[0].replaced(id="b", answer="two")])
    with pytest.raises(ItemError, match=r"item 'good' .*answer: 'two nine' is 2 tokens"):
        told.usable(embedded)
    assert [item.id for item in told.usable(embedded, skip_bad=True)] == ["b"]


def test_answers_of_several_tokens_and_none_are_named(embedded: HookedAudioTransformer) -> None:
    good = Item(SHIPPED.clean, SHIPPED.question, "two", "nine")
    assert list(Items([good]).metrics(embedded)) == ["log_prob", "logit_diff"]
    assert list(Items([good.replaced(against=None)]).metrics(embedded)) == ["log_prob"]
    bad = Items([good, good.replaced(answer="two nine"), good.replaced(answer=None)])
    with pytest.raises(ItemError, match=r"2 answers.*\n.*item '1', answer:.*\n.*item '2' has no"):
        bad.metrics(embedded)


def test_unequal_options_are_named() -> None:
    items = named("a", options=["x", "y"])
    assert items.common_options() == ("x", "y")
    both = Items([*items, Item(tone(), options=["x", "z"], id="b")])
    with pytest.raises(ItemError, match=r"options are unequal: item 'a' has.*item 'b'"):
        both.common_options()
    with pytest.raises(ItemError, match="item 'c' has no options"):
        named("c").common_options()


@pytest.mark.real
def test_real_speech_is_answered_by_unseen_speakers(embedded: HookedAudioTransformer) -> None:
    items = spoken_items(12)
    (batch,) = items.batches(embedded, size=12)
    with torch.no_grad():
        logits = embedded(batch.inputs)
    said = [embedded.tokenizer.decode(token).strip() for token in logits[:, -1].argmax(-1)]
    right = [said[i] == items[row].answer for i, row in enumerate(batch.rows)]
    assert sum(right) >= 9
    assert [span.label for span in items[0].words][1] == items[0].answer
