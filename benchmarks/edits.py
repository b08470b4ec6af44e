"""Curves of edits, in audio_lens and as a loop of whole forwards, side by side.

    python -m benchmarks.edits
    python -m benchmarks.edits --items 8 --rounds 1

The shipped model on random sound: the answer without attention to the audio (knock-out), in every
layer of the decoder, over many items. `patching.run` (one call per layer) and `patching.ablate`
(one sweep) against ``model(inputs)`` with the edit in force. What counts is the CPU time of one
thread, with all that has to be run beside the cells. Exit code 1: some values disagree.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from audio_lens import (
    AudioInputs,
    Edit,
    HookedAudioTransformer,
    edits,
    intervene,
    metrics,
    patching,
)

SITE, DO = "decoder.attn.attn_scores", edits.Block("audio")
METRIC = metrics.logit_diff("two", "seven")
RATE, SECONDS = 16_000, 2.4
RELATIVE = 1e-4  # of the largest change

Curve = Float[Tensor, "layers items"]


def made(model: HookedAudioTransformer, n_items: int) -> AudioInputs:
    """A batch of so many items of random sound."""
    generator = torch.Generator().manual_seed(0)
    clips = [0.1 * torch.randn(int(SECONDS * RATE), generator=generator) for _ in range(n_items)]
    return model.prepare(clips, "Which digit is second?", RATE)


def edit_of(layer: int) -> Edit:
    return Edit(SITE, DO, layer=layer, where="last")


@torch.no_grad()
def by_forwards(model: HookedAudioTransformer, inputs: AudioInputs) -> Curve:
    """One whole forward per layer, and one without edit."""
    measure = METRIC.bind(model, inputs)
    unedited, curve = measure(model(inputs)), []
    for layer in range(model.cfg.need_decoder.n_layers):
        with intervene(model, edit_of(layer)):
            curve.append(measure(model(inputs)))
    return torch.stack(curve) - unedited


def by_run(model: HookedAudioTransformer, inputs: AudioInputs) -> Curve:
    """`patching.run` layer after layer."""
    fresh = inputs[:]  # holds no run of earlier rounds
    unedited = patching.run(model, fresh, [], METRIC)
    layers = range(model.cfg.need_decoder.n_layers)
    return torch.stack([patching.run(model, fresh, edit_of(n), METRIC) for n in layers]) - unedited


def by_sweep(model: HookedAudioTransformer, inputs: AudioInputs) -> Curve:
    """`patching.ablate` over the layers."""
    result = patching.ablate(
        model, inputs, site=SITE, axes="layer", value=DO, where="last", metric=METRIC
    )
    return result.change.reshape(len(inputs), -1).T


WAYS: dict[str, Callable[[HookedAudioTransformer, AudioInputs], Curve]] = {
    "whole forwards": by_forwards,
    "patching.run": by_run,
    "patching.ablate": by_sweep,
}


def show(items: int, rounds: int) -> bool:
    """Print the table, of so many items and medians of so many rounds; whether all ways agree."""
    model = HookedAudioTransformer.from_pretrained("embedded")
    inputs = made(model, items)
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    curves: dict[str, Curve] = {}
    for _ in range(rounds + 1):  # the first warms up
        for name, way in WAYS.items():
            start = time.process_time()
            curves[name] = way(model, inputs)
            taken[name].append(time.process_time() - start)
    seconds = {name: statistics.median(times[1:]) for name, times in taken.items()}
    whole = curves["whole forwards"]
    off = {name: float((curve - whole).abs().max()) for name, curve in curves.items()}
    n_layers = len(whole)
    table = Table(title=f"knock-out of {n_layers} layers over {items} items, one thread")
    for column in ("", "CPU s", "share of whole forwards", "off by at most"):
        table.add_column(column, justify="left" if not column else "right")
    for name, cost in seconds.items():
        share = cost / seconds["whole forwards"]
        table.add_row(name, f"{cost:.2f}", f"{share:.2f}", f"{off[name]:.1e}")
    Console().print(table)
    return max(off.values()) <= RELATIVE * float(whole.abs().max())


def main(
    items: Annotated[int, typer.Option(help="how many items, in one batch")] = 32,
    rounds: Annotated[int, typer.Option(help="how often each way runs; medians are told")] = 5,
) -> None:
    torch.set_num_threads(1)
    if not show(items, rounds):
        sys.exit("the ways disagree")


if __name__ == "__main__":
    typer.run(main)
