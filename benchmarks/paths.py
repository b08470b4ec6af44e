"""What direct paths cost: every head of the shipped model's decoder to the logits.

    python -m benchmarks.paths
    python -m benchmarks.paths --pairs 16

Pairs of real clips of three digits by unseen speakers (of AUDIO_LENS_DATA or ../shared/data),
which differ in the second. What counts is the CPU time of one thread, both sides' own runs and all
controls included, in forwards of these pairs. Exit code 1: more than 2 forwards for 4 heads.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from audio_lens import HookedAudioTransformer
from audio_lens.analysis import paths
from audio_lens.metrics import logit_diff
from benchmarks.grounding import conflict_items

FORWARDS, HEADS = 2, 4


def seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main(pairs: Annotated[int, typer.Option(help="how many pairs")] = 32) -> None:
    torch.set_num_threads(1)
    console = Console()
    model = HookedAudioTransformer.from_pretrained("embedded")
    made = conflict_items(pairs).pairs(stream="audio")
    (batch,) = made.batches(model, size=pairs)
    clean = made.clean
    metric = logit_diff([one.answer for one in clean], [one.against for one in clean])
    n_heads = model.cfg.need_decoder.n_layers * model.cfg.need_decoder.n_heads
    with torch.no_grad():
        model(batch.pair.clean)
        forward = min(seconds(lambda: model(batch.pair.clean)) for _ in range(3))

    whole = seconds(
        lambda: paths.path(model, batch.pair, "heads", "logits", metric=metric, progress=False)
    )
    taken = whole / forward
    limit = FORWARDS * n_heads / HEADS
    console.print(
        f"{n_heads} heads to the logits over {pairs} pairs: {whole:.2f} CPU s with both runs and "
        f"all controls, {taken:.1f} forwards of {forward:.2f} s (limit {limit:.0f})",
        highlight=False,
    )
    if taken > limit:
        sys.exit(f"more than {FORWARDS} forwards for {HEADS} heads")


if __name__ == "__main__":
    typer.run(main)
