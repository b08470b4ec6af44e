"""Sparse autoencoders: activations as sums of few of many directions."""

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
from audio_lens.arguments import whole
from audio_lens.edits.written import writable
from audio_lens.errors import InputError

FORMAT = "audio_lens autoencoder"
KINDS = ("topk", "batchtopk", "relu", "jumprelu")
TENSORS = ("reads", "offsets", "directions", "centre", "threshold")


@writable
@dataclass(frozen=True, eq=False)
class Autoencoder:
    """Activations as ``centre`` plus a sum of few of many directions.

    A latent is ``act(reads @ (x - centre) + offsets)``: how much of its direction there is, in the
    units of the activations. What ``act`` keeps of what is positive depends on the kind:

    - "topk": the k largest of each vector;
    - "batchtopk": those above a threshold, the running mean of the smallest value that was kept
      while k for each vector were kept over a whole batch (2412.06410);
    - "relu": all;
    - "jumprelu": those above a threshold of each latent's own (2407.14435).

    Attributes:
        reads: what each latent looks for.
        offsets: added to that.
        directions: what each latent writes; of unit length where it was trained here.
        centre: what is there without any latent.
        kind: see above.
        k: how many latents are active: of each vector ("topk"), or on average.
        threshold: of the kinds that have one.
        site, layer: whose activations these are; None where nobody said.
        meta: how it was made, in words.
        history: of the training, every few steps: step, fvu, l0, dead, and found where directions
            were known.

    Raises:
        InputError: another kind, shapes that do not fit together, or a threshold or k that is
            missing, or has nothing to do here.
    """

    reads: Float[Tensor, "m d"] = field(repr=False)
    offsets: Float[Tensor, " m"] = field(repr=False)
    directions: Float[Tensor, "m d"] = field(repr=False)
    centre: Float[Tensor, " d"] = field(repr=False)
    kind: str = "topk"
    k: int | None = None
    threshold: Float[Tensor, " *_"] | None = field(default=None, repr=False)
    site: str | None = None
    layer: int | None = None
    meta: Mapping[str, str] = field(default_factory=dict, repr=False)
    history: Mapping[str, list] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind is one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.reads.ndim != 2 or not self.reads.numel():
            raise InputError(f"reads is m by d, got {list(self.reads.shape)}")
        m, d = self.reads.shape
        shapes = {"offsets": (m,), "directions": (m, d), "centre": (d,)}
        for name, shape in shapes.items():
            got = tuple(getattr(self, name).shape)
            if got != shape:
                raise InputError(f"{name} of {m} latents of {d} is {shape}, got {got}")
        self._check_kept()

    def _check_kept(self) -> None:
        """Raise unless there is what the kind keeps latents by, and nothing else."""
        m = len(self.reads)
        if self.k is not None:
            whole("k", self.k, least=1, most=m)
        if self.kind == "topk" and self.k is None:
            raise InputError("an autoencoder of kind 'topk' needs k")
        shape = {"batchtopk": (), "jumprelu": (m,)}.get(self.kind)
        got = None if self.threshold is None else tuple(self.threshold.shape)
        if got != shape:
            told = {None: "none", (): "one number"}.get(shape, f"{m} numbers")
            raise InputError(f"the threshold of kind {self.kind!r} is {told}, got {got}")
        if self.threshold is not None and not bool((self.threshold >= 0).all()):
            raise InputError("the threshold is below 0, as if it had never been set")

    @property
    def width(self) -> int:
        """How many latents there are."""
        return len(self.reads)

    @property
    def d(self) -> int:
        """How long the vectors are."""
        return self.reads.shape[1]

    def encode(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b m"]:
        """The latents of vectors, most of them 0; in float32 at least.

        Raises:
            InputError: vectors of another length.
        """
        if x.shape[-1] != self.d:
            raise InputError(f"vectors have {x.shape[-1]} entries, the autoencoder's {self.d}")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        reads, centre, offsets = (one.to(wide) for one in (self.reads, self.centre, self.offsets))
        return self._kept(torch.nn.functional.linear(wide - centre, reads, offsets).relu())

    def _kept(self, values: Float[Tensor, "*b m"]) -> Float[Tensor, "*b m"]:
        if self.kind == "topk" and self.k is not None:
            largest, at = values.topk(self.k, dim=-1)
            return torch.zeros_like(values).scatter(-1, at, largest)
        if self.threshold is None:
            return values
        return values * (values > self.threshold.to(values))

    def decode(self, latents: Float[Tensor, "*b m"]) -> Float[Tensor, "*b d"]:
        """The vectors that latents stand for."""
        return latents @ self.directions.to(latents) + self.centre.to(latents)

    def __call__(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """What is kept of vectors, in their own dtype."""
        return self.decode(self.encode(x)).to(x)

    def of(self, latents: Any) -> list[int]:
        """Numbers of latents, as a list.

        Raises:
            InputError: none, one twice, or one that is not there.
        """
        given = latents.tolist() if isinstance(latents, Tensor) else latents
        listed = [given] if isinstance(given, int) else list(given)
        for one in listed:
            whole("a latent", one, least=0, most=self.width - 1)
        if not listed or len(set(listed)) < len(listed):
            raise InputError(f"latents are numbers, each once, got {listed}")
        return [int(one) for one in listed]

    def to(self, *where: Any) -> Autoencoder:
        """The same on another device or in another dtype."""
        held = {name: getattr(self, name) for name in TENSORS}
        return replace(self, **{n: None if x is None else x.to(*where) for n, x in held.items()})

    def save(self, path: str | Path) -> Path:
        """Write it as safetensors with JSON in the head; an old file stays until then.

        Raises:
            OutputError: a path that cannot be written.
        """
        return files.write(path, self.packed({}, {}))

    def packed(self, more: Mapping[str, Tensor], head: Mapping[str, str]) -> bytes:
        """What `save` writes, with further tensors and texts beside it."""
        told = {name: getattr(self, name) for name in ("kind", "k", "site", "layer")}
        told |= {"meta": dict(self.meta), "history": dict(self.history)}
        held = {name: getattr(self, name) for name in TENSORS}
        tensors = {name: x for name, x in held.items() if x is not None} | dict(more)
        alone = {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}
        own = {"format": FORMAT, "told": json.dumps(told, ensure_ascii=False)}
        return safetensors.torch.save(alone, own | dict(head))

    @staticmethod
    def load(path: str | Path) -> Autoencoder:
        """What `save` wrote, or what `train` has kept so far.

        Raises:
            InputError: a file that is missing, or holds something else.
        """
        try:
            with safe_open(str(path), "pt") as file:
                head: Mapping[str, str] = file.metadata() or {}
                if head.get("format") != FORMAT:
                    raise InputError(f"{path} holds no autoencoder")
                there = [name for name in TENSORS if name in file.keys()]  # noqa: SIM118
                tensors = {name: file.get_tensor(name) for name in there}
                return Autoencoder(**tensors, **json.loads(head["told"]))
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"{path} holds no autoencoder: {error}") from error
