"""Checkpoints and in-memory models are taken over strictly, and without a copy of the weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from audio_lens import HookedAudioTransformer, LoadingError, TokenError
from audio_lens.models.families.qwen2_audio import HookedQwen2Audio
from audio_lens.models.loading.checkpoints import embedded_path
from benchmarks import loading
from families import FAMILIES as ALL_FAMILIES
from tiny import hf_inputs, tiny_hf, tiny_qwen2_audio_hf, tiny_whisper_hf

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
    clip = 0.1 * torch.randn(16_000)
    inputs = embedded.prepare(clip, "which digit is first ?", sampling_rate=16_000)
    processor = transformers.AutoProcessor.from_pretrained(embedded_path())
    made = processor(
        text=inputs.text, audio=inputs.audio, sampling_rate=16_000, return_tensors="pt"
    )
    assert torch.equal(made["input_ids"], inputs.tokens)
    assert torch.allclose(made["input_features"], inputs.features)
    with torch.no_grad():
        theirs = hf(**made).logits
        assert (embedded(inputs) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


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
    question = (0.1 * torch.randn(16_000), "which digit is first ?", 16_000)
    assert torch.equal(model.prepare(*question).tokens, whole.prepare(*question).tokens)


def test_an_empty_tokenizer_is_none(saved: Path) -> None:
    """What transformers makes up where there are no tokenizer files."""
    transformers.WhisperFeatureExtractor(feature_size=20).save_pretrained(saved)
    model = load(saved)
    assert model.tokenizer is None
    with pytest.raises(TokenError, match="holds no words: its files are missing"):
        model.generate(hf_inputs("whisper"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    "stored, shards, how, most",
    [
        ("bfloat16", "50MB", "float32", 1.1),
        pytest.param("bfloat16", "50MB", "bfloat16", 0.2, marks=pytest.mark.slow),
        pytest.param("bfloat16", "10GB", "float32", 1.1, marks=pytest.mark.slow),
        pytest.param("float32", "50MB", "bfloat16", 1.1, marks=pytest.mark.slow),
        pytest.param("bfloat16", "50MB", "merged", 1.1, marks=pytest.mark.slow),
    ],
)
def test_never_two_copies_in_memory(
    tmp_path: Path, stored: str, shards: str, how: str, most: float
) -> None:
    """As stored, pages stay mapped from the file; cast, the new weights are the only copy."""
    loading.write_checkpoint(tmp_path, 4, 768, getattr(torch, stored), shards)
    found = loading.in_fresh_process("audio_lens", tmp_path, how)
    slack = 10 * loading.MIB  # tensors in flight
    assert found["peak"] <= most * found["weights"] + slack, found


# -------------------------------------------------------------------------------- key layouts


def in_memory(hf: transformers.PreTrainedModel) -> dict[str, Any]:
    """The weights under the names that transformers 5 gives them in memory; tied ones once."""
    by_memory = {x.data_ptr(): (key, x) for key, x in reversed(hf.state_dict().items())}
    return {key: tensor.contiguous() for key, tensor in by_memory.values()}


# transformers 5.10 to 5.23 doubled a piece of these names (its issue 45534)
_SINGLE = re.compile(r"^(model\.)?language_model\.(?!lm_head|model\.model)")
LAYOUTS = {
    "as saved": lambda key: key,
    "doubled": lambda key: _SINGLE.sub(lambda match: match[0] + "model.", key),
    "older weight norm": lambda key: key.replace(
        ".parametrizations.weight.original0", ".weight_g"
    ).replace(".parametrizations.weight.original1", ".weight_v"),
}


@pytest.mark.mostly_slow(8)
@pytest.mark.parametrize("from_memory", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name, one in ALL_FAMILIES.items() if one.is_hf])
def test_every_layout_of_keys_loads(
    name: str, layout: str, from_memory: bool, tmp_path: Path
) -> None:
    """Names that the hub, transformers in memory, and some of its versions on disk give weights."""
    hf = ALL_FAMILIES[name].build()
    hf.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = in_memory(hf) if from_memory else load_file(file)
    rewritten = {LAYOUTS[layout](key): tensor for key, tensor in stored.items()}
    if layout != "as saved" and rewritten.keys() == stored.keys():
        return  # this family has no such keys
    save_file(rewritten, file, metadata={"format": "pt"})
    expected = HookedAudioTransformer.from_hf(hf).state_dict()
    found = load(tmp_path).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    _check_strict(name, file, rewritten)


def _check_strict(name: str, file: Path, stored: dict[str, Any]) -> None:
    """A weight too few and one too many are named, in this layout as in any."""
    lost = next(key for key in stored if re.search(r"layers?\.1\..*\.weight$", key))
    save_file(
        {key: tensor for key, tensor in stored.items() if key != lost} | {"odd": torch.ones(2)},
        file,
        metadata={"format": "pt"},
    )
    with pytest.raises(LoadingError) as caught:
        load(file.parent)
    assert "missing keys: " in str(caught.value) and ".1." in str(caught.value)
    assert "unexpected keys: " in str(caught.value) and "odd" in str(caught.value)


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


@pytest.mark.parametrize("model_type", ["speech_to_text", "never_heard_of"])
def test_unsupported_architecture(saved: Path, model_type: str) -> None:
    edit_config(saved, lambda config: config.update(model_type=model_type))
    supported = r"not supported; supported: .*qwen2_audio.*whisper"
    with pytest.raises(LoadingError, match=supported) as error:
        load(str(saved))
    assert model_type in str(error.value)


def test_unsupported_model_in_memory() -> None:
    config = transformers.BertConfig(hidden_size=24, num_hidden_layers=1, vocab_size=5)
    with pytest.raises(
        LoadingError, match=r"'bert' is not supported; supported: .*qwen2_audio.*whisper"
    ):
        HookedAudioTransformer.from_hf(transformers.BertModel(config))


def test_other_modules_are_refused() -> None:
    with pytest.raises(LoadingError, match="not a Hugging Face model, but a Linear"):
        HookedAudioTransformer.from_hf(torch.nn.Linear(2, 2))


def test_another_head_is_refused() -> None:
    encoder = tiny_whisper_hf().model.encoder
    with pytest.raises(LoadingError, match="a WhisperEncoder is not implemented; implemented: Wh"):
        HookedAudioTransformer.from_hf(encoder)


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


PACKED = {  # how a linear map of so many outputs and inputs is stored, by kind of quantisation
    "bitsandbytes 8": lambda o, i: {"weight": (torch.int8, o, i), "SCB": (torch.float32, o)},
    "bitsandbytes 4": lambda o, i: {
        "weight": (torch.uint8, o * i // 2, 1),
        "weight.absmax": (torch.float32, o),
    },
    "awq, gptq": lambda o, i: {
        "qweight": (torch.int32, i, o // 8),
        "qzeros": (torch.int32, 1, o // 8),
        "scales": (torch.float16, 1, o),
    },
    "fp8": lambda o, i: {
        "weight": (torch.float8_e4m3fn, o, i),
        "weight_scale_inv": (torch.float32, 1, 1),
    },
    "bare fp8": lambda o, i: {"weight": (torch.float8_e4m3fn, o, i)},
    "bare int8": lambda o, i: {"weight": (torch.int8, o, i)},
}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_files_are_refused_whatever_the_config_says(
    saved: Path, family: str, kind: str
) -> None:
    """Transformers casts eight-bit numbers to floats without a word where the config is silent."""
    linear = first_norm(family).replace("self_attn_layer_norm.weight", "fc1")

    def pack(weights: dict) -> None:
        shape = weights.pop(f"{linear}.weight").shape
        for piece, (dtype, *size) in PACKED[kind](*shape).items():
            weights[f"{linear}.{piece}"] = torch.ones(size).to(dtype)

    edit_weights(saved, pack)
    with pytest.raises(LoadingError, match=r"quantised \(.*fc1.* is stored as"):
        load(saved)


@pytest.mark.parametrize("method", ["bitsandbytes", "awq", "gptq", "fp8", "compressed-tensors"])
def test_quantised_configs_are_refused_before_anything_is_read(saved: Path, method: str) -> None:
    edit_config(saved, lambda c: c.update(quantization_config={"quant_method": method}))
    (saved / "model.safetensors").write_bytes(b"never opened")
    with pytest.raises(LoadingError, match=rf"is quantised \({method}\)"):
        load(saved)


def test_dtypes_that_are_no_floats_are_refused(saved: Path) -> None:
    with pytest.raises(LoadingError, match=r"dtype is a floating-point dtype .* got torch\.int8"):
        load(saved, dtype=torch.int8)


def test_the_checkpoint_names_its_class(tmp_path: Path) -> None:
    """Of several classes of a family, the one in the config; another than those is refused."""
    ALL_FAMILIES["wav2vec2_ctc"].build().save_pretrained(tmp_path)
    assert load(tmp_path).cfg.output_kind == "ctc"
    edit_config(tmp_path, lambda c: c.update(architectures=["Wav2Vec2ForXVector"]))
    with pytest.raises(LoadingError, match=r"is a Wav2Vec2ForXVector; implemented: Wav2Vec2For"):
        load(tmp_path)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "'dynamic'",
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
    text = transformers.GemmaConfig(num_hidden_layers=1, hidden_size=32, vocab_size=20)
    config = transformers.Qwen2AudioConfig(text_config=text.to_dict())
    with pytest.raises(LoadingError, match=r"'gemma'.*implemented: llama"):
        HookedQwen2Audio.config_from_hf(config)


def test_processors_that_do_not_fit_are_refused(saved: Path) -> None:
    for extractor, message in [
        (transformers.WhisperFeatureExtractor(feature_size=80), "makes 80 mel bins, .* takes 20"),
        (
            transformers.WhisperFeatureExtractor(feature_size=20, sampling_rate=8000),
            "at 8000 Hz, the model at 16000",
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
