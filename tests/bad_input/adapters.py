"""Adapters to train, to analyse and to put on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from bad_input.world import NAN, Case, model, named, written


def _items() -> Any:
    from audio_lens.items import demo_items

    return demo_items()


def _adapters() -> Any:
    from audio_lens.analysis import adapters

    return adapters


def _sweep(items: Any = None, **options: Any) -> Any:
    return _adapters().sweep(model(), items or _items(), progress=False, **options)


def _of(name: str, items: Any = None, **options: Any) -> Any:
    return getattr(_adapters(), name)(model(), items or _items(), progress=False, **options)


def _mute() -> Any:
    from audio_lens import Items

    return Items(item.replaced(answer=None) for item in _items())


def _one_voice() -> Any:
    from audio_lens import Items

    return Items(item.replaced(group="one") for item in _items())


def _without_peft() -> Any:
    with mock.patch.dict(sys.modules, {"peft": None}):
        return _sweep()


def _full_folder() -> Any:
    Path("full").mkdir(exist_ok=True)
    written("full/letter.txt", "dear")
    return _sweep(to="full")


def _load(path: str | Path) -> Callable[[], Any]:
    return lambda: _adapters().load(model(), path)


SWEEPS = {
    "no peft": _without_peft,
    "a linear map that no block has": lambda: _sweep(modules=["w_proj"]),
    "no linear maps": lambda: _sweep(modules=[]),
    "a part that does not exist": lambda: _sweep(part="ear"),
    "an arm that does not exist": lambda: _sweep(arms=["latest"]),
    "an arm twice": lambda: _sweep(arms=["late", "late"]),
    "groups of unequal size": lambda: _sweep(groups={"a": [0], "b": [1, 2]}),
    "blocks that do not exist": lambda: _sweep(groups={"a": [6]}),
    "a group called as another arm": lambda: _sweep(groups={"random": [1]}),
    "no groups": lambda: _sweep(groups={}),
    "a rank too small for all blocks": lambda: _sweep(rank=4, arms=["all_equal"]),
    "rank 0": lambda: _sweep(rank=0),
    "no steps": lambda: _sweep(steps=0),
    "a rate of NaN": lambda: _sweep(rate=NAN),
    "a seed twice": lambda: _sweep(seeds=[1, 1]),
    "no seeds": lambda: _sweep(seeds=[]),
    "items without answers": lambda: _sweep(_mute()),
    "items of one speaker": lambda: _sweep(_one_voice()),
    "a folder with something else": _full_folder,
    "groups of a model of too few blocks": lambda: _adapters().layer_groups(2),
}

ANALYSES = {
    "a model without an adapter": lambda: _of("alignment"),
    "its directions": lambda: _of("directions"),
    "four items": lambda: _of("alignment", _items()[:4]),
    "a share of 0": lambda: _of("directions", share=0),
    "a model that writes tokens, as a classifier": lambda: _of("classifier_lens"),
    "erasure in a part that does not exist": lambda: _of("erasure", part="connector"),
    "a file that is not there": _load("none.safetensors"),
    "a text as an adapter": lambda: _load(written("odd.safetensors", "dear"))(),
}

CASES: list[Case] = [*named("Training adapters", SWEEPS), *named("Adapters", ANALYSES)]
