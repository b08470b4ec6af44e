"""Exact effects of nodes on every pair: patches in both directions, from several sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.tap.nodes import Node
from audio_lens.inputs import AudioInputs
from audio_lens.items import ControlError, Items, Pairs, measured, statistics
from audio_lens.items.measuring import Cell
from audio_lens.items.pairs import PairBatch
from audio_lens.models import HookedAudioTransformer
from audio_lens.running import evaluating
from audio_lens.sites import Site

DENOISE, NOISE = "denoise", "noise"
DIRECTIONS = (DENOISE, NOISE)
TRUE, OTHER, NORM, IDENTITY = "", "other_item", "norm_matched_noise", "identity"
Held = Mapping[str, Tensor]


@dataclass(frozen=True)
class Patch:
    """Nodes that are patched together in one run.

    Attributes:
        direction: "denoise" puts the clean run's activations into the corrupted one, "noise" the
            reverse.
        source: "" for those of the other run; "other_item", "norm_matched_noise" or "identity".
    """

    nodes: tuple[Node, ...]
    direction: str = DENOISE
    source: str = TRUE


@dataclass(frozen=True)
class Exact:
    """What patches did to every pair.

    Attributes:
        effects: how far the metric moved towards the run that the activations come from, in its
            own units; NaN where a pair has no position in a window, or nobody to take from.
        clean, corrupted: the metric of the unpatched runs.
    """

    metrics: list[str]
    effects: Float[Tensor, "n metrics patches"]
    clean: Float[Tensor, "n metrics"]
    corrupted: Float[Tensor, "n metrics"]

    @property
    def gap(self) -> Float[Tensor, "n metrics"]:
        return self.clean - self.corrupted


def exact(
    model: HookedAudioTransformer,
    pairs: Pairs[Items],
    patches: Sequence[Patch],
    metric: Any,
    *,
    size: int,
    seed: int = 0,
    progress: bool | None = None,
) -> Exact:
    """The effect of every patch on every pair.

    Args:
        metric: of the pairs, as `items.measured` takes it.
        size: of the batches.
        seed: of other items and noise.
        progress: as in `patching.sweep`.
    """
    order = sorted(range(len(patches)), key=lambda i: patches[i].direction == NOISE)
    runs = _Runs(model, pairs, [patches[i] for i in order], seed)
    with evaluating(model):
        told = measured(
            model, pairs, runs, metric, size=size, what="exact patches", progress=progress
        )
    corrupted, rest = told.values[..., 0], told.values[..., 1:]
    n_denoise = sum(one.direction == DENOISE for one in patches)
    clean, back, forth = rest[..., n_denoise], rest[..., :n_denoise], rest[..., n_denoise + 1 :]
    moved = torch.cat([back - corrupted[..., None], clean[..., None] - forth], dim=-1)
    moved = moved.masked_fill(runs.lacking[:, None], torch.nan)
    effects = torch.empty_like(moved)
    effects[..., order] = moved
    return Exact(told.metrics, effects, clean, corrupted)


@dataclass
class _Runs:
    """The runs of a batch: the corrupted one with its patches, then the clean one with its own.

    Attributes:
        lacking: which pairs a patch says nothing about.
    """

    model: HookedAudioTransformer
    pairs: Pairs[Items]
    patches: list[Patch]
    seed: int
    lacking: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.lacking = torch.zeros(len(self.pairs), len(self.patches), dtype=torch.bool)

    def __call__(self, batch: PairBatch) -> Iterator[Cell]:
        clean, corrupted = batch.pair.clean, batch.pair.corrupted
        names = sorted({x for one in self.patches for x in self._names(one)})
        held = {NOISE: run_at(self.model, corrupted, names), DENOISE: {}}
        held[DENOISE] = run_at(self.model, clean, names)
        has, made = _Has(self.model, clean), {}
        yield corrupted, []
        was = DENOISE
        for number, one in enumerate(self.patches):
            if one.direction != was:
                yield clean, []
                was = one.direction
            key = one.direction, one.source
            if key not in made:
                made[key] = self._source(one, held, batch)
            source = made[key]
            inputs = corrupted if one.direction == DENOISE else clean
            if source is None or not all(map(has, one.nodes)):
                self.lacking[batch.rows, number] = True
                yield inputs, []
            else:
                yield inputs, [node.put(source) for node in one.nodes]
        if was == DENOISE:
            yield clean, []

    def _names(self, patch: Patch) -> list[str]:
        return [Site.parse(x.site, self.model).hook_name(x.layer) for x in patch.nodes]

    def _source(self, patch: Patch, held: Mapping[str, Held], batch: PairBatch) -> Held | None:
        """What a patch takes from; None where no other item has another answer."""
        true = held[patch.direction]
        if patch.source == TRUE:
            return true
        if patch.source == IDENTITY:
            return held[NOISE if patch.direction == DENOISE else DENOISE]
        seed = self.seed + batch.rows[0]
        if patch.source == NORM:
            return {
                name: statistics.norm_matched_noise(x, seed + number)
                for number, (name, x) in enumerate(true.items())
            }
        answers = [self.pairs.clean[row].answer for row in batch.rows]
        try:
            other = statistics.other_item(len(batch), answers, seed=seed)
        except ControlError:
            return None
        return {name: x[other] for name, x in true.items()}


@dataclass
class _Has:
    """Whether a batch, whose rows are of one layout, has positions in a node's window."""

    model: HookedAudioTransformer
    inputs: AudioInputs
    known: dict[Any, bool] = field(default_factory=dict)

    def __call__(self, node: Node) -> bool:
        if node.span is None:
            return True
        key = node.site, node.span
        if key not in self.known:
            self.known[key] = bool(in_window(self.model, self.inputs, node).any(1).all())
        return self.known[key]


def in_window(model: HookedAudioTransformer, inputs: AudioInputs, node: Node) -> Tensor:
    """The positions of every row that lie in the window of a node."""
    part, span = Site.parse(node.site, model).positions_of, node.span
    assert span is not None
    return model.timeline(inputs).mask(part, span.start_s, span.end_s, span.clip)


@torch.no_grad()
def run_at(model: HookedAudioTransformer, inputs: AudioInputs, names: Sequence[str]) -> Held:
    """What a run has at some hook points."""
    _, cache = model.run_with_cache(inputs, names_filter=list(names), return_cache_object=False)
    return {name: cache[name] for name in names}
