"""Checkpoints and in-memory models are taken over strictly, and without a copy of the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import hf_inputs, tiny_hf, tiny_qwen2_audio_hf, tiny_whisper_hf

from audio_lens import HookedAudioTransformer, LoadingError, TokenError
from audio_lens.models.loading import embedded_path
from audio_lens.models.qwen2_audio import HookedQwen2Audio
from benchmarks import loading

load = HookedAudioTransformer.from_pretrained


@pytest.fixture
def saved(family: str, tmp_path: Path) -> Path:
    """A checkpoint of the family on disk."""
    tiny_hf(family).save_pretrained(tmp_path)
    return tmp_path


def edit_weights(path: Path, change: Any) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path: Path, change: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def first_norm(family: str) -> str:
    part = {"whisper": "model.encoder", "qwen2_audio": "audio_tower"}[family]
    return f"{part}.layers.0.self_attn_layer_norm.weight"


# -------------------------------------------------------------------------------- what loads


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_local_directory_whole_and_sharded(family: str, tmp_path: Path, shard_size: str) -> None:
    hf = tiny_hf(family)
    hf.save_pretrained(tmp_path, max_shard_size=shard_size)
    n_files = len(list(tmp_path.glob("*.safetensors")))
    assert n_files > 2 if shard_size == "20KB" else n_files == 1
    batch = hf_inputs(family)
    model = load(tmp_path)
    assert torch.equal(model(batch), HookedAudioTransformer.from_hf(hf)(batch))
    assert model.cfg.model_name == str(tmp_path)
    assert not model.training


def test_in_memory_model_shares_its_weights(family: str) -> None:
    hf = tiny_hf(family)
    model = HookedAudioTransformer.from_hf(hf)
    theirs = {p.data_ptr(): p for p in hf.parameters()}
    ours = {p.data_ptr(): p for p in model.parameters()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[where], theirs[where]) for where in ours)
    with torch.no_grad():
        hf.get_input_embeddings().weight.zero_()
    assert not model.decoder.token_embed.weight.any()


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_one_parameter(tied: bool) -> None:
    model = HookedAudioTransformer.from_hf(tiny_whisper_hf(tie_word_embeddings=tied))
    for moved in (model, model.to(torch.float64), model.to("cpu", torch.bfloat16)):
        is_one = moved.decoder.unembed.weight is moved.decoder.token_embed.weight
        assert is_one == tied


def test_tied_weights_are_tied_when_read_from_disk(tmp_path: Path) -> None:
    tiny_whisper_hf().save_pretrained(tmp_path)
    assert "proj_out.weight" not in load_file(tmp_path / "model.safetensors")
    model = load(str(tmp_path))
    assert model.decoder.unembed.weight is model.decoder.token_embed.weight


def test_dtype_and_device(saved: Path) -> None:
    edit_weights(saved, lambda weights: weights.update({k: w.half() for k, w in weights.items()}))
    edit_config(saved, lambda config: config.update(dtype="float16"))
    assert load(str(saved)).dtype == torch.float16
    model = load(str(saved), dtype=torch.float32, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.device == torch.device("cpu")
    assert load(str(saved), device="meta").device.type == "meta"


def test_embedded_checkpoint_loads_in_both_libraries(
    embedded: HookedAudioTransformer,
) -> None:
    hf = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(embedded_path())
    inputs = embedded.prepare(torch.randn(16_000), "which digit is first ?", sampling_rate=16_000)
    processor = transformers.AutoProcessor.from_pretrained(embedded_path())
    made = processor(
        text=inputs.text, audio=inputs.audio, sampling_rate=16_000, return_tensors="pt"
    )
    assert torch.equal(made["input_ids"], inputs.tokens)
    assert torch.allclose(made["input_features"], inputs.features)
    with torch.no_grad():
        theirs = hf(**made).logits
        assert (embedded(inputs) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_live_adapters_are_refused(family: str) -> None:
    hf = tiny_hf(family)
    hf.peft_config = {"default": None}
    with pytest.raises(LoadingError, match=r"LoRA adapters: pass .*merge_and_unload"):
        HookedAudioTransformer.from_hf(hf)


def test_merged_adapters_load() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_qwen2_audio_hf(), config)
    batch = hf_inputs("qwen2_audio")
    with torch.no_grad():
        expected = adapted(**batch).logits
    merged = HookedAudioTransformer.from_hf(adapted.merge_and_unload())
    attended = merged.as_inputs(batch).attended
    assert torch.allclose(merged(batch)[attended], expected[attended], atol=1e-4)


def test_a_processor_of_any_form_is_used() -> None:
    extractor = transformers.WhisperFeatureExtractor(feature_size=20)
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded_path())
    both = SimpleNamespace(feature_extractor=extractor, tokenizer=tokenizer)
    for processor in (extractor, tokenizer, both, None):
        model = HookedAudioTransformer.from_hf(tiny_whisper_hf(), processor)
        assert model.feature_extractor.feature_size == 20
        assert model.tokenizer is (tokenizer if processor in (tokenizer, both) else None)


def test_a_corrupt_tokenizer_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = Path(shutil.copytree(embedded_path(), tmp_path / "copy"))
    (path / "tokenizer.json").write_text("{nonsense")
    model = load(path)
    assert model.tokenizer is None and "AutoTokenizer says: Expecting" in caplog.text
    with pytest.raises(TokenError, match=r"loaded without one.*\(AutoTokenizer says: Expecting"):
        model.to_single_token(" seven")


def test_pieces_of_a_processor_are_used(tmp_path: Path) -> None:
    path = Path(shutil.copytree(embedded_path(), tmp_path / "copy"))
    (path / "processor_config.json").unlink()
    model, whole = load(path), load(embedded_path())
    assert model.to_single_token(" seven") == whole.to_single_token(" seven")
    question = (torch.randn(16_000), "which digit is first ?", 16_000)
    assert torch.equal(model.prepare(*question).tokens, whole.prepare(*question).tokens)


def test_an_empty_tokenizer_is_none(saved: Path) -> None:
    """What transformers makes up where there are no tokenizer files."""
    transformers.WhisperFeatureExtractor(feature_size=20).save_pretrained(saved)
    model = load(saved)
    assert model.tokenizer is None
    with pytest.raises(TokenError, match="holds no words: its files are missing"):
        model.generate(hf_inputs("whisper"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("dtype, share", [("bfloat16", 0.3), ("float32", 1.3)])
def test_never_two_copies_in_memory(tmp_path: Path, dtype: str, share: float) -> None:
    """As stored, pages stay mapped from the file; cast, the new weights are the only copy."""
    loading.write_checkpoint(tmp_path, n_layers=6, width=768)
    found = loading.in_fresh_process("audio_lens", tmp_path, dtype)
    assert found["peak"] <= share * found["weights"], found


# -------------------------------------------------------------------------------- what is refused


def test_missing_weight_is_named(saved: Path, family: str) -> None:
    edit_weights(saved, lambda weights: weights.pop(first_norm(family)))
    with pytest.raises(LoadingError, match=r"missing keys: .*layers\.0\.self_attn_layer_norm"):
        load(str(saved))


def test_unexpected_weight_is_named(saved: Path) -> None:
    edit_weights(saved, lambda weights: weights.update(surprise=torch.zeros(2)))
    with pytest.raises(LoadingError, match="unexpected keys: surprise"):
        load(str(saved))


def test_mismatched_shape_is_named(saved: Path, family: str) -> None:
    edit_weights(saved, lambda weights: weights.update({first_norm(family): torch.ones(7)}))
    with pytest.raises(LoadingError, match=r"layers\.0\.self_attn_layer_norm"):
        load(str(saved))


def test_lost_shard_is_an_error(family: str, tmp_path: Path) -> None:
    tiny_hf(family).save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises((LoadingError, OSError), match="00002"):
        load(str(tmp_path))


def test_pickles_are_not_opened(saved: Path) -> None:
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(LoadingError, match=r"only pickles \(pytorch_model\.bin\)"):
        load(str(saved))


def test_directories_that_are_no_checkpoint(saved: Path, tmp_path: Path) -> None:
    (saved / "config.json").unlink()
    with pytest.raises(LoadingError, match=r"holds no config\.json"):
        load(str(saved))
    with pytest.raises(LoadingError, match="is a file"):
        load(str(saved / "model.safetensors"))
    for nowhere in (
        str(tmp_path / "no"),
        tmp_path / "no",
        Path("no/where"),
        "./no",
        "no/",
        "../no",
    ):
        with pytest.raises(LoadingError, match=r"no such directory: .*no"):
            load(nowhere)


def test_corrupt_weights_are_named(saved: Path) -> None:
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"no weights at all"):
        file.write_bytes(broken)
        with pytest.raises(LoadingError, match=r"model\.safetensors is corrupt: "):
            load(str(saved))


@pytest.mark.parametrize("model_type", ["wav2vec2", "never_heard_of"])
def test_unsupported_architecture(saved: Path, model_type: str) -> None:
    edit_config(saved, lambda config: config.update(model_type=model_type))
    with pytest.raises(LoadingError, match="not supported; supported: whisper, qwen") as error:
        load(str(saved))
    assert model_type in str(error.value)


def test_unsupported_model_in_memory() -> None:
    config = transformers.BertConfig(hidden_size=24, num_hidden_layers=1, vocab_size=5)
    with pytest.raises(LoadingError, match="'bert' is not supported; supported: whisper, qwen2"):
        HookedAudioTransformer.from_hf(transformers.BertModel(config))


def test_other_modules_are_refused() -> None:
    with pytest.raises(LoadingError, match="not a Hugging Face model, but a Linear"):
        HookedAudioTransformer.from_hf(torch.nn.Linear(2, 2))


def test_another_head_is_refused() -> None:
    whisper = tiny_whisper_hf().model
    with pytest.raises(LoadingError, match=r"without a place .*encoder\.conv1"):
        HookedAudioTransformer.from_hf(whisper)


def test_quantised_weights_are_refused(saved: Path, family: str) -> None:
    hf = tiny_hf(family)
    layer = hf.get_input_embeddings()
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(LoadingError, match=r"quantised .*embed_tokens"):
        HookedAudioTransformer.from_hf(hf)
    quantised = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    edit_config(saved, lambda config: config.update(quantization_config=quantised))
    with pytest.raises(LoadingError, match="is quantised"):
        load(str(saved))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "'linear'",
        ),
    ],
)
def test_language_models_with_other_parts_are_refused(
    tmp_path: Path, changes: dict, named: str
) -> None:
    hf = tiny_qwen2_audio_hf(**changes)
    with pytest.raises(LoadingError, match=f"{named}.*not implemented"):
        HookedAudioTransformer.from_hf(hf)
    hf.save_pretrained(tmp_path)
    with pytest.raises(LoadingError, match=f"{named}.*not implemented"):
        load(str(tmp_path))


def test_other_language_models_are_refused() -> None:
    text = transformers.LlamaConfig(num_hidden_layers=1, hidden_size=32, vocab_size=20)
    config = transformers.Qwen2AudioConfig(text_config=text.to_dict())
    with pytest.raises(LoadingError, match=r"'llama'.*only qwen2 is implemented"):
        HookedQwen2Audio.config_from_hf(config)


def test_processors_that_do_not_fit_are_refused(saved: Path) -> None:
    for extractor, message in [
        (transformers.WhisperFeatureExtractor(feature_size=80), "makes 80 mel bins, .* takes 20"),
        (
            transformers.WhisperFeatureExtractor(feature_size=20, sampling_rate=8000),
            "at 8000 Hz, not 16000",
        ),
    ]:
        with pytest.raises(LoadingError, match=message):
            HookedAudioTransformer.from_hf(tiny_whisper_hf(), extractor)
        extractor.save_pretrained(saved)
        with pytest.raises(LoadingError, match=message):
            load(str(saved))


def test_offloaded_weights_are_refused(family: str) -> None:
    with pytest.raises(LoadingError, match="offloaded or empty"):
        HookedAudioTransformer.from_hf(tiny_hf(family).to("meta"))


def test_a_copy_of_the_embedded_directory_needs_its_config(tmp_path: Path) -> None:
    shutil.copytree(embedded_path(), tmp_path / "copy")
    assert load(str(tmp_path / "copy")).tokenizer is not None
