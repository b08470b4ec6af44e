"""What adapters read and write over items, and what comes back to them as gradients."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from audio_lens.analysis.adapters.training import Bench, answers_of, frozen
from audio_lens.errors import InputError
from audio_lens.hooks import HookFn
from audio_lens.items import Items
from audio_lens.items.collect import Chosen, Place, by_item
from audio_lens.models import HookedAudioTransformer
from audio_lens.models.loading.lora import LoraLinear
from audio_lens.places import Ground
from audio_lens.progress import track
from audio_lens.running import alone, evaluating

SIDES = ("A", "B", "A_gradient", "B_gradient")
SMALL = 0.02  # the spread of what is drawn in place of a half that is all 0
_IN_BLOCK = re.compile(r"(\w+)\.blocks\.(\d+)\.(.+)")
_ON_ENCODER = ("cross_attn.k_proj", "cross_attn.v_proj")


@dataclass(frozen=True)
class Spots:
    """Where in a part the live adapter sits.

    Attributes:
        linears: by block and name inside it.
        elsewhere: how many of its maps lie outside the part's blocks.
    """

    part: str
    linears: dict[tuple[int, str], LoraLinear]
    elsewhere: int

    @staticmethod
    def of(model: HookedAudioTransformer, part: str | None) -> Spots:
        """The live adapter's maps in a part; None takes the first part that has some.

        Raises:
            LoraError: a model without a live adapter.
            InputError: one that is switched off, or has nothing in this part's blocks.
        """
        lora = model.lora
        if not all(linear.enabled for linear in lora.linears.values()):
            raise InputError("the adapter is switched off: model.lora.enabled = True")
        by_part: dict[str, dict[tuple[int, str], LoraLinear]] = {}
        for name, linear in lora.linears.items():
            if match := _IN_BLOCK.fullmatch(name):
                by_part.setdefault(match[1], {})[int(match[2]), match[3]] = linear
        there = [name for name in model.cfg.parts if name in by_part]
        if not there or (part is not None and part not in there):
            raise InputError(
                f"the adapter sits in blocks of {', '.join(there) or 'no part'}, not of "
                f"{part or 'any'}"
            )
        chosen = by_part[part or there[0]]
        return Spots(part or there[0], chosen, len(lora.linears) - len(chosen))

    @property
    def layers(self) -> list[int]:
        return sorted({layer for layer, _ in self.linears})

    @property
    def modules(self) -> list[str]:
        return list(dict.fromkeys(module for _, module in self.linears))

    @property
    def axes(self) -> dict[str, list]:
        """Of results: blocks by maps."""
        return {"layer": self.layers, "module": self.modules}

    def place(self, layer: int, module: str) -> tuple[int, int]:
        """Where a map stands along the axes."""
        return self.layers.index(layer), self.modules.index(module)

    def hook(self, layer: int, module: str, half: str) -> str:
        """The point behind A or B of a map."""
        return f"{self.part}.blocks.{layer}.{module}.hook_lora_{half}"

    def ground(self, module: str) -> str:
        """The part on whose positions a map works."""
        return "encoder" if module in _ON_ENCODER else self.part

    @property
    def note(self) -> list[str]:
        """What is not told, for people."""
        if not self.elsewhere:
            return []
        return [f"{self.elsewhere} adapted maps lie outside the blocks of the {self.part}."]


@dataclass(frozen=True)
class Outputs:
    """What the adapters of a batch gave, at the positions that are read.

    Attributes:
        rows: which items.
        chosen: the positions, by part.
        sides: of every map its `SIDES`, in double precision, a row for each position.
    """

    rows: list[int]
    chosen: dict[str, Chosen]
    sides: dict[tuple[int, str], dict[str, Float[Tensor, "n d"]]]


def outputs(
    model: HookedAudioTransformer,
    items: Items,
    spots: Spots,
    where: Place | None,
    *,
    size: int,
    what: str,
    progress: bool | None,
) -> Iterator[Outputs]:
    """What all adapters of a part give, with the gradients of the answers' loss, batch by batch.

    The loss is the sum over items of the negative log-probability of their answers, so that an
    item's gradients do not depend on its company.

    Args:
        where: which positions; None takes "audio" in an encoder and "all" in a decoder.

    Raises:
        InputError, ItemError: as `training.answers_of`, or a place that selects nothing.
    """
    answers = answers_of(model, items)
    place = ("audio" if spots.part == "encoder" else "all") if where is None else where
    places = by_item(place, items)
    with (
        evaluating(model),
        frozen(model),
        _followed(spots),
        track(what, len(items), "items", show=progress) as advance,
    ):
        done = 0
        for bench in Bench.each(model, items, answers, size):
            here: Any = place if places is None else [places[row] for row in bench.rows]
            parts = dict.fromkeys(spots.ground(module) for module in spots.modules)
            chosen = {
                part: Chosen.of(Ground.of(model, bench.inputs, part), here, bench.rows)
                for part in parts
            }
            yield Outputs(bench.rows, chosen, _of_bench(model, bench, spots, chosen))
            done += len(bench.rows)
            advance(len(bench.rows), done)


@contextmanager
def _followed(spots: Spots) -> Iterator[None]:
    """Inside a ``with`` block gradients flow through all adapters."""
    halves = [linear.lora_A for linear in spots.linears.values()]
    try:
        for half in halves:
            half.requires_grad_(True)
        yield
    finally:
        for half in halves:
            half.requires_grad_(False)  # `frozen` gives back what it was


def _of_bench(
    model: HookedAudioTransformer, bench: Bench, spots: Spots, chosen: dict[str, Chosen]
) -> dict[tuple[int, str], dict[str, Float[Tensor, "n d"]]]:
    kept: dict[str, Tensor] = {}

    def keeper(name: str) -> HookFn:
        def keep(x: Tensor, hook: Any) -> None:
            kept[name] = x

        return keep

    names = {(spot, half): spots.hook(*spot, half) for spot in spots.linears for half in ("A", "B")}
    hooks = [(name, keeper(name)) for name in names.values()]
    with torch.inference_mode(False), torch.enable_grad(), model.hooks(fwd_hooks=hooks):
        loss = -bench.told(model).sum()
        slopes = torch.autograd.grad(loss, [kept[name] for name in names.values()])
    found: dict[tuple[int, str], dict[str, Tensor]] = {spot: {} for spot in spots.linears}
    for ((spot, half), name), slope in zip(names.items(), slopes, strict=True):
        mask = chosen[spots.ground(spot[1])].mask
        found[spot][half] = _at(kept[name], mask, name)
        found[spot][f"{half}_gradient"] = _at(slope, mask, name)
    return found


def _at(x: Tensor, mask: Tensor, name: str) -> Float[Tensor, "n d"]:
    if x.shape[:2] != mask.shape:
        raise InputError(f"{name} is {list(x.shape)}, and its positions {list(mask.shape)}")
    return x.detach()[mask.to(x.device)].double().cpu()


@contextmanager
def redrawn(
    model: HookedAudioTransformer, halves: Sequence[str], seed: int, spread: float | None = None
) -> Iterator[None]:
    """Inside a ``with`` block halves of all adapters are random, normal around 0.

    Args:
        halves: "A", "B" or both.
        spread: their standard deviation; None takes that of the half itself.
    """
    draw = torch.Generator().manual_seed(seed)
    with alone(model):
        own = [
            (linear, f"lora_{half}", getattr(linear, f"lora_{half}"))
            for linear in model.lora.linears.values()
            for half in halves
        ]
        try:
            for linear, name, half in own:
                drawn = torch.randn(half.shape, generator=draw, dtype=torch.float64)
                level = half.detach().double().square().mean().sqrt().item() or SMALL
                random = (drawn * (level if spread is None else spread)).to(half)
                setattr(linear, name, nn.Parameter(random, requires_grad=half.requires_grad))
            yield
        finally:
            for linear, name, half in own:
                setattr(linear, name, half)
