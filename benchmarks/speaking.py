"""Sweeps of a model that speaks, in audio_lens and as a loop of whole forwards, side by side.

    python -m benchmarks.speaking
    python -m benchmarks.speaking --steps 100 --sample 40

A Moshi of random weights. The loop is `run_with_hooks` on the same model, one cell a forward; it
runs a random sample of the cells and is scaled. What counts is the CPU time of one thread; both
unpatched runs are counted. Exit code 1: some values disagree.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from audio_lens import AudioInputs, HookedAudioTransformer, metrics, patching

STACK = {"num_attention_heads": 8, "num_key_value_heads": 8}
SHAPE = {"hidden_size": 512, "num_hidden_layers": 12, "ffn_dim": 2816, "vocab_size": 8000, **STACK}
DEPTH = {"hidden_size": 256, "num_hidden_layers": 4, "ffn_dim": 1408, **STACK}
RELATIVE = 1e-4  # of the largest effect


@dataclass(frozen=True)
class Row:
    """A sweep: its site, its axes, and the stream that is measured."""

    site: str
    unit: str
    stream: str


ROWS = (
    Row("decoder.resid_pre", "position", "text"),
    Row("decoder.resid_pre", "position", "audio.7"),
    Row("decoder.attn.z", "head", "audio.7"),
    Row("depth.attn.z", "head", "audio.7"),
)


def random_moshi() -> HookedAudioTransformer:
    """A small Moshi, its depth decoder in the proportions of the released one."""
    config = transformers.MoshiConfig(
        depth_decoder_config=DEPTH, audio_encoder_config={"model_type": "mimi"}, **SHAPE
    )
    return HookedAudioTransformer.from_hf(transformers.MoshiForConditionalGeneration(config))


def conversation(model: HookedAudioTransformer, steps: int, seed: int) -> AudioInputs:
    """One prompt; conversations differ in what the user says."""
    codes = model.cfg.n_codes - 1

    def drawn(seed: int, most: int, *shape: int) -> torch.Tensor:
        return torch.randint(most, shape, generator=torch.Generator().manual_seed(seed))

    own, user = (drawn(s, codes, 1, model.n_spoken, steps) for s in (0, seed))
    return model.conversation(user, own, drawn(1, model.cfg.n_texts, 1, steps - 1).tolist())


def looped(model: HookedAudioTransformer, row: Row, pair: dict[str, Any], cells: list) -> list:
    """The metric of some cells, each by one whole forward."""
    site = patching.Site.parse(row.site, model)
    measure = metrics.of_stream(row.stream, metrics.logit_diff(3, 5)).bind(model, pair["corrupted"])
    names = sorted({site.hook_name(layer) for layer, _ in cells})
    _, source = model.run_with_cache(pair["clean"], names_filter=names)
    dim = 2 if row.unit == "head" else 1
    values = []
    for layer, index in cells:

        def overwrite(x: torch.Tensor, hook: Any, index: int = index) -> torch.Tensor:
            return x.index_copy(dim, torch.tensor([index]), source[hook.name].narrow(dim, index, 1))

        logits = model.run_with_hooks(
            pair["corrupted"], fwd_hooks=[(site.hook_name(layer), overwrite)]
        )
        values.append(measure(logits)[0].item())
    return values


@torch.inference_mode()
def measured(model: HookedAudioTransformer, row: Row, pair: dict[str, Any], sample: int) -> dict:
    """CPU seconds of the sweep and of the loop over all cells, and how far they differ."""
    started = time.thread_time()
    result = patching.sweep(
        model,
        **pair,
        site=row.site,
        axes=("layer", row.unit),
        metric=metrics.of_stream(row.stream, metrics.logit_diff(3, 5)),
        progress=False,
    )
    swept = time.thread_time() - started
    cells = [(layer, n) for layer in result.coords["layer"] for n in result.coords[row.unit]]
    chosen = random.Random(0).sample(range(len(cells)), min(sample, len(cells)))
    started = time.thread_time()
    values = looped(model, row, pair, [cells[i] for i in chosen])
    loop = (time.thread_time() - started) * len(cells) / len(chosen)
    apart = (result.values.flatten()[chosen] - torch.tensor(values)).abs().max()
    effect = (result.values - result.corrupted).abs().max()
    return {"cells": len(cells), "sweep": swept, "loop": loop, "apart": float(apart / effect)}


def show(steps: int, sample: int) -> bool:
    """Print the table, of a conversation of so many steps; whether sweeps and loop agree."""
    torch.manual_seed(0)
    model = random_moshi()
    clean, corrupted = (conversation(model, steps, seed) for seed in (2, 3))
    pair = {"clean": clean, "corrupted": corrupted}
    title = f"Moshi of width {SHAPE['hidden_size']}, {steps} steps, float32, one thread"
    table = Table(
        "sweep", "of", "cells", "loop (s)", "audio_lens (s)", "times", "apart", title=title
    )
    is_alike = True
    for row in ROWS:
        found = measured(model, row, pair, sample)
        is_alike &= found["apart"] <= RELATIVE
        table.add_row(
            f"{row.site}, layer x {row.unit}",
            row.stream,
            str(found["cells"]),
            f"{found['loop']:.1f}",
            f"{found['sweep']:.1f}",
            f"{found['loop'] / found['sweep']:.1f}",
            f"{found['apart']:.0e}",
        )
    Console().print(table)
    return is_alike


def main(
    steps: Annotated[int, typer.Option(min=4, help="Steps of 0.08 s of the conversation.")] = 48,
    sample: Annotated[int, typer.Option(min=1, help="Cells that the loop runs.")] = 24,
) -> None:
    """Print how much faster sweeps of a model that speaks are than a loop."""
    torch.set_num_threads(1)
    sys.exit(not show(steps, sample))


if __name__ == "__main__":
    typer.run(main)
