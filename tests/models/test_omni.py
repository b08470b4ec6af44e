"""Qwen's ears that hear in pieces: processors, Omni models, experts, generation and refusals."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor, nn

from audio_lens import AudioInputs, HookedAudioTransformer, InputError
from audio_lens.audio import AudioError
from audio_lens.models.config import LoadingError
from audio_lens.models.layers import KVCache
from families import FAMILIES, qwen2_5_omni, qwen3_asr
from families.base import AUDIO_TOKEN, PAD, Family

RATE = 16_000
NAMES = ("qwen2_5_omni", "qwen3_asr", "qwen3_omni")
EXTRACTORS = {
    "qwen2_5_omni": transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=300),
    "qwen3_asr": transformers.Qwen3ASRFeatureExtractor(feature_size=20),
    "qwen3_omni": transformers.WhisperFeatureExtractor(feature_size=20),
}
PADDING = {"qwen2_5_omni": "max_length", "qwen3_asr": True, "qwen3_omni": True}
MASKS = {"qwen3_asr": "input_features_mask"}
each_omni = pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni"])


@pytest.fixture(params=NAMES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def tokens_of(name: str) -> Callable[[int], int]:
    """Audio tokens by mel frames, as Hugging Face counts them over a whole clip."""
    return {"qwen2_5_omni": qwen2_5_omni.audio_tokens}.get(name, qwen3_asr.audio_tokens)


def clip(n_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, n_samples).astype(np.float32)


# -------------------------------------------------------------------------------- pieces


def test_pieces_become_as_many_tokens_as_the_whole(family: Family) -> None:
    model = family.hooked(family.build())
    width = model.cfg.n_frames
    for n_mel in range(1, 3 * width + 2):
        pieces = [min(width, n_mel - start) for start in range(0, n_mel, width)]
        assert sum(map(model.token_count, pieces)) == tokens_of(family.name)(n_mel)


def test_released_sizes() -> None:
    ear = FAMILIES["qwen3_asr"].hooked(FAMILIES["qwen3_asr"].build(n_window_infer=800))
    assert [ear.token_count(n) for n in (100, 800, 3000)] == [13, 104, 390]
    assert ear.cfg.encoder.n_ctx == 104
    omni = FAMILIES["qwen2_5_omni"].hooked(FAMILIES["qwen2_5_omni"].build())
    assert omni.token_count(200) == 50
    assert omni.cfg.max_audio_s == 300


def test_times_count_on_over_the_pieces(family: Family) -> None:
    model = family.hooked(family.build())
    inputs = model.as_inputs(family.batch(lengths=[573], words=[4]))
    index = torch.arange(tokens_of(family.name)(573)).double()
    every_40_ms = 0.04 * index + 0.01
    every_80_ms = index // 13 + 0.08 * (index % 13)
    expected = every_40_ms if family.name == "qwen2_5_omni" else every_80_ms
    timeline = model.timeline(inputs)
    for part in ("connector", "decoder"):
        seconds = timeline.seconds(part)[timeline.valid(part)]
        assert torch.allclose(seconds[~seconds.isnan()], expected)
    assert timeline.duration_s() == pytest.approx(5.73)


@torch.no_grad()
def test_what_stands_behind_a_clip_is_not_heard() -> None:
    """But by Qwen3-ASR, whose last convolutions hear it in Hugging Face too."""
    for name in ("qwen2_5_omni", "qwen3_omni"):
        model = FAMILIES[name].hooked(FAMILIES[name].build())
        batch = FAMILIES[name].batch(lengths=[[230, 31], 173], words=[4, 3])
        noisy = dict(batch)
        behind = ~batch["feature_attention_mask"].bool()[:, None]
        noisy["input_features"] = torch.where(behind, 9.0, batch["input_features"])
        assert torch.equal(model(batch), model(noisy))


@torch.no_grad()
def test_chunks_do_not_hear_each_other() -> None:
    model = FAMILIES["qwen2_5_omni"].hooked(FAMILIES["qwen2_5_omni"].build())
    batch = FAMILIES["qwen2_5_omni"].batch(lengths=[450], words=[4])
    changed = {**batch, "input_features": batch["input_features"].clone()}
    changed["input_features"][..., 200] += 1
    before, after = (model.encode(model.as_inputs(b)) for b in (batch, changed))
    assert [torch.equal(x, y) for x, y in zip(before, after, strict=True)] == [True, False, True]


def test_clips_without_audio_are_refused(family: Family) -> None:
    model = family.hooked(family.build())
    batch = family.batch(lengths=[200, 150], words=[4, 4])
    batch[MASKS.get(family.name, "feature_attention_mask")][1] = 0
    with pytest.raises(InputError, match="clip 1 holds no audio"):
        model.as_inputs(batch)


def test_single_placeholders_are_expanded(family: Family) -> None:
    model = family.hooked(family.build())
    options = {"lengths": [[230, 31], 473], "words": [4, 3], "padding": "left"}
    whole = model.as_inputs(family.batch(**options))
    made = model.as_inputs(family.batch(**options, single_placeholder=True))
    assert torch.equal(made.tokens, whole.tokens)
    assert made.clips_per_row == whole.clips_per_row == (2, 1)
    assert made.segments_per_clip == whole.segments_per_clip == (2, 1, 3)


# -------------------------------------------------------------------------------- processors


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A hundred words, one of which is the placeholder."""
    words = ["<pad>", "<start>", "<end>", "<unknown>", "user", "assistant", "what", "is", "said"]
    words += [f"w{index}" for index in range(len(words), 100)]
    words[AUDIO_TOKEN] = "<audio>"
    ids = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, "<unknown>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unknown>",
        additional_special_tokens=["<audio>"],
    )


