"""Attribution patching in forwards, beside the fewest that its arithmetic allows.

    python -m benchmarks.attribution
    python -m benchmarks.attribution --whisper base --rounds 5

The unit is one plain forward of the same inputs, so with several items a number is forwards an
item. `peers/backward.py` says what the floor counts.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.patching_measure import attribution_forwards
from benchmarks.peers.backward import least_forwards
from benchmarks.peers.tasks import LLMS, ROWS, WHISPERS, make_task
from benchmarks.several import stacked

SINGLE = ("encoder-resid", "encoder-heads", "cross-heads", "lm-resid", "lm-heads")
MANY = "lm-resid"  # the row that several items are measured on


def show(sizes: dict[str, str], items: int, rounds: int) -> None:
    """Print the table, for a size of Whisper and one of audio LLMs."""
    table = Table(title=f"attribution, in forwards, {torch.get_num_threads()} thread(s)")
    for column in ("row", "size", "items", "forwards an item", "floor", "over the floor"):
        table.add_column(column, justify="left" if column in ("row", "size") else "right")
    for name, n_items in (*((name, 1) for name in SINGLE), (MANY, items)):
        kind = ROWS[name].kind
        shapes = LLMS if kind == "llm" else WHISPERS
        task = make_task(name, shapes[sizes[kind]], sizes[kind])
        found, least = attribution_forwards(stacked(task, n_items), rounds), least_forwards(task)
        numbers = f"{found:.2f}", f"{least:.2f}", f"{found / least:.2f}"
        table.add_row(name, sizes[kind], str(n_items), *numbers)
    Console().print(table)


def main(
    whisper: Annotated[str, typer.Option(help=f"One of {', '.join(WHISPERS)}.")] = "tiny",
    llm: Annotated[str, typer.Option(help=f"Audio LLM: one of {', '.join(LLMS)}.")] = "base",
    items: Annotated[int, typer.Option(min=1, help=f"Items of the last row, {MANY}.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="The least time of so many counts.")] = 3,
) -> None:
    """Print what attribution costs."""
    torch.set_num_threads(1)
    show({"whisper": whisper, "llm": llm}, items, rounds)


if __name__ == "__main__":
    typer.run(main)
