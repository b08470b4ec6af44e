"""LLaMA-Omni and LLaMA-Omni2 from directories with the published files."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from audio_lens import InputError, metrics, patching
from audio_lens.hooks import DeadHookError
from audio_lens.models.config import LoadingError
from audio_lens.recipes.llama_omni import (
    FIRST,
    QUESTION,
    TEMPLATE,
    HookedLlamaOmni,
    llama_omni,
    llama_omni2,
    llama_omni_of,
)
from families import FAMILIES
from families.base import TINY_LANGUAGE_MODEL, randomise
from families.llama_omni import EAR, TOKENS, batch, build
from published.llama_omni import (
    SPEECH,
    LlamaOmni,
    LlamaOmni2,
    Speaking,
    SpeechGeneratorCTC,
    Whisper,
)

N_UNITS, UPSAMPLE, SPEAKER = 11, 5, (2, 24, 4, 40)
SETTINGS = {
    "speech_encoder": "models/speech_encoder/large-v3.pt",
    "speech_encoder_type": "whisper",
    "speech_encoder_ds_rate": 5,
    "speech_encoder_hidden_size": EAR["width"],
    "speech_projector_type": "linear",
}
SPEAKING = {
    "speech_generator_type": "ctc",
    "ctc_decoder_config": str(SPEAKER),
    "ctc_upsample_factor": UPSAMPLE,
    "unit_vocab_size": N_UNITS,
}
DIMS = {
    "n_mels": EAR["n_mels"],
    "n_vocab": 60,
    **{f"n_audio_{key}": EAR[value] for key, value in (("ctx", "n_ctx"), ("state", "width"))},
    **{"n_audio_head": EAR["n_heads"], "n_audio_layer": EAR["n_layers"]},
    **{"n_text_ctx": 10, "n_text_state": EAR["width"], "n_text_head": 2, "n_text_layer": 1},
}


def generator(published: Speaking, dtype: torch.dtype = torch.float32) -> SpeechGeneratorCTC:
    """A random unit decoder behind a language model."""
    made = SpeechGeneratorCTC(published.config, SPEAKER, UPSAMPLE, N_UNITS)
    return randomise(made, seed=1).to(dtype)


def named(made: SpeechGeneratorCTC) -> dict[str, Tensor]:
    """Its weights as checkpoints name them."""
    return {f"speech_generator.{name}": x for name, x in made.state_dict().items()}


def written(folder: Path, published: Speaking, state: dict[str, Tensor], **settings: Any) -> Path:
    """A directory as it is published: weights, and a config of a class that transformers lacks."""
    kind = f"omni_speech2s_{published.config.model_type}"
    config = {**published.config.to_dict(), **SETTINGS, **settings, "model_type": kind}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: x.contiguous().clone() for name, x in state.items()}, folder / "a.safetensors")
    return folder


def split_ear(published: Speaking) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights without the encoder's, and the encoder's as in openai's file."""
    prefix, state = "model.speech_encoder.", published.state_dict()
    ear = {name: x for name, x in state.items() if name.startswith(prefix)}
    others = {name: x for name, x in state.items() if name not in ear}
    return others, {f"encoder.{name.removeprefix(prefix)}": x for name, x in ear.items()}


def whisper_file(path: Path, ear: dict[str, Tensor]) -> Path:
    """Openai's file of a whole Whisper with this encoder."""
    whole = {**Whisper(DIMS).state_dict(), **ear}
    torch.save({"dims": DIMS, "model_state_dict": whole}, path)
    return path


