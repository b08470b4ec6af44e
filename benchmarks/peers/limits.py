"""The least dense floating-point work that an exact sweep needs, per cell.

A multiplication and an addition are two operations. Norms, activations and softmax are not
counted, nor are the two unpatched runs; of attention, only pairs that the mask allows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from audio_lens.models.layers import PartConfig
from benchmarks.peers.tasks import Cell, Task


@dataclass(frozen=True)
class Block:
    """Operations of the pieces of one block, by rows (positions) or query-key pairs."""

    cfg: PartConfig

    @property
    def width(self) -> int:
        """Of all heads together."""
        return self.cfg.n_heads * self.cfg.d_head

    def queries(self, rows: int) -> int:
        return 2 * self.cfg.d_model * self.width * rows

    def keys_values(self, rows: int) -> int:
        return 4 * self.cfg.d_model * self.cfg.n_key_value_heads * self.cfg.d_head * rows

    def pairs(self, count: int) -> int:
        """Scores and weighted sums of ``count`` query-key pairs, in every head."""
        return 4 * self.width * count

    def output(self, rows: int) -> int:
        return 2 * self.width * self.cfg.d_model * rows

    def mlp(self, rows: int) -> int:
        matrices = 3 if self.cfg.gated_mlp else 2
        return matrices * 2 * self.cfg.d_model * self.cfg.d_mlp * rows

    def tail(self, rows: int) -> int:
        """What follows attention: output matrix and MLP."""
        return self.output(rows) + self.mlp(rows)

    def whole(self, rows: int, pairs: int) -> int:
        return self.queries(rows) + self.keys_values(rows) + self.pairs(pairs) + self.tail(rows)

    def head_delta(self, rows: int) -> int:
        """The change of one head's z in some rows, through the output matrix."""
        return 2 * self.cfg.d_head * self.cfg.d_model * rows


def causal_pairs(n_positions: int, first: int = 0) -> int:
    """Pairs of queries from ``first`` on with keys up to themselves."""
    return sum(range(first + 1, n_positions + 1))


# -------------------------------------------------------------------------------- language model


def causal_resid(cfg: PartConfig, cell: Cell, n_positions: int) -> int:
    """A patch of resid_pre in a causal stack, read at the last position.

    The patched block: queries, keys and values of patched rows are the source run's, the others
    the unpatched run's; attention, output matrix and MLP on the rows from the first patched one
    on. Then whole blocks on these rows; in the last block only keys and values of all of them.
    """
    block, rows = Block(cfg), n_positions - cell.start
    read = block.pairs(n_positions) + block.tail(1)
    unembed = 2 * cfg.d_model
    if cell.layer == cfg.n_layers - 1:
        return read + unembed
    pairs = causal_pairs(n_positions, cell.start)
    return (
        block.pairs(pairs)
        + block.tail(rows)
        + (cfg.n_layers - 2 - cell.layer) * block.whole(rows, pairs)
        + block.keys_values(rows)
        + block.queries(1)
        + read
        + unembed
    )


def causal_heads(cfg: PartConfig, cell: Cell, n_positions: int) -> int:
    """A patch of one head's z in a window before the last position, read there.

    In its own block only the window's rows change, by the head's delta and an MLP on them. The
    next block is as after a patch of resid_pre, plus queries, keys and values of the window. In
    the last block nothing reaches the last position any more.
    """
    if cell.layer == cfg.n_layers - 1:
        return 0
    block, window = Block(cfg), cell.stop - cell.start
    next_cell = Cell(cell.layer + 1, None, cell.start, cell.stop)
    is_last = next_cell.layer == cfg.n_layers - 1
    return (
        block.head_delta(window)
        + block.mlp(window)
        + block.keys_values(window)
        + (0 if is_last else block.queries(window))
        + causal_resid(cfg, next_cell, n_positions)
    )


# -------------------------------------------------------------------------------- Whisper


def sparse_attention(block: Block, window: int, n_positions: int) -> int:
    """Attention when only a window's rows change, between all positions.

    The window's queries read every key, and the other queries the window's keys; what they read
    elsewhere is known from the unpatched run. Never more than attention in full.
    """
    pairs = min(2 * window * n_positions, n_positions**2)
    return block.pairs(pairs)


