"""The activation that an edit is at, while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.arguments import suggest
from audio_lens.inputs import InputError
from audio_lens.places import Ground, Where
from audio_lens.sites import Site, SiteError

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer
    from audio_lens.models.mixins.running import Step


@dataclass(frozen=True, eq=False)
class At:
    """What an edit may ask about the activation that it is given.

    Attributes:
        name: of its hook point.
        step: the call that runs; None outside of the model's own calls.
        held: activations by hook name of sources that had to be run, by the source's ``id``.
        chosen: the elements that the edit takes, on the axes of the activation; None for all.
    """

    model: HookedAudioTransformer
    site: Site
    name: str
    step: Step | None
    held: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    chosen: Bool[Tensor, "..."] | None = None

    # ---------------------------------------------------------------- values

    def value(self, source: Any, x: Float[Tensor, "..."]) -> Tensor:
        """A source's value for an activation: something that broadcasts to it.

        Raises:
            SiteError: a source that does not hold it.
            InputError: one of another shape.
        """
        source = self.held.get(id(source), source)
        if not isinstance(source, torch.Tensor) and hasattr(source, "keys"):
            if self.name not in source:
                raise SiteError(
                    f"the source does not hold {self.name}; {suggest(self.name, source.keys())}. "
                    "Cache it by name: run_with_cache(inputs, names_filter=...)"
                )
            source = source[self.name]
        value = torch.as_tensor(source).to(x)
        return self._aligned(value, x) if value.ndim else value

    def _aligned(self, value: Tensor, x: Float[Tensor, "..."]) -> Tensor:
        """A tensor on the rows and positions of an activation."""
        dim = self.site.position_dim
        if value.ndim < x.ndim:
            if value.ndim > x.ndim - dim - 1 or not _fits(value.shape, x.shape[-value.ndim :]):
                raise self._misfit(value, x)
            return value
        copies = 1 if self.step is None else self.step.prompts.copies
        if value.ndim == x.ndim and copies > 1 and len(value) * copies == len(x):
            value = value.repeat(copies, *[1] * (x.ndim - 1))
        start = self.start
        if start and value.ndim == x.ndim and value.shape[dim] > 1:
            if value.shape[dim] < start + x.shape[dim]:
                raise InputError(
                    f"the source of {self.name} holds {value.shape[dim]} positions, and position "
                    f"{start + x.shape[dim] - 1} is edited: restrict the edit to the prompt "
                    '(when="prefill"), or give one value for all positions'
                )
            value = value.narrow(dim, start, x.shape[dim])
        if self._is_cut(value, x, dim):
            value = value.narrow(dim, 0, x.shape[dim])
        if value.ndim != x.ndim or not _fits(value.shape, x.shape):
            raise self._misfit(value, x)
        return value

    def _is_cut(self, value: Tensor, x: Tensor, dim: int) -> bool:
        """Whether the activation is of an encoder without the padding that nothing reads."""
        if value.ndim != x.ndim or self.step is None or self.site.part != "encoder":
            return False
        return x.shape[dim] < value.shape[dim] == self.model.encoder_length(self.step.prompts)

    def _misfit(self, value: Tensor, x: Tensor) -> InputError:
        return InputError(
            f"the source of {self.name} has shape {tuple(value.shape)}, the activation "
            f"{tuple(x.shape)}: give that shape, or one vector for all rows and positions"
        )

    @staticmethod
    def where_finite(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The changed activation; masked scores (minus infinity) stay masked."""
        finite = x.isfinite()
        return (
            change(x)
            if bool(finite.all())
            else torch.where(finite, change(x.where(finite, torch.zeros_like(x))), x)
        )

    # ---------------------------------------------------------------- positions

    @property
    def need_step(self) -> Step:
        """The call that runs.

        Raises:
            InputError: outside of the model's own calls.
        """
        if self.step is None:
            raise InputError(
                f"{self.name} runs outside of the model's own calls, where places have no names: "
                'edit it there with where="all", or inside model(...) or generate'
            )
        return self.step

    @property
    def start(self) -> int:
        """How many of the site's positions lie before those of the activation."""
        grows = self.site.positions_of == self.model.output_part and self.model.cfg.decoder
        return self.step.start if self.step is not None and grows else 0

    def keys(self, where: Where, x: Float[Tensor, "b h q k"]) -> Bool[Tensor, "b 1 1 k"]:
        """The keys of a place, on the axes of scores or a pattern.

        Raises:
            InputError: a place that selects none in some prompt.
        """
        is_cross = self.site.sublayer == "cross_attn"
        part = "encoder" if is_cross else self.site.positions_of
        written = None if part == self.model.output_part and self.model.cfg.decoder else 0
        mask = located(self, part, where, x.shape[-1], written)
        if part == "encoder" and x.shape[-1] == self.model.encoder_reach(self.need_step.prompts):
            mask = mask[:, : x.shape[-1]]  # the padding that nothing reads may be left out
        if mask.shape[1] != x.shape[-1] or len(mask) not in (1, len(x)):
            raise InputError(
                f"{self.name} has {len(x)} rows of {x.shape[-1]} keys in this call, and places lie "
                f"on {len(mask)} of {mask.shape[1]}: it attends within pieces, which have no names"
            )
        return mask[:, None, None, :].to(x.device)


def located(
    at: At,
    part: str,
    where: Where,
    width: int,
    written: int | None = None,
    *,
    may_miss: bool = False,
) -> Bool[Tensor, "b t"]:
    """The positions of a place among the first ``width`` of a part in the call that runs.

    Raises:
        InputError: where nothing says which prompts run, or positions do not fit them.
    """
    step = at.need_step
    grounds = step.grounds
    if part not in grounds:
        grounds[part] = Ground.of(at.model, step.prompts, part)
    ground = grounds[part]
    more = width - ground.n_positions if written is None else written
    if more:
        if more < 0 or step.is_prefill:
            raise InputError(
                f"{at.name} has {width} positions where the {part} of these prompts has "
                f"{ground.n_positions}: places cannot be found among them"
            )
        ground = ground.grown(more)
    return ground.mask(where) if may_miss else ground.held(where)


def _fits(shape: torch.Size, expected: torch.Size) -> bool:
    return all(own in (1, size) for own, size in zip(shape, expected, strict=True))
