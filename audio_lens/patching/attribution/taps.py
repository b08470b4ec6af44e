"""Taps: where attribution patching sits in a run, and how gradients become effects of cells.

A tap belongs to one hook point of one table. It takes the difference between the two runs on the
way forward, and on the way back turns each gradient into effects and drops it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from einops import rearrange, repeat
from fancy_einsum import einsum
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.errors import InputError
from audio_lens.patching.cells import CellTable
from audio_lens.patching.engine.trace import is_known, stack_of

if TYPE_CHECKING:
    from audio_lens.hooks import HookPoint
    from audio_lens.models.base import HookedAudioTransformer
    from audio_lens.models.layers import Attention

QUERY, KEY = ("q", "rot_q"), ("k", "rot_k")  # before and after rotary positions


class Tap:
    """Gradient times difference at one hook point, summed to the cells of its layer.

    Args:
        table: the cells.
        layer: the block of this tap; None outside the blocks.
        source: activations of the run patched from, by hook name; a tap takes its own out.
    """

    def __init__(self, table: CellTable, layer: int | None, source: dict[str, Tensor]):
        self.site, self.layer, self.source = table.site, layer, source
        self.has_units = table.site.unit in table.axes
        self.sets = table.positions
        self.name = table.site.hook_name(layer)
        self._difference: Tensor | None = None
        self._effects: Float[Tensor, "sets batch units"] | None = None

    @property
    def reads(self) -> set[str]:
        """Hook names it needs of the source run, as far as they run."""
        return {self.name}

    @property
    def hooks(self) -> list[tuple[str, Callable]]:
        """Forward hooks on the base run."""
        return [(self.name, self._watch)]

    def _watch(self, x: Tensor, hook: HookPoint) -> Tensor:
        if self._difference is None:
            self._difference = apart(self.source.pop(self.name), x.detach())
        return watched(x, self._meet)

    @property
    def difference(self) -> Tensor:
        """Source minus base run.

        Raises:
            ValueError: before the base run has passed.
        """
        if self._difference is None:
            raise InputError(f"the base run has not passed {self.name}")
        return self._difference

    def _meet(self, gradient: Tensor) -> None:
        difference = self.difference.to(precise(gradient))
        self.add(self._per_position(gradient * difference))

    def _per_position(self, product: Tensor) -> Float[Tensor, "batch t units"]:
        """Summed over all axes that no cell is split by; one unit where there are none."""
        site = self.site
        units = [site.split[1]] if self.has_units else []
        spare = [dim for dim in range(product.ndim) if dim not in (0, site.position_dim, *units)]
        product = product.sum(spare) if spare else product
        if not units:
            return product[..., None]
        return product if site.position_dim < units[0] else product.transpose(1, 2)

    def add(self, per_position: Float[Tensor, "batch t units"]) -> None:
        """Count the effects of one gradient."""
        sets = self.sets.to(per_position)
        effects = einsum(
            "set batch position, batch position unit -> set batch unit", sets, per_position
        )
        self._effects = effects if self._effects is None else self._effects + effects

    def take(
        self, owner: Int[Tensor, " batch"], n_rows: int
    ) -> Float[Tensor, "sets rows units"] | float:
        """The effects since the last call, of entries of the batch axis summed by owner.

        0.0 if no gradient has arrived: nothing that was read depends on this point.
        """
        effects, self._effects = self._effects, None
        if effects is None:
            return 0.0
        rows = effects.new_zeros(len(effects), n_rows, effects.shape[-1])
        return rows.index_add(1, owner.to(rows.device), effects).cpu()


class Entrance:
    """Where audio or text enters a run, and can be moved part of the way to the source run.

    Attributes:
        source: what enters the source run there.
        share: how far: 0 is the base run, 1 the source run.
    """

    source: Tensor

    def __init__(self, name: str):
        self.name, self.share = name, 0.0
        self._met: Float[Tensor, " batch"] | None = None

    @property
    def hooks(self) -> list[tuple[str, Callable]]:
        """Forward hooks on the base run."""
        return [(self.name, self._move)]

    def _move(self, x: Tensor, hook: HookPoint) -> Tensor:
        difference = apart(self.source, x.detach())
        return watched(
            torch.lerp(x, self.source, self.share),
            lambda gradient: self._meet(gradient, difference),
        )

    def _meet(self, gradient: Tensor, difference: Tensor) -> None:
        self._met = (gradient * difference.to(precise(gradient))).flatten(1).sum(1)

    def take(self, owner: Int[Tensor, " batch"], n_rows: int) -> Float[Tensor, " rows"] | float:
        """Gradient times difference of the last backward, of entries summed by owner."""
        met, self._met = self._met, None
        if met is None:
            return 0.0
        return met.new_zeros(n_rows).index_add(0, owner.to(met.device), met).cpu()


def watched(x: Tensor, meet: Callable[[Tensor], None]) -> Tensor:
    """The activation with a function on its gradient; the graph starts here if nothing is earlier.

    While gradients are off, the activation as it is.
    """
    if not torch.is_grad_enabled():
        return x
    if not x.requires_grad:
        x = x.detach().requires_grad_()
        x.register_post_accumulate_grad_hook(_forget)
    x.register_hook(meet)
    return x


def _forget(leaf: Tensor) -> None:
    leaf.grad = None


def apart(source: Tensor, base: Tensor) -> Tensor:
    """Source minus base; 0 where they are equal, minus infinity (masked scores) included."""
    return (source - base).masked_fill(source == base, 0)


def precise(x: Tensor) -> torch.dtype:
    """Float32, or more if the tensor has it."""
    return torch.promote_types(x.dtype, torch.float32)


# -------------------------------------------------------------------------------- queries and keys


class QueryKeyTap(Tap):
    """The QK-fix of AtP* (2403.00745): softmax exactly, everything behind it to first order.

    Each query (or key) is patched alone, so a cell of several keys is the sum of theirs. A
    key-value head has the effects on all query heads it serves.
    """

    def __init__(
        self, table: CellTable, layer: int | None, source: dict[str, Tensor], attn: Attention
    ):
        super().__init__(table, layer, source)
        self.attn = attn
        self.is_query = self.site.last in QUERY
        self.path = self.name.rpartition(".")[0]
        self.base: dict[str, Tensor] = {}  # q, k, bias, and which scores a mask hides

    @staticmethod
    def fits(model: HookedAudioTransformer, table: CellTable) -> bool:
        """Whether the site is queries or keys, of attention whose softmax is known."""
        is_asked = table.site.last in (*QUERY, *KEY)
        return is_asked and is_known(stack_of(model, table.site.part))

    @staticmethod
    def softmax_points(name: str) -> list[str]:
        """Scores and pattern of the attention that a hook point belongs to."""
        path = name.rpartition(".")[0]
        return [f"{path}.hook_attn_scores", f"{path}.hook_pattern"]

    @property
    def reads(self) -> set[str]:
        return {self._name(last) for last in (QUERY if self.is_query else KEY)}

    @property
    def hooks(self) -> list[tuple[str | Callable[[str], bool], Callable]]:
        as_read = {self._name(last) for last in (*QUERY, *KEY, "pos_bias")}
        scores, pattern = self.softmax_points(self.name)
        return [
            (lambda name: name in as_read, self._keep),
            (scores, self._keep_mask),
            (pattern, lambda x, hook: watched(x, self._meet)),
        ]

    def _name(self, last: str) -> str:
        return f"{self.path}.hook_{last}"

    def _keep(self, x: Tensor, hook: HookPoint) -> None:
        """Queries and keys as attention reads them: rotated, where there are rotary positions."""
        name = str(hook.name)
        last = name.rpartition("hook_")[2]
        if last == "pos_bias":
            self.base["bias"] = x.detach()
            return
        self.base["q" if last in QUERY else "k"] = x.detach()
        if (last in QUERY) == self.is_query:
            self._difference = self.source[name] - x.detach()

    def _keep_mask(self, scores: Tensor, hook: HookPoint) -> None:
        self.base["hidden"] = scores.detach()[:, :1] == -torch.inf  # the same for all heads

    def _meet(self, gradient: Float[Tensor, "b h q k"]) -> None:
        q, k, bias = self.base["q"], self.base["k"], self.base.get("bias", 0)
        scores = (self._scores(q, k) + bias).masked_fill(self.base["hidden"], -torch.inf)
        gradient = gradient.to(scores.dtype)
        if self.is_query:
            effects = query_effects(scores, self._scores(self.difference, k), gradient)
            per_head = rearrange(effects, "b h q -> b q h")
        else:
            effects = key_effects(scores, self._scores(q, self.difference), gradient)
            per_head = effects.unflatten(1, (-1, self.attn.group)).sum(2).transpose(1, 2)
        self.add(per_head if self.has_units else per_head.sum(-1, keepdim=True))

    def _scores(
        self, q: Float[Tensor, "b q h e"], k: Float[Tensor, "b k kv e"]
    ) -> Float[Tensor, "b h q k"]:
        q, k = (x.to(precise(x)) for x in (q, k))
        k = repeat(k, "b k kv e -> b k (kv g) e", g=self.attn.group)
        return einsum(
            "batch query head d_head, batch key head d_head -> batch head query key",
            q * self.attn.scale,
            k,
        )


def query_effects(
    scores: Float[Tensor, "*b q k"],
    shift: Float[Tensor, "*b q k"],
    gradient: Float[Tensor, "*b q k"],
) -> Float[Tensor, "*b q"]:
    """Effect of every query when all its scores move: change of its pattern times gradient.

    Args:
        scores: before softmax; minus infinity where masked.
        shift: what is added to them.
        gradient: of the metric by the pattern.
    """
    return ((softmax(scores + shift) - softmax(scores)) * gradient).sum(-1)


def key_effects(
    scores: Float[Tensor, "*b q k"],
    shift: Float[Tensor, "*b q k"],
    gradient: Float[Tensor, "*b q k"],
) -> Float[Tensor, "*b k"]:
    """Effect of every key when its score alone moves in all rows; arguments as `query_effects`.

    When only score j of a row moves, the other weights keep their proportions, so the row's
    effect is the weight that key j wins times (its gradient - the others' mean gradient). That is
    u/(1+u) (g_j - p.g) with u = p_j expm1(shift), without its cancellation in saturated rows.
    """
    log_odds, others = _against_others(scores, gradient)
    won = (log_odds + shift).sigmoid() - log_odds.sigmoid()
    return (won * (gradient - others)).sum(-2)


def _against_others(
    scores: Float[Tensor, "*b q k"], gradient: Float[Tensor, "*b q k"]
) -> tuple[Float[Tensor, "*b q k"], Float[Tensor, "*b q k"]]:
    """Per key, the log-odds of its weight and the mean gradient of all other keys.

    A key with most of the weight is taken against the others directly: 1 - p would round to 0.
    """
    p = softmax(scores)
    top = scores.argmax(-1, keepdim=True)
    rest = scores.scatter(-1, top, -torch.inf)  # of the strongest key's others
    rest_p = softmax(rest).nan_to_num()  # a row of one key has no others
    weight = 1 - p.scatter(-1, top, 0)
    total = (p * gradient).sum(-1, keepdim=True)
    others = ((total - p * gradient) / weight).scatter(
        -1, top, (rest_p * gradient).sum(-1, keepdim=True)
    )
    log_odds = scores - scores.logsumexp(-1, keepdim=True) - weight.log()
    strongest = scores.gather(-1, top) - rest.logsumexp(-1, keepdim=True)
    return log_odds.scatter(-1, top, strongest), others


def softmax(scores: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
    """Softmax over keys."""
    return scores.softmax(-1)