class Processor:
    """The pieces of a processor; those of Omni models also need an eye to be made."""

    def __init__(self, name: str):
        self.feature_extractor, self.tokenizer = EXTRACTORS[name], tokenizer()


def hearing(name: str) -> HookedAudioTransformer:
    hf = FAMILIES[name].build()
    hf.generation_config.pad_token_id = PAD
    return HookedAudioTransformer.from_hf(hf, Processor(name))


@pytest.mark.parametrize("n_samples", [12_000, 32_000, 70_001])
def test_prepares_what_the_processor_does(family: Family, n_samples: int) -> None:
    """Of one clip; of several, processors of Qwen3 let the longest decide how others end."""
    model, wave = hearing(family.name), clip(n_samples)
    made = EXTRACTORS[family.name](
        [wave],
        sampling_rate=RATE,
        padding=PADDING[family.name],
        truncation=False,
        return_attention_mask=True,
        return_tensors="pt",
    )
    n_mel = int(made["attention_mask"].sum())
    words = [6, *[AUDIO_TOKEN] * tokens_of(family.name)(n_mel), 7]
    theirs = model.as_inputs(
        {
            "input_ids": [words],
            "input_features": made["input_features"],
            MASKS.get(family.name, "feature_attention_mask"): made["attention_mask"],
        }
    )
    ours = model.prepare(wave, "what <audio> is", RATE)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.feature_mask, theirs.feature_mask)
    heard = theirs.feature_mask[:, None].expand_as(theirs.features)
    assert torch.allclose(ours.features[heard], theirs.features[heard], atol=1e-6)
    assert torch.allclose(model(ours), model(theirs), atol=1e-4)


@torch.no_grad()
def test_what_is_prepared_does_not_depend_on_the_batch(family: Family) -> None:
    model = hearing(family.name)
    waves = [clip(40_000), clip(71_234, seed=1)]
    texts = ["what <audio> is", "w20 <audio> said"]
    together = model.prepare(waves, texts, RATE)
    for row, (wave, text) in enumerate(zip(waves, texts, strict=True)):
        alone = model.prepare(wave, text, RATE)
        attended = together.attended[row]
        assert torch.equal(together[row].features, alone.features)
        assert torch.allclose(model(together)[row][attended], model(alone)[0], atol=1e-4)


