"""The real Whisper-tiny.en weights, completed by 13 fitted token embeddings, say spoken digits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from audio_lens import AudioError, HookedAudioTransformer

pytestmark = pytest.mark.real

N_POSITIONS = 64  # the embeddings were fitted on clips of 1.28 s
FIRST_DIGIT = 3
SPEAKERS = ("nicolas", "theo")  # not among those they were fitted on
N_TAKES = 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory made of the published weights and the fitted embeddings."""
    source = tiny.data_dir() / "models" / "whisper_tiny_en"
    path = tmp_path_factory.mktemp("whisper_digits")
    weights = load_file(source / "digit13_token_embedding.safetensors")
    for part in ("encoder_fp16", "decoder_no_token_embedding_fp16"):
        published = load_file(source / f"{part}.safetensors")
        weights |= {f"model.{key}": tensor.float() for key, tensor in published.items()}
    positions = "model.encoder.embed_positions.weight"
    weights[positions] = weights[positions][:N_POSITIONS].clone()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    control = {"decoder_start_token_id": 0, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
    config = json.loads((source / "config.json").read_text()) | control
    config |= {"max_source_positions": N_POSITIONS, "vocab_size": 13, "begin_suppress_tokens": None}
    (path / "config.json").write_text(json.dumps(config))
    generation = control | {"no_timestamps_token_id": 1}
    (path / "generation_config.json").write_text(json.dumps(generation))
    shutil.copy(source / "preprocessor_config.json", path)  # of 30 s clips
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> HookedAudioTransformer:
    return HookedAudioTransformer.from_pretrained(str(checkpoint))


def recordings(speaker: str, digit: int, n_takes: int = N_TAKES) -> list[Path]:
    folder = tiny.data_dir() / "fsdd" / "recordings"
    return [folder / f"{digit}_{speaker}_{take}.flac" for take in range(n_takes)]


def test_equals_hugging_face_on_real_speech(
    checkpoint: Path, model: HookedAudioTransformer
) -> None:
    hf = transformers.WhisperForConditionalGeneration.from_pretrained(checkpoint)
    inputs = model.prepare(recordings("theo", 7, 2) + recordings("nicolas", 2, 2))
    with torch.no_grad():
        out = hf(
            input_features=inputs.features,
            decoder_input_ids=inputs.tokens,
            output_hidden_states=True,
        )
    theirs = {"hook_logits": out.logits}
    for part in ("encoder", "decoder"):
        *before, last = out[f"{part}_hidden_states"]
        theirs[f"{part}.hook_out"] = last
        theirs |= {f"{part}.blocks.{i}.hook_resid_pre": state for i, state in enumerate(before)}
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=list(theirs))
    assert len(theirs) == 11
    for name, expected in theirs.items():
        assert (cache[name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_the_prompt_is_the_checkpoints(model: HookedAudioTransformer) -> None:
    inputs = model.prepare(recordings("theo", 0, 1)[0])
    assert inputs.tokens.tolist() == [[0, 1]]
    assert inputs.features.shape == (1, 80, 2 * N_POSITIONS)


def test_says_the_digits_of_unseen_speakers(model: HookedAudioTransformer) -> None:
    correct = {}
    for speaker in SPEAKERS:
        digits = [digit for digit in range(10) for _ in range(N_TAKES)]
        paths = [path for digit in range(10) for path in recordings(speaker, digit)]
        inputs = model.prepare(paths)
        new = model.generate(inputs, max_new_tokens=1, return_type="tokens")[:, -1]
        correct[speaker] = (new - FIRST_DIGIT == torch.tensor(digits)).float().mean().item()
    print(f"\ndigits said right: {correct}")
    assert sum(correct.values()) / len(SPEAKERS) >= 0.85, correct


def test_timeline_ends_with_the_speech(model: HookedAudioTransformer) -> None:
    path = recordings("theo", 3, 1)[0]
    inputs = model.prepare(path)
    seconds = soundfile.info(path).duration
    timeline = model.timeline(inputs)
    assert timeline.duration_s() == pytest.approx(seconds, abs=0.01)
    assert timeline.valid("encoder").sum().item() == pytest.approx(seconds / 0.02, abs=1)


def test_a_clip_longer_than_the_window_is_refused(model: HookedAudioTransformer) -> None:
    with pytest.raises(AudioError, match=r"takes 1\.28 s: cut it"):
        model.prepare(torch.zeros(21_000), sampling_rate=16_000)
