"""A hypothesis on a model: which node is computed from which, and what of an item is put where."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from audio_lens.analysis.scrubbing.hypothesis import Hypothesis, Node
from audio_lens.edits import Edit, Put, Swap
from audio_lens.edits.at import At
from audio_lens.edits.do import Do
from audio_lens.edits.edit import Laid
from audio_lens.errors import InputError
from audio_lens.models import HookedAudioTransformer
from audio_lens.sites import Site, SiteError

_STAGES = ("resid_pre", "attn", "attn_out", "resid_mid", "cross_attn", "cross_attn_out", "mlp")
_ORTHOGONAL = 1e-4  # cosines below it are none
Depth = tuple[int, int, int]


class Watch(Do):
    """Changes nothing, and keeps what it sees by hook name."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def __call__(self, x: Tensor, at: At) -> Tensor:
        self.seen[at.name] = x.detach().cpu()
        return x


@dataclass(frozen=True, eq=False)
class Placed:
    """A node on a model.

    Attributes:
        depth: part, block and place in the block, which order what runs.
    """

    node: Node
    site: Site
    depth: Depth

    @staticmethod
    def of(model: HookedAudioTransformer, node: Node) -> Placed:
        """The node on a model.

        Raises:
            SiteError: a site, block or head that is not there, or one that holds scores.
            InputError: a basis that is none, or of another width.
        """
        site = Site.parse(node.site, model)
        if site.reads_attention:
            raise SiteError(f"{site} holds numbers per query and key, which no item can lend")
        if site.n_layers is not None and node.layer is None:
            raise SiteError(f"{site} lies in blocks: say in which, layer= 0 to {site.n_layers - 1}")
        Laid.of(model, _edit(node, torch.zeros(1)))
        width = _width(model, site)
        if node.basis is not None and width not in (None, len(node.basis)):
            raise InputError(f"vectors of {site} have {width} entries, its basis {len(node.basis)}")
        return Placed(node, site, _depth(model, site, node.layer))

    @property
    def source(self) -> tuple[str, int | None]:
        """What of a run it is read from."""
        return str(self.site), self.node.layer

    @property
    def hook_name(self) -> str:
        return self.site.hook_name(self.node.layer)

    def watch(self) -> Edit:
        """What reads it."""
        return Edit(self.node.site, Watch(), layer=self.node.layer)

    def put(self, values: Sequence[Tensor], masks: Sequence[Bool[Tensor, "e t"]]) -> Edit:
        """What puts activations of some items, whole ones, in its place."""
        return _edit(self.node, torch.cat(list(values)), torch.cat(list(masks)))


def _edit(node: Node, source: Tensor, where: Tensor | str = "all") -> Edit:
    do = Put(source) if node.basis is None else Swap(node.basis, source)
    return Edit(node.site, do, layer=node.layer, head=node.head, where=where)


def _width(model: HookedAudioTransformer, site: Site) -> int | None:
    """How long a vector of a site is; None where that is known only from a run."""
    if site.n_layers is None:
        return None
    cfg = model.cfg.parts[site.part]
    return {"head": cfg.d_head, "neuron": cfg.d_mlp, None: cfg.d_model}[site.unit]


def _depth(model: HookedAudioTransformer, site: Site, layer: int | None) -> Depth:
    cfg = model.cfg
    parts = [*cfg.is_heard_in, "connector", "decoder", *cfg.further_decoders]
    part = parts.index(site.part) if site.part in parts else len(parts)
    if layer is None:
        return part, 0, int(site.activation == "out")
    if site.activation == "resid_post":  # what enters the next block
        return part, layer + 1, 0
    stage = site.sublayer.partition(".")[0] or site.activation
    return part, layer, _STAGES.index(stage) if stage in _STAGES else len(_STAGES)


@dataclass(frozen=True, eq=False)
class Tree:
    """The nodes of a hypothesis on a model.

    Attributes:
        nodes: by name, from the front of the model to its end.
        reads: of every node, the nodes that it is computed from.
        roots: those that the output is computed from.
    """

    nodes: Mapping[str, Placed]
    reads: Mapping[str, tuple[str, ...]]
    roots: tuple[str, ...]

    @staticmethod
    def of(model: HookedAudioTransformer, hypothesis: Hypothesis) -> Tree:
        """The hypothesis on a model.

        Raises:
            SiteError: as `Placed.of`.
            InputError: a node that reads what does not lie before it.
        """
        placed = [Placed.of(model, node) for node in hypothesis.nodes]
        nodes = {one.node.name: one for one in sorted(placed, key=lambda one: one.depth)}
        reads = {name: _read(one, nodes) for name, one in nodes.items()}
        read = {name for names in reads.values() for name in names}
        return Tree(nodes, reads, tuple(name for name in nodes if name not in read))

    @property
    def own(self) -> Hypothesis | None:
        """What it keeps of the item itself, alone; None where that is all or nothing."""
        own = [self.nodes[name].node for name in self.roots if self.nodes[name].node.is_own]
        return Hypothesis(own) if 0 < len(own) < len(self.nodes) else None

    @property
    def whole(self) -> Hypothesis:
        """The hypothesis that everything matters at the sites that the output depends on."""
        nodes = [self.nodes[name].node for name in self.roots]
        sites = {(node.site, node.layer, str(node.head)): node for node in nodes}
        return Hypothesis([Node(one.site, one.layer, head=one.head) for one in sites.values()])

    def check_apart(self, masks: Mapping[str, Sequence[Bool[Tensor, "..."]]]) -> None:
        """Raise where two nodes that are put in one run write the same elements.

        Args:
            masks: the positions of every node, for every item, ``e t``.

        Raises:
            InputError: naming both.
        """
        for names in (self.roots, *self.reads.values()):
            for one, other in itertools.combinations(names, 2):
                if self._overlap(self.nodes[one], self.nodes[other], masks[one], masks[other]):
                    raise InputError(
                        f"nodes {one!r} and {other!r} both say what stands at the same positions "
                        f"of {self.nodes[one].node.site}: narrow one of them"
                    )

    @staticmethod
    def _overlap(
        one: Placed, other: Placed, masks: Sequence[Tensor], others: Sequence[Tensor]
    ) -> bool:
        is_stream = all("resid_p" in placed.site.activation for placed in (one, other))
        is_same = one.depth == other.depth if is_stream else one.source == other.source
        if not is_same or _heads(one).isdisjoint(_heads(other)):
            return False
        bases = [x.node.basis for x in (one, other) if x.node.basis is not None]
        if len(bases) == 2:
            first, second = (torch.linalg.qr(basis.double())[0] for basis in bases)
            if (first.mT @ second).abs().max() < _ORTHOGONAL:
                return False
        return any(bool((a & b).any()) for a, b in zip(masks, others, strict=True))


def _heads(placed: Placed) -> set[int | None]:
    """The heads it takes; for all, or where there are none, a stand-in that all share."""
    head = placed.node.head
    if head is None:
        return set(range(10_000)) if placed.site.unit == "head" else {None}
    return {head} if isinstance(head, int) else set(head)


def _read(placed: Placed, nodes: Mapping[str, Placed]) -> tuple[str, ...]:
    """The nodes that one is computed from."""
    name, asked = placed.node.name, placed.node.reads
    before = {name: one for name, one in nodes.items() if one.depth < placed.depth}
    if asked is None:
        nearest = max((one.depth for one in before.values()), default=None)
        return tuple(name for name, one in before.items() if one.depth == nearest)
    late = [one for one in asked if one not in before]
    if late:
        raise InputError(f"node {name!r} reads {late[0]!r}, which does not lie before it")
    return tuple(asked)
