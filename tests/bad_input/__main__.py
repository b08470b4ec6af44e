"""Tries every case and prints what became of it as JSON; ``--write`` renews the page instead."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "500", "NO_COLOR": "1", "TERM": "dumb"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from audio_lens import AudioLensError
from audio_lens.models.layers.blocks import Block
from bad_input import (
    adapters,
    audio,
    autoencoders,
    commands,
    explored,
    files,
    gap,
    page,
    pairs,
    phonology,
    runs,
    steered,
    studies,
    sweeps,
    tables,
    tapped,
)
from bad_input.world import Case, inputs, model

CASES: list[Case] = [
    case
    for module in (
        *(audio, runs, sweeps, pairs, tables, steered, gap, adapters, tapped, studies),
        *(autoencoders, explored, phonology),
        *(files, commands),
    )
    for case in module.CASES
]
MOST_BYTES, MOST_S = 16 * 2**30, 20  # of memory and time; what asks for more fails here


@contextmanager
def counted_blocks() -> Iterator[list[str]]:
    """The blocks of models that run meanwhile."""
    ran: list[str] = []

    def note(module: torch.nn.Module, args: Any) -> None:
        if isinstance(module, Block):
            ran.append(type(module).__name__)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield ran
    finally:
        handle.remove()


def outcome(case: Case) -> page.Outcome:
    """What became of a case."""
    started, error, name, is_ours = time.perf_counter(), "", "", False
    signal.alarm(MOST_S)
    with counted_blocks() as ran, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            error = f"gave {type(case.run()).__name__}"
        except BaseException as raised:
            name, error = type(raised).__name__, str(raised).replace(f"{os.getcwd()}/", "")
            is_ours = isinstance(raised, AudioLensError)
    signal.alarm(0)
    seconds = time.perf_counter() - started
    return page.Outcome(case.subject, case.what, name, error, is_ours, len(ran), seconds)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        model(), inputs(), inputs("corrupted")
        found = [outcome(case) for case in CASES]
        os.chdir(Path(__file__).parents[2])
    if "--write" in sys.argv:
        page.write(found)
    else:
        print(json.dumps([asdict(one) for one in found]))


if __name__ == "__main__":
    main()
