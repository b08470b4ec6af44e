"""Causal scrubbing (Chan et al., Redwood Research, 2022) of a hypothesis over items."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from audio_lens import metrics
from audio_lens.analysis.scrubbing import sentences
from audio_lens.analysis.scrubbing.hypothesis import Feature, Hypothesis
from audio_lens.analysis.scrubbing.lending import Lenders, kept, ring, values
from audio_lens.analysis.scrubbing.running import Layout, Runner, Scores, Scrub, draw
from audio_lens.analysis.scrubbing.tree import Tree
from audio_lens.arguments import numbers, whole
from audio_lens.errors import InputError
from audio_lens.items import Items, found, method
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

CLAIM, EMPTY, OWN, FULL, SPREAD = "claim", "empty", "own", "full", "spread"
OTHERS = 16  # other items whose outputs an item's is compared with
Wanted = tuple[str, int]  # which hypothesis, and in which of the blocks it is moved to


@method("scrubbing.scrub")
def scrub(
    model: HookedAudioTransformer,
    items: Items,
    hypothesis: Hypothesis,
    *,
    layers: int | Sequence[int] | None = None,
    within: Feature | None = None,
    draws: int = 4,
    metric: Any = None,
    skip_bad: bool = False,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How much of the model's answers is left if only what a hypothesis names stays right.

    For every item another one is run, drawn at random, and into its run goes what every node holds
    in an item that agrees with the first in the node's feature. The answer is then measured as the
    first item's. Nodes that lie behind others are computed anew, in the run of yet another item
    into which these others are put; every reader of a node has a draw of its own. No position is
    left out, the last one neither, and no layer.

    Recovered is (S_scrub - S_rand) / (S_model - S_rand), as a ratio of means over items, where
    S_rand is the metric of other items' outputs. 1 is expected of a hypothesis that is true.

    Args:
        model: any model.
        items: with answers, unless there is a ``metric``. They lend to each other where their
            layouts are equal.
        hypothesis: what is claimed to matter, and what it depends on.
        layers: move the hypothesis there, block by block: its first node lies in each of these, and
            all others as far behind it as they are. The result then has the axis "layer".
        within: a label or function of the item (or several): lenders, and the items that are run,
            agree in it. "text" keeps the question.
        draws: how often all is drawn.
        metric: as of `items.measured`, but none that compares with a clean run.
        skip_bad: leave out items that nobody can lend to, and count them, in place of raising.
        by: a label whose values are drawn in place of items, for intervals.
        size: of the batches.
        seed: of all that is drawn.
        progress: as in `patching.sweep`.

    Returns:
        The share that is recovered. Controls: ``empty`` claims nothing; ``own``, where some nodes
        have the feature "id", is what these recover alone; ``full`` keeps all of the item at the
        sites that the output depends on, more than which no claim about these recovers; ``spread``
        is the mean size of an item's error, in the same units. Where it is large and the recovery
        near 1, errors of items cancel, which the report and ``meta["cancelling"]`` say.

    Raises:
        LendingError: items that no other lends to.
        SiteError, InputError: a hypothesis that does not fit the model or the items; layers or
            draws that are none.
        ItemError: items without a label, or without answers of one token.
    """
    whole("draws", draws, least=1)
    blocks = _blocks(layers, hypothesis)
    claims = [hypothesis.moved(by_so_many) for by_so_many in blocks.values()]
    trees = _trees(model, claims)
    wanted = _metrics(model, items, metric)
    scrubbing = _Scrubbing(model, items, trees, within, size)
    rows, dropped = scrubbing.kept(skip_bad)
    if dropped:
        items = items[rows]
        wanted = {name: _of_rows(one, rows, scrubbing) for name, one in wanted.items()}
        scrubbing = _Scrubbing(model, items, trees, within, size)
        scrubbing.kept(skip_bad=False)
    runner = Runner(scrubbing.layout, wanted, size, progress)
    plan = scrubbing.plan(draws, seed)
    scores = runner.scores([*plan.values()], scrubbing.others(seed))
    axes: dict[str, Sequence[Any]] = {"metric": scores.metrics}
    axes |= {} if layers is None else {"layer": list(blocks)}
    of = _Recovered(scores, [*plan], draws, items, axes, {"by": by, "seed": seed})
    result = of.result(CLAIM, dropped=dropped)
    result.controls = {
        name: of.result(name) for name in (EMPTY, OWN, FULL) if (name, 0) in trees
    } | {SPREAD: of.spread(CLAIM)}
    result.meta |= {
        "title": f"causal scrubbing: {hypothesis}",
        "value": "share recovered",
        "draws": str(draws),
        "cancelling": ", ".join(sentences.cancelling(result)),
    }
    result.report += sentences.told(result, scores, hypothesis, scrubbing.counts(), of.by_draw())
    return result


def _blocks(layers: int | Sequence[int] | None, hypothesis: Hypothesis) -> dict[int, int]:
    """By how many blocks the hypothesis is moved, by where its first node then lies.

    Raises:
        InputError: layers that are none, or a hypothesis without any.
    """
    if layers is None:
        return {0: 0}
    listed = [int(one) for one in numbers("layers", layers)]
    if not listed or len(set(listed)) < len(listed) or min(listed) < 0:
        raise InputError(f"layers are numbers of blocks from 0 on, each once; got {listed}")
    first = hypothesis.first_layer
    return {layer: layer - first for layer in listed}


def _trees(model: HookedAudioTransformer, claims: Sequence[Hypothesis]) -> dict[Wanted, Tree]:
    """The hypotheses on the model, and beside each the empty and the full one."""
    trees: dict[Wanted, Tree] = {}
    for at, claim in enumerate(claims):
        tree = trees[CLAIM, at] = Tree.of(model, claim)
        beside = {EMPTY: Hypothesis([]), OWN: tree.own, FULL: tree.whole if tree.roots else None}
        trees |= {(name, at): Tree.of(model, x) for name, x in beside.items() if x is not None}
    return trees


