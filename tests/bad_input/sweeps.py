"""Sites, windows and options of sweeps, patches and attributions, and metrics."""

from __future__ import annotations

from typing import Any

import torch

from audio_lens import Span, metrics, patching
from audio_lens.patching import spec
from bad_input.world import INF, NAN, Case, inputs, model, named, request

SITE = "decoder.resid_pre"


def _plan(**options: Any) -> Any:
    return patching.plan(model(), **request(**options))


def _sweep(**options: Any) -> Any:
    return patching.sweep(model(), **request(**options))


def _attribute(**options: Any) -> Any:
    return patching.attribute(model(), **request(**options))


def _patch(**options: Any) -> Any:
    given = {"site": SITE, "layer": 0, "source": 0.0} | options
    return patching.patch(model(), inputs(), [patching.Patch(**given)])


def _bound(metric: Any) -> Any:
    return metrics.bound(metric, model(), inputs())


SITES = {
    "a site that does not exist": lambda: _plan(site="decoder.nothing"),
    "a number for a site": lambda: _plan(site=3),
    "None for a site": lambda: _plan(site=None),
    "no sites": lambda: _plan(site=[]),
    "a site twice": lambda: _plan(site=[SITE, SITE]),
    "an unknown axis": lambda: _plan(axes="depth"),
    "an axis twice": lambda: _plan(axes=["time", "time"]),
    "no axes": lambda: _plan(axes=[]),
    "a number for axes": lambda: _plan(axes=3),
    "heads of a residual stream": lambda: _plan(site=SITE, axes="head", windows=None),
    "time and position at once": lambda: _plan(axes=["time", "position"]),
    "frequencies of a model without them": lambda: _plan(axes="frequency", windows=None),
}

WINDOWS = {
    **{
        f"a window of {width!r}": lambda width=width: _plan(windows=width)
        for width in (0, -0.1, NAN, INF, True, "0.1", 1e-7, 1e-300)
    },
    "a stride of 1e-7 s": lambda: _plan(windows=(0.1, 1e-7)),
    "a stride of NaN": lambda: _plan(windows=(0.1, NAN)),
    "a stride of infinity": lambda: _plan(windows=(0.1, INF)),
    "no windows": lambda: _plan(windows=[]),
    "windows that are none": lambda: _plan(windows=[None]),
    "a window behind the clip": lambda: _plan(windows=[(98.0, 99.0)]),
    "a window that ends before it starts": lambda: _plan(windows=[(0.5, 0.1)]),
    "a window of texts": lambda: _plan(windows=[("0", "1")]),
    "a window of another clip": lambda: _plan(windows=[Span(0.0, 1.0, clip=4)]),
    "a span to infinity": lambda: Span(0.0, INF),
    "a span of a clip -1": lambda: Span(0.0, 1.0, clip=-1),
    "a number for a label": lambda: Span(0.0, 1.0, 3),
    "bands without frequencies": lambda: _plan(bands=[(0, 100)]),
    "a clip that does not exist": lambda: model().timeline(inputs()).seconds("encoder", 3),
    "a clip of 0.5": lambda: model().timeline(inputs()).duration_s(0.5),
    "a part that does not exist": lambda: model().timeline(inputs()).seconds("head"),
    "a row that does not exist": lambda: model().timeline(inputs())[3],
}

OPTIONS = {
    **{
        f"cells_per_forward of {value!r}": lambda value=value: _plan(cells_per_forward=value)
        for value in (0, -1, NAN, INF, 1.5, True, "3")
    },
    **{
        f"memory_gb of {value!r}": lambda value=value: _plan(memory_gb=value)
        for value in (0, -1, NAN, INF, True, "3")
    },
    "verify of NaN": lambda: _sweep(verify=NAN),
    "verify of -1": lambda: _sweep(verify=-1),
    "verify of 1.5": lambda: _sweep(verify=1.5),
    "refine of NaN": lambda: _sweep(refine=NAN),
    "refine of 0": lambda: _sweep(refine=0),
    "refine without time": lambda: _sweep(refine=0.1, axes="position", windows=None),
    "checkpoint_every_s of NaN": lambda: _sweep(checkpoint="a.ckpt", checkpoint_every_s=NAN),
    "checkpoint_every_s of -1": lambda: _sweep(checkpoint="a.ckpt", checkpoint_every_s=-1),
    "a checkpoint in no folder": lambda: _sweep(checkpoint="nowhere/a.ckpt"),
    "a number for a checkpoint": lambda: _sweep(checkpoint=3),
    "an unknown direction": lambda: _plan(direction="both"),
    "an unknown precision": lambda: _plan(precision="half"),
    "layers of a site without layers": lambda: _plan(layers=0),
    "a layer that does not exist": lambda: _plan(site=SITE, layers=99),
    "a layer of 1.5": lambda: _plan(site=SITE, layers=1.5),
    "a layer twice": lambda: _plan(site=SITE, layers=[1, 1]),
    "layer_window of 99": lambda: _plan(site=SITE, axes=["layer", "time"], layer_window=99),
    "layer_window of True": lambda: _plan(site=SITE, axes=["layer", "time"], layer_window=True),
    "an unknown argument": lambda: spec.SweepSpec.of(model(), **request(), colour="red"),
    "cells that do not exist": lambda: _plan().run(only=[10**6]),
    "cells of 1.5": lambda: _plan().run(only=[1.5]),
    "a source of another shape": lambda: _plan(source={"connector.hook_out": torch.zeros(1)}),
    "a source that lacks the site": lambda: _plan(
        source={"decoder.blocks.0.hook_resid_pre": torch.zeros(1, 1, 1)}
    ),
    "a number for a source": lambda: _plan(source=3),
    "a text for the clean run": lambda: _plan(clean="clean.wav"),
}

