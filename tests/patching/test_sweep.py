"""What a sweep returns and what it refuses."""

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

import tiny
from audio_lens import HookedAudioTransformer, InputError, Span, TokenError, metrics, patching
from audio_lens.patching import SiteError, SweepResult
from toys import Cue, copy_toy, prompt

RATE = 16_000
WRONG_VALUE = (ValueError, TypeCheckError)  # the tests' type checker is quicker than our message


@pytest.fixture(scope="module")
def toy():
    return copy_toy()


@pytest.fixture(scope="module")
def whisper():
    return HookedAudioTransformer.from_hf(tiny.tiny_hf("whisper"))


def run(model, clean=None, corrupted=None, **options) -> SweepResult:
    options = {"metric": metrics.logit_diff(1, 3), "progress": False, **options}
    clean, corrupted = clean or prompt(Cue(1)), corrupted or prompt(Cue(3))
    return patching.sweep(model, clean=clean, corrupted=corrupted, **options)


def last_token(logits):
    return logits[:, -1, 1]


# -------------------------------------------------------------------------------- results


def test_axes_come_in_the_order_asked(toy):
    one, other = (
        run(toy, axes=axes, windows=0.2) for axes in (("layer", "time"), ("time", "layer"))
    )
    assert one.dims == ("layer", "time") and other.dims == ("time", "layer")
    assert torch.equal(one.values, other.values.T)


def test_axes_left_out_are_patched_as_one(toy):
    """Without "layer" every layer at once, without "head" all heads, without time everywhere."""
    assert run(toy, axes="time", windows=0.4).recovery.tolist() == [1.0]
    assert run(toy, site="attn.z", axes="layer").recovery.tolist() == [0, 0, 1, 0, 0]
    assert run(toy, site="attn.z", axes="head").recovery.tolist() == [0, 1]


def test_windows_in_every_form(toy):
    widths = [s.end_s - s.start_s for s in run(toy, axes="time", windows=0.1).coords["time"]]
    assert widths == pytest.approx([0.1] * 4)
    strided = run(toy, axes="time", windows=(0.2, 0.1)).coords["time"]
    assert [s.start_s for s in strided] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    listed = run(toy, axes="time", windows=[(0.2, 0.3), Span(0.0, 0.1, "start")])
    assert listed.coords["time"][1].label == "start"
    single = run(toy, axes="time", windows="position")
    assert len(single.coords["time"]) == 10
    assert single.top(1)[0].span.start_s < 0.25 < single.top(1)[0].span.end_s


def test_single_positions_equal_the_position_axis_on_the_audio(toy):
    by_time = run(toy, axes=("layer", "time"), windows="position")
    by_position = run(toy, axes=("layer", "position"))
    assert torch.equal(by_time.values, by_position.values[:, :10])


def test_several_metrics_and_stimuli(toy):
    clean, corrupted = prompt(Cue(1)).repeat(2), prompt(Cue(3)).repeat(2)
    several = {"difference": metrics.logit_diff([1, 1], [3, 3]), "answer": last_token}
    result = run(toy, clean, corrupted, axes=("layer", "time"), windows=0.2, metric=several)
    assert result.dims == ("metric", "stimulus", "layer", "time")
    assert result.coords["metric"] == ["difference", "answer"]
    alone = run(toy, axes=("layer", "time"), windows=0.2)
    assert torch.equal(result.values[0, 0], alone.values)
    assert torch.equal(result.values[0, 1], alone.values)


def test_scalar_metrics_have_no_stimulus_axis(toy):
    clean, corrupted = prompt(Cue(1)).repeat(2), prompt(Cue(3)).repeat(2)
    result = run(
        toy, clean, corrupted, axes="layer", metric=lambda logits: last_token(logits).mean()
    )
    assert result.dims == ("layer",)


def test_result_says_how_to_make_it_again(toy):
    meta = run(toy, axes="layer").meta
    assert meta["clean_hash"] == prompt(Cue(1)).digest() != meta["corrupted_hash"]
    assert {"model", "torch", "transformers", "audio_lens", "metric", "date"} <= meta.keys()