def test_counterfactuals_of_prepared_clips(family: Family) -> None:
    model = hearing(family.name)
    inputs = model.prepare([[clip(40_000), clip(9_000)]], "what <audio> is <audio> said", RATE)
    other = inputs.with_audio([[clip(40_000, seed=1), clip(9_000, seed=2)]], RATE)
    assert inputs.clips_per_row == other.clips_per_row == (2,)
    assert torch.equal(inputs.tokens, other.tokens)
    assert not torch.equal(inputs.features, other.features)
    texts = inputs.with_text("w30 <audio> w31 <audio> w32")
    assert torch.equal(texts.features, inputs.features)


def test_clips_too_long_are_refused() -> None:
    model = hearing("qwen2_5_omni")
    with pytest.raises(AudioError, match="takes 300 s"):
        model.prepare(np.zeros(301 * RATE, dtype=np.float32), "what <audio> is", RATE)
    with pytest.raises(AudioError, match="too short"):
        model.prepare(clip(200), "what <audio> is", RATE)


# -------------------------------------------------------------------------------- generation


def talkative(family: Family) -> transformers.PreTrainedModel:
    """A random model that never ends and does not fall into saying one token forever."""
    hf = family.build(seed=5)
    with torch.no_grad():
        hf.get_input_embeddings().weight.mul_(10)
    hf.generation_config.eos_token_id = None
    hf.generation_config.pad_token_id = PAD
    return hf


@pytest.mark.parametrize("lengths", [(450, 450), (201, 473)], ids=str)
def test_generates_what_hugging_face_does(family: Family, lengths: tuple[int, ...]) -> None:
    hf = talkative(family)
    batch = family.batch(lengths=lengths, padding="left")
    theirs = hf.generate(**batch, max_new_tokens=20, do_sample=False)
    ours = HookedAudioTransformer.from_hf(hf).generate(
        batch, max_new_tokens=20, return_type="tokens"
    )
    assert torch.equal(ours, theirs)
    assert all(len(set(row)) > 4 for row in ours[:, -20:].tolist())


@torch.no_grad()
@pytest.mark.parametrize("mode", ["explicit", "sdpa"])
def test_cached_equals_full(family: Family, mode: str) -> None:
    model = family.hooked(family.build())
    model.attn_mode = mode
    whole = model.as_inputs(family.batch(lengths=[201, 473], words=[9, 8], padding="left"))
    full, past, logits = model(whole), KVCache(), []
    n = whole.tokens.shape[1]
    for start, stop in [(0, n - 4), (n - 4, n - 2), (n - 2, n - 1), (n - 1, n)]:
        positions = whole.position_ids
        step = replace(
            whole,
            tokens=whole.tokens[:, start:stop],
            attention_mask=whole.attended[:, :stop],
            position_ids=None if positions is None else positions[:, start:stop],
        )
        logits.append(model(step, past=past))
    difference = (torch.cat(logits, dim=1) - full)[whole.attended].abs().max()
    assert difference <= 1e-5 * full.abs().max()


# -------------------------------------------------------------------------------- Omni models

TALKER = {
    "embedding_size": 48,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 50,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
VOICE = {
    "dit_config": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "ff_mult": 1,
        "mel_dim": 8,
        "enc_dim": 8,
        "enc_emb_dim": 8,
        "enc_channels": [8, 8, 8, 8, 24],
        "enc_kernel_sizes": [3, 3, 3, 3, 1],
        "enc_attention_channels": 4,
        "enc_se_channels": 4,
    },
    "bigvgan_config": {
        "mel_dim": 8,
        "upsample_initial_channel": 32,
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 1, 1]],
        "upsample_rates": [2],
        "upsample_kernel_sizes": [4],
    },
}


def whole_omni(name: str) -> transformers.PreTrainedModel:
    """A tiny Omni model; Qwen2.5's can speak."""
    thinker = FAMILIES[name].build()
    config = thinker.config.to_dict()
    if name == "qwen3_omni":
        whole = transformers.Qwen3OmniMoeConfig(thinker_config=config, enable_audio_output=False)
        model = transformers.Qwen3OmniMoeForConditionalGeneration(whole)
    else:
        whole = transformers.Qwen2_5OmniConfig(
            thinker_config=config, talker_config=TALKER, token2wav_config=VOICE
        )
        model = transformers.Qwen2_5OmniForConditionalGeneration(whole)
    model.thinker.load_state_dict(thinker.state_dict())
    return model.eval()