def only(made: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the published code takes of a batch."""
    return {name: x for name, x in made.items() if name != "feature_attention_mask"}


@torch.no_grad()
def check_equal(
    model: HookedLlamaOmni, published: Speaking, dtype: torch.dtype = torch.float32
) -> None:
    """The logits of a batch at attended tokens."""
    made = batch(dtype=dtype)
    inputs = model.as_inputs(made)
    with model.attention("explicit"):
        ours = model(inputs)[inputs.attended]
    theirs = published(**only(made)).logits[inputs.attended]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() <= tolerance


# -------------------------------------------------------------------------------- loading


def test_from_a_directory_with_its_own_encoder(tmp_path: Path) -> None:
    published = build(LlamaOmni)
    model = llama_omni(written(tmp_path, published, published.state_dict(), eos_token_id=[2, 3]))
    check_equal(model, published)
    assert model.generation_config.eos_token_id == [2, 3]
    (tmp_path / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.1}))
    settings = llama_omni(tmp_path).generation_config
    assert (settings.eos_token_id, settings.repetition_penalty) == ([2, 3], 1.1)
    assert model.speaker is None
    assert model.cfg.model_name == str(tmp_path)


def test_with_openais_file_as_encoder(tmp_path: Path) -> None:
    """Which is cast to what the language model is in."""
    published = build(LlamaOmni, dtype=torch.float64)
    others, ear = split_ear(published)
    whisper = whisper_file(tmp_path / "large-v3.pt", ear)
    model = llama_omni(written(tmp_path, published, others), whisper=whisper)
    check_equal(model, published, torch.float64)


def test_the_encoder_that_is_given_wins(tmp_path: Path) -> None:
    published = build(LlamaOmni)
    ear = {name: x + 1 for name, x in split_ear(published)[1].items()}
    whisper = whisper_file(tmp_path / "large-v3.pt", ear)
    model = llama_omni(written(tmp_path, published, published.state_dict()), whisper=whisper)
    assert torch.equal(model.encoder.conv1.bias, ear["encoder.conv1.bias"])


def test_omni2_ties_its_unembedding_and_leaves_out_what_speaks(tmp_path: Path) -> None:
    published = build(LlamaOmni2, tie_word_embeddings=True)
    talker = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TINY_LANGUAGE_MODEL))
    state = {name: x for name, x in published.state_dict().items() if name != "lm_head.weight"}
    state |= {f"speech_generator.model.{name}": x for name, x in talker.state_dict().items()}
    for piece in ("input_proj.0", "input_proj.2", "gate.0"):
        state |= {f"speech_generator.{piece}.{kind}": torch.ones(3) for kind in ("weight", "bias")}
    model = llama_omni2(written(tmp_path, published, state))
    check_equal(model, published)
    assert model.decoder.unembed.weight.data_ptr() == model.decoder.token_embed.weight.data_ptr()
    with pytest.raises(InputError, match="no speaker"):
        model.units(batch(), torch.ones(2, 3, dtype=torch.long))


def test_weights_and_files_are_checked(tmp_path: Path) -> None:
    published = build(LlamaOmni)
    state = published.state_dict()
    others, _ = split_ear(published)
    with pytest.raises(LoadingError, match="holds no encoder: pass whisper="):
        llama_omni(written(tmp_path, published, others))
    with pytest.raises(LoadingError, match=r"without a place in this model: model\.odd\.weight"):
        llama_omni(written(tmp_path, published, {**state, "model.odd.weight": torch.ones(1)}))
    for theirs, ours in (
        ("model.speech_projector.linear1.weight", r"connector\.linear_1\.weight"),
        ("model.embed_tokens.weight", r"decoder\.token_embed\.weight"),
        ("model.norm.weight", r"ln_final\.weight"),
        ("lm_head.weight", r"unembed\.weight"),
    ):
        lacking = {key: x for key, x in state.items() if key != theirs}
        with pytest.raises(LoadingError, match=f"missing weights: {ours}"):
            llama_omni(written(tmp_path, published, lacking))
    lacking = {key: x for key, x in state.items() if "blocks.1.mlp.0" not in key}
    with pytest.raises(LoadingError, match=r"missing weights: encoder\.blocks\.1\.mlp\.fc_in"):
        llama_omni(written(tmp_path, published, lacking))
    with pytest.raises(LoadingError, match="no LLaMA-Omni"):
        llama_omni_of(published.config.to_dict(), state, FIRST)
    with pytest.raises(LoadingError, match=r"no config\.json"):
        llama_omni(tmp_path / "nowhere")


def test_the_released_size() -> None:
    """Every weight of Llama-3.1-8B-Omni, by name and shape, has its place; none is allocated."""
    text = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    with torch.device("meta"):
        published = LlamaOmni(text)
        published.add_ear(
            {"n_mels": 128, "n_ctx": 1500, "width": 1280, "n_heads": 20, "n_layers": 32}
        )
        published.model.speech_projector.linear1 = torch.nn.Linear(6400, 2048)
        published.model.speech_projector.linear2 = torch.nn.Linear(2048, 4096)
        speaking = SpeechGeneratorCTC(text, (2, 4096, 32, 11008), 25, 1000)
    settings = {
        **{"speech_encoder_ds_rate": 5, "speech_encoder_hidden_size": 1280},
        **{"ctc_decoder_config": "(2,4096,32,11008)", "ctc_upsample_factor": 25},
        "unit_vocab_size": 1000,
    }
    state = {**published.state_dict(), **named(speaking)}
    model = llama_omni_of({**text.to_dict(), **settings}, state, FIRST)
    assert len(model.state_dict()) == len(state)
    assert model.token_count(7) == 300
    assert model.token_seconds(300)[[0, 299]].tolist() == pytest.approx([0.04, 29.94])
    assert model.speaker.unembed.weight.shape == (1001, 4096)
    assert model.speaker.cfg.rotary_frequencies == model.decoder.cfg.rotary_frequencies


# -------------------------------------------------------------------------------- prompts


BEGIN = "<|begin_of_text|>"


def words() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of whole words that begins every text, as Llama's does."""
    marks = [BEGIN, "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    text = TEMPLATE.format(audio="", question=QUESTION)
    for mark in marks:
        text = text.replace(mark, " ")
    vocab = {
        word: i for i, word in enumerate([*marks, "?", "\n", "\n\n", *dict.fromkeys(text.split())])
    }
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(" ", "removed"),
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\n+"), "isolated"),
        ]
    )
    inner.add_special_tokens(marks)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=BEGIN, unk_token="?"
    )


