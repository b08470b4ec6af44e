"""What collecting costs beside the forwards alone, in CPU time and in memory.

    python -m benchmarks.collecting
    python -m benchmarks.collecting --clips 100 --pool mean

The shipped model over its shipped clips at many loudnesses, all encoder layers. Each measurement
is a process of its own, with one thread: the forwards of batches, one batch whose activations are
kept whole, and `collect` to a folder. Memory is what the peak rose by over a loaded model.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from audio_lens import HookedAudioTransformer, Item, Items, collect
from audio_lens.audio import read
from audio_lens.models.embedded import clip_pairs

SITE = "encoder.resid_post"
KEYS = ("cpu_s", "risen_mb")
MODES = ("forwards", "one batch", "collect")


def clips(count: int) -> Items:
    """The shipped clips again and again, each time less loud."""
    pairs = clip_pairs()
    return Items(
        Item(read(pair.clean) * (1 - i / (2 * count)), pair.question, sampling_rate=16_000)
        for i in range(count)
        for pair in [pairs[i % len(pairs)]]
    )


def measured(mode: str, count: int, size: int, pool: str | None) -> dict[str, float]:
    """CPU seconds of a mode, and by how many MB the peak of memory rose."""
    torch.set_num_threads(1)
    model, items = HookedAudioTransformer.from_pretrained("embedded"), clips(count)
    before, start = _peak_mb(), time.process_time()
    if mode == "collect":
        with tempfile.TemporaryDirectory() as folder:
            collect(model, items, SITE, pool=pool, to=folder, size=size, progress=False)
    else:
        _forwards(model, items, size, keeps=mode == "one batch")
    return {"cpu_s": time.process_time() - start, "risen_mb": _peak_mb() - before}


@torch.no_grad()
def _forwards(model: HookedAudioTransformer, items: Items, size: int, keeps: bool) -> None:
    for batch in items.batches(model, size):
        if keeps:
            model.run_with_cache(batch.inputs, part="encoder")
            return
        model.encode(batch.inputs)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def apart(mode: str, *asked: Any) -> dict[str, float]:
    """The measurement in a process of its own."""
    call = f"from benchmarks.collecting import *; print(json.dumps(measured({mode!r}, *{asked!r})))"
    made = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True)
    return json.loads(made.stdout.splitlines()[-1])


def main(
    count: Annotated[int, typer.Option("--clips", help="How many clips.")] = 500,
    size: Annotated[int, typer.Option(help="Clips of a batch.")] = 16,
    pool: Annotated[str, typer.Option(help="mean, or nothing.")] = "",
    rounds: Annotated[int, typer.Option(help="Measurements of each; the least counts.")] = 3,
) -> None:
    """Measure and print a table."""
    table = Table("", "CPU s", "of the forwards", "memory risen by (MB)")
    found = {
        mode: [apart(mode, count, size, pool or None) for _ in range(rounds)] for mode in MODES
    }
    least = {
        m: {key: min(run[key] for run in runs) for key in runs[0]} for m, runs in found.items()
    }
    for mode, run in least.items():
        share = run["cpu_s"] / least["forwards"]["cpu_s"]
        table.add_row(mode, f"{run['cpu_s']:.2f}", f"{share:.2f}", f"{run['risen_mb']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
