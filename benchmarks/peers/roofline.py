"""What a cell must take on this machine when memory traffic is counted beside the arithmetic.

The limit of `limits` lets all work run at the rate of a large square product. Four things cannot:
products as narrow as the model; attention, whose products are narrower still and whose softmax lies
between them; norms, additions and activations, which move every row through memory and hardly
compute; and products of few rows, for which every block's matrices are read anew. All are measured,
each at the task's own shape, with as many rows as the best packing of all its cells brings together
in a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from audio_lens.models.layers import PartConfig
from benchmarks.peers import limits
from benchmarks.peers.backward import unpatched_runs
from benchmarks.peers.tasks import Task

ROUNDS = 5
_ROWS, _SQUARE = 1024, 2048
_LEAST_ROWS = 256  # that a pass is measured on: a short one shows the cost of the call
_BLOCKS = 4  # of which matrices are read in turn, at most

Seconds = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Roofline:
    """Work of the mean cell, and what the machine does of each kind in a second.

    Attributes:
        products: operations of matrix products with weights.
        attention: operations of queries meeting keys.
        rows: rows that pass through a block's norms, additions and activation.
        together: rows of all cells that a block's products can be given at once.
        slowness: seconds of such products, as wide as the model, over those of a large square one,
            per operation; 1 where they are as fast.
        slowness_of_runs: the same of the many rows of an unpatched run.
        attention_rate: operations a second of fused attention at the task's shape.
        row_s: seconds of one row's passes.
    """

    products: float
    attention: float
    rows: float
    together: int
    slowness: float
    slowness_of_runs: float
    attention_rate: float
    row_s: float

    def seconds(self, matmul_rate: float) -> float:
        """The least time of the mean cell."""
        return (
            self.slowness * self.products / matmul_rate
            + self.attention / self.attention_rate
            + self.rows * self.row_s
        )

    def rate(self, matmul_rate: float) -> float:
        """Operations of products a second, at the task's own shape."""
        return matmul_rate / self.slowness

    def runs_seconds(self, task: Task, matmul_rate: float) -> float:
        """The least time of both unpatched runs, but for passes over memory."""
        work = unpatched_runs(task)
        rate = matmul_rate / self.slowness_of_runs
        return work.products / rate + work.pairs / self.attention_rate

    @staticmethod
    @torch.no_grad()
    def of(task: Task, seconds: Seconds) -> Roofline:
        """Count the task's work and measure the machine.

        Args:
            seconds: runs a function and says how long that took.
        """
        cfg = task.model.cfg.parts[task.part]
        total = limits.mean_work(task)
        attention = limits.mean_work(task, _only_pairs)
        rows = limits.mean_work(task, _only_mlp) / limits.Block(cfg).mlp(1)
        together = min(_ROWS, max(1, round(rows * len(task.cells) / cfg.n_layers)))
        return Roofline(
            products=total - attention,
            attention=attention,
            rows=rows,
            together=together,
            slowness=_slowness(task, cfg, together, seconds),
            slowness_of_runs=_slowness(task, cfg, _ROWS, seconds),
            attention_rate=_attention_rate(task, cfg, together, seconds),
            row_s=_row_seconds(task, cfg, seconds),
        )


def _only_pairs(cfg: PartConfig) -> PartConfig:
    """A part without weights: what is left to count is attention."""
    return replace(cfg, d_model=0, d_mlp=0)


def _only_mlp(cfg: PartConfig) -> PartConfig:
    """A part without heads: what is left to count is the MLP."""
    return replace(cfg, d_head=0)


def _n_positions(task: Task) -> int:
    """How many keys a query of the patched part meets, at most."""
    if task.row.kind == "llm":
        return task.clean["input_ids"].shape[1]
    return task.model.cfg.need_encoder.n_ctx


def _slowness(task: Task, cfg: PartConfig, rows: int, seconds: Seconds) -> float:
    """Of both products of MLPs on as many rows as run together, beside a square product."""
    drawn = functools.partial(_drawn, task)
    x, wide, square = drawn(rows, cfg.d_model), drawn(rows, cfg.d_mlp), drawn(_SQUARE, _SQUARE)
    blocks = range(min(_BLOCKS, cfg.n_layers))
    matrices = [(drawn(cfg.d_mlp, cfg.d_model), drawn(cfg.d_model, cfg.d_mlp)) for _ in blocks]

    def products() -> None:
        for into, back in matrices:  # as weights lie in memory
            F.linear(x, into)
            F.linear(wide, back)

    work = 4 * rows * cfg.d_model * cfg.d_mlp * len(matrices)
    own, large = [], []
    for _ in range(ROUNDS):  # in turns: what else runs on the machine slows both
        own.append(seconds(products) / work)
        large.append(seconds(lambda: square @ square) / (2 * _SQUARE**3))
    return max(1.0, min(own) / min(large))


def _attention_rate(task: Task, cfg: PartConfig, rows: int, seconds: Seconds) -> float:
    """Of a call over all positions in every block, every query meeting every key.

    Cells of cross-attention read one memory, so they ask together; elsewhere every lane has keys
    of its own, and asks with all its positions.
    """
    n = _n_positions(task)
    asking = rows if "cross_attn" in task.row.site else n
    blocks = range(min(_BLOCKS, cfg.n_layers))
    q = _drawn(task, 1, cfg.n_heads, asking, cfg.d_head)
    memories = [[_drawn(task, 1, n, cfg.n_heads, cfg.d_head) for _ in "kv"] for _ in blocks]

    def attend() -> None:
        for k, v in memories:
            F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))

    return limits.Block(cfg).pairs(asking * n) * len(memories) / _best(attend, seconds)


def _drawn(task: Task, *shape: int) -> Tensor:
    """Random numbers of the task's kind."""
    return torch.randn(*shape, device=task.device).to(task.model.dtype)


def _row_seconds(task: Task, cfg: PartConfig, seconds: Seconds) -> float:
    """Of two norms, two additions and the activation (gated: a product too), for one row."""
    n = max(_LEAST_ROWS, _n_positions(task))
    x, wide = _drawn(task, n, cfg.d_model), _drawn(task, n, cfg.d_mlp)
    gain = torch.ones_like(x[0])

    def passes() -> None:
        for _ in range(2):
            _ = x + F.layer_norm(x, gain.shape, gain, gain)
        acted = (F.silu if cfg.gated_mlp else F.gelu)(wide)
        if cfg.gated_mlp:
            acted.mul_(wide)

    return _best(passes, seconds) / n


def _best(run: Callable[[], object], seconds: Seconds) -> float:
    return min(seconds(run) for _ in range(ROUNDS))
