"""What the shell offers at TAB: models and sites, without loading anything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EMBEDDED = "embedded"
HUB = (
    "MIT/ast-finetuned-audioset-10-10-0.4593",
    "Qwen/Qwen2-Audio-7B-Instruct",
    "facebook/wav2vec2-base-960h",
    "mistralai/Voxtral-Mini-3B-2507",
    "openai/whisper-base",
    "openai/whisper-large-v3",
    "openai/whisper-small",
    "openai/whisper-tiny",
    "openai/whisper-tiny.en",
)
_RESIDUAL = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
_ATTENTION = ("q", "k", "v", "z", "result", "attn_scores", "pattern")
_INNER = (*(f"attn.{name}" for name in _ATTENTION), "mlp.pre", "mlp.post")
_CROSS = ("cross_attn_out", "resid_mid_cross", *(f"cross_attn.{name}" for name in _ATTENTION))
_OF_LANGUAGE_MODELS = ("attn.rot_q", "attn.rot_k", "mlp.gate", "mlp.pre_linear")
SITES = {
    "encoder": (*_RESIDUAL, *_INNER),
    "connector": ("in", "out"),
    "decoder": (*_RESIDUAL, *_INNER, *_OF_LANGUAGE_MODELS, *_CROSS),
}
AXES = ("layer", "head", "time", "position", "neuron", "frequency")


def models(incomplete: str) -> list[tuple[str, str]]:
    """The shipped model, checkpoints in folders and in the hub's cache, and some of the hub."""
    named = {EMBEDDED: "ships with audio-lens"}
    named |= {folder: "a folder here" for folder in _folders(incomplete)}
    named |= {name: "downloaded" for name in _downloaded()}
    named |= {name: "on the hub" for name in HUB if name not in named}
    return [(name, what) for name, what in named.items() if name.startswith(incomplete)]


def sites(ctx: Any, incomplete: str) -> list[str]:
    """What can be patched: ``part.activation``, without cross-attention for the shipped model."""
    names = [f"{part}.{name}" for part, activations in SITES.items() for name in activations]
    if ctx.params.get("model", EMBEDDED) == EMBEDDED:
        names = [name for name in names if name.partition(".")[2] not in _CROSS]
    return [name for name in names if name.startswith(incomplete)]


def methods(incomplete: str) -> list[tuple[str, str]]:
    """What `audio-lens analyse` runs, with the question of each."""
    from audio_lens.cli.methods import listed

    return [(n, one.summary) for n, one in listed().items() if n.startswith(incomplete)]


def axes(incomplete: str) -> list[str]:
    """One axis, or another behind a comma."""
    before, comma, last = incomplete.rpartition(",")
    if "," in before:
        return []
    left = [axis for axis in AXES if axis != before and axis.startswith(last)]
    return [f"{before}{comma}{axis}" for axis in left]


def _folders(incomplete: str) -> Iterator[str]:
    """Folders with a checkpoint that begin so."""
    if incomplete in ("", "~"):
        incomplete = "./" if not incomplete else "~/"
    start = Path(incomplete).expanduser()
    parent, stem = (start, "") if incomplete.endswith("/") else (start.parent, start.name)
    given = incomplete[: len(incomplete) - len(stem)]
    if parent.is_dir():
        for path in sorted(parent.glob(f"{stem}*/config.json")):
            yield f"{given}{path.parent.name}"


def _downloaded() -> list[str]:
    """Hub ids in Hugging Face's cache."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    return sorted(
        path.name.removeprefix("models--").replace("--", "/", 1) for path in cache.glob("models--*")
    )
