"""Code of a checkpoint is never run, whatever names it, and whoever says "y" to being asked."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from audio_lens import HookedAudioTransformer, LoadingError, metrics, patching
from audio_lens.cli import app
from audio_lens.errors import AudioLensError
from audio_lens.models.compose.assemble import compose
from audio_lens.models.loading.checkpoints import embedded_path, processor_of, read_model
from audio_lens.models.parts.codecs import HookedCodec
from audio_lens.models.parts.connectors import LinearConnector
from audio_lens.recipes import desta25, kimi_audio, llama_omni, qwen_audio, salmonn, soundwave
from tiny import hf_inputs, tiny_hf, tiny_whisper_hf

load = HookedAudioTransformer.from_pretrained
PAIR = ("clean", "corrupted")
PIECES = {
    "AutoConfig": "config.json",
    "AutoProcessor": "processor_config.json",
    "AutoFeatureExtractor": "preprocessor_config.json",
    "AutoTokenizer": "tokenizer_config.json",
}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file that the code of a checkpoint would write; all that asks is answered with yes."""
    marker = tmp_path / "ran"
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    yield marker
    assert not marker.exists()


def bring_code(folder: Path, marker: Path, auto: str, file: str, **changes: Any) -> Path:
    """Let a file of a checkpoint name code of its own, which would write the marker."""
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').write('ran')\n")
    path = folder / file
    held = json.loads(path.read_text()) if path.exists() else {}
    reference: Any = ["own.Own", None] if auto == "AutoTokenizer" else "own.Own"
    path.write_text(json.dumps({**held, "auto_map": {auto: reference}, **changes}))
    return folder


def unknown_whisper(folder: Path) -> Path:
    """A checkpoint of a kind that transformers does not know."""
    tiny_whisper_hf().save_pretrained(folder)
    edit(folder / "config.json", model_type="whispering")
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -------------------------------------------------------------------------------- refused


ROUTES: dict[str, Callable[[Path], Any]] = {
    "from_pretrained": lambda folder: load(folder),
    "of a family": lambda folder: type(load(embedded_path())).from_pretrained(folder),
    "a codec": HookedCodec.from_pretrained,
    "read_model": lambda folder: read_model(folder, lambda _: transformers.AutoModelForCausalLM),
    "compose, encoder": lambda folder: compose(folder, LinearConnector(32, 48), "nowhere"),
    "compose, decoder": lambda folder: compose(tiny_whisper_hf(), LinearConnector(32, 48), folder),
    "rerun": lambda folder: patching.rerun(_map_of(folder)),
    "desta25, encoder": lambda folder: desta25(_weights(folder), encoder=folder),
}


def _map_of(folder: Path) -> patching.SweepResult:
    """A map that was made with another model in this folder."""
    model = HookedAudioTransformer.from_hf(tiny_whisper_hf())
    pair = {name: hf_inputs("whisper", seed=seed) for seed, name in enumerate(PAIR)}
    made = patching.sweep(
        model, **pair, metric=metrics.log_prob(5), site="decoder.resid_pre", axes=("layer",)
    )
    made.meta["model"] = str(folder)
    return made


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"


@pytest.mark.parametrize("route", ROUTES)
def test_a_config_with_its_own_code_is_refused_by_name(
    route: str, tmp_path: Path, marker: Path
) -> None:
    folder = bring_code(unknown_whisper(tmp_path), marker, "AutoConfig", "config.json")
    with pytest.raises(LoadingError, match=r"config\.json names code of its own .*own\.Own"):
        ROUTES[route](folder)


@pytest.mark.parametrize("auto", list(PIECES)[1:])
def test_pieces_with_their_own_code_are_refused_by_name(
    auto: str, tmp_path: Path, marker: Path
) -> None:
    """Of a model type for which transformers has no such piece."""
    kind = "llama" if auto == "AutoFeatureExtractor" else "audio-spectrogram-transformer"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    folder = bring_code(tmp_path, marker, auto, PIECES[auto])
    with pytest.raises(LoadingError, match=rf"{PIECES[auto]} names code of its own \({auto}"):
        processor_of(str(folder))


