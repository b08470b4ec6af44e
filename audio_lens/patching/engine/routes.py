"""The ways in which cells are computed: what each re-runs, and nothing else.

A route turns cells into what the metrics read of their runs. Which one serves a sweep is decided
in request.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.patching.cells import CellTable
from audio_lens.patching.engine.bidirectional import BidirectionalWalk, Complement, Window
from audio_lens.patching.engine.causal import CausalWalk, LaneRows
from audio_lens.patching.engine.changes import KEYS, BlockEntry, Changes, LanePatches
from audio_lens.patching.engine.ears import ear_run, entering, given_beside, given_by
from audio_lens.patching.engine.key_changes import KeyChanges
from audio_lens.patching.engine.readout import Readout
from audio_lens.patching.engine.row_changes import RowChanges, UnitChanges
from audio_lens.patching.engine.trace import AbsorbedMemory, Source, Trace, heard, keeping
from audio_lens.patching.engine.work import rows_together
from audio_lens.shapes import check_shape
from audio_lens.sites import Site, in_blocks

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

_COMPLEMENT_SHARE = 0.4  # of the working memory


@dataclass
class Run:
    """One run of the model, as far as a sweep needs it.

    Attributes:
        encoded: what the decoder received, None without an encoder; the final hidden states where
            there is no decoder.
        ear: the run of the encoder, or of the ear beside it, for sites in there.
        heard: what ears gave that the sites are not in, as `send_heard` takes it.
        connector: what went into the connector and came out, for sites there.
        decoder: the decoder's run; None where there is none.
    """

    inputs: AudioInputs
    encoded: Tensor | None
    ear: Trace | None
    heard: Mapping[str, Tensor]
    connector: Mapping[str, Tensor]
    decoder: Trace | None

    @staticmethod
    def of(
        model: HookedAudioTransformer,
        inputs: AudioInputs,
        part: str,
        keep: Sequence[str] = (),
        heard: Run | None = None,
    ) -> Run:
        """Run the model, keeping what a sweep of this part needs.

        Args:
            keep: local names of activations to hold for every block of the part.
            heard: a run whose audio may be the same, so that the encoder need not run again.
        """
        connector: dict[str, Tensor] = {}
        ear, beside = None, {}
        ends = ("hook_in", "hook_out") if part == "connector" else ()
        with model.hooks([(f"connector.{end}", keeping(connector, end)) for end in ends]):
            if part in model.cfg.is_heard_in:
                ear = ear_run(model, part, inputs, keep)
                beside = given_beside(model, inputs, part)
                sent = entering(model, part, ear.residuals, ear.n_layers)
                gave = beside | {part: given_by(model, part, sent)}
                encoded = model.send_heard(gave, inputs)
            elif part == "connector" and model.cfg.ears:
                beside = given_beside(model, inputs, part)
                encoded = model.send_heard(beside, inputs)
            elif part == "decoder" and heard is not None and inputs.same_audio(heard.inputs):
                encoded = heard.encoded
            else:
                encoded = model.encode(inputs)
        decoder = None
        if model.cfg.decoder is not None:
            own = keep if part == "decoder" else ()
            decoder = Trace.of_decoder(model, inputs, encoded, own)
        return Run(inputs, encoded, ear, beside, connector, decoder)

    def trace(self, part: str) -> Trace:
        """The run of an ear or of the decoder.

        Raises:
            ValueError: if it was not kept, or there is no such part.
        """
        trace = self.decoder if part == "decoder" else self.ear
        if trace is None or trace.part != part:
            raise InputError(f"this run holds nothing of the {part}")
        return trace

    @property
    def hidden(self) -> Float[Tensor, "b t d"]:
        """The final hidden states."""
        if self.decoder is None:
            return heard(self.encoded)
        return self.decoder.stack.finish(self.decoder.residuals[-1])

    def keep(self, part: str) -> Run:
        """Drop what a source of this part's activations does not need."""
        if part == "decoder":
            self.trace(part).forget_keys_values()
        elif self.decoder is not None:
            self.decoder.forget()
        return self

    @property
    def n_bytes(self) -> int:
        """Memory that is held."""
        traces = [t.n_bytes for t in (self.ear, self.decoder) if t is not None]
        others = (self.encoded, *self.heard.values(), *self.connector.values())
        return sum(traces) + sum(x.nbytes for x in others if x is not None)


