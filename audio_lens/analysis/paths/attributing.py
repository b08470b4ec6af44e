"""Scores of edges by gradients: EAP, and EAP-IG along the way between both sides' embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.paths.graph import Graph, linears_of, sizes_of
from audio_lens.analysis.paths.sides import Sides, Study, pairs_of
from audio_lens.analysis.paths.streams import Streams
from audio_lens.analysis.paths.telling import told
from audio_lens.arguments import whole
from audio_lens.errors import InputError
from audio_lens.items import Pairs, method
from audio_lens.metrics import MetricFn, Reading, at_positions
from audio_lens.models import HookedAudioTransformer
from audio_lens.patching.attribution.runs import differentiable
from audio_lens.patching.engine.hooked import output_of
from audio_lens.results import Result
from audio_lens.running import evaluating
from audio_lens.timeline import Span

INPUT_EDGES = "input_edges"


def eap(model: HookedAudioTransformer, pairs: Any, **options: Any) -> Result:
    """Edge attribution patching (2310.10348): `eap_ig` with the gradient at the clean run alone.

    Takes all that `eap_ig` does, but for ``steps``.
    """
    return eap_ig(model, pairs, steps=0, **options)


def eap_ig(
    model: HookedAudioTransformer,
    pairs: Any,
    *,
    steps: int = 5,
    windows: Sequence[Span] = (),
    metric: Any = None,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What corrupting each edge would change, estimated by gradients (EAP-IG, 2403.17806).

    An edge runs from what writes to the residual stream to what reads it. Its score is the change
    of what is written, times the gradient of the metric by what is read: on average over
    ``steps`` points ``corrupted + k/steps (clean - corrupted)`` of what enters the decoder, k from
    0 to steps - 1. That is behind the connector: the text's embeddings stay where both sides have
    the same.

    Args:
        model: an audio LLM.
        pairs: as in `path`, but not prepared.
        steps: points on the way; 0 takes the gradient at the clean run alone (EAP).
        windows: stretches of the clips, in seconds, that are senders of their own.
        metric: as in `items.measured`; differentiable.
        by: a label whose values are drawn in place of items for the intervals.
        size: of the batches.
        seed: of the intervals.
        progress: as in `patching.sweep`.

    Returns:
        Scores with the axes "sender" and "receiver", in units of the metric: below 0, corrupting
        the edge lowers it. NaN where there is no edge. The control "input_edges" is what the
        edges of all that enters add up to, as a share of the whole effect: it goes to 1 as the
        steps grow, and its distance from 1 is the error of taking so few.

    Raises:
        InputError: a decoder that hears by cross-attention or is no plain stack of blocks, hooks
            in force, a metric without gradients.
        ItemError: no pair that the model tells apart.
    """
    return _eap_ig(
        model,
        pairs_of(pairs),
        steps=whole("steps", steps, least=0),
        windows=list(windows),
        metric=metric,
        by=by,
        size=size,
        seed=seed,
        progress=progress,
    )


