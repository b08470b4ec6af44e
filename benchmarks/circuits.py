"""A circuit of the shipped model for "which digit is second": how much of the answer it carries.

    python -m benchmarks.circuits
    python -m benchmarks.circuits --pairs 32 --share 0.1

Pairs of real clips of three digits by unseen speakers (of AUDIO_LENS_DATA or ../shared/data),
which differ in the second. Edges are scored by EAP-IG on some speakers; the strongest are held
against others, who were not looked at, beside several circuits of as many random edges.
Completeness is what all other edges keep, minimality what is lost without each node. Exit code 1:
less than 0.8 of the logit difference, or 0.3 or more by random edges.
"""

from __future__ import annotations

import sys
from typing import Annotated

import torch
import typer
from rich.console import Console

from audio_lens import HookedAudioTransformer
from audio_lens.analysis import paths
from audio_lens.analysis.paths.faith import CONTROLS, RANDOM
from benchmarks.grounding import plain_items

KEPT, BY_CHANCE, DRAWS = 0.8, 0.3, 3
FEW = 8  # pairs for minimality, which runs once for every node
METRIC = "logit_diff"


def main(
    pairs: Annotated[int, typer.Option(help="how many pairs, of all speakers")] = 48,
    share: Annotated[float, typer.Option(help="of all edges, to keep")] = 0.25,
) -> None:
    torch.set_num_threads(1)
    console = Console(soft_wrap=True, highlight=False)
    model = HookedAudioTransformer.from_pretrained("embedded")
    found_on, held_out = plain_items(pairs).pairs().split(share=0.5)
    scores = paths.eap_ig(model, found_on, progress=False)
    n_all = int(paths.Graph.of(model).exists.sum())
    circuit = paths.prune(model, scores, int(share * n_all))

    drawn = []
    for seed in range(DRAWS):
        controls = CONTROLS if not seed else [RANDOM]
        told = paths.faithfulness(
            model, held_out, circuit, controls=controls, seed=seed, progress=False
        )
        drawn.append(told.controls[RANDOM].of_metric(METRIC).mean().values.item())
        if not seed:
            console.print("\n".join(told.report[:-1]))
            kept = told.of_metric(METRIC).select(kept="circuit").mean().values.item()
    console.print(f"{METRIC}: random edges keep {', '.join(f'{x:.2f}' for x in drawn)}")
    few = held_out[list(range(min(FEW, len(held_out))))]
    console.print("\n".join(paths.minimality(model, few, circuit, progress=False).report))
    if kept < KEPT or max(drawn) >= BY_CHANCE or circuit.share > share:
        sys.exit(f"a circuit is to keep {KEPT} of the difference, random edges less than 0.3")


if __name__ == "__main__":
    typer.run(main)
