"""A checkpoint's generation settings act on greedy decoding as they do in Hugging Face."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor, nn

from audio_lens import HookedAudioTransformer, InputError, LoadingError
from audio_lens.models.base import HookedAudioTransformer as Base
from audio_lens.models.loading.generation import stored_settings
from families import FAMILIES
from generation import N_NEW, new_tokens, quiet, settings_for, talkative, with_settings
from tiny import hf_inputs, tiny_hf

HEARING = ("qwen2_audio", "voxtral", "qwen3_asr", "granite_speech")


def writing(name: str) -> tuple[Any, Base, dict[str, Tensor]]:
    """Hugging Face's model, ours with its weights, and two prompts."""
    if name == "whisper":
        hf = talkative(tiny_hf("whisper", seed=8, tie_word_embeddings=False))
        return hf, HookedAudioTransformer.from_hf(hf), hf_inputs("whisper", words=(4, 4))
    hf = talkative(FAMILIES[name].build(seed=18))
    return hf, HookedAudioTransformer.from_hf(hf), FAMILIES[name].batch(padding="left")


def theirs(hf: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    """New tokens of Hugging Face's greedy decoding."""
    tokens = quiet(hf.generate, **batch, do_sample=False, **options)
    return tokens[:, batch["input_ids"].shape[1] :] if "input_ids" in batch else tokens


def alike(hf: nn.Module, ours: Tensor, expected: Tensor) -> bool:
    """Whether both are the same; Whisper's `generate` in Hugging Face leaves out the ends."""
    if "Whisper" not in type(hf).__name__:
        return torch.equal(ours, expected)
    ends, width = hf.generation_config.eos_token_id, expected.shape[1]
    left_out = torch.tensor([0] if ends is None else [0, ends] if isinstance(ends, int) else ends)
    return torch.equal(ours[:, :width], expected) and bool(
        torch.isin(ours[:, width:], left_out).all()
    )


# -------------------------------------------------------------------------------- honoured


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("name", ("whisper", *HEARING))
def test_settings_act_as_in_hugging_face(name: str) -> None:
    hf, model, batch = writing(name)
    plain, unchanged = new_tokens(model, batch, max_new_tokens=N_NEW), []
    for key, settings in settings_for(plain).items():
        with_settings(hf, **settings)
        ours = new_tokens(model, batch, max_new_tokens=N_NEW)
        assert alike(hf, ours, theirs(hf, batch, max_new_tokens=N_NEW)), (key, ours)
        unchanged += [key] if torch.equal(ours, plain) else []
    may_be = {"of sampling", "least", "least in all", "ngrams of prompts"}
    may_be |= {"of prompts"} if name == "whisper" else set()
    assert {"of sampling"} <= set(unchanged) <= may_be


def test_settings_of_a_call_take_the_place_of_the_checkpoints() -> None:
    hf, model, batch = writing("qwen2_audio")
    with_settings(hf, repetition_penalty=1.7, num_beams=4)
    asked = {"repetition_penalty": 1.2, "num_beams": 1, "suppress_tokens": [28]}
    ours = new_tokens(model, batch, max_new_tokens=N_NEW, do_sample=False, **asked)
    assert torch.equal(ours, theirs(hf, batch, max_new_tokens=N_NEW, **asked))
    assert hf.generation_config.repetition_penalty == 1.7
    with pytest.raises(InputError, match="unknown nucleus"):
        model.generate(batch, nucleus=0.9, return_type="tokens")


def test_strings_end_texts() -> None:
    _, model, batch = writing("qwen2_audio")
    plain = new_tokens(model, batch, max_new_tokens=N_NEW)[:1]
    with pytest.raises(InputError, match=r"stop_strings=.* need a tokenizer"):
        new_tokens(model, batch, stop_strings=["w"])
    words = {"abcdef": 99, **{f"w{index}.": index for index in range(99)}}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0."))
    model.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    one = {key: value[:1] for key, value in batch.items()}
    ours = new_tokens(model, one, max_new_tokens=N_NEW, stop_strings=[f"w{plain[0, 6]}."])
    assert ours.tolist() == plain[:, :7].tolist()


def test_time_is_a_limit(recwarn: pytest.WarningsRecorder) -> None:
    _, model, batch = writing("qwen2_audio")
    tokens = model.generate(batch, max_time=0.0, max_new_tokens=9, return_type="tokens")
    assert tokens.shape[1] == model.as_inputs(batch).tokens.shape[1] + 1
    assert "2 of 2 texts were cut after 1 new token, by max_time=0.0" in str(recwarn[-1].message)


# -------------------------------------------------------------------------------- refused


REFUSED = {
    "num_beams": 4,
    "num_return_sequences": 2,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "constraints": ["x"],
    "force_words_ids": [[7]],
    "guidance_scale": 1.5,
    "token_healing": True,
    "watermarking_config": {"bias": 2.0},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_greedy_is_refused_by_name(name: str) -> None:
    hf, model, batch = writing("qwen2_audio")
    setattr(hf.generation_config, name, REFUSED[name])
    with pytest.raises(InputError, match=rf"{name}=.* not implemented: with generate"):
        new_tokens(model, batch)
    setattr(hf.generation_config, name, None)
    with pytest.raises(InputError, match=rf"{name}=.* not implemented"):
        new_tokens(model, batch, **{name: REFUSED[name]})


@pytest.mark.parametrize("asked", [{"do_sample": True}, {"temperature": 0.7}, {"top_p": 0.9}])
def test_sampling_that_is_asked_for_is_refused(asked: dict[str, Any]) -> None:
    hf, model, batch = writing("qwen2_audio")
    with pytest.raises(InputError, match=rf"{next(iter(asked))}=.* is for sampling"):
        new_tokens(model, batch, **asked)
    for name, value in {**asked, "do_sample": True}.items():
        setattr(hf.generation_config, name, value)  # what a checkpoint samples with is no error
    assert new_tokens(model, batch, max_new_tokens=3).shape == (2, 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": -1.0},
        {"bad_words_ids": [[10_000]]},
        {"no_repeat_ngram_size": -2},
        {"suppress_tokens": "no"},
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"max_length": "many"},
    ],
    ids=str,
)
def test_settings_that_cannot_be_used_are_told(settings: dict[str, Any]) -> None:
    hf, model, batch = writing("qwen2_audio")
    with_settings(hf, **settings)
    with pytest.raises(InputError, match=r"cannot be used|must be at least 1"):
        new_tokens(model, batch)


