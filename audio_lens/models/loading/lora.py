"""Live LoRA: linear maps whose low-rank path runs beside them, with hooks and a switch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from audio_lens.errors import AudioLensError
from audio_lens.hooks import HookedRoot, HookPoint
from audio_lens.models.loading.kept import kept_or_made
from audio_lens.running import alone

Own = TypeVar("Own", bound="Adaptable")


class LoraError(AudioLensError, RuntimeError):
    """An adapter that is asked for and is not there."""


@dataclass(frozen=True)
class LowRank:
    """What LoRA adds to a linear map: ``scale * up @ down`` (arXiv:2106.09685).

    Attributes:
        scale: ``alpha / r``, or ``alpha / sqrt(r)`` if rank-stabilised (arXiv:2312.03732).
        dropout: of the input of the low-rank path, in training.
    """

    down: Float[Tensor, "r d_in"]
    up: Float[Tensor, "d_out r"]
    scale: float
    dropout: float = 0.0

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRank:
        """The same on a device, in a dtype."""
        return replace(self, down=self.down.to(device, dtype), up=self.up.to(device, dtype))

    def added_to(self, weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """The weight with the low-rank product added, in float32 or better, in its own dtype."""
        precise = torch.promote_types(weight.dtype, torch.float32)
        down, up = (x.to(weight.device, precise) for x in (self.down, self.up))
        return (weight.to(precise) + self.scale * (up @ down)).to(weight.dtype)


class LoraLinear(nn.Module):
    """A linear map and its adapter; `weight` is what both amount to.

    `hook_lora_A` holds the low-rank activations (``*b r``), `hook_lora_B` what the adapter adds to
    the output (``*b d_out``, scaled). Both run only while the adapter is enabled.
    """

    def __init__(self, base: nn.Linear, low_rank: LowRank):
        super().__init__()
        self.base, self.enabled = base, True
        self.lora_A, self.lora_B = _parameter(low_rank.down), _parameter(low_rank.up)
        self.scale, self.dropout = low_rank.scale, low_rank.dropout
        self.hook_lora_A, self.hook_lora_B = HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "*b d_in"]) -> Float[Tensor, "*b d_out"]:
        out = self.base(x)
        if not self.enabled:
            return out
        x = F.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)
        low = self.hook_lora_A(F.linear(x, self.lora_A))
        return (out + self.hook_lora_B(F.linear(low, self.lora_B) * self.scale)).to(out.dtype)

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The effective weight: with the adapter's product while it is enabled.

        It is kept until base, adapter or scale change, where no gradient flows through it.
        """
        base = self.base.weight
        if not self.enabled:
            return base
        low_rank = LowRank(self.lora_A, self.lora_B, self.scale)
        halves = self.lora_A, self.lora_B
        return kept_or_made(self, base, halves, self.scale, lambda: low_rank.added_to(base))

    @property
    def bias(self) -> Float[Tensor, " d_out"] | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


class Replaced:
    """Weights that an adapter holds whole, and the model's own, of which one is in the model.

    Args:
        own: the adapter's weights, by their names in the model.
    """

    def __init__(self, model: nn.Module, own: Mapping[str, Tensor]):
        self.model, self.enabled = model, False
        self.idle = {name: _parameter(tensor) for name, tensor in own.items()}
        self.switch(True)

    def switch(self, enabled: bool) -> None:
        """Put the adapter's weights into the model, or the model's own."""
        if enabled == self.enabled:
            return
        for name, idle in self.idle.items():
            parent, _, child = name.rpartition(".")
            module = self.model.get_submodule(parent)
            module = module.base if isinstance(module, LoraLinear) else module
            active = getattr(module, child)
            is_alike = (idle.device, idle.dtype) == (active.device, active.dtype)
            setattr(module, child, idle if is_alike else _parameter(idle.detach().to(active)))
            self.idle[name] = active
        self.enabled = enabled


class Lora:
    """The live adapter of a model: where it sits, and its switch."""

    def __init__(self, model: nn.Module):
        named = model.named_modules()
        self.linears = {name: m for name, m in named if isinstance(m, LoraLinear)}
        if not self.linears:
            raise LoraError(
                "this model carries no live adapter: load one with from_pretrained(base, "
                "adapter=directory), or from_hf(peft_model)"
            )
        self.replaced: Replaced = vars(model)["replaced"]

    @property
    def enabled(self) -> bool:
        """Whether the whole adapter takes part; settable."""
        return self.replaced.enabled and all(one.enabled for one in self.linears.values())

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self.replaced.switch(enabled)
        for linear in self.linears.values():
            linear.enabled = enabled

    def __repr__(self) -> str:
        ranks = ", ".join(map(str, sorted({len(one.lora_A) for one in self.linears.values()})))
        state = "enabled" if self.enabled else "disabled"
        return f"Lora({len(self.linears)} linear maps of rank {ranks}, {state})"


class Adaptable(nn.Module):
    """What a `HookedAudioTransformer` can do with a live adapter; mixed into it."""

    @property
    def lora(self) -> Lora:
        """The live adapter: ``model.lora.enabled = False`` switches it off.

        Raises:
            LoraError: if the model carries none.
        """
        return Lora(self)

    @contextmanager
    def lora_disabled(self: Own) -> Iterator[Own]:
        """Run inside a ``with`` block as if there were no adapter.

        Raises:
            LoraError: if the model carries none.
        """
        with alone(self):
            lora = self.lora
            before = [linear.enabled for linear in lora.linears.values()]
            had_replaced = lora.replaced.enabled
            lora.enabled = False
            try:
                yield self
            finally:
                lora.replaced.switch(had_replaced)
                for linear, enabled in zip(lora.linears.values(), before, strict=True):
                    linear.enabled = enabled


def attach(model: HookedRoot, low_rank: Mapping[str, LowRank], own: Mapping[str, Tensor]) -> Lora:
    """Make an adapter live.

    Args:
        low_rank: by the names of linear maps in the model.
        own: weights that the adapter holds whole, by their names in the model.
    """
    for name, added in low_rank.items():
        parent, _, child = name.rpartition(".")
        base = model.get_submodule(name)
        if not isinstance(base, nn.Linear):
            raise LoraError(f"{name} is no linear map, so LoRA adds nothing to it")
        setattr(model.get_submodule(parent), child, LoraLinear(base, added))
    vars(model)["replaced"] = Replaced(model, own)
    model.setup()
    return Lora(model)


def detach(model: HookedRoot) -> None:
    """Take a live adapter off again: the model is what it was before `attach`.

    Raises:
        LoraError: if the model carries none.
    """
    lora = Lora(model)
    lora.replaced.switch(False)
    for name, linear in lora.linears.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear.base)
    del vars(model)["replaced"]
    model.setup()
