"""What whole texts come from: saturation, loops, and a probe of what is made up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
import toys
from audio_lens import Item, Items
from audio_lens.analysis import encoder_lens as lens
from audio_lens.analysis.encoder_lens.forced import forced, right_tokens, top_tokens
from audio_lens.errors import ExtraError, InputError
from audio_lens.items import ItemError
from items import digits

pytestmark = pytest.mark.filterwarnings("ignore:.*cut after")
LETTERS = "abcd"


def spoken(classes: list[int], **more: object) -> Items:
    """Clips for toys, of groups by turns."""
    items = []
    for number, heard in enumerate(classes):
        clip = np.zeros(toys.AUDIO_TOKENS, dtype=np.float32)
        clip[number % toys.AUDIO_TOKENS] = (heard + 1) / 10
        items.append(
            Item(clip, answer=LETTERS[heard], group=f"voice {number % 4}", sampling_rate=16_000)
        )
    return Items(items)


# -------------------------------------------------------------------------------- loops


@pytest.mark.parametrize(
    "text, unit, times",
    [
        ("no no no no", ("no",), 4),
        ("so thank you Thank you thank you thank you", ("thank", "you"), 4),
        ("a b c d e f " * 4, tuple("abcdef"), 4),
        ("one two two two", None, 0),
        ("a b c d e f g " * 4, None, 0),
        ("", None, 0),
    ],
)
def test_loops_are_found(text: str, unit: tuple[str, ...] | None, times: int) -> None:
    found = lens.find_loop(text)
    assert (found and found.unit) == unit and (found is None or found.times == times)


def test_loops_of_tokens_say_where_they_start() -> None:
    assert lens.find_loop([7, 1, 2, 1, 2, 1, 2, 1, 2, 9]) == lens.Loop((1, 2), 4, 1)


def test_long_repeats_are_found_by_compression() -> None:
    text = "and then we went to the shop for bread " * 12
    assert lens.find_loop(text) is None and lens.compression_ratio(text) > 2.4
    assert lens.is_looping(text) and not lens.is_looping("a short text")


@pytest.mark.parametrize("layer, head", [(1, 1), (0, 0), (1, 0)])
def test_the_planted_head_is_the_one_that_ends_the_loop(layer: int, head: int) -> None:
    toy = toys.loop_toy(layer, head)
    result = lens.loops(toy, spoken([0, 3, 2]), site="decoder.attn.z", max_new_tokens=12)
    ended = result.select(metric="ended").estimate
    planted = torch.zeros(2, 2).double()
    planted[layer, head] = 1
    assert torch.equal(ended, planted)
    assert result.select(metric="changed").estimate.tolist() == [[0, 0], [0, 0]]
    assert result.controls["identity"].estimate.tolist() == [0, 0]
    assert "1 of 3 texts repeat themselves" in result.report[0]


def test_a_loop_that_ends_with_its_cause_has_a_cost() -> None:
    result = lens.loops(toys.loop_toy(), spoken([0, 3, 2]), heads=False, max_new_tokens=12)
    assert result.meta["site"] == "decoder.cross_attn.z" and result.axes == ("layer",)
    assert result.select(metric="ended").estimate.tolist() == [1, 0]  # nothing is heard any more
    assert result.select(metric="changed").estimate.tolist() == [0.5, 0]


def test_loops_that_cannot_be_looked_for_are_named() -> None:
    toy = toys.loop_toy()
    with pytest.raises(ItemError, match="none of the 2 texts repeats itself"):
        lens.loops(toy, spoken([0, 1]), max_new_tokens=12)
    with pytest.raises(InputError, match="no site of the decoder"):
        lens.loops(toy, spoken([3]), site="encoder.attn.z")
    with pytest.raises(ValueError, match="has no heads"):
        lens.loops(toy, spoken([3]), site="decoder.mlp_out")
    entry = tiny.ALL_FAMILIES["wav2vec2_ctc"]
    with pytest.raises(InputError, match="no decoder that writes text"):
        lens.loops(entry.hooked(entry.build()), spoken([3]))


# -------------------------------------------------------------------------------- saturation


def test_tokens_are_decided_where_they_are_planted() -> None:
    result = lens.saturation(toys.loop_toy(), spoken([0, 1, 3]), max_new_tokens=8)
    share = {name: result.select(group=name).estimate for name in result.coords["group"]}
    assert share["right"].tolist() == [1, 1]  # heard at layer 0
    assert share["wrong"].tolist() == [0, 1]  # copied at layer 1
    assert result.select(group="wrong").values[:2].isnan().all()
    assert "10 tokens (all)" in result.report[0] and "7 tokens (wrong)" in result.report[2]


@pytest.mark.parametrize("family", ["whisper", "qwen2_audio"])
def test_what_is_read_again_is_what_was_written_step_by_step(family: str) -> None:
    entry = tiny.ALL_FAMILIES[family]
    model = entry.hooked(entry.build())
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = None
    model.generation_config.begin_suppress_tokens = None
    inputs = model.as_inputs(entry.batch())
    given = forced(model, inputs[inputs.attended.all(1).tolist()], 5)
    assert torch.equal(top_tokens(model, given)[-1], given.tokens)
    assert given.lengths.tolist() == [5] * len(given.tokens)


def test_tokens_are_right_that_stand_in_the_transcript_in_order() -> None:
    toy = toys.loop_toy()
    assert right_tokens(toy, torch.tensor([0, 3, 1]), "a b c").tolist() == [True, False, True]
    assert right_tokens(toy, torch.tensor([3]), "").tolist() == [False]


@pytest.mark.real
@pytest.mark.slow
def test_whisper_as_published_decides_digits_in_its_last_layer() -> None:
    model, items = digits.digits_whisper(), digits.digit_items(range(1))
    result = lens.saturation(model, items, size=20, max_new_tokens=4)
    share = result.select(group="all").estimate
    assert share[2] < 0.5 and share[3] == 1
    assert result.select(group="right").values.nansum() > 0


@pytest.mark.parametrize(
    "family, why",
    [("wav2vec2_ctc", "no decoder that writes text"), ("kyutai_stt", "along with the sound")],
)
def test_models_that_write_no_text_of_their_own_are_named(family: str, why: str) -> None:
    entry = tiny.ALL_FAMILIES[family]
    with pytest.raises(InputError, match=why):
        lens.saturation(entry.hooked(entry.build()), spoken([3]))


# -------------------------------------------------------------------------------- made up


def test_a_probe_tells_texts_that_are_made_up() -> None:
    pytest.importorskip("sklearn", reason="probes need the extra 'probe'")
    pytest.importorskip("jiwer", reason="insertions need the extra 'asr'")
    items = spoken([0, 3, 1, 3, 3, 0, 3, 1, 2, 3, 3, 2])
    result = lens.hallucination(toys.loop_toy(), items, max_new_tokens=8)
    assert result.n_kept == 12 and result.n_dropped == 0
    assert result.estimate[-1] == 1
    assert result.controls["permuted_labels"].estimate[-1] < 0.9
    assert "6 items whose insertion_rate is above 0" in result.report[0]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_speech_and_noise_are_told_apart(part: str) -> None:
    pytest.importorskip("sklearn", reason="probes need the extra 'probe'")
    model = digits.digits_whisper()
    speech = digits.digit_items(range(1))
    speech = [item.replaced(labels={"made up": False}) for item in speech]
    noise = [
        Item(
            0.05 * np.random.default_rng(seed).standard_normal(9_600).astype(np.float32),
            labels={"made up": True},
            group=digits.SPEAKERS[seed % 2],
            id=f"noise {seed}",
            sampling_rate=16_000,
        )
        for seed in range(20)
    ]
    result = lens.hallucination(
        model, Items([*speech, *noise]), label="made up", part=part, size=20, max_new_tokens=4
    )
    assert result.n_kept == 40 and result.estimate.max() >= 0.95
    assert result.controls["permuted_labels"].estimate.mean() < 0.7


def test_probes_that_cannot_be_fitted_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    items = spoken([0, 3])
    with monkeypatch.context() as patched:
        patched.setitem(__import__("sys").modules, "sklearn.model_selection", None)
        with pytest.raises(ExtraError, match=r"audio_lens\[probe\]"):
            lens.hallucination(toys.loop_toy(), items)
    pytest.importorskip("sklearn", reason="probes need the extra 'probe'")
    with pytest.raises(InputError, match="part is 'decoder' or 'encoder'"):
        lens.hallucination(toys.loop_toy(), items, part="connector")
    with pytest.raises(ItemError, match="no label 'loud'"):
        lens.hallucination(toys.loop_toy(), items, label="loud")
    one = Items(item.replaced(labels={"odd": True}) for item in items)
    with pytest.raises(ItemError, match="is 0: a probe needs both"):
        lens.hallucination(toys.loop_toy(), one, label="odd")
    alone = Items(
        item.replaced(labels={"odd": i > 0}, group="voice") for i, item in enumerate(items)
    )
    with pytest.raises(ItemError, match="all items are of group 'voice'"):
        lens.hallucination(toys.loop_toy(), alone, label="odd")
    with pytest.raises(ItemError, match="have no group"):
        lens.hallucination(toys.loop_toy(), Items(x.replaced(group=None) for x in items))
