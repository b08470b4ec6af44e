"""Path patching: what a sender does to a receiver directly, everything between them frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.paths.nodes import Nodes, Receiver, Sender
from audio_lens.analysis.paths.sides import Sides, Study, pairs_of, prepared
from audio_lens.analysis.paths.telling import told
from audio_lens.edits import Edit
from audio_lens.errors import InputError
from audio_lens.items import Pairs, method, statistics
from audio_lens.models import HookedAudioTransformer
from audio_lens.patching import run
from audio_lens.results import Result
from audio_lens.running import evaluating

IDENTITY, NOISE, TOGETHER = "identity", "norm_matched_noise", "together"
CONTROLS = (IDENTITY, NOISE)
SMALL = 0.01  # shares below it are not named


def path(
    model: HookedAudioTransformer,
    pair: Any,
    senders: Any,
    receivers: Any,
    *,
    metric: Any = None,
    strict: bool = False,
    controls: Sequence[str] = CONTROLS,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What each sender's change does to each receiver directly, and what that does to the answer.

    In the clean run a sender gives what it gives in the corrupted one, while all other heads stay
    as they are; the receiver alone reads what comes of it, and the rest of the run follows. The
    value is the share of the whole effect: 1 is as bad as the corrupted run. All senders at once
    stand beside the single ones under the control "together"; in a model with norms and attention
    these do not add up to it.

    Args:
        model: a model with a decoder whose blocks add to one residual stream.
        pair: `Pairs`, or items that bring counterparts; a clean and a corrupted file
            (`ClipPair`); or both sides prepared (`Pair`), which needs a ``metric``.
        senders: what writes: ``"L3H2"`` or ``(3, 2)`` (a head), ``"L3C2"`` (a head of
            cross-attention), ``"L3.mlp"``, ``"audio"`` (what the connector gives), ``"text"``,
            ``"embed"`` (both), a `Span` of the clip, ``"heads"``, ``"mlps"`` or ``"all"``; a list
            of these, or a mapping from names. A list inside the list sends together.
        receivers: what reads: ``"L4H2.q"``, ``"L4G0.k"`` and ``"L4G0.v"`` (of key-value head 0,
            which all query heads of its group share), ``"L4C2.q"``, ``"L4.mlp"``, ``"logits"``;
            as senders.
        metric: as in `items.measured`.
        strict: whether MLPs, too, stay as they are in the clean run; else those between sender
            and receiver follow what they read, and a sender reaches receivers through them.
        controls: of "identity" (the receiver's own input, put together again) and
            "norm_matched_noise" (a change as large, at random).
        by: a label whose values are drawn in place of items for the intervals.
        size: of the batches.
        seed: of the draws.
        progress: as in `patching.sweep`.

    Returns:
        Shares of the effect with the axes "sender" and "receiver": ratios of means, with
        intervals. NaN where the receiver runs before the sender.

    Raises:
        InputError: senders, receivers or controls that there are not; a model whose blocks do not
            add to one stream; hooks or edits in force; keys or values of a single head that shares
            them; a metric of all prompts at once.
        ItemError: no pair that the model tells apart.
    """
    both = prepared(pair)
    options = {"strict": strict, "controls": list(controls), "size": size, "seed": seed}
    if both is None:
        return _of_pairs(
            model,
            pairs_of(pair),
            senders,
            receivers,
            metric=metric,
            by=by,
            progress=progress,
            **options,
        )
    asked = _Asked.of(model, senders, receivers, controls, strict, seed)
    study = Study.of_inputs(model, both, metric)
    return _followed(study, asked, by, size, progress)


