"""What a sweep of adapters found, in words."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from audio_lens.analysis.adapters.groups import NONE, RANDOM
from audio_lens.analysis.adapters.store import Trained

LAST = 10  # steps whose mean loss is told
CANNOT = (
    "A group that learns well shows where training reaches the answer most easily, at this rate "
    "and in so many steps; not where the model as it is listens."
)


def told(
    runs: Mapping[str, Sequence[Trained]],
    layers: Mapping[str, Sequence[int]],
    groups: Collection[str],
    left_out: Mapping[str, str],
) -> list[str]:
    """Notes for people: which group is best, every arm, what diverged, and what it cannot show.

    Args:
        runs: by arm, one for each seed.
        layers: blocks that carry adapters.
        groups: which arms are groups of blocks.
        left_out: arms that did not run, with why.
    """
    compared = {name: runs[name] for name in groups if name in runs}
    notes = _best("Most right answers", {name: rights(own) for name, own in compared.items()})
    if not notes:  # right answers do not tell groups apart
        levels = {name: _means(own, 1) for name, own in compared.items()}
        notes = _best("As many right answers; highest log-probability", levels)
    notes += [_arm(name, row, layers[name]) for name, row in runs.items()]
    if lost := [name for name, row in runs.items() if any(map(_diverged, row))]:
        notes.append(f"Training diverged in {', '.join(lost)}: no values there; lower rate=.")
    notes += [f"Left out: {name}, {why}." for name, why in left_out.items()]
    return [*notes, CANNOT]


def rights(runs: Sequence[Trained]) -> list[float]:
    """The share of right answers with every seed, NaN left out."""
    return _means(runs, 0)


def _means(runs: Sequence[Trained], metric: int) -> list[float]:
    means = [run.values[:, metric].mean().item() for run in runs]
    return [one for one in means if math.isfinite(one)]


def _best(what: str, shares: Mapping[str, Sequence[float]]) -> list[str]:
    """Which group is ahead, and whether that is so with every seed; nothing where none is."""
    means = {name: sum(own) / len(own) for name, own in shares.items() if own}
    if len(means) < 2 or len(set(means.values())) < 2:
        return []
    best = max(means, key=means.__getitem__)
    others = [name for name in means if name != best]
    is_ahead = all(min(shares[best]) > max(shares[name]) for name in others)
    how = (
        "with every seed"
        if is_ahead
        else "but seeds overlap, so that the order of groups may be chance"
    )
    of = ", ".join(f"{name} {means[name]:.2f}" for name in others)
    return [f"{what} of the groups: {best}, {means[best]:.2f} ({of}), {how}."]


def _arm(name: str, runs: Sequence[Trained], layers: Sequence[int]) -> str:
    own = rights(runs)
    where = "" if not layers else f"blocks {', '.join(map(str, layers))}"
    where += " with the first seed" * (name == RANDOM)
    shares = (
        f"{sum(own) / len(own):.2f} right ({min(own):.2f} to {max(own):.2f} by seed)"
        if own
        else "no values"
    )
    if name == NONE:
        return f"{name}: {own[0]:.2f} right."
    counted = ", ".join(filter(None, [where, f"{runs[0].n_trained} parameters"]))
    losses = [sum(run.loss[-LAST:]) / len(run.loss[-LAST:]) for run in runs]
    finite = [one for one in losses if math.isfinite(one)]
    ends = f", loss {sum(finite) / len(finite):.2f} in the end" if finite else ""
    return f"{name} ({counted}): {shares}{ends}."


def _diverged(run: Trained) -> bool:
    return not all(map(math.isfinite, run.loss))
