"""The fewest forwards that attribution patching takes, by its arithmetic.

Attribution runs both inputs and differentiates one run. Weights need no gradient, so a matrix
product costs a backward what it costs a forward; fused attention keeps no scores and makes them
again, five products against two. Operations are counted from the first site on; norms,
activations and what is done with the gradients come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from audio_lens.models.layers import PartConfig
from benchmarks.peers import limits
from benchmarks.peers.tasks import FRAMES_PER_TOKEN, MEL_PER_FRAME, Task

BACK_OF_ATTENTION = 2.5  # of its forward: five products against two


@dataclass(frozen=True)
class Work:
    """Operations of products with weights, and of queries meeting keys."""

    products: float = 0
    pairs: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.pairs + other.pairs)

    def __mul__(self, times: int) -> Work:
        return Work(times * self.products, times * self.pairs)

    def __sub__(self, other: Work) -> Work:
        return self + other * -1

    @property
    def forward(self) -> float:
        return self.products + self.pairs

    @property
    def backward(self) -> float:
        return self.products + BACK_OF_ATTENTION * self.pairs


def least_forwards(task: Task) -> float:
    """Operations of attribution of a task's cells over those of one plain forward."""
    cfg, encoder = task.model.cfg, _encoder(task)
    decoder = _decoder(task, reads_last=True)
    back = decoder + (encoder if task.part == "encoder" else Work())
    back = back - _before_site(task, cfg.parts[task.part])
    return (unpatched_runs(task).forward + back.backward) / plain_forward(task).forward


def unpatched_runs(task: Task) -> Work:
    """Both unpatched runs, which every sweep and attribution begins with."""
    one = _encoder(task) + _around_encoder(task) + _decoder(task, reads_last=True)
    return one * 2


def plain_forward(task: Task) -> Work:
    """What one forward does that writes all logits."""
    decoder = _decoder(task, reads_last=False) + _unembedding(task)
    return _encoder(task) + _around_encoder(task) + decoder


def _encoder(task: Task) -> Work:
    cfg = task.model.cfg.need_encoder
    return _blocks(cfg, cfg.n_ctx, cfg.n_ctx**2) * cfg.n_layers


def _blocks(cfg: PartConfig, rows: int, pairs: int) -> Work:
    """One block on so many rows."""
    block = limits.Block(cfg)
    return Work(block.whole(rows, 0), block.pairs(pairs))


def _around_encoder(task: Task) -> Work:
    """Two convolutions of three frames, the second of every other frame, and the connector."""
    encoder, decoder = task.model.cfg.need_encoder, task.model.cfg.need_decoder
    d, frames = encoder.d_model, encoder.n_ctx
    n_mels = task.clean["input_features"].shape[1]
    stem = 2 * 3 * d * frames * (MEL_PER_FRAME * n_mels + d)
    connector = 2 * d * decoder.d_model * (frames // FRAMES_PER_TOKEN)
    return Work(stem + (connector if task.row.kind == "llm" else 0))


def _decoder(task: Task, reads_last: bool) -> Work:
    """The decoder's blocks; the last one on the position that is read alone, or on all."""
    cfg, n = task.model.cfg.need_decoder, _n_tokens(task)
    block, whole = limits.Block(cfg), _blocks(cfg, n, limits.causal_pairs(n))
    asking = 1 if reads_last else n
    pairs = n if reads_last else limits.causal_pairs(n)
    linear = block.keys_values(n) + block.queries(asking) + block.tail(asking)
    total = whole * (cfg.n_layers - 1) + Work(linear, block.pairs(pairs))
    if task.row.kind == "whisper":
        frames = task.model.cfg.need_encoder.n_ctx
        asked = n * (cfg.n_layers - 1) + asking
        formed = block.keys_values(frames) * cfg.n_layers
        linear = formed + block.queries(asked) + block.output(asked)
        total += Work(linear, block.pairs(asked * frames))
    return total


def _before_site(task: Task, cfg: PartConfig) -> Work:
    """What of the patched part lies before the first site, where no gradient need go."""
    block = limits.Block(cfg)
    if not task.row.patched:
        return Work()
    if task.part == "encoder":
        return Work(
            block.queries(cfg.n_ctx) + block.keys_values(cfg.n_ctx), block.pairs(cfg.n_ctx**2)
        )
    n = _n_tokens(task)
    own = Work(block.queries(n) + block.keys_values(n), block.pairs(limits.causal_pairs(n)))
    if task.row.kind == "llm":
        return own
    # the audio is the same in every cell, so no gradient goes into its keys and values
    frames = task.model.cfg.need_encoder.n_ctx
    formed = block.keys_values(frames) * cfg.n_layers
    crossing = Work(block.output(n) + block.queries(n) + formed, block.pairs(n * frames))
    return own + crossing


def _n_tokens(task: Task) -> int:
    name = "input_ids" if task.row.kind == "llm" else "decoder_input_ids"
    return task.clean[name].shape[1]


def _unembedding(task: Task) -> Work:
    output = task.model.cfg.output
    return Work(2 * output.d_model * (output.d_vocab or 0) * _n_tokens(task))
