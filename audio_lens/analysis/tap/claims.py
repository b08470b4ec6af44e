"""Stage 5: which nodes are confirmed. The rule, and what each claim rests on.

A node is confirmed if, in every metric, its effect and its lead over each control lie above 0 with
their whole interval: putting the clean run's activations into the corrupted one under every
corruption, where the effect must be no trifle either, and putting the corrupted run's into the
clean one under the pairs' own counterparts. (A corruption that only takes the word away leaves
every other place that says it: what such a one does to the clean run is told, and not asked for.)
As all of these must hold at once, they need no correction among themselves (an intersection-union
test); the nodes do, and their intervals are of level 1 - 0.05 / number of nodes (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.tap.choose import RANDOM
from audio_lens.analysis.tap.confirm import BROUGHT, DESTROYED, GAP
from audio_lens.analysis.tap.exact import DENOISE, DIRECTIONS, IDENTITY
from audio_lens.analysis.tap.nodes import Node
from audio_lens.items import statistics
from audio_lens.results import Result
from audio_lens.results.labels import in_words

CONFIRMED, REFUSED = "confirmed", "refused"
ERROR = 0.05  # of one false claim or more among all nodes
LEAST = 0.05  # of the gap: what brings back less is refused, however sure
SAME = 1e-3  # of the gap: an identity patch that does more is an error of the engine
RESAMPLES = 5000
DEMANDED = {DENOISE: (*BROUGHT, RANDOM)}  # of the other direction random nodes alone


@dataclass(frozen=True)
class Trial:
    """A node under one corruption, in one metric and direction.

    Attributes:
        effect, low, high: share of the gap, with its interval.
        controls: theirs.
        leads: the lower end of the lead over each control that must be beaten.
        is_demanded: whether the node is refused if it fails here.
        why: what is wrong, if it does; empty where the trial is passed.
    """

    corruption: str
    metric: str
    direction: str
    effect: float
    low: float
    high: float
    controls: dict[str, float]
    leads: dict[str, float]
    is_demanded: bool = True
    why: str = ""

    @property
    def name(self) -> str:
        return f"{self.corruption}, {self.metric}, {self.direction}"


@dataclass(frozen=True)
class Claim:
    """What is claimed of a node, and what it rests on.

    Attributes:
        kind: "window", "head", "neuron" or "connector".
        site, layer, head, neuron, start_s, end_s: where; None where that is no matter.
        estimate: by attribution, on the pairs that were searched.
        effect, interval, controls: of the first trial: the pairs' own counterparts, the first
            metric, denoising. Shares of the gap.
        verdict: "confirmed" or "refused".
        why: of a refusal, the first reason.
        trials: all of them.
    """

    kind: str
    site: str
    layer: int | None
    head: int | None
    neuron: int | None
    start_s: float | None
    end_s: float | None
    estimate: float
    effect: float
    interval: tuple[float, float]
    controls: dict[str, float]
    verdict: str
    why: str = ""
    trials: tuple[Trial, ...] = field(default=(), repr=False)

    @property
    def is_confirmed(self) -> bool:
        return self.verdict == CONFIRMED

    def refused(self, why: str) -> Claim:
        """The claim, which does not hold."""
        return replace(self, verdict=REFUSED, why=why)

    @property
    def weakest(self) -> Trial:
        """The trial with the smallest effect, of those that are demanded."""
        asked = [trial for trial in self.trials if trial.is_demanded]
        return min(asked, key=lambda trial: trial.effect)

    @property
    def place(self) -> str:
        """Where, in words."""
        named = {"layer": self.layer, "head": self.head, "neuron": self.neuron}
        told = in_words({name: one for name, one in named.items() if one is not None})
        span = "" if self.start_s is None else f"{self.start_s:.2f}-{self.end_s:.2f} s"
        return ", ".join(filter(None, (self.site, told, span)))

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {
            "interval": list(self.interval),
            "trials": [*map(asdict, self.trials)],
        }

    @staticmethod
    def of(told: Mapping[str, Any]) -> Claim:
        """What `to_dict` gave."""
        trials = tuple(Trial(**one) for one in told["trials"])
        return Claim(**{**told, "interval": tuple(told["interval"]), "trials": trials})


def claims_of(
    nodes: Sequence[Node], estimated: Mapping[Node, float], found: Mapping[str, Result], seed: int
) -> list[Claim]:
    """Every node with its verdict.

    Args:
        nodes: in the order of the results' axis "node".
        estimated: by attribution.
        found: what `confirm.tested` gave, by corruption; the pairs' own first. Fewer than all that
            were asked for confirm nothing.
        seed: of the intervals.
    """
    level = 1 - ERROR / max(1, len(nodes))
    trials: list[list[Trial]] = [[] for _ in nodes]
    for corruption, result in found.items():
        both = corruption == next(iter(found))
        for number, trial in _trials(corruption, result, both, level, seed):
            trials[number].append(trial)
    return [_claim(node, estimated[node], own) for node, own in zip(nodes, trials, strict=True)]


def _claim(node: Node, estimate: float, trials: Sequence[Trial]) -> Claim:
    wrong = [f"{x.name}: {x.why}" for x in trials if x.why and x.is_demanded]
    first = trials[0]
    return Claim(
        kind=node.kind,
        site=node.site,
        layer=node.layer,
        head=node.head,
        neuron=node.neuron,
        start_s=None if node.span is None else node.span.start_s,
        end_s=None if node.span is None else node.span.end_s,
        estimate=estimate,
        effect=first.effect,
        interval=(first.low, first.high),
        controls=first.controls,
        verdict=REFUSED if wrong else CONFIRMED,
        why=wrong[0] if wrong else "",
        trials=tuple(trials),
    )


def _trials(
    corruption: str, result: Result, both: bool, level: float, seed: int
) -> Iterator[tuple[int, Trial]]:
    """The trials of every node under one corruption.

    Args:
        both: whether both directions are demanded.
    """
    gap = result.controls[GAP].values  # metric n
    nodes = range(len(result.coords["node"]))
    for m, metric in enumerate(result.coords["metric"]):
        for d, direction in enumerate(DIRECTIONS):
            asked = DEMANDED.get(direction, (RANDOM,))
            moved = {
                name: one.values[m, :, d] * gap[m][:, None]
                for name, one in {"": result, **result.controls}.items()
                if name in ("", IDENTITY, *asked)
            }
            own = _bounds(moved[""], gap[m], level, seed)
            leads = {n: _bounds(moved[""] - moved[n], gap[m], level, seed).low for n in asked}
            apart = statistics.bootstrap(gap[m], level=level, resamples=RESAMPLES, seed=seed)
            means = {n: x.nanmean(0) / gap[m].mean() for n, x in moved.items() if n}
            level_of = {DESTROYED: float(result.controls[DESTROYED].mean().values[m])}
            for i in nodes:
                controls = {n: float(x[i]) for n, x in means.items()}
                if direction == DENOISE:
                    controls |= {n: x for n, x in level_of.items() if x == x}
                trial = Trial(
                    corruption,
                    metric,
                    direction,
                    effect=float(own.value[i]),
                    low=float(own.low[i]),
                    high=float(own.high[i]),
                    controls=controls,
                    leads={n: float(x[i]) for n, x in leads.items()},
                    is_demanded=both or direction == DENOISE,
                )
                yield i, _judged(trial, float(apart.low))


def _bounds(
    moved: Float[Tensor, "n nodes"], gap: Float[Tensor, " n"], level: float, seed: int
) -> statistics.Estimate:
    under = gap[:, None].expand_as(moved)
    return statistics.ratio_of_means(moved, under, level=level, resamples=RESAMPLES, seed=seed)


def _judged(trial: Trial, gap: float) -> Trial:
    """The trial with what is wrong with it."""
    return Trial(**{**asdict(trial), "why": _why(trial, gap)})


def _why(trial: Trial, gap: float) -> str:
    if not gap > 0:
        return "clean and corrupted runs do not differ beyond chance"
    if abs(trial.controls[IDENTITY]) > SAME:
        return f"putting a run's own activations back moves it by {trial.controls[IDENTITY]:.2g}"
    if not trial.low > 0:
        return f"the effect {trial.effect:.2f} reaches down to {trial.low:.2f}"
    for name, low in trial.leads.items():
        if not low > 0:
            return f"no lead over {name} ({trial.controls[name]:.2f}) for sure: from {low:.2f} on"
    if trial.direction == DENOISE and trial.effect < LEAST:
        return f"the effect {trial.effect:.3f} is below {LEAST:g}"
    return ""
