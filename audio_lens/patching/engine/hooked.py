"""The routes that patch with hooks: several blocks or sites as one, and beside the user's hooks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.inputs import AudioInputs
from audio_lens.models.layers import KVCache
from audio_lens.patching.cells import CellTable
from audio_lens.patching.engine.ears import (
    ear_context,
    entering,
    entrance,
    given_beside,
    given_by,
    sent_onwards,
)
from audio_lens.patching.engine.edited import EditedSource
from audio_lens.patching.engine.readout import Readout
from audio_lens.patching.engine.routes import FromBase, Route
from audio_lens.patching.engine.trace import (
    HeldSource,
    Source,
    blocks_of,
    crosses_of,
    heard,
    stack_of,
)
from audio_lens.shapes import check_shape
from audio_lens.sites import Site, in_blocks

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer


class Overwrites:
    """Hooks that write a source's activations into copies of a batch, cell after cell.

    Args:
        offset: how many of the sites' positions, from the first, are not there in this run.
    """

    def __init__(self, table: CellTable, source: Source, cells: Sequence[int], offset: int = 0):
        self.table, self.source, self.offset = table, source, offset
        self.cells = [table.cells[cell] for cell in cells]
        self.where, self.units = table.where(cells), table.units(cells)

    def hooks(self) -> list:
        """In TransformerLens form: ``[(name, fn), ...]``."""
        layers = sorted({layer for cell in self.cells for layer in cell.layers}, key=str)
        return [
            (site.hook_name(layer), lambda x, hook, s=site, l=layer: self._write(x, s, l))
            for site in self.table.sites
            for layer in layers
        ]

    def _write(self, activation: Tensor, site: Site, layer: int | None) -> Tensor:
        start = self.offset if site.positions_of == site.part else 0
        length = activation.shape[site.position_dim]
        device = activation.device  # a model may be split over several
        new = self._new(activation, site, layer, start)
        here = torch.tensor([layer in cell.layers for cell in self.cells], device=device)
        where = self.where[..., start : start + length].to(device)
        where = (where & here[:, None, None]).flatten(0, 1)
        mask = _along(where, activation.ndim, site.position_dim)
        if self.units is not None:
            _, unit_dim = site.split
            units = torch.arange(activation.shape[unit_dim], device=device)
            own = units == self.units[:, None].to(device)
            own = own.repeat_interleave(self.where.shape[1], dim=0)
            mask = mask & _along(own, activation.ndim, unit_dim)
        return torch.where(mask, new, activation)

    def _new(
        self, activation: Tensor, site: Site, layer: int | None, start: int
    ) -> Float[Tensor, "..."]:
        """What is written, at every position and unit."""
        if isinstance(self.source, EditedSource):
            step = self.source.step(len(self.cells), self.offset)
            return self.source.changed(activation, layer, site.local_hook, step)
        source = self.source.at(layer, site.local_hook)
        length = activation.shape[site.position_dim]
        source = source.narrow(site.position_dim, start, length).to(activation.device)
        check_shape(site.hook_name(layer), source, (len(source), *activation.shape[1:]))
        return repeat(source, "c ... -> (n c) ...", n=len(self.cells))


def _along(mask: Bool[Tensor, "batch n"], ndim: int, dim: int) -> Bool[Tensor, "..."]:
    """The mask with its second axis on axis ``dim`` of a tensor of ``ndim`` axes."""
    shape = [1] * ndim
    shape[0], shape[dim] = mask.shape
    return mask.reshape(shape)


class SuffixRoute(FromBase):
    """Several blocks or sites patched as one: hooks write into a run of what comes behind."""

    what = "all blocks from the first patched one on, with hooks that write into them"
    left_out = "earlier blocks, and what lies before the part"

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = self.table.cells.layers
        hooks = [site.local_hook for site in self.table.sites]
        if not isinstance(self.source, EditedSource):
            self.source = HeldSource.of(self.source, itertools.product(layers, hooks))
        self.heard = self.base.heard
        if self.table.part == "connector" and not self.heard:
            self.heard = given_beside(self.model, self.base.inputs, "connector")

    def run(self, cells: Sequence[int]) -> Float[Tensor, "n b r c"]:
        if self.table.part == "connector":
            return self._connector(cells).unflatten(0, (len(cells), self.batch))
        first = min(in_blocks(self.table.cells[cell].layers[0]) for cell in cells)
        read = self._decoder if self.table.part == "decoder" else self._ear
        return read(cells, first).unflatten(0, (len(cells), self.batch))

    def _ear(self, cells: Sequence[int], first: int) -> Float[Tensor, "nb r c"]:
        model, part, n = self.model, self.table.part, len(cells)
        inputs = self.base.inputs.repeat(n)
        context = ear_context(model, part, inputs)
        begun = entering(model, part, self.base.trace(part).residuals, first)
        begun = repeat(begun, "c ... -> (n c) ...", n=n)
        with model.hooks(Overwrites(self.table, self.source, cells).hooks()):
            sent = sent_onwards(model, part, begun, context, first)
        given = self._repeated(n) | {part: given_by(model, part, sent)}
        return self._read(inputs, model.send_heard(given, inputs), n)

    def _connector(self, cells: Sequence[int]) -> Float[Tensor, "nb r c"]:
        n = len(cells)
        inputs = self.base.inputs.repeat(n)
        with self.model.hooks(Overwrites(self.table, self.source, cells).hooks()):
            carried = self.model.send_heard(self._repeated(n), inputs)
        return self._read(inputs, carried, n)

    def _repeated(self, n: int) -> dict[str, Tensor]:
        """What ears gave that do not change, for so many cells."""
        return {name: repeat(x, "c ... -> (n c) ...", n=n) for name, x in self.heard.items()}

    def _read(self, inputs: AudioInputs, hidden: Tensor, n: int) -> Float[Tensor, "nb r c"]:
        """What is read of so many cells, from what the decoder receives."""
        if self.base.decoder is not None:
            hidden = self._written(inputs, hidden, self.model.enter_decoder(inputs, hidden))
        return self.readout.of_sequences(hidden, self._lane_prompts(n))

    def _decoder(self, cells: Sequence[int], first: int) -> Float[Tensor, "nb r c"]:
        hidden, start = self._from_start(cells, first)
        rows, prompts = self._as_base(len(cells)), self._lane_prompts(len(cells))
        index, position = self.readout.demanded[prompts].nonzero(as_tuple=True)
        seen = position >= start
        index, position = index[seen], position[seen]
        found = self.readout.logits(hidden[index, position - start], prompts[index], position)
        rows[index, self.readout.slots[prompts[index], position]] = found.to(rows.dtype)
        return rows

    def _from_start(self, cells: Sequence[int], first: int) -> tuple[Float[Tensor, "nb t d"], int]:
        """Final hidden states from the first position on that any of the cells changes."""
        trace, n = self.base.trace("decoder"), len(cells)
        start = self._start(cells)
        past = self._earlier(first, start, n)
        inputs = from_position(self.base.inputs, start).repeat(n)
        resid = repeat(trace.residuals[first][:, start:], "b ... -> (n b) ...", n=n)
        encoded = self.base.encoded
        if encoded is not None:
            encoded = repeat(encoded, "c ... -> (n c) ...", n=n)
        with self.model.hooks(Overwrites(self.table, self.source, cells, start).hooks()):
            return self._written(inputs, encoded, resid, first, past), start

    def _written(
        self,
        inputs: AudioInputs,
        encoded: Tensor | None,
        resid: Float[Tensor, "nb t d"],
        first: int = 0,
        past: KVCache | None = None,
    ) -> Float[Tensor, "nb t d"]:
        """Final hidden states of the decoder, from the residual stream entering a block."""
        decoder = self.base.trace("decoder")
        context = self.model.decoder_context(inputs, encoded, past)
        resid = decoder.stack.run_blocks(resid, context, first, decoder.n_layers)
        return decoder.stack.finish(resid)

    def _start(self, cells: Sequence[int]) -> int:
        """The first position that any of the cells changes."""
        if self.table.site.positions_of != "decoder":
            return 0
        return int(self.table.where(cells).any(0).any(0).nonzero()[0])

    def _earlier(self, first: int, start: int, n: int) -> KVCache:
        """Keys and values that stay the base run's: of earlier positions, and of the memory."""
        trace, entries = self.base.trace("decoder"), {}
        for block in blocks_of(trace.stack)[first:]:
            attentions = [(block.attn, slice(0, start))]
            if not self._patches_memory:
                attentions += [(cross, slice(None)) for cross in crosses_of(block)]
            for attn, kept in attentions:
                held = trace.keys_values(attn)
                entries[attn.name] = tuple(
                    repeat(x[:, kept], "b ... -> (n b) ...", n=n) for x in held
                )
        return KVCache(entries, length=start)

    @property
    def _patches_memory(self) -> bool:
        return any(site.positions_of != site.part for site in self.table.sites)


