"""`Direction`: a vector that tells one kind of item from another, with where it comes from."""

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
from audio_lens.edits import Add, Edit
from audio_lens.edits.at import At
from audio_lens.edits.do import Do
from audio_lens.edits.edit import When
from audio_lens.edits.written import writable
from audio_lens.errors import InputError
from audio_lens.places import Where

FORMAT = "audio_lens direction"
Vector = Float[Tensor, " *heads d"]


@writable
@dataclass(frozen=True, eq=False)
class Direction:
    """A direction in the activations of a site, from one kind of item (b) to another (a).

    Attributes:
        vector: as long as b is from a along it, so that adding it once moves the one mean onto the
            other in this direction; of a site of heads, one for each head.
        site: what it is of, as ``part.activation``.
        layer: the block; None outside of the blocks.
        how: it was found.
        start, end: the mean of b and that of a; 0 and the vector where nobody said.
        meta: where it comes from, in words: model, weights, items, places.

    Raises:
        InputError: a vector of no length, or numbers that are not finite.
    """

    vector: Vector = field(repr=False)
    site: str
    layer: int | None = None
    how: str = "given"
    start: Float[Tensor, "..."] | None = field(default=None, repr=False)
    end: Float[Tensor, "..."] | None = field(default=None, repr=False)
    meta: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.vector.ndim not in (1, 2):
            shape = list(self.vector.shape)
            raise InputError(f"a direction is one vector, or one for each head: got {shape}")
        if not bool(self.vector.isfinite().all()) or not self.vector.norm() > 0:
            raise InputError("a direction has a length above 0, and finite numbers")
        ends = (self.start, self.end)
        if any(one is not None and one.shape != self.vector.shape for one in ends):
            raise InputError("the means of a direction are of its own shape")
        if (self.start is None) != (self.end is None):
            raise InputError("a direction has both means, start and end, or neither")

    @property
    def norm(self) -> float:
        """Its length."""
        return float(self.vector.norm())

    @property
    def reach(self) -> float:
        """How far its two means are apart along it, times its length.

        Raises:
            InputError: means that do not differ along it.
        """
        if self.start is None or self.end is None:
            return float(self.vector.double().square().sum())
        reach = float(((self.end - self.start).double() * self.vector.double()).sum())
        if not abs(reach) > 0:
            raise InputError("both means lie at one place along the direction: nothing is read")
        return reach

    def read(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Where activations ``*b d`` (of heads ``*b heads d``) lie along it, ``*b``.

        0 is where the mean of b lies, 1 where that of a does.

        Raises:
            InputError: activations of another width.
        """
        return _read(x, self.vector, self.start, self.reach)

    def turned(self) -> Direction:
        """The direction from a to b."""
        return replace(self, vector=-self.vector, start=self.end, end=self.start)

    def like(self, vector: Float[Tensor, "..."]) -> Direction:
        """Another vector at the same place, as long as this one.

        Raises:
            InputError: a vector of another shape, or of no length.
        """
        if vector.shape != self.vector.shape:
            raise InputError(
                f"{self.site} has vectors of {list(self.vector.shape)}, not {list(vector.shape)}"
            )
        scale = self.norm / max(float(vector.norm()), 1e-300)
        return Direction(vector * scale, self.site, self.layer, "control")

    # ---------------------------------------------------------------- edits

    def edit(
        self,
        alpha: float | int = 1.0,
        *,
        where: Where = "last",
        when: When = "both",
        keep_norm: bool = False,
    ) -> Edit:
        """The edit that adds it alpha times.

        Args:
            alpha: how often; negative leads from a to b.
            where: at which positions; "last" is, while the model writes, each new one.
            when: see `Edit`.
            keep_norm: whether sums are as long as the activations were.
        """
        do = Add(self.vector, alpha, keep_norm)
        return Edit(self.site, do, layer=self.layer, where=where, when=when)

    def toward(
        self, target: float | int = 1.0, *, where: Where = "last", when: When = "both"
    ) -> Edit:
        """The edit that adds as much of it as `read` lacks to a target, and no more.

        What is there already stays as it is, so that a long text is not overshot (2404.02252).
        """
        do = Toward(self.vector, self.start, self.reach, target)
        return Edit(self.site, do, layer=self.layer, where=where, when=when)

    # ---------------------------------------------------------------- files

    def save(self, path: str | Path) -> tuple[Path, Path]:
        """Write ``NAME.safetensors`` with the vectors, and ``NAME.json`` with what they are of.

        Raises:
            OutputError: a path that cannot be written.
        """
        path = Path(path)
        tensors = {"vector": self.vector, "start": self.start, "end": self.end}
        held = {n: x.detach().cpu().contiguous() for n, x in tensors.items() if x is not None}
        told = {"site": self.site, "layer": self.layer, "how": self.how, "meta": self.meta}
        text = json.dumps({"format": FORMAT} | told, ensure_ascii=False, indent=1)
        beside = path.with_suffix(".json")
        vectors = files.write(path.with_suffix(".safetensors"), safetensors.torch.save(held))
        return vectors, files.write(beside, text.encode())

    @staticmethod
    def load(path: str | Path) -> Direction:
        """What `save` wrote, by the name of either file.

        Raises:
            InputError: files that are missing, or hold something else.
        """
        path = Path(path)
        try:
            told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            if not isinstance(told, dict) or told.pop("format", None) != FORMAT:
                raise InputError(f"{path} holds no direction")
            with safe_open(str(path.with_suffix(".safetensors")), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Direction(**tensors, **told)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} holds no direction: {error}") from error


@writable
@dataclass(frozen=True, eq=False)
class Toward(Do):
    """Adds as much of a vector as a reading along it lacks to a target.

    Attributes:
        vector, start, reach: of the `Direction`.
        target: 0 is the mean of b, 1 the mean of a; vectors that read as much, or more, stay.
    """

    vector: Vector
    start: Float[Tensor, "..."] | None
    reach: float
    target: float | int = 1.0
    reads_vectors = True

    def __call__(self, x: Float[Tensor, "..."], at: At) -> Float[Tensor, "..."]:
        vector = self.vector.to(x)
        lacking = (self.target - _read(x, self.vector, self.start, self.reach)).clamp(min=0)
        step = lacking * self.reach / float(self.vector.double().square().sum())
        return x + step.to(x).reshape(*step.shape, *[1] * vector.ndim) * vector


def _read(
    x: Float[Tensor, "..."], vector: Vector, start: Float[Tensor, "..."] | None, reach: float
) -> Float[Tensor, "..."]:
    if x.shape[-vector.ndim :] != vector.shape:
        raise InputError(
            f"activations end in {list(x.shape[-vector.ndim :])}, the direction is "
            f"{list(vector.shape)}"
        )
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    moved = wide if start is None else wide - start.to(wide)
    return (moved * vector.to(wide)).flatten(-vector.ndim).sum(-1) / reach


def told(direction: Direction) -> str:
    """A direction for people."""
    block = "" if direction.layer is None else f" of block {direction.layer}"
    return f"{direction.how} direction of {direction.site}{block}"


def by_layer(directions: Any) -> list[Direction]:
    """Directions in order, one for each layer of one site.

    Raises:
        InputError: none, something else, several sites, or two of one layer.
    """
    listed = [directions] if isinstance(directions, Direction) else list(directions)
    if not listed or not all(isinstance(one, Direction) for one in listed):
        raise InputError("directions are what steering.direction or Direction.load gives, or more")
    sites, layers = {one.site for one in listed}, [one.layer for one in listed]
    if len(sites) > 1 or len(set(layers)) < len(layers):
        raise InputError(
            f"directions to be swept are of one site, one for each layer: got {sorted(sites)} at "
            f"{layers}"
        )
    return listed


def meta_of(known: Mapping[str, Any]) -> dict[str, str]:
    """Notes, as texts."""
    return {name: str(value) for name, value in known.items() if value is not None}
