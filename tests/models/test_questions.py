"""Prompts of text alone, and several questions about one clip, in every family that is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from audio_lens import AudioInputs, HookedAudioTransformer, metrics, patching
from audio_lens.inputs import InputError
from families import FAMILIES
from families.base import Family

TEXT = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 10, 8, 11]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
QUESTIONS = ["Which digit is first?", "How many digits are there?", "Which digit is last?"]
RATE = 16_000


ASKED = [
    name
    for name in FAMILIES
    if name not in ("moshi", "kyutai_stt", "musicgen", "audio_spectrogram_transformer", "beats")
    and not name.startswith("whisper")
    and not any(kind in name for kind in ("wav2vec2", "mms", "hubert", "data2vec", "unispeech"))
    and not name.startswith("wavlm")
]
OF_HF = [name for name in ASKED if FAMILIES[name].is_hf]


def of_text(name: str) -> dict[str, torch.Tensor]:
    beside = {"text_input_ids": TEXT} if name == "kimi_audio" else {}
    return {"input_ids": TEXT, "attention_mask": MASK, **beside}


def wave(seconds: float = 1.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * RATE))


@contextmanager
def counted(model: HookedAudioTransformer) -> Iterator[list[int]]:
    """How many rows entered the encoder's first block, call after call."""
    rows: list[int] = []
    block = model.encoder.blocks[0]
    handle = block.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        handle.remove()


def test_every_family_that_is_asked_is_here() -> None:
    assert len(ASKED) == 18
    assert len(OF_HF) == 10


# -------------------------------------------------------------------------------- text alone


@pytest.mark.parametrize("name", OF_HF)
@torch.no_grad()
def test_text_alone_is_as_in_hugging_face(name: str) -> None:
    hf = FAMILIES[name].build()
    model, given = HookedAudioTransformer.from_hf(hf), of_text(name)
    expected = hf(**given).logits[MASK.bool()]
    assert torch.allclose(model(given)[MASK.bool()], expected, atol=1e-5)
    theirs = hf.generate(**given, max_new_tokens=4, do_sample=False)
    ours = model.generate(given, max_new_tokens=4, return_type="tokens")
    assert torch.equal(ours, theirs[:, -ours.shape[1] :])
    assert torch.equal(model({**given, model.features_key: None}), model(given))


@pytest.mark.parametrize("name", ASKED)
@torch.no_grad()
def test_text_alone_in_parts_time_and_sweeps(name: str) -> None:
    model = FAMILIES[name].hooked(FAMILIES[name].build())
    inputs = model.as_inputs(of_text(name))
    other = replace(inputs, tokens=inputs.tokens.where(TEXT != 8, 12))
    assert model.part("decoder").inputs(inputs).shape == TEXT.shape
    assert model.timeline(inputs)[1].text_span.tolist() == [2, 3, 4]
    assert model.timeline(inputs).n_clips == 0
    with pytest.raises(InputError, match="hold no audio"):
        model.part("encoder").inputs(inputs)
    with pytest.raises(InputError, match="hold no audio"):
        model(inputs, stop_at_layer="encoder.1")
    if name == "kimi_audio":
        return  # its metrics name a stream
    metric = metrics.logit_diff(5, 6)
    question: dict[str, Any] = {"clean": inputs, "corrupted": other, "metric": metric}
    swept = patching.sweep(model, **question, site="decoder.resid_pre", axes=("layer", "position"))
    place = [patching.Patch("decoder.resid_pre", layer=0, position=3, source=inputs)]
    direct = patching.patch(model, other, place, metric=metric)
    assert torch.allclose(swept.values[:, 0, 3], direct, atol=1e-5)
    for site, axis, layer in (("encoder.resid_pre", "layer", 0), ("connector.out", "time", None)):
        with pytest.raises(InputError, match="hold no audio"):
            patching.sweep(model, **question, site=site, axes=(axis,))
        with pytest.raises(InputError, match="hold no audio"):
            patching.patch(model, other, [patching.Patch(site, layer=layer, source=inputs)])
    with pytest.raises(InputError, match=r"no window lies at decoder\.resid_pre"):
        patching.sweep(model, **question, site="decoder.resid_pre", axes=("time",), windows=0.2)


def test_places_for_audio_without_any_are_named() -> None:
    family = FAMILIES["qwen2_audio"]
    model, given = HookedAudioTransformer.from_hf(family.build()), family.batch()
    features, mask = given.pop("input_features"), given.pop("feature_attention_mask")
    with pytest.raises(InputError, match="places for audio, and the inputs hold no input_features"):
        model(given)
    with pytest.raises(InputError, match="feature_attention_mask without input_features"):
        model({**of_text("qwen2_audio"), "feature_attention_mask": mask})
    with pytest.raises(InputError, match="0 audio placeholders"):
        model({**of_text("qwen2_audio"), "input_features": features})


