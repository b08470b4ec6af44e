"""Phonetic arithmetic in every block of Whisper-tiny.en's encoder, on aligned speech.

    AUDIO_LENS_DATA=... python -m benchmarks.phonology
    AUDIO_LENS_DATA=... python -m benchmarks.phonology --least 5

The published measure asks for 50 samples of a sound; the aligned speech here has few sounds with so
many, so that fewer are asked for and said. Features are panphon's. One thread.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from audio_lens import collect
from audio_lens.analysis import phonology
from audio_lens.items import Activations
from audio_lens.results import Result
from benchmarks.autoencoder_phones import SITE, whisper_encoder, with_phones


def main(
    least: Annotated[int, typer.Option(help="Samples that a sound must have.")] = 8,
    draws: Annotated[int, typer.Option(help="Of samples of every four sounds.")] = 100,
    kept: Annotated[Path | None, typer.Option(help="Activations that `collect` wrote.")] = None,
) -> None:
    """Print both measures and their controls by block."""
    torch.set_num_threads(1)
    console = Console(width=100, highlight=False)
    data, start = Path(os.environ.get("AUDIO_LENS_DATA", "../shared/data")), time.process_time()
    items, phones = with_phones(data)
    if kept is None:
        acts = collect(whisper_encoder(data), items, SITE, size=1)
    else:
        acts = Activations.load(kept)
    said = phonology.sounds(acts, phones)
    added = phonology.analogies(said, least=least, draws=draws)
    alike = phonology.consistency(said, least=least, draws=draws)
    columns = {f"cosine{name}": one for name, one in _named(added)}
    columns |= {f"area{name}": one for name, one in _named(alike)}
    table = Table("block", *columns, box=None)
    for row, layer in enumerate(said.layers):
        table.add_row(str(layer), *(f"{one.mean().values[row]:.2f}" for one in columns.values()))
    console.print(f"{len(said.labels)} sounds, those of {least} samples or more")
    console.print(table)
    for result in (added, alike):
        console.print(result.report[0])
    console.print(f"{time.process_time() - start:.0f} CPU s of one thread")


def _named(result: Result) -> list[tuple[str, Result]]:
    return [("", result), *((f", {name}", one) for name, one in result.controls.items())]


if __name__ == "__main__":
    typer.run(main)
