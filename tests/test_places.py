"""Positions by name, in batches of unequal rows."""

from __future__ import annotations

import pytest
import torch

import tiny
from audio_lens import HookedAudioTransformer, InputError, Span, Words, locate, places
from audio_lens.places import characters
from audio_lens.sites import SiteError

RATE = 16_000
QUESTION = "Which digit is second?"


@pytest.fixture(scope="module")
def inputs(embedded):
    """Two prompts of unequal audio and unequal text; the second row's is longer."""
    noise = torch.randn(2 * RATE, generator=torch.Generator().manual_seed(0)).numpy() * 0.1
    return embedded.prepare([noise[:RATE], noise], ["Which digit is first?", QUESTION], RATE)


def of(model, inputs, where, site="decoder.resid_pre"):
    return locate(model, inputs, site, where)


def test_names_part_the_positions_of_unequal_rows(embedded, inputs) -> None:
    held = {name: of(embedded, inputs, name) for name in ("all", "audio", "text", "last")}
    assert torch.equal(held["all"], inputs.attended)
    assert torch.equal(
        held["audio"], inputs.tokens == embedded.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    )
    assert torch.equal(held["text"], held["all"] & ~held["audio"])
    assert held["last"].sum(1).tolist() == [1, 1]
    assert held["last"][:, -1].all()  # padded on the left
    alone = of(embedded, embedded.prepare(inputs.audio[0], "Which digit is first?", RATE), "audio")
    assert alone.sum() == held["audio"][0].sum() < held["audio"][1].sum()


def test_rows_of_a_batch_hold_what_they_hold_alone(embedded, inputs) -> None:
    for where in ((0.2, 0.7), Words("digit"), "audio", -3, slice(-5, None)):
        both = of(embedded, inputs, where)
        for row in range(2):
            alone = of(embedded, inputs[row], where)
            assert torch.equal(both[row], alone[0]), where


def test_places_join(embedded, inputs) -> None:
    audio, text = of(embedded, inputs, "audio"), of(embedded, inputs, "text")
    window = of(embedded, inputs, (0.2, 0.7))
    word = of(embedded, inputs, Words("digit"))
    assert torch.equal(of(embedded, inputs, Words("digit") | "audio"), word | audio)
    assert torch.equal(of(embedded, inputs, "audio" | Words("digit")), word | audio)
    assert torch.equal(of(embedded, inputs, "audio" - Span(0.2, 0.7)), audio & ~window)
    assert torch.equal(of(embedded, inputs, places.AUDIO - (0.2, 0.7)), audio & ~window)
    assert torch.equal(of(embedded, inputs, ~places.AUDIO), text)
    assert torch.equal(
        of(embedded, inputs, ~(Span(0.2, 0.7) | Words("digit"))), ~(window | word) & inputs.attended
    )


def test_a_place_per_prompt(embedded, inputs) -> None:
    held = of(embedded, inputs, ["last", Words("second")])
    assert torch.equal(held[0], of(embedded, inputs, "last")[0])
    assert torch.equal(held[1], of(embedded, inputs[1], Words("second"))[0])
    mask = torch.zeros_like(held[0])
    mask[-2] = True
    assert of(embedded, inputs, [mask, -1])[:, -2:].tolist() == [[True, False], [False, True]]


def test_a_mask_is_taken_as_it_is(embedded, inputs) -> None:
    mask = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(of(embedded, inputs, mask), mask)


def test_encoders_have_a_row_per_clip(embedded, inputs) -> None:
    valid = embedded.timeline(inputs).mask("encoder")
    assert torch.equal(of(embedded, inputs, "audio", "encoder.resid_pre"), valid)
    seconds = embedded.timeline(inputs).mask("encoder", 0.2, 0.5)
    assert torch.equal(of(embedded, inputs, (0.2, 0.5), "encoder.attn.z"), seconds)
    assert valid.sum(1).tolist()[0] < valid.sum(1).tolist()[1]


