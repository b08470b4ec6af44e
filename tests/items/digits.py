"""Whisper-tiny.en as published, with embeddings of 13 tokens that say digits, and items for it."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

import tiny
import toys
from audio_lens import HookedAudioTransformer, Item, Items
from audio_lens.models.embedded import DIGITS

N_POSITIONS = 64  # the embeddings were fitted on clips of 1.28 s
SPEAKERS = ("nicolas", "theo")  # not among those they were fitted on
CONTROL = {"decoder_start_token_id": 0, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
WORDS = ("<start>", "<notimestamps>", "<end>", *DIGITS)


@functools.cache
def digits_whisper() -> HookedAudioTransformer:
    """The model; the test is skipped where its weights are missing."""
    source = tiny.data_dir() / "models" / "whisper_tiny_en"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        weights = load_file(source / "digit13_token_embedding.safetensors")
        for part in ("encoder_fp16", "decoder_no_token_embedding_fp16"):
            published = load_file(source / f"{part}.safetensors")
            weights |= {f"model.{key}": tensor.float() for key, tensor in published.items()}
        positions = "model.encoder.embed_positions.weight"
        weights[positions] = weights[positions][:N_POSITIONS].clone()
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((source / "config.json").read_text()) | CONTROL
        config |= {"max_source_positions": N_POSITIONS, "vocab_size": 13}
        config |= {"begin_suppress_tokens": None}
        (path / "config.json").write_text(json.dumps(config))
        generation = CONTROL | {"no_timestamps_token_id": 1}
        (path / "generation_config.json").write_text(json.dumps(generation))
        shutil.copy(source / "preprocessor_config.json", path)
        model = HookedAudioTransformer.from_pretrained(path)
    model.tokenizer = toys.word_tokenizer(WORDS, "<start>")
    return model


def digit_items(takes: range = range(4)) -> Items:
    """Single digits of unseen speakers."""
    folder = tiny.data_dir() / "fsdd" / "recordings"
    return Items(
        Item(
            folder / f"{number}_{speaker}_{take}.flac",
            answer=digit,
            group=speaker,
            id=f"{digit}-{speaker}-{take}",
        )
        for number, digit in enumerate(DIGITS)
        for speaker in SPEAKERS
        for take in takes
    )
