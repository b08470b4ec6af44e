"""Circuits: edges that are kept, and how much of the answer they carry."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from audio_lens.analysis.paths.graph import Edge, Graph
from audio_lens.arguments import path_of, whole
from audio_lens.errors import InputError
from audio_lens.files import write
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result
from audio_lens.results.edges import plot_edges
from audio_lens.timeline import Span

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Circuit:
    """Edges from what writes to what reads, and all else left out.

    Attributes:
        edges: by the names of sender and receiver.
        weights: of every edge, its score.
        n_all: how many edges the model has.
        windows: stretches of the clips, in seconds, that are senders of their own.
        model: its name.
        metric: what the edges were scored by; empty where they were drawn at random.
        n_layers: blocks of the decoder.
    """

    edges: tuple[Edge, ...]
    weights: tuple[float, ...] = field(repr=False)
    n_all: int
    windows: tuple[Span, ...] = ()
    model: str = ""
    metric: str = ""
    n_layers: int = 0

    def __len__(self) -> int:
        return len(self.edges)

    @property
    def share(self) -> float:
        """Of all edges."""
        return len(self) / self.n_all

    @property
    def nodes(self) -> list[str]:
        """What writes over some edge."""
        return list(dict.fromkeys(sender for sender, _ in self.edges))

    @property
    def seconds(self) -> dict[str, tuple[float, float]]:
        """Where audio nodes lie in the clip."""
        named = {f"audio {w.start_s:.2f}-{w.end_s:.2f} s": w for w in self.windows}
        return {n: (w.start_s, w.end_s) for n, w in named.items() if n in self.nodes}

    def graph(self, model: HookedAudioTransformer) -> Graph:
        """The graph of a model that the edges are in.

        Raises:
            InputError: a model of another shape.
        """
        graph = Graph.of(model, self.windows)
        if int(graph.exists.sum()) != self.n_all:
            raise InputError(
                f"the circuit is of {self.model or 'a model'} with {self.n_all} edges, and "
                f"{model.cfg.model_name} has {int(graph.exists.sum())}"
            )
        return graph

    # ---------------------------------------------------------------- files, figures

    def save(self, path: str | Path) -> Path:
        """Write it as JSON; `load` reads the same back.

        Raises:
            OutputError: a path that cannot be written; the old file stays.
        """
        weighed = zip(self.edges, self.weights, strict=True)
        told = {
            "edges": [[*edge, weight] for edge, weight in weighed],
            "n_all": self.n_all,
            "n_layers": self.n_layers,
            "windows": [[w.start_s, w.end_s, w.label] for w in self.windows],
            "model": self.model,
            "metric": self.metric,
        }
        return write(path, json.dumps(told, indent=1).encode())

    @staticmethod
    def load(path: str | Path) -> Circuit:
        """Read what `save` wrote.

        Raises:
            InputError: a file that is missing or holds something else.
        """
        path = path_of("path", path)
        if not path.is_file():
            raise InputError(f"no saved circuit at {path}")
        try:
            told = json.loads(path.read_text())
            edges = told["edges"]
            return Circuit(
                tuple((str(sender), str(receiver)) for sender, receiver, _ in edges),
                tuple(float(weight) for _, _, weight in edges),
                int(told["n_all"]),
                tuple(Span(*window) for window in told["windows"]),
                str(told["model"]),
                str(told["metric"]),
                int(told["n_layers"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} does not hold a saved circuit: {error!r}") from error

    def plot(self) -> go.Figure:
        """Its nodes by layer and part, and its edges, wide where their scores are large.

        Edges tell their scores when pointed at, audio nodes their seconds; a click on one in a
        page with the clip plays them.
        """
        return plot_edges(self)


def prune(
    model: HookedAudioTransformer,
    scores: Result,
    n: int,
    *,
    metric: str | None = None,
    windows: Sequence[Span] = (),
) -> Circuit:
    """The circuit of the ``n`` edges whose mean scores are largest in size.

    Edges that lie on no way from what enters to the logits carry nothing and are left out, so
    that it may have fewer.

    Args:
        model: the model that was scored.
        scores: of `eap` or `eap_ig`.
        n: how many edges to begin with.
        metric: by which; None takes the logit difference, or the only one.
        windows: those that the scores were made with.

    Raises:
        InputError: scores of another graph, no such metric, or edges none of which are connected.
    """
    graph = Graph.of(model, windows)
    metric = _metric_of(scores, metric)
    mean = scores.of_metric(metric).mean()
    named = [sender.name for sender in graph.senders], [r.name for r in graph.receivers]
    if (mean.coords.get("sender"), mean.coords.get("receiver")) != named:
        raise InputError("these scores are of another model, or of other windows")
    sizes = mean.values.abs().masked_fill(~graph.exists, -1.0)
    most = sizes.flatten().topk(min(whole("n", n, least=1), int(graph.exists.sum()))).indices
    chosen = torch.zeros(sizes.numel(), dtype=torch.bool)
    chosen[most] = True
    kept = graph.connected(chosen.reshape(sizes.shape))
    if not kept.any():
        raise InputError(f"none of the {n} strongest edges lies on a way to the logits: take more")
    return circuit_of(graph, kept, mean.values, metric)


def circuit_of(
    graph: Graph, kept: Bool[Tensor, "s r"], weights: Tensor | None = None, metric: str = ""
) -> Circuit:
    """The circuit of edges of a graph."""
    own = torch.zeros(kept.shape) if weights is None else weights
    return Circuit(
        tuple(graph.edges(kept)),
        tuple(own[kept & graph.exists].tolist()),
        int(graph.exists.sum()),
        graph.windows,
        graph.nodes.model.cfg.model_name,
        metric,
        len(graph.nodes.blocks),
    )


def random_circuit(graph: Graph, n: int, seed: int = 0) -> Circuit:
    """As many edges, drawn from all."""
    draw = torch.Generator().manual_seed(seed)
    places = graph.exists.flatten().nonzero().flatten()
    chosen = torch.zeros(graph.exists.numel(), dtype=torch.bool)
    chosen[places[torch.randperm(len(places), generator=draw)[:n]]] = True
    return circuit_of(graph, chosen.reshape(graph.exists.shape))


def without_nodes(circuit: Circuit) -> Iterator[tuple[str, list[Edge]]]:
    """For every node the edges that are left without what it writes."""
    for node in circuit.nodes:
        yield node, [edge for edge in circuit.edges if edge[0] != node]


def without_edges(circuit: Circuit) -> Iterator[tuple[str, list[Edge]]]:
    """For every edge the others."""
    for edge in circuit.edges:
        yield " -> ".join(edge), [one for one in circuit.edges if one != edge]


def _metric_of(scores: Result, metric: str | None) -> str:
    known = scores.coords.get("metric", [])
    if metric is None:
        metric = "logit_diff" if "logit_diff" in known else known[0] if len(known) == 1 else None
    if metric is None or metric not in known:
        raise InputError(f"name one of the metrics: {', '.join(known)}")
    return metric
