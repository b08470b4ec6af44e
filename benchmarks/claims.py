"""Where the shipped model keeps the second digit: interchange, subspaces, scrubbing.

    python -m benchmarks.claims interchange
    python -m benchmarks.claims subspaces
    python -m benchmarks.claims scrubbing

Pairs of real clips of three digits by unseen speakers (of AUDIO_LENS_DATA or ../shared/data),
which differ in the second. What is learned or fitted is of one speaker and tested on the other,
beside every control.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated

import torch
import typer
from rich.console import Console

from audio_lens import HookedAudioTransformer, Items
from audio_lens.analysis import interchange, scrubbing, subspaces
from audio_lens.analysis.scrubbing import Hypothesis, Node
from audio_lens.items import Activations, Pairs, collect
from audio_lens.results import Result
from benchmarks.grounding import plain_items

SITE = "decoder.resid_pre"
SECOND, FIRST = (
    (0.86, 1.52),
    (0.18, 0.84),
)  # seconds: a word, and what of it is heard a little later
RANKS = [1, 2, 4, 8, 16, 32]
RIGHT = ("digit at the second word", SECOND, "answer")
CLAIMS = (RIGHT, ("digit at the first word", FIRST, "answer"), ("speaker", SECOND, "group"))


def who_speaks(items: Items) -> Pairs[Items]:
    """Items beside others of the same answer by another speaker."""
    said: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        said[str(item.answer)][str(item.group)].append(item)
    both = [
        (one, other)
        for of in said.values()
        if len(of) > 1
        for one, other in zip(*list(of.values())[:2], strict=False)
    ]
    return Items(one for one, _ in both).pairs([other for _, other in both])


def pooled(
    model: HookedAudioTransformer, pairs: Pairs[Items], site: str, layer: int | None
) -> tuple[Activations, Activations]:
    """Means over the second word, which leave out its timing: speakers differ in that, too."""
    layers = None if layer is None else [layer]
    one, other = (
        collect(model, side, site, SECOND, "mean", layers=layers, progress=False)
        for side in (pairs.clean, pairs.corrupted)
    )
    return one, other


def numbers(result: Result) -> str:
    return ", ".join(f"{value:.2f}" for value in result.mean().values.flatten().tolist())


def interchanged(model: HookedAudioTransformer, count: int, console: Console) -> None:
    pairs = plain_items(count, seed=5).pairs()
    by_layer = interchange.iia(model, pairs, SITE, SECOND, progress=False)
    console.print(by_layer.report[0])
    told = interchange.align(model, pairs, SITE, SECOND, layer=0, ranks=[1, 8], progress=False)
    console.print("\n".join(told.report))


def curves(model: HookedAudioTransformer, count: int, console: Console) -> None:
    one, other = plain_items(count, seed=17).pairs().split(share=0.5)
    speakers = who_speaks(plain_items(4 * count, seed=18))
    for site, layer in (("connector.out", None), (SITE, 3)):
        fitted = one.kept(model)[0]
        news = subspaces.differences(model, fitted, site, SECOND, layer=layer, progress=False)
        found = subspaces.basis(news, site=site, layer=layer)
        beside = subspaces.basis(pooled(model, speakers, site, layer))
        told = subspaces.curve(model, other, site, SECOND, found, RANKS, other=beside)
        diff = told.select(metric="logit_diff")
        console.print(f"{site} {'' if layer is None else layer}: {told.report[1]}")
        console.print(f"  {', '.join(map(str, RANKS))} directions: {numbers(diff)}")
        for name, control in diff.controls.items():
            console.print(f"  {name}: {numbers(control)}")


def scrubs(model: HookedAudioTransformer, count: int, console: Console) -> None:
    items = plain_items(count)
    for what, where, feature in CLAIMS:
        claim = Hypothesis([Node(SITE, 0, where, feature=feature)])
        told = scrubbing.scrub(
            model, items, claim, layers=[0, 2], skip_bad=True, draws=3, progress=False
        )
        for metric in told.coords["metric"]:
            one, empty = (x.of_metric(metric) for x in (told, told.controls["empty"]))
            console.print(f"{what}, {metric}: {numbers(one)} (empty {numbers(empty)})")


METHODS = {"interchange": interchanged, "subspaces": curves, "scrubbing": scrubs}


def main(
    method: Annotated[str, typer.Argument(help=", ".join(METHODS))],
    pairs: Annotated[int, typer.Option(help="how many pairs, of both speakers")] = 60,
) -> None:
    if method not in METHODS:
        raise typer.BadParameter(f"one of {', '.join(METHODS)}, not {method}")
    torch.set_num_threads(1)
    console = Console(soft_wrap=True, highlight=False)
    METHODS[method](HookedAudioTransformer.from_pretrained("embedded"), pairs, console)


if __name__ == "__main__":
    typer.run(main)
