"""What it costs to read the weight of an adapted map: made anew, and kept while nothing changes.

    python -m benchmarks.kept_weights

The weight alone, by width (rank 16, float32), and a sweep over layers and heads of the shipped
model with an adapter on every attention map. CPU time of one thread; the least of several runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from audio_lens import HookedAudioTransformer, metrics, minimal_pair, patching
from audio_lens.analysis.adapters.wearing import put_on
from audio_lens.models.embedded import default_pair
from audio_lens.models.loading import kept
from audio_lens.models.loading.lora import LoraLinear, LowRank

WIDTHS, RANK, REPEATS = (192, 1280, 4096), 16, 3
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def seconds(run: Callable[[], object]) -> float:
    """The least CPU time of a few runs, after one that is not counted."""
    run()
    taken = []
    for _ in range(REPEATS):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return min(taken)


def both(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds with weights made anew each time, and with weights kept."""
    most = kept.MOST_BYTES
    kept.MOST_BYTES = 0
    kept._kept.clear()
    anew = seconds(run)
    kept.MOST_BYTES = most
    return anew, seconds(run)


def adapted(width: int) -> LoraLinear:
    """A square map with an adapter."""
    halves = torch.randn(RANK, width), torch.randn(width, RANK)
    return LoraLinear(nn.Linear(width, width), LowRank(*halves, 1.0)).requires_grad_(False)


def sweep_of_heads() -> Callable[[], object]:
    """A sweep over the decoder's heads, whose output maps are adapted."""
    model = HookedAudioTransformer.from_pretrained("embedded")
    pair = default_pair()
    made = minimal_pair(model, pair.clean, pair.corrupted, text=pair.question)
    ranks = {
        f"decoder.blocks.{layer}.attn.{module}": RANK
        for layer in range(model.cfg.need_decoder.n_layers)
        for module in MODULES
    }
    put_on(model, ranks, scale=2.0, seed=0)
    metric = metrics.logit_diff(pair.answer, pair.against)
    asked = {"site": "decoder.attn.z", "axes": ("layer", "head", "position"), "metric": metric}
    return lambda: patching.sweep(model, **made, **asked, progress=False)


def main() -> None:
    torch.set_num_threads(1)
    table = Table("what", "anew, ms", "kept, ms", "ratio", box=None)
    for width in WIDTHS:
        one = adapted(width)
        anew, again = both(lambda one=one: one.weight)
        ratio = f"{anew / again:.1f}"
        table.add_row(
            f"weight of {width} by {width}", f"{1e3 * anew:.2f}", f"{1e3 * again:.2f}", ratio
        )
    anew, again = both(sweep_of_heads())
    shown = f"{1e3 * anew:.0f}", f"{1e3 * again:.0f}", f"{anew / again:.1f}"
    table.add_row("sweep over layers, heads, positions", *shown)
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
