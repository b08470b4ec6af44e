"""Stretches of training that a killed run goes on from."""

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

log = logging.getLogger(__name__)
SAVE_EVERY = 50


@dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Attributes:
        name: of its save.
        steps: how many.
        size: clips per step.
        rate: peak learning rate, reached after ``warmup`` steps.
        settle: step from which the rate falls by half a cosine.
        zero: step at which it reaches zero (a stage that another one carries on ends before).
        decay: of the average of the weights.
        roomy: share of clips with silence of any length.
    """

    name: str
    steps: int
    size: int
    rate: float
    settle: int
    zero: int
    warmup: int = 100
    decay: float = 0.99
    roomy: float = 0.0


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, a plateau, and half a cosine down to zero."""
    falling = max(0, step - stage.settle) / (stage.zero - stage.settle)
    return (
        stage.rate * min(1.0, (step + 1) / stage.warmup) * 0.5 * (1 + math.cos(math.pi * falling))
    )


def run(stage: Stage, parts: nn.Module, loss: Callable[[int], Tensor], workdir: Path) -> nn.Module:
    """Train ``parts`` by ``loss(step)`` from the last save on; returns the averaged parts.

    A step's data depends on its number alone, so a run that was killed goes on as if it had not.
    """
    optimiser = torch.optim.AdamW(parts.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    average = AveragedModel(parts, multi_avg_fn=get_ema_multi_avg_fn(stage.decay))
    state = {"parts": parts, "optimiser": optimiser, "average": average}
    path = workdir / f"{stage.name}.pt"
    start, spent = _resume(path, state)
    began = time.monotonic() - spent
    bar = tqdm(range(start, stage.steps), stage.name, stage.steps, initial=start, unit="step")
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(stage, step)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(step)
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(parts)
        bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == stage.steps:
            _save(path, state, step + 1, time.monotonic() - began)
    return average.module


def _save(path: Path, state: dict, step: int, seconds: float) -> None:
    partial = path.with_suffix(".part")
    saved = {name: module.state_dict() for name, module in state.items()}
    torch.save(saved | {"step": step, "seconds": seconds}, partial)
    os.replace(partial, path)


def _resume(path: Path, state: dict) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    saved = torch.load(path)
    for name, module in state.items():
        module.load_state_dict(saved[name])
    log.info("%s: going on from step %d", path.stem, saved["step"])
    return saved["step"], saved["seconds"]


def record(stages: Sequence[Stage], workdir: Path) -> dict[str, dict]:
    """Steps, clips per step and seconds of stages."""
    return {
        stage.name: {
            "steps": saved["step"],
            "clips per step": stage.size,
            "seconds": round(saved["seconds"]),
        }
        for stage in stages
        for saved in [torch.load(workdir / f"{stage.name}.pt", mmap=True)]
    }
