"""Whether two autoencoders found the same: what their latents write, and when they are active."""

from __future__ import annotations

import importlib
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.analysis.autoencoders.autoencoder import Autoencoder
from audio_lens.analysis.autoencoders.evaluating import encoded
from audio_lens.analysis.autoencoders.rows import Given
from audio_lens.arguments import number
from audio_lens.errors import ExtraError, InputError
from audio_lens.items import found_by_name
from audio_lens.results import Result

RANDOM = "random_direction"
SIMILAR = 0.7  # from which on two latents are taken for the same
MOST_ASSIGNED = 8192  # latents of which a best one-to-one assignment is looked for
AT_ONCE = 1024  # latents that are compared with all others together
SIDES = 2


def match(
    one: Autoencoder,
    other: Autoencoder,
    activations: Given | tuple[Given, Given] | None = None,
    *,
    similar: float = SIMILAR,
    seed: int = 0,
) -> Result:
    """How much of what one autoencoder found another one found too: of another seed, or layer.

    For every latent of the first that is active:

    - "cosine": the largest cosine of its direction with one of the other's; the mean is known as
      MMCS. Two latents may have the same partner.
    - "assigned": the same where each has a partner of its own (Hungarian assignment, extra
      ``probe``); 0 for latents that are left without.
    - "co_activation": the largest correlation with a latent of the other over the same rows, with
      ``activations``. Directions of different models, or of layers far apart, need not be
      comparable; this is.

    Each has beside it the share of latents where it is above ``similar``. The control
    "random_direction" compares with as many random directions, and permuted rows.

    Args:
        one, other: autoencoders of the same size d; of other sizes only co-activation is measured.
        activations: rows that both read, or rows for each, of the same positions; latents that
            they leave silent are left out.
        similar: from which value on two latents are taken for the same.
        seed: of the control and the interval.

    Raises:
        InputError: nothing to compare by, rows that do not pair up, or latents that are all silent.
        ExtraError: without scipy.
    """
    number("similar", similar, above=0, most=1)
    has_cosines = one.d == other.d
    if not has_cosines and activations is None:
        raise InputError(
            f"directions of {one.d} and of {other.d} entries have no cosines: pass activations"
        )
    columns: dict[str, Tensor] = {}
    control: dict[str, Tensor] = {}
    alive = [torch.arange(each.width) for each in (one, other)]
    if activations is not None:
        sides = activations if isinstance(activations, tuple) else (activations, activations)
        (by_rows, chance), alive = _by_rows(one, other, sides, seed)
        columns["co_activation"], control["co_activation"] = by_rows, chance
    if has_cosines:
        ours, theirs = one.directions[alive[0]], other.directions[alive[1]]
        drawn = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(seed))
        for held, against in ((columns, theirs), (control, drawn.to(theirs))):
            held["cosine"] = closest(ours, against)[0]
            if max(len(ours), len(theirs)) <= MOST_ASSIGNED:
                held["assigned"] = _assigned(ours, against)
    names = [str(latent) for latent in alive[0].tolist()]
    result = _result(columns, names, similar, seed)
    result.controls = {RANDOM: _result(control, names, similar, seed)}
    result.meta |= {"similar": f"{similar:g}", "latents": str(len(names)), "of": str(one.width)}
    shares = result.mean()
    told = {str(name): float(shares.values[i]) for i, name in enumerate(shares.coords["measure"])}
    result.report = [", ".join(f"{name} {value:.3g}" for name, value in told.items())]
    return result


def _result(columns: dict[str, Tensor], names: list[str], similar: float, seed: int) -> Result:
    order = [name for name in ("cosine", "assigned", "co_activation") if name in columns]
    values = {name: columns[name].double().cpu() for name in order}
    shares = {f"{name} > {similar:g}": (x > similar).double() for name, x in values.items()}
    together = values | shares
    table = torch.stack(list(together.values()), dim=1)
    return found_by_name(table, {"measure": list(together)}, names, seed=seed)


def closest(
    ours: Float[Tensor, "n d"], theirs: Float[Tensor, "m d"]
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """For every direction the largest cosine with one of others, and which that is."""
    own, others = F.normalize(ours, dim=1), F.normalize(theirs.to(ours), dim=1)
    pairs = [(part @ others.mT).max(1) for part in own.split(AT_ONCE)]
    return torch.cat([p.values for p in pairs]), torch.cat([p.indices for p in pairs])


def _assigned(ours: Float[Tensor, "n d"], theirs: Float[Tensor, "m d"]) -> Float[Tensor, " n"]:
    """The cosines of a one-to-one assignment that makes their sum largest."""
    try:
        optimize: Any = importlib.import_module("scipy.optimize")
    except ImportError as error:
        raise ExtraError(
            "matching needs scipy, which the extra probe brings: pip install 'audio_lens[probe]'"
        ) from error
    cosines = F.normalize(ours, dim=1) @ F.normalize(theirs.to(ours), dim=1).mT
    rows, columns = optimize.linear_sum_assignment(-cosines.detach().cpu().numpy())
    held = torch.zeros(len(ours))
    held[torch.as_tensor(rows)] = cosines[torch.as_tensor(rows), torch.as_tensor(columns)].cpu()
    return held


def _by_rows(
    one: Autoencoder, other: Autoencoder, sides: tuple[Given, Given], seed: int
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Largest correlations, those with rows in another order, and the latents that are active."""
    if len(sides) != SIDES:
        raise InputError(f"activations are of both, or one for each, got {len(sides)}")
    count = 0
    first = [torch.zeros(each.width, dtype=torch.float64) for each in (one, other)]
    second = [torch.zeros_like(x) for x in first]
    product = torch.zeros(one.width, other.width)
    chance = torch.zeros_like(product)
    draw = torch.Generator().manual_seed(seed)
    streams = [encoded(each, side) for each, side in zip((one, other), sides, strict=True)]
    for block, beside in zip_longest(*streams):
        if block is None or beside is None or not torch.equal(block.items, beside.items):
            raise InputError("the rows of both do not belong together: collect them in one call")
        ours, theirs = block.latents, beside.latents
        count += len(ours)
        for side, x in enumerate((ours, theirs)):
            first[side] += x.double().sum(0).cpu()
            second[side] += x.double().square().sum(0).cpu()
        product += (ours.mT @ theirs).cpu()
        chance += (ours.mT @ theirs[torch.randperm(len(theirs), generator=draw)]).cpu()
    spread = [
        (squares - sums.square() / count).clamp(min=0).sqrt()
        for sums, squares in zip(first, second, strict=True)
    ]
    alive = [(x > 0).nonzero()[:, 0] for x in spread]
    if not all(map(len, alive)):
        raise InputError("all latents of one of them are silent on these rows")
    found = []
    for sums in (product, chance):
        common = sums.double() - torch.outer(first[0], first[1]) / count
        size = torch.outer(spread[0], spread[1])
        near = (common / size.clamp(min=1e-30))[alive[0]][:, alive[1]]
        found.append(near.max(1).values)
    return (found[0], found[1]), alive
