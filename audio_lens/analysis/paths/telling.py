"""Values of all rows of a study as a `Result`, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.paths.sides import Study
from audio_lens.items import found, statistics
from audio_lens.results import Result


def told(
    study: Study,
    values: Float[Tensor, "n m *cells"],
    axes: Mapping[str, Sequence[Any]],
    gaps: Float[Tensor, "n m"] | None,
    *,
    by: str | None = None,
    seed: int = 0,
) -> Result:
    """Ratios of means, with the axes behind the metrics; means where there are no ``gaps``."""
    named = {"metric": list(study.wanted), **axes}
    if study.pairs is not None:
        clean, dropped = list(study.pairs.clean), study.pairs.dropped.counts
        return found(values, named, clean, denominators=gaps, by=by, seed=seed, dropped=dropped)
    coords = {name: list(along) for name, along in named.items()}
    if gaps is None:
        drawn = statistics.bootstrap(values, seed=seed)
    else:
        under = gaps.reshape(*gaps.shape, *[1] * (values.ndim - 2)).expand_as(values)
        drawn, values = statistics.ratio_of_means(values, under, seed=seed), values / under
    return Result(
        values.movedim(0, 1),
        ("metric", "stimulus", *axes),
        {"stimulus": [str(row) for row in range(len(study))], **coords},
        estimate=drawn.value,
        low=drawn.low,
        high=drawn.high,
        n_kept=len(study),
    )
