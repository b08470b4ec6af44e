"""A sweep laid out on a model: which route computes it, and what its result must say."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import metrics
from audio_lens.digests import settings_of
from audio_lens.hooks import AttnMode, HookFn
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.layers import Attention, RMSNorm
from audio_lens.patching.cells import CellTable
from audio_lens.patching.checks import rounding_notes
from audio_lens.patching.engine.changes import is_entered
from audio_lens.patching.engine.hooked import BehindRoute, HookedRoute, LateRoute, SuffixRoute
from audio_lens.patching.engine.readout import Readout
from audio_lens.patching.engine.routes import (
    ConnectorRoute,
    DecoderRoute,
    EncoderRoute,
    FromBase,
)
from audio_lens.patching.engine.trace import blocks_of, is_known, stack_of
from audio_lens.patching.known import need_own_parts
from audio_lens.patching.spec import SweepSpec
from audio_lens.provenance import known
from audio_lens.shapes import check_shape, shape_of
from audio_lens.sites import parts_from

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

_OF_PART = {"decoder": DecoderRoute, "connector": ConnectorRoute, "encoder": EncoderRoute}


@dataclass(frozen=True, eq=False)
class Request:
    """A sweep laid out on a model, for the engine.

    Attributes:
        source: what to patch from in place of the other run: inputs, or activations by name.
    """

    model: HookedAudioTransformer
    spec: SweepSpec
    table: CellTable
    source: AudioInputs | Mapping[str, Tensor] | None

    @staticmethod
    def of(model: HookedAudioTransformer, spec: SweepSpec, table: CellTable) -> Request:
        """The request of a spec for the cells of a table.

        Raises:
            InputError: activations as source that lack a patched site, or of another shape.
        """
        source = spec.source
        if source is None or isinstance(source, AudioInputs):
            return Request(model, spec, table.to(model.device), source)
        names = table.all_hook_names
        missing = [name for name in names if name not in source]
        if missing:
            lacking = ", ".join(missing[:3])
            raise InputError(f"source holds no {lacking}: cache what is to be patched")
        given = {name: source[name] for name in names}
        for site in table.sites:
            expected = shape_of(model, site, spec.timeline)
            for name in replace(table, sites=(site,)).all_hook_names:
                check_shape(name, given[name], expected)
        return Request(model, spec, table.to(model.device), given)

    @cached_property
    def hooked(self) -> list[str]:
        """The points where the user had hooks attached when the sweep was planned."""
        return list(self.model.list_hooks(dir="fwd"))

    @cached_property
    def attached(self) -> dict[str, list[HookFn]]:
        """The functions attached when the sweep was planned."""
        return self.model.hook_functions()

    @cached_property
    def parts_run(self) -> list[str]:
        """The sites' part, if it has blocks, and those behind it that its cells run."""
        beside = [part for part in self.model.cfg.is_heard_in if part != self.table.part]
        return [part for part in parts_from(self.model, self.table.part) if part not in beside]

    @cached_property
    def route(self) -> type[FromBase] | type[HookedRoute]:
        """The way in which all cells are computed."""
        if self.hooked or self.model.is_split or self.whole_because:
            return LateRoute if self.first_hooked > 0 else HookedRoute
        if self.table.part in self.model.cfg.further_decoders:
            return BehindRoute
        is_single = len(self.table.sites) == 1 and self.table.cells.are_of_one_layer
        if is_single and not self.unknown:
            return _OF_PART.get(self.table.part, EncoderRoute)
        return SuffixRoute

    @cached_property
    def whole_because(self) -> str:
        """Why the model cannot be taken apart for these sites; empty where it can."""
        streams = metrics.streams_read(self.spec.metric)
        reasons = (self.model.whole_because(str(site), streams) for site in self.table.sites)
        return next(filter(None, reasons), "")

    @cached_property
    def first_hooked(self) -> int:
        """The first block of the sites' part that runs in every cell, since hooks reach it.

        0 where hooks lie before the blocks, or where nothing can be left out.
        """
        part, heard_in = self.table.part, self.model.cfg.is_heard_in
        if self.whole_because or part not in (*heard_in, "decoder"):
            return 0
        behind = ("connector.", "decoder.") if part in heard_in else ()
        if part == "encoder":  # other ears hear after it, in every run
            behind += tuple(f"{other}." for other in self.model.cfg.ears)
        after = (f"{part}.ln_final", f"{part}.unembed", f"{part}.hook_out", "hook_logits")
        layers = [self.model.cfg.parts[part].n_layers]
        for name in self.hooked:
            if name.startswith(f"{part}.blocks."):
                layers.append(int(name.split(".")[2]))
            elif not name.startswith((*behind, *after)):
                return 0
        return min(layers)

    @cached_property
    def unknown(self) -> str:
        """What, from the sites on, the engine cannot take apart; empty for nothing."""
        parts, sites = self.parts_run, self.table.sites
        for part in parts:
            if not is_known(stack_of(self.model, part)):
                return f"the {part}"
        in_blocks = [site for site in sites if site.n_layers is not None]
        blocks = blocks_of(stack_of(self.model, parts[0])) if parts else ()
        return ", ".join(str(s) for s in in_blocks if not all(is_entered(s, b) for b in blocks))

    @property
    def attn_mode(self) -> AttnMode:
        """How attention is computed, in unpatched and patched runs alike."""
        is_written_out = any(site.reads_attention for site in self.table.sites)
        return "explicit" if is_written_out else self.model.attn_mode

    @property
    def parts_written_out(self) -> list[str]:
        """The parts whose attention is written out for this sweep: those from its sites on."""
        if self.attn_mode == self.model.attn_mode:
            return []
        return parts_from(self.model, self.table.part) or [self.table.part]

    @property
    def is_double(self) -> bool:
        """Whether all is computed in float64.

        Language models have RMS norms in float32, and a softmax where attention is written out.
        """
        is_written_out = self.attn_mode == "explicit" or bool(self.hooked)
        rounding = (
            (isinstance(module, RMSNorm) and module.precision != torch.float64)
            or (isinstance(module, Attention) and module.softmax_float32 and is_written_out)
            for module in self.model.modules()
        )
        return self.model.dtype == torch.float64 and not any(rounding)

    def readout(
        self, inputs: AudioInputs, clean_logits: Callable[[], Float[Tensor, "b *t v"]]
    ) -> Readout:
        """What the metrics read of runs of these inputs.

        Args:
            clean_logits: makes the logits of the clean run, where a metric needs them.
        """
        measures = {
            name: metrics.bound(
                one,
                self.model,
                inputs,
                clean_logits() if getattr(one, "needs_reference", False) else None,
            )
            for name, one in metrics.named(self.spec.metric).items()
        }
        return Readout(self.model, measures, inputs)

    def kept(
        self, inputs: AudioInputs, cells: Sequence[int]
    ) -> tuple[Float[Tensor, "b *t v"], dict[str, Tensor]]:
        """Logits of a whole run, and the activations that some cells patch in."""
        names = self.table.hook_names(cells)
        return self.model.run_with_cache(inputs, names_filter=names, return_cache_object=False)

    @property
    def notes(self) -> list[str]:
        """What a reader of the result must know."""
        notes = []
        if self.spec.layer_window > 1:
            last = self.spec.layer_window - 1
            notes.append(f"layer l stands for layers l to l+{last}, patched as one")
        if self.spec.precision != "exact":
            notes.append(f"computed in {self.spec.precision}: not exact")
        if self.model.is_split:
            ran = LateRoute.what if self.route is LateRoute else HookedRoute.what
            notes.append(f"the model lies on several devices: every cell ran {ran}")
        elif self.whole_because:
            notes.append(f"{self.whole_because}: every cell was a whole forward")
        elif self.unknown and not (self.hooked or self.route is BehindRoute):
            notes.append(f"{self.unknown} is of its own kind: run whole from the first patch on")
        if self.source is not None:
            notes.append("patched from a source of your own, not from the other run")
        return notes + rounding_notes(self.model)

    def identity(self, weights: str) -> dict[str, str]:
        """What makes this sweep differ from any other, for checkpoints.

        Args:
            weights: their hash.

        Raises:
            NoIdentityError: a metric, a hook or a source that nobody can know again.
        """
        spec, table = self.spec, self.table
        own = need_own_parts(self.model, spec)
        cells = repr((table.coords, table.axes, table.cells.blocks))
        return {
            "weights": weights,
            "settings": settings_of(self.model),
            "configuration": known(self.model.cfg),
            "model": self.model.cfg.model_name,
            "dtype": str(self.model.dtype),
            "precision": spec.precision,
            "attention": self.attn_mode,
            "site": table.site_name,
            "axes": " ".join(table.axes),
            "direction": spec.direction,
            "cells": hashlib.sha256(cells.encode()).hexdigest(),
            "metric": f"{', '.join(metrics.named(spec.metric))} {own['metric']}",
            "hooks": f"{', '.join(self.hooked)} {own['hooks']}".strip(),
            "clean": spec.clean.digest(),
            "corrupted": spec.corrupted.digest(),
            "source": own["source"],
            "arguments": own["arguments"],
        }
