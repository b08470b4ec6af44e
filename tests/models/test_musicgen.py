"""MusicGen: it plays as transformers does; codes lie in time; text alone conditions it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from audio_lens import AudioInputs, HookedAudioTransformer, InputError, LoadingError, TokenError
from audio_lens.hooks import HookPoint
from audio_lens.models.families.musicgen import HookedMusicgen
from audio_lens.models.layers import KVCache
from audio_lens.models.loading.weights import renamed
from audio_lens.models.registry import family_of
from families.musicgen import N_BOOKS, N_CODES, N_WORDS, TINY_ENCODEC, batch, build

HOP, RATE = 8, 400  # 50 steps per second
STEP_S = HOP / RATE
STEREO = {"num_codebooks": 2 * N_BOOKS, "audio_channels": 2}
WORDS = [f"word{index}" for index in range(2, N_WORDS - 1)]


def playing(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, HookedMusicgen]:
    """Hugging Face's model and ours with its weights; it does not hold one note."""
    hf = build(dtype=dtype, seed=3, **options)
    with torch.no_grad():
        for table in hf.decoder.model.decoder.embed_tokens:
            table.weight.mul_(6)
    for name in ("pad_token_id", "bos_token_id", "decoder_start_token_id"):
        setattr(hf.generation_config, name, N_CODES)
    return hf, HookedAudioTransformer.from_hf(hf)


@pytest.fixture(scope="module")
def model() -> HookedMusicgen:
    return playing()[1]


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A word is a token; texts end with </s>, as T5's do."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", *WORDS, "<unk>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ending = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    backend.post_processor = ending
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def noise(n_clips: int, n_samples: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(0, 0.2, (n_clips, n_samples)).astype(np.float32)


def texts(**options: Any) -> dict[str, Tensor]:
    """A processor's mapping of text alone."""
    return {key: batch(**options)[key] for key in ("input_ids", "attention_mask")}


# -------------------------------------------------------------------------------- playing


@torch.no_grad()
def theirs(hf: nn.Module, given: dict[str, Tensor], n_new: int, scale: float | None) -> Tensor:
    return hf.generate(**given, do_sample=False, max_new_tokens=n_new, guidance_scale=scale)


@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"hidden_size": 32}, {"num_codebooks": 1}, STEREO],
    ids=["mono", "no connector", "one codebook", "stereo"],
)
def test_plays_as_hugging_face_does(options: dict, scale: float | None) -> None:
    hf, model = playing(**options)
    expected = theirs(hf, texts(), 24, scale)
    ours = model.generate(texts(), max_new_tokens=24, guidance_scale=scale or 1)
    lag = max(model.cfg.delays)
    assert ours.shape == (2, options.get("audio_channels", 1), HOP * (24 - lag))
    assert (ours - expected).abs().max() <= 1e-9 * expected.abs().max()
    codes = model.generate(
        texts(), max_new_tokens=24, guidance_scale=scale or 1, return_type="codes"
    )
    assert len(codes.unique()) > 3


