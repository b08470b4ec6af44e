"""Which cells run together, in what order, and what that is expected to cost."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from audio_lens.errors import InputError
from audio_lens.patching.engine.hooked import HookedRoute, LateRoute
from audio_lens.patching.engine.request import Request
from audio_lens.patching.engine.trace import blocks_of, stack_of
from audio_lens.patching.engine.work import Costs, Shape, rows_together
from audio_lens.patching.spec import SweepSpec
from audio_lens.timeline import Timeline

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer


class Schedule:
    """The order of a table's cells, and how many of them a budget lets run together.

    Attributes:
        explicit: whether attention writes out matrices as large as patterns.
        most: at most so many cells together; None leaves it to the budget. Whole forwards, and
            runs beside hooks, run one by one unless somebody asks for more.
    """

    def __init__(self, request: Request):
        self.model, self.table, spec = request.model, request.table, request.spec
        self.explicit = request.attn_mode == "explicit" or _holds_bias(self.model, self.table.part)
        is_whole = request.route is HookedRoute
        one_by_one = 1 if is_whole or request.hooked else None
        self.most = spec.cells_per_forward or one_by_one
        self.memory_gb = spec.memory_gb
        self.shrunk = 1.0
        self.costs = Costs(self.model, self.table.part, _shape(self.model, spec), is_whole)
        places = self.table.positions.any(1)
        first = torch.where(places.any(-1), places.int().argmax(-1), places.shape[-1]).cpu()
        cells, is_own = self.table.cells, self.table.site.positions_of == "decoder"
        self._layers, self._places = cells.first_layers, first[cells.positions]
        if request.route is LateRoute:
            is_own, self._layers = False, self._layers.clamp(max=request.first_hooked)
        starts = self._places if is_own else torch.zeros_like(self._places)
        self._starts: list[int] = starts.tolist()  # the first position of the decoder that changes

    # ---------------------------------------------------------------- order

    def queue(self, cells: Iterable[int]) -> collections.deque[int]:
        """The cells in an order in which those that share work stand side by side."""
        chosen = torch.tensor(list(cells), dtype=torch.long)
        units = self.table.cells.unit
        units = torch.zeros_like(self._layers) if units is None else units
        keys = [x[chosen].numpy() for x in (units, self._places, self._layers)]
        return collections.deque(chosen[np.lexsort(keys)].tolist())

    def next(self, queue: collections.deque[int], free: float | int) -> list[int]:
        """The next cells of a queue that run together in so many bytes; at least one."""
        most = len(queue) if self.most is None else self.most
        heard = self.costs.heard_together * self.costs.rows(0)
        rows_left = max(rows_together(self.model.device), heard) * self.shrunk
        bytes_left = free * self.shrunk
        cells: list[int] = []
        while queue and len(cells) < most:
            start = self._starts[queue[0]]
            rows_left -= self.costs.rows(start)
            bytes_left -= self.costs.bytes(start, self.explicit)
            if cells and min(rows_left, bytes_left) < 0:
                break
            cells.append(queue.popleft())
        return cells

    def shrink(self, n_cells: int) -> None:
        """Let at most half as many cells run together as just failed."""
        self.most = max(1, n_cells // 2)
        self.shrunk /= 2

    # ---------------------------------------------------------------- cost

    def flops(self, cells: Iterable[int]) -> float | int:
        """Expected floating-point operations of some cells."""
        layers, starts = self._layers.tolist(), self._starts
        alike = collections.Counter((layers[cell], starts[cell]) for cell in cells)
        return sum(n * self.costs.flops(*place) for place, n in alike.items())

    @property
    def loop(self) -> float | int:
        """Operations of a loop of whole forwards over all cells."""
        return self.costs.loop * len(self.table.cells)

    @property
    def largest_cell(self) -> int:
        """Memory that the largest cell takes while it runs."""
        return self.costs.bytes(min(self._starts), self.explicit)

    @property
    def budget(self) -> float | int:
        """Bytes of working memory."""
        if self.memory_gb is not None:
            return self.memory_gb * 1e9
        if self.model.device.type == "cuda":
            return 0.5 * torch.cuda.mem_get_info(self.model.device)[0]
        try:
            return 0.5 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):  # not known here
            return 4e9

    def free_beside(self, held: int) -> float | int:
        """What the unpatched runs leave of the budget.

        Raises:
            ValueError: if that is too little for one cell.
        """
        free = self.budget - held
        if free < self.largest_cell:
            raise InputError(
                f"the unpatched runs take {held / 1e9:.3f} GB and one cell up to "
                f"{self.largest_cell / 1e9:.3f} GB, more than the budget of "
                f"{self.budget / 1e9:.3f} GB: raise memory_gb, or use fewer stimuli"
            )
        return free


def _holds_bias(model: HookedAudioTransformer, part: str) -> bool:
    """Whether what hears adds to its attention scores, which then are as large as patterns."""
    parts = {"encoder", part} & set(model.cfg.is_heard_in)
    blocks = [block for name in parts for block in blocks_of(stack_of(model, name))]
    attentions = [getattr(block, "attn", None) for block in blocks]
    return any(getattr(attn, "is_biased", False) for attn in attentions)


def _shape(model: HookedAudioTransformer, spec: SweepSpec) -> Shape:
    inputs, by_attention = spec.base, model.decoder_needs_encoder
    cfg = model.cfg
    has_audio = len(inputs.features) > 0
    frames = model.encoder_reach(inputs) if cfg.encoder is not None and has_audio else 0
    is_merged = len(cfg.is_heard_in) > 0 and cfg.decoder is not None and not by_attention
    output = cfg.output
    width = output.d_vocab or output.d_model
    n_outputs = model.output_attended(inputs).numel()
    beside = _beside(model, spec.timeline)
    n_read = n_outputs if spec.reads_all else len(inputs)
    return Shape(
        prompts=len(inputs),
        clips=len(inputs.features),
        frames=frames,
        tokens=inputs.tokens.shape[1],
        audio_start=min(model.audio_places(inputs).position.tolist())
        if is_merged and has_audio
        else 0,
        memory=frames if by_attention else 0,
        logits=n_outputs * width if spec.reads_all else 8 * len(inputs),
        beside=beside,
        behind={
            part: beside[part] * n_read // n_outputs
            for part in cfg.further_decoders
            if model.writes_behind
        },
    )


def _beside(model: HookedAudioTransformer, timeline: Timeline) -> dict[str, int]:
    """Positions of the whole batch in every part that is neither encoder nor decoder."""
    return {
        part: sum(len(track.seconds) for row in timeline.rows for track in row.segments(part))
        for part in (*model.cfg.ears, *model.cfg.further_decoders)
    }
