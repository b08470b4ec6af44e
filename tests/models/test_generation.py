"""Decoding step by step equals the full forward, and Hugging Face's greedy generation."""

from __future__ import annotations

import itertools

import pytest
import torch

from audio_lens import DeadHookError, HookedAudioTransformer, InputError, TokenError
from audio_lens.models.base import HookedAudioTransformer as Base
from audio_lens.models.layers import KVCache
from tiny import PAD, START, hf_inputs, tiny_hf, tiny_whisper_hf

N_NEW = 20


def prompt_key(family: str) -> str:
    return {"whisper": "decoder_input_ids", "qwen2_audio": "input_ids"}[family]


def talkative_hf(family: str) -> torch.nn.Module:
    """A random model that never ends and does not fall into saying one token forever."""
    hf = tiny_hf(family, seed=8, tie_word_embeddings=False)
    with torch.no_grad():
        hf.get_input_embeddings().weight.mul_(6)
    hf.generation_config.eos_token_id = None
    return hf


@torch.no_grad()
def stepwise_logits(model: Base, batch: dict, n_first: int) -> torch.Tensor:
    """Logits of a batch decoded in one chunk of ``n_first`` tokens, then one of 2, then singly."""
    whole = model.as_inputs(batch)
    encoded, past, logits = model.encode(whole), KVCache(), []
    mask, positions = whole.attended, whole.position_ids
    width = whole.tokens.shape[1]
    bounds = [0, n_first, n_first + 2, *range(n_first + 3, width + 1)]
    for start, stop in itertools.pairwise(bounds):
        step = type(whole)(
            features=whole.features,
            tokens=whole.tokens[:, start:stop],
            clips_per_row=whole.clips_per_row,
            attention_mask=None if whole.attention_mask is None else mask[:, :stop],
            feature_mask=whole.feature_mask,
            position_ids=None if positions is None else positions[:, start:stop],
        )
        # the first step is given what the encoder made; later ones have it in their cache
        given = {"encoder_out": encoded} if start == 0 else {}
        logits.append(model(step, past=past, **given))
    return torch.cat(logits, dim=1)


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("mode", ["explicit", "sdpa"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_cached_equals_full(
    family: str, dtype: torch.dtype, tolerance: float, mode: str, padding: str
) -> None:
    if family == "qwen2_audio" and dtype == torch.float64:
        tolerance = 1e-6  # its norms, softmax and rotary angles are float32, as in Hugging Face
    model = HookedAudioTransformer.from_hf(tiny_hf(family, dtype=dtype))
    model.attn_mode = mode
    words = (9, 9) if padding == "none" else (9, 8)
    lengths = (173, 173) if padding == "none" else (199, 101)
    batch = hf_inputs(family, lengths=lengths, words=words, padding="left", dtype=dtype)
    attended = model.as_inputs(batch).attended
    with torch.no_grad():
        full = model(batch)
    n_first = full.shape[1] - 6
    assert padding == "none" or not attended.all()
    difference = (stepwise_logits(model, batch, n_first) - full)[attended].abs().max()
    assert difference <= tolerance * full.abs().max()


@pytest.mark.parametrize("padding", ["none", "left"])
def test_generates_what_hugging_face_does(family: str, padding: str) -> None:
    hf = talkative_hf(family)
    model = HookedAudioTransformer.from_hf(hf)
    words = (6, 6) if padding == "none" else (6, 4)
    lengths = (199, 199) if padding == "none" else (199, 101)
    batch = hf_inputs(family, lengths=lengths, words=words, padding="left")
    ours = model.generate(batch, max_new_tokens=N_NEW, return_type="tokens")
    theirs = hf.generate(**batch, max_new_tokens=N_NEW, do_sample=False)
    n_prompt = batch[prompt_key(family)].shape[1]
    assert ours.shape == (2, n_prompt + N_NEW)
    assert torch.equal(ours[:, n_prompt:], theirs[:, -N_NEW:])
    assert len(set(ours[0, n_prompt:].tolist())) > 5


def test_generation_ends_as_hugging_face_does(family: str) -> None:
    hf = talkative_hf(family)
    model = HookedAudioTransformer.from_hf(hf)
    batch = hf_inputs(family, lengths=(199, 199), words=(6, 6))
    n_prompt = batch[prompt_key(family)].shape[1]
    free = model.generate(batch, max_new_tokens=N_NEW, return_type="tokens")[:, n_prompt:]
    hf.generation_config.eos_token_id = [free[0, 4].item(), free[1, 7].item()]
    hf.generation_config.pad_token_id = PAD
    ours = model.generate(batch, max_new_tokens=N_NEW, return_type="tokens")[:, n_prompt:]
    theirs = hf.generate(**batch, max_new_tokens=N_NEW, do_sample=False)
    assert ours.shape[1] < N_NEW
    assert torch.equal(ours, theirs[:, -ours.shape[1] :])
    assert (ours == PAD).any()


def test_whisper_suppresses_tokens() -> None:
    hf = talkative_hf("whisper")
    batch = hf_inputs("whisper", words=(4, 4))
    model = HookedAudioTransformer.from_hf(hf)
    free = model.generate(batch, max_new_tokens=N_NEW, return_type="tokens")[:, 5:]
    hf.generation_config.begin_suppress_tokens = [free[0, 0].item(), free[1, 0].item()]
    hf.generation_config.suppress_tokens = [free[0, 3].item(), free[1, 5].item()]
    ours = model.generate(batch, max_new_tokens=N_NEW, return_type="tokens")[:, 5:]
    theirs = hf.generate(**batch, max_new_tokens=N_NEW, do_sample=False)
    assert torch.equal(ours, theirs[:, -N_NEW:])
    assert not torch.isin(ours, torch.tensor(hf.generation_config.suppress_tokens)).any()
    begin = torch.tensor(hf.generation_config.begin_suppress_tokens)
    assert not torch.isin(ours[:, 0], begin).any()


MULTILINGUAL = {
    "lang_to_id": {"<|en|>": 95, "<|fr|>": 96},
    "task_to_id": {"transcribe": 97, "translate": 98},
    "no_timestamps_token_id": 94,
    "is_multilingual": True,
}


def multilingual() -> tuple[torch.nn.Module, Base]:
    hf = talkative_hf("whisper")
    for name, value in MULTILINGUAL.items():
        setattr(hf.generation_config, name, value)
    return hf, HookedAudioTransformer.from_hf(hf)


@pytest.mark.parametrize("language, task", [("fr", "translate"), ("en", "transcribe")])
def test_forced_prompt_of_multilingual_whisper(language: str, task: str) -> None:
    hf, model = multilingual()
    clip = 0.1 * torch.randn(8000)
    inputs = model.prepare(clip, sampling_rate=16_000, language=language, task=task)
    ids = {**MULTILINGUAL["lang_to_id"], **MULTILINGUAL["task_to_id"]}
    assert inputs.tokens.tolist() == [[START, ids[f"<|{language}|>"], ids[task], 94]]
    ours = model.generate(inputs, max_new_tokens=N_NEW, return_type="tokens")[:, 4:]
    theirs = hf.generate(
        inputs.features, language=language, task=task, max_new_tokens=N_NEW, do_sample=False
    )
    assert torch.equal(ours, theirs[:, -N_NEW:])


def test_language_is_detected_as_hugging_face_does() -> None:
    hf, model = multilingual()
    clips = [0.1 * torch.randn(8000), 0.1 * torch.randn(16_000)]
    inputs = model.prepare(clips, sampling_rate=16_000)
    assert inputs.tokens[:, 1].tolist() == hf.detect_language(inputs.features).tolist()


def test_language_is_detected_without_the_users_hooks() -> None:
    _, model = multilingual()
    clip, ran = 0.1 * torch.randn(8000), []
    expected = model.prepare(clip, sampling_rate=16_000).tokens

    def silence(act: torch.Tensor, hook: object) -> torch.Tensor:
        ran.append(hook)
        return act * 0

    with pytest.raises(DeadHookError), model.hooks([("hook_logits", silence)]):
        assert torch.equal(model.prepare(clip, sampling_rate=16_000).tokens, expected)
    assert not ran


def test_unknown_language_or_task_is_named() -> None:
    _, model = multilingual()
    with pytest.raises(InputError, match=r"unknown language '<\|xx\|>'; known: .*<\|fr\|>"):
        model.prepare(0.1 * torch.randn(8000), sampling_rate=16_000, language="xx")
    with pytest.raises(InputError, match="unknown task 'sing'; known: transcribe, translate"):
        model.prepare(0.1 * torch.randn(8000), sampling_rate=16_000, language="en", task="sing")
    hf = tiny_whisper_hf()
    hf.generation_config.is_multilingual = False
    english_only = HookedAudioTransformer.from_hf(hf)
    with pytest.raises(InputError, match="only English transcription"):
        english_only.prepare(0.1 * torch.randn(8000), sampling_rate=16_000, language="fr")


def test_hooks_act_while_generating(family: str) -> None:
    model = HookedAudioTransformer.from_hf(talkative_hf(family))
    batch = hf_inputs(family, words=(6, 6), lengths=(199, 199))
    before = model.generate(batch, max_new_tokens=6, return_type="tokens")
    widths = []

    def remove_head(z: torch.Tensor, hook: object) -> torch.Tensor:
        widths.append(z.shape[1])
        z = z.clone()
        z[:, :, :2] = 3.0
        return z

    with model.hooks([("decoder.blocks.1.attn.hook_z", remove_head)]):
        after = model.generate(batch, max_new_tokens=6, return_type="tokens")
    n_prompt = before.shape[1] - 6
    assert widths == [n_prompt, 1, 1, 1, 1, 1]
    assert not torch.equal(before, after)
    assert torch.equal(before, model.generate(batch, max_new_tokens=6, return_type="tokens"))


def test_generation_is_the_same_in_every_attention_mode(family: str) -> None:
    model = HookedAudioTransformer.from_hf(talkative_hf(family))
    batch = hf_inputs(family, padding="left")
    tokens = {}
    for mode in ("explicit", "sdpa", "auto"):
        with model.attention(mode):
            tokens[mode] = model.generate(batch, max_new_tokens=8, return_type="tokens")
    assert torch.equal(tokens["explicit"], tokens["sdpa"])
    assert torch.equal(tokens["explicit"], tokens["auto"])


def test_generation_refuses_what_it_cannot_do(model: Base, family: str) -> None:
    right = hf_inputs(family, words=(6, 4), lengths=(173, 173), padding="right")
    with pytest.raises(InputError, match="pad them on the left"):
        model.generate(right, return_type="tokens", max_new_tokens=2)
    batch = hf_inputs(family, words=(6, 6), lengths=(173, 173))
    with pytest.raises(InputError, match="at least 1"):
        model.generate(batch, max_new_tokens=0, return_type="tokens")
    with pytest.raises(TokenError, match="needs a tokenizer"):
        model.generate(batch)
    if family == "whisper":
        with pytest.raises(InputError, match="more than the 40 positions of the decoder"):
            model.generate(batch, max_new_tokens=35, return_type="tokens")


def test_a_processors_output_may_be_given_as_keywords(model: Base, family: str) -> None:
    batch = hf_inputs(family, padding="left")
    options = {"max_new_tokens": 3, "return_type": "tokens"}
    assert torch.equal(model.generate(**batch, **options), model.generate(batch, **options))


def test_text_comes_out(embedded: Base) -> None:
    inputs = embedded.prepare(0.1 * torch.randn(2, 16_000)[0], "how many ?", sampling_rate=16_000)
    texts = embedded.generate(inputs, max_new_tokens=3)
    tokens = embedded.generate(inputs, max_new_tokens=3, return_type="tokens")
    new = tokens[0, inputs.tokens.shape[1] :]
    assert texts == [embedded.tokenizer.decode(new, skip_special_tokens=True).strip()]
