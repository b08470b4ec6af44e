"""The decoder on every encoder stream: planted commitment, published weights, the shipped model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
import toys
from audio_lens import Edit, HookedAudioTransformer, Item, Items, edits, intervene
from audio_lens.analysis import encoder_lens as lens
from audio_lens.analysis.encoder_lens.streams import (
    in_place_of_last,
    n_streams,
    reference_of,
    streams_of,
)
from audio_lens.errors import InputError
from audio_lens.items import ANALYSES, ControlError, ItemError, rerun
from items import digits, speech

LETTERS = "abcd"


def said(heard: int, answer: str | None = None, **more: object) -> Item:
    """A clip for toys in which one frame says a class."""
    clip = np.zeros(toys.AUDIO_TOKENS, dtype=np.float32)
    clip[6] = (heard + 1) / 10
    return Item(clip, answer=answer, sampling_rate=16_000, **more)


def settled_items(settled: int) -> Items:
    """What `toys.commit_toy` hears, with what it ends with for answers."""
    return Items(
        said(c, LETTERS[(c + settled) % 4], against=LETTERS[(c + settled + 1) % 4])
        for c in range(4)
    )


# -------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    "tops, stable",
    [([5, 5, 5], 0), ([1, 2, 5], 2), ([5, 1, 5], 2), ([1, 5, 5, 2, 5, 5], 4), ([7], 0)],
    ids=["from the start", "at the end", "leaves and returns", "leaves later", "one alone"],
)
def test_stable_is_from_where_it_stays(tops: list[int], stable: int) -> None:
    assert lens.first_stable(torch.tensor(tops)).item() == stable


def test_rows_are_stable_each_by_itself() -> None:
    tops = torch.tensor([[1, 5], [2, 5], [2, 5]])
    assert lens.first_stable(tops).tolist() == [1, 0]


# -------------------------------------------------------------------------------- planted


@pytest.mark.parametrize("settled", [0, 3])
@pytest.mark.parametrize("reads", ["answers", "texts"])
def test_the_planted_layer_is_where_it_commits(settled: int, reads: str) -> None:
    toy, items = toys.commit_toy(settled), settled_items(settled)
    if reads == "texts":
        items = Items(item.replaced(answer=None, against=None) for item in items)
    committed = lens.commit(toy, items, reads=reads)
    assert committed.select(group="all").values.tolist() == [settled] * 4
    if settled:
        drawn = committed.controls["random_sites"].select(group="all")
        assert drawn.values.mean() >= settled
    seen = lens.encoder_lens(toy, items, reads=reads).select(metric="same").mean().values
    assert seen.tolist() == [0.0] * settled + [1.0] * (6 - settled)


def test_answers_are_scored_and_controls_stand_beside() -> None:
    result = lens.encoder_lens(toys.commit_toy(3), settled_items(3))
    right = result.select(metric="right")
    assert right.mean().values.tolist() == [0, 0, 0, 1, 1, 1]
    assert right.controls["identity"].mean().values == 1
    assert right.controls["destroyed"].mean().values.tolist() == [0.25] * 6  # the first letter
    assert right.controls["permuted_labels"].mean().values[-1] < 1
    assert result.coords["metric"] == ["right", "log_prob", "logit_diff", "same"]
    assert result.select(metric="logit_diff").mean().values.tolist() == [-1, 0, 0, 1, 1, 1]
    assert result.n_kept == 4 and "right by stream: 0 0, 1 0" in result.report[0]
    assert result.plot(metric="right").data


def test_words_of_items_are_their_transcripts() -> None:
    pytest.importorskip("jiwer", reason="word error rates need the extra 'asr'")
    items = Items(said(c, words=[(0.0, 0.1, LETTERS[(c + 3) % 4])]) for c in range(4))
    result = lens.encoder_lens(toys.commit_toy(3), items)
    assert result.coords["metric"] == ["wer", "same"]
    assert result.select(metric="wer").mean().values.tolist() == [1, 1, 1, 0, 0, 0]
    assert result.controls["permuted_labels"].select(metric="wer").mean().values[-1] > 0
    assert any("stream 3: 'd'" in line for line in result.report)
    assert lens.commit(toys.commit_toy(3), items).select(group="right").values.tolist() == [3] * 4


def test_a_result_is_made_again_from_its_file(tmp_path) -> None:
    toy, items = toys.commit_toy(2), settled_items(2)
    result = lens.encoder_lens(toy, items, seed=3)
    again = rerun(result.save(tmp_path / "lens.nc"), toy, items)
    assert torch.equal(again.values, result.values) and again.meta["method"].startswith("encoder")


def test_the_command_runs_both() -> None:
    both = ANALYSES["encoder_lens"].function(toys.commit_toy(1), settled_items(1))
    assert list(both) == ["encoder_lens", "commit"]


# -------------------------------------------------------------------------------- real models


UNREADABLE = {
    *("wav2vec2", "data2vec_audio", "wavlm"),  # bare encoders
    *("desta2", "desta25"),  # whose connectors read several blocks
    *("kimi_audio", "musicgen"),  # several streams side by side
    *("moshi", "kyutai_stt"),  # no encoder
}
QUICK = ("whisper", "qwen2_audio", "wav2vec2_ctc")
READABLE = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name in tiny.ALL_FAMILIES
    if name not in UNREADABLE
]


@pytest.mark.parametrize("family", READABLE)
def test_the_last_stream_gives_exactly_what_the_model_gives(family: str) -> None:
    entry = tiny.ALL_FAMILIES[family]
    model = entry.hooked(entry.build())
    inputs = model.as_inputs(entry.batch())
    held = streams_of(model, inputs)
    assert len(held) == n_streams(model)
    with torch.no_grad():
        plain = model(inputs)
        for number, stream in enumerate(held):
            with intervene(model, in_place_of_last(model, stream)):
                edited = model(inputs)
            n_layers = model.cfg.need_encoder.n_layers
            slow = model(stream, start_at_layer=f"encoder.{n_layers}", inputs=inputs)
            assert torch.equal(edited, slow), (family, number)
    assert torch.equal(edited, plain)


@pytest.mark.real
@pytest.mark.slow
def test_whisper_as_published_says_digits_from_its_last_streams() -> None:
    model, items = digits.digits_whisper(), digits.digit_items()
    result = lens.encoder_lens(model, items, size=40, controls=False, by="group")
    right = result.select(metric="right")
    expected = torch.tensor([0.10, 0.11, 0.19, 0.58, 0.91]).double()
    assert (right.estimate - expected).abs().max() <= 0.08, right.estimate
    assert right.controls["permuted_labels"].estimate.max() < 0.3
    wer = lens.commit(model, items[:16], size=16)
    assert 2.5 < wer.select(group="all").estimate < 4


@pytest.mark.real
@pytest.mark.slow
def test_whisper_on_silence_knows_nothing() -> None:
    model, items = digits.digits_whisper(), digits.digit_items(range(2))
    silent = lens.encoder_lens(model, items, size=40).controls["destroyed"]
    assert silent.select(metric="right").estimate.max() <= 0.1


@pytest.mark.real
@pytest.mark.slow
def test_the_shipped_model_needs_its_encoder(embedded: HookedAudioTransformer) -> None:
    items = speech.spoken_items(24, takes=range(20))
    result = lens.encoder_lens(embedded, items, size=24, controls=False)
    right = result.select(metric="right")
    known = right.values[right.values[:, -1] == 1]
    assert len(known) >= 20
    curve = known.mean(0)
    assert curve[0] <= 0.1 and curve[1] <= 0.25 and 0.3 <= curve[2] <= 0.9
    assert curve[3] >= 0.7 and curve[4] == 1
    assert right.controls["permuted_labels"].estimate.max() < 0.35


# -------------------------------------------------------------------------------- bad input


def test_models_without_streams_to_read_are_named() -> None:
    def refused(family: str, why: str) -> None:
        entry = tiny.ALL_FAMILIES[family]
        with pytest.raises(InputError, match=why):
            lens.encoder_lens(entry.hooked(entry.build()), settled_items(1))

    refused("moshi", "has no encoder")
    refused("musicgen", "side by side")
    refused("wav2vec2", "bare encoder")
    refused("desta2", "reads blocks .* together")


def test_what_cannot_be_read_or_scored_is_named() -> None:
    toy, items = toys.commit_toy(1), settled_items(1)
    with pytest.raises(InputError, match="reads is 'answers', 'texts' or None, got 'both'"):
        lens.encoder_lens(toy, items, reads="both")
    with pytest.raises(ItemError, match="has no answer"):
        lens.encoder_lens(toy, Items([said(0), said(1)]), reads="answers")
    with pytest.raises(ControlError, match="permuted_labels"):
        lens.encoder_lens(toy, items[:1])
    with pytest.raises(InputError, match="metric= is for answers"):
        lens.encoder_lens(toy, items, reads="texts", metric=lambda logits: logits[:, 0, 0])
    with pytest.raises(ItemError, match="neither an answer nor words"):
        lens.encoder_lens(toy, Items([said(0), said(1, "a")]), reads="texts")


# -------------------------------------------------------------------------------- mixing


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("site", ["encoder.resid_post", "encoder.attn_out", "decoder.mlp_out"])
def test_mixing_is_nothing_at_0_and_a_full_patch_at_1(
    embedded: HookedAudioTransformer, site: str
) -> None:
    items = speech.spoken_items(2, seed=1)
    mixed = lens.mix(embedded, items, site, alphas=(0, 0.5, 1), layers=[1, 3], seed=4)
    assert mixed.dims == ("metric", "stimulus", "layer", "alpha")
    assert mixed.select(alpha=0.0).values.abs().max() <= 1e-5
    log_probs = mixed.select(metric="log_prob", alpha=1.0).values
    for row, item in enumerate(items):
        inputs = embedded.prepare([item.clip], [item.text])
        metric = items[[row]].metrics(embedded)["log_prob"].bind(embedded, inputs)
        noise = reference_of(inputs, "noise", seed=4)
        for column, layer in enumerate(mixed.coords["layer"]):
            with torch.no_grad():
                before = metric(embedded(inputs))
                with intervene(embedded, Edit(site, edits.Put(noise), layer=layer)):
                    after = metric(embedded(inputs))
            assert log_probs[row, column].item() == pytest.approx((after - before).item(), abs=1e-4)


def test_heads_are_mixed_one_by_one() -> None:
    toy, items = toys.commit_toy(1), settled_items(1)
    mixed = lens.mix(
        toy, items, "decoder.cross_attn.z", reference="silence", alphas=(0, 1), heads=True
    )
    change = mixed.select(metric="logit_diff", alpha=1.0)
    assert change.dims == ("stimulus", "layer", "head")
    assert change.estimate.tolist() == [[-1, 0], [0, 0]]  # the head that hears
    other = mixed.controls["other_item"].select(metric="logit_diff")
    assert other.dims == change.dims and other.estimate[0, 0] < 0


def test_a_half_way_mixture_is_half_way_in_a_linear_model() -> None:
    mixed = lens.mix(toys.commit_toy(2), settled_items(2), reference="silence", layers=[0, 4])
    change = mixed.select(metric="logit_diff").estimate
    expected = torch.tensor([0, -0.25, -0.5, -0.75, -1]).double().expand(2, -1)
    assert torch.allclose(change, expected, atol=1e-12)


def test_a_full_mixture_is_a_full_patch_of_every_item_by_itself() -> None:
    toy, items = toys.commit_toy(2), settled_items(2)
    mixed = lens.mix(toy, items, "encoder.mlp_out", alphas=(0, 1), layers=[1], seed=4)
    log_probs = mixed.select(metric="log_prob", layer=1)
    assert log_probs.select(alpha=0.0).values.tolist() == [0] * 4
    for row, item in enumerate(items):
        inputs = toy.prepare([item.clip])
        metric = items[[row]].metrics(toy)["log_prob"].bind(toy, inputs)
        patch = Edit("encoder.mlp_out", edits.Put(reference_of(inputs, "noise", 4)), layer=1)
        with intervene(toy, patch):
            after = metric(toy(inputs))
        change = after - metric(toy(inputs))
        told = log_probs.select(alpha=1.0).values[row]
        assert told.item() == pytest.approx(change.item(), abs=1e-12)


def test_references_are_as_long_and_as_loud() -> None:
    toy = toys.commit_toy(1)
    inputs = toy.prepare([said(c).clip for c in range(3)])
    noise = reference_of(inputs, "noise", seed=2)
    assert [len(clip) for clip in noise.need_audio] == [len(clip) for clip in inputs.need_audio]
    alone = reference_of(inputs[[2]], "noise", seed=2)
    assert np.array_equal(alone.need_audio[0], noise.need_audio[2])
    assert not np.any(reference_of(inputs, "silence").need_audio)


def test_mixtures_that_make_no_sense_are_named() -> None:
    toy, items = toys.commit_toy(1), settled_items(1)
    with pytest.raises(InputError, match="reference is 'noise' or 'silence', got 'music'"):
        lens.mix(toy, items, reference="music")
    with pytest.raises(InputError, match="alpha"):
        lens.mix(toy, items, alphas=[0, 1.5])
    with pytest.raises(InputError, match="alphas are one or more"):
        lens.mix(toy, items, alphas=[])
    with pytest.raises(ValueError, match="has no heads"):
        lens.mix(toy, items, "encoder.mlp_out", heads=True)
    with pytest.raises(ControlError, match="two items or more"):
        lens.mix(toy, items[:1])
    with pytest.raises(ValueError, match="cannot be swept"):
        lens.mix(toy, items, "encoder.nothing")