def test_batching_of_cells_does_not_matter(toy):
    one, many = (run(toy, axes=("layer", "position"), cells_per_forward=n) for n in (1, 17))
    assert torch.equal(one.values, many.values)


def test_site_shorthands(toy):
    for short, full in (("resid_pre", "decoder.resid_pre"), ("z", "decoder.attn.z")):
        assert run(toy, site=short, axes="layer").site == full


def test_pattern_is_patched_in_written_out_attention(whisper):
    clean, corrupted = (tiny.hf_inputs("whisper", seed=s) for s in (0, 1))
    result = run(
        whisper,
        clean,
        corrupted,
        site="encoder.attn.pattern",
        axes=("layer", "head"),
        metric=last_token,
    )
    assert whisper.attn_mode == "auto"
    assert result.meta["attn_mode"] == "explicit"
    assert (result.values - result.corrupted[:, None, None]).abs().min() > 0


def test_cross_attention_keys_lie_on_the_encoders_seconds(whisper):
    clean, corrupted = (tiny.hf_inputs("whisper", seed=s) for s in (0, 1))
    result = run(
        whisper,
        clean,
        corrupted,
        site="cross_attn.v",
        axes=("layer", "time"),
        windows=1.1,
        metric=last_token,
    )
    assert result.values.shape == (2, 3, 2)


@pytest.fixture(scope="module")
def llm():
    return HookedAudioTransformer.from_hf(tiny.tiny_hf("qwen2_audio"))


def llm_pair(**options):
    """Two batches that differ in their audio alone."""
    clean, other = (tiny.hf_inputs("qwen2_audio", seed=s, **options) for s in (0, 1))
    return clean, {**clean, "input_features": other["input_features"]}


def test_windows_run_over_every_clip_of_a_prompt(llm):
    clean, corrupted = llm_pair(lengths=[(120, 80)], words=[6])
    result = run(llm, clean, corrupted, axes="time", windows=0.4, metric=last_token)
    spans = result.coords["time"]
    assert [span.clip for span in spans] == [0, 0, 0, 1, 1]
    apart = [
        run(llm, clean, corrupted, axes="time", windows=[span], metric=last_token).values
        for span in spans
    ]
    torch.testing.assert_close(result.values, torch.cat(apart), rtol=1e-6, atol=1e-6)


def test_stimuli_without_a_window_are_nan(llm):
    """The second clip is over at 0.8 s: later windows say nothing about it."""
    clean, corrupted = llm_pair(lengths=(200, 80))
    result = run(llm, clean, corrupted, axes="time", windows=0.5, metric=last_token)
    assert result.values.isnan().tolist() == [[False] * 4, [False, False, True, True]]


def test_hooks_of_the_user_see_the_batch_as_it_is(llm):
    clean, corrupted = llm_pair(lengths=(120, 120))
    frozen = llm.run_with_cache(clean)[1]["blocks.1.hook_mlp_out"]
    with llm.hooks([("blocks.1.hook_mlp_out", lambda x, hook: frozen)]):
        result = run(llm, clean, corrupted, axes=("layer", "time"), windows=0.4, metric=last_token)
    assert "decoder.blocks.1.hook_mlp_out" in result.report[0]
    assert result.values[:, 0].isfinite().all()


def test_half_precision_is_measured_in_float32():
    model = HookedAudioTransformer.from_hf(tiny.tiny_hf("qwen2_audio", dtype=torch.bfloat16))
    clean, corrupted = llm_pair(lengths=(120,), words=(6,))
    result = run(model, clean, corrupted, axes="layer", metric=metrics.log_prob(7))
    assert result.values.dtype == result.recovery.dtype == torch.float32
    (note,) = (note for note in result.report if "bfloat16" in note)
    assert "1/128 of their size apart" in note and "load float32" in note
    asked = {"site": "decoder.resid_pre", "axes": "layer", "metric": metrics.log_prob(7)}
    pair = {"clean": clean, "corrupted": corrupted}
    assert note in patching.attribute(model, **pair, **asked).report
    assert note in patching.plan(model, **pair, **asked).explain()


# -------------------------------------------------------------------------------- refusals


