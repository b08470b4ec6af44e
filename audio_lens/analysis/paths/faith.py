"""How much of the answer a circuit carries, what the rest carries, and what it could do without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.analysis.paths.circuits import (
    Circuit,
    random_circuit,
    without_edges,
    without_nodes,
)
from audio_lens.analysis.paths.graph import Graph
from audio_lens.analysis.paths.sides import Sides, Study, pairs_of
from audio_lens.analysis.paths.streams import Streams
from audio_lens.analysis.paths.telling import told
from audio_lens.errors import InputError
from audio_lens.items import Pairs, method
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result
from audio_lens.running import evaluating

CIRCUIT, REST = "circuit", "all but it"
IDENTITY, EMPTY, RANDOM = "identity", "empty", "random_sites"
CONTROLS = (IDENTITY, EMPTY, RANDOM)


def faithfulness(
    model: HookedAudioTransformer,
    pairs: Any,
    circuit: Circuit,
    *,
    metric: Any = None,
    controls: Sequence[str] = CONTROLS,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How much of the effect is left when everything outside a circuit is corrupted.

    Every receiver reads a sum of its own: over edges of the circuit what is written in this run,
    over all others what the corrupted run wrote. 1 is the clean run, 0 the corrupted. "all but
    it" keeps all other edges and corrupts the circuit: a complete circuit leaves nothing there.

    Args:
        model: an audio LLM.
        pairs: as in `path`, but not prepared; others than those the circuit was found on.
        circuit: of `prune`.
        metric: as in `items.measured`.
        controls: of "identity" (all edges kept), "empty" (none) and "random_sites" (as many
            edges, at random).
        by: a label whose values are drawn in place of items for the intervals.
        size: of the batches.
        seed: of the draws.
        progress: as in `patching.sweep`.

    Returns:
        Shares of the effect that are kept, with the axis "kept": ratios of means, with intervals.

    Raises:
        InputError: a circuit of another model, or an unknown control.
        ItemError: no pair that the model tells apart.
    """
    return _faithfulness(
        model,
        pairs_of(pairs),
        circuit,
        metric=metric,
        controls=list(controls),
        by=by,
        size=size,
        seed=seed,
        progress=progress,
    )