class Route(ABC):
    """One way of computing cells.

    Attributes:
        what, left_out: what it re-runs and what not, for people.
    """

    what: str
    left_out: str

    @abstractmethod
    def run(self, cells: Sequence[int]) -> Float[Tensor, "n b r c"]:
        """What is read of every cell's run."""


@dataclass(eq=False)
class FromBase(Route):
    """A route that starts from a base run and writes over what it read.

    Attributes:
        base_rows: what the metrics read of the base run.
        free_bytes: working memory beside the unpatched runs, of which a route may hold a share.
    """

    model: HookedAudioTransformer
    base: Run
    table: CellTable
    readout: Readout
    source: Source
    free_bytes: float | int

    def __post_init__(self) -> None:
        self.base_rows = self.readout.of_run(self.base.hidden)

    @property
    def by_unit(self) -> bool:
        """Whether cells patch single heads or neurons."""
        return self.table.site.unit in self.table.axes

    @property
    def batch(self) -> int:
        """Prompts in the batch."""
        return len(self.base.inputs)

    def _as_base(self, n_cells: int) -> Float[Tensor, "nb r c"]:
        """What is read of the base run, for every prompt of so many cells."""
        return self.base_rows.repeat(n_cells, 1, 1)

    def _lane_prompts(self, n_cells: int) -> Int[Tensor, " nb"]:
        """The prompt of each of ``cell * batch + prompt`` lanes."""
        return torch.arange(self.batch, device=self.base_rows.device).repeat(n_cells)

    def _entries(
        self, changes: Changes, cells: Sequence[int], reach: int | None = None
    ) -> tuple[list[BlockEntry], Int[Tensor, " n"]]:
        """What cells change in ``cell * rows + row`` lanes, and the base run's row of each lane."""
        where = self.table.where(cells)[..., :reach]
        n_rows, units = where.shape[1], self.table.units(cells)
        rows = torch.arange(n_rows, device=where.device).repeat(len(cells))
        own_units = None if units is None else units.repeat_interleave(n_rows)
        lanes = LanePatches(rows, where.flatten(0, 1), own_units)
        # `Changes` holds tables of one block at a time, so cells come block by block; each entry
        # then takes the numbers that its lanes have among all
        entries = []
        for layer, own in _by_layer(self.table, cells, where.device):
            index = (own[:, None] * n_rows + rows[:n_rows]).flatten()
            entries.append(changes.entry(layer, lanes[index]).of_lanes(index))
        return entries, rows

    def _filled(self, rows: LaneRows, n_cells: int) -> Float[Tensor, "n b r c"]:
        """The base run's rows, with those that were computed written over."""
        prompts = self._lane_prompts(n_cells)[rows.lane]
        # a row that no lane computed is the base run's, and so is what the metrics read of it
        filled = self._as_base(n_cells)
        slots = self.readout.slots[prompts, rows.position]
        read = self.readout.logits(rows.x, prompts, rows.position)
        filled[rows.lane, slots] = read.to(filled.dtype)
        return filled.unflatten(0, (n_cells, self.batch))


class DecoderRoute(FromBase):
    """Sites in the blocks of the decoder: neither the encoder nor earlier positions run."""

    what = "decoder blocks from the patched one on, positions from the first changed one on"
    left_out = "the encoder, earlier blocks, earlier positions: they do not change"

    def __post_init__(self) -> None:
        super().__post_init__()
        decoder, demanded = self.base.trace("decoder"), self.readout.demanded
        self.walk = CausalWalk(decoder, self.readout)
        self.changes = changes_of(self.table.site, decoder, self.source, self.by_unit, demanded)

    def run(self, cells: Sequence[int]) -> Float[Tensor, "n b r c"]:
        entries, prompts = self._entries(self.changes, cells)
        return self._filled(self.walk.run(entries, prompts), len(cells))


