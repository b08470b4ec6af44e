"""Recipes and files that are broken or ask for too much: one kind of error, naming the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from audio_lens import LoadingError
from audio_lens.models.families.beats import HookedBeats
from audio_lens.recipes import (
    kimi_audio,
    llama_omni,
    llama_omni2,
    openai_whisper,
    qwen_audio,
    salmonn,
    soundwave,
)
from audio_lens.recipes.llama_omni import SECOND, llama_omni_of

OF_FOLDERS = (kimi_audio, llama_omni, llama_omni2, qwen_audio, soundwave)
MARKS = {  # what tells the config of a recipe
    "kimia_mimo_layers": 2,
    "speech_encoder_ds_rate": 5,
    "adapter_size": 4,
    "audio": {},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with some weights, whose config is to be written."""
    for where in (tmp_path, tmp_path / "whisper-large-v3"):
        where.mkdir(exist_ok=True)
        save_file({"a.weight": torch.ones(2)}, where / "model.safetensors")
        (where / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("recipe", OF_FOLDERS)
@pytest.mark.parametrize("text", ["{broken", "[]", "{}", "\xff"])
def test_broken_configs_are_named(recipe: Any, folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(LoadingError, match=r"config\.json|this config|cannot be loaded"):
        recipe(folder)


@pytest.mark.parametrize("recipe", OF_FOLDERS)
@pytest.mark.parametrize("key", ["num_hidden_layers", "kimia_mimo_layers", "encoder_layers"])
def test_more_layers_than_models_have(recipe: Any, folder: Path, key: str) -> None:
    (folder / "config.json").write_text(json.dumps({**MARKS, key: 10**9}))
    with pytest.raises(LoadingError, match=rf"config\.json asks for {key}=1e\+09"):
        recipe(folder)


@pytest.mark.parametrize("recipe", OF_FOLDERS)
@pytest.mark.parametrize("wrong", [0, -8, "many", None])
def test_impossible_sizes(recipe: Any, folder: Path, wrong: Any) -> None:
    sizes = dict.fromkeys(("hidden_size", "num_attention_heads", "num_key_value_heads"), wrong)
    (folder / "config.json").write_text(json.dumps({**MARKS, **sizes}))
    with pytest.raises(LoadingError):
        recipe(folder)


DIMS = {
    "n_mels": 20,
    "n_audio_ctx": 50,
    "n_audio_state": 32,
    "n_audio_head": 4,
    "n_audio_layer": 2,
    "n_vocab": 60,
    "n_text_ctx": 30,
    "n_text_state": 32,
    "n_text_head": 4,
    "n_text_layer": 3,
}


@pytest.mark.parametrize(
    "dims",
    [
        {},
        {**DIMS, "n_audio_head": 0},
        {**DIMS, "n_text_head": -4},
        {**DIMS, "n_audio_layer": 10**9},
        {**DIMS, "n_mels": 0},
        {**DIMS, "n_vocab": "many"},
        [1, 2],
    ],
    ids=str,
)
def test_openai_files_of_impossible_sizes(tmp_path: Path, dims: Any) -> None:
    torch.save({"dims": dims, "model_state_dict": {}}, tmp_path / "tiny.pt")
    with pytest.raises(LoadingError, match=r"tiny\.pt"):
        openai_whisper(tmp_path / "tiny.pt")


@pytest.mark.parametrize("held", [{}, {"encoder_attention_heads": 0}, {"encoder_layers": 10**9}])
def test_beats_of_impossible_sizes(tmp_path: Path, held: dict) -> None:
    cfg = {"input_patch_size": 16, "relative_position_embedding": True, "gru_rel_pos": True}
    torch.save({"cfg": {**cfg, **held}, "model": {}}, tmp_path / "beats.pt")
    with pytest.raises(LoadingError):
        HookedBeats.from_checkpoint(tmp_path / "beats.pt")


def test_numbers_that_are_none_are_named(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "salmonn.pth"
    torch.save({"model": {"a.weight": torch.tensor([torch.nan])}}, path)
    with pytest.raises(LoadingError, match=r"salmonn\.pth holds .* NaN or infinite: a\.weight"):
        salmonn(path, beats=path, llm="nowhere")
    save_file({"b.weight": torch.tensor([torch.inf])}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"speech_encoder_ds_rate": 5}))
    with pytest.raises(LoadingError, match=r"NaN or infinite: b\.weight"):
        llama_omni(folder)


@pytest.mark.parametrize("said", ["(1e9,", "(1000000000, 8, 2, 8)", "__import__('os')", "(1, 2)"])
def test_the_speaker_of_llama_omni_has_sizes(said: str) -> None:
    from audio_lens.models.loading.stored import told_of
    from audio_lens.recipes.llama_omni import _speaker

    text = SECOND.text(hidden_size=8, num_attention_heads=2)
    with pytest.raises(LoadingError), told_of("here"):
        _speaker({"ctc_decoder_config": said, "unit_vocab_size": 3}, text, {})
    with pytest.raises(LoadingError, match="no speech encoder"):
        llama_omni_of({}, {}, SECOND)
