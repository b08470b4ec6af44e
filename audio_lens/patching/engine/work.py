"""What cells cost, in floating-point operations and bytes: for schedules, budgets and plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from audio_lens.models.layers import PartConfig

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

GIGA = 1e9
_ROWS_TOGETHER = {"cpu": 1_024, "cuda": 16_384}  # more gain nothing: matrix products are full
_ASKING_TOGETHER = 16  # fewer tokens than these ask all that is heard at half the speed


def rows_together(device: torch.device) -> int:
    """Positions that run together at most, if not for a single cell."""
    return _ROWS_TOGETHER.get(device.type, 1_024)


def row_flops(cfg: PartConfig, has_memory: bool = False) -> float | int:
    """Operations of one position in one block, but for attention to other positions."""
    d_q, d_kv = cfg.n_heads * cfg.d_head, cfg.n_key_value_heads * cfg.d_head
    attention = 2 * cfg.d_model * (2 * d_q + 2 * d_kv)
    mlp = 2 * cfg.d_model * cfg.d_mlp * (3 if cfg.gated_mlp else 2)
    return attention + mlp + (4 * cfg.d_model * d_q if has_memory else 0)


def pair_flops(cfg: PartConfig) -> float | int:
    """Operations of one query meeting one key, in all heads."""
    return 4 * cfg.n_heads * cfg.d_head


def stack_flops(
    cfg: PartConfig, rows: int, keys: float | int, layers: int, memory: int = 0
) -> float | int:
    """Operations of some blocks on so many positions, each meeting so many keys."""
    pairs = rows * (keys + memory) * pair_flops(cfg)
    return layers * (rows * row_flops(cfg, has_memory=memory > 0) + pairs)


def row_bytes(cfg: PartConfig, itemsize: int) -> int:
    """Memory that one position of a running block takes at its fullest."""
    d_qkv = (cfg.n_heads + 2 * cfg.n_key_value_heads) * cfg.d_head
    widest = max(3 * cfg.d_mlp, 3 * d_qkv + 2 * cfg.n_heads * cfg.d_head)
    return itemsize * (8 * cfg.d_model + widest)


@dataclass(frozen=True)
class Shape:
    """Sizes of a sweep's runs.

    Attributes:
        prompts, clips: in the batch.
        frames: the encoder's positions that are computed.
        tokens: the decoder's positions up to the last one read.
        audio_start: where the first clip enters an audio LLM's decoder; 0 with cross-attention.
        memory: encoder positions that cross-attention reads; 0 without.
        logits: numbers read behind the last block, of every cell.
        beside: positions of every part that is neither encoder nor decoder, by its name.
        behind: positions of parts behind the decoder that are computed of every cell, by name.
    """

    prompts: int
    clips: int
    frames: int
    tokens: int
    audio_start: int
    memory: int
    logits: int
    beside: Mapping[str, int] = field(default_factory=dict)
    behind: Mapping[str, int] = field(default_factory=dict)


class Costs:
    """What cells of a sweep cost.

    Args:
        whole: whether every cell is a whole forward.
    """

    def __init__(self, model: HookedAudioTransformer, part: str, shape: Shape, whole: bool):
        self.cfg, self.part, self.shape, self.whole = model.cfg, part, shape, whole
        self.itemsize = model.dtype.itemsize

    @property
    def encoder(self) -> float | int:
        """Operations of the encoder's whole run."""
        frames = self.shape.frames
        cfg = self.cfg.encoder
        if cfg is None:
            return 0
        return self.shape.clips * stack_flops(cfg, frames, frames, cfg.n_layers)

    @property
    def decoder(self) -> float | int:
        """Operations of the decoder's whole run."""
        cfg, memory = self.cfg.decoder, self.shape.memory
        if cfg is None:
            return 0
        formed = 4 * memory * cfg.d_model * cfg.n_heads * cfg.d_head * cfg.n_layers
        return self.shape.prompts * (self._decoder_from(0, 0) + formed)

    @property
    def loop(self) -> float | int:
        """Operations of one whole forward."""
        return self.encoder + self.decoder + self._stacks(self.shape.beside)

    def _stacks(self, positions: Mapping[str, int]) -> float | int:
        """Operations of whole parts on so many positions."""
        parts = self.cfg.parts
        return sum(stack_flops(parts[p], n, n, parts[p].n_layers) for p, n in positions.items())

    @property
    def _others(self) -> Mapping[str, int]:
        """Positions of parts other than encoder and decoder that run for a cell."""
        if self._is_behind:
            return {self.part: self.shape.beside[self.part]}
        return self.shape.beside if self.whole else self.shape.behind

    @property
    def _is_heard(self) -> bool:
        """Whether cells run blocks of the encoder, or of an ear beside it."""
        return self.part in self.cfg.is_heard_in

    @property
    def _frames(self) -> int:
        """Positions of all clips in the ear whose blocks cells run."""
        if self.part in self.cfg.ears:
            return self.shape.beside[self.part]
        return self.shape.clips * self.shape.frames

    @property
    def _is_behind(self) -> bool:
        """Whether cells are of a part behind the decoder, which does not run then."""
        return self.part in self.cfg.further_decoders and not self.whole

    def _decoder_from(self, layer: int, start: int) -> float | int:
        cfg, shape = self.cfg.decoder, self.shape
        if cfg is None:
            return 0
        rows, layers = shape.tokens - start, cfg.n_layers - layer
        return stack_flops(cfg, rows, (shape.tokens + start) / 2, layers, shape.memory)

    def flops(self, layer: int, start: int) -> float | int:
        """Operations of a cell patched at a block (-1: outside them), from a position on."""
        if self.whole:
            return self.loop
        others = self._stacks(self._others)
        if self._is_behind:
            return others
        if self.part == "decoder":
            return others + self.shape.prompts * self._decoder_from(layer, start)
        heard = others + self.shape.prompts * self._decoder_from(0, self.shape.audio_start)
        if self.part == "connector":
            return heard
        cfg, rows = self.cfg.parts[self.part], self._frames
        layers = cfg.n_layers - layer
        return heard + stack_flops(cfg, rows, rows / max(1, self.shape.clips), layers)

    def rows(self, start: int) -> int:
        """Positions that run for a cell."""
        shape = self.shape
        if self.whole:
            own = shape.clips * shape.frames + shape.prompts * shape.tokens
            return own + sum(shape.beside.values())
        if self._is_behind:
            return shape.beside[self.part]
        if self._is_heard:
            return self._frames
        first = start if self.part == "decoder" else shape.audio_start
        return shape.prompts * max(1, shape.tokens - first)

    @property
    def heard_together(self) -> int:
        """Cells whose audio the decoder asks at once, one after the other through the ears.

        A few tokens that read by cross-attention are few rows, and the matrices of a whole decoder
        are read for them.
        """
        if self.whole or not (self._is_heard and self.shape.memory):
            return 1
        return max(1, _ASKING_TOGETHER // max(1, self.shape.prompts * self.shape.tokens))

    def bytes(self, start: int, explicit: bool) -> int:
        """Memory that a cell takes while it runs."""
        total = 3 * self.shape.logits * self.itemsize
        if self.cfg.decoder is not None and not self._is_behind:
            total += self._decoder_bytes(start, explicit)
        if self.cfg.encoder is not None and (self.whole or self._is_heard):
            total += self._encoder_bytes(explicit)
        return total + sum(self._part_bytes(part, n, explicit) for part, n in self._others.items())

    def _part_bytes(self, part: str, positions: int, explicit: bool) -> int:
        """Of a part other than encoder and decoder, on so many positions of all prompts."""
        cfg = self.cfg.parts[part]
        pairs = cfg.n_heads * positions**2 // self.shape.prompts if explicit else 0
        return positions * row_bytes(cfg, self.itemsize) + 2 * pairs * self.itemsize

    def _decoder_bytes(self, start: int, explicit: bool) -> int:
        shape, cfg = self.shape, self.cfg.need_decoder
        rows = shape.prompts * max(1, shape.tokens - (0 if self.whole else start))
        d_q = cfg.n_heads * cfg.d_head
        lane = shape.prompts * shape.tokens * (5 * d_q * self.itemsize + 5 * shape.tokens)
        pairs = shape.prompts * cfg.n_heads * shape.tokens**2 if explicit else 0
        return rows * row_bytes(cfg, self.itemsize) + lane + 2 * pairs * self.itemsize

    def _encoder_bytes(self, explicit: bool) -> int:
        """Of the encoder, or of the ear that runs; also of what cross-attention makes of it."""
        shape, is_beside = self.shape, self.part in self.cfg.ears and not self.whole
        cfg = self.cfg.parts[self.part] if is_beside else self.cfg.need_encoder
        rows = self._frames if is_beside else shape.clips * shape.frames
        total = rows * row_bytes(cfg, self.itemsize)
        total += shape.prompts * shape.memory * cfg.d_model * 2 * self.itemsize
        heads = 2 * cfg.n_heads if explicit else 0
        return total + heads * rows**2 // max(1, shape.clips) * self.itemsize
