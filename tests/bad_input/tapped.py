"""Temporal Attribution Patching: arguments, pairs, checkpoints and saved reports."""

from __future__ import annotations

import functools
from typing import Any

from audio_lens.analysis import tap
from audio_lens.corruptions import TextSwap
from audio_lens.items import demo_items
from audio_lens.report import tap_page
from bad_input.commands import run
from bad_input.world import Case, model, named, result, written


@functools.cache
def _pairs() -> Any:
    return demo_items()[:4].pairs(stream="audio")


def _tap(**options: Any) -> Any:
    return tap.tap(model(), _pairs(), **options)


STUDIES = {
    "tap of items": lambda: tap.tap(model(), demo_items()),
    "tap with no corruption beside the pairs' own": lambda: _tap(corruptions=[]),
    "tap with a number for a corruption": lambda: _tap(corruptions=[3]),
    "tap with a corruption called counterpart": lambda: _tap(corruptions={"counterpart": None}),
    "tap with pairs of other items as a corruption": lambda: _tap(corruptions=[_pairs()[:2]]),
    "tap with one metric": lambda: _tap(
        metrics={"one": _pairs().clean.metrics(model())["log_prob"]}
    ),
    "tap of pairs that differ in text alone": lambda: tap.tap(
        model(), demo_items()[:4].pairs(TextSwap("The transcript", "A transcript"))
    ),
    "tap k=0": lambda: _tap(k=0),
    "tap rank=0": lambda: _tap(rank=0),
    "tap seed=-1": lambda: _tap(seed=-1),
    "tap size=0": lambda: _tap(size=0),
    "tap windows of no width": lambda: _tap(windows=0.0),
    "tap windows of three numbers": lambda: _tap(windows=(0.1, 0.1, 0.1)),
    "tap in a part that is none": lambda: _tap(part="connector"),
    "tap of kinds that are none": lambda: _tap(kinds=("layer",)),
    "tap stages that are not the first": lambda: _tap(stages=("claims",)),
    "tap checkpoint= that holds something else": lambda: _tap(
        checkpoint=written("other.part", "notes")
    ),
    "tap checkpoint= in no folder": lambda: _tap(checkpoint="nowhere/tap.part"),
    "Report.load of nothing": lambda: tap.Report.load("nothing.zip"),
    "Report.load of another file": lambda: tap.Report.load(written("other.zip", "notes")),
    "tap_page of a result": lambda: tap_page(result(), "page.html"),
}

COMMANDS = {
    "tap --items of a file that is not there": lambda: run("tap", "--items", "nothing.jsonl"),
    "tap --k 0": lambda: run("tap", "--k", "0"),
    "tap --window 0": lambda: run("tap", "--window", "0"),
    "tap --save to a folder that cannot be made": lambda: run(
        "tap", "--save", "/proc/nowhere/t.zip"
    ),
    "tap --out and --save of one name": lambda: run("tap", "--out", "a", "--save", "a"),
}

CASES: list[Case] = [
    *named("Temporal Attribution Patching", STUDIES),
    *named("Temporal Attribution Patching from a shell", COMMANDS),
]
