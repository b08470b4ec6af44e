"""Neurons that are scored, chosen and turned; directions, what is put back, and rules."""

from __future__ import annotations

import functools
from typing import Any

import torch

from audio_lens.analysis import neurons, steering
from audio_lens.items import Items, demo_items
from bad_input.world import INF, NAN, Case, model, named, written

SITE = "decoder.resid_pre"
LABELS = ["a", "b", "a", "b"]


@functools.cache
def _items() -> Items:
    return demo_items()[:2]


@functools.cache
def _scores() -> Any:
    return neurons.scores(torch.arange(24.0).reshape(4, 6), LABELS, resamples=0)


@functools.cache
def _selection() -> Any:
    chosen = torch.ones(2, 1, 6, dtype=torch.bool)
    return neurons.Selection(chosen, ["a", "b"], "encoder.mlp.post", [0])


@functools.cache
def _direction(width: int = 96) -> Any:
    return steering.Direction(torch.ones(width), SITE, 1)


def _asked(**options: Any) -> Any:
    given = {"b": demo_items()[2:4], "site": SITE, "layer": 1, "where": "last"} | options
    return steering.direction(model(), _items(), progress=False, **given)


def _scored(**options: Any) -> Any:
    given = {"activations": torch.ones(4, 3), "label": LABELS} | options
    return neurons.scores(**given)


NEURONS = {
    "an unknown selector": lambda: _scored(kind="SUM"),
    "a floor of a selector without": lambda: _scored(floor=0.1),
    "a floor of NaN": lambda: _scored(kind="LAPE", floor=NAN),
    "two shares for three filters": lambda: _scored(kind="AAPE", shares=(0.1, 0.1)),
    "labels of other rows": lambda: _scored(label=["a", "b"]),
    "labels of one value": lambda: _scored(label=["a"] * 4),
    "activations of NaN": lambda: _scored(activations=torch.full((4, 3), NAN)),
    "activations of one axis": lambda: _scored(activations=torch.ones(4)),
    "draws of -1": lambda: _scored(resamples=-1),
    "a share of 0": lambda: neurons.select(_scores(), 0, site="encoder.mlp.post"),
    "a share of 2": lambda: neurons.select(_scores(), 2, site="encoder.mlp.post"),
    "a share of each head": lambda: neurons.select(_scores(), per="head", site="encoder.mlp.post"),
    "scores that say not whose": lambda: neurons.select(_scores()),
    "a class without neurons": lambda: _selection().edits("c"),
    "a gain of infinity": lambda: _selection().edits("a", INF),
    "a file of no neurons": lambda: neurons.Selection.load(written("neurons.safetensors", "no")),
    "neurons of a stream": lambda: neurons.logged(model(), _items(), SITE),
    "neurons of a part without": lambda: neurons.logged(model(), _items(), "head"),
    "neurons of another model": lambda: neurons.deactivation(model(), _items(), _selection()),
}

DIRECTIONS = {
    "an unknown kind": lambda: _asked(kind="best"),
    "items against themselves": lambda: _asked(b=_items()),
    "every layer at once": lambda: _asked(layer=None),
    "a layer that does not exist": lambda: _asked(layer=99),
    "a place for each item": lambda: _asked(where=["last", "last"]),
    "a probe of heads without heads": lambda: _asked(kind="head_probe"),
    "a column without a dictionary": lambda: _asked(kind="column"),
    "a column of means": lambda: _asked(column=3),
    "a direction of no length": lambda: steering.Direction(torch.zeros(4), SITE),
    "a direction of NaN": lambda: steering.Direction(torch.full((4,), NAN), SITE),
    "a file of no direction": lambda: steering.Direction.load(written("a.json", "{}")),
    "a file that is not there": lambda: steering.Direction.load("nothing"),
    "directions that are none": lambda: steering.sweep(model(), _items(), [3]),
    "two directions of one layer": lambda: steering.sweep(
        model(), _items(), [_direction(), _direction()]
    ),
    "no strengths": lambda: steering.sweep(model(), _items(), _direction(), []),
    "a strength of NaN": lambda: steering.sweep(model(), _items(), _direction(), [NAN]),
    "an unknown control": lambda: steering.sweep(
        model(), _items(), _direction(), controls=["chance"]
    ),
    "neither strength nor target": lambda: steering.write(
        model(), _items().prepare(model()), _direction()
    ),
    "an early state put back late": lambda: steering.back_patch(model(), _items(), 1, 2),
    "a layer of 1.5 put back": lambda: steering.back_patch(model(), _items(), 1.5, 0),
    "an unknown rule": lambda: steering.contrast(model(), _items(), "DoLa"),
    "a rule of strength -1": lambda: steering.AAD(-1),
    "a correction of strength 2": lambda: steering.GACL(2),
    "strengths that repeat": lambda: steering.contrast(model(), _items(), "AAD", [1, 1]),
}

CASES: list[Case] = [*named("Neurons", NEURONS), *named("Steering", DIRECTIONS)]
