"""Whether a study on Ray has the bits of one in this process, and how busy its workers are.

    python -m benchmarks.studies
    python -m benchmarks.studies --folder results/bits
    python -m benchmarks.studies --items 8 --workers 2

Conflict items of the shipped clips, again and again, each time less loud; where both streams are in
which layer (`grounding.residence`) and what each head's attention to the audio is worth
(`knockout.knock_out`). With a folder the same command goes on where it was stopped. Exit code 1:
numbers that differ in a bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from audio_lens import Items, studies
from audio_lens.items import demo_items
from audio_lens.items.item import heard
from audio_lens.studies.status import reports_of

METHODS: Mapping[str, Mapping[str, Any]] = {
    "grounding.residence": {"layers": [2, 4]},
    "knockout.knock_out": {"layers": [2, 4]},
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
    folder: Annotated[Path | None, typer.Option(help="of the studies, to go on with")] = None,
) -> None:
    """Run both methods in this process and on Ray, and compare them."""
    console, odd = Console(), False
    with _place(folder) as place:
        table = conflict_items(items).to_table(place / "items.jsonl")
        for method, options in METHODS.items():
            asked = {"method": method, "unit": unit, **options}
            here, shared = (
                studies.Study(table, out=place / f"{method}-{name}", **asked)
                for name in ("here", "Ray")
            )
            here.run()
            shared.run(studies.Ray(workers=workers))
            same = is_same(here, shared)
            odd |= not same
            console.print(
                f"{method}: {items} items, {'bit for bit the same' if same else 'NOT THE SAME'}; "
                f"one process {_busy(here)}; Ray {_busy(shared)}",
                soft_wrap=True,
            )
    raise typer.Exit(int(odd))


@contextmanager
def _place(folder: Path | None) -> Iterator[Path]:
    """The folder that is named, or one that goes away again."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def _busy(study: studies.Study) -> str:
    """What the workers of a study took, and their busy shares of their own spans."""
    took = sum(one.end - one.start for one in reports_of(study.store))
    shares = ", ".join(f"{share:.1%}" for share in study.status().busy.values())
    return f"{took:.0f} s of work, busy {shares}"


if __name__ == "__main__":
    typer.run(main)