@pytest.mark.parametrize("n_channels", [1, 2])
def test_goes_on_from_audio_as_hugging_face_does(n_channels: int) -> None:
    hf, model = playing(**(STEREO if n_channels == 2 else {}))
    audio = torch.tensor(noise(2 * n_channels, 11 * HOP)).double()
    given = {**texts(), "input_values": rearrange(audio, "(b c) n -> b c n", c=n_channels)}
    expected = theirs(hf, given, 10, 3.0)
    ours = model.generate(given, max_new_tokens=10, guidance_scale=3)
    assert (ours - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_the_checkpoints_own_guidance_is_taken_where_none_is_named() -> None:
    _, model = playing()
    plain = model.generate(texts(), max_new_tokens=12, return_type="codes")
    model.generation_config.guidance_scale = 3.0
    guided = model.generate(texts(), max_new_tokens=12, return_type="codes")
    same = model.generate(texts(), max_new_tokens=12, return_type="codes", guidance_scale=3)
    assert torch.equal(guided, same) and not torch.equal(guided, plain)


def test_hooks_run_at_every_step_and_in_both_passes(model: HookedMusicgen) -> None:
    seen: list[tuple[int, ...]] = []
    watch = ("decoder.blocks.1.hook_resid_post", lambda act, hook: seen.append(tuple(act.shape)))
    with model.hooks([watch]):
        model.generate(texts(), max_new_tokens=5, guidance_scale=1)
        assert seen == [(2, 1, 40)] * 5
        model.generate(texts(), max_new_tokens=5, guidance_scale=3)
    assert seen == [(2, 1, 40)] * 15


def test_what_a_hook_writes_changes_what_is_played(model: HookedMusicgen) -> None:
    plain = model.generate(texts(), max_new_tokens=8, return_type="codes")
    with model.hooks([("connector.hook_out", lambda act, hook: -act)]):
        changed = model.generate(texts(), max_new_tokens=8, return_type="codes")
    assert not torch.equal(plain, changed)


@torch.no_grad()
def test_step_by_step_equals_the_whole(model: HookedMusicgen) -> None:
    whole = model.as_inputs(batch(steps=(9, 9), dtype=torch.float64))
    encoded, past = model.encode(whole), KVCache()
    found = []
    for start, stop in ((0, 4), (4, 6), (6, 7), (7, 10)):
        step = AudioInputs(
            features=whole.features,
            tokens=whole.tokens[:, start:stop],
            further_tokens=whole.further_tokens[..., start:stop],
            clips_per_row=whole.clips_per_row,
            feature_mask=whole.feature_mask,
        )
        found.append(model(step, encoder_out=encoded if start == 0 else None, past=past))
    assert (torch.cat(found, dim=1) - model(whole)).abs().max() <= 1e-12


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guidance_scale": 0.5}, "guidance_scale is at least 1"),
        ({"max_new_tokens": 2}, "makes no whole step: codebooks lag by up to 2"),
        ({"max_new_tokens": 0}, "makes no whole step"),
    ],
)
def test_impossible_requests_raise(model: HookedMusicgen, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.generate(texts(), **options)


def test_padded_codes_cannot_be_continued(model: HookedMusicgen) -> None:
    with pytest.raises(InputError, match="padded cannot be continued"):
        model.generate(batch(steps=(6, 3)), max_new_tokens=8)


# -------------------------------------------------------------------------------- streams and loss


def test_streams_are_the_heads_side_by_side(model: HookedMusicgen) -> None:
    logits, cache = model.run_with_cache(batch(), names_filter="decoder.hook_out")
    assert model.cfg.streams == tuple((f"audio.{k}", N_CODES) for k in range(N_BOOKS))
    for k in range(N_BOOKS):
        head = model.decoder.unembed.weight[k * N_CODES : (k + 1) * N_CODES]
        own = model.stream(logits, f"audio.{k}")
        assert torch.allclose(own, cache["decoder.hook_out"] @ head.T)


@pytest.mark.parametrize("steps", [(6, 6), (7, 4)])
def test_the_loss_is_hugging_faces(steps: tuple[int, int]) -> None:
    hf, model = playing()
    given = batch(steps=steps, dtype=torch.float64)
    labels = rearrange(given["decoder_input_ids"], "(b k) t -> b t k", k=N_BOOKS)[:, 1:].clone()
    seen = given["decoder_attention_mask"]
    labels[~seen[:, 1:].bool()] = N_CODES  # is ignored
    shorter = {key: given[key][:, :-1] for key in ("decoder_input_ids", "decoder_attention_mask")}
    with torch.no_grad():
        expected = hf(**texts(), **shorter, labels=labels).loss
        assert model(given, return_type="loss").item() == pytest.approx(expected.item(), rel=1e-6)


def test_there_is_no_loss_where_nothing_follows(model: HookedMusicgen) -> None:
    with pytest.raises(InputError, match="no code to predict"):
        model(texts(), return_type="loss")


# -------------------------------------------------------------------------------- time


def entering_after(model: HookedMusicgen, audio: np.ndarray, step: int) -> list[list[int]]:
    """By codebook, the positions at which one step of the codec enters."""

    def other(codes: Tensor, hook: HookPoint) -> Tensor:
        codes[..., step] = (codes[..., step] + 1) % N_CODES
        return codes

    def entering() -> Tensor:
        return model.codes_of(model.prepare(audio, [4, 5], sampling_rate=RATE))[0]

    before = entering()
    with model.codec.hooks([("hook_codes", other)]):
        after = entering()
    return [
        (one != two).nonzero().flatten().tolist() for one, two in zip(before, after, strict=True)
    ]


@pytest.mark.parametrize("n_channels", [1, 2])
def test_a_step_of_the_codec_enters_where_the_map_says(n_channels: int) -> None:
    _, model = playing(**(STEREO if n_channels == 2 else {}))
    audio = noise(1, 12 * HOP)[0]
    inputs = model.prepare(audio, [4, 5], sampling_rate=RATE)
    assert inputs.shape == (1, 13)
    for step in (0, 5, 9):
        centre_s = (step + 0.5) * STEP_S
        for k, positions in enumerate(entering_after(model, audio, step)):
            lag = k // n_channels
            assert positions == [step + 1 + lag]
            seconds = model.stream_seconds(inputs, f"audio.{k}")[0]
            assert seconds[positions[0]].item() == pytest.approx(centre_s)
            earlier = torch.arange(13) <= lag  # nothing has entered yet
            assert torch.equal(seconds.isnan(), earlier)


def test_the_timeline_is_that_of_the_first_codebook(model: HookedMusicgen) -> None:
    clips = list(noise(2, 12 * HOP - 3))
    inputs = model.prepare(clips, [[4, 5], [6, 7]], sampling_rate=RATE)
    timeline = model.timeline(inputs)
    expected = model.stream_seconds(inputs, "audio.0")
    assert torch.equal(timeline.seconds("decoder")[1:], expected[0, 1:])
    assert timeline.seconds("decoder")[1:].tolist() == pytest.approx(
        [STEP_S * (step + 0.5) for step in range(12)]
    )
    assert timeline.duration_s() == pytest.approx((12 * HOP - 3) / RATE)
    assert timeline.positions("decoder", 0.03, 0.07) == slice(2, 4)
    assert not timeline.has_time("encoder") and not timeline.has_time("connector")


def test_a_click_is_in_the_codes_that_enter_about_its_second() -> None:
    hf, _ = playing(codec={"use_causal_conv": True})
    for name, parameter in hf.audio_encoder.named_parameters():
        if ".lstm." in name:
            parameter.data.zero_()  # it remembers
    model = HookedAudioTransformer.from_hf(hf)
    audio = noise(1, 40 * HOP)[0] / 50
    clicked = audio.copy()
    sample = 27 * HOP + 3
    clicked[sample] += 0.8
    before, after = (model.prepare(x, [4], sampling_rate=RATE) for x in (audio, clicked))
    differs = (model.codes_of(before) != model.codes_of(after))[0]
    seconds = torch.cat([model.stream_seconds(before, f"audio.{k}") for k in range(N_BOOKS)])
    first_s = seconds[differs].min().item()
    assert first_s == pytest.approx(sample / RATE, abs=STEP_S / 2)


def test_without_codes_nothing_has_a_time(model: HookedMusicgen) -> None:
    assert model.stream_seconds(texts(), "audio.1").isnan().all()
    assert not model.timeline(texts()).has_time("decoder")
    with pytest.raises(ValueError, match=r"no stream named 'text'; this model has audio\.0"):
        model.stream_seconds(texts(), "text")


# -------------------------------------------------------------------------------- inputs


def test_prepares_words(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    extractor = transformers.EncodecFeatureExtractor(sampling_rate=RATE)
    processor = transformers.MusicgenProcessor(extractor, tokenizer)
    model = HookedAudioTransformer.from_hf(build(dtype=torch.float64), processor)
    made = model.prepare(text=["word4 word7 word8", "word9"])
    expected = tokenizer(["word4 word7 word8", "word9"], padding=True, return_tensors="pt")
    assert torch.equal(made.features, expected.input_ids)
    assert torch.equal(made.feature_mask, expected.attention_mask.bool())
    assert made.tokens.tolist() == [[N_CODES]] * 2
    given = processor(text=["word4 word7 word8", "word9"], padding=True, return_tensors="pt")
    assert torch.equal(model(made), model({k: given[k] for k in ("input_ids", "attention_mask")}))


def test_prepares_pairs(model: HookedMusicgen) -> None:
    audio = noise(1, 5 * HOP)[0]
    inputs = model.prepare(audio, [4, 5, 1], sampling_rate=RATE)
    other_text = inputs.with_text([6, 5, 1])
    assert torch.equal(other_text.further_tokens, inputs.further_tokens)
    assert other_text.features.tolist() == [[6, 5, 1]]
    other_audio = inputs.with_audio(noise(1, 5 * HOP, seed=1)[0], sampling_rate=RATE)
    assert not torch.equal(other_audio.tokens, inputs.tokens)
    silent = model.prepare(text=[[4, 5], [6, 7]]).with_text([[4, 6], [6, 8]])
    assert silent.features.tolist() == [[4, 6], [6, 8]] and silent.tokens.shape == (2, 1)
    with pytest.raises(InputError, match="equal shapes"):
        inputs.with_text([6, 5])


def test_no_text_is_what_guidance_compares_with(model: HookedMusicgen) -> None:
    inputs = model.prepare(text=None)
    encoded = model.encode(inputs)
    assert not encoded.any()
    given = {**texts(words=(5,), steps=(0,)), "attention_mask": torch.zeros(1, 5, dtype=torch.long)}
    assert torch.allclose(model(inputs), model(given), rtol=0, atol=1e-12)
    both = model.prepare(text=[None, [4, 5]])
    assert torch.allclose(model(both)[:1], model(inputs), rtol=0, atol=1e-12)


def test_delays_what_a_processor_gives_of_audio(model: HookedMusicgen) -> None:
    audio = noise(2, 6 * HOP)
    prepared = model.prepare(list(audio), [[4, 5], [6, 7]], sampling_rate=RATE)
    given = {
        "input_ids": torch.tensor([[4, 5], [6, 7]]),
        "input_values": torch.tensor(audio)[:, None],
        "padding_mask": torch.ones(2, 1, 6 * HOP),
    }
    mapped = model.as_inputs(given)
    assert torch.equal(mapped.tokens, prepared.tokens)
    assert torch.equal(mapped.further_tokens, prepared.further_tokens)
    codes = model.codec.encode(torch.tensor(audio))
    assert torch.equal(mapped.tokens[:, 1:], codes[:, 0])
    assert torch.equal(mapped.further_tokens[:, 0, 2:8], codes[:, 1])  # the last of them lies ahead
    assert (mapped.further_tokens[:, 1, :3] == N_CODES).all()
    assert mapped.shape == (2, 7) and mapped.further_tokens.shape == (2, 2, 9)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_ids": None}, "plays what a text says"),
        ({"input_ids": torch.full((2, 7), N_WORDS)}, f"no word {N_WORDS}: the text's vocabulary"),
        ({"input_ids": torch.zeros(2, 7)}, "the text is token ids"),
        ({"attention_mask": torch.ones(2, 6)}, r"the text is \(2, 7\), its mask \(2, 6\)"),
        ({"decoder_input_ids": torch.zeros(4, 7, dtype=torch.long)}, "2 texts x 3 codebooks"),
        ({"decoder_input_ids": torch.full((6, 7), N_CODES + 1)}, "no code 17: codebooks have 16"),
        ({"input_values": torch.zeros(2, 1, 80)}, "not input_values too"),
        (
            {
                "decoder_input_ids": None,
                "input_values": torch.zeros(2, 1, 80),
                "padding_mask": torch.arange(160).reshape(2, 1, 80) > 3,
            },
            "unequal length",
        ),
        (
            {"decoder_input_ids": None, "input_values": torch.zeros(2, 2, 80)},
            "2 channels of audio, the model has 1",
        ),
        ({"labels": torch.zeros(1)}, "got unknown labels"),
    ],
)
def test_mappings_that_do_not_fit_raise(model: HookedMusicgen, change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model({**batch(), **change})


def test_clips_and_texts_that_do_not_fit_raise(model: HookedMusicgen) -> None:
    clips = [noise(1, 80)[0], noise(1, 96)[0]]
    with pytest.raises(InputError, match="unequal length"):
        model.prepare(clips, [[4], [5]], sampling_rate=RATE)
    with pytest.raises(InputError, match="3 texts need as many clips"):
        model.prepare(clips, [[4], [5], [6]], sampling_rate=RATE)
    with pytest.raises(TokenError, match="needs a tokenizer"):
        model.prepare(text="jazz")
    with pytest.raises(TokenError, match="writes codes, and 'jazz' is none"):
        model.to_single_token("jazz")
    lone = model.prepare(text=[4])
    lone.further_tokens = None
    with pytest.raises(InputError, match="codes of 1 codebooks were given, the model has 3"):
        model(lone)


# -------------------------------------------------------------------------------- loading


@pytest.fixture
def saved(tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> Path:
    playing(torch.float32)[0].save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    transformers.EncodecFeatureExtractor(sampling_rate=RATE).save_pretrained(tmp_path)
    return tmp_path


def test_loads_a_directory(saved: Path) -> None:
    model = HookedAudioTransformer.from_pretrained(saved, dtype=torch.float64)
    expected = playing(torch.float32)[1]
    assert model.dtype == model.codec.dtype == torch.float64
    ours = model.generate(model.prepare(text="word4 word9"), 8, return_type="codes")
    assert torch.equal(ours, expected.generate(model.prepare(text="word4 word9"), 8, "codes"))


def test_older_checkpoints_hold_a_table_of_positions(saved: Path) -> None:
    path = saved / "model.safetensors"
    table = {"decoder.model.decoder.embed_positions.weights": torch.zeros(2048, 40)}
    save_file(load_file(path) | table, path, metadata={"format": "pt"})
    assert isinstance(HookedAudioTransformer.from_pretrained(saved), HookedMusicgen)


@pytest.mark.parametrize(
    "name",
    [
        "enc_to_dec_proj.weight",
        "text_encoder.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.lm_heads.2.weight",
        "audio_encoder.quantizer.layers.1.codebook.embed",
    ],
)
def test_missing_weights_raise(saved: Path, name: str) -> None:
    path = saved / "model.safetensors"
    weights = load_file(path)
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(LoadingError, match=f"missing keys: {name}"):
        HookedAudioTransformer.from_pretrained(saved)


def test_every_published_weight_has_a_place_and_its_shape() -> None:
    """MusicGen small: T5-base, 24 blocks of 1024, EnCodec at 32 kHz."""
    config = transformers.MusicgenConfig(
        text_encoder=transformers.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12),
        audio_encoder=transformers.EncodecConfig(
            sampling_rate=32_000,
            upsampling_ratios=[8, 5, 4, 4],
            num_filters=64,
            codebook_size=2048,
            target_bandwidths=[2.2],
            use_causal_conv=False,
        ),
    )
    with torch.device("meta"):
        hf = transformers.MusicgenForConditionalGeneration(config)
        cfg = HookedMusicgen.config_from_hf(config)
        ours = HookedMusicgen(cfg)
        state = HookedMusicgen.adapt_state(hf.state_dict(), cfg)
    taken = renamed(state, HookedMusicgen.weight_names)
    assert {k: x.shape for k, x in taken.items()} == {
        k: x.shape for k, x in ours.state_dict().items()
    }
    assert cfg.step_s == 0.02 and cfg.codec.n_codebooks == len(cfg.streams) == 4
    assert cfg.delays == (0, 1, 2, 3)


def test_the_codec_is_no_part_of_the_model(model: HookedMusicgen) -> None:
    assert not any("codec" in name for name in [*model.state_dict(), *model.hook_dict])
    assert model.codec.cfg.frame_rate == 50
    bare = HookedMusicgen(model.cfg)
    with pytest.raises(InputError, match="without a codec"):
        _ = bare.codec


def test_melody_is_refused_by_name() -> None:
    config = transformers.MusicgenMelodyConfig(
        text_encoder=transformers.T5Config(num_layers=1),
        audio_encoder=transformers.EncodecConfig(**TINY_ENCODEC),
        decoder=transformers.MusicgenMelodyDecoderConfig(num_hidden_layers=1),
    )
    with pytest.raises(LoadingError, match=r"'musicgen_melody' is not supported; .* musicgen"):
        family_of(config)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"codec": {"codebook_size": 32}}, "writes 16 codes, the codec has 32"),
        ({"codec": {"normalize": True}}, "normalize=True"),
        ({"pad_token_id": 3}, "the initial code is 16"),
        ({"scale_embedding": True}, "scale_embedding=True is not implemented"),
        ({"num_codebooks": 5}, "has 3 codebooks, not 5"),
    ],
)
def test_what_is_not_implemented_is_refused(options: dict, message: str) -> None:
    with pytest.raises(LoadingError, match=message):
        HookedAudioTransformer.from_hf(build(**options))


