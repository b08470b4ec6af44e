"""What an edit does to an activation, wherever it lies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.edits.at import At
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.sites import Site, SiteError

Number = float | int
# a cache or mapping of hook names to activations, inputs to run, an activation or what repeats
# over its rows and positions, a number, or "mean"
Source = Any
MEAN = "mean"
_LEAST = 1e-30  # a vector shorter than that has no direction


class Do(ABC):
    """One kind of change of an activation."""

    reads_vectors: ClassVar[bool] = False  # whether it needs whole vectors of a site
    spans_blocks: ClassVar[bool] = False  # whether it carries something from block to block

    def check(self, site: Site, asked: Mapping[str, Any]) -> None:
        """Raise where it makes no sense at a site.

        Args:
            asked: "head" and "neuron" of the edit; None for all.

        Raises:
            SiteError: naming site and reason.
            InputError: values that come from nothing that holds any, or a basis that is none.
        """
        name = type(self).__name__
        if self.reads_vectors and site.reads_attention:
            raise SiteError(f"{name} edits vectors, and {site} holds numbers per query and key")
        if self.reads_vectors and asked["neuron"] is not None:
            raise SiteError(f"{name} edits all neurons of {site} together: leave out neuron=")
        for source in self.sources:
            _check_source(source)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where values come from that are not its own."""
        return ()

    @abstractmethod
    def __call__(self, x: Float[Tensor, "..."], at: At) -> Float[Tensor, "..."]:
        """The changed activation, everywhere; the edit takes what lies in its place."""


@dataclass(frozen=True, eq=False)
class Put(Do):
    """Overwrites with what a source holds.

    Attributes:
        given: a cache (or mapping) of hook names to activations; inputs, which are run first
            without the edits; an activation, or one vector (or number) for all rows and
            positions; or "mean", over all rows and all positions that hold something, of the run
            of these prompts without any hooks.
    """

    given: Source

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.given,)

    def __call__(self, x: Float[Tensor, "..."], at: At) -> Float[Tensor, "..."]:
        return at.value(self.given, x).expand_as(x)


@dataclass(frozen=True, eq=False)
class Mix(Do):
    """Moves towards what a source holds, as `Put` takes it: all the way for ``alpha`` 1."""

    given: Source
    alpha: Number | Float[Tensor, ""] = 0.5

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.given,)

    def __call__(self, x: Float[Tensor, "..."], at: At) -> Float[Tensor, "..."]:
        value = at.value(self.given, x)
        return at.where_finite(x, lambda finite: finite + self.alpha * (value - finite))


@dataclass(frozen=True, eq=False)
class Scale(Do):
    """Multiplies: by 0 ablates, by 1 changes nothing."""

    g: Number | Float[Tensor, "..."]

    def __call__(self, x: Float[Tensor, "..."], at: At) -> Float[Tensor, "..."]:
        return at.where_finite(x, lambda finite: finite * at.value(self.g, x))


@dataclass(frozen=True, eq=False)
class Add(Do):
    """Adds a vector, ``alpha`` times; with ``keep_norm`` the sum is as long as x was."""

    vector: Float[Tensor, "..."] | Number | Mapping[str, Tensor]
    alpha: Number | Float[Tensor, ""] = 1.0
    keep_norm: bool = False

    def __call__(self, x: Float[Tensor, "..."], at: At) -> Float[Tensor, "..."]:
        changed = x + self.alpha * at.value(self.vector, x)
        return as_long_as(x, changed) if self.keep_norm else changed


@dataclass(frozen=True, eq=False)
class Project(Do):
    """Takes out what lies in a subspace, or with ``keep`` what lies outside.

    Attributes:
        basis: vectors that span it, ``d k``, of any lengths and angles.
    """

    basis: Float[Tensor, "d k"]
    keep: bool = False
    reads_vectors = True

    def check(self, site: Site, asked: Mapping[str, Any]) -> None:
        super().check(site, asked)
        _check_basis(self.basis)

    def __call__(self, x: Float[Tensor, "..."], at: At) -> Float[Tensor, "..."]:
        inside = projected(x, self.basis, at)
        return inside if self.keep else x - inside