def test_text_alone_is_prepared(embedded: HookedAudioTransformer) -> None:
    text = "How many digits are there?"
    inputs = embedded.prepare(None, text)
    assert inputs.text == [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"]
    assert inputs.clips_per_row == (0,)
    for no_audio in ([[]], [None]):
        assert torch.equal(embedded.prepare(no_audio, text).tokens, inputs.tokens)
    turns = [{"role": "user", "content": text}]
    assert torch.equal(embedded.prepare(None, turns).tokens, inputs.tokens)
    assert embedded.prepare(None, QUESTIONS).clips_per_row == (0, 0, 0)
    first, last = (embedded.prepare(None, QUESTIONS[i]) for i in (0, 2))
    assert torch.equal(first.with_text(QUESTIONS[2]).tokens, last.tokens)
    with pytest.raises(InputError, match="hold no waveform"):
        _ = inputs.need_audio
    with pytest.raises(InputError, match="no audio: pass at least one clip, or None"):
        embedded.prepare([], text)
    with pytest.raises(InputError, match="needs a question"):
        embedded.prepare(None)


@torch.no_grad()
def test_prompts_with_and_without_audio_in_one_batch(embedded: HookedAudioTransformer) -> None:
    both = embedded.prepare([[wave()], []], QUESTIONS[:2], RATE)
    alone = [
        embedded.prepare(wave(), QUESTIONS[0], RATE),
        embedded.prepare(None, QUESTIONS[1]),
    ]
    made = embedded(both)
    for row, single in enumerate(alone):
        n = single.tokens.shape[1]
        assert torch.allclose(made[row, -n:], embedded(single)[0], atol=2e-4)
    texts = [embedded.generate(single, max_new_tokens=5)[0] for single in alone]
    assert embedded.generate(both, max_new_tokens=5) == texts


# -------------------------------------------------------------------------------- several questions


def about_one_clip(family: Family, model: HookedAudioTransformer) -> AudioInputs:
    """Three prompts about the clips of the first prompt of the family's batch."""
    inputs = model.as_inputs(family.batch())[[0, 0, 0]]
    tokens = inputs.tokens.clone()
    tokens[:, inputs.attended[0].nonzero()[-1, 0]] = torch.tensor([11, 12, 13])
    return replace(inputs, tokens=tokens)


@pytest.mark.parametrize("name", [*ASKED, "whisper"])
@torch.no_grad()
def test_a_clip_is_encoded_once_for_several_prompts(name: str) -> None:
    family = FAMILIES[name]
    model = family.hooked(family.build())
    inputs = about_one_clip(family, model)
    n_segments = inputs.segments_per_row[0]
    with counted(model) as rows:
        together = model(inputs)
    assert set(rows) == {n_segments}
    for row in range(3):
        assert torch.allclose(together[row], model(inputs[row])[0], atol=2e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


@torch.no_grad()
def test_several_questions_are_prepared_and_answered(embedded: HookedAudioTransformer) -> None:
    inputs = embedded.prepare(wave(), QUESTIONS, RATE)
    alone = [embedded.prepare(wave(), question, RATE) for question in QUESTIONS]
    assert inputs.clips_per_row == (1, 1, 1)
    assert [one.text[0] for one in alone] == inputs.text
    with counted(embedded) as rows:
        answers = embedded.generate(inputs, max_new_tokens=6)
    assert rows == [1]
    assert answers == [embedded.generate(one, max_new_tokens=6)[0] for one in alone]
    pairs = embedded.prepare([[wave(), wave(0.5, 1)]], QUESTIONS[:2], RATE)
    assert pairs.clips_per_row == (2, 2)
    assert torch.equal(pairs.features[:2], pairs.features[2:])
    other = inputs.with_audio(wave(seed=1), RATE)
    assert other.tokens.shape == inputs.tokens.shape
    assert not other.same_audio(inputs)
    assert inputs.with_text(QUESTIONS[::-1]).text == inputs.text[::-1]


@torch.no_grad()
def test_hooks_before_the_decoder_see_every_row(embedded: HookedAudioTransformer) -> None:
    inputs = embedded.prepare(wave(), QUESTIONS, RATE)
    whole, cache = embedded.run_with_cache(inputs, names_filter="encoder.hook_out")
    assert len(cache["encoder.hook_out"]) == 3
    with counted(embedded) as rows:
        logits, _ = embedded.run_with_cache(inputs, names_filter="decoder.hook_embed")
    assert rows == [1]
    assert torch.allclose(logits, whole, atol=1e-4)

    def silence_second(x: torch.Tensor, hook: Any) -> None:
        x[1] = 0

    edited = embedded.run_with_hooks(inputs, fwd_hooks=[("encoder.hook_out", silence_second)])
    differs = (edited - whole).abs().amax((1, 2)) > 1e-3
    assert differs.tolist() == [False, True, False]


@torch.no_grad()
def test_clips_that_differ_are_each_encoded(embedded: HookedAudioTransformer) -> None:
    first, second = wave(), wave(seed=1)
    inputs = embedded.prepare([first, second, first], QUESTIONS[0], RATE)
    with counted(embedded) as rows:
        together = embedded(inputs)
    assert rows == [2]
    for row in range(3):
        assert torch.allclose(together[row], embedded(inputs[row])[0], atol=1e-4)
    assert torch.equal(together[0], together[2])


def test_every_row_has_its_own_gradient(embedded: HookedAudioTransformer) -> None:
    inputs = embedded.prepare(wave(), QUESTIONS[:2], RATE)
    inputs.features.requires_grad_()
    embedded(inputs)[1, -1].max().backward()
    assert inputs.features.grad[0].abs().max() == 0
    assert inputs.features.grad[1].abs().max() > 0


@torch.no_grad()
def test_sweeps_of_several_questions(embedded: HookedAudioTransformer) -> None:
    """The map of every question is that of the question alone."""
    swept: dict[str, Any] = {"site": "decoder.resid_pre", "axes": ("layer",)}
    metric = metrics.logit_diff("seven", "two")

    def swept_map(text: Any) -> torch.Tensor:
        clean = embedded.prepare(wave(), text, RATE)
        corrupted = clean.with_audio(wave(seed=1), RATE)
        both = {"clean": clean, "corrupted": corrupted}
        return patching.sweep(embedded, **both, metric=metric, **swept).values

    together = swept_map(QUESTIONS[:2])
    for row, question in enumerate(QUESTIONS[:2]):
        assert torch.allclose(together[row], swept_map(question).flatten(), atol=1e-3)
