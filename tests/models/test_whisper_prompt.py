"""The control tokens of Whisper are those that Hugging Face's `generate` starts from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from audio_lens import HookedAudioTransformer, InputError
from audio_lens.models.families.whisper import HookedWhisper
from generation import quiet

RATE, START = 16_000, 150
LANGUAGES = {"<|en|>": 151, "<|fr|>": 152, "<|hi|>": 153}
TASKS = {"transcribe": 160, "translate": 161}
MARK = 162
MULTILINGUAL = {"lang_to_id": LANGUAGES, "task_to_id": TASKS, "no_timestamps_token_id": MARK}


def built(config: dict[str, Any] | None = None, **settings: Any) -> tuple[Any, HookedWhisper]:
    """A random Whisper with these generation settings, and more switches of its config."""
    torch.manual_seed(0)
    hf = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=200, d_model=32, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, max_source_positions=50, decoder_start_token_id=START,
            bos_token_id=149, eos_token_id=149, pad_token_id=149, suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    ).eval()  # fmt: skip
    for name, value in (config or {}).items():
        setattr(hf.config, name, value)
    for name, value in settings.items():
        setattr(hf.generation_config, name, value)
    return hf, HookedAudioTransformer.from_hf(hf)


def clips(n_clips: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [0.1 * torch.randn(8000, generator=generator) for _ in range(n_clips)]


def prompts_in_hf(hf: Any, features: Tensor, **options: Any) -> list[list[int]]:
    """What its decoder reads before it writes (and after it has found the language)."""
    seen: list[Tensor] = []

    def watch(module: Any, args: Any, given: dict[str, Any]) -> None:
        seen.append(given["input_ids"])

    handle = hf.model.decoder.register_forward_pre_hook(watch, with_kwargs=True)
    quiet(hf.generate, features, max_new_tokens=1, **options)
    handle.remove()
    return seen[-1].tolist()


SAID = {
    "nothing": {},
    "a name": {"language": "French"},
    "a code and a task": {"language": "hi", "task": "translate"},
    "a task": {"task": "translate"},
    "forced": {"forced_decoder_ids": [[1, 151], [2, 161]]},
    "forced with its mark": {"forced_decoder_ids": [[1, 152], [2, 160], [3, MARK]]},
    "forced but for the language": {"forced_decoder_ids": [[1, None], [2, 160]]},
    "forced, and overruled": {"forced_decoder_ids": [[1, 151], [2, 161]], "language": "<|hi|>"},
    "timestamps": {"language": "en", "return_timestamps": True},
}


@pytest.mark.parametrize("said", SAID)
def test_settings_say_the_prompt_as_in_hugging_face(said: str) -> None:
    hf, model = built(**MULTILINGUAL, is_multilingual=True, **SAID[said])
    made = model.prepare(clips(), sampling_rate=RATE)
    assert made.tokens.tolist() == prompts_in_hf(hf, made.features)
    mapping = {"input_features": made.features}
    assert torch.equal(model.as_inputs(mapping).tokens, made.tokens)
    for asked in (
        {"language": "fr"},
        {"task": "translate"},
        {"language": "EN", "task": "translate"},
    ):
        ours = model.prepare(clips(), sampling_rate=RATE, **asked).tokens
        assert ours.tolist() == prompts_in_hf(hf, made.features, **asked)
        assert torch.equal(model.as_inputs({**mapping, **asked}).tokens, ours)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"no_timestamps_token_id": MARK},
        {"is_multilingual": False, "no_timestamps_token_id": MARK},
        {"is_multilingual": False, "forced_decoder_ids": [[1, MARK]]},
        {"lang_to_id": LANGUAGES},
        {"lang_to_id": LANGUAGES, "task_to_id": TASKS},
    ],
    ids=str,
)
def test_prompts_of_other_checkpoints(settings: dict[str, Any]) -> None:
    hf, model = built(**settings)
    made = model.prepare(clips(), sampling_rate=RATE)
    assert made.tokens.tolist() == prompts_in_hf(hf, made.features)


def test_tokens_that_an_old_config_forces() -> None:
    forced = {"forced_decoder_ids": [[1, 152], [2, 161]]}
    hf, model = built(forced, **MULTILINGUAL)
    made = model.prepare(clips(1), sampling_rate=RATE)
    assert made.tokens.tolist() == [[START, 152, 161, MARK]]
    assert model.prompt("hi") == [START, 153, 160, MARK]
    hf.generation_config.forced_decoder_ids = [[1, 151], [3, 160]]
    with pytest.raises(InputError, match=r"forced_decoder_ids=.* leave out a position"):
        model.prepare(clips(1), sampling_rate=RATE)


@pytest.mark.parametrize("name", ["fr", "FR", "french", "French", "<|fr|>", "<|FR|>"])
def test_a_language_goes_by_any_of_its_names(name: str) -> None:
    hf, model = built(**MULTILINGUAL)
    assert model.prompt(name) == [START, 152, 160, MARK]
    made = model.prepare(clips(1), sampling_rate=RATE, language=name)
    assert made.tokens.tolist() == prompts_in_hf(hf, made.features, language=name)


def test_one_language_per_clip() -> None:
    hf, model = built(**MULTILINGUAL)
    made = model.prepare(clips(), sampling_rate=RATE, language=["french", "hi"])
    assert made.tokens.tolist() == prompts_in_hf(hf, made.features, language=["french", "hi"])
    assert made.tokens[:, 1].tolist() == [152, 153]
    detected = hf.detect_language(made.features)[1].item()
    mixed = model.prepare(clips(), sampling_rate=RATE, language=["en", None])
    assert mixed.tokens[:, 1].tolist() == [151, detected]
    with pytest.raises(InputError, match="2 clips need as many languages, got 1"):
        model.prepare(clips(), sampling_rate=RATE, language=["en"])
    again = made.with_audio(clips()[::-1], sampling_rate=RATE)
    assert torch.equal(again.tokens, made.tokens)
    hf.generation_config.language = ["hi", "en"]
    assert model.prepare(clips(), sampling_rate=RATE).tokens[:, 1].tolist() == [153, 151]


def test_what_a_checkpoint_does_not_know_is_told() -> None:
    _, bare = built()
    with pytest.raises(InputError, match="hold no lang_to_id, so the token of language='fr'"):
        bare.prepare(clips(1), sampling_rate=RATE, language="fr")
    with pytest.raises(InputError, match="unknown task 'translate'; known: none"):
        bare.prepare(clips(1), sampling_rate=RATE, task="translate")
    _, english = built(is_multilingual=False)
    for asked in ({"language": "fr"}, {"task": "translate"}):
        with pytest.raises(InputError, match=r"only English .*; got '(fr|translate)'"):
            english.prepare(clips(1), sampling_rate=RATE, **asked)
    same = english.prepare(clips(1), sampling_rate=RATE, language="English", task="transcribe")
    assert same.tokens.tolist() == [[START]]
    _, model = built(**MULTILINGUAL)
    with pytest.raises(InputError, match=r"unknown language '<\|klingon\|>'; known: <\|en\|>"):
        model.prompt("klingon")
    with pytest.raises(InputError, match="found by the clip"):
        model.prompt()
    mapping = {"input_features": model.prepare(clips(1), sampling_rate=RATE).features}
    with pytest.raises(InputError, match="leave out language"):
        model.as_inputs({**mapping, "decoder_input_ids": torch.tensor([[START]]), "language": "fr"})


def test_a_mapping_is_run_with_the_language_that_is_heard() -> None:
    """Also while hooks are attached, which are for the run and not for what finds the language."""
    hf, model = built(**MULTILINGUAL, task="transcribe")
    features = model.prepare(clips(), sampling_rate=RATE).features
    prompts = torch.tensor(prompts_in_hf(hf, features))
    logits, cache = model.run_with_cache(input_features=features)
    expected = model(input_features=features, decoder_input_ids=prompts)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert cache["decoder.hook_embed"].shape[1] == prompts.shape[1]
    written = quiet(
        model.generate,
        input_features=features,
        language=["french", "hi"],
        max_new_tokens=3,
        return_type="tokens",
    )
    assert written[:, :4].tolist() == [[START, 152, 160, MARK], [START, 153, 160, MARK]]
    expected = quiet(hf.generate, features, language=["french", "hi"], max_new_tokens=3)
    assert torch.equal(written[:, 4:], expected)
