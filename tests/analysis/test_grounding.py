"""Does it listen, where is it now, when is it consulted: on planted toys and on real speech."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

from analysis.toy_items import hearing, item_of
from audio_lens import ControlError, Item, ItemError, Items, metrics
from audio_lens.analysis import grounding
from audio_lens.analysis.grounding.streams import question_of, without_difference
from audio_lens.inputs import InputError
from audio_lens.items import ANALYSES, rerun
from audio_lens.results import Result
from items.speech import conflict_items
from toys import Cue, gate_toy, two_stream_toy

WEIGHTS = [(1.0, 1.0), (3.0, 1.0), (0.5, 2.0), (1.0, 0.0), (0.0, 2.0)]
COPIES = 1  # the layer at which the toys' heads copy
JOINED = metrics.read_at(lambda rows: rows[:, 0], name="joined")


def conflicts(cues=((1, 3), (2, 0), (0, 1), (3, 2))) -> Items:
    """Conflict items of toys: both counterparts are the next class."""
    return Items(
        item_of(
            Cue(heard, read),
            other_audio=item_of(Cue((heard + 1) % 4, read)).audio,
            other_text=str((read + 1) % 4),
        )
        for heard, read in cues
    )


def agreeing() -> Items:
    """Items of gates: both streams say 1, and both counterparts 0."""
    one = item_of(Cue(1, 1), against="0", other_audio=item_of(Cue(0, 0)).audio, other_text="0")
    return Items([one, one])


# -------------------------------------------------------------------------------- planted toys


@pytest.mark.parametrize(("w_audio", "w_text"), WEIGHTS)
def test_the_share_of_two_planted_streams_is_that_of_their_weights(w_audio, w_text):
    toy = hearing(two_stream_toy(w_audio, w_text))
    share = grounding.stream_share(toy, conflicts())
    assert share.axes == ()
    assert share.estimate.item() == pytest.approx(w_audio / (w_audio + w_text), abs=1e-9)


def test_gaps_of_planted_streams_are_their_weights():
    gaps = grounding.gaps(hearing(two_stream_toy(3.0, 1.0)), conflicts(((1, 3), (1, 3))))
    of_logits = gaps.of_metric("logit_diff")
    assert of_logits.estimate.tolist() == pytest.approx([3.0, 1.0])
    assert gaps.values.shape == (2, 2, 2) and gaps.dims == ("metric", "stimulus", "stream")


@pytest.fixture(scope="module")
def planted() -> Result:
    return grounding.residence(hearing(two_stream_toy(2.0, 1.0)), conflicts())


@pytest.mark.parametrize("stream", ["audio", "text"])
def test_news_lies_at_its_span_up_to_the_copying_layer(planted, stream):
    """Then at the last position; the steps are exact, and nothing is anywhere else."""
    own, other, last = planted.select(stream=stream).mean().values.unbind(-1)
    assert own.tolist() == pytest.approx([1, 1, 0], abs=1e-9)
    assert last.tolist() == pytest.approx([0, 0, 1], abs=1e-9)
    assert other.abs().max() < 1e-9


def test_controls_of_a_planted_residence(planted):
    assert set(planted.controls) == {*grounding.CONTROLS, "log_prob", "destroyed", "gap"}
    assert planted.controls["identity"].mean().values.abs().max() == 0
    assert planted.controls["destroyed"].axes == ("stream", "layer")
    noise = planted.controls["norm_matched_noise"].mean().values
    assert (noise[:, 0, 0] < 0.9).all()


def test_planted_streams_are_handed_over_behind_the_copying_layer(planted):
    over = grounding.handed_over(planted)
    assert over.estimate.tolist() == [COPIES + 1] * 2 == over.low.tolist() == over.high.tolist()
    assert over.values.shape == (4, 2) and over.dims == ("stimulus", "stream")
    assert over.meta["method"] == "grounding.hand_over"


def test_a_hand_over_of_an_analysis_can_be_made_again():
    toy, items = hearing(two_stream_toy(2.0, 1.0)), conflicts()
    over = grounding.handed_over(grounding.residence(toy, items, controls=()))
    again = rerun(over, toy, items)
    assert torch.equal(again.values, over.values) and again.recipe == over.recipe
    assert torch.equal(again.low, over.low) and again.report == over.report


def test_results_are_drawn_written_and_told_as_json(planted, tmp_path):
    share = grounding.stream_share(hearing(two_stream_toy(2.0, 1.0)), conflicts())
    for result in (share, planted, grounding.handed_over(planted)):
        told = json.loads(json.dumps(result.to_dict()))
        assert told["n_kept"] == 4 and told["interval"] is not None
        assert result.plot().layout.title.subtitle.text
        assert Result.load(result.save(tmp_path / "result.nc")).report == result.report


def test_a_stream_that_moves_nothing_has_no_hand_over():
    toy = hearing(two_stream_toy(1.0, 0.0))
    over = grounding.hand_over(toy, conflicts(), controls=())
    assert over.estimate[0] == COPIES + 1 and over.estimate[1].isnan()
    assert any("The text is never handed over" in line for line in over.report)
    assert any("The text may move nothing" in line for line in over.report)


@pytest.mark.parametrize(("gate", "kind"), [("and", "AND"), ("or", "OR")])
def test_planted_gates_are_told_apart(gate, kind):
    result = grounding.and_or(hearing(gate_toy(gate)), agreeing(), metric=JOINED)
    assert grounding.kinds(result) == {0: kind, 1: kind, 2: "last"}
    alone = {"and": [0.0, 1.0], "or": [1.0, 0.0]}[gate]
    for stream in ("audio", "text"):
        at = result.select(layer=0, group=stream).mean()
        assert at.values.tolist() == pytest.approx(alone, abs=1e-9)
    merged = result.select(layer=2, group="last").mean()
    assert merged.values.tolist() == pytest.approx([1, 1], abs=1e-9)
    assert result.controls["identity"].mean().values.abs().max() == 0


def test_one_of_two_streams_can_be_all():
    toy = hearing(two_stream_toy(1.0, 0.0))
    result = grounding.and_or(toy, conflicts(), layers=0)
    assert grounding.kinds(result)[0] == "audio"
    mixed = grounding.and_or(hearing(two_stream_toy(1.0, 1.0)), agreeing(), layers=0)
    assert grounding.kinds(mixed)[0] == "mixed"


def test_the_coefficient_comes_with_its_warning():
    toy, items = hearing(two_stream_toy(3.0, 1.0)), conflicts(((1, 3), (1, 3)))
    with pytest.raises(InputError, match="cannot tell a listener from a reader"):
        grounding.gc(toy, items)
    with pytest.warns(UserWarning, match="biased to the audio beyond layer 0"):
        result = grounding.gc(toy, items, raw=True)
    assert result.estimate[:2].tolist() == pytest.approx([0.75, 0.75])
    assert result.controls["normalised"].estimate[:2].tolist() == pytest.approx([0.5, 0.5])
    assert result.estimate[2].isnan()  # both have been handed over


# -------------------------------------------------------------------------------- in the text


def test_the_question_is_what_asks_behind_the_difference():
    told = "The transcript says: one {} five. Trust the text. Which digit is second?"
    assert question_of(told.format("nine"), told.format("five")) == "Which digit is second?"
    assert question_of("It cost 3.5. Say so.", "It cost 4.5. Say so.") == "Say so."
    asked = 'It says "no".\nIs it so? Answer with one of: yes, no'
    assert question_of(asked, asked.replace('"no"', '"yes"')) == "Is it so?"
    assert question_of("one", "two") is None


def test_only_the_sentences_that_differ_are_dropped():
    told = "The transcript says: one {} five. Trust the text. Which digit is second?"
    bare = without_difference(told.format("nine"), told.format("five"))
    assert bare == "Trust the text. Which digit is second?"
    assert without_difference("So. And? Yes.", "So. Yes.") == "So. Yes."


# -------------------------------------------------------------------------------- real speech


@pytest.fixture(scope="module")
def told_text() -> Items:
    return conflict_items(8, "text", seed=1)


def test_a_model_that_is_told_so_listens_or_reads(embedded, told_text):
    heard = grounding.stream_share(embedded, conflict_items(8, "audio", seed=1))
    read = grounding.stream_share(embedded, told_text)
    assert heard.estimate > 0.9 and heard.low > read.high
    assert read.estimate < 0.25
    assert heard.controls["behaviour"].estimate > 0.8 > 0.2 > read.controls["behaviour"].estimate
    assert heard.controls["log_prob"].estimate > 0.9
    assert any("text dominance ratio" in line for line in read.report)


def test_residence_equals_hooks_by_hand(embedded, told_text):
    items = told_text[:2]
    moved = grounding.residence(embedded, items, layers=2, controls=(), streams=("text",))
    both = items.prepare(embedded)
    swapped = Items(x.replaced(text=x.other_text) for x in items).prepare(embedded)
    name = "decoder.blocks.2.hook_resid_pre"
    logits, cache = embedded.run_with_cache(both, names_filter=[name])

    def put(x, hook):
        x = x.clone()
        x[:, -1] = cache[name][:, -1]
        return x

    patched = embedded.run_with_hooks(swapped, fwd_hooks=[(name, put)])
    runs = torch.stack([logits, embedded(swapped), patched])[:, :, -1].double().log_softmax(-1)
    says = [embedded.to_single_token(x.against) for x in items]
    whole, without, back = runs[:, [0, 1], says]
    expected = (back - without).mean() / (whole - without).mean()
    found = moved.controls["log_prob"].select(group="last").mean().values
    assert found.item() == pytest.approx(expected.item(), abs=1e-4)


def test_the_text_can_stand_elsewhere(embedded, told_text):
    options = {"layers": 0, "controls": (), "streams": ("text",)}
    found = [
        grounding.residence(embedded, told_text[:2], text_span=place, **options).mean().values
        for place in (None, (0.0, 1.0))
    ]
    own = [x[0, 0, 0].item() for x in found]
    assert own == pytest.approx([1, 0], abs=1e-3)


def test_counterfactual_texts_flip_what_follows_the_text(embedded, told_text):
    result = grounding.counterfactual(embedded, told_text[:6])
    flips, to_audio, kept, dropped = result.estimate
    assert flips == to_audio > 0.6 and kept < 0 < dropped
    assert result.dims == ("metric", "stimulus")
    asked = grounding.counterfactual(
        embedded, told_text[:2], without=lambda item: "Which digit is second?"
    )
    assert asked.values.shape == (4, 2)


def test_what_is_answered(embedded, told_text):
    said = grounding.answers(embedded, told_text[:6])
    assert said.estimate.sum() == 1 and said.estimate[1] > 0.5
    assert grounding.text_dominance(embedded, told_text[:6]).estimate > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("trust", ["audio", "text", None])
def test_streams_are_resident_and_handed_over(embedded, trust):
    found = grounding.grounding(embedded, conflict_items(64, trust, takes=range(20)))
    moved = found["residence"]
    assert (moved.mean().values.sum(-1) - 1).abs().max() < 0.1
    over = dict(zip(("audio", "text"), found["hand_over"].estimate.tolist(), strict=True))
    assert over["audio"] == 4
    if trust != "audio":  # a text that is not consulted is handed over nowhere in particular
        assert over["text"] == 2
    assert moved.controls["identity"].mean().values.abs().max() < 1e-3
    if trust == "audio":
        share = found["share"].estimate
        assert share > 0.9
        level = moved.controls["destroyed"].mean().values[0, 0]
        for control in ("other_item", "norm_matched_noise"):
            recovered = moved.controls[control].select(stream="audio", group="own").mean().values
            assert (recovered < level + 0.15).all()
    if trust == "text":
        assert found["share"].estimate < 0.25


@pytest.mark.slow
def test_a_table_written_by_hand_is_analysed(embedded, told_text, tmp_path):
    items = told_text[:2]
    items.to_table(tmp_path / "conflict.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "conflict.jsonl").read_text().splitlines()]
    columns = ("id", "audio", "text", "answer", "against", "other_audio", "other_text")
    bare = [json.dumps({name: row[name] for name in columns}) for row in rows]
    (tmp_path / "bare.jsonl").write_text("\n".join(bare))
    table = Items.from_table(tmp_path / "bare.jsonl")
    found = ANALYSES["grounding"].function(embedded, table, seed=1, progress=False)
    assert list(found) == ["share", "residence", "hand_over"]
    for name, result in found.items():
        assert result.meta["seed"] == "1" and result.n_kept == 2, name


# -------------------------------------------------------------------------------- bad input


def test_items_that_are_no_conflict_items_are_named(embedded, told_text):
    bare = Items(x.replaced(other_text=None) for x in told_text)
    with pytest.raises(ItemError, match=r"8 of 8 items.*\n.*has no other_text"):
        grounding.stream_share(embedded, bare)
    neither = Items([told_text[0].replaced(other_text=None, other_audio=None)])
    with pytest.raises(ItemError, match="no other_audio and no other_text"):
        grounding.residence(embedded, neither)
    same = Items(x.replaced(other_text=x.text) for x in told_text)
    with pytest.raises(ItemError, match="text and other_text are the same"):
        grounding.hand_over(embedded, same)
    with pytest.raises(ItemError, match="has no against"):
        grounding.answers(embedded, Items([told_text[0].replaced(against=None)]))
    with pytest.raises(ItemError, match="ten"):
        grounding.stream_share(embedded, Items([told_text[0].replaced(against="ten digits")]))


def test_arguments_that_make_no_sense_are_named(embedded, told_text):
    items = told_text[:2]
    with pytest.raises(InputError, match="streams are some of audio, text"):
        grounding.residence(embedded, items, streams=("video",))
    with pytest.raises(InputError, match="layers lie in 0 to 5"):
        grounding.residence(embedded, items, layers=6)
    with pytest.raises(InputError, match="controls are some of"):
        grounding.residence(embedded, items, controls=("empty",))
    with pytest.raises(ControlError, match="two items or more, here is 1"):
        grounding.residence(embedded, items[:1])
    with pytest.raises(InputError, match=r"low=0\.5, high=0\.2"):
        grounding.and_or(embedded, items, high=0.2, low=0.5)
    with pytest.raises(InputError, match="selects no position"):
        grounding.residence(embedded, items, text_span=slice(0, 0), controls=())


def test_texts_that_cannot_be_dropped_are_named(embedded, told_text):
    with pytest.raises(ItemError, match="nothing is dropped of"):
        grounding.counterfactual(embedded, told_text, without=lambda item: item.text)
    alone = Items([told_text[0].replaced(text="Say one.", other_text="Say two.")])
    with pytest.raises(ItemError, match=r"nothing is left of 'Say one\.'"):
        grounding.counterfactual(embedded, alone)


def test_counterparts_of_other_lengths_are_left_out_and_counted(embedded, told_text):
    def longer(item: Item) -> Item:
        return item.replaced(other_text=f"Well. {item.other_text}")

    items = Items([longer(told_text[0]), *told_text[1:3]])
    moved = grounding.residence(embedded, items, layers=0, controls=(), streams=("text",))
    assert (moved.n_kept, moved.n_dropped) == (2, 1)
    assert moved.coords["stimulus"] == [item.id for item in told_text[1:3]]
    with pytest.raises(ItemError, match="none of the 3 items fits its counterparts"):
        grounding.residence(embedded, Items(map(longer, told_text[:3])), controls=())


def test_clips_of_other_lengths_are_padded_and_told(embedded, told_text):
    first, second = told_text[:2]
    longer = np.pad(second.other_audio, (0, 1600))
    items = Items([first, second.replaced(other_audio=longer)])
    options = {"layers": 0, "controls": (), "streams": ("audio",)}
    moved = grounding.residence(embedded, items, **options)
    assert (moved.n_kept, moved.n_dropped) == (2, 0)
    assert "1 clips were shorter" in moved.report[-1] and "0.10 s of silence" in moved.report[-1]
    even = grounding.residence(embedded, told_text[:2], **options)
    assert torch.allclose(moved.values[0], even.values[0], atol=1e-3)
    assert "silence" not in even.report[-1]


def test_no_other_warning_is_given(planted):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grounding.handed_over(planted)
