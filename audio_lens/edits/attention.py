"""What an edit does to attention: scores before the softmax, and patterns behind it.

The edit's ``where`` are the queries; ``keys`` is a place, too (`audio_lens.places`). "audio" among
the keys of cross-attention is what it reads.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.edits.at import At
from audio_lens.edits.do import Do, Number
from audio_lens.inputs import InputError
from audio_lens.places import Where
from audio_lens.sites import Site, SiteError

_TINY = 1e-30  # a pattern below it counts as 0: its logarithm is not taken


class _OnKeys(Do):
    """A change of scores or patterns at some keys."""

    keys: Where
    on_patterns: ClassVar[bool] = True  # scores can all be changed

    def check(self, site: Site, asked: Mapping[str, Any]) -> None:
        kinds = ("attn_scores", "pattern") if self.on_patterns else ("attn_scores",)
        if site.last not in kinds:
            near = f"{site.part}.{site.sublayer if 'attn' in site.sublayer else 'attn'}"
            known = " or ".join(f"{near}.{name}" for name in kinds)
            raise SiteError(f"{type(self).__name__} edits {known}, not {site}")

    def __call__(self, x: Float[Tensor, "b h q k"], at: At) -> Float[Tensor, "b h q k"]:
        keys = at.keys(self.keys, x)
        change = self.scores if at.site.last == "attn_scores" else self.pattern
        return change(x, keys, at)

    @abstractmethod
    def scores(
        self, x: Float[Tensor, "b h q k"], keys: Bool[Tensor, "b 1 1 k"], at: At
    ) -> Float[Tensor, "b h q k"]:
        """The changed scores; masked ones (minus infinity) stay masked."""

    def pattern(
        self, x: Float[Tensor, "b h q k"], keys: Bool[Tensor, "b 1 1 k"], at: At
    ) -> Float[Tensor, "b h q k"]:
        """The changed pattern; `check` lets none through where `on_patterns` is False."""
        raise SiteError(f"{type(self).__name__} edits scores, and {at.name} is a pattern")


@dataclass(frozen=True, eq=False)
class Block(_OnKeys):
    """No attention to some keys.

    At scores the other keys share what these had (knock-out); at patterns nothing takes its place.
    """

    keys: Where

    def scores(self, x: Tensor, keys: Tensor, at: At) -> Tensor:
        blocked = x.masked_fill(keys, -torch.inf)
        _check_hearing(x.isfinite(), blocked.isfinite(), at)
        return blocked

    def pattern(self, x: Tensor, keys: Tensor, at: At) -> Tensor:
        return x.masked_fill(keys, 0.0)


@dataclass(frozen=True, eq=False)
class Bias(_OnKeys):
    """Adds to the scores of some keys: ``log(2)`` doubles their weight before it is shared out."""

    log_beta: Number | Float[Tensor, ""]
    keys: Where
    on_patterns = False

    def scores(self, x: Tensor, keys: Tensor, at: At) -> Tensor:
        return torch.where(keys, x + self.log_beta, x)


@dataclass(frozen=True, eq=False)
class Weights(_OnKeys):
    """Multiplies the weights of some keys.

    Attributes:
        beta: by what; 0 takes them away.
        renormalise: whether all keys then share one whole again (at scores they always do).
    """

    beta: Number | Float[Tensor, ""]
    keys: Where
    renormalise: bool = True

    def check(self, site: Site, asked: Mapping[str, Any]) -> None:
        super().check(site, asked)
        if site.last == "attn_scores" and not self.renormalise:
            raise SiteError(
                f"weights at {site} are always shared out by the softmax: with renormalise=False "
                f"edit {site.part}.{site.sublayer}.pattern"
            )
        if self._value < 0:
            raise InputError(f"attention weights cannot be negative: beta is {self._value:g}")

    @property
    def _value(self) -> float:
        return float(self.beta.detach() if isinstance(self.beta, torch.Tensor) else self.beta)

    def scores(self, x: Tensor, keys: Tensor, at: At) -> Tensor:
        if self._value == 0:
            return Block(self.keys).scores(x, keys, at)
        return torch.where(keys, x + torch.as_tensor(self.beta).to(x).log(), x)

    def pattern(self, x: Tensor, keys: Tensor, at: At) -> Tensor:
        weighed = torch.where(keys, x * self.beta, x)
        if not self.renormalise:
            return weighed
        _check_hearing(x > 0, weighed > 0, at)
        return weighed / weighed.sum(-1, keepdim=True).clamp(min=_TINY)


@dataclass(frozen=True, eq=False)
class Multiply(_OnKeys):
    """Multiplies the scores of some keys by ``1 + alpha`` (MATA, 2509.18816).

    Negative scores fall by that. ``mode="mult_abs"`` adds ``alpha`` times their size instead, so
    that every score rises.
    """

    alpha: Number | Float[Tensor, ""]
    keys: Where
    mode: Literal["mult", "mult_abs"] = "mult"
    on_patterns = False

    def check(self, site: Site, asked: Mapping[str, Any]) -> None:
        super().check(site, asked)
        if self.mode not in ("mult", "mult_abs"):
            raise InputError(f"mode is 'mult' or 'mult_abs', got {self.mode!r}")

    def scores(self, x: Tensor, keys: Tensor, at: At) -> Tensor:
        def risen(finite: Tensor) -> Tensor:
            size = finite if self.mode == "mult" else finite.abs()
            return torch.where(keys, finite + self.alpha * size, finite)

        return at.where_finite(x, risen)


@dataclass(frozen=True, eq=False)
class Sharpen(_OnKeys):
    """Shares out anew what some keys have together, by their weights to the power ``tau``.

    Above 1 the strongest get more, below 1 less; what all of them have together stays.
    """

    tau: Number | Float[Tensor, ""]
    keys: Where

    def scores(self, x: Tensor, keys: Tensor, at: At) -> Tensor:
        def sharpened(finite: Tensor) -> Tensor:
            return finite * self.tau

        own, some = at.where_finite(x, sharpened), keys & x.isfinite()
        has_some = some.any(-1, keepdim=True)  # else the logarithm has no gradient
        before, after = (
            s.where(some, -torch.inf).where(has_some, 0.0).logsumexp(-1, keepdim=True)
            for s in (x, own)
        )
        return torch.where(some, own + before - after, x)

    def pattern(self, x: Tensor, keys: Tensor, at: At) -> Tensor:
        logs = x.clamp(min=_TINY).log().where(x > _TINY, -torch.inf)
        changed = self.scores(logs, keys, at)
        return torch.where(keys & logs.isfinite(), changed.exp(), x)


def _check_hearing(before: Bool[Tensor, "b h q k"], after: Bool[Tensor, "b h q k"], at: At) -> None:
    """Raise where a query that had keys has none left.

    Raises:
        InputError: naming what to do.
    """
    deaf = before.any(-1, keepdim=True) & ~after.any(-1, keepdim=True)
    if (deaf if at.chosen is None else deaf & at.chosen).any():
        raise InputError(
            f"at {at.name} some queries would have no key left: choose other queries (where=) or "
            "fewer keys, or edit the pattern without sharing out anew"
        )
