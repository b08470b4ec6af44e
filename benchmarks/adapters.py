"""Layer-restricted LoRA on the shipped model: every arm with three seeds, as a table.

    python -m benchmarks.adapters
    python -m benchmarks.adapters --items 200 --steps 60 --to runs/

The shipped model knows "follows" as the next number: of "seven two five" it answers "eight" when
asked which digit comes after the first. Here it is taught that the next spoken digit is meant, by
real clips of one speaker that it never heard, and tested on those of another (of AUDIO_LENS_DATA or
../shared/data). What counts is the CPU time of one thread. Exit code 1: more than the limit, or
training that changed nothing.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from audio_lens import HookedAudioTransformer, Items
from audio_lens.analysis import adapters
from audio_lens.results import Result
from benchmarks.grounding import conflict_items

QUESTION = "Which digit comes after the first?"
LIMIT_S = 900


def asked_items(count: int) -> Items:
    """Clips of three digits; the question is which comes after the first, the answer the second."""
    return Items(
        item.replaced(text=QUESTION, against=None, other_audio=None, other_text=None)
        for item in conflict_items(count)
    )


def table_of(result: Result) -> Table:
    """Right answers of every arm with every seed."""
    seeds = result.coords["seed"]
    table = Table("arm", *(f"seed {seed}" for seed in seeds), "mean", "log-prob", box=None)
    right, told = (result.mean().select(metric=name).values for name in result.coords["metric"])
    for name, row, own in zip(result.coords["arm"], right, told, strict=True):
        table.add_row(name, *(f"{x:.2f}" for x in row), f"{row.mean():.2f}", f"{own.mean():.2f}")
    control = result.controls["no_audio"].mean()
    row, own = (control.select(metric=name).values for name in result.coords["metric"])
    shown = (*(f"{x:.2f}" for x in row), f"{row.mean():.2f}", f"{own.mean():.2f}")
    table.add_row("no_audio (control)", *shown)
    return table


def main(
    items: Annotated[int, typer.Option(help="how many items")] = 64,
    steps: Annotated[int, typer.Option(help="of training")] = 25,
    to: Annotated[Path | None, typer.Option(help="a folder to go on from")] = None,
) -> None:
    torch.set_num_threads(1)
    console = Console(width=120)
    model = HookedAudioTransformer.from_pretrained("embedded")
    made = asked_items(items)
    start = time.process_time()
    result = adapters.sweep(model, made, steps=steps, to=to, progress=False)
    taken = time.process_time() - start
    console.print(table_of(result))
    for note in result.report:
        console.print(note, highlight=False)
    console.print(f"{taken:.0f} CPU s of one thread", highlight=False)
    means = result.mean().select(metric="right").values.mean(-1)
    if taken > LIMIT_S or means.max() < means[result.coords["arm"].index("none")] + 0.2:
        sys.exit(f"more than {LIMIT_S} s, or no arm that learned")


if __name__ == "__main__":
    typer.run(main)
