"""Kimi-Audio from its published files: names, prompts in two streams, and what it writes."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2Config

from audio_lens import AudioInputs, metrics, patching
from audio_lens.inputs import InputError
from audio_lens.models.config import LoadingError
from audio_lens.models.loading.weights import renamed
from audio_lens.models.mixins.vocabulary import TokenError
from audio_lens.recipes.kimi_audio import HookedKimiAudio, kimi_audio
from audio_lens.recipes.kimi_audio_config import WEIGHT_NAMES, kimi_audio_config, special_tokens
from audio_lens.recipes.tiktoken import tiktoken_tokenizer
from families.kimi_audio import (
    BLANK,
    D_STREAM,
    EAR,
    FIRST_CODE,
    FIRST_SPECIAL,
    LANGUAGE,
    batch,
    build,
    hooked,
)
from published.kimi_audio import PUBLISHED, KimiAudio, MoonshotKimiaForCausalLM, token_count

MESSAGE_END, BEGIN, CLOSE, TEXT_END, USER, ASSISTANT, IN_TEXT, IN_BOTH = (
    FIRST_SPECIAL + i for i in (2, 18, 20, 24, 27, 28, 32, 33)
)
RATE = 16_000
CLIP = np.random.default_rng(0).standard_normal(6_500).astype(np.float32) / 10
CODES = [3, 1, 4, 1, 5, 9]


def words(text: str) -> list[int]:
    """Ids of the characters: the tokens of the small tokenizer are those that can be printed."""
    return [ord(character) - 32 for character in text]


def published_files(published: KimiAudio, folder: Path) -> None:
    """The checkpoint as it lies on the hub."""
    ear = folder / "whisper-large-v3"
    ear.mkdir(parents=True)
    state = published.alm.state_dict()
    state |= {
        name.replace("q_proj.weight", "rotary_emb.inv_freq"): torch.ones(4)
        for name in list(state)
        if name.endswith("q_proj.weight")
    }
    half = len(state) // 2
    for shard, names in enumerate((list(state)[:half], list(state)[half:]), start=1):
        save_file({n: state[n] for n in names}, folder / f"model-{shard}-of-2.safetensors")
    whisper = published.whisper.state_dict()
    del whisper["proj_out.weight"]  # tied
    save_file(whisper, ear / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "kimi_audio", **LANGUAGE}))
    (ear / "config.json").write_text(json.dumps({"model_type": "whisper", **EAR}))
    ranks = (base64.b64encode(bytes([32 + rank])).decode() + f" {rank}" for rank in range(95))
    (folder / "tiktoken.model").write_text("\n".join(ranks))


@pytest.fixture(scope="module")
def published() -> KimiAudio:
    return build(dtype=torch.float64)


@pytest.fixture(scope="module")
def model(published: KimiAudio, tmp_path_factory: pytest.TempPathFactory) -> HookedKimiAudio:
    folder = tmp_path_factory.mktemp("kimi") / "checkpoint"
    published_files(published, folder)
    return kimi_audio(folder)


def answers(published: KimiAudio, inputs: AudioInputs) -> dict[str, Tensor]:
    """The published model's logits, by stream."""
    with torch.no_grad():
        audio, text = published(
            input_ids=inputs.tokens,
            text_input_ids=inputs.further_tokens[:, 0],
            is_continuous_mask=inputs.audio_mask,
            input_features=inputs.features,
            input_features_mask=inputs.feature_mask,
            attention_mask=inputs.attended.long(),
        )
    return {"audio": audio, "text": text}


def prepared(model: HookedKimiAudio, *audio: Any, **options: Any) -> AudioInputs:
    inputs = model.prepare(*audio, sampling_rate=RATE, **options)
    inputs.features = inputs.features.double()
    return inputs


# -------------------------------------------------------------------------------- loading