def cut_at_speech(prompt: str, tokenizer: Any) -> list[int]:
    """As published: pieces on their own, of which the first keeps one of its two beginnings."""
    first, *others = (tokenizer(piece).input_ids for piece in prompt.split("<speech>"))
    ids = list(first)
    for piece in others:
        ids += [SPEECH, *piece[1:]]
    return ids


def model_with_words() -> HookedLlamaOmni:
    published = build(LlamaOmni)
    config = {**published.config.to_dict(), **SETTINGS}
    return llama_omni_of(config, published.state_dict(), FIRST, tokenizer=words())


def test_prompts_are_those_of_the_published_code() -> None:
    model = model_with_words()
    wave = np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32)
    inputs = model.prepare(wave, text=QUESTION, sampling_rate=16_000)
    prompt = TEMPLATE.removeprefix(BEGIN).format(audio="<speech>", question=QUESTION)
    at_once = cut_at_speech(prompt, model.tokenizer)
    place = at_once.index(SPEECH)
    expected = [*at_once[:place], *[SPEECH] * TOKENS, *at_once[place + 1 :]]
    assert inputs.tokens.tolist() == [expected]
    assert expected[:2] == [0, 0]
    assert model.tokenizer.unk_token_id not in expected
    assert inputs.features.shape == (1, 20, 200)


def test_the_padding_of_a_clip_has_no_time() -> None:
    model = model_with_words()
    inputs = model.prepare(np.ones(8000, np.float32), text=QUESTION, sampling_rate=16_000)
    timeline = model.timeline(inputs)
    assert int(timeline.valid("connector").sum()) == 5
    assert timeline.seconds("connector")[:3].tolist() == pytest.approx([0.04, 0.14, 0.24])


# -------------------------------------------------------------------------------- units


@cache
def speaking(dtype: torch.dtype = torch.float32) -> tuple[LlamaOmni, SpeechGeneratorCTC, Any]:
    """The published model, its unit decoder, and ours of both."""
    published = build(LlamaOmni, dtype=dtype, eos_token_id=None)
    speaker = generator(published, dtype)
    config = {**published.config.to_dict(), **SETTINGS, **SPEAKING, "eos_token_id": None}
    state = {**published.state_dict(), **named(speaker)}
    return published, speaker, llama_omni_of(config, state, FIRST)


