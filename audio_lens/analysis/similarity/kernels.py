"""CKA and RSA: whether two sets of activations tell the same items apart in the same way."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.arguments import number, whole
from audio_lens.errors import InputError
from audio_lens.items import Activations

LEAST = 4  # rows of which the unbiased estimate exists
KERNELS, DISTANCES = ("linear", "rbf"), ("correlation", "cosine", "euclidean")
Given = Activations | Tensor


def cka(
    x: Given,
    y: Given,
    unbiased: bool = True,
    *,
    kernel: str = "linear",
    bandwidth: float | int = 1.0,
    batch: int | None = None,
    seed: int = 0,
) -> float:
    """Centred kernel alignment of the same rows in two spaces: 1 if alike, 0 if not at all.

    It stays the same under rotations and scalings of either space, not under other linear maps. The
    biased estimate (Kornblith et al., 2019) tends to 1 where there are fewer rows than dimensions,
    whatever they hold; the unbiased one (Song et al., 2012) is near 0 for independent rows, and may
    lie below it.

    Args:
        x, y: ``n d`` and ``n e``, or `Activations` of one site and layer. Rows must be samples:
            pooled clips, or few frames of each, since neighbouring frames are alike.
        unbiased: which estimate.
        kernel: "linear" or "rbf".
        bandwidth: of "rbf", as a share of the median distance between rows.
        batch: so many rows at a time, in random order: sums over batches of the unbiased estimate
            (Nguyen et al., 2021), for more rows than fit together. None takes all together.
        seed: of that order.

    Raises:
        InputError: unequal numbers of rows, too few (4; 2 for the biased one), NaN, batches of the
            biased estimate, or another kernel.
    """
    a, b = _pair(x, y, LEAST if unbiased else 2)
    if kernel not in KERNELS:
        raise InputError(f"kernel is one of {', '.join(KERNELS)}, got {kernel!r}")
    number("bandwidth", bandwidth, above=0)
    if batch is None:
        parts = [torch.arange(len(a))]
    elif not unbiased:
        raise InputError(
            "batches are for the unbiased estimate: the biased one depends on their size"
        )
    else:
        whole("batch", batch, least=LEAST)
        order = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))
        parts = [part for part in order.split(batch) if len(part) >= LEAST]
    sums = torch.zeros(3, dtype=torch.float64)
    for part in parts:
        k, l = (gram(held[part], kernel, bandwidth) for held in (a, b))
        pairs = ((k, l), (k, k), (l, l))
        sums += torch.stack([hsic(*pair) if unbiased else _biased(*pair) for pair in pairs])
    return _aligned(sums)


def rsa(x: Given, y: Given, distance: str = "correlation") -> float:
    """Representational similarity: the rank correlation of distances between rows in two spaces.

    Args:
        x, y: as in `cka`.
        distance: "correlation" (1 - r), "cosine" or "euclidean".

    Raises:
        InputError: unequal numbers of rows, fewer than 3, NaN, or another distance.
    """
    a, b = (dissimilarities(one, distance) for one in _pair(x, y, 3))
    return float(_correlation(_ranks(a), _ranks(b)))


def gram(
    x: Float[Tensor, "n d"], kernel: str = "linear", bandwidth: float | int = 1.0
) -> Float[Tensor, "n n"]:
    """The kernel of every two rows; of "linear" of centred rows."""
    if kernel == "linear":
        centred = x - x.mean(0)
        return centred @ centred.mT
    squares = torch.cdist(x, x).square()
    apart = torch.triu_indices(len(x), len(x), 1)
    median = squares[apart[0], apart[1]].sqrt().median()
    return torch.exp(-squares / (2 * (bandwidth * median).clamp(min=1e-300) ** 2))


def hsic(k: Float[Tensor, "n n"], l: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion."""
    return hsic_without(k, l)[0]


def hsic_without(
    k: Float[Tensor, "n n"],
    l: Float[Tensor, "n n"],
) -> tuple[Float[Tensor, ""], Float[Tensor, " n"]]:
    """`hsic` of all rows, and without each of them (NaN for 4 rows, of which 3 would be left)."""
    k, l = (one - torch.diag(one.diagonal()) for one in (k, l))
    n, rows, other = len(k), k.sum(1), l.sum(1)
    products = (k * l).sum(1)
    dots, sums = rows @ other, (rows.sum(), other.sum())
    one = _hsic(n, products.sum(), sums[0] * sums[1], dots)
    if n <= LEAST:
        return one, torch.full((n,), torch.nan, dtype=k.dtype)
    left = dots - rows * other - k @ other - l @ rows + products
    totals = (sums[0] - 2 * rows) * (sums[1] - 2 * other)
    return one, _hsic(n - 1, products.sum() - 2 * products, totals, left)


def _hsic(n: int, trace: Any, sums: Any, dots: Any) -> Any:
    """Of tr(KL), 1ᵀK1 1ᵀL1 and 1ᵀKL1, without diagonals (Song et al., 2012)."""
    return (trace + sums / ((n - 1) * (n - 2)) - 2 * dots / (n - 2)) / (n * (n - 3))


def _biased(k: Float[Tensor, "n n"], l: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    return (_centred(k) * _centred(l)).sum() / (len(k) - 1) ** 2


def _centred(k: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    return k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()


def _aligned(sums: Float[Tensor, " 3"]) -> float:
    """The alignment of HSICs of both, the first and the second; NaN where one does not vary."""
    across, first, second = sums.tolist()
    size = first * second
    return across / size**0.5 if first > 0 and second > 0 else float("nan")


def dissimilarities(x: Float[Tensor, "n d"], distance: str) -> Float[Tensor, " pairs"]:
    """Of every two rows, once."""
    if distance not in DISTANCES:
        raise InputError(f"distance is one of {', '.join(DISTANCES)}, got {distance!r}")
    first, second = torch.triu_indices(len(x), len(x), 1)
    if distance == "euclidean":
        return torch.pdist(x)
    held = x - x.mean(1, keepdim=True) if distance == "correlation" else x
    units = held / held.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return 1 - (units @ units.mT)[first, second]


def _ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Ranks; equal values share their mean rank."""
    _, own, counts = np.unique(values.numpy(), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return torch.as_tensor((ends - (counts - 1) / 2)[own])


def _correlation(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    a, b = a - a.mean(), b - b.mean()
    return (a @ b) / (a.norm() * b.norm())


# -------------------------------------------------------------------------------- rows


def matrix(x: Given) -> Float[Tensor, "n d"]:
    """Rows in double precision.

    Raises:
        InputError: another shape, or NaN.
    """
    held = x.array() if isinstance(x, Activations) else x
    if held.ndim != 2:
        raise InputError(f"activations are n by d, got {' by '.join(map(str, held.shape))}")
    wide = held.detach().double().cpu()
    if not wide.isfinite().all():
        raise InputError("activations hold NaN or infinite numbers")
    return wide


def _pair(x: Given, y: Given, least: int) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n e"]]:
    a, b = matrix(x), matrix(y)
    if len(a) != len(b):
        raise InputError(f"rows are the same items in both, got {len(a)} and {len(b)}")
    if len(a) < least:
        raise InputError(f"{least} rows are needed or more, got {len(a)}")
    return a, b