def test_published_sizes_are_those_of_the_index() -> None:
    """453 tensors, of which 34 are frequencies of 64 numbers, in 19,532,673,280 bytes."""
    with torch.device("meta"):
        state = MoonshotKimiaForCausalLM(Qwen2Config(**PUBLISHED)).state_dict()
    assert len(state) + 34 == 453
    assert 2 * (sum(tensor.numel() for tensor in state.values()) + 34 * 64) == 19_532_673_280
    whisper = {"d_model": 1280, "num_mel_bins": 128, "max_source_positions": 1500}
    cfg = kimi_audio_config({**PUBLISHED, "rope_theta": 1e6}, whisper)
    with torch.device("meta"):
        ours = HookedKimiAudio(cfg)
    placed = renamed(state, WEIGHT_NAMES)
    own = {name: x for name, x in ours.state_dict().items() if not name.startswith("encoder.")}
    assert {name: x.shape for name, x in own.items()} == {n: x.shape for n, x in placed.items()}
    assert cfg.first_special == 151_643 and cfg.n_codes == 16_384
    assert cfg.first_code - cfg.first_special == 421


def test_files_give_the_published_answers(model: HookedKimiAudio, published: KimiAudio) -> None:
    inputs = prepared(model, [CLIP, CLIP[:2_000]], ["hi?", "what"], audio_tokens=[CODES, [7, 8]])
    with model.attention("explicit"):  # as transformers' eager attention rounds
        logits, theirs = model(inputs), answers(published, inputs)
    for name in ("text", "audio"):
        ours = model.stream(logits, name)[inputs.attended]
        assert torch.allclose(ours, theirs[name][inputs.attended], rtol=0, atol=1e-12)


def test_weights_may_be_cast(published: KimiAudio, tmp_path: Path) -> None:
    published_files(published, tmp_path / "checkpoint")
    assert kimi_audio(tmp_path / "checkpoint", dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kimia_media_end": BEGIN + 1}, "not implemented"),
        ({"tie_word_embeddings": True}, "not implemented"),
        ({"use_whisper_feature": False}, "not implemented"),
        ({"kimia_adaptor_input_dim": 100}, "no whole frames"),
        ({"kimia_mimo_transformer_from_layer_index": 4}, "behind layer 4 of 4"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ],
)
def test_other_configs_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(LoadingError, match=message):
        kimi_audio_config({**LANGUAGE, **changes}, EAR)


