"""Files of checkpoints: where weights may lie, what may be asked for, what is said of others."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from audio_lens import HookedAudioTransformer, LoadingError
from audio_lens.models.loading.checkpoints import embedded_path, processor_of
from audio_lens.models.loading.stored import entries, read_json, told_of
from audio_lens.models.loading.weights import infinite, read_weights
from audio_lens.models.parts.codecs import HookedCodec
from families import FAMILIES
from tiny import tiny_hf, tiny_whisper_hf

load = HookedAudioTransformer.from_pretrained
INDEX, CONFIG = "model.safetensors.index.json", "config.json"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A Whisper on disk."""
    tiny_whisper_hf().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A Whisper on disk, in several files."""
    tiny_whisper_hf().save_pretrained(tmp_path / "model", max_shard_size="40KB")
    return tmp_path / "model"


def edit(path: Path, change: Callable[[dict], Any]) -> None:
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))


def rename_shard(folder: Path, name: str) -> Path:
    """Let the index name its first shard otherwise; returns the shard."""
    shard = sorted(folder.glob("model-*.safetensors"))[0]

    def change(held: dict) -> None:
        files = held["weight_map"]
        held["weight_map"] = {k: name if f == shard.name else f for k, f in files.items()}

    edit(folder / INDEX, change)
    return shard


# -------------------------------------------------------------------------------- where weights lie


@pytest.mark.parametrize("where", ["../{}", "/{}", "sub/../../{}", "..\\{}"])
def test_an_index_names_no_file_outside(sharded: Path, where: str) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    name = where.format(str(sharded.parent / shard.name)[1:] if where[0] == "/" else shard.name)
    rename_shard(sharded, name)
    shard.rename(sharded.parent / shard.name)
    with pytest.raises(LoadingError, match=r"index\.json names .* lies outside of the checkpoint"):
        load(sharded)


def test_an_index_names_no_link_that_leads_out(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    elsewhere = shard.rename(sharded.parent / shard.name)
    shard.symlink_to(elsewhere)
    with pytest.raises(LoadingError, match=r"a link to .* lies outside of the checkpoint: copy"):
        load(sharded)


def test_links_of_the_hub_cache_load(sharded: Path, tmp_path: Path) -> None:
    """A snapshot there is a folder of links to where the files are kept by their hashes."""
    expected = load(sharded).state_dict()
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sharded.iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(os.path.join("..", "..", "blobs", str(number)))
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link"):
        found = load(folder).state_dict()
        assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.pkl"])
def test_an_index_names_no_pickles(sharded: Path, name: str) -> None:
    shard = rename_shard(sharded, name)
    torch.save(load_file(shard), sharded / name)
    with pytest.raises(LoadingError, match=rf"names '{name}', which is no safetensors: others can"):
        load(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "adapter_model.bin", "odd.safetensors"])
def test_a_config_names_no_other_weights(saved: Path, name: str) -> None:
    edit(saved / CONFIG, lambda held: held.update(transformers_weights=name))
    with pytest.raises(LoadingError, match=r"outside|no safetensors|holds no odd"):
        load(saved)


def test_a_config_may_name_its_weights(saved: Path) -> None:
    expected = load(saved).state_dict()
    (saved / "model.safetensors").rename(saved / "other.safetensors")
    with pytest.raises(LoadingError, match=r"holds no model\.safetensors and no model\.safetens"):
        load(saved)
    edit(saved / CONFIG, lambda held: held.update(transformers_weights="other.safetensors"))
    found = load(saved).state_dict()
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize(
    "index, message",
    [
        ({}, "no weight_map and metadata"),
        ({"metadata": {}, "weight_map": []}, "no weight_map and metadata"),
        ({"weight_map": {"a": "model.safetensors"}}, "no weight_map and metadata"),
        ({"metadata": {}, "weight_map": {"a": 3}}, "names 3, which is no safetensors"),
        ({"metadata": {}, "weight_map": {"a": "b.safetensors"}}, "b.safetensors, which is not"),
        ([], "holds a list where a mapping belongs"),
    ],
)
def test_indices_that_are_none(sharded: Path, index: Any, message: str) -> None:
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(LoadingError, match=rf"index\.json .*{message}"):
        load(sharded)


def test_an_adapter_beside_a_model_is_no_pickle(saved: Path) -> None:
    (saved / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    torch.save({}, saved / "adapter_model.bin")
    with pytest.raises(LoadingError, match=r"and no adapter_model\.safetensors: others can run"):
        load(saved)


# -------------------------------------------------------------------------------- how much is asked


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 20_000_000},
        {"d_model": 16_384},
        {"max_target_positions": 20_000_000},
        {"encoder_ffn_dim": 10_000_000},
        pytest.param({"decoder_layers": 999}, marks=pytest.mark.slow),
        {"decoder_layers": 1_001},
        {"encoder_layers": 10**9},
        {"max_source_positions": 10**9},
        {"num_labels": 10**9},
    ],
    ids=str,
)
def test_a_config_larger_than_its_file_is_refused_before_it_is_built(
    saved: Path, change: dict
) -> None:
    edit(saved / CONFIG, lambda held: held.update(change))
    before = peak()
    with pytest.raises(LoadingError, match=r"config\.json (describes a model of|asks for)"):
        load(saved)
    assert peak() - before < 200 * 2**20


def test_codecs_are_measured_too(tmp_path: Path) -> None:
    config = transformers.EncodecConfig(num_filters=4, hidden_size=8, codebook_size=16)
    transformers.EncodecModel(config).save_pretrained(tmp_path)
    HookedCodec.from_pretrained(tmp_path)
    edit(tmp_path / CONFIG, lambda held: held.update(codebook_size=2**30))
    with pytest.raises(LoadingError, match="describes a model of"):
        HookedCodec.from_pretrained(tmp_path)


def test_misfits_are_named(saved: Path) -> None:
    edit(saved / CONFIG, lambda held: held.update(vocab_size=20_000_000))
    with pytest.raises(LoadingError, match=r"embed_tokens.* is \(100, 32\), not \(20000000, 32\)"):
        load(saved)


# -------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize(
    "file",
    [
        CONFIG,
        "generation_config.json",
        "processor_config.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
    ],
)
@pytest.mark.parametrize("text", ["{broken", "", "[1, 2]", "\xff\xfe", "[" * 100_000])
def test_broken_json_is_named(tmp_path: Path, file: str, text: str) -> None:
    folder = Path(shutil.copytree(embedded_path(), tmp_path / "copy"))
    (folder / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(LoadingError, match=rf"{file} (is no valid JSON|holds a list where)"):
        load(folder)


def test_a_broken_index_is_named(sharded: Path) -> None:
    (sharded / INDEX).write_text("{broken")
    with pytest.raises(LoadingError, match=r"index\.json is no valid JSON: Expecting"):
        load(sharded)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 8 + b"{}", (2**36).to_bytes(8, "little"), (9).to_bytes(8, "little") + b"{" * 9],
)
def test_broken_shards_are_named(sharded: Path, content: bytes) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(content)
    with pytest.raises(LoadingError, match=f"{shard.name} is corrupt: "):
        load(sharded)


def test_a_lost_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(LoadingError, match=rf"index\.json names {shard.name}, which is not there"):
        load(sharded)


# -------------------------------------------------------------------------------- impossible sizes


QUICK = ("whisper", "granite_speech", "wav2vec2", "qwen2_audio")  # to be tried in
WHISPER_SIZES = [
    {"encoder_attention_heads": 0},
    {"decoder_attention_heads": 0},
    {"encoder_attention_heads": -4},
    {"encoder_attention_heads": 5},
    {"d_model": 0},
    {"d_model": -32},
    {"d_model": "many"},
    {"d_model": None},
    {"vocab_size": 0},
    {"vocab_size": -3},
    {"encoder_layers": -1},
    {"decoder_layers": 2.5},
    {"num_mel_bins": 0},
    {"max_source_positions": -110},
    {"activation_function": "wishful"},
    {"activation_function": None},
    {"pad_token_id": 100_000},
]


@pytest.mark.parametrize("change", WHISPER_SIZES, ids=str)
def test_impossible_sizes_are_refused(saved: Path, change: dict) -> None:
    edit(saved / CONFIG, lambda held: held.update(change))
    with pytest.raises(LoadingError):
        load(saved)


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name, one in FAMILIES.items()
        if one.is_hf
    ],
)
def test_every_family_refuses_impossible_sizes(name: str, tmp_path: Path) -> None:
    """Whatever in its config counts heads or numbers; what loads is read by nothing."""
    tiny_hf(name).save_pretrained(tmp_path)
    batch = FAMILIES[name].batch()
    expected = load(tmp_path)(batch)
    whole = json.loads((tmp_path / CONFIG).read_text())
    for part in [None, *(key for key, held in whole.items() if isinstance(held, dict))]:
        config = whole if part is None else whole[part]
        for key in [key for key in config if key.endswith(("_heads", "hidden_size", "d_model"))]:
            for wrong in (0, -6, 7, "six"):
                changed = {**config, key: wrong}
                held = changed if part is None else {**whole, part: changed}
                (tmp_path / CONFIG).write_text(json.dumps(held))
                try:
                    found = load(tmp_path)
                except LoadingError:
                    continue
                assert torch.equal(found(batch), expected), (part, key, wrong)


# -------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers_are_named(
    saved: Path, wrong: float, dtype: torch.dtype
) -> None:
    weights = {key: x.to(dtype) for key, x in load_file(saved / "model.safetensors").items()}
    weights["model.decoder.layers.1.fc1.bias"][3] = wrong
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    named = r"NaN or infinite: model\.decoder\.layers\.1\.fc1\.bias$"
    with pytest.raises(LoadingError, match=named):
        load(saved)
    with pytest.raises(LoadingError, match=named):
        read_weights(saved)


def test_weights_in_memory_that_are_no_numbers_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever trains a model may want to see where it breaks."""
    hf = tiny_whisper_hf()
    with torch.no_grad():
        hf.model.decoder.embed_tokens.weight[2, 3] = torch.nan
    HookedAudioTransformer.from_hf(hf)
    assert "NaN or infinite: model.decoder.embed_tokens.weight" in caplog.text


