"""What a study costs beside a plain loop over its items, in CPU seconds of one thread.

    python -m benchmarks.study_overhead
    python -m benchmarks.study_overhead --items 16 --rounds 1

Both have their model loaded. Loop and study take turns, and the least of each counts. A sweep is
compared with a loop of `patching.sweep`, once item by item (whose bits are the study's) and once
with four items of equal layout together; a method with calls for as many items as a unit holds.
Exit code 1: a study that costs above 5 % more, or four at once that save less than 15 % of a sweep
by layer.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from audio_lens import HookedAudioTransformer, Items, patching, studies
from audio_lens.analysis import knockout
from benchmarks.studies import conflict_items

MOST, LEAST_SAVED = 0.05, 0.15
LAYERS: Mapping[str, Any] = {"site": "decoder.resid_pre", "axes": "layer"}
TIMES: Mapping[str, Any] = {
    **{"site": "decoder.resid_pre", "axes": ("layer", "time")},
    **{"windows": 0.5},
}
KNOCKED: Mapping[str, Any] = {"layers": [2, 3]}


def loop(model: HookedAudioTransformer, items: Items, options: Mapping[str, Any]) -> None:
    """A sweep of every item, as one writes it by hand."""
    for item in items:
        one = Items([item])
        (batch,) = one.pairs(stream="audio").batches(model, 1)
        metric = one.metrics(model)["logit_diff"]
        patching.sweep(model, **batch.pair, metric=metric, memory_gb=2.0, progress=False, **options)


def spent(run: Callable[[], Any]) -> float:
    """CPU seconds, of all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start


def worker_of(table: Path, out: str, unit: int, **options: Any) -> studies.Worker:
    """A worker of a new study."""
    return studies.Worker(studies.Study(table, out=out, unit=unit, **options).out)


def main(
    items: Annotated[int, typer.Option(help="how many items")] = 48,
    unit: Annotated[int, typer.Option(help="items of a unit")] = 16,
    rounds: Annotated[int, typer.Option(help="turns of each")] = 3,
) -> None:
    """Time loops and studies, and print what studies cost more."""
    torch.set_num_threads(1)
    console, worst = Console(), 0.0
    model = HookedAudioTransformer.from_pretrained("embedded")
    with tempfile.TemporaryDirectory() as folder:
        table = conflict_items(items).to_table(Path(folder) / "items.jsonl")
        held = Items.from_table(table)

        def knocked() -> None:
            for first in range(0, items, unit):
                knockout.knock_out(model, held[first : first + unit], progress=False, **KNOCKED)

        sweeps = {"sweep by layer": LAYERS, "sweep by layer and time": TIMES}
        cases: list[tuple[str, Callable[[], None], dict[str, Any]]] = [
            (f"{name}, {told}", lambda o=options: loop(model, held, o), {**options, **own})
            for name, options in sweeps.items()
            for told, own in {
                "one by one": {"batch": 1, "stream": "audio"},
                "four at once": {"batch": 4, "stream": "audio"},
            }.items()
        ]
        cases.append(("knockout.knock_out", knocked, {"method": knockout.knock_out, **KNOCKED}))
        for number, (name, plain, options) in enumerate(cases):
            took: dict[str, list[float]] = {"loop": [], "study": []}
            for turn in range(rounds):
                hand = worker_of(table, f"{folder}/{number}-{turn}", unit, **options)
                took["study"].append(spent(lambda h=hand: h.run(h.store.left())))
                took["loop"].append(spent(plain))
            one, other = (1e3 * min(took[key]) / items for key in ("loop", "study"))
            is_saving = options.get("batch") == 4 and options.get("axes") == "layer"
            worst = max(worst, other / one - 1 + (MOST + LEAST_SAVED if is_saving else 0.0))
            console.print(
                f"{name}: {one:.1f} ms an item in a loop, {other:.1f} in a study "
                f"({other / one - 1:+.1%})"
            )
    raise typer.Exit(int(worst > MOST))


if __name__ == "__main__":
    typer.run(main)
