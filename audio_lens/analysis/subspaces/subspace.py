"""`Subspace`: some directions of a site, orthonormal, and where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from audio_lens import files
from audio_lens.errors import InputError

FORMAT = "audio_lens subspace"
ASKEW = 1e-3  # of what is still taken for orthonormal


@dataclass(frozen=True, eq=False)
class Subspace:
    """Directions in the activations of a site.

    Attributes:
        basis: orthonormal columns, those that matter most first.
        site: what it is of, as ``part.activation``; None where nobody said.
        layer: the block; None outside of the blocks, or where nobody said.
        kind: how it was found.
        strengths: of each direction, by its kind: singular values, correlations; None of most.
        meta: where it comes from, in words: model, weights, items, seed.

    Raises:
        InputError: columns that are not orthonormal (`Subspace.spanned` makes them so).
    """

    basis: Float[Tensor, "d k"] = field(repr=False)
    site: str | None = None
    layer: int | None = None
    kind: str = "given"
    strengths: Float[Tensor, " k"] | None = field(default=None, repr=False)
    meta: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        d, k = self.basis.shape
        if not 0 < k <= d:
            raise InputError(f"a basis is d by k with k in 1 to d, got {d} by {k}")
        square = self.basis.double().mT @ self.basis.double()
        if not bool(((square - torch.eye(k).to(square)).abs() < ASKEW).all()):
            raise InputError(
                "the columns of a basis are orthonormal: Subspace.spanned(vectors) makes them so"
            )

    @staticmethod
    def spanned(vectors: Float[Tensor, "d k"], **told: Any) -> Subspace:
        """The subspace that vectors of any lengths and angles span, the first of them first.

        Args:
            told: the other attributes.

        Raises:
            InputError: more vectors than dimensions, or some that depend on each other.
        """
        return Subspace(orthonormal(vectors), **told)

    @property
    def rank(self) -> int:
        """How many directions it has."""
        return self.basis.shape[1]

    def first(self, k: int) -> Subspace:
        """Its first directions.

        Raises:
            InputError: more than there are, or none.
        """
        if not 0 < k <= self.rank:
            raise InputError(f"this subspace has 1 to {self.rank} directions, not {k}")
        strengths = None if self.strengths is None else self.strengths[:k]
        return replace(self, basis=self.basis[:, :k], strengths=strengths)

    def part(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """What of some vectors lies in it."""
        basis = self.basis.to(x)
        return (x @ basis) @ basis.mT

    def angles(self, other: Subspace | Float[Tensor, "d k"]) -> Float[Tensor, " least"]:
        """The principal angles to another one in degrees, the smallest first.

        As many as the smaller of both has directions; 0 everywhere says that it lies in the larger.

        Raises:
            InputError: subspaces of other dimensions.
        """
        own, others = self.basis.double().cpu(), subspace_of(other).basis.double().cpu()
        if len(own) != len(others):
            raise InputError(f"one has {len(own)} dimensions, the other {len(others)}")
        small, large = sorted((own, others), key=lambda basis: basis.shape[1])
        outside = torch.linalg.svdvals(small - large @ (large.mT @ small)).clamp(max=1)
        return torch.rad2deg(torch.asin(outside)).flip(0)

    def save(self, path: str | Path) -> Path:
        """Write it as safetensors with JSON in the head; an old file stays until then.

        Raises:
            OutputError: a path that cannot be written.
        """
        told = {"site": self.site, "layer": self.layer, "kind": self.kind, "meta": self.meta}
        tensors = {"basis": self.basis.detach().cpu().contiguous()}
        if self.strengths is not None:
            tensors["strengths"] = self.strengths.detach().cpu().contiguous()
        head = {"format": FORMAT, "told": json.dumps(told, ensure_ascii=False)}
        return files.write(path, safetensors.torch.save(tensors, head))

    @staticmethod
    def load(path: str | Path) -> Subspace:
        """What `save` wrote.

        Raises:
            InputError: a file that is missing, or holds something else.
        """
        try:
            with safe_open(str(path), "pt") as file:
                head: Mapping[str, str] = file.metadata() or {}
                if head.get("format") != FORMAT:
                    raise InputError(f"{path} holds no subspace")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return Subspace(**tensors, **json.loads(head["told"]))
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"{path} holds no subspace: {error}") from error


def subspace_of(given: Subspace | Float[Tensor, "d k"]) -> Subspace:
    """A subspace, or what vectors span."""
    return given if isinstance(given, Subspace) else Subspace.spanned(given)


def orthonormal(vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """Orthonormal columns; the first of them span what the first vectors span.

    Raises:
        InputError: more vectors than dimensions, or some that depend on each other.
    """
    if vectors.ndim != 2 or not 0 < vectors.shape[1] <= vectors.shape[0]:
        raise InputError(
            f"vectors are d by k with k in 1 to d, one in each column: got {list(vectors.shape)}"
        )
    wide = vectors.detach().double()
    lengths = wide.norm(dim=0)
    basis, upper = torch.linalg.qr(wide / lengths.clamp(min=1e-300))
    if bool((upper.diagonal().abs() < 1e-6).any()) or not bool(lengths.isfinite().all()):
        raise InputError("vectors that span a subspace do not depend on each other: leave some out")
    basis = basis * upper.diagonal().sign()
    return basis.to(torch.promote_types(vectors.dtype, torch.float32))