def from_position(inputs: AudioInputs, start: int) -> AudioInputs:
    """The inputs of the positions from ``start`` on, as one gives them beside a filled cache."""
    by_position = ("position_ids", "further_tokens", "audio_mask")
    given = {name: getattr(inputs, name) for name in by_position}
    later = {name: x[..., start:] for name, x in given.items() if x is not None}
    return replace(inputs, tokens=inputs.tokens[:, start:], **later)


@dataclass(eq=False)
class HookedRoute(Route):
    """Whole forwards with hooks, in which the user's own hooks stay in force.

    Attributes:
        inputs: of the run that is patched.
        encoder_out: what the decoder receives in every cell; None runs the encoder each time.
    """

    model: HookedAudioTransformer
    inputs: AudioInputs
    table: CellTable
    readout: Readout
    source: Source
    encoder_out: Tensor | None = None

    what = "a whole forward with hooks"
    left_out = "nothing"

    def run(self, cells: Sequence[int]) -> Float[Tensor, "n b r c"]:
        logits = self._logits(cells, Overwrites(self.table, self.source, cells).hooks())
        of_cells = logits.unflatten(0, (len(cells), len(self.inputs)))
        return torch.stack([self.readout.of_logits(of_cell) for of_cell in of_cells])

    def _logits(self, cells: Sequence[int], hooks: list) -> Float[Tensor, "nb *t v"]:
        """The output of every cell's run of every prompt."""
        n, encoder_out = len(cells), self.encoder_out
        if encoder_out is not None:
            encoder_out = repeat(encoder_out, "c ... -> (n c) ...", n=n)
        return self.model.run_with_hooks(
            self.inputs.repeat(n), fwd_hooks=hooks, encoder_out=encoder_out
        )