@torch.no_grad()
@each_omni
def test_a_whole_omni_model_is_taken_by_its_thinker(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    hf, batch = whole_omni(name), FAMILIES[name].batch(lengths=[473], words=[5])
    with caplog.at_level(logging.WARNING, "audio_lens"):
        model = HookedAudioTransformer.from_hf(hf)
    assert "only the thinker" in caplog.text and "(talker and vocoder) is left out" in caplog.text
    assert torch.allclose(model(batch), hf.thinker(**batch).logits, atol=1e-4)
    theirs = hf.thinker.model.audio_tower.layers[0].fc1.weight
    assert model.encoder.blocks[0].mlp.fc_in.weight.data_ptr() == theirs.data_ptr()


@torch.no_grad()
@each_omni
@pytest.mark.parametrize("part", ["whole", "thinker"])
def test_omni_checkpoints_load(name: str, part: str, tmp_path: Path) -> None:
    hf, batch = whole_omni(name), FAMILIES[name].batch(lengths=[473], words=[5])
    (hf if part == "whole" else hf.thinker).save_pretrained(tmp_path)
    model = HookedAudioTransformer.from_pretrained(tmp_path)
    assert model.cfg.family == name
    assert torch.allclose(model(batch), hf.thinker(**batch).logits, atol=1e-4)


@torch.no_grad()
def test_speech_recognisers_load(tmp_path: Path) -> None:
    family = FAMILIES["qwen3_asr"]
    hf, batch = family.build(), family.batch(lengths=[473], words=[5])
    hf.save_pretrained(tmp_path)
    model = HookedAudioTransformer.from_pretrained(tmp_path)
    assert torch.allclose(model(batch), hf(**batch).logits, atol=1e-4)


@each_omni
def test_images_and_video_are_refused(name: str) -> None:
    model = FAMILIES[name].hooked(FAMILIES[name].build())
    batch = FAMILIES[name].batch()
    for key in ("pixel_values", "pixel_values_videos", "video_grid_thw"):
        with pytest.raises(InputError, match=f"without images and video: leave out {key}"):
            model(**batch, **{key: torch.zeros(1)})
    assert model.as_inputs({**batch, "pixel_values": None}) is not None
    for token, what in ((91, "images"), (92, "video")):
        tokens = batch["input_ids"].clone()
        tokens[0, 0] = token
        with pytest.raises(InputError, match=f"the prompt has a place for {what}"):
            model.as_inputs({**batch, "input_ids": tokens})


# -------------------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[str, str, Any, str]] = {
    "chunks that cut tokens": ("qwen2_5_omni", "audio_config.n_window", 25, "n_window"),
    "other chunks": ("qwen3_asr", "audio_config.n_window", 40, "80 mel frames"),
    "uneven windows": ("qwen3_omni", "audio_config.n_window_infer", 250, "cuts a chunk"),
    "some layers without experts": ("qwen3_omni", "text_config.mlp_only_layers", [1], "some"),
    "every other layer": ("qwen3_omni", "text_config.decoder_sparse_step", 2, "some layers"),
    "sliding windows": (
        "qwen2_5_omni",
        "text_config.layer_types",
        ["full_attention", "sliding_attention"],
        "sliding_attention",
    ),
    "another encoder": ("qwen3_asr", "audio_config.model_type", "whisper", "whisper"),
    "another language model": ("qwen3_asr", "text_config.model_type", "mamba", "mamba"),
}


@pytest.mark.parametrize("name, field, value, said", REFUSED.values(), ids=REFUSED)
def test_unknown_features_are_refused_by_name(name: str, field: str, value: Any, said: str) -> None:
    hf = FAMILIES[name].build()
    part, last = field.split(".")
    getattr(hf.config, part).__dict__[last] = value
    with pytest.raises(LoadingError, match=said):
        HookedAudioTransformer.from_hf(hf)


