"""The shape of a cloud of activations: how many directions it fills, and how evenly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.similarity.kernels import Given, matrix
from audio_lens.errors import InputError

Shape = Callable[[Float[Tensor, "n d"], Float[Tensor, " n"]], Float[Tensor, ""]]


def effective_rank(x: Given) -> float:
    """How many directions centred rows fill: exp of the entropy of their singular values.

    Of k directions with equal spread it is k (Roy and Vetterli, 2007). It is at most one less than
    the number of rows, so that only sets of equally many rows can be compared.

    Raises:
        InputError: fewer than two rows, rows that do not vary, another shape, or NaN.
    """
    return _of_all(_rank, x)


def isotropy(x: Given) -> float:
    """How evenly centred rows spread over all dimensions: IsoScore (Rudman et al., 2022).

    Of k directions with equal spread, of d, it is (k - 1) / (d - 1): 1 for all, 0 for one. Rows
    that are fewer than dimensions cannot fill these, and score low for that alone.

    Raises:
        InputError: as `effective_rank`; one dimension.
    """
    if matrix(x).shape[1] < 2:
        raise InputError("isotropy is of two dimensions or more")
    return _of_all(_evenness, x)


def mean_cosine(x: Given) -> float:
    """The mean cosine of two rows: near 1 where all point one way (Ethayarajh, 2019).

    Raises:
        InputError: as `effective_rank`; a row of no length.
    """
    if not (matrix(x).norm(dim=1) > 0).all():
        raise InputError("a row of no length has no cosine")
    return _of_all(_cosine, x)


def by_row(shape: Shape, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """What every row says of a shape: values whose mean is the shape of all rows.

    How far they lie from it is the row's influence, the slope of the shape along its weight
    (the infinitesimal jackknife), so that intervals can be drawn over them.
    """
    weights = torch.ones(len(x), dtype=torch.float64, requires_grad=True)
    value = shape(x, weights)
    (slope,) = torch.autograd.grad(value, weights)
    return value.detach() + len(x) * (slope - slope.mean())


def _of_all(shape: Shape, x: Given) -> float:
    rows = matrix(x)
    if len(rows) < 2 or not (rows - rows[0]).any():
        raise InputError(f"{len(rows)} rows that do not vary have no shape")
    return float(shape(rows, torch.ones(len(rows), dtype=torch.float64)))


def _rank(x: Float[Tensor, "n d"], weights: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    values = torch.linalg.svdvals(_weighted(x, weights))
    shares = values / values.sum()
    shares = shares[shares > 0]
    return (-shares * shares.log()).sum().exp()


def _evenness(x: Float[Tensor, "n d"], weights: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """IsoScore is (s - 1) / (d - 1), where s is the square of sum by norm of the variances."""
    variances = torch.linalg.svdvals(_weighted(x, weights)).square()
    filled = variances.sum().square() / variances.square().sum()
    return (filled - 1) / (x.shape[1] - 1)


def _cosine(x: Float[Tensor, "n d"], weights: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    units = x / x.norm(dim=1, keepdim=True)
    own = weights.square().sum()
    total = (weights @ units).square().sum()
    return (total - own) / (weights.sum().square() - own)


def _weighted(x: Float[Tensor, "n d"], weights: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """Rows about their weighted mean, whose squares count by their weights."""
    mean = weights @ x / weights.sum()
    return weights.sqrt()[:, None] * (x - mean)


SHAPES: dict[str, Shape] = {
    "effective_rank": _rank,
    "isotropy": _evenness,
    "mean_cosine": _cosine,
}