def encoder_resid(encoder: PartConfig, decoder: PartConfig, cell: Cell, n_tokens: int) -> int:
    """A patch of resid_pre in a window of the encoder: the whole stack behind it, the decoder."""
    block, frames = Block(encoder), encoder.n_ctx
    return (
        sparse_attention(block, cell.stop - cell.start, frames)
        + block.tail(frames)
        + (encoder.n_layers - 1 - cell.layer) * block.whole(frames, frames**2)
        + hearing(decoder, encoder, n_tokens)
    )


def encoder_heads(encoder: PartConfig, decoder: PartConfig, cell: Cell, n_tokens: int) -> int:
    """A patch of one head's z in a window of the encoder.

    In its own block the window's rows change, by the head's delta and an MLP; the next block is
    as after a patch of resid_pre, plus queries, keys and values of the window.
    """
    block, window = Block(encoder), cell.stop - cell.start
    own = block.head_delta(window) + block.mlp(window)
    if cell.layer == encoder.n_layers - 1:
        return own + hearing(decoder, encoder, n_tokens)
    next_cell = Cell(cell.layer + 1, None, cell.start, cell.stop)
    projections = block.queries(window) + block.keys_values(window)
    return own + projections + encoder_resid(encoder, decoder, next_cell, n_tokens)


def hearing(decoder: PartConfig, encoder: PartConfig, n_tokens: int) -> int:
    """Whisper's decoder when all it hears has changed.

    The first block's self-attention has not. The last block answers for the last token alone.
    """
    block, last = Block(decoder), decoder.n_layers - 1
    total = 2 * decoder.d_model
    for layer in range(decoder.n_layers):
        asking = 1 if layer == last else n_tokens
        if layer > 0:
            total += _self_attention(block, n_tokens, asking)
        total += block.queries(asking) + _changed_memory(block, asking, encoder.n_ctx)
        total += block.tail(asking)
    return total


def _self_attention(block: Block, n_tokens: int, asking: int) -> int:
    """Self-attention whose last ``asking`` tokens are read."""
    pairs = causal_pairs(n_tokens, n_tokens - asking)
    return (
        block.queries(asking)
        + block.keys_values(n_tokens)
        + block.pairs(pairs)
        + block.output(asking)
    )


def _changed_memory(block: Block, tokens: int, frames: int) -> int:
    """Cross-attention to frames that have all changed: the cheaper of two orders.

    Either keys and values are formed, or queries go through the key matrix to meet the frames
    themselves, and the weighted sums of frames through the value matrix.
    """
    formed = block.keys_values(frames) + block.pairs(tokens * frames)
    through_matrices = 2 * block.queries(tokens)
    with_frames = 4 * block.cfg.n_heads * block.cfg.d_model * tokens * frames
    return min(formed, through_matrices + with_frames)


def cross_heads(decoder: PartConfig, encoder: PartConfig, cell: Cell, n_tokens: int) -> int:
    """A patch of one head's z in a cross-attention, at all tokens.

    The head's delta and an MLP in its own block, then blocks whose cross-attention reads the keys
    and values of the unpatched run; the last block answers for the last token alone.
    """
    block, last = Block(decoder), decoder.n_layers - 1
    asking = 1 if cell.layer == last else n_tokens
    total = block.head_delta(asking) + block.mlp(asking) + 2 * decoder.d_model
    for layer in range(cell.layer + 1, decoder.n_layers):
        asking = 1 if layer == last else n_tokens
        total += _self_attention(block, n_tokens, asking)
        total += block.queries(asking) + block.pairs(asking * encoder.n_ctx) + block.tail(asking)
    return total


# -------------------------------------------------------------------------------- a whole task


def _whole(cfg: PartConfig) -> PartConfig:
    """A part as it is."""
    return cfg


def least_work(task: Task, cell: Cell, seen: Callable[[PartConfig], PartConfig] = _whole) -> int:
    """Operations of one cell, or of what is left of its parts when they are seen in some way."""
    cfg = task.model.cfg
    decoder = seen(cfg.need_decoder)
    if task.row.kind == "llm":
        count = causal_heads if task.row.patched else causal_resid
        return count(decoder, cell, task.clean["input_ids"].shape[1])
    encoder, n_tokens = seen(cfg.need_encoder), task.clean["decoder_input_ids"].shape[1]
    if task.part == "decoder":
        return cross_heads(decoder, encoder, cell, n_tokens)
    count = encoder_heads if task.row.patched else encoder_resid
    return count(encoder, decoder, cell, n_tokens)


def mean_work(task: Task, seen: Callable[[PartConfig], PartConfig] = _whole) -> float:
    """Operations of the mean cell."""
    return statistics.fmean(least_work(task, cell, seen) for cell in task.cells)
