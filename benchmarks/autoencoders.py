"""What training an autoencoder costs beside its matrix products alone, and in memory.

    python -m benchmarks.autoencoders
    python -m benchmarks.autoencoders --d 768 --width 6144 --k 50

One thread. The products of a step are five: what latents read, what they write, and the three
gradients (of what they write, of what they read, and of the latents themselves), of the sizes of
the step. Steps and products are timed by turns, and the fastest rounds are compared. Memory is what
the peak rose by while training on folders of few and of many rows, each in a process of its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from audio_lens.analysis import autoencoders
from audio_lens.analysis.autoencoders.learning import Learner, Setting
from audio_lens.items import Activations
from audio_lens.items.activations import COLUMNS
from audio_lens.items.shards import key_of, table_key
from audio_lens.items.store import Store

SITE = "encoder.resid_post"
FEW, MANY = 20_000, 400_000  # rows
ROUNDS = 5

out = Console(highlight=False)


def main(
    d: Annotated[int, typer.Option(help="Entries of a row.")] = 384,
    width: Annotated[int, typer.Option(help="Latents.")] = 3072,
    k: Annotated[int, typer.Option(help="Active ones.")] = 32,
    rows: Annotated[int, typer.Option(help="Rows of a step.")] = 1024,
    memory: Annotated[bool, typer.Option(help="Measure memory, too.")] = True,
    risen: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Time a step beside its products, and the memory of few and of many rows."""
    torch.set_num_threads(1)
    if risen:
        print(json.dumps(_risen(risen, d)))
        return
    table = Table("kind", "step (ms)", "products (ms)", "products / step", box=None)
    for kind in ("topk", "batchtopk", "relu", "jumprelu"):
        step, products = timed(d, width, k, rows, kind)
        table.add_row(
            kind, f"{1000 * step:.1f}", f"{1000 * products:.1f}", f"{products / step:.2f}"
        )
    out.print(f"{rows} rows of {d}, {width} latents, {k} of them active, CPU seconds")
    out.print(table)
    if memory:
        for count in (FEW, MANY):
            told = _apart(count, d)
            out.print(
                f"{count:,} rows ({told['data_mb']:.0f} MB on disk): the peak rose by "
                f"{told['risen_mb']:.0f} MB"
            )


def timed(d: int, width: int, k: int, rows: int, kind: str) -> tuple[float, float]:
    """CPU seconds of a step, and of its five products, of the fastest rounds."""
    x = torch.randn(rows, d)
    setting = Setting(width, k, kind, 1_000_000, rows, 1e-3, 0, 25, 100 * width // k)
    learner = Learner.of(setting, x, None)
    other, latents = torch.randn(width, d), torch.randn(rows, width)

    def step() -> None:
        learner.learn(x)

    def products() -> None:
        read = x @ other.mT
        torch.mm(read, other)
        torch.mm(latents.mT, x)
        torch.mm(latents.mT, x)
        torch.mm(x, other.mT)

    held: dict[Callable[[], None], list[float]] = {step: [], products: []}
    for _ in range(ROUNDS):
        for run, seconds in held.items():
            run()
            start = time.process_time()
            for _ in range(3):
                run()
            seconds.append((time.process_time() - start) / 3)
    return min(held[step]), min(held[products])


# -------------------------------------------------------------------------------- memory


def _apart(count: int, d: int) -> dict[str, float]:
    """`_risen` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.autoencoders"]
    command += ["--risen", str(count), "--d", str(d)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(ran.stdout)


def _risen(count: int, d: int) -> dict[str, float]:
    """By how many MB the peak rose while training on so many rows from disk."""
    with tempfile.TemporaryDirectory() as folder:
        acts = _written(Path(folder), count, d)
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6
        autoencoders.train(torch.randn(1024, d), 256, 8, steps=3, progress=False)
        before = _peak_mb()
        autoencoders.train(acts, 256, 8, steps=200, progress=False)
        return {"risen_mb": _peak_mb() - before, "data_mb": size}


def _written(folder: Path, count: int, d: int) -> Activations:
    """Activations of random rows, written shard by shard as `collect` writes them."""
    site = {"layers": [0], "positions_of": "encoder"}
    index: dict[str, Any] = {"sites": {SITE: site}, "where": "audio", "pool": "none"}
    each = 1000
    items = [{"id": str(i)} for i in range(count // each)]
    index |= {"dtype": "float32", "items": items, "meta": {"weights_hash": "", "items_hash": ""}}
    store = Store.open(index, folder, 2**24)
    for number in range(len(items)):
        at = torch.arange(each)
        columns = {"item": torch.full((each,), number), "row": at * 0, "position": at}
        columns["second"] = at / 50
        kept = {table_key("encoder", name): columns[name] for name in COLUMNS}
        store.add([number], kept | {key_of(SITE, 0): torch.randn(each, d)})
    return store.finished()


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    typer.run(main)
