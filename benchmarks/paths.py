"""What direct paths cost and say: every head of the shipped model's decoder to the logits.

    python -m benchmarks.paths
    python -m benchmarks.paths --pairs 16

Pairs of real clips of three digits by unseen speakers (of AUDIO_LENS_DATA or ../shared/data),
which differ in the second. What counts is the CPU time of one thread, both sides' own runs and all
controls included, in forwards of these pairs; beside it, what the heads do one by one and all at
once, and the same to the queries of one head, for which blocks have to run again.
Exit code 1: more than 2 forwards for 4 heads to the logits.
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
from benchmarks.grounding import plain_items

FORWARDS, HEADS = 2, 4
RECEIVERS = ("logits", "L5H0.q")  # the first is held to the limit


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, and what it gives."""
    start = time.process_time()
    given = call()
    return time.process_time() - start, given


def main(pairs: Annotated[int, typer.Option(help="how many pairs")] = 32) -> None:
    torch.set_num_threads(1)
    console = Console(soft_wrap=True, highlight=False)
    model = HookedAudioTransformer.from_pretrained("embedded")
    made = plain_items(pairs).pairs()
    (batch,) = made.batches(model, size=pairs)
    clean = made.clean
    metric = logit_diff([str(one.answer) for one in clean], [str(one.against) for one in clean])
    with torch.no_grad():
        model(batch.pair.clean)
        forward = min(seconds(lambda: model(batch.pair.clean))[0] for _ in range(3))
    dear = []
    for receiver in RECEIVERS:
        whole, told = seconds(
            lambda receiver=receiver: paths.path(
                model, batch.pair, "heads", receiver, metric=metric, progress=False
            )
        )
        told = told.of_metric(told.coords["metric"][0])
        shares = told.mean().values
        n_heads, taken = int(shares.isfinite().sum()), whole / forward
        limit = FORWARDS * n_heads / HEADS
        console.print(
            f"{n_heads} heads to {receiver} over {pairs} pairs: {whole:.2f} CPU s with both runs "
            f"and all controls, {taken:.1f} forwards of {forward:.2f} s (limit {limit:.0f})"
        )
        singles = ", ".join(f"{c.at['sender']} {c.value:.2f}" for c in told.top(4))
        at_once = told.controls["together"].mean().values.item()
        console.print(
            f"  of the whole effect: {singles}; single heads add up to {shares.nansum():.2f}, all "
            f"at once give {at_once:.2f}"
        )
        dear.append(taken > limit)
    if dear[0]:
        sys.exit(f"more than {FORWARDS} forwards for {HEADS} heads")


if __name__ == "__main__":
    typer.run(main)
