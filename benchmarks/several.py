"""Sweeps of several stimuli: all in one batch, and one stimulus after the other.

    python -m benchmarks.several
    python -m benchmarks.several --stimuli 16 --whisper base

Small cells have few rows, and products of few rows are slow: stimuli of one batch fill them. Every
stimulus has sounds of its own. Exit code 1: the two ways disagree.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from audio_lens import patching
from benchmarks.patching_measure import Clock
from benchmarks.peers.own import sweep_arguments
from benchmarks.peers.tasks import LLMS, ROWS, WHISPERS, Task, make_task

RELATIVE = 1e-4  # of the largest effect
SWEPT = ("cross-cells", "cross-heads", "lm-resid", "lm-heads")


def stacked(task: Task, n: int) -> Task:
    """The task with so many stimuli, the first of them its own; the words are the same."""
    if n == 1:
        return task
    generator = torch.Generator().manual_seed(1)

    def together(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        heard = inputs["input_features"]
        drawn = torch.randn(n - 1, *heard.shape[1:], generator=generator).to(heard)
        found = {name: x.expand(n, *x.shape[1:]) for name, x in inputs.items()}
        return found | {"input_features": torch.cat([heard, drawn])}

    return replace(task, clean=together(task.clean), corrupted=together(task.corrupted))


def single(task: Task, index: int) -> Task:
    """One stimulus of a stacked task."""
    clean, corrupted = (
        {name: x[index : index + 1] for name, x in inputs.items()}
        for inputs in (task.clean, task.corrupted)
    )
    return replace(task, clean=clean, corrupted=corrupted)


def swept(task: Task) -> patching.SweepResult:
    return patching.sweep(task.model, **sweep_arguments(task), progress=False)


def compared(task: Task, n: int, rounds: int) -> tuple[float, float, float]:
    """Seconds in one batch and one by one, and how far the answers are apart at most.

    The last as a share of the largest effect.
    """
    clock, batch = Clock(task.device), stacked(task, n)
    singles = [single(batch, i) for i in range(n)]
    together, apart = [], []
    for _ in range(rounds + 1):  # the first warms up
        together.append(clock.seconds(lambda: swept(batch)))
        apart.append(clock.seconds(lambda: [swept(one) for one in singles]))
    result = swept(batch)
    values = result.values.reshape(n, -1)
    alone = torch.stack([swept(one).values.flatten() for one in singles])
    effects = values - result.corrupted.reshape(n, 1)
    off = (values - alone).abs().max() / effects.abs().max()
    return min(together[1:]), min(apart[1:]), float(off)


def show(sizes: dict[str, str], stimuli: int, rounds: int, windows: int | None = None) -> bool:
    """Print the table; whether both ways agree everywhere."""
    title = f"{stimuli} stimuli in one batch, {torch.get_num_threads()} thread(s)"
    table = Table(title=title)
    for column in ("row", "size", "cells", "one by one, s", "in one batch, s", "times", "apart"):
        table.add_column(column, justify="left" if column in ("row", "size") else "right")
    agree = True
    for name in SWEPT:
        kind = ROWS[name].kind
        size = sizes[kind]
        shapes = WHISPERS if kind == "whisper" else LLMS
        task = make_task(name, shapes[size], size, windows=windows)
        together, alone, off = compared(task, stimuli, rounds)
        cells = str(stimuli * len(task.cells))
        times = f"{alone:.2f}", f"{together:.2f}", f"{alone / together:.2f}", f"{off:.0e}"
        table.add_row(name, size, cells, *times)
        agree &= off <= RELATIVE
    Console().print(table)
    return agree


def main(
    stimuli: Annotated[int, typer.Option(min=2, help="How many.")] = 8,
    whisper: Annotated[str, typer.Option(help=f"One of {', '.join(WHISPERS)}.")] = "tiny",
    llm: Annotated[str, typer.Option(help=f"Audio LLM: one of {', '.join(LLMS)}.")] = "quick",
    windows: Annotated[
        int | None, typer.Option(min=1, help="How many windows of time, in rows that have some.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="The least time of so many counts.")] = 2,
) -> None:
    """Print what a batch gains."""
    torch.set_num_threads(1)
    if not show({"whisper": whisper, "llm": llm}, stimuli, rounds, windows):
        sys.exit("the two ways disagree")


if __name__ == "__main__":
    typer.run(main)
