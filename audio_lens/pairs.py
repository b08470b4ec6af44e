"""Minimal pairs: inputs of equal shape, and what differs between them, and when."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from audio_lens.audio import AudioSource
from audio_lens.corruptions import Corruption, TextSwap
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.base import HookedAudioTransformer
from audio_lens.timeline import Span

JOINED_S = 0.02  # differences closer than this are one stretch


@dataclass(frozen=True, eq=False)
class Pair(Mapping[str, AudioInputs]):
    """Clean and corrupted inputs of equal shape; ``patching.sweep(model, **pair, ...)`` takes both.

    Attributes:
        clean, corrupted: the inputs.
        changed: where the audio differs, in seconds; nothing where only the text does. Can stand
            wherever windows can.
        how: what was done, in words: "audio", "length" and "text" as far as they apply.
    """

    clean: AudioInputs = field(repr=False)
    corrupted: AudioInputs = field(repr=False)
    changed: list[Span] = field(default_factory=list)
    how: dict[str, str] = field(default_factory=dict)

    @property
    def meta(self) -> dict[str, str]:
        """`changed` and `how` as a result keeps them: ``result.meta.update(pair.meta)``."""
        return {"pair": json.dumps({"changed": [*map(asdict, self.changed)], **self.how})}

    def __getitem__(self, side: str) -> AudioInputs:
        if side not in ("clean", "corrupted"):
            raise KeyError(side)
        return self.clean if side == "clean" else self.corrupted

    def __iter__(self) -> Iterator[str]:
        return iter(("clean", "corrupted"))

    def __len__(self) -> int:
        return 2


def minimal_pair(
    model: HookedAudioTransformer,
    clean: AudioSource | None,
    corrupted: AudioSource | Corruption | None = None,
    *,
    text: Any = None,
    corrupted_text: str | TextSwap | None = None,
    sampling_rate: int | None = None,
    fit: Literal["pad", "cut"] = "pad",
) -> Pair:
    """Inputs for one prompt, clean and corrupted, that differ in audio, in text or in both.

    Args:
        model: what the inputs are for.
        clean: the clip, as ``model.prepare`` takes it; None for prompts of text alone.
        corrupted: a corruption of that clip, or another recording; None keeps the clip.
        text: the prompt, as ``model.prepare`` takes it; several about the clip give as many rows.
        corrupted_text: another prompt of as many tokens, or a swap of words in it; None keeps it.
        sampling_rate: of clips given as samples, in Hz.
        fit: how two recordings become equally long: "pad" puts silence behind the shorter one,
            "cut" takes the end off the longer one. ``how["length"]`` tells what was done.

    Raises:
        AudioError: audio that cannot be used, or a span outside of it.
        InputError: a pair that does not differ, or texts of unequal tokens.
        ValueError: an unknown ``fit``, or a swap that does not fit the text.
    """
    if fit not in ("pad", "cut"):
        raise InputError(f"fit must be 'pad' or 'cut', got {fit!r}")
    rate, how = model.cfg.sampling_rate, {}
    changed: list[Span] = []
    if clean is None:
        if corrupted is not None:
            raise InputError("there is no clip to corrupt: pass clean=, or change the text")
        inputs = against = model.prepare(None, text, rate)
    else:
        inputs, against, changed = _heard(model, clean, corrupted, text, sampling_rate, fit, how)
    if corrupted_text is not None:
        against, how["text"] = _reworded(against, text, corrupted_text)
    if inputs.digest() == against.digest():
        raise InputError("clean and corrupted do not differ: change the audio or the text")
    return Pair(inputs, against, changed, how)


def _heard(
    model: HookedAudioTransformer,
    clean: AudioSource,
    corrupted: AudioSource | Corruption | None,
    text: Any,
    sampling_rate: int | None,
    fit: Literal["pad", "cut"],
    how: dict[str, str],
) -> tuple[AudioInputs, AudioInputs, list[Span]]:
    """Inputs of both clips with the same text, and where they differ; ``how`` is told."""
    rate, changed = model.cfg.sampling_rate, []
    one = other = model.load_audio(clean, sampling_rate)
    if isinstance(corrupted, Corruption):
        other, changed = corrupted(one, rate)
        how["audio"] = corrupted.describe()
        if changed[0].clip:
            raise InputError(f"{changed[0]} is of clip {changed[0].clip}; a pair has one clip, 0")
    elif corrupted is not None:
        one, other, how["length"] = _fitted(
            one, model.load_audio(corrupted, sampling_rate), fit, rate
        )
        changed = differences(one, other, rate)
        how["audio"] = "another recording"
    inputs = model.prepare(one, text, rate)
    return inputs, inputs if corrupted is None else inputs.with_audio(other, rate), changed


def differences(
    one: Float[np.ndarray, " samples"],
    other: Float[np.ndarray, " samples"],
    sampling_rate: int,
) -> list[Span]:
    """The stretches where two clips of equal length differ, those less than 20 ms apart as one."""
    where = np.flatnonzero(one != other)
    if not len(where):
        return []
    gaps = np.flatnonzero(np.diff(where) > JOINED_S * sampling_rate)
    starts, stops = where[[0, *(gaps + 1)]], where[[*gaps, -1]] + 1
    return [
        Span(float(start / sampling_rate), float(stop / sampling_rate))
        for start, stop in zip(starts, stops, strict=True)
    ]


def _fitted(
    one: Float[np.ndarray, " n"], other: Float[np.ndarray, " m"], fit: str, sampling_rate: int
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"], str]:
    """Both clips at one length, and what was done to them."""
    gap = len(one) - len(other)
    if gap == 0:
        return one, other, "equally long"
    shorter, longer = ("corrupted", "clean") if gap > 0 else ("clean", "corrupted")
    seconds = f"{abs(gap) / sampling_rate:.4f} s"
    if fit == "cut":
        length = min(len(one), len(other))
        return one[:length], other[:length], f"{longer} cut by {seconds}"
    one, other = (np.pad(x, (0, max(0, n))) for x, n in ((one, -gap), (other, gap)))
    return one, other, f"{shorter} padded with {seconds} of silence"


def _reworded(
    inputs: AudioInputs, text: Any, corrupted_text: str | TextSwap
) -> tuple[AudioInputs, str]:
    """The inputs with the other text, and what was done."""
    if isinstance(corrupted_text, str):
        return inputs.with_text(corrupted_text), f"{text!r} -> {corrupted_text!r}"
    if not isinstance(corrupted_text, TextSwap):
        raise InputError(
            f"corrupted_text is a text or a TextSwap, got {type(corrupted_text).__name__}"
        )
    if not isinstance(text, str):
        raise InputError(f"{corrupted_text} needs a text to swap words in: pass text=")
    return inputs.with_text(corrupted_text(text)), corrupted_text.describe()