def test_other_directories_are_refused(published: KimiAudio, tmp_path: Path) -> None:
    with pytest.raises(LoadingError, match=r"no config\.json"):
        kimi_audio(tmp_path)
    folder = tmp_path / "checkpoint"
    published_files(published, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(LoadingError, match="no Kimi-Audio"):
        kimi_audio(folder)


@pytest.mark.parametrize("name", ["mimo_output.weight", "model.mimo_layers.1.mlp.up_proj.weight"])
def test_missing_and_unknown_weights_are_refused(
    published: KimiAudio, tmp_path: Path, name: str
) -> None:
    published_files(published, tmp_path / "checkpoint")
    save_file({"model.other.weight": torch.zeros(2)}, tmp_path / "checkpoint" / "a.safetensors")
    with pytest.raises(LoadingError, match=r"model\.other\.weight"):
        kimi_audio(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "a.safetensors").unlink()
    for file in (tmp_path / "checkpoint").glob("*.safetensors"):
        file.unlink()
    save_file(
        {key: x for key, x in published.alm.state_dict().items() if key != name},
        tmp_path / "checkpoint" / "model.safetensors",
    )
    with pytest.raises(LoadingError, match="missing weights: speaker"):
        kimi_audio(tmp_path / "checkpoint")


def test_without_a_tokenizer(published: KimiAudio, tmp_path: Path) -> None:
    published_files(published, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "tiktoken.model").unlink()
    loaded = kimi_audio(tmp_path / "checkpoint")
    with pytest.raises(TokenError, match=r"tiktoken\.model"):
        loaded.prepare(CLIP, "hi", RATE, audio_tokens=CODES)
    inputs = loaded.as_inputs(batch(dtype=torch.float64, padding="left"))
    assert loaded.generate(inputs, 2, return_type="tokens").shape[1] == inputs.shape[1] + 2


# -------------------------------------------------------------------------------- words


def test_special_tokens_are_named_as_published() -> None:
    names = special_tokens(421)
    places = {
        "<|im_media_begin|>": 18,
        "<|im_kimia_speech_ctd_id|>": 33,
        "<|reserved_token_19|>": 31,
    }
    assert len(set(names)) == 421 and names[-1] == "<|reserved_token_406|>"
    assert all(names[place] == name for name, place in places.items())


def test_ranks_are_merged_in_order(tmp_path: Path) -> None:
    tokens = [*(bytes([i]) for i in range(256)), b"th", b"he", b"the", b" th", b" the"]
    lines = [f"{base64.b64encode(t).decode()} {rank}" for rank, t in enumerate(tokens)]
    (tmp_path / "words").write_text("\n".join(lines))
    tokenizer = tiktoken_tokenizer(tmp_path / "words", ["<a>", "<b>"])
    assert tokenizer.encode("the the he<b>") == [258, 260, ord(" "), 257, 262]
    assert tokenizer.decode([258, 260]) == "the the"
    assert tokenizer.decode(tokenizer.encode("Grüße, 你好")) == "Grüße, 你好"


# -------------------------------------------------------------------------------- prompts


def test_a_question_comes_before_its_clip(model: HookedKimiAudio) -> None:
    inputs = prepared(model, CLIP, "hi", audio_tokens=CODES)
    codes = [FIRST_CODE + code for code in CODES]
    ending = [CLOSE, IN_TEXT, MESSAGE_END, ASSISTANT]
    assert inputs.tokens.tolist() == [[USER, BLANK, BLANK, BEGIN, *codes, *ending]]
    assert inputs.further_tokens.tolist() == [[[BLANK, *words("hi"), *[BLANK] * (len(codes) + 5)]]]
    assert inputs.audio_mask[0].nonzero().flatten().tolist() == list(range(4, 10))


def test_a_clip_asked_about_twice_needs_its_tokens_once(model: HookedKimiAudio) -> None:
    inputs = prepared(model, CLIP, ["hi", "what"], audio_tokens=CODES)
    alone = prepared(model, CLIP, "what", audio_tokens=CODES)
    assert inputs.clips_per_row == (1, 1)
    assert torch.equal(inputs[1].tokens[:, -alone.shape[1] :], alone.tokens)
    assert torch.allclose(model(inputs)[1, -1], model(alone)[0, -1], atol=1e-4)
    assert torch.equal(inputs.with_text(["ha", "what"]).tokens, inputs.tokens)


def test_text_alone_needs_no_tokens(model: HookedKimiAudio) -> None:
    inputs = prepared(model, None, "hi")
    assert inputs.tokens.tolist() == [[USER, BLANK, BLANK, MESSAGE_END, ASSISTANT]]
    assert inputs.further_tokens[0, 0].tolist() == [BLANK, *words("hi"), BLANK, BLANK]
    assert model(inputs).isfinite().all()
    with pytest.raises(InputError, match="needs a question"):
        prepared(model, None)


def test_clips_may_say_all_and_ask_for_speech(model: HookedKimiAudio) -> None:
    inputs = prepared(model, [[CLIP, CLIP[:1]]], audio_tokens=[CODES, [0]], answer="both")
    codes = [FIRST_CODE + code for code in CODES]
    said = [BEGIN, *codes, CLOSE, BEGIN, FIRST_CODE, CLOSE]
    assert inputs.tokens.tolist() == [[USER, *said, IN_BOTH, MESSAGE_END, ASSISTANT]]
    assert (inputs.further_tokens == BLANK).all()


def test_conversations_hold_both_streams(model: HookedKimiAudio) -> None:
    conversation = [
        {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    inputs = prepared(model, CLIP[:1], conversation, audio_tokens=[2])
    assert inputs.tokens.tolist() == [
        [
            *(USER, BEGIN, FIRST_CODE + 2, CLOSE, BLANK, MESSAGE_END),
            *(ASSISTANT, BLANK, BLANK, MESSAGE_END),
            *(USER, BLANK, MESSAGE_END, ASSISTANT),
        ]
    ]
    said = [*words("a"), BLANK, BLANK, *words("b"), TEXT_END, BLANK, BLANK, *words("c")]
    assert inputs.further_tokens.tolist() == [[[BLANK] * 4 + said + [BLANK] * 2]]


def test_prompts_are_padded_on_the_left(model: HookedKimiAudio) -> None:
    both = prepared(model, [CLIP, CLIP[:1]], ["hi", "what"], audio_tokens=[CODES, [2]])
    alone = prepared(model, CLIP[:1], "what", audio_tokens=[2])
    assert torch.equal(both.tokens[1, -alone.shape[1] :], alone.tokens[0])
    assert torch.equal(both.further_tokens[1, :, -alone.shape[1] :], alone.further_tokens[0])
    assert not both.attended[1, : -alone.shape[1]].any()


@pytest.mark.parametrize("n_samples", [1, 1279, 1280, 1281, 31_999, 32_000, 32_001, 50_000])
def test_there_is_a_token_per_80_ms(model: HookedKimiAudio, n_samples: int) -> None:
    wave = np.resize(CLIP, n_samples)
    count = token_count(n_samples)
    inputs = prepared(model, wave, audio_tokens=[0] * count)
    for part in ("decoder", "speaker"):
        seconds = model.timeline(inputs).seconds(part)
        assert torch.equal(seconds.isfinite(), inputs.audio_mask[0])
        centres = 0.08 * torch.arange(count).double() + 0.03
        assert torch.allclose(seconds[inputs.audio_mask[0]], centres)


def test_tokens_must_fit_their_clips(model: HookedKimiAudio) -> None:
    with pytest.raises(InputError, match="glm-4-voice-tokenizer"):
        model.prepare(CLIP, "hi", RATE)
    with pytest.raises(InputError, match=r"\[6\] tokens long .* \[2\]"):
        model.prepare(CLIP, "hi", RATE, audio_tokens=[1, 2])
    with pytest.raises(InputError, match=r"\[6, 1\] tokens long .* \[6\]"):
        model.prepare([[CLIP, CLIP[:1]]], "hi", RATE, audio_tokens=CODES)
    with pytest.raises(InputError, match="no audio token 133: there are 20"):
        model.prepare(CLIP[:1], "hi", RATE, audio_tokens=[FIRST_CODE + 3])


@pytest.mark.parametrize("given", [np.array(CODES), torch.tensor([CODES]), [tuple(CODES)]])
def test_tokens_may_come_as_arrays(model: HookedKimiAudio, given: Any) -> None:
    inputs = prepared(model, CLIP, "hi", audio_tokens=given)
    assert (inputs.tokens[inputs.audio_mask] - FIRST_CODE).tolist() == CODES


def test_a_speech_tokenizer_makes_the_tokens(model: HookedKimiAudio, monkeypatch: Any) -> None:
    loud = [int(20 * abs(float(sample)) % 20) for sample in CLIP[::1280]]
    monkeypatch.setattr(
        model, "speech_tokenizer", lambda clip: [int(20 * abs(float(x)) % 20) for x in clip[::1280]]
    )
    inputs = prepared(model, CLIP, "hi")
    assert (inputs.tokens[inputs.audio_mask] - FIRST_CODE).tolist() == loud
    other = inputs.with_audio(CLIP[::-1].copy(), RATE)
    assert not torch.equal(other.tokens, inputs.tokens)


def test_counterfactuals_keep_the_tokens_of_known_clips(model: HookedKimiAudio) -> None:
    inputs = prepared(model, [CLIP, CLIP[:1]], ["hi", "ho"], audio_tokens=[CODES, [2]])
    other = inputs[0].with_text("no")
    assert torch.equal(other.tokens, inputs[0].tokens)
    assert other.further_tokens[0, 0, 1:3].tolist() == words("no")
    with pytest.raises(InputError, match="audio_tokens"):
        inputs.with_audio([CLIP[::-1].copy(), CLIP[:1]], RATE)


def test_mappings_must_fit(model: HookedKimiAudio) -> None:
    made = batch(dtype=torch.float64)
    derived = model.as_inputs({k: x for k, x in made.items() if k != "is_continuous_mask"})
    assert torch.equal(derived.audio_mask, made["is_continuous_mask"])
    with pytest.raises(InputError, match="text_input_ids"):
        model.as_inputs({k: x for k, x in made.items() if k != "text_input_ids"})
    with pytest.raises(InputError, match="no token 1"):
        model.as_inputs({**made, "text_input_ids": made["text_input_ids"] + D_STREAM})
    for mask in (torch.zeros_like(made["is_continuous_mask"]), single(made["is_continuous_mask"])):
        with pytest.raises(InputError):
            model.as_inputs({**made, "is_continuous_mask": mask})


def single(mask: Tensor) -> Tensor:
    """Only the first place of every row."""
    return mask & (mask.cumsum(1) == 1)


# -------------------------------------------------------------------------------- the fork


def test_a_start_before_the_fork_gives_both_streams(model: HookedKimiAudio) -> None:
    inputs = prepared(model, CLIP, "hi", audio_tokens=CODES)
    resids = [f"decoder.blocks.{layer}.hook_resid_pre" for layer in range(4)]
    logits, cache = model.run_with_cache(inputs, names_filter=resids)
    for layer in (0, 1, 2):
        resid = cache[f"decoder.blocks.{layer}.hook_resid_pre"]
        assert torch.equal(model(resid, start_at_layer=layer, inputs=inputs), logits)
    resid = cache["decoder.blocks.3.hook_resid_pre"]
    with pytest.raises(InputError, match="start there or before"):
        model(resid, start_at_layer=3, inputs=inputs)
    assert torch.equal(model(inputs, stop_at_layer=3), resid)


def test_each_branch_writes_its_own_stream(model: HookedKimiAudio) -> None:
    inputs = prepared(model, CLIP, "hi", audio_tokens=CODES)
    usual = model(inputs)
    for name, other in (("speaker.blocks.0", "text"), ("decoder.blocks.2", "audio")):
        hook = (f"{name}.hook_resid_post", lambda act, hook: 2 * act)
        changed = model.run_with_hooks(inputs, fwd_hooks=[hook])
        assert torch.equal(model.stream(changed, other), model.stream(usual, other))
        assert not torch.equal(changed, usual)


def test_sweeps_read_one_of_the_streams(model: HookedKimiAudio) -> None:
    """What speaks matters to the audio stream alone; its times are those of the decoder."""
    clean, corrupted = (
        prepared(model, wave, "hi", audio_tokens=CODES) for wave in (CLIP, CLIP[::-1].copy())
    )
    asked = {"clean": clean, "corrupted": corrupted, "site": "speaker.resid_pre"}
    asked |= {"axes": ("layer", "time"), "windows": "position", "progress": False}
    spoken = metrics.of_stream("audio", metrics.log_prob(FIRST_CODE))
    written = metrics.of_stream("text", metrics.log_prob("a"))
    found = patching.sweep(model, metric={"spoken": spoken, "written": written}, **asked)
    assert found.values.shape == (2, 2, len(CODES))
    assert (found.values[1] == found.values[1, 0, 0]).all()
    assert found.values[0].std() > 1e-6
    with pytest.raises(ValueError, match=r"speaker\.resid_pre can change nothing that is read"):
        patching.sweep(model, metric=written, **asked)
    with pytest.raises(InputError, match="several streams"):
        model(clean, return_type="loss")


def test_inputs_need_a_text_stream(model: HookedKimiAudio) -> None:
    inputs = prepared(model, CLIP, "hi", audio_tokens=CODES)
    inputs.further_tokens = None
    with pytest.raises(InputError, match="text stream"):
        model(inputs)


# -------------------------------------------------------------------------------- writing


def continued(
    published: KimiAudio, inputs: AudioInputs, steps: int, speaks: bool
) -> tuple[list[int], list[int]]:
    """What the published loop writes to the streams of one prompt: text, then audio."""
    text, audio = [], []
    for step in range(steps):
        logits = answers(published, inputs)
        text.append(int(logits["text"][0, -1].argmax()))
        is_silent = not speaks or step < LANGUAGE["kimia_mimo_audiodelaytokens"]
        audio.append(BLANK if is_silent else int(logits["audio"][0, -1].argmax()))
        inputs.tokens = torch.cat([inputs.tokens, torch.tensor([audio[-1:]])], dim=1)
        inputs.further_tokens = torch.cat(
            [inputs.further_tokens, torch.tensor([[text[-1:]]])], dim=2
        )
        inputs.audio_mask = torch.nn.functional.pad(inputs.audio_mask, (0, 1))
    return text, audio


@pytest.mark.parametrize("speaks", [False, True])
def test_it_writes_what_the_published_loop_writes(
    model: HookedKimiAudio, published: KimiAudio, speaks: bool
) -> None:
    answer = "both" if speaks else "text"
    prompt = {"audio_tokens": [CODES, [7, 8]], "answer": answer}
    inputs = prepared(model, [CLIP, CLIP[:2_000]], ["hi?", "what"], **prompt)
    alone = prepared(model, CLIP, "hi?", audio_tokens=CODES, answer=answer)
    text, audio = continued(published, alone, 10, speaks)
    assert not {0, TEXT_END}.intersection(text) and not {MESSAGE_END, CLOSE}.intersection(audio)
    if speaks:
        said = model.speak(inputs, max_new_tokens=10)[0]
        assert said.text == model.tokenizer.decode(text, skip_special_tokens=True)
        assert said.codes == [token - FIRST_CODE for token in audio if token >= FIRST_CODE]
    else:
        tokens = model.generate(inputs, max_new_tokens=10, return_type="tokens")
        assert tokens[0, inputs.shape[1] :].tolist() == text
        assert torch.equal(tokens[:, : inputs.shape[1]], inputs.further_tokens[:, 0])


def test_settings_act_on_the_text(model: HookedKimiAudio) -> None:
    inputs = prepared(model, CLIP, "hi?", audio_tokens=CODES, answer="both")
    plain = model.speak(inputs, max_new_tokens=6)[0]
    first = model.continued(inputs, 6).further_tokens[0, 0, inputs.shape[1]].item()
    changed = model.continued(inputs, 6, suppress_tokens=[first]).further_tokens[0, 0]
    assert first not in changed[inputs.shape[1] :]
    assert model.speak(inputs, 6, suppress_tokens=[first])[0].text != plain.text
    with pytest.raises(InputError, match="num_beams=2"):
        model.speak(inputs, 6, num_beams=2)


def saying(model: HookedKimiAudio, when: dict[int, tuple[str, int]]) -> Any:
    """A hook that makes a stream say a token at some steps."""
    step = iter(range(100))

    def hook(logits: Tensor, hook: Any) -> Tensor:
        if (now := next(step)) in when:
            stream, token = when[now]
            model.stream(logits, stream)[..., token] = 1e3
        return logits

    return model.hooks(fwd_hooks=[("hook_logits", hook)])


def test_writing_ends_with_the_text_or_the_speech(model: HookedKimiAudio) -> None:
    inputs = prepared(model, CLIP, "hi", audio_tokens=CODES, answer="both")
    n_prompt = inputs.shape[1]
    with saying(model, {2: ("text", TEXT_END)}):
        tokens = model.generate(inputs, 10, return_type="tokens")
    assert tokens.shape[1] == n_prompt + 3 and tokens[0, -1] == TEXT_END
    ends = {2: ("text", TEXT_END), 7: ("audio", FIRST_CODE + 4), 8: ("audio", CLOSE)}
    with saying(model, ends):
        said = model.speak(inputs, 20)[0]
    whole = model.generate(inputs, 2, return_type="tokens")[0, n_prompt:]
    assert said.text == model.tokenizer.decode(whole, skip_special_tokens=True)
    assert len(said.codes) <= 2 and said.codes[-1] == 4


def test_a_step_of_token_0_alone_adds_no_text(model: HookedKimiAudio) -> None:
    """As the published code has it: a sum of ids that is 0 counts as no text."""
    inputs = prepared(model, CLIP, "hi", audio_tokens=CODES)
    inputs.further_tokens = torch.zeros_like(inputs.further_tokens)
    _, cache = model.run_with_cache(inputs, names_filter="decoder.hook_text_embed")
    assert not cache["decoder.hook_text_embed"].any()


def test_in_memory_models_are_the_same(model: HookedKimiAudio, published: KimiAudio) -> None:
    made = batch(dtype=torch.float64)
    assert torch.equal(model(made), hooked(published)(made))