class _AudioRoute(FromBase):
    """Sites before the decoder: what it receives changes, and it runs as far as that matters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.by_cross_attention = self.model.decoder_needs_encoder
        if self.base.decoder is not None and not self.by_cross_attention:
            self.walk = CausalWalk(self.base.decoder, self.readout)
            self.places = self.model.audio_places(self.base.inputs)

    def _heard(
        self,
        n_cells: int,
        cell: Int[Tensor, " a"],
        clip: Int[Tensor, " a"],
        changed: Bool[Tensor, "a s"] | None,
        encoded: Float[Tensor, "a s d"],
    ) -> Float[Tensor, "n b r c"]:
        """What is read when the decoder receives other audio in some cells and segments."""
        if self.base.decoder is None:
            filled = self._as_base(n_cells)
            lane = cell * self.batch + clip
            filled[lane] = self.readout.of_sequences(encoded, clip).to(filled.dtype)
            return filled.unflatten(0, (n_cells, self.batch))
        if self.by_cross_attention:
            if changed is not None:
                own = heard(self.base.encoded)[clip]
                encoded = torch.where(changed[..., None], encoded, own)
            return self._filled(self._read_by_attention(cell, clip, encoded), n_cells)
        merged = self._merged(cell, clip, changed, encoded)
        return self._filled(self.walk.run([merged], self._lane_prompts(n_cells)), n_cells)

    def _merged(
        self, cell: Tensor, clip: Tensor, changed: Tensor | None, encoded: Tensor
    ) -> BlockEntry:
        """The audio positions of an LLM's prompt that differ."""
        # a clip may stand at several places of a prompt, and a prompt hold several clips: every
        # pair of a changed clip and a place of it is one row
        places = self.places
        place = (places.clip == clip[:, None]).nonzero()
        index = places.index[place[:, 1]]
        if changed is not None:
            kept = changed[place[:, 0], index]
            place, index = place[kept], index[kept]
        row, position = places.row[place[:, 1]], places.position[place[:, 1]]
        lane = cell[place[:, 0]] * self.batch + row
        entering = encoded[place[:, 0], index]
        values = self.model.enter_audio(entering, self.base.inputs, row, position)
        return BlockEntry(0, lane, position, values)

    def _read_by_attention(self, cell: Tensor, prompt: Tensor, encoded: Tensor) -> LaneRows:
        """The rows read when every lane's cross-attention reads its own encoder output."""
        base = self.base.trace("decoder")
        masks = (base.context.allowed, base.context.memory_allowed)
        own, readable = (None if mask is None else mask[prompt] for mask in masks)
        context = AbsorbedMemory(allowed=own, memory=encoded, memory_allowed=readable)
        resid = base.stack.run_blocks(base.residuals[0][prompt], context, 0, base.n_layers)
        read = self.readout.demanded[prompt]
        index, position = read.nonzero(as_tuple=True)
        hidden = base.stack.finish(resid[index, position][None])[0]
        return LaneRows(cell[index] * self.batch + prompt[index], position, hidden)


class ConnectorRoute(_AudioRoute):
    """Sites at the ends of the connector: the encoder does not run."""

    what = "the connector's changed positions, then the decoder from the first of them on"
    left_out = "the encoder, and positions before the changed ones"

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.table.site.local_hook
        self.given, self.old = self.source.at(None, name), self.base.connector[name]
        check_shape(f"connector.{name}", self.given, tuple(self.old.shape))
        self.differs = (self.given != self.old).any(-1)
        self.is_local = self.table.site.positions_of == "connector"  # else positions become others
        segments = torch.arange(len(self.given), device=self.given.device)
        if self.is_local:
            is_out = name == "hook_out"
            self.new = self.given if is_out else self._carried(self.given, segments)

    def _carried(
        self, x: Float[Tensor, "a t d"], segment: Int[Tensor, " a"]
    ) -> Float[Tensor, "a s d2"]:
        """What the connector makes of its inputs, each of a given segment."""
        model, length = self.model, self.model.encoder_length(self.base.inputs)
        width = model.cfg.need_encoder.d_model * len(model.sent_from)
        heard = {name: given[segment] for name, given in self.base.heard.items()}
        heard["encoder"] = x.new_zeros(len(x), length, width)  # overwritten
        with model.hooks([("connector.hook_in", lambda _, hook: x)]):
            return model.send_heard(heard, self.base.inputs, segment)

    def run(self, cells: Sequence[int]) -> Float[Tensor, "n b r c"]:
        where = self.table.where(cells)[..., : self.differs.shape[1]] & self.differs
        cell, clip = where.any(-1).nonzero(as_tuple=True)
        if len(cell) == 0:
            return self._as_base(len(cells)).unflatten(0, (len(cells), self.batch))
        where = where[cell, clip]
        # where every position passes the connector alone, all were carried once, beforehand
        if self.is_local:
            return self._heard(len(cells), cell, clip, where, self.new[clip])
        mixed = torch.where(where[..., None], self.given[clip], self.old[clip])
        return self._heard(len(cells), cell, clip, None, self._carried(mixed, clip))