@method("paths.eap_ig")
def _eap_ig(
    model: HookedAudioTransformer,
    pairs: Pairs,
    *,
    steps: int = 5,
    windows: Sequence[Span] = (),
    metric: Any = None,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What corrupting each edge would change, estimated by gradients (`eap_ig`)."""
    graph = Graph.of(model, windows)
    study = Study.of_pairs(model, pairs, metric)
    scores: list[tuple[list[int], Tensor]] = []
    gaps: list[tuple[list[int], Tensor]] = []
    with evaluating(model):
        for sides in study.batches(graph.nodes, size, "edges", progress):
            streams = sides.streams()
            scores.append((sides.rows, _Scores(graph, sides, streams).values(steps)))
            gaps.append((sides.rows, _gaps(graph, sides, streams)))
    values, gap = study.filled(scores), study.filled(gaps)
    axes = {
        "sender": [sender.name for sender in graph.senders],
        "receiver": [receiver.name for receiver in graph.receivers],
    }
    entering = torch.tensor([sender.stage == 0 for sender in graph.senders])
    result = told(study, values, axes, None, by=by, seed=seed)
    explained = values[:, :, entering].nansum((2, 3))
    result.controls[INPUT_EDGES] = told(study, explained, {}, gap, by=by, seed=seed)
    how = f"EAP-IG, {steps} steps" if steps else "EAP"
    result.meta |= {"title": f"edges by {how}", "value": "estimated change", "steps": str(steps)}
    result.report += _said(result, how)
    return result


def _gaps(graph: Graph, sides: Sides, streams: Streams) -> Float[Tensor, "b m"]:
    """What all that enters changes: the corrupted run's metrics less the clean one's."""
    readout = sides.readout()
    at = streams.at(readout.positions)
    logits = graph.nodes.logits
    clean = at.stream(logits)
    with torch.no_grad():
        both = [sides.measure(readout, x) for x in (clean, clean + at.change_of(logits))]
    return both[1] - both[0]


class _Scores:
    """The scores of a batch."""

    def __init__(self, graph: Graph, sides: Sides, streams: Streams):
        self.graph, self.sides, self.streams = graph, sides, streams
        self.model, self.blocks = graph.nodes.model, graph.nodes.blocks
        self.changes = torch.stack([streams.change(sender) for sender in graph.senders])
        self.entered = streams.own["decoder.blocks.0.hook_resid_pre"]
        self.other = streams.other["decoder.blocks.0.hook_resid_pre"]

    def values(self, steps: int) -> Float[Tensor, "b m s r"]:
        """Mean scores over the steps; NaN where no edge is."""
        points = [k / steps for k in range(steps)] if steps else [1.0]
        total = sum(self._at(self.other + k * (self.entered - self.other)) for k in points)
        mean = torch.as_tensor(total) / len(points)
        return mean.masked_fill(~self.graph.exists.to(mean.device), torch.nan)

    def _at(self, entered: Float[Tensor, "b t d"]) -> Float[Tensor, "b m s r"]:
        """Scores by the gradients of one run."""
        kept: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: Any) -> None:
            kept[str(hook.name)] = x

        inputs = self.sides.clean
        with differentiable(self.model), self.model.hooks([(n, keep) for n in self._names]):
            leaf = entered.detach().requires_grad_()
            hidden = self.model.decode(inputs, None, leaf, 0)
            found = []
            for name, measure in self.sides.measures.items():
                value = self._value(measure, hidden)
                if not value.requires_grad or value.shape != (len(inputs),):
                    raise InputError(
                        f"metric {name!r} must be differentiable and give one value per prompt"
                    )
                tensors = [kept[n] for n in self._read]
                slopes = torch.autograd.grad(
                    value.sum(), tensors, retain_graph=True, allow_unused=True
                )
                slopes = [
                    torch.zeros_like(x) if slope is None else slope
                    for x, slope in zip(tensors, slopes, strict=True)
                ]
                found.append(self._of(dict(zip(self._read, slopes, strict=True)), kept))
        return torch.stack(found, dim=1)

    def _value(self, measure: MetricFn, hidden: Float[Tensor, "b t d"]) -> Tensor:
        """A metric, of no more logits than it reads."""
        model, inputs = self.model, self.sides.clean
        if not isinstance(measure, Reading):
            return measure(output_of(model, hidden, inputs))
        rows = at_positions(hidden, measure.positions)
        prompts = torch.arange(len(rows), device=rows.device).repeat_interleave(rows.shape[1])
        positions = measure.positions.flatten()
        logits = model.read_rows(rows.flatten(0, 1), inputs, prompts, positions)
        return measure.value(measure.of_rows(logits.unflatten(0, rows.shape[:2])))

    @property
    def _read(self) -> list[str]:
        """Points behind what is read, whose gradients are taken."""
        found = []
        for layer in range(len(self.blocks)):
            names = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "hook_mlp_out")
            found += [f"decoder.blocks.{layer}.{name}" for name in names]
        return [*found, f"decoder.blocks.{len(self.blocks) - 1}.hook_resid_post"]

    @property
    def _names(self) -> list[str]:
        streams = [
            f"decoder.blocks.{layer}.{name}"
            for layer, block in enumerate(self.blocks)
            for name in ("hook_resid_pre", f"hook_{block.mlp_stage}")
        ]
        return [*self._read, *streams]

    def _of(self, slopes: dict[str, Tensor], kept: dict[str, Tensor]) -> Float[Tensor, "b s r"]:
        """Changes of senders times gradients by what receivers read."""
        columns = [
            einsum("s b t d, r b t d -> b s r", self.changes, gradient)
            for gradient in self._gradients(slopes, kept)
        ]
        return torch.cat(columns, dim=-1)

    def _gradients(
        self, slopes: dict[str, Tensor], kept: dict[str, Tensor]
    ) -> Iterator[Float[Tensor, "r b t d"]]:
        """By the stream that each receiver reads, some receivers at a time, in their order."""
        for layer, block in enumerate(self.blocks):
            point, attn = f"decoder.blocks.{layer}", block.attn
            by_normed = []
            sides = zip("qkv", sizes_of(attn), linears_of(attn), strict=True)
            for side, count, linear in sides:
                weight = linear.weight.reshape(count, attn.d_head, -1)
                slope = slopes[f"{point}.attn.hook_{side}"]
                by_normed.append(einsum("b t h e, h e d -> h b t d", slope, weight))
            resid = kept[f"{point}.hook_resid_pre"]
            yield _pulled_back(block.ln1, resid, torch.cat(by_normed))
            resid = kept[f"{point}.hook_{block.mlp_stage}"]
            slope = slopes[f"{point}.hook_mlp_out"][None]
            yield _pulled_back(lambda x, block=block: block.mlp(block.ln2(x)), resid, slope)
        yield slopes[f"decoder.blocks.{len(self.blocks) - 1}.hook_resid_post"][None]


def _pulled_back(
    function: Callable[[Tensor], Tensor],
    resid: Float[Tensor, "b t d"],
    slopes: Float[Tensor, "r b t d"],
) -> Float[Tensor, "r b t d"]:
    """Gradients by what a function reads, from several by what it gives."""
    leaf = resid.detach().expand(len(slopes), *resid.shape).clone().requires_grad_()
    given = function(leaf.flatten(0, 1)).unflatten(0, leaf.shape[:2])
    return torch.autograd.grad(given, leaf, slopes)[0]


def _said(result: Result, how: str) -> Iterator[str]:
    """What was found, and how far it is to be believed."""
    for metric in result.coords["metric"]:
        top = [cell for cell in result.top(3, metric) if cell.value]
        strongest = ", ".join(
            f"{c.at['sender']} -> {c.at['receiver']} ({c.value:.2g})" for c in top
        )
        share = result.controls[INPUT_EDGES].of_metric(metric).mean().values.item()
        yield (
            f"{metric}: the largest estimates by {how} are {strongest or 'none'}. Edges of what "
            f"enters add up to {share:.2f} of the whole effect; 1 would be without error."
        )
    yield (
        "Scores are estimates from gradients: whether the edges carry the answer is what "
        "`faithfulness` of a circuit of them says."
    )
