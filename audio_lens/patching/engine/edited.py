"""Sweeps of edits: what is patched in is made of the activation that is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.edits.at import At
from audio_lens.edits.do import Do
from audio_lens.edits.edit import Edit, Laid
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.models.mixins.running import Step
from audio_lens.patching.engine.trace import Source
from audio_lens.sites import Site

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer


@dataclass(eq=False)
class EditedSource:
    """What an edit makes of the activations of the run that is patched.

    Attributes:
        base: the activations it is made of; None where only `changed` is asked.
        laid: the edit laid out on every site, by the local name of the site's hook.
        reached: the positions that any cell patches: elsewhere nothing is made.
        steps: the last call that ran.
    """

    model: HookedAudioTransformer
    do: Do
    inputs: AudioInputs
    laid: Mapping[str, Laid]
    reached: Bool[Tensor, "batch t"]
    base: Source | None
    steps: dict[tuple[int, int], Step] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(
        model: HookedAudioTransformer,
        do: Do,
        inputs: AudioInputs,
        sites: Sequence[Site],
        reached: Bool[Tensor, "batch t"],
        base: Source | None,
    ) -> EditedSource:
        """The source of a sweep; sources of the edit that have to run are run here."""
        laid = {site.local_hook: Laid.of(model, Edit(str(site), do)) for site in sites}
        return EditedSource(model, do, inputs, laid, reached, base)

    def at(self, layer: int | None, name: str) -> Tensor:
        """The edited activation of the base run."""
        if self.base is None:
            raise InputError("this source is made of activations that are given to it")
        return self.changed(self.base.at(layer, name), layer, name, Step(self.inputs))

    def step(self, copies: int, start: int) -> Step:
        """What runs where a batch of cells does: so many copies of the prompts, from a position."""
        if (copies, start) not in self.steps:  # the last one is kept, for all its blocks
            self.steps = {(copies, start): Step(self.inputs.repeat(copies), start)}
        return self.steps[copies, start]

    def changed(
        self, x: Float[Tensor, "..."], layer: int | None, name: str, step: Step
    ) -> Float[Tensor, "..."]:
        """An activation with the edit at every position that a cell may patch.

        Args:
            step: which prompts it is of, maybe many copies of them, and from which position on.
        """
        laid = self.laid[name]
        site, dim = laid.site, laid.site.position_dim
        start = step.start if site.positions_of == site.part else 0
        reached = self.reached[:, start : start + x.shape[dim]].repeat(step.prompts.copies, 1)
        shape = [1] * x.ndim
        shape[0], shape[dim] = reached.shape
        chosen = reached.reshape(shape).to(x.device)
        at = At(self.model, site, site.hook_name(layer), step, laid.held(Step(self.inputs)), chosen)
        return torch.where(chosen, self.do(x, at), x)