def test_whisper_refuses_what_is_more_than_one_run_of_its_decoder() -> None:
    hf, model, batch = writing("whisper")
    for name, value in (("return_timestamps", True), ("no_speech_threshold", 0.6)):
        setattr(hf.generation_config, name, value)
        with pytest.raises(InputError, match=f"{name}="):
            new_tokens(model, batch)
        setattr(hf.generation_config, name, None)
    assert new_tokens(model, batch, max_new_tokens=2).shape == (2, 2)


# -------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("name", ("whisper", "qwen2_audio", "voxtral"))
def test_limits_of_a_checkpoint_are_those_of_hugging_face(name: str) -> None:
    hf, model, batch = writing(name)
    n_prompt = model.as_inputs(batch).tokens.shape[1]
    n_counted = 0 if name == "whisper" else n_prompt  # there max_length is without the prompt
    for settings in ({"max_new_tokens": 7}, {"max_length": n_counted + 6}):
        with_settings(hf, **settings)
        ours = new_tokens(model, batch)
        assert ours.shape[1] == settings.get("max_new_tokens", 6)
        assert torch.equal(ours, theirs(hf, batch)), settings
        assert model.token_limit(batch) == ours.shape[1]
        assert new_tokens(model, batch, max_new_tokens=3).shape[1] == 3


def test_a_limit_that_leaves_no_room_is_told() -> None:
    hf, model, batch = writing("qwen2_audio")
    with_settings(hf, max_length=5)
    with pytest.raises(InputError, match=r"max_length=5 .* leaves no room behind the"):
        new_tokens(model, batch)
    assert new_tokens(model, batch, max_new_tokens=2).shape[1] == 2
    assert new_tokens(model, batch, max_length=model.as_inputs(batch).shape[1] + 3).shape[1] == 3


def test_without_any_limit_whisper_fills_its_decoder_and_others_write_64() -> None:
    _, model, batch = writing("qwen2_audio")
    assert new_tokens(model, batch).shape[1] == model.token_limit(batch) == 64
    hf, model, batch = writing("whisper")
    n_ctx, n_prompt = model.cfg.need_decoder.need_n_ctx, model.as_inputs(batch).tokens.shape[1]
    assert new_tokens(model, batch).shape[1] == n_ctx - n_prompt
    with_settings(hf, max_new_tokens=400)
    assert new_tokens(model, batch).shape[1] == n_ctx - n_prompt


def cuts(model: Base, batch: Any, **options: Any) -> list[str]:
    """What `generate` warns of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.generate(batch, return_type="tokens", **options)
    return [str(one.message) for one in told]


def test_a_cut_is_warned_of_and_an_end_is_not() -> None:
    hf, model, batch = writing("qwen2_audio")
    plain = new_tokens(model, batch, max_new_tokens=8)
    end = next(iter(set(plain[0].tolist()) - set(plain[1].tolist())))
    with_settings(hf, max_new_tokens=8, eos_token_id=[end])
    assert cuts(model, batch) == [
        "1 of 2 texts were cut after 8 new tokens, by max_new_tokens=8 of the generation settings. "
        "max_new_tokens sets another"
    ]
    both = [int(plain[0, 3]), int(plain[1, 3])]
    assert cuts(model, batch, eos_token_id=both) == []
    one = {key: value[:1] for key, value in batch.items()}
    assert cuts(model, one, max_new_tokens=2, eos_token_id=99) == [
        "the text was cut after 2 new tokens, by max_new_tokens. max_new_tokens sets another"
    ]
    with_settings(hf)
    (told,) = cuts(model, one)
    assert "by the usual limit (the generation settings state none); no token is named" in told


# -------------------------------------------------------------------------------- stored


def test_settings_beside_published_weights(tmp_path: Path) -> None:
    usual = transformers.GenerationConfig(eos_token_id=3, pad_token_id=4)
    assert stored_settings(tmp_path) is None
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"repetition_penalty": 1.1, "do_sample": True, "top_k": 20}))
    found = stored_settings(tmp_path, usual)
    assert (found.repetition_penalty, found.eos_token_id, found.pad_token_id) == (1.1, 3, 4)
    path.write_text(json.dumps({"eos_token_id": [7, 8], "max_new_tokens": 30}))
    found = stored_settings(tmp_path, usual)
    assert (found.eos_token_id, found.max_new_tokens) == ([7, 8], 30)
    for broken in ("{", "[1]", '{"max_new_tokens": -1}'):
        path.write_text(broken)
        with pytest.raises(LoadingError, match=r"generation_config\.json cannot be used"):
            stored_settings(tmp_path)
