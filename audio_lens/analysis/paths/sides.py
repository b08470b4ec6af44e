"""Pairs as methods of paths take them: of items, of files, or prepared already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import metrics
from audio_lens.analysis.fusion.recovery import metrics_of_part
from audio_lens.analysis.paths.nodes import Nodes
from audio_lens.analysis.paths.streams import Streams
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.items import Item, Items, Pairs
from audio_lens.metrics import Metric, MetricFn
from audio_lens.models import HookedAudioTransformer
from audio_lens.patching.engine.readout import Readout
from audio_lens.patching.engine.trace import stack_of
from audio_lens.progress import track


def pairs_of(given: Any) -> Pairs:
    """Pairs of items; items bring their counterparts, and a pair of files is one pair.

    Raises:
        InputError: anything else.
        ItemError: items without counterparts.
    """
    if isinstance(given, Pairs):
        return given
    if isinstance(given, Items):
        return given.pairs()
    files = {name: getattr(given, name, None) for name in ("clean", "corrupted", "question")}
    if files["clean"] is None or files["corrupted"] is None:
        raise InputError(
            "a pair is Pairs of items, Items with counterparts, a clean and a corrupted file, or "
            f"both sides prepared, got {type(given).__name__}"
        )
    item = Item(
        files["clean"],
        files["question"],
        answer=getattr(given, "answer", None),
        against=getattr(given, "against", None),
        other_audio=files["corrupted"],
    )
    return Items([item]).pairs()


def prepared(given: Any) -> tuple[AudioInputs, AudioInputs] | None:
    """Both sides, where they are inputs already."""
    if not isinstance(given, Mapping) or not {"clean", "corrupted"} <= given.keys():
        return None
    clean, corrupted = given["clean"], given["corrupted"]
    both = isinstance(clean, AudioInputs) and isinstance(corrupted, AudioInputs)
    return (clean, corrupted) if both else None


@dataclass(frozen=True, eq=False)
class Sides:
    """Some rows of a study, with their metrics.

    Attributes:
        rows: which of all.
        clean, corrupted: inputs of one layout.
        measures: metrics by name, as functions of logits of these rows.
    """

    nodes: Nodes
    rows: list[int]
    clean: AudioInputs
    corrupted: AudioInputs
    measures: dict[str, MetricFn]

    @staticmethod
    def of(
        nodes: Nodes,
        rows: list[int],
        clean: AudioInputs,
        corrupted: AudioInputs,
        wanted: Mapping[str, Any],
    ) -> Sides:
        model = nodes.model
        compares = any(getattr(one, "needs_reference", False) for one in wanted.values())
        reference = model(clean) if compares else None
        measures = {
            name: metrics.bound(one, model, clean, reference) for name, one in wanted.items()
        }
        return Sides(nodes, rows, clean, corrupted, measures)

    def streams(self) -> Streams:
        """Of the clean run, beside the corrupted one."""
        return Streams.of(self.nodes, self.clean, self.corrupted)

    def readout(self) -> Readout:
        return Readout(self.nodes.model, self.measures, self.clean)

    def measure(self, readout: Readout, resid: Float[Tensor, "b r d"]) -> Float[Tensor, "b m"]:
        """The metrics, from the last residual stream at the positions that are read."""
        hidden = stack_of(self.nodes.model, "decoder").finish(resid)
        prompts = torch.arange(len(hidden), device=hidden.device)
        prompts = prompts.repeat_interleave(hidden.shape[1])
        rows = readout.logits(hidden.flatten(0, 1), prompts, readout.positions.flatten())
        values = readout.measure(rows.unflatten(0, hidden.shape[:2]), "a patched run")
        if values.ndim == 1:
            raise InputError("a metric of paths gives one value for each prompt, not one for all")
        return values.T.double()


@dataclass(frozen=True, eq=False)
class Study:
    """All rows of a study.

    Attributes:
        pairs: of items; None where both sides came prepared.
        wanted: metrics by name.
    """

    model: HookedAudioTransformer
    pairs: Pairs | None
    both: tuple[AudioInputs, AudioInputs] | None
    wanted: dict[str, Any]

    @staticmethod
    def of_pairs(model: HookedAudioTransformer, pairs: Pairs, metric: Any) -> Study:
        """Of the pairs that the model tells apart; of all, where some have no answer.

        Raises:
            ItemError: no pair that is left; items without answers where there is no metric.
        """
        answered = all(item.answer is not None for item in pairs.clean)
        kept = pairs.kept(model)[0] if answered or metric is None else pairs
        if metric is None:
            wanted = kept.clean.metrics(model)
        else:
            metrics.check(metric)
            wanted = metrics_of_part(metric, pairs, kept)
        return Study(model, kept, None, dict(wanted))

    @staticmethod
    def of_inputs(
        model: HookedAudioTransformer, both: tuple[AudioInputs, AudioInputs], metric: Any
    ) -> Study:
        """Of inputs.

        Raises:
            InputError: no metric, or sides that do not fit together.
        """
        if metric is None:
            raise InputError("prepared inputs say no answers: pass metric=")
        metrics.check(metric)
        both[0].check_pairs_with(both[1], "the clean side", "the corrupted side")
        return Study(model, None, both, metrics.named(metric))

    def __len__(self) -> int:
        return len(self.both[0]) if self.both is not None else len(self.need_pairs)

    @property
    def need_pairs(self) -> Pairs:
        if self.pairs is None:
            raise InputError("these pairs came prepared")
        return self.pairs

    def batches(self, nodes: Nodes, size: int, what: str, progress: bool | None) -> Iterator[Sides]:
        """The rows, some at a time."""
        with track(what, len(self), "pairs", show=progress) as advance:
            done = 0
            for sides in self._batches(nodes, size):
                yield sides
                done += len(sides.rows)
                advance(len(sides.rows), done)

    def _batches(self, nodes: Nodes, size: int) -> Iterator[Sides]:
        if self.both is not None:
            yield Sides.of(nodes, list(range(len(self))), *self.both, self.wanted)
            return
        for batch in self.need_pairs.batches(self.model, size):
            own = {
                name: one.of_rows(batch.rows, len(self)) if isinstance(one, Metric) else one
                for name, one in self.wanted.items()
            }
            yield Sides.of(nodes, batch.rows, batch.pair.clean, batch.pair.corrupted, own)

    def filled(self, columns: Sequence[tuple[list[int], Tensor]]) -> Float[Tensor, " n *cells"]:
        """Values of batches in the order of all rows."""
        first = columns[0][1]
        found = torch.full((len(self), *first.shape[1:]), torch.nan, dtype=torch.float64)
        for rows, values in columns:
            found[rows] = values.double().cpu()
        return found
