"""How a model runs where its results count: for one thread at a time, and in evaluation mode."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from audio_lens.identity import is_installed

PATIENCE_S = 10.0  # of a thread that waits for another, until it says so
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # beside: models pickle
_making = threading.Lock()
log = logging.getLogger(__name__)


def _start_anew() -> None:
    """In a forked process no other thread is left that could hold a lock."""
    global _making
    _making = threading.Lock()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Inside a ``with`` block no other thread runs the model, nor changes its hooks or modes.

    A thread that holds a model may ask for it again. One that waits for long says so in the log.
    """
    with _making:
        lock = _locks.setdefault(model, threading.RLock())
    if not lock.acquire(timeout=PATIENCE_S):
        log.warning(
            "waiting for another thread, which runs this model or has its hooks in it: if that "
            "thread in turn waits for this one, neither goes on; run the model where the hooks are"
        )
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def exclusive(method: Callable[P, T]) -> Callable[P, T]:
    """The method of a model, run `alone`."""

    @functools.wraps(method)
    def run(*args: P.args, **options: P.kwargs) -> T:
        model = args[0]
        assert isinstance(model, nn.Module)
        with alone(model):
            return method(*args, **options)

    return run


@contextmanager
def evaluating(model: nn.Module) -> Iterator[list[str]]:
    """Inside a ``with`` block the model runs `alone` and in evaluation mode: no dropout.

    Gives a note, which the log has too, where training mode would have made a difference: a report
    says so.
    """
    with alone(model):
        training = {name: one for name, one in model.named_modules() if one.training}
        differ = [name for name, one in training.items() if _differs_in_training(one)]
        notes = []
        if differ:
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            notes = [
                f"the model is in training mode, in which {', '.join(differ[:3])}{more} would give "
                "other values (dropout draws at random): it ran in evaluation mode"
            ]
            log.warning(notes[0])
        try:
            for one in training.values():
                one.training = False
            yield notes
        finally:
            for one in training.values():
                one.training = True


def _differs_in_training(module: nn.Module) -> bool:
    """Dropout that drops, batch norms, and modules of the user's whose code speaks of such."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    rate = getattr(module, "dropout", 0)
    is_dropping = isinstance(rate, (int, float)) and rate > 0
    return is_dropping or (not is_installed(type(module).__module__) and _asks_for_mode(module))


def _asks_for_mode(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and any("training" in x or "dropout" in x for x in code.co_names)
