"""Activations of what a model writes, and what it heard given beforehand, in every family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from audio_lens import (
    AudioInputs,
    Edit,
    HookedAudioTransformer,
    InputError,
    edits,
    intervene,
)
from audio_lens.hooks import DeadHookError
from audio_lens.models.layers.norms import RMSNorm
from families import FAMILIES

N_NEW = 4
CODECS = ("moshi", "kyutai_stt")
pytestmark = pytest.mark.filterwarnings("ignore")


def _writes(name: str) -> bool:
    return FAMILIES[name].hooked(FAMILIES[name].build()).cfg.decoder is not None


WRITERS = [name for name in FAMILIES if _writes(name)]
HEARERS = [name for name in WRITERS if name not in CODECS]
each = pytest.mark.parametrize("name", WRITERS)
OPTIONS: dict[str, dict[str, Any]] = {"musicgen": {"return_type": "codes", "guidance_scale": 1}}


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in float64, also where models compute in float32 as Hugging Face does."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(RMSNorm, "precision", torch.float64)


def made(name: str) -> tuple[HookedAudioTransformer, AudioInputs]:
    """A model that does not say one token forever, and prompts padded on the left."""
    family = FAMILIES[name]
    model = family.hooked(family.build(dtype=torch.float64)).to(torch.float64)
    return model, prompts(model, name)


def prompts(model: HookedAudioTransformer, name: str, **options: Any) -> AudioInputs:
    inputs = model.as_inputs(FAMILIES[name].batch(dtype=torch.float64, **options))
    if name == "kyutai_stt":  # the codes lie ahead of the text
        inputs = replace(inputs, tokens=inputs.tokens[:, :-6], attention_mask=None)
    if not inputs.attended[:, -1].all():
        inputs = inputs[inputs.attended[:, -1].tolist()]
    return inputs


def written(
    model: HookedAudioTransformer, inputs: AudioInputs, n_new: int = N_NEW, **options: Any
) -> Any:
    usual = OPTIONS.get(model.cfg.family, {"return_type": "tokens"})
    return model.generate(inputs, n_new, **{**usual, **options})


def forced(
    model: HookedAudioTransformer, inputs: AudioInputs, n_new: int = N_NEW, **options: Any
) -> AudioInputs:
    """The prompts with what is written behind them, as one would give them."""
    if model.cfg.family == "musicgen":
        seen: list[Tensor] = []
        read_out = model.read_out

        def keep(hidden: Tensor, step: AudioInputs) -> Tensor:
            seen.append(model.codes_of(step))
            return read_out(hidden, step)

        model.read_out = keep
        try:
            written(model, inputs, n_new, return_cache=True)
        finally:
            del model.read_out
        codes = torch.cat(seen, dim=-1)
        return replace(inputs, tokens=codes[:, 0], further_tokens=codes[:, 1:], attention_mask=None)
    if hasattr(model, "continued"):
        return model.continued(inputs, n_new)
    batch = model._continuable(inputs)
    tokens = written(model, inputs, n_new, **options)
    n_more = tokens.shape[1] - batch.tokens.shape[1]
    mask, positions = batch.attention_mask, batch.position_ids
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(len(mask), n_more)], dim=1)
    if positions is not None:
        more = positions[:, -1:] + 1 + torch.arange(n_more)
        positions = torch.cat([positions, more], dim=1)
    audio = None
    if hasattr(model, "is_audio"):  # what is written is none, whatever its id
        audio = model.is_audio(batch)
        audio = torch.cat([audio, audio.new_zeros(len(audio), n_more)], dim=1)
    return replace(
        batch, tokens=tokens, attention_mask=mask, position_ids=positions, audio_mask=audio
    )


def assert_equal(found: Any, expected: Any, model: HookedAudioTransformer) -> None:
    for key in found:
        assert found[key].shape == expected[key].shape, key
        both = found[key].isfinite()
        assert torch.equal(both, expected[key].isfinite()), key
        assert torch.allclose(found[key][both], expected[key][both], rtol=1e-10, atol=1e-10), key


@each
def test_the_cache_is_that_of_one_run(name: str) -> None:
    """All that is kept, scores, patterns and results too, under the same names."""
    model, inputs = made(name)
    plain = written(model, inputs)
    made_, cache = written(model, inputs, return_cache=True, attention=True)
    assert torch.equal(made_, plain)
    _, expected = model.run_with_cache(forced(model, inputs), attention=True)
    assert_equal(cache, expected, model)
    left_out = set(expected.cache_dict) - set(cache.cache_dict)
    assert all(key.startswith(("hook_logits", *_beside(model))) for key in left_out)
    assert not left_out or name in CODECS
    assert "decoder.blocks.0.hook_resid_pre" in cache


def _beside(model: HookedAudioTransformer) -> tuple[str, ...]:
    return tuple(f"{part}." for part in model.cfg.further_decoders)


@pytest.mark.mostly_slow(3)
@each
@pytest.mark.parametrize("when", ["prefill", "decode", "both"])
def test_edits_are_in_the_cache(name: str, when: Any) -> None:
    """As in one run of the whole whose edit lies on the prompt, or on what was written."""
    model, inputs = made(name)
    vector = torch.randn(model.cfg.need_decoder.d_model, dtype=torch.float64)
    edit = Edit("decoder.resid_post", edits.Add(vector), layer=0, when=when)
    names = [f"decoder.blocks.{layer}.hook_resid_post" for layer in (0, 1)]
    with intervene(model, edit):
        _, cache = written(model, inputs, return_cache=True, names_filter=names)
        whole = forced(model, inputs)
    assert list(cache.cache_dict) == names
    where = torch.zeros(whole.tokens.shape, dtype=torch.bool)
    n_prompt = inputs.tokens.shape[1]
    where[:, :n_prompt] |= when in ("prefill", "both")
    where[:, n_prompt:] |= when in ("decode", "both")
    with intervene(model, Edit(edit.site, edit.do, layer=0, where=where)):
        _, expected = model.run_with_cache(whole, names_filter=names)
    assert_equal(cache, expected, model)


@pytest.mark.parametrize("name", ["qwen2_audio", "granite_speech"])
def test_rows_that_end_early_are_padded(name: str) -> None:
    model, inputs = made(name)
    others = [prompts(model, name, seed=seed) for seed in (1, 2)]
    inputs = AudioInputs.joined([inputs, *others])
    plain = written(model, inputs, 6)[:, -6:]
    ends = {"eos_token_id": int(plain[0, 1])}
    tokens, cache = written(model, inputs, 6, return_cache=True, **ends)
    is_end = tokens[:, -plain.shape[1] :] == plain[0, 1]
    assert is_end[0].any() and not is_end.any(1).all()
    _, expected = model.run_with_cache(forced(model, inputs, 6, **ends))
    assert_equal(cache, expected, model)


@pytest.mark.parametrize("name", HEARERS)
def test_what_was_heard_before_is_not_heard_again(name: str) -> None:
    """With edits behind the encoder in force, too."""
    model, inputs = made(name)
    heard = model.encode(inputs)
    vector = torch.randn(model.cfg.need_decoder.d_model, dtype=torch.float64)
    edit = Edit("decoder.resid_post", edits.Add(vector), layer=0)
    plain = written(model, inputs)
    with intervene(model, edit):
        edited = written(model, inputs)
    calls: list[str] = []
    site = "encoder.blocks.0.hook_resid_pre"
    model.add_hook(site, lambda x, hook: calls.append(hook.name))
    assert torch.equal(written(model, inputs, encoder_out=heard), plain)
    with intervene(model, edit):
        assert torch.equal(written(model, inputs, encoder_out=heard), edited)
    _, cache = written(model, inputs, encoder_out=heard, return_cache=True)
    assert not calls and site not in cache
    with pytest.raises(InputError, match="encoder_out is of"):
        written(model, inputs, encoder_out=heard[:0])
    for wrong in (heard[..., :-1], heard[:, :0], heard[..., None]):
        with pytest.raises(InputError, match=r"encoder_out is \(clips"):
            written(model, inputs, encoder_out=wrong)


def test_what_cannot_be_kept_is_said() -> None:
    moshi, inputs = made("moshi")
    with pytest.raises(InputError, match="no encoder: encoder_out goes nowhere"):
        written(moshi, inputs, encoder_out=torch.zeros(1, 2, 3))
    with pytest.raises(InputError, match="hook_logits do not run at every position"):
        written(moshi, inputs, return_cache=True, names_filter="hook_logits")
    whisper, inputs = made("whisper")
    n_ctx = whisper.cfg.need_decoder.need_n_ctx - inputs.tokens.shape[1]
    with pytest.raises(InputError, match=f"max_new_tokens={n_ctx}"):
        written(whisper, inputs, n_ctx + 1, return_cache=True)
    with pytest.raises(DeadHookError, match="did not run while the model wrote"):
        written(
            whisper,
            inputs,
            return_cache=True,
            encoder_out=whisper.encode(inputs),
            names_filter="encoder.hook_out",
        )
    music, inputs = made("musicgen")
    with pytest.raises(InputError, match="needs guidance_scale=1"):
        music.generate(inputs, N_NEW, guidance_scale=2, return_cache=True)


def test_text_comes_with_its_cache(embedded: HookedAudioTransformer) -> None:
    from audio_lens.models.embedded import default_pair

    pair = default_pair()
    inputs = embedded.prepare([pair.clean, pair.corrupted], [pair.question] * 2)
    texts, cache = embedded.generate(inputs, return_cache=True)
    tokens = embedded.generate(inputs, return_type="tokens")
    assert texts == embedded.generate(inputs)
    assert cache["decoder", "resid_post", 5].shape[:2] == tokens.shape
