"""Granite-Speech beyond parity: its features, its windows in time, its adapter, its refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

from audio_lens import HookedAudioTransformer
from audio_lens.audio import AudioError
from audio_lens.inputs import InputError
from audio_lens.models.config import LoadingError
from audio_lens.models.families.granite_speech import GraniteMel, HookedGraniteSpeech
from families.base import AUDIO_TOKEN, PAD
from families.granite_speech import batch, build, clips, token_count


def loaded(**options: Any) -> tuple[transformers.PreTrainedModel, HookedGraniteSpeech]:
    hf = build(**options)
    hf.generation_config.pad_token_id = PAD
    return hf, HookedAudioTransformer.from_hf(hf)


def noise(n_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, n_samples).astype(np.float32)


def text_only(words: tuple[int, ...] = (7, 8, 9, 10)) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([words]), "attention_mask": torch.ones(1, len(words)).long()}


# -------------------------------------------------------------------------------- features


@pytest.mark.parametrize("n_samples", [(16_000,), (16_001,), (15_999,), (9_700, 24_123), (258,)])
def test_features_are_those_of_the_processor(n_samples: tuple[int, ...]) -> None:
    """To the precision of a float32 spectrum, 80 dB below its loudest place."""
    pytest.importorskip("torchaudio", exc_type=(ImportError, OSError))
    waves = [noise(n, seed) for seed, n in enumerate(n_samples)]
    made = transformers.GraniteSpeechFeatureExtractor()(waves)
    _, model = loaded(input_dim=160)
    ours = model.extract_features(waves)
    theirs, mask = model.cut(made["input_features"], made["input_features_mask"])[:2]
    assert (ours["features"] - theirs).abs().max() < 1e-4
    assert ours["mask"].shape == mask.shape
    assert [model.token_count(n) for n in ours["mask"].sum(1).tolist()] == made["audio_embed_sizes"]
    assert (ours["mask"] <= mask).all()  # the processor's mask knows whole windows only


def test_silence_and_level() -> None:
    """The loudest band is the reference of everything else, and 80 dB below it is the floor."""
    _, model = loaded(input_dim=160)
    wave = np.zeros(16_000, dtype=np.float32)
    wave[8_000] = 1.0
    features = model.extract_features([wave])["features"][0]
    assert features[:, :40].unique().numel() == 1
    assert features.max() - features.min() == pytest.approx(8.0 / 4, abs=1e-5)


def test_too_short_a_clip_is_refused() -> None:
    _, model = loaded()
    with pytest.raises(AudioError, match="257 or more"):
        model.load_audio(noise(256), 16_000)
    assert len(model.load_audio(noise(257), 16_000)) == 257


# -------------------------------------------------------------------------------- time


@pytest.mark.parametrize("seconds", [0.3, 0.32, 0.61, 1.0])
def test_tokens_of_a_window_share_its_middle(seconds: float) -> None:
    """0.3 w + 0.145 s, but of the window in which the clip ends the middle of what it holds."""
    _, model = loaded()
    inputs = clips(model, [noise(int(16_000 * seconds))])
    timeline = model.timeline(inputs)
    centres = timeline.seconds("connector")
    n_frames = (int(16_000 * seconds) // 160 + 1) // 2
    assert timeline.seconds("encoder").tolist() == pytest.approx(
        [0.02 * i + 0.005 for i in range(n_frames)]
    )
    windows = [range(n_frames)[start : start + 15] for start in range(0, n_frames, 15)]
    middles = [0.02 * (w[0] + w[-1]) / 2 + 0.005 for w in windows]
    assert centres.tolist() == pytest.approx([m for m in middles for _ in range(3)])
    assert centres.max() < timeline.duration_s()
    span = timeline.audio_span
    assert span.stop - span.start == len(centres) == token_count(n_frames)
    assert torch.equal(timeline.seconds("decoder")[span], centres)


def test_perturbing_one_window_moves_only_its_own_tokens() -> None:
    _, model = loaded(dtype=torch.float64)
    inputs = model.as_inputs(batch(lengths=[47], words=[4], dtype=torch.float64))

    def change(act: Tensor, hook: Any) -> Tensor:
        act[:, 20] += 1
        return act

    with torch.no_grad(), model.hooks([("connector.hook_in", change)]):
        changed = model.encode(inputs)
    moved = (changed - model.encode(inputs)).abs().amax(-1)[0] > 1e-9
    assert moved.nonzero().flatten().tolist() == [3, 4, 5]


# -------------------------------------------------------------------------------- the encoder


def test_streams_may_enter_on_either_side_of_the_middle() -> None:
    """The predictions are fed back behind block 1 of 4, and belong to the stream entering 2."""
    _, model = loaded(num_layers=4)
    inputs = model.as_inputs(batch())
    names = [f"encoder.blocks.{layer}.hook_resid_pre" for layer in range(4)]
    last, added = "encoder.blocks.1.hook_normalized_resid_post", "encoder.ctc.hook_out"
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, names_filter=[*names, last, added])
        for layer, name in enumerate(names):
            assert torch.equal(model(inputs, stop_at_layer=f"encoder.{layer}"), cache[name])
            again = model(cache[name], start_at_layer=f"encoder.{layer}", inputs=inputs)
            assert torch.equal(again, logits)
    assert torch.equal(cache[names[2]], cache[last] + cache[added])


def test_patterns_of_the_encoder_stay_in_their_blocks() -> None:
    """As large as all positions, whoever asks; what is written outside a block takes effect."""
    _, model = loaded(dtype=torch.float64)
    inputs = model.as_inputs(batch(dtype=torch.float64))
    name = "encoder.blocks.0.attn.hook_pattern"
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, names_filter=name)
        own = torch.arange(93) // 20
        inside = own[:, None] == own
        assert (cache[name][..., ~inside] == 0).all()
        assert torch.allclose(cache[name].sum(-1), torch.ones(2, 4, 93).double())
        assert torch.allclose(model(inputs), logits, atol=1e-12)

        def across(pattern: Tensor, hook: Any) -> Tensor:
            pattern[:, :, 0, 50] = 1.0
            return pattern

        moved = model.run_with_hooks(inputs, fwd_hooks=[(name, across)])
    assert not torch.allclose(moved, logits, atol=1e-6)


def test_windowed_attention_takes_no_other_mask() -> None:
    _, model = loaded()
    attn = model.encoder.blocks[0].attn
    x = torch.zeros(1, 5, 4, 8)
    with pytest.raises(ValueError, match="no mask and no bias"):
        attn.mix(x, x, x, torch.ones(1, 1, 5, 5, dtype=torch.bool))


def test_batch_norm_stays_frozen_in_training_mode() -> None:
    _, model = loaded()
    before = model(batch())
    model.train()
    assert torch.equal(model(batch()), before)


# -------------------------------------------------------------------------------- text


@pytest.mark.parametrize("padding", ["left", "one prompt"])
def test_writes_what_hugging_face_writes(padding: str) -> None:
    hf, model = loaded()
    options = {"padding": "left"} if padding == "left" else {"lengths": [61], "words": [4]}
    given = batch(**options)
    theirs = hf.generate(**given, max_new_tokens=12, do_sample=False)
    ours = model.generate(given, max_new_tokens=12, return_type="tokens")
    assert torch.equal(ours, theirs)


TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}assistant"


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = ["<pad>", "<unknown>", "user", "assistant", "what", "is", "said"]
    ids = {word: index for index, word in enumerate(words)} | {"<|audio|>": AUDIO_TOKEN}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, "<unknown>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unknown>",
        additional_special_tokens=["<|audio|>"],
        chat_template=TEMPLATE,
    )


def test_questions_are_put_into_the_chat_template() -> None:
    processor = SimpleNamespace(tokenizer=tokenizer(), audio_processor=GraniteMel(20, 16_000))
    model = HookedAudioTransformer.from_hf(build(), processor)
    assert model.feature_extractor is processor.audio_processor
    inputs = model.prepare([noise(9_700), noise(16_000)], " what is said", sampling_rate=16_000)
    assert inputs.text == ["user <|audio|> what is said assistant"] * 2
    assert inputs.clips_per_row == (1, 1)
    counts = (inputs.tokens == AUDIO_TOKEN).sum(1).tolist()
    assert counts == [token_count(30), token_count(50)]
    assert model(inputs).isfinite().all()
    spoken = [{"role": "user", "content": "<|audio|> what is said"}]
    assert model.prepare(noise(9_700), spoken, 16_000).text == inputs.text[:1]


# -------------------------------------------------------------------------------- the adapter


@pytest.fixture
def adapted() -> transformers.PreTrainedModel:
    """With a LoRA adapter beside queries and values of the language model."""
    peft = pytest.importorskip("peft")
    hf = build()
    hf.generation_config.pad_token_id = PAD
    torch.manual_seed(0)
    hf.add_adapter(
        peft.LoraConfig(
            r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        )
    )
    return hf.eval()


@torch.no_grad()
def test_live_adapter_on_and_off(adapted: transformers.PreTrainedModel) -> None:
    model, given = HookedAudioTransformer.from_hf(adapted), batch()
    counts = given["attention_mask"].bool()
    on = adapted(**given).logits[counts]
    assert torch.allclose(model(given)[counts], on, atol=1e-5)
    adapted.disable_adapters()
    off = adapted(**given).logits[counts]
    assert (on - off).abs().max() > 0.01
    with model.lora_disabled():
        assert torch.allclose(model(given)[counts], off, atol=1e-5)


@torch.no_grad()
def test_text_alone_is_answered_without_the_adapter(adapted: transformers.PreTrainedModel) -> None:
    model, given = HookedAudioTransformer.from_hf(adapted), text_only()
    with pytest.raises(InputError, match="hold no audio"):
        model(given)
    ours = model.generate(given, max_new_tokens=8, return_type="tokens")
    assert torch.equal(ours, adapted.generate(**given, max_new_tokens=8, do_sample=False))
    assert model.lora.enabled
    with model.lora_disabled():
        adapted.disable_adapters()
        assert torch.allclose(model(given), adapted(**given).logits, atol=1e-5)
        assert model.timeline(given).n_clips == 0


@torch.no_grad()
def test_adapter_beside_the_model_is_loaded_live(
    adapted: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    """As released checkpoints have it: one directory holds both."""
    build().save_pretrained(tmp_path)
    transformers.PreTrainedModel.save_pretrained(adapted, tmp_path)  # the adapter alone
    model, given = HookedAudioTransformer.from_pretrained(tmp_path), batch()
    assert model.lora.enabled
    assert torch.equal(model(given), HookedAudioTransformer.from_hf(adapted)(given))
    merged = HookedAudioTransformer.from_pretrained(tmp_path, merge=True)
    assert torch.allclose(merged(given), model(given), atol=1e-5)


def test_a_missing_adapter_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    loaded()
    assert not caplog.records
    loaded(has_lora_adapter=True)
    assert "LoRA adapter for audio" in caplog.text


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options, message",
    [
        ({"former_use_qformer_text_input": True}, "use_qformer_text_input=True"),
        ({"former_model_type": "bert"}, "'bert' is not implemented"),
        ({"input_dim": 41}, "41 features"),
        ({"num_layers": 1}, "1 layers"),
        ({"downsample_rate": 4}, "windows of 15"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_what_is_not_implemented_is_refused(options: dict[str, Any], message: str) -> None:
    config = build().config
    for name, value in options.items():
        part = next(
            (p for p in (config.encoder_config, config.text_config) if hasattr(p, name)), config
        )
        if name.startswith("former_"):
            part, name = config.projector_config, name.removeprefix("former_")
        part.__dict__[name] = value
    with pytest.raises(LoadingError, match=message):
        HookedGraniteSpeech.config_from_hf(config)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b.update(input_features=b["input_features"][..., :39]), "pairs of frames, 40"),
        (lambda b: b.update(input_features_mask=b["input_features_mask"][:, :3]), "21 for these"),
        (lambda b: b.update(input_ids=b["input_ids"] + 60), "the vocabulary has 100"),
        (lambda b: b.update(input_ids=b["input_ids"].clamp(max=89)), "0 audio placeholders"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    _, model = loaded()
    given = batch()
    change(given)
    with pytest.raises(InputError, match=message):
        model.as_inputs(given)


def test_one_query_per_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees nothing of other queries: its self-attention hands on its values."""
    monkeypatch.setattr("families.granite_speech.QUERIES", 1)
    hf = build(dtype=torch.float64, downsample_rate=15, window_size=15)
    given = batch(dtype=torch.float64)
    model = HookedAudioTransformer.from_hf(hf)
    with torch.no_grad(), model.attention("explicit"):
        ours, theirs = model(given), hf(**given).logits
    attended = given["attention_mask"].bool()
    assert torch.allclose(ours[attended], theirs[attended], atol=1e-12, rtol=0)
    seconds = model.timeline(given)[0].seconds("connector")
    assert seconds[:3].tolist() == pytest.approx([0.145, 0.445, 0.745])