@dataclass(eq=False)
class LateRoute(HookedRoute):
    """Sites in blocks, beside hooks of the user's that reach no earlier block than some.

    Attributes:
        first: the first block that such hooks reach. It runs in every cell, and so do all behind
            it: hooks may know of each other.
    """

    first: int = field(init=False, default=0)

    what = "all from the first block on that is patched or that your hooks reach"
    left_out = "earlier blocks, and what lies before the part"

    def keep_until(self, first: int) -> None:
        """Run what no hook reaches, once.

        Args:
            first: the first block that hooks reach.
        """
        self.first = first
        if self.table.part in self.model.cfg.ears:
            self.beside = given_beside(self.model, self.inputs, self.table.part)
        self.residuals = [self._run(self.inputs, self.encoder_out, None, 0, 0)]
        for layer in range(min(first, int(self.table.cells.first_layers.max()))):
            begun = self._entering(layer)
            left = self._run(self.inputs, self.encoder_out, begun, layer, layer + 1)
            self.residuals.append(left)

    def _entering(self, layer: int) -> Tensor:
        """What a run from a block on begins with."""
        if self.table.part == "decoder":
            return self.residuals[layer]
        return entering(self.model, self.table.part, self.residuals, layer)

    def _run(
        self,
        inputs: AudioInputs,
        encoded: Tensor | None,
        resid: Float[Tensor, "b t d"] | None,
        start: int,
        stop: int | None = None,
    ) -> Tensor:
        """The part from a block on, up to another or to what it gives."""
        part = self.table.part
        if part == "decoder":
            return self.model.decode(inputs, encoded, resid, start, stop)
        if part == "encoder":
            return heard(self.model.encode(inputs, resid, start, stop))
        with self.model.running(inputs):
            return self._heard_beside(inputs, resid, start, stop)

    def _heard_beside(
        self,
        inputs: AudioInputs,
        resid: Float[Tensor, "b t d"] | None,
        start: int,
        stop: int | None,
    ) -> Tensor:
        """The same of an ear beside the encoder, which itself gives what it gave once."""
        model, part = self.model, self.table.part
        resid = entrance(model, part, inputs) if resid is None else resid
        context = ear_context(model, part, inputs)
        until = model.cfg.parts[part].n_layers if stop is None else stop
        resid = stack_of(model, part).run_blocks(resid, context, start, until)
        if stop is not None:
            return resid
        n = len(inputs.features) // len(self.inputs.features)
        beside = {name: repeat(x, "c ... -> (n c) ...", n=n) for name, x in self.beside.items()}
        given = beside | {part: given_by(model, part, resid)}
        return model.send_heard(given, inputs).to(model.device)

    def _logits(self, cells: Sequence[int], hooks: list) -> Float[Tensor, "nb *t v"]:
        n, model = len(cells), self.model
        start = min(self.first, int(self.table.cells.first_layers[list(cells)].min()))
        inputs, encoded = self.inputs.repeat(n), self.encoder_out
        if encoded is not None:
            encoded = repeat(encoded, "c ... -> (n c) ...", n=n)
        resid = repeat(self._entering(start), "b ... -> (n b) ...", n=n)
        with model.hooks(hooks):
            hidden = self._run(inputs, encoded, resid, start)
            if self.table.part != "decoder" and model.cfg.decoder is not None:
                hidden = model.decode(inputs, hidden)
            return output_of(model, hidden, inputs)


def output_of(
    model: HookedAudioTransformer, hidden: Float[Tensor, "b t d"], inputs: AudioInputs
) -> Float[Tensor, "b *t v"]:
    """What a model gives for its final hidden states."""
    logits = model.read_out(hidden, inputs)
    return logits if model.cfg.output_kind is None else model.hook_logits(logits)


@dataclass(eq=False)
class BehindRoute(HookedRoute):
    """Sites of a stack that reads the final hidden states, which are the same in all cells."""

    what = "the stack behind the decoder, with hooks"
    left_out = "the decoder and all before it: they do not change"

    def __post_init__(self) -> None:
        self.hidden = self.model.decode(self.inputs, self.model.encode(self.inputs))

    def _logits(self, cells: Sequence[int], hooks: list) -> Float[Tensor, "nb t v"]:
        hidden = repeat(self.hidden, "b ... -> (n b) ...", n=len(cells))
        with self.model.hooks(hooks):
            return self.model.read_out(hidden, self.inputs.repeat(len(cells)))