def _metrics(model: HookedAudioTransformer, items: Items, metric: Any) -> dict[str, Any]:
    wanted = items.metrics(model) if metric is None else metrics.named(metric)
    relative = [name for name, one in wanted.items() if getattr(one, "needs_reference", False)]
    if relative:
        raise InputError(
            f"metric {relative[0]!r} compares with a clean run of the same item, and scrubbed runs "
            "are of other items: measure the answer itself"
        )
    return dict(wanted)


def _of_rows(metric: Any, rows: Sequence[int], scrubbing: _Scrubbing) -> Any:
    of_rows = getattr(metric, "of_rows", None)
    return metric if of_rows is None else of_rows(rows, len(scrubbing.items))


class _Scrubbing:
    """Hypotheses over items: how these lie, and who lends to whom."""

    def __init__(
        self,
        model: HookedAudioTransformer,
        items: Items,
        trees: Mapping[Wanted, Tree],
        within: Feature | None,
        size: int,
    ):
        self.items, self.trees = items, trees
        nodes = [one for tree in trees.values() for one in tree.nodes.values()]
        self.features = {
            one.node.feature_key: values(items, one.node.features, f"node {one.node.name!r}")
            for one in nodes
            if not one.node.is_own
        }
        shared = [None] * len(items)
        if within is not None:
            listed = within if isinstance(within, (list, tuple)) else [within]
            shared = values(items, listed, "within")
        self.layout = Layout.of(model, items, nodes, size)
        self.classes: list[Hashable] = [*zip(self.layout.classes, shared, strict=True)]
        for tree in trees.values():
            tree.check_apart({n: self.layout.masks_of(x) for n, x in tree.nodes.items()})
        self.lenders = {key: self._lenders(tree) for key, tree in trees.items()}

    def _lenders(self, tree: Tree) -> dict[str, Lenders]:
        found = {}
        for name, one in tree.nodes.items():
            if one.node.is_own:
                found[name] = Lenders(None)
                continue
            features = self.features[one.node.feature_key]
            places = self.layout.places_of(one)
            found[name] = Lenders([*zip(self.classes, places, features, strict=True)])
        return found

    @property
    def _claimed(self) -> dict[str, tuple[str, Lenders]]:
        """The lenders of every claimed node, with what it depends on; blocks have the same."""
        nodes = self.trees[CLAIM, 0].nodes
        return {n: (nodes[n].node.told_feature, x) for n, x in self.lenders[CLAIM, 0].items()}

    def kept(self, skip_bad: bool) -> tuple[list[int], dict[str, int]]:
        """The items that others lend to, and how many were left out, by why."""
        return kept(self.items, self.classes, [*self._claimed.values()], skip_bad)

    def counts(self) -> dict[str, list[int]]:
        """How many lend to every item, by the node that they lend to."""
        return {
            name: [len(one.of(row)) for row in range(len(self.items))]
            for name, (_, one) in self._claimed.items()
            if one.keys is not None
        }

    def others(self, seed: int) -> list[np.ndarray]:
        """Whose outputs stand for every item's, draw by draw."""
        random = np.random.default_rng([seed, 0])
        return [ring(self.classes, random) for _ in range(OTHERS)]

    def plan(self, draws: int, seed: int) -> dict[tuple[Wanted, int], Scrub]:
        """The scrubs of every hypothesis in every draw; blocks, and hypotheses, are drawn alike."""
        plan = {}
        for number in range(draws):
            bases = ring(self.classes, np.random.default_rng([seed, 1, number]))
            for key, tree in self.trees.items():
                random = np.random.default_rng([seed, 2, number])
                plan[key, number] = draw(tree, self.lenders[key], self.classes, bases, random)
        return plan


class _Recovered:
    """Scores as shares of what lies between another item's output and the model's own."""

    def __init__(
        self,
        scores: Scores,
        plan: Sequence[tuple[Wanted, int]],
        draws: int,
        items: Items,
        axes: Mapping[str, Sequence[Any]],
        drawn: Mapping[str, Any],
    ):
        self.scores, self.plan, self.draws = scores, plan, draws
        self.items, self.axes, self.drawn = items, axes, drawn
        self.other = scores.other.mean(-1)
        self.gap = scores.model - self.other

    def _scrubbed(self, which: str) -> Float[Tensor, "n m blocks draws"]:
        at = [i for i, ((name, _), _) in enumerate(self.plan) if name == which]
        blocks = len(at) // self.draws
        return self.scores.scrubbed[..., at].unflatten(-1, (self.draws, blocks)).mT

    def result(self, which: str, **beside: Any) -> Result:
        """What a hypothesis recovers."""
        left = self._scrubbed(which).mean(-1) - self.other[..., None]
        return self._found(left, **beside)

    def spread(self, which: str) -> Result:
        """The mean size of an item's error."""
        own = self.scores.model[..., None, None]
        return self._found((self._scrubbed(which) - own).abs().mean(-1))

    def by_draw(self) -> Float[Tensor, "m draws"]:
        """What the claim recovers in every draw, blocks averaged."""
        left = self._scrubbed(CLAIM) - self.other[..., None, None]
        return (left.mean(0) / self.gap.mean(0)[:, None, None]).mean(1)

    def _found(self, values: Float[Tensor, "n m blocks"], **beside: Any) -> Result:
        values = values if "layer" in self.axes else values[..., 0]
        return found(values, self.axes, self.items, denominators=self.gap, **self.drawn, **beside)