@dataclass(frozen=True, eq=False)
class Erase(Do):
    """Takes away along some directions what others read: x - strength (x - centre) read writeᵀ.

    An affine map, as LEACE and reflections at a hyperplane are.

    Attributes:
        read: directions ``d k`` along which x is read.
        write: ``d k``, along which that is taken away.
        centre: ``d``, the vector that stays as it is.
        strength: 1 takes away what is read, 2 reflects it.
    """

    read: Float[Tensor, "d k"]
    write: Float[Tensor, "d k"]
    centre: Float[Tensor, " d"]
    strength: float | int = 1.0
    reads_vectors = True

    def check(self, site: Site, asked: Mapping[str, Any]) -> None:
        super().check(site, asked)
        if self.read.ndim != 2 or self.write.shape != self.read.shape:
            raise InputError(
                f"Erase reads and writes along as many directions, d by k: got {_sizes(self.read)} "
                f"and {_sizes(self.write)}"
            )
        if self.centre.shape != self.read.shape[:1]:
            raise InputError(
                f"the centre of directions of {len(self.read)} entries is as long as these, got "
                f"{_sizes(self.centre)}"
            )

    def __call__(self, x: Float[Tensor, "..."], at: At) -> Float[Tensor, "..."]:
        if x.shape[-1] != len(self.read):
            raise InputError(
                f"vectors of {at.name} have {x.shape[-1]} entries, the directions {len(self.read)}"
            )
        return self.of(x)

    def of(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Changed vectors, computed in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        read, write, centre = (one.to(wide) for one in (self.read, self.write, self.centre))
        return (wide - self.strength * ((wide - centre) @ read) @ write.mT).to(x)


@dataclass(frozen=True, eq=False)
class Swap(Do):
    """Exchanges what lies in a subspace for what a source, as `Put` takes it, has there."""

    basis: Float[Tensor, "d k"]
    given: Source
    reads_vectors = True

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.given,)

    def check(self, site: Site, asked: Mapping[str, Any]) -> None:
        super().check(site, asked)
        _check_basis(self.basis)

    def __call__(self, x: Float[Tensor, "..."], at: At) -> Float[Tensor, "..."]:
        return x + projected(at.value(self.given, x) - x, self.basis, at)


@runtime_checkable
class Dictionary(Protocol):
    """A sparse autoencoder, as far as `Latents` needs it."""

    def encode(self, x: Any) -> Any: ...

    def decode(self, latents: Any) -> Any: ...


@dataclass(frozen=True, eq=False)
class Latents(Do):
    """Changes the latents of an autoencoder; what it does not reconstruct stays as it is.

    Attributes:
        autoencoder: ``encode(x)`` gives latents, ``decode(latents)`` activations again.
        fn: from latents to latents.
    """

    autoencoder: Dictionary
    fn: Callable[[Tensor], Tensor]
    reads_vectors = True

    def __call__(self, x: Float[Tensor, "..."], at: At) -> Float[Tensor, "..."]:
        latents = self.autoencoder.encode(x)
        changed = self.fn(latents)
        if changed.shape != latents.shape:
            raise InputError(
                f"Latents at {at.name}: fn made {tuple(changed.shape)} of latents of shape "
                f"{tuple(latents.shape)}"
            )
        lost = x - self.autoencoder.decode(latents)
        return (self.autoencoder.decode(changed) + lost).to(x)


@dataclass(frozen=True, eq=False)
class Reconstruct(Do):
    """Puts what an autoencoder keeps of an activation in its place; what it loses is gone.

    Attributes:
        autoencoder: ``encode(x)`` gives latents, ``decode(latents)`` activations again.
    """

    autoencoder: Dictionary
    reads_vectors = True

    def __call__(self, x: Float[Tensor, "..."], at: At) -> Float[Tensor, "..."]:
        return self.autoencoder.decode(self.autoencoder.encode(x)).to(x)


def as_long_as(x: Float[Tensor, "..."], changed: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Changed vectors with the lengths of the former ones; those that vanished stay 0."""
    before, now = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (x, changed))
    return changed * (before / now.clamp(min=_LEAST))


def projected(
    x: Float[Tensor, "*b d"], basis: Float[Tensor, "n k"], at: At
) -> Float[Tensor, "*b d"]:
    """What of some vectors lies in the span of a basis."""
    if basis.shape[0] != x.shape[-1]:
        raise InputError(
            f"vectors of {at.name} have {x.shape[-1]} entries, those of the basis {basis.shape[0]}"
        )
    orthonormal, _ = torch.linalg.qr(basis.to(x))
    return (x @ orthonormal) @ orthonormal.mT


def _check_basis(basis: Tensor) -> None:
    if basis.ndim != 2 or not 0 < basis.shape[1] <= basis.shape[0]:
        raise InputError(f"a basis is d by k with k in 1 to d, got shape {tuple(basis.shape)}")
    if torch.linalg.matrix_rank(basis.detach().float()) < basis.shape[1]:
        raise InputError("the vectors of the basis depend on each other: leave some out")


def _sizes(tensor: Tensor) -> str:
    return " by ".join(map(str, tensor.shape)) or "a number"


def _check_source(source: Source) -> None:
    known = (torch.Tensor, AudioInputs, int, float)
    if isinstance(source, known) and not isinstance(source, bool):
        return
    if source == MEAN if isinstance(source, str) else hasattr(source, "keys"):
        return
    raise InputError(
        f"values come from a cache, inputs, a tensor, a number or {MEAN!r}, not from "
        f"{type(source).__name__} {source!r}"
    )
