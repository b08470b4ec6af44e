"""What a cell must take on this machine when memory traffic is counted beside the arithmetic.

The limit of `limits` lets all work run at the rate of a large square product. Four things cannot:
products as narrow as the model; attention, whose products are narrower still and whose softmax lies
between them; norms, additions and activations, which move every row through memory and hardly
compute; and products of few rows. The first three are measured, each at the task's own shape; the
last is left out, as packing can end it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from audio_lens.models.layers import PartConfig
from benchmarks.peers import limits
from benchmarks.peers.backward import unpatched_runs
from benchmarks.peers.tasks import Task

ROUNDS = 5
_ROWS, _SQUARE = 1024, 2048
_LEAST_ROWS = 256  # that a pass is measured on: a short one shows the cost of the call

Seconds = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Roofline:
    """Work of the mean cell, and what the machine does of each kind in a second.

    Attributes:
        products: operations of matrix products with weights.
        attention: operations of queries meeting keys.
        rows: rows that pass through a block's norms, additions and activation.
        slowness: seconds of products as wide as the model over those of a large square one, per
            operation; 1 where they are as fast.
        attention_rate: operations a second of fused attention at the task's shape.
        row_s: seconds of one row's passes.
    """

    products: float
    attention: float
    rows: float
    slowness: float
    attention_rate: float
    row_s: float

    def seconds(self, matmul_rate: float) -> float:
        """The least time of the mean cell."""
        return (
            self.slowness * self.products / matmul_rate
            + self.attention / self.attention_rate
            + self.rows * self.row_s
        )

    def runs_seconds(self, task: Task, matmul_rate: float) -> float:
        """The least time of both unpatched runs, but for passes over memory."""
        work = unpatched_runs(task)
        return self.slowness * work.products / matmul_rate + work.pairs / self.attention_rate

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
        mlp = limits.mean_work(task, _only_mlp)
        return Roofline(
            products=total - attention,
            attention=attention,
            rows=mlp / limits.Block(cfg).mlp(1),
            slowness=_slowness(task, cfg, seconds),
            attention_rate=_attention_rate(task, cfg, seconds),
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


def _slowness(task: Task, cfg: PartConfig, seconds: Seconds) -> float:
    """Of both products of an MLP on as many rows as run together, beside a square product."""
    x, wide, into, back, square = (
        torch.randn(*shape, device=task.device).to(task.model.dtype)
        for shape in (
            (_ROWS, cfg.d_model),
            (_ROWS, cfg.d_mlp),
            (cfg.d_model, cfg.d_mlp),
            (cfg.d_mlp, cfg.d_model),
            (_SQUARE, _SQUARE),
        )
    )
    own, large = [], []
    for _ in range(ROUNDS):  # in turns: what else runs on the machine slows both
        own.append(seconds(lambda: (x @ into, wide @ back)) / (4 * _ROWS * cfg.d_model * cfg.d_mlp))
        large.append(seconds(lambda: square @ square) / (2 * _SQUARE**3))
    return max(1.0, min(own) / min(large))


def _attention_rate(task: Task, cfg: PartConfig, seconds: Seconds) -> float:
    """Of one call over all positions, every query meeting every key."""
    n = _n_positions(task)
    shape = (1, cfg.n_heads, n, cfg.d_head)
    q, k, v = (torch.randn(shape, device=task.device).to(task.model.dtype) for _ in range(3))
    run = lambda: F.scaled_dot_product_attention(q, k, v)  # noqa: E731
    return limits.Block(cfg).pairs(n * n) / _best(run, seconds)


def _row_seconds(task: Task, cfg: PartConfig, seconds: Seconds) -> float:
    """Of two norms, two additions and the activation (gated: a product too), for one row."""
    n = max(_LEAST_ROWS, _n_positions(task))
    x, wide = (
        torch.randn(n, width, device=task.device).to(task.model.dtype)
        for width in (cfg.d_model, cfg.d_mlp)
    )
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
