"""`Selection`: the neurons that are taken for each class, and the edits that turn them."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from audio_lens import files
from audio_lens.analysis.neurons.scoring import classes_of
from audio_lens.arguments import number
from audio_lens.edits import Edit, Scale
from audio_lens.edits.written import writable
from audio_lens.errors import InputError
from audio_lens.items import ControlError
from audio_lens.items.controls import some_of
from audio_lens.places import Where
from audio_lens.results import Result

FORMAT = "audio_lens neurons"
PER = ("model", "layer")
OFF = -1.0  # by how much a neuron is turned that is taken out


@writable
@dataclass(frozen=True, eq=False)
class Selection:
    """Neurons of a site, chosen for each of some classes.

    Attributes:
        chosen: which neurons each class has.
        classes: their names.
        site: whose neurons they are, as ``part.activation``.
        layers: the blocks; a single None outside of the blocks.
        meta: where they come from, in words: selector, share, model, items.

    Raises:
        InputError: shapes that do not fit together, or a class without neurons.
    """

    chosen: Bool[Tensor, "classes layers neurons"] = field(repr=False)
    classes: list[Any]
    site: str
    layers: list[int | None]
    meta: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        expected = [len(self.classes), len(self.layers)]
        if self.chosen.ndim != 3 or list(self.chosen.shape[:2]) != expected:
            raise InputError(
                f"{expected[0]} classes in {expected[1]} layers need a mask of classes, layers and "
                f"neurons, got {list(self.chosen.shape)}"
            )
        bare = [c for c, n in zip(self.classes, self.counts, strict=True) if not n]
        if bare:
            raise InputError(f"no neuron is chosen for {', '.join(map(str, bare))}")

    @property
    def counts(self) -> list[int]:
        """How many neurons each class has."""
        return self.chosen.flatten(1).sum(1).tolist()

    def of(self, classes: Sequence[Hashable]) -> Selection:
        """The neurons of some classes.

        Raises:
            InputError: a class that is none.
        """
        rows = [self.number(one) for one in classes]
        return replace(self, chosen=self.chosen[rows], classes=[self.classes[r] for r in rows])

    def number(self, name: Hashable) -> int:
        """Which of the classes one is.

        Raises:
            InputError: naming those there are.
        """
        if name not in self.classes:
            known = ", ".join(map(repr, self.classes))
            raise InputError(f"no neurons were chosen for {name!r}; there are {known}")
        return self.classes.index(name)

    def histogram(self) -> Result:
        """How many of each class's neurons lie in which layer."""
        axes = {"class": list(self.classes), "layer": list(self.layers)}
        meta = self.meta | {"title": "neurons of a class by layer", "value": "neurons"}
        return Result(self.chosen.sum(-1).double(), (*axes,), axes, meta=meta)

    def others(self, *, per_layer: bool = False, seed: int = 0) -> Selection:
        """As many other neurons for each class, drawn by lot: a control.

        Args:
            per_layer: as many in every layer, too.
            seed: of the draw.

        Raises:
            ControlError: fewer others than were chosen.
        """
        shape = self.chosen.shape
        taken = self.chosen.reshape(-1, shape[-1]) if per_layer else self.chosen.flatten(1)
        counts = taken.sum(1)
        if bool((counts > (~taken).sum(1)).any()):
            raise ControlError(
                "as many random neurons as were chosen are not there: choose a smaller share"
            )
        meta = self.meta | {"kind": "random"}
        return replace(self, chosen=some_of(~taken, counts, seed).reshape(shape), meta=meta)

    # ---------------------------------------------------------------- edits

    def edits(
        self,
        classes: Hashable | Sequence[Hashable],
        alpha: float | int = OFF,
        *,
        where: Where = "all",
    ) -> list[Edit]:
        """Edits that turn the neurons of a class, or of several together, by 1 + alpha.

        -1 takes them out, 0 changes nothing, 1 doubles them::

            with intervene(model, selection.edits("seven", 2.0)):
                model.generate(inputs)

        Raises:
            InputError: a class that is none.
        """
        named = list(classes) if isinstance(classes, (list, tuple)) else [classes]
        weights = torch.zeros(1, len(self.classes)).double()
        weights[0, [self.number(one) for one in named]] = 1.0
        return self.turned(weights, alpha, where=where)

    def turned(
        self,
        weights: Float[Tensor, "b classes"],
        alpha: float | int = OFF,
        *,
        where: Where = "all",
    ) -> list[Edit]:
        """Edits that turn neurons by 1 + alpha times the weight of their class, row by row.

        A neuron of several classes takes the sum of their weights, but 1 at most.

        Args:
            weights: of every class, one row for all prompts or one for each; 0 to 1.
            alpha: see above.
            where: at which positions.
        """
        number("alpha", alpha)
        made = []
        for at, layer in enumerate(self.layers):
            if not self.chosen[:, at].any():
                continue
            share = (weights @ self.chosen[:, at].to(weights)).clamp(max=1)
            gains = (1 + alpha * share)[:, None]
            made.append(Edit(self.site, Scale(gains), layer=layer, where=where))
        return made

    # ---------------------------------------------------------------- files

    def save(self, path: str | Path) -> Path:
        """Write it as safetensors with JSON in the head; an old file stays until then.

        Raises:
            OutputError: a path that cannot be written.
        """
        told = {"classes": self.classes, "site": self.site, "layers": self.layers}
        head = {"format": FORMAT, "told": json.dumps(told | {"meta": self.meta})}
        return files.write(path, safetensors.torch.save({"chosen": self.chosen.contiguous()}, head))

    @staticmethod
    def load(path: str | Path) -> Selection:
        """What `save` wrote.

        Raises:
            InputError: a file that is missing, or holds something else.
        """
        try:
            with safe_open(str(path), "pt") as file:
                head: Mapping[str, str] = file.metadata() or {}
                if head.get("format") != FORMAT:
                    raise InputError(f"{path} holds no neurons")
                return Selection(file.get_tensor("chosen"), **json.loads(head["told"]))
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"{path} holds no neurons: {error}") from error


def select(
    scores: Result,
    share: float | int = 0.01,
    per: str = "model",
    *,
    site: str | None = None,
    layer: int | None = None,
) -> Selection:
    """The neurons with the highest scores of every class.

    Args:
        scores: of `neurons.scores`.
        share: of all neurons, 0 to 1; at least one is taken. Where a selector may take fewer, all
            of these are.
        per: "model" ranks the neurons of all layers together, "layer" takes a share of each.
        site, layer: whose neurons they are, where the scores are of a plain tensor.

    Raises:
        InputError: no scores, a share that is none, a class for which no neuron may be taken, or
            nothing that says whose neurons they are.
    """
    classes = classes_of(scores)
    number("share", share, above=0, most=1)
    if per not in PER:
        raise InputError(f"per is one of {', '.join(PER)}, got {per!r}")
    known = scores.meta.get("site")
    if known is not None and (site is not None or layer is not None):
        raise InputError(f"these scores are of {known}: leave out site= and layer=")
    if known is None and site is None:
        raise InputError("the scores of a plain tensor do not say whose neurons they are: site=")
    layers = scores.coords.get("layer", [layer])
    values = scores.values.reshape(len(classes), len(layers), -1)
    flat = values.flatten(1) if per == "model" else values.flatten(0, 1)
    count = max(1, round(share * flat.shape[1]))
    ranked = flat.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, ranked[:, :count], True)
    chosen = (chosen & ~flat.isnan()).reshape(values.shape)
    meta = scores.meta | {"share": f"{share:g}", "per": per}
    return Selection(chosen, classes, known or str(site), list(layers), meta)
