"""Starting and stopping at layers, the loss, and what a forward accepts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BatchFeature

from audio_lens import HookedAudioTransformer, InputError, TokenError
from audio_lens.models.layers import KVCache
from tiny import AUDIO_TOKEN, N_FRAMES, hf_inputs, tiny_hf, tiny_whisper_hf

N_LAYERS = 3
PLACES = [f"{part}.{layer}" for part in ("encoder", "decoder") for layer in range(N_LAYERS + 1)]


def resid_name(place: str) -> str:
    part, _, layer = place.partition(".")
    if int(layer) < N_LAYERS:
        return f"{part}.blocks.{layer}.hook_resid_pre"
    return f"{part}.blocks.{N_LAYERS - 1}.hook_resid_post"


def count_blocks(model: HookedAudioTransformer, run: Any) -> dict[str, int]:
    """How many blocks of each part a call ran."""
    counts = {"encoder": 0, "decoder": 0}

    def count(tensor: torch.Tensor, hook: Any) -> None:
        counts[hook.name.split(".")[0]] += 1

    model.add_hook(lambda name: name.endswith("hook_resid_post"), count)
    try:
        run()
    finally:
        model.reset_hooks()
    return counts


# -------------------------------------------------------------------------------- start and stop


@pytest.mark.parametrize("place", PLACES)
def test_stops_and_starts_where_the_full_run_passes(
    model: HookedAudioTransformer, inputs: dict, place: str
) -> None:
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, names_filter=resid_name(place))
        stopped = model(inputs, stop_at_layer=place)
        started = model(stopped, start_at_layer=place, inputs=inputs)
    assert torch.equal(stopped, cache[resid_name(place)])
    assert torch.equal(started, logits)


@pytest.mark.parametrize("place", PLACES)
def test_skipped_blocks_do_not_run(
    model: HookedAudioTransformer, inputs: dict, place: str, family: str
) -> None:
    part, _, layer = place.partition(".")
    batch = model.as_inputs(inputs)
    resid = model(batch, stop_at_layer=place)
    before = count_blocks(model, lambda: model(batch, stop_at_layer=place))
    after = count_blocks(model, lambda: model(resid, start_at_layer=place, inputs=batch))
    if part == "encoder":
        assert before == {"encoder": int(layer), "decoder": 0}
        assert after == {"encoder": N_LAYERS - int(layer), "decoder": N_LAYERS}
    else:
        assert before == {"encoder": N_LAYERS, "decoder": int(layer)}
        # Whisper's decoder reads the encoder, an audio LLM's does not
        n_encoder = N_LAYERS if family == "whisper" else 0
        assert after == {"encoder": n_encoder, "decoder": N_LAYERS - int(layer)}


def test_encoder_output_given_is_not_computed_again(
    model: HookedAudioTransformer, inputs: dict
) -> None:
    batch = model.as_inputs(inputs)
    encoded = model.encode(batch)
    resid = model(batch, stop_at_layer=2)
    calls = {
        "whole": lambda: model(batch, encoder_out=encoded),
        "start": lambda: model(resid, start_at_layer=2, inputs=batch, encoder_out=encoded),
    }
    for call in calls.values():
        assert torch.equal(call(), model(batch))
        assert count_blocks(model, call)["encoder"] == 0


def test_a_filled_cache_needs_no_encoder(model: HookedAudioTransformer, family: str) -> None:
    batch = model.as_inputs(hf_inputs(family, lengths=(199, 199), words=(5, 5)))
    past = KVCache()
    step = replace(batch, tokens=batch.tokens[:, -1:])
    model(replace(batch, tokens=batch.tokens[:, :-1]), past=past)
    counts = count_blocks(model, lambda: model(step, past=past))
    assert counts == {"encoder": 0, "decoder": N_LAYERS}


def test_start_and_stop_together(model: HookedAudioTransformer, inputs: dict) -> None:
    for start, stop in [("encoder.1", "encoder.2"), ("encoder.2", "decoder.1"), (1, 2), (2, 2)]:
        first = model(inputs, stop_at_layer=start)
        both = model(first, start_at_layer=start, stop_at_layer=stop, inputs=inputs)
        assert torch.equal(both, model(inputs, stop_at_layer=stop))


def test_integers_mean_the_decoder_and_negative_ones_count_from_the_end(
    model: HookedAudioTransformer, inputs: dict
) -> None:
    for layer in range(1, N_LAYERS + 1):
        at = model(inputs, stop_at_layer=N_LAYERS - layer)
        assert torch.equal(at, model(inputs, stop_at_layer=-layer))
        assert torch.equal(at, model(inputs, stop_at_layer=f"decoder.-{layer}"))


def test_start_without_prompts_is_an_unpadded_row(
    model: HookedAudioTransformer, family: str
) -> None:
    inputs = model.as_inputs(hf_inputs(family, lengths=(199, 199), words=(5, 5)))
    resid = model(inputs, stop_at_layer=1)
    needs = {"encoder_out": model.encode(inputs)} if family == "whisper" else {}
    assert torch.equal(model(resid, start_at_layer=1, **needs), model(inputs))
    with pytest.raises(InputError, match="the loss needs the tokens"):
        model(resid, start_at_layer=1, return_type="loss", **needs)
    with pytest.raises(InputError, match="starting at encoder layer 1 also needs inputs="):
        model(model(inputs, stop_at_layer="encoder.1"), start_at_layer="encoder.1")
    if family == "whisper":
        with pytest.raises(InputError, match="also needs inputs="):
            model(resid, start_at_layer=1)


def test_wrong_layers_are_refused(model: HookedAudioTransformer, inputs: dict) -> None:
    resid = model(inputs, stop_at_layer=1)
    for layer, message in [
        (4, "the decoder has 3 layers, so there is no layer 4"),
        (-4, "no layer -4"),
        ("encoder.9", "the encoder has 3 layers"),
        ("lm.1", "a part of encoder, decoder"),
        ("encoder.one", "a layer is an int or 'part.int'"),
        ("--1", "a layer is an int or 'part.int'"),
    ]:
        with pytest.raises(InputError, match=message):
            model(inputs, stop_at_layer=layer)
    with pytest.raises(InputError, match="start_at_layer takes the residual stream"):
        model(inputs, start_at_layer=1)
    with pytest.raises(InputError, match="start_at_layer takes the residual stream"):
        model(resid, inputs=inputs)
    for stop in (0, "encoder.2"):
        with pytest.raises(InputError, match="lies before start_at_layer"):
            model(resid, start_at_layer=1, stop_at_layer=stop, inputs=inputs)
    with pytest.raises(InputError, match=r"encoder_out or a filled cache stands for the encoder"):
        model(inputs, stop_at_layer="encoder.1", encoder_out=resid)


def test_residuals_of_other_inputs_are_refused(model: HookedAudioTransformer, inputs: dict) -> None:
    for place in ("encoder.1", "decoder.1"):
        resid = model(inputs, stop_at_layer=place)
        for wrong in (resid[:, :5], resid[:1], resid.repeat(2, 1, 1), resid[..., :-1], resid[0]):
            with pytest.raises(InputError, match=rf"{place.replace('.', ' layer ')} is \(2, .*got"):
                model(wrong, start_at_layer=place, inputs=inputs)
    with pytest.raises(InputError, match="inputs were given twice"):
        model(inputs, inputs=inputs)
    encoded = model.encode(model.as_inputs(inputs))
    with pytest.raises(InputError, match="encoder_out is of 1 clips, the inputs of 2"):
        model(inputs, encoder_out=encoded[:1])


def test_gradients_flow_from_a_later_start_to_the_residual(
    model: HookedAudioTransformer, inputs: dict
) -> None:
    resid = model(inputs, stop_at_layer=1).detach().requires_grad_()
    model(resid, start_at_layer=1, inputs=inputs, return_type="loss").backward()
    assert resid.grad.abs().sum() > 0


# -------------------------------------------------------------------------------- loss


def hand_loss(logits: torch.Tensor, batch: dict, family: str) -> float:
    """Mean of -log p(next token), one by one."""
    tokens = batch["decoder_input_ids" if family == "whisper" else "input_ids"]
    mask = batch["decoder_attention_mask" if family == "whisper" else "attention_mask"]
    losses = []
    for row in range(len(tokens)):
        for t in range(tokens.shape[1] - 1):
            is_real = mask[row, t] and mask[row, t + 1]
            if is_real and tokens[row, t + 1] != AUDIO_TOKEN:
                log_prob = F.log_softmax(logits[row, t], dim=-1)[tokens[row, t + 1]]
                losses.append(-log_prob.item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_loss_counts_attended_text_only(
    model: HookedAudioTransformer, family: str, padding: str
) -> None:
    batch = hf_inputs(family, words=(7, 4), padding=padding)
    logits, loss = model(batch, return_type="both")
    assert loss.item() == pytest.approx(hand_loss(logits, batch, family), rel=1e-5)


def test_loss_does_not_depend_on_padding() -> None:
    model = HookedAudioTransformer.from_hf(tiny_hf("qwen2_audio"))
    batches = [hf_inputs("qwen2_audio", words=(7, 4), padding=side) for side in ("left", "right")]
    losses = [model(batch, return_type="loss").item() for batch in batches]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_return_types(model: HookedAudioTransformer, inputs: dict) -> None:
    logits = model(inputs)
    both = model(inputs, return_type="both")
    assert torch.equal(both[0], logits)
    assert torch.equal(both[1], model(inputs, return_type="loss"))
    assert both[1].shape == ()
    assert model(inputs, return_type=None) is None


def test_loss_needs_something_to_predict() -> None:
    model = HookedAudioTransformer.from_hf(tiny_whisper_hf())
    with pytest.raises(InputError, match="no token to predict"):
        model(hf_inputs("whisper", words=(0, 0)), return_type="loss")


# -------------------------------------------------------------------------------- what it accepts


def test_a_processors_output_stands_for_inputs(model: HookedAudioTransformer, inputs: dict) -> None:
    made = BatchFeature(inputs)
    expected = model(model.as_inputs(inputs))
    assert torch.equal(model(made), expected)
    assert torch.equal(model(**made), expected)
    assert torch.equal(model(inputs=made), expected)
    logits, cache = model.run_with_cache(made, names_filter="hook_logits")
    assert torch.equal(logits, expected)
    assert torch.equal(cache["hook_logits"], expected)
    as_lists = {key: value.numpy() for key, value in inputs.items()}
    assert torch.equal(model(as_lists), expected)


def test_mappings_that_do_not_fit_are_refused(
    model: HookedAudioTransformer, inputs: dict, family: str
) -> None:
    with pytest.raises(InputError, match="got unknown pixel_values"):
        model({**inputs, "pixel_values": torch.zeros(1)})
    with pytest.raises(InputError, match="unknown arguments beside the inputs: labels"):
        model(model.as_inputs(inputs), labels=1)
    with pytest.raises(InputError, match="no input_features"):
        model({key: value for key, value in inputs.items() if key != "input_features"})
    for wrong in (inputs["input_features"][..., :-1], inputs["input_features"][:, :-1]):
        with pytest.raises(InputError, match=f"20 mel bins, {N_FRAMES} frames.* got "):
            model({**inputs, "input_features": wrong})
    with pytest.raises(InputError, match=r"features of 1 clip|1 clip\(s\)"):
        mask = {k: v[:1] for k, v in inputs.items() if k == "feature_attention_mask"}
        model({**inputs, **mask, "input_features": inputs["input_features"][:1]})
    positions = "decoder_position_ids" if family == "whisper" else "position_ids"
    with pytest.raises(InputError, match="3 positions were given"):
        model({**inputs, positions: torch.zeros(2, 3, dtype=torch.long)})


def test_values_that_mean_nothing_are_refused(
    model: HookedAudioTransformer, inputs: dict, family: str
) -> None:
    for bad in (float("nan"), float("inf")):
        features = inputs["input_features"].clone()
        features[1, 3, 5] = bad
        with pytest.raises(InputError, match="NaN or infinite"):
            model({**inputs, "input_features": features})
    key = "decoder_input_ids" if family == "whisper" else "input_ids"
    for bad in (100, -1):
        tokens = inputs[key].clone()
        tokens[0, 0] = bad
        with pytest.raises(InputError, match=f"no token {bad}: the vocabulary has 100 tokens"):
            model({**inputs, key: tokens})


def test_token_ids_are_checked(model: HookedAudioTransformer) -> None:
    for view in (model, model.part("decoder")):
        assert view.to_single_token(np.int64(7)) == view.to_single_token(torch.tensor(7)) == 7
        for bad in (99999, -1):
            with pytest.raises(TokenError, match=rf"no token {bad}: .*\(d_vocab\) has 100"):
                view.to_single_token(bad)


def test_prompts_of_ids_beyond_the_vocabulary_are_refused() -> None:
    whisper = HookedAudioTransformer.from_hf(tiny_whisper_hf())
    with pytest.raises(InputError, match="no token 100"):
        whisper.prepare(0.1 * torch.randn(8000), [1, 100], sampling_rate=16_000)


def test_positions_may_be_given(model: HookedAudioTransformer, inputs: dict, family: str) -> None:
    hf = tiny_hf(family)
    key = "decoder_position_ids" if family == "whisper" else "position_ids"
    width = inputs["decoder_input_ids" if family == "whisper" else "input_ids"].shape[1]
    given = {**inputs, key: (torch.arange(width) + 5)[None].expand(2, -1)}
    attended = model.as_inputs(inputs).attended
    with torch.no_grad():
        theirs, ours = hf(**given).logits, model(given)
    assert torch.allclose(theirs[attended], ours[attended], atol=1e-5)


@pytest.mark.parametrize("words", [(6, 2), (2, 0)], ids=str)
def test_left_padding_changes_nothing(
    model: HookedAudioTransformer, family: str, words: tuple[int, int]
) -> None:
    """Not even where the mask alone says what is padding."""
    words = words if family == "whisper" else (words[0] + 2, words[1] + 2)
    batch = hf_inputs(family, lengths=(199, 199), words=words, padding="left")
    whole = model.as_inputs(batch)
    n_padding = int((~whole.attended[1]).sum())
    assert n_padding > 0
    alone = replace(whole[1], tokens=whole.tokens[1:, n_padding:], attention_mask=None)
    torch.testing.assert_close(model(whole)[1:, n_padding:], model(alone), rtol=1e-4, atol=1e-5)
    tokens = model.generate(batch, max_new_tokens=1, return_type="tokens")
    assert torch.equal(tokens[:, -1], model(whole)[:, -1].argmax(-1))


def test_whisper_without_tokens_transcribes() -> None:
    model = HookedAudioTransformer.from_hf(tiny_whisper_hf())
    batch = hf_inputs("whisper")
    features = {"input_features": batch["input_features"]}
    assert model(features).shape == (2, 1, 100)
    with pytest.raises(InputError, match="50 tokens are more than the 40"):
        model({**features, "decoder_input_ids": torch.ones(2, 50, dtype=torch.long)})


def test_audio_llm_needs_tokens_and_matching_placeholders() -> None:
    model = HookedAudioTransformer.from_hf(tiny_hf("qwen2_audio"))
    batch = hf_inputs("qwen2_audio", lengths=(100, 60))
    with pytest.raises(InputError, match="no input_ids"):
        model({**batch, "input_ids": None})
    one_less = batch["input_ids"].clone()
    one_less[0, 1] = 7
    with pytest.raises(
        InputError, match=r"39 audio placeholders; 2 clip\(s\) need one each, or 40"
    ):
        model({**batch, "input_ids": one_less})
    swapped = {**batch, "feature_attention_mask": batch["feature_attention_mask"].flip(0)}
    with pytest.raises(InputError, match="do not match the lengths of its clips"):
        model(swapped)


def test_parameters_move_and_cast(model: HookedAudioTransformer, inputs: dict) -> None:
    before = model(inputs)
    model.to(torch.float64)
    assert model.dtype == torch.float64
    assert torch.allclose(model(inputs).float(), before, atol=1e-4)
    assert model.part("decoder").cfg.dtype == torch.float64