def test_a_tokenizer_with_its_own_code_is_refused_before_weights_are_read(
    tmp_path: Path, marker: Path
) -> None:
    """The model type tells of a processor, which would load the tokenizer without being told."""
    tiny_hf("granite_speech").save_pretrained(tmp_path)
    folder = bring_code(tmp_path, marker, "AutoTokenizer", "tokenizer_config.json")
    (folder / "model.safetensors").write_bytes(b"never opened")
    with pytest.raises(LoadingError, match=r"tokenizer_config\.json names code of its own"):
        load(folder)


@pytest.mark.parametrize("named", ["own.Own", ["own.Own", "own.Own"]])
def test_older_forms_of_naming_code(tmp_path: Path, marker: Path, named: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    bring_code(tmp_path, marker, "AutoTokenizer", "tokenizer_config.json", auto_map=named)
    with pytest.raises(
        LoadingError, match=r"tokenizer_config\.json (names code|holds an auto_map)"
    ):
        processor_of(str(tmp_path))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("where", [None, "text_config"])
def test_kernels_from_the_hub_are_refused(tmp_path: Path, key: str, where: str | None) -> None:
    tiny_hf("qwen2_audio").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (config if where is None else config[where])[key] = "somebody/kernel"
    edit(tmp_path / "config.json", **config)
    with pytest.raises(LoadingError, match=rf"names code of its own \({key}: somebody/kernel\)"):
        load(tmp_path)


def test_the_command_runs_no_code(tmp_path: Path, marker: Path) -> None:
    from typer.testing import CliRunner

    folder = bring_code(unknown_whisper(tmp_path), marker, "AutoConfig", "config.json")
    found = CliRunner().invoke(app, ["info", str(folder)], input="y\n" * 9)
    assert found.exit_code == 2 and "names code of its own" in " ".join(found.output.split())


@pytest.mark.parametrize("recipe", [llama_omni, soundwave, qwen_audio, kimi_audio, salmonn])
def test_recipes_run_no_code(recipe: Any, tmp_path: Path, marker: Path) -> None:
    """They read the published config themselves, and load a tokenizer that has native code."""
    folder = bring_code(unknown_whisper(tmp_path), marker, "AutoConfig", "config.json")
    bring_code(folder, marker, "AutoTokenizer", "tokenizer_config.json")
    with pytest.raises(AudioLensError):
        recipe(folder, *([_weights(folder)] * 2 if recipe is salmonn else []))


# -------------------------------------------------------------------------------- what loads


def test_what_transformers_has_is_taken_natively(tmp_path: Path, marker: Path) -> None:
    """A checkpoint that also brings code, for programs without classes of their own."""
    folder = Path(shutil.copytree(embedded_path(), tmp_path / "copy"))
    every = {auto: "own.Own" for auto in (*PIECES, "AutoModel", "AutoModelForCausalLM")}
    for auto, file in PIECES.items():
        bring_code(folder, marker, auto, file)
    bring_code(folder, marker, "AutoConfig", "config.json", auto_map=every)
    model, native = load(folder), load(embedded_path())
    assert type(model.processor) is type(native.processor)
    question = (torch.zeros(16_000), "which digit is first ?", 16_000)
    assert torch.equal(model.prepare(*question).tokens, native.prepare(*question).tokens)


def test_a_recipe_with_code_beside_native_files_gets_its_tokenizer(
    tmp_path: Path, marker: Path
) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_path() / file, tmp_path / file)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "omni_speech_llama"}))
    bring_code(tmp_path, marker, "AutoConfig", "config.json")
    found, problem = processor_of(str(tmp_path))
    assert not problem and len(getattr(found, "tokenizer", found)) > 10