@method("paths.path")
def _of_pairs(
    model: HookedAudioTransformer,
    pairs: Pairs,
    senders: Any,
    receivers: Any,
    *,
    metric: Any = None,
    strict: bool = False,
    controls: Sequence[str] = CONTROLS,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """What each sender's change does to each receiver directly (`path`), over pairs of items."""
    asked = _Asked.of(model, senders, receivers, controls, strict, seed)
    return _followed(Study.of_pairs(model, pairs, metric), asked, by, size, progress)


@dataclass(frozen=True, eq=False)
class _Asked:
    """What is followed."""

    nodes: Nodes
    senders: dict[str, list[Sender]]
    receivers: dict[str, list[Receiver]]
    controls: Sequence[str]
    strict: bool
    seed: int

    @staticmethod
    def of(
        model: HookedAudioTransformer,
        senders: Any,
        receivers: Any,
        controls: Sequence[str],
        strict: bool,
        seed: int,
    ) -> _Asked:
        """Checked.

        Raises:
            InputError: what there is not; receivers that all run before all senders.
        """
        unknown = [name for name in controls if name not in CONTROLS]
        if unknown:
            raise InputError(f"no control {unknown[0]!r} here; there is {', '.join(CONTROLS)}")
        nodes = Nodes(model)
        asked = _Asked(
            nodes,
            nodes.senders_of(senders),
            nodes.receivers_of(receivers),
            controls,
            strict,
            seed,
        )
        mixed = [n for n, some in asked.receivers.items() if nodes.logits in some and some[1:]]
        if mixed:
            raise InputError(f"logits are a receiver of their own, not with others: {mixed[0]}")
        if not any(asked.reaches(s, r) for s in asked.senders for r in asked.receivers):
            raise InputError("no receiver runs behind a sender: nothing can reach it")
        return asked

    def reaches(self, sender: str, receiver: str) -> bool:
        """Whether something sent is there before something reads."""
        first = min(one.stage for one in self.senders[sender])
        return first < max(one.stage for one in self.receivers[receiver])

    @property
    def every_sender(self) -> list[Sender]:
        return list(dict.fromkeys(one for some in self.senders.values() for one in some))


def _followed(
    study: Study, asked: _Asked, by: str | None, size: int, progress: bool | None
) -> Result:
    """The values of all batches, as a result."""
    columns: dict[str, list[tuple[list[int], Tensor]]] = {}
    with evaluating(study.model), torch.no_grad():
        for sides in study.batches(asked.nodes, size, "paths", progress):
            for name, values in _Followed(asked, sides).values():
                columns.setdefault(name, []).append((sides.rows, values))
    measured = {name: study.filled(of_batches) for name, of_batches in columns.items()}
    clean = measured.pop("clean")
    gaps = clean - measured.pop("corrupted")
    lost = {
        name: clean.reshape(*clean.shape, *[1] * (x.ndim - 2)) - x for name, x in measured.items()
    }
    axes = {"sender": list(asked.senders), "receiver": list(asked.receivers)}
    result = told(study, lost.pop("paths"), axes, gaps, by=by, seed=asked.seed)
    for name, values in lost.items():
        own = axes if values.ndim == 4 else {"receiver": axes["receiver"]}
        result.controls[name] = told(study, values, own, gaps, by=by, seed=asked.seed)
    result.meta |= {"title": "direct effects", "value": "share of the effect"}
    result.report += _said(result, asked)
    return result


@dataclass(eq=False)
class _Followed:
    """The runs of a batch."""

    asked: _Asked
    sides: Sides

    def __post_init__(self) -> None:
        self.readout = self.sides.readout()
        self.streams = self.sides.streams()
        self.last = self.streams.at(self.readout.positions)

    def values(self) -> Iterator[tuple[str, Float[Tensor, "b m *cells"]]]:
        """Metrics by what was run."""
        asked = self.asked
        yield "clean", self.clean
        yield "corrupted", self._read(self.last.change_of(asked.nodes.logits))
        yield "paths", torch.stack([self._row(sent) for sent in asked.senders.values()], dim=2)
        yield TOGETHER, self._row(asked.every_sender)
        if IDENTITY in asked.controls:
            yield IDENTITY, self._row([])
        if NOISE in asked.controls:
            rows = [
                self._row(sent, noise=asked.seed + number)
                for number, sent in enumerate(asked.senders.values())
            ]
            yield NOISE, torch.stack(rows, dim=2)

    def _row(self, sent: Sequence[Sender], noise: int | None = None) -> Float[Tensor, "b m r"]:
        """Metrics by receiver, when so much is sent; or, with a seed, noise as large."""
        groups = self.asked.receivers.values()
        strict, logits = self.asked.strict, self.asked.nodes.logits
        inner = list({one for some in groups for one in some} - {logits})
        inside = self.streams.arriving(sent, inner, strict) if inner else {}
        first = min((one.stage for one in sent), default=-1)
        columns = []
        for receivers in groups:
            if first >= max(one.stage for one in receivers):
                columns.append(torch.full_like(self.clean, torch.nan))
            elif receivers == [logits]:
                delta = self.last.arriving(sent, receivers, strict)[logits]
                columns.append(self._read(_noised(delta, noise)))
            else:
                given = [self.streams.edit(one, _noised(inside[one], noise)) for one in receivers]
                columns.append(self._run(given))
        return torch.stack(columns, dim=-1)

    @cached_property
    def clean(self) -> Float[Tensor, "b m"]:
        return self._read(self.last.nothing)

    def _read(self, delta: Float[Tensor, "b r d"]) -> Float[Tensor, "b m"]:
        """The metrics, when the last residual stream changes."""
        resid = self.last.stream(self.asked.nodes.logits) + delta
        return self.sides.measure(self.readout, resid)

    def _run(self, given: Sequence[Edit]) -> Float[Tensor, "b m"]:
        """The metrics of a run whose receivers were given something else."""
        values = run(self.asked.nodes.model, self.sides.clean, given, self.sides.measures)
        return torch.stack([one.double().cpu() for one in values.values()], dim=1)


def _noised(delta: Float[Tensor, "b t d"], seed: int | None) -> Float[Tensor, "b t d"]:
    return delta if seed is None else statistics.norm_matched_noise(delta, seed)


def _said(result: Result, asked: _Asked) -> Iterator[str]:
    """What was found, and what it cannot show."""
    for metric in result.coords["metric"]:
        yield from _of_metric(result, metric)
    kept = "as they are" if asked.strict else "follow"
    yield (
        f"Other heads stay as they are in the clean run, MLPs {kept}: what a sender does through "
        "other heads is not counted, so that single shares and all at once need not agree."
    )
    yield (
        "A direct effect says what this receiver makes of a change that large; it holds for these "
        "pairs and this corruption."
    )


def _of_metric(result: Result, metric: str) -> Iterator[str]:
    for receiver in result.coords["receiver"]:
        one = result.select(receiver=receiver)
        top = [cell for cell in one.top(3, metric) if abs(cell.value) > SMALL]
        strongest = ", ".join(f"{c.at['sender']} {c.value:.2f}" for c in top)
        single = one.of_metric(metric).mean().values.nansum().item()
        at_once = one.controls[TOGETHER].of_metric(metric).mean().values.item()
        yield (
            f"{metric}, {receiver}: most comes directly from {strongest or 'none of the senders'}; "
            f"all senders at once give {at_once:.2f}, the single ones add up to {single:.2f}."
        )