def states_of(published: LlamaOmni, made: dict[str, Tensor], answer: Tensor) -> Tensor:
    """The final hidden states that predict each token of the answer."""
    ones = torch.ones_like(answer[:, :-1])
    whole = {
        **made,
        "input_ids": torch.cat([made["input_ids"], answer[:, :-1]], dim=1),
        "attention_mask": torch.cat([made["attention_mask"], ones], dim=1),
    }
    out = published(**only(whole), output_hidden_states=True)
    return out.hidden_states[-1][:, -answer.shape[1] :]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("options", [{"lengths": [180], "words": [5]}, {"words": [5, 5]}])
@torch.no_grad()
def test_units_are_those_of_the_published_code(
    dtype: torch.dtype, tolerance: float, options: dict[str, Any]
) -> None:
    published, speaker, model = speaking(dtype)
    made = batch(dtype=dtype, **options)
    answer = torch.randint(5, 90, (len(made["input_ids"]), 4))
    theirs = speaker(states_of(published, made, answer))
    with model.attention("explicit"):
        ours = model.units(made, answer)
    assert ours.shape == (len(answer), UPSAMPLE * 4, N_UNITS + 1)
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() <= tolerance


@torch.no_grad()
def test_an_answer_of_its_own_is_spoken() -> None:
    """With prompts of unequal length, each as if it were alone."""
    model = speaking()[-1]
    made = batch(padding="left")
    tokens = model.generate(made, max_new_tokens=3, return_type="tokens")
    answer = tokens[:, -3:]
    units = model.units(made, answer)
    for row in range(2):
        alone = model.units(model.as_inputs(made)[row], answer[row : row + 1])
        torch.testing.assert_close(units[row : row + 1], alone, rtol=1e-4, atol=1e-4)
    best = units.argmax(-1).tolist()
    for row, spoken in zip(best, model.spoken(units), strict=True):
        assert spoken == [unit for unit, _ in itertools.groupby(row) if unit != N_UNITS]


def test_every_hook_point_of_the_speaker_is_live() -> None:
    _, _, model = speaking(torch.float64)
    made = batch(dtype=torch.float64, words=(5, 5))
    answer = torch.randint(5, 90, (2, 3))
    points = [name for name in model.hook_dict if name.startswith("speaker.")]
    with torch.no_grad(), model.attention("explicit"):
        before = model.units(made, answer)
        for name in points:
            with model.hooks(fwd_hooks=[(name, lambda act, hook: act * 1.5 + 0.1)]):
                after = model.units(made, answer)
            assert (after - before).abs().max() > 1e-6, name
    assert "speaker.blocks.1.attn.hook_pattern" in points


def test_what_cannot_be_answered() -> None:
    model = speaking()[-1]
    made = batch(padding="right")
    answer = torch.randint(5, 90, (2, 3))
    with pytest.raises(InputError, match="padded on the right"):
        model.units(made, answer)
    with pytest.raises(InputError, match="2 prompts need an answer"):
        model.units(batch(words=(5, 5)), answer[:, :0])
    with pytest.raises(DeadHookError):
        model.run_with_cache(batch(), names_filter="speaker.hook_out")


def test_a_speaker_changes_nothing_in_the_text() -> None:
    published, _, model = speaking()
    check_equal(model, published)


def test_clips_too_short_for_a_token_have_nothing_to_patch() -> None:
    made = FAMILIES["llama_omni"].batch(lengths=[1], words=[4])
    model = FAMILIES["llama_omni"].hooked(FAMILIES["llama_omni"].build())
    with pytest.raises(patching.SiteError, match=r"no position of connector\.out holds anything"):
        patching.sweep(
            model,
            clean=made,
            corrupted=made,
            site="connector.out",
            axes="position",
            metric=metrics.logit_diff(5, 6),
        )