class EncoderRoute(_AudioRoute):
    """Sites in the blocks of the encoder, or of an ear beside it."""

    what = "encoder blocks from the patched one on, then what lies behind them"
    left_out = "earlier encoder blocks, padding that nothing reads, the text before the audio"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ear = self.base.trace(self.table.part)
        self.reach = self.ear.n_positions
        self.changes = changes_of(self.table.site, self.ear, self.source, self.by_unit)
        held = int(_COMPLEMENT_SHARE * self.free_bytes // Complement.n_bytes_of_window(self.ear))
        # what is written over a stream as it enters a block is not what left the one before
        leaves = self.table.site.last != "resid_pre"
        self.encoder_walk = BidirectionalWalk(self.ear, self._windows(), held, leaves)

    def _windows(self) -> list[list[Window]]:
        """The stretches of positions that cells patch, clip by clip."""
        stretches = self.table.positions[..., : self.reach]
        return [
            [_bounds(where) for where in of_clip if where.any()]
            for of_clip in stretches.transpose(0, 1)
        ]

    def run(self, cells: Sequence[int]) -> Float[Tensor, "n b r c"]:
        n_rows = self.table.positions.shape[1] * self.reach
        # the ear is full with some cells, and a decoder that asks it is not
        most = max(1, rows_together(self.model.device) // n_rows)
        step = most if self.by_cross_attention else len(cells)
        starts = range(0, len(cells), step)
        found = [self._encoded(cells[start : start + step]) for start in starts]
        cell = torch.cat([one[0] + start for one, start in zip(found, starts, strict=True)])
        if len(cell) == 0:
            return self._as_base(len(cells)).unflatten(0, (len(cells), self.batch))
        clip = torch.cat([one[1] for one in found])
        encoded = [one[2] for one in found if one[2] is not None]
        encoded = torch.cat(encoded) if len(encoded) > 1 else encoded[0]
        return self._heard(len(cells), cell, clip, None, encoded)

    def _encoded(self, cells: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cell and clip of every lane that changes anything, and what the decoder receives."""
        entries, clips = self._entries(self.changes, cells, self.reach)
        active, sent = self.encoder_walk.run(entries, clips)
        n_clips = len(clips) // len(cells)
        cell, clip = active // n_clips, active % n_clips
        if len(active) == 0:
            return cell, clip, None
        beside = {name: given[clip] for name, given in self.base.heard.items()}
        gave = beside | {self.table.part: given_by(self.model, self.table.part, sent)}
        return cell, clip, self.model.send_heard(gave, self.base.inputs, clip)


def _bounds(where: Bool[Tensor, " t"]) -> Window:
    index = where.nonzero()[:, 0]
    return int(index[0]), int(index[-1]) + 1


def _by_layer(
    table: CellTable, cells: Sequence[int], device: torch.device
) -> Iterator[tuple[int, Int[Tensor, " n"]]]:
    """The cells of every layer among some, as indices into them."""
    blocks, own = table.cells.blocks, table.cells.block[list(cells)].tolist()
    layers = [in_blocks(blocks[i][0]) for i in own]
    for layer in sorted(set(layers)):
        own = [i for i, other in enumerate(layers) if other == layer]
        yield layer, torch.tensor(own, device=device)


def changes_of(
    site: Site,
    base: Trace,
    source: Source,
    by_unit: bool,
    demanded: Bool[Tensor, "b t"] | None = None,
) -> Changes:
    """The changes of a site, unit by unit or all units at once."""
    if site.last in KEYS:
        return KeyChanges(site, base, source, demanded)
    return (UnitChanges if by_unit else RowChanges)(site, base, source, demanded)
