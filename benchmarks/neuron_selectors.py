"""What the neurons of each selector take from a spoken digit, and from the others, on real speech.

    python -m benchmarks.neuron_selectors
    python -m benchmarks.neuron_selectors --items 200 --tested 60

Clips of three digits by speakers that the shipped model never heard (of AUDIO_LENS_DATA or
../shared/data), of which it is asked for the second. Neurons of the encoder are chosen on some
clips that are answered rightly, at the second digit, and taken out in others: log-probability and
recall lost, with intervals over items, beside as many random neurons. CPU time of one thread.
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from audio_lens import HookedAudioTransformer, Items
from audio_lens.analysis import neurons
from audio_lens.results import Result
from benchmarks.grounding import QUESTION, STARTS, conflict_items

WINDOW = (STARTS[1] - 0.02, STARTS[1] + 0.64)  # seconds of the second digit
EFFECTS = ("self", "cross")


def asked_items(count: int, seed: int) -> Items:
    """The clips, with the question alone."""
    return Items(
        item.replaced(text=QUESTION, against=None, other_audio=None, other_text=None)
        for item in conflict_items(count, seed)
    )


def table_of(result: Result) -> Table:
    """What is lost by each selector's neurons, and by random ones."""
    metrics = result.coords["metric"]
    table = Table("neurons", *(f"{name}, {e}" for name in metrics for e in EFFECTS), box=None)
    rows = {kind: result.select(kind=kind) for kind in result.coords["kind"]} | result.controls
    for name, one in rows.items():
        cells = [one.cells(metric) for metric in metrics]
        shown = [
            f"{cell.value:.2f} [{cell.low:.2f}, {cell.high:.2f}]"
            for row in cells
            for cell in row[: len(EFFECTS)]
        ]
        table.add_row(name, *shown)
    return table


def main(
    items: Annotated[int, typer.Option(help="Clips, of which wrong answers are left out.")] = 110,
    tested: Annotated[int, typer.Option(help="Of them to test on.")] = 20,
    share: Annotated[float, typer.Option(help="Of all neurons that are taken.")] = 0.08,
    seed: Annotated[int, typer.Option(help="Of the clips.")] = 41,
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    console = Console(width=120, highlight=False)
    model = HookedAudioTransformer.from_pretrained("embedded")
    start = time.process_time()
    said = neurons.right(model, asked_items(items, seed))
    chosen_by, test = said[:-tested], said[-tested:]
    acts = neurons.logged(model, chosen_by, "encoder", where=WINDOW, progress=False)
    result = neurons.compare(model, test, acts, share, progress=False)
    console.print(
        f"{share:.0%} of the encoder's neurons, chosen on {len(chosen_by)} clips, tested on "
        f"{len(test)} others"
    )
    console.print(table_of(result))
    for line in result.report:
        console.print(line)
    console.print(f"{time.process_time() - start:.0f} CPU s of one thread")


if __name__ == "__main__":
    typer.run(main)