def test_forced_aligners_are_refused(tmp_path: Path) -> None:
    config = FAMILIES["qwen3_asr"].build().config
    transformers.Qwen3ASRForTokenClassification(config).save_pretrained(tmp_path)
    with pytest.raises(LoadingError, match="Qwen3ASRForTokenClassification"):
        HookedAudioTransformer.from_pretrained(tmp_path)


# -------------------------------------------------------------------------------- experts


@pytest.fixture(scope="module")
def experts() -> tuple[HookedAudioTransformer, AudioInputs]:
    """Two of four experts at a time, in float64, and a prompt."""
    family = FAMILIES["qwen3_omni"]
    model = family.hooked(family.build(dtype=torch.float64, num_experts_per_tok=2))
    return model, model.as_inputs(family.batch(lengths=[180], words=[5], dtype=torch.float64))


HERE = "decoder.blocks.1.mlp."


@torch.no_grad()
def test_experts_written_out(experts: tuple[HookedAudioTransformer, AudioInputs]) -> None:
    model, inputs = experts
    _, cache = model.run_with_cache(inputs)
    mlp = model.decoder.blocks[1].mlp
    probabilities = cache[HERE + "hook_expert_weights"]
    indices = cache[HERE + "hook_expert_indices"]
    assert probabilities.shape == (*inputs.tokens.shape, 4)
    assert indices.shape == (*inputs.tokens.shape, 2)
    assert torch.allclose(probabilities, cache[HERE + "hook_router_logits"].softmax(-1).float())
    x = model.decoder.blocks[1].ln2(cache["decoder.blocks.1.hook_resid_mid"])
    every = torch.stack([mlp.experts.one(expert, x[0]) for expert in range(4)], dim=1)
    chosen = probabilities[0].gather(-1, indices[0])
    weights = torch.zeros_like(probabilities[0]).scatter(-1, indices[0], chosen)
    weights = (weights / weights.sum(-1, keepdim=True)).double()
    expected = (every * weights[..., None]).sum(1)
    assert torch.allclose(cache["decoder.blocks.1.hook_mlp_out"][0], expected, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("point", ["hook_router_logits", "hook_expert_weights"])
def test_an_expert_can_be_left_out_and_forced(
    experts: tuple[HookedAudioTransformer, AudioInputs], point: str
) -> None:
    model, inputs = experts
    low, high = {"hook_router_logits": (-1e9, 1e9), "hook_expert_weights": (0.0, 2.0)}[point]
    for value, is_used in ((low, False), (high, True)):

        def set_expert(act: Tensor, hook: nn.Module, value: float = value) -> Tensor:
            act[..., 3] = value
            return act

        with model.hooks([(HERE + point, set_expert)]):
            _, cache = model.run_with_cache(inputs, names_filter=HERE + "hook_expert_indices")
        used = (cache[HERE + "hook_expert_indices"] == 3).any(-1)
        assert used.all() if is_used else not used.any()


@torch.no_grad()
def test_the_choice_of_experts_can_be_written(
    experts: tuple[HookedAudioTransformer, AudioInputs],
) -> None:
    model, inputs = experts
    names = [HERE + "hook_expert_weights", "decoder.blocks.1.hook_mlp_out"]
    with model.hooks([(HERE + "hook_expert_indices", lambda act, hook: act * 0 + act.new([0, 1]))]):
        _, cache = model.run_with_cache(
            inputs, names_filter=[*names, "decoder.blocks.1.hook_resid_mid"]
        )
    block = model.decoder.blocks[1]
    x = block.ln2(cache["decoder.blocks.1.hook_resid_mid"])[0]
    weights = cache[names[0]][0, :, :2]
    weights = (weights / weights.sum(-1, keepdim=True)).double()
    expected = sum(weights[:, i, None] * block.mlp.experts.one(i, x) for i in range(2))
    assert torch.allclose(cache[names[1]][0], expected, atol=1e-12)
