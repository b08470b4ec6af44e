"""The five ways to score neurons for a class, from how often and how strongly they fire for each.

Frequency (LAP), entropy (LAPE), mean difference (MAD) and contrast (CAS) after 2601.03115, whose
code is not public; AAPE after 2602.15307. Where a source leaves the form open, ours is said here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.arguments import number
from audio_lens.errors import InputError

LAP, LAPE, MAD, CAS, AAPE = KINDS = ("LAP", "LAPE", "MAD", "CAS", "AAPE")
FREQUENCIES = (LAP, LAPE, AAPE)  # count how often a neuron fires, over positions
FLOOR = 0.2  # LAPE: of positions of its class at which a neuron fires
SHARES = (0.05, 0.01, 0.05)  # AAPE: dropped by rate; kept by entropy; kept by class probability

Often = Float[Tensor, "*draws classes neurons"]


def scored(kind: str, often: Often, mean: Often, others: Often) -> Often:
    """The score of every neuron for every class, eligible or not.

    Args:
        kind: one of `KINDS`.
        often: P, the share of a class's positions at which a neuron is above 0.
        mean: the mean activation over a class's positions.
        others: the mean activation over the positions of all other classes.
    """
    if kind == LAP:
        return often
    if kind == MAD:
        return mean - others
    if kind == CAS:
        return mean - _best_of_others(mean)
    return -entropy(often)[..., None, :].expand_as(often)


def entropy(often: Often) -> Float[Tensor, "*draws neurons"]:
    """The entropy of each neuron's shares over the classes, in nats; largest for a silent one."""
    total = often.sum(-2, keepdim=True)
    even = torch.full_like(often, 1 / often.shape[-2])
    share = torch.where(total > 0, often / total.clamp(min=1e-300), even)
    return -torch.special.xlogy(share, share).sum(-2)


def eligible(
    kind: str,
    often: Float[Tensor, "classes neurons"],
    floor: float,
    shares: tuple[float, float, float],
) -> Bool[Tensor, "classes neurons"]:
    """Which neurons a selector may take for which class; the neurons of all layers together."""
    if kind == LAPE:
        own = torch.zeros_like(often, dtype=torch.bool).scatter_(0, often.argmax(0)[None], True)
        return own & (often >= floor)
    if kind == AAPE:
        return _by_three_filters(often, shares)
    return torch.ones_like(often, dtype=torch.bool)


def _by_three_filters(
    often: Float[Tensor, "classes neurons"], shares: tuple[float, float, float]
) -> Bool[Tensor, "classes neurons"]:
    """Neurons that fire, of these those that tell classes apart, each where it fires often."""
    dropped, by_entropy, by_class = shares
    rate = often.mean(0)
    fires = (rate > 0) & (rate >= quantile(rate, dropped))
    if not fires.any():
        return torch.zeros_like(often, dtype=torch.bool)
    entropies = entropy(often).masked_fill(~fires, torch.inf)
    count = max(1, round(by_entropy * int(fires.sum())))
    few = fires & (entropies <= entropies.sort().values[count - 1])
    probable = often >= quantile(often[:, fires].flatten(), 1 - by_class)
    return few & probable


def quantile(values: Float[Tensor, " n"], share: float) -> float:
    """A quantile of many values; torch's own takes no more than 2 ** 24."""
    ordered = values.sort().values
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))].item()


def _best_of_others(mean: Often) -> Often:
    """For every class the largest mean of any other."""
    two = mean.topk(2, dim=-2)
    is_best = torch.arange(mean.shape[-2])[:, None] == two.indices[..., :1, :]
    return torch.where(is_best, two.values[..., 1:2, :], two.values[..., :1, :])


def checked(
    kind: str, floor: float | int | None, shares: Sequence[float | int] | None
) -> tuple[float, tuple[float, float, float]]:
    """The limits of a kind.

    Raises:
        InputError: another kind, limits of another one, or shares that are none.
    """
    if kind not in KINDS:
        raise InputError(f"kind is one of {', '.join(KINDS)}, got {kind!r}")
    if floor is not None and kind != LAPE:
        raise InputError(f"floor= is a limit of {LAPE}; {kind} has none: leave it out")
    if shares is not None and kind != AAPE:
        raise InputError(f"shares= are the filters of {AAPE}; {kind} has none: leave them out")
    if shares is not None and len(shares) != 3:
        raise InputError(f"shares are three, by rate, entropy and class; got {len(shares)}")
    limit = FLOOR if floor is None else float(number("floor", floor, least=0, most=1))
    wanted = SHARES if shares is None else shares
    first, second, third = (float(number("shares", x, least=0, most=1)) for x in wanted)
    return limit, (first, second, third)