def test_another_reader_of_text_is_refused() -> None:
    config = build().config
    config.text_encoder.model_type = "umt5"
    with pytest.raises(LoadingError, match="reads text with 'umt5'"):
        HookedMusicgen.config_from_hf(config)


# -------------------------------------------------------------------------------- half precision


@torch.no_grad()
def test_in_float16_the_text_encoder_stays_as_wide_as_transformers_keeps_it(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    hf = transformers.MusicgenForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float16
    )
    feed_forward = hf.text_encoder.encoder.block[0].layer[1].DenseReluDense
    assert feed_forward.wo.weight.dtype == torch.float32
    model = HookedAudioTransformer.from_hf(hf)
    given = texts()
    expected = hf.text_encoder(**given, output_hidden_states=True).hidden_states
    names = [*(f"encoder.blocks.{l}.hook_resid_pre" for l in range(3)), "encoder.hook_out"]
    _, cache = model.run_with_cache(given, names_filter=names)
    for name, own in zip(names, expected, strict=True):
        assert cache[name].dtype == own.dtype
        assert (cache[name] - own).abs().max() <= 2e-3 * own.abs().max(), name


@torch.no_grad()
def test_float16_stays_finite_where_the_text_encoders_stream_overflows() -> None:
    hf = build(text={"feed_forward_proj": "relu"})
    for layer in (0, 1):
        hf.text_encoder.encoder.block[layer].layer[0].SelfAttention.o.weight.mul_(3e4)
        hf.text_encoder.encoder.block[layer].layer[1].DenseReluDense.wo.weight.mul_(3e4)
    hf = hf.half()
    model = HookedAudioTransformer.from_hf(hf)
    name = "encoder.blocks.1.hook_resid_post"
    _, cache = model.run_with_cache(texts(), names_filter=[name, "hook_logits"])
    expected = hf.text_encoder(**texts(), output_hidden_states=True).hidden_states[2]
    assert cache[name].abs().max() == torch.tensor(64504.0).half()
    assert torch.equal(cache[name].abs() == 64504, expected.abs() == 64504)
    assert cache["hook_logits"].isfinite().all()