def test_audio_at_other_positions_is_refused(llm):
    """Equal shapes, but the clip stands two tokens later in one of the prompts."""
    clean, _ = llm_pair(lengths=(120,), words=(6,))
    shifted = {**clean, "input_ids": clean["input_ids"].roll(2, dims=1)}
    with pytest.raises(InputError, match="different positions"):
        run(llm, clean, shifted, metric=last_token)


def test_metrics_that_are_not_finite_are_refused(toy):
    with pytest.raises(ValueError, match="not finite"):
        run(toy, axes="layer", metric=lambda logits: last_token(logits) * torch.nan)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"site": "decoder.resid_pree"}, SiteError, "decoder.resid_pre"),
        ({"site": "cross_attn.z"}, SiteError, "cannot be swept"),
        ({"axes": ("layer", "head")}, SiteError, "choose one or more of"),
        ({"axes": ()}, SiteError, "choose one or more of"),
        ({"axes": ("time", "position")}, SiteError, "one axis"),
        ({"axes": ("layer",), "windows": 0.1}, SiteError, "windows belong to axis 'time'"),
        ({"axes": ("time",), "windows": 0.0}, ValueError, "positive"),
        ({"axes": ("time",), "windows": [(5.0, 6.0)]}, ValueError, "no position"),
        ({"axes": ("time",), "windows": [(0.3, 0.2)]}, ValueError, "end after it starts"),
        ({"axes": ("time",), "windows": []}, ValueError, "none of"),
        ({"axes": ("time",), "windows": "frames"}, WRONG_VALUE, "windows"),
        ({"axes": ("time",), "windows": (0.1, 0.2, 0.3)}, ValueError, "none of"),
        ({"axes": ("time",), "windows": [0.1, 0.2]}, WRONG_VALUE, "window"),
        ({"axes": ("time",), "windows": [(0.1, "b")]}, WRONG_VALUE, "window"),
        ({"layers": [9]}, ValueError, "layers must lie in 0 to 4"),
        ({"layers": [1, 1]}, ValueError, "each once"),
        ({"site": "connector.out", "axes": "time", "layers": [0]}, SiteError, "outside the blocks"),
        ({"direction": "both"}, WRONG_VALUE, "direction"),
        ({"metric": 3}, TypeError, "metric"),
        ({"metric": lambda logits: logits}, ValueError, "scalar or one value per row"),
        ({"metric": {}}, ValueError, "empty"),
        ({"axes": "layer", "cells_per_forward": 0}, ValueError, "at least 1"),
        ({"metric": metrics.logit_diff(1, 1)}, InputError, "same token"),
        ({"metric": metrics.logit_diff([1, 2], 3)}, InputError, "as many answers"),
        ({"metric": metrics.log_prob(1, position=40)}, InputError, "position 40"),
        ({"metric": metrics.logit_diff("one", "two")}, TokenError, "tokenizer"),
    ],
)
def test_what_cannot_work_raises_before_any_work(toy, options, error, says):
    with pytest.raises(error, match=says):
        run(toy, **options)


def test_whispers_decoder_has_no_time(whisper):
    clean, corrupted = (tiny.hf_inputs("whisper", seed=s) for s in (0, 1))
    with pytest.raises(ValueError, match="axes 'position'"):
        run(whisper, clean, corrupted, site="resid_pre", metric=last_token)


def test_unequal_shapes_are_refused(embedded):
    rng = np.random.default_rng(0)
    one, two = (rng.normal(0, 0.1, n).astype("float32") for n in (RATE, 2 * RATE))
    clean = embedded.prepare(one, "Which digit is first?", sampling_rate=RATE)
    longer = embedded.prepare(two, "Which digit is first?", sampling_rate=RATE)
    with pytest.raises(InputError, match="equal"):
        run(embedded, clean, longer)


def test_answers_of_several_tokens_are_refused(embedded):
    samples = np.zeros(RATE, dtype="float32")
    inputs = embedded.prepare(samples, "Which digit is first?", sampling_rate=RATE)
    with pytest.raises(TokenError, match="sequence_log_prob"):
        run(embedded, inputs, inputs, metric=metrics.logit_diff("supercalifragilistic", "two"))
