"""What cases are made of: a model, inputs, results and files, each made when it is first asked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16_000
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        subject: under which heading it stands.
        what: the input, in words.
        run: gives it to the library.
    """

    subject: str
    what: str
    run: Callable[[], Any]


def named(subject: str, runs: dict[str, Callable[[], Any]]) -> list[Case]:
    """The cases of a subject, by what each is in words."""
    return [Case(subject, what, run) for what, run in runs.items()]


@functools.cache
def model() -> Any:
    from audio_lens import HookedAudioTransformer

    return HookedAudioTransformer.from_pretrained("embedded")


@functools.cache
def shipped() -> Any:
    from audio_lens.models.embedded import default_pair

    return default_pair()


@functools.cache
def clip() -> np.ndarray:
    """The clip that ships with the package."""
    from audio_lens.audio import read

    return read(shipped().clean)


@functools.cache
def inputs(name: str = "clean") -> Any:
    """The shipped question about a shipped clip."""
    return model().prepare(getattr(shipped(), name), shipped().question)


@functools.cache
def metric() -> Any:
    from audio_lens import metrics

    return metrics.logit_diff(shipped().answer, shipped().against)


def request(**options: Any) -> dict[str, Any]:
    """Arguments of a sweep; options are added or replace some."""
    asked = {"clean": inputs(), "corrupted": inputs("corrupted"), "metric": metric()}
    asked |= {"site": "connector.out", "axes": "time", "windows": 0.5}
    return asked | options


@functools.cache
def result() -> Any:
    """A small map, made by hand."""
    import torch

    from audio_lens import Span
    from audio_lens.patching import SweepResult

    spans = [Span(0.0, 0.5, "one"), Span(0.5, 1.0, "two")]
    coords = {"layer": [0, 1, 2], "time": spans}
    values = torch.arange(6.0).reshape(3, 2)
    ends = torch.tensor(5.0), torch.tensor(0.0)
    return SweepResult(values, ("layer", "time"), coords, *ends, "decoder.resid_pre", "denoise")


def wav(path: str, samples: np.ndarray, rate: int = RATE, **options: Any) -> Path:
    """A sound file."""
    import soundfile

    soundfile.write(path, samples, rate, **options)
    return Path(path)


def written(path: str, content: bytes | str) -> Path:
    """A file of these bytes."""
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)