def test_words_are_found_by_their_characters(embedded, inputs) -> None:
    held = of(embedded, inputs, [Words("first?"), Words("econd?")])
    for row, words in enumerate(("first?", "second?")):
        assert embedded.tokenizer.decode(inputs.tokens[row][held[row]]).strip() == words
    marks = of(embedded, inputs, Words("|audio_bos|"))
    assert [inputs.tokens[row][marks[row]].tolist() for row in range(2)] == [
        [embedded.tokenizer.convert_tokens_to_ids("<|audio_bos|>")]
    ] * 2
    last = of(embedded, inputs, Words("u", occurrence=-1))
    assert last.sum(1).tolist() == [1, 1]
    every = of(embedded, inputs, Words("user", occurrence="all"))
    assert (every.sum(1) >= 1).all()


def test_tokens_that_share_a_character_all_hold_it() -> None:
    pieces = [b"a", b"\xe2\x82", b"\xac", b"bc", b""]

    def decode(ids, skip_special_tokens):
        return b"".join(pieces[i] for i in ids).decode(errors="replace")

    text, spans = characters(decode, (0, 1, 2, 3, 4))
    assert text == "a\N{EURO SIGN}bc"
    assert spans[:4] == [(0, 1), (1, 2), (1, 2), (2, 4)]
    assert spans[4][0] == spans[4][1]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ((5.0, 6.0), "window 5 to 6 s selects no position of the decoder in prompt 0"),
        ((1.5, 1.7), "in prompt 0"),
        (Words("elephant"), "'elephant' is not in the text of prompt 0"),
        (Words("digit", occurrence=7), "only 1 times"),
        ("sound", "no place is named 'sound'"),
        (900, "which 900 does not fit"),
        (0.5, "0.5 is no place"),
        (None, "None is no place"),
        ([], "is no place"),
        (["last"], "a list of 1 places"),
        (["last", "sound"], "no place is named"),
        (torch.ones(2, 3, dtype=torch.bool), "a mask of the decoder is 2 by"),
        (torch.zeros(2, 3, dtype=torch.bool), "a mask of the decoder is 2 by"),
        (places.AUDIO - "audio", "selects no position"),
        ((0.5, 0.2), "is no place"),
        ((float("nan"), 1.0), "is no place"),
        (Words("sound"), "text of prompt 0"),
    ],
)
def test_places_that_hold_nothing_are_named(embedded, inputs, where, message) -> None:
    with pytest.raises(InputError, match=message):
        of(embedded, inputs, where)


def test_padding_is_no_place(embedded, inputs) -> None:
    assert not inputs.attended[0, 0]
    with pytest.raises(InputError, match="prompt 0"):
        of(embedded, inputs, 0)


def test_empty_words_are_none() -> None:
    with pytest.raises(InputError, match="some text"):
        Words(" ")


def test_audio_of_cross_attention_lies_on_the_encoder(whisper_and_inputs) -> None:
    model, inputs = whisper_and_inputs
    with pytest.raises(InputError, match="cross_attn"):
        locate(model, inputs, "decoder.resid_pre", "audio")
    held = locate(model, inputs, "decoder.cross_attn.k", "audio")
    assert torch.equal(held, model.timeline(inputs).mask("encoder"))


@pytest.fixture
def whisper_and_inputs():
    return HookedAudioTransformer.from_hf(tiny.tiny_hf("whisper")), tiny.hf_inputs("whisper")


def test_unknown_sites_are_named(embedded, inputs) -> None:
    with pytest.raises(SiteError, match="cannot be swept"):
        of(embedded, inputs, "last", "decoder.nothing")


def test_masks_of_timelines_take_bounds(embedded, inputs) -> None:
    timeline = embedded.timeline(inputs)
    whole = timeline.mask("encoder")
    assert torch.equal(timeline.mask("encoder", 0.0), whole)
    assert torch.equal(timeline.mask("encoder", end_s=0.4) | timeline.mask("encoder", 0.4), whole)
    assert not timeline.mask("encoder", 1.4)[0].any()
    assert timeline.mask("encoder", 1.4)[1].any()
    with pytest.raises(ValueError, match="no part named"):
        timeline.mask("middle")