@method("paths.faithfulness")
def _faithfulness(
    model: HookedAudioTransformer,
    pairs: Pairs,
    circuit: Circuit,
    *,
    metric: Any = None,
    controls: Sequence[str] = CONTROLS,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How much of the effect is left when everything outside a circuit is corrupted."""
    unknown = [name for name in controls if name not in CONTROLS]
    if unknown:
        raise InputError(f"no control {unknown[0]!r} here; there is {', '.join(CONTROLS)}")
    graph = circuit.graph(model)
    own = graph.mask(circuit.edges)
    drawn = {
        IDENTITY: graph.exists,
        EMPTY: torch.zeros_like(own),
        RANDOM: graph.mask(random_circuit(graph, len(circuit), seed).edges),
    }
    masks = [own, graph.exists & ~own, *(drawn[name] for name in controls)]
    study = Study.of_pairs(model, pairs, metric)
    shares, gaps = _kept(study, graph, masks, size, progress)
    result = told(study, shares[..., :2], {"kept": [CIRCUIT, REST]}, gaps, by=by, seed=seed)
    for number, name in enumerate(controls, start=2):
        result.controls[name] = told(study, shares[..., number], {}, gaps, by=by, seed=seed)
    result.meta |= {"title": "what a circuit carries", "value": "share of the effect kept"}
    result.report += _said(result, circuit)
    return result


def minimality(
    model: HookedAudioTransformer,
    pairs: Any,
    circuit: Circuit,
    *,
    units: str = "nodes",
    metric: Any = None,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What a circuit loses without each of its nodes, or edges, in turn.

    What it does not lose, it could do without: by itself, since two that stand in for each other
    can each be spared.

    Args:
        units: "nodes" leaves out all that one of them writes, "edges" one edge.
        model, pairs, circuit, metric, by, size, seed, progress: as in `faithfulness`.

    Returns:
        Shares of the effect that are lost, with the axis "node" or "edge": ratios of means, with
        intervals.

    Raises:
        InputError: a circuit of another model, or other units.
        ItemError: no pair that the model tells apart.
    """
    return _minimality(
        model,
        pairs_of(pairs),
        circuit,
        units=units,
        metric=metric,
        by=by,
        size=size,
        seed=seed,
        progress=progress,
    )


@method("paths.minimality")
def _minimality(
    model: HookedAudioTransformer,
    pairs: Pairs,
    circuit: Circuit,
    *,
    units: str = "nodes",
    metric: Any = None,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What a circuit loses without each of its nodes, or edges, in turn."""
    left = {"nodes": without_nodes, "edges": without_edges}
    if units not in left:
        raise InputError(f"units is 'nodes' or 'edges', got {units!r}")
    graph = circuit.graph(model)
    smaller = dict(left[units](circuit))
    masks = [graph.mask(edges) for edges in (circuit.edges, *smaller.values())]
    study = Study.of_pairs(model, pairs, metric)
    shares, gaps = _kept(study, graph, masks, size, progress)
    lost, axis = shares[..., :1] - shares[..., 1:], units.removesuffix("s")
    result = told(study, lost, {axis: list(smaller)}, gaps, by=by, seed=seed)
    result.controls[CIRCUIT] = told(study, shares[..., 0], {}, gaps, by=by, seed=seed)
    result.meta |= {"title": f"without each {axis}", "value": "share of the effect lost"}
    for name in study.wanted:
        top = ", ".join(f"{c.at[axis]} {c.value:.2f}" for c in result.top(3, name))
        low = result.of_metric(name).low
        idle = int((low <= 0).sum()) if low is not None else 0
        result.report.append(
            f"{name}: the circuit loses most without {top}; of {len(smaller)} {units}, {idle} "
            "could be left out one at a time with no loss that is told from none."
        )
    return result


def _kept(
    study: Study,
    graph: Graph,
    masks: Sequence[Bool[Tensor, "s r"]],
    size: int,
    progress: bool | None,
) -> tuple[Float[Tensor, "n m masks"], Float[Tensor, "n m"]]:
    """What the metrics gain over the corrupted run with some edges kept, and what there is."""
    columns = []
    with evaluating(study.model), torch.no_grad():
        for sides in study.batches(graph.nodes, size, "circuits", progress):
            columns.append((sides.rows, torch.stack(list(_measured(graph, sides, masks)), dim=-1)))
    values = study.filled(columns)
    clean, corrupted = values[..., 0], values[..., 1]
    return values[..., 2:] - corrupted[..., None], clean - corrupted


def _measured(
    graph: Graph, sides: Sides, masks: Sequence[Bool[Tensor, "s r"]]
) -> Iterator[Float[Tensor, "b m"]]:
    """The metrics of both runs, and of one for each choice of edges."""
    readout = sides.readout()
    streams = Streams.of(graph.nodes, sides.corrupted, sides.clean)
    at, logits = streams.at(readout.positions), graph.nodes.logits
    yield sides.measure(readout, at.stream(logits) + at.change_of(logits))
    yield sides.measure(readout, at.stream(logits))
    prompts = torch.arange(len(readout.positions), device=readout.positions.device)[:, None]
    for mask in masks:
        resid = graph.run(streams, sides.corrupted, mask)
        yield sides.measure(readout, resid[prompts, readout.positions])


def _said(result: Result, circuit: Circuit) -> Iterator[str]:
    """What was found, and what it cannot show."""
    for metric in result.coords["metric"]:
        own, rest = (cell.value for cell in result.cells(metric))
        beside = {n: c.of_metric(metric).mean().values.item() for n, c in result.controls.items()}
        random = f"; as many at random {beside[RANDOM]:.2f}" if RANDOM in beside else ""
        yield (
            f"{metric}: {len(circuit)} of {circuit.n_all} edges ({circuit.share:.0%}) keep "
            f"{own:.2f} of the effect{random}; all other edges alone keep {rest:.2f}."
        )
    yield (
        "A circuit is one set of edges that suffices for these pairs under this corruption: "
        "others may do as well, and what is the same on both sides is kept for free."
    )