def test_only_what_has_numbers_can_have_wrong_ones() -> None:
    held = {
        "none": torch.zeros(0),
        "whole": torch.tensor([1, 2]),
        "empty": torch.zeros(2, device="meta"),
        "one": torch.tensor(torch.nan),
        "largest": torch.tensor([torch.finfo(torch.float32).max] * 9),
    }
    held["again"] = held["one"]
    assert infinite(held) == ["one"]


# -------------------------------------------------------------------------------- errors of others


def test_errors_of_others_become_ours() -> None:
    for error, kind, said in (
        (KeyError("x"), LoadingError, r"^here/nowhere cannot be loaded: 'x' \(KeyError\)$"),
        (OSError("no route"), OSError, "^here/nowhere cannot be loaded: no route$"),
        (LoadingError("mine"), LoadingError, "^mine$"),
    ):
        with pytest.raises(kind, match=said) as raised, told_of("here/nowhere"):
            raise error
        assert isinstance(raised.value, LoadingError)


def test_entries_at_any_depth() -> None:
    held = {"a": 1, "b": [{"c": 2}, [{"d": {"e": 3}}]]}
    assert {"a": 1, "c": 2, "e": 3}.items() <= dict(entries(held)).items()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoadingError, match=r"none\.json cannot be read: No such file"):
        read_json(tmp_path / "none.json")
    assert processor_of(str(tmp_path))[1]  # nothing there is no error, and told