# -------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "settings",
    [
        {"suppress_tokens": [3, 5, 8], "begin_suppress_tokens": [1]},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.6},
        {"bad_words_ids": [[4], [7, 2]]},
        {"sequence_bias": [[[6], 0.8]]},
    ],
    ids=str,
)
def test_settings_act_on_codes_as_in_hugging_face(settings: dict[str, Any]) -> None:
    hf, model = playing()
    plain = model.generate(texts(), max_new_tokens=14)
    for name, value in settings.items():
        setattr(hf.generation_config, name, value)
    ours, expected = model.generate(texts(), max_new_tokens=14), theirs(hf, texts(), 14, None)
    assert (ours - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert not torch.equal(ours, plain)


def test_the_checkpoints_own_limit_is_taken_where_none_is_named() -> None:
    hf, model = playing()
    for name, value in (("max_length", 9), ("max_new_tokens", 7)):
        setattr(hf.generation_config, name, value)
        expected = hf.generate(**texts(), do_sample=False)
        assert model.generate(texts()).shape == expected.shape
        assert model.token_limit(texts()) == value
    for name, value in (("num_beams", 3), ("eos_token_id", 4)):
        setattr(hf.generation_config, name, value)
        with pytest.raises(InputError, match=rf"{name}={value} .* not implemented"):
            model.generate(texts())
        setattr(hf.generation_config, name, None)
