"""Whether a study on Ray has the bits of one in this process, and how busy its workers are.

    python -m benchmarks.studies
    python -m benchmarks.studies --items 8 --workers 2

Conflict items of the shipped clips, again and again, each time less loud; where both streams are in
which layer (`grounding.residence`) and what each head's attention to the audio is worth
(`knockout.knock_out`). Exit code 1: numbers that differ in a bit.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from audio_lens import Items, studies
from audio_lens.items import demo_items
from audio_lens.items.item import heard

METHODS: Mapping[str, Mapping[str, Any]] = {
    "grounding.residence": {"layers": [2, 3, 4]},
    "knockout.knock_out": {"layers": [2, 3, 4]},
}


def conflict_items(count: int) -> Items:
    """The shipped items at many loudnesses."""
    shipped = demo_items()
    return Items(_quieter(shipped[i % len(shipped)], i, count) for i in range(count))


def _quieter(item: Any, number: int, count: int) -> Any:
    scale = 1 - number / (2 * count)
    (audio, rate), (other, _) = heard(item.audio), heard(item.other_audio)
    return item.replaced(
        id=f"{item.id}-{number}",
        audio=audio * scale,
        other_audio=other * scale,
        sampling_rate=rate,
    )


def numbers(study: studies.Study) -> dict[str, np.ndarray]:
    """All that a study found, by name."""
    data = studies.load(study.out).to_xarray()
    return {str(name): data[name].values for name in data.data_vars}


def is_same(one: studies.Study, other: studies.Study) -> bool:
    """Whether two studies have the same bits."""
    mine, its = numbers(one), numbers(other)
    return mine.keys() == its.keys() and all(
        np.array_equal(mine[name], its[name], equal_nan=True) for name in mine
    )


def main(
    items: Annotated[int, typer.Option(help="how many items")] = 200,
    workers: Annotated[int, typer.Option(help="actors of Ray")] = 2,
    unit: Annotated[int, typer.Option(help="items of a unit")] = 4,
) -> None:
    """Run both methods in this process and on Ray, and compare them."""
    console, odd = Console(), False
    with tempfile.TemporaryDirectory() as folder:
        table = conflict_items(items).to_table(Path(folder) / "items.jsonl")
        for method, options in METHODS.items():
            found, took = {}, {}
            engines = {"here": None, "Ray": studies.Ray(workers=workers)}
            for name, engine in engines.items():
                start = time.monotonic()
                found[name] = studies.Study(
                    table, out=f"{folder}/{method}-{name}", method=method, unit=unit, **options
                )
                found[name].run(engine)
                took[name] = time.monotonic() - start
            same = is_same(*found.values())
            odd |= not same
            busy = ", ".join(f"{x:.0%}" for x in found["Ray"].status().busy.values())
            console.print(
                f"{method}: {items} items, {'bit for bit the same' if same else 'NOT THE SAME'}; "
                f"{took['here']:.0f} s here, {took['Ray']:.0f} s on {workers} workers, busy {busy}"
            )
    raise typer.Exit(int(odd))


if __name__ == "__main__":
    typer.run(main)