PATCHES = {
    "no patches": lambda: patching.patch(model(), inputs(), []),
    "a text for patches": lambda: patching.patch(model(), inputs(), SITE),
    "a number for patches": lambda: patching.patch(model(), inputs(), 3),
    "a number for a site": lambda: _patch(site=3),
    "a layer of NaN": lambda: _patch(layer=NAN),
    "a head of a residual stream": lambda: _patch(head=0),
    "a head that does not exist": lambda: _patch(site="decoder.attn.z", head=99),
    "a head of True": lambda: _patch(site="decoder.attn.z", head=True),
    "a text for a neuron": lambda: _patch(site="decoder.mlp.post", neuron="3"),
    "a position that does not exist": lambda: _patch(position=9999),
    "a position of 2^70": lambda: _patch(position=2**70),
    "a text for a position": lambda: _patch(position="3"),
    "positions that hold nothing": lambda: _patch(position=slice(5, 5)),
    "time and position at once": lambda: _patch(
        site="connector.out", layer=None, time=(0, 1), position=0
    ),
    "a source of NaN": lambda: _patch(source=NAN),
    "a source of infinity": lambda: _patch(source=INF),
    "a text for a source": lambda: _patch(source="clean"),
    "a source of another shape": lambda: _patch(source=torch.zeros(1, 2, 3)),
    "two patches of one place": lambda: patching.patch(
        model(), inputs(), 2 * [patching.Patch(SITE, 0, source=0.0)]
    ),
}

ATTRIBUTIONS = {
    "steps of NaN": lambda: _attribute(method="ig", steps=NAN),
    "0 steps": lambda: _attribute(method="ig", steps=0),
    "10^9 steps": lambda: _attribute(method="ig", steps=10**9),
    "steps of a method without": lambda: _attribute(method="atp", steps=5),
    "an unknown method": lambda: _attribute(method="magic"),
    "a method for other sites": lambda: _attribute(method="qk_fix"),
    "a window of NaN": lambda: _attribute(windows=NAN),
}

METRICS = {
    "a number for a metric": lambda: _plan(metric=3),
    "None for a metric": lambda: _plan(metric=None),
    "a mapping to a number": lambda: _plan(metric={"one": 3}),
    "a word of two tokens": lambda: _bound(metrics.log_prob("seven two")),
    "a word that is no token": lambda: _bound(metrics.log_prob("")),
    "a token id of -1": lambda: _bound(metrics.prob(-1)),
    "a token id beyond the vocabulary": lambda: _bound(metrics.prob(10**6)),
    "a float for a token": lambda: _bound(metrics.prob(3.5)),
    "NaN for a token": lambda: _bound(metrics.prob(NAN)),
    "a truth value for a token": lambda: _bound(metrics.prob(True)),
    "None for a token": lambda: _bound(metrics.log_prob(None)),
    "two answers for one row": lambda: _bound(metrics.log_prob([3, 4])),
    "an answer against itself": lambda: _bound(metrics.logit_diff(3, 3)),
    "a position outside the rows": lambda: _bound(metrics.prob(3, position=9999)),
    "a position of 1.5": lambda: _bound(metrics.prob(3, position=1.5)),
    "a text for a position": lambda: _bound(metrics.prob(3, position="last")),
    "a choice among one": lambda: _bound(metrics.forced_choice(3, [3])),
    "an answer that is no option": lambda: _bound(metrics.forced_choice(5, [3, 4])),
    "a number for options": lambda: _bound(metrics.forced_choice(3, 4)),
    "KL without a clean run": lambda: _bound(metrics.kl()),
    "a number for a function": lambda: metrics.read_at(3),
    "a stream of a model without": lambda: _bound(metrics.of_stream("audio.0", metrics.prob(3))),
    "a bare function of a stream": lambda: metrics.of_stream("text", len),
    "a transcript for a model without CTC": lambda: _bound(metrics.ctc_log_prob("seven")),
    "a number for a transcript": lambda: metrics.ctc_log_prob(3.5),
    "a sequence of floats": lambda: metrics.sequence_log_prob([1.5, 2.0]),
    "a sequence that prompts do not end with": lambda: _bound(metrics.sequence_log_prob([3, 4])),
    "an empty sequence": lambda: _bound(metrics.sequence_log_prob([])),
    "error rates of no words": lambda: metrics.wer("", "seven"),
    "error rates of unequal lists": lambda: metrics.wer(["a"], ["a", "b"]),
    "a number for a transcript to compare": lambda: metrics.wer(3, "seven"),
}

CASES: list[Case] = [
    *named("Sites and axes of sweeps", SITES),
    *named("Windows and time", WINDOWS),
    *named("Options of sweeps", OPTIONS),
    *named("Patches", PATCHES),
    *named("Attributions", ATTRIBUTIONS),
    *named("Metrics", METRICS),
]
