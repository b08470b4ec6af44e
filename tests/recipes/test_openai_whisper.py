"""Whisper from openai's own files, against their model as published."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from audio_lens.models.config import LoadingError
from audio_lens.recipes.openai_whisper import openai_whisper
from families.base import randomise
from published.llama_omni import Whisper

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


def published(dtype: torch.dtype = torch.float32, **dims: int) -> Whisper:
    model = randomise(Whisper({**DIMS, **dims}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln" in name and name.endswith("weight"):
                parameter += 1
    return model.to(dtype)


def saved(model: Whisper, path: Path, **changes: Any) -> Path:
    """As openai's files have it; ``changes`` are to what the file holds."""
    torch.save({"dims": model.dims, "model_state_dict": model.state_dict(), **changes}, path)
    return path


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_equal_to_openai(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    theirs = published(dtype)
    model = openai_whisper(saved(theirs, tmp_path / "tiny.pt"))
    mel, tokens = torch.randn(2, 20, 100, dtype=dtype), torch.randint(60, (2, 7))
    names = ["encoder.hook_out", "encoder.blocks.1.attn.hook_pattern"]
    batch = {"input_features": mel, "decoder_input_ids": tokens}
    logits, cache = model.run_with_cache(batch, names_filter=names)
    heard = theirs.encoder(mel)
    torch.testing.assert_close(logits, theirs(mel, tokens), rtol=0, atol=tolerance * logits.max())
    torch.testing.assert_close(cache[names[0]], heard, rtol=0, atol=tolerance * heard.max())
    assert model.dtype == dtype


def test_the_unembedding_is_the_embedding(tmp_path: Path) -> None:
    model = openai_whisper(saved(published(), tmp_path / "tiny.pt"), dtype=torch.float16)
    assert model.decoder.unembed.weight is model.decoder.token_embed.weight
    assert model.dtype == torch.float16


@pytest.mark.parametrize(
    "n_vocab, expected",
    [
        (51_864, [50257, 50256, 50362]),  # whisper-tiny.en's generation_config.json
        (51_865, [50258, 50257, 50363, 50357, 50358, 50359]),  # whisper-tiny's
        (51_866, [50258, 50257, 50364, 50358, 50359, 50360]),  # whisper-large-v3's
    ],
)
def test_control_tokens(tmp_path: Path, n_vocab: int, expected: list[int]) -> None:
    model = openai_whisper(saved(published(n_vocab=n_vocab), tmp_path / "tiny.pt"))
    config = model.generation_config
    found = [config.decoder_start_token_id, config.eos_token_id, config.no_timestamps_token_id]
    if config.lang_to_id:
        found += [list(config.lang_to_id.values())[-1], *config.task_to_id.values()]
        assert config.lang_to_id["<|en|>"] == 50259
        assert model.prompt("de") == [50258, 50261, expected[5], expected[2]]
    else:
        assert model.prompt() == [50257, 50362]
    assert found == expected
    assert config.suppress_tokens[-1] == expected[2] - 1


def test_weights_and_files_are_checked(tmp_path: Path) -> None:
    model, path = published(), tmp_path / "tiny.pt"
    state = model.state_dict()
    lacking = {name: x for name, x in state.items() if name != "encoder.blocks.1.attn.key.weight"}
    with pytest.raises(LoadingError, match=r"missing weights: encoder\.blocks\.1\.attn\.k_proj"):
        openai_whisper(saved(model, path, model_state_dict=lacking))
    with pytest.raises(LoadingError, match=r"without a place in this model: encoder\.odd"):
        openai_whisper(
            saved(model, path, model_state_dict={**state, "encoder.odd.weight": torch.ones(1)})
        )
    with pytest.raises(LoadingError, match="decoder of width 48"):
        openai_whisper(saved(model, path, dims={**model.dims, "n_text_state": 48}))
    with pytest.raises(LoadingError, match="no 'dims'"):
        torch.save(state, path)
        openai_whisper(path)
    with pytest.raises(LoadingError, match="no such file"):
        openai_whisper(tmp_path / "other.pt")


def test_no_code_of_the_file_runs(tmp_path: Path) -> None:
    path = tmp_path / "tiny.pt"
    path.write_bytes(pickle.dumps({"dims": Path("anything")}))
    with pytest.raises(LoadingError, match="cannot be read as plain tensors"):
        openai_whisper(path)
