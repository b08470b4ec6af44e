"""The map of positions to seconds, held against what the model itself computes, by impulses.

One feature step, or one click of the waveform, must light exactly the positions whose support by
the map holds it: before attention spreads it, in the stem, the connector and the prompt.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from audio_lens import AudioInputs, HookedAudioTransformer, Timeline
from audio_lens.timeline import Track
from families import FAMILIES
from families.base import Family

CLICK, ANCHOR = 0.5, 1.0  # features are relative to the loudest place, which both clips share
ANCHOR_S = 0.025  # before the end of every segment
LONG_S = 31.7
MARGIN_S = 0.00125  # where windows fade out a click need not be seen
EDGE_S = 1e-6

HEARD = [family for family in FAMILIES.values() if family.clips]
each_case = pytest.mark.parametrize(
    "family, durations",
    [
        pytest.param(family, tuple(durations), id=f"{family.name}: {durations}")
        for family in HEARD
        for durations in family.durations
    ],
)


class Place(NamedTuple):
    """A segment of the batch: the prompt it is of, and where in its clip it begins."""

    row: int
    start_s: float


class Scene(NamedTuple):
    """Inputs of one prompt per clip, with what is known of them without the map."""

    family: Family
    model: HookedAudioTransformer
    inputs: AudioInputs
    places: list[Place]

    def steps(self, segment: int) -> np.ndarray:
        """Centres in seconds of the clip of the feature steps that hold audio."""
        first = self.places[segment].start_s + self.family.first_step_s
        return first + self.family.step_s * np.arange(self.inputs.n_valid(segment))


@functools.cache
def model_of(name: str) -> HookedAudioTransformer:
    """In float64, so that what is not touched does not move."""
    family = FAMILIES[name]
    return family.hooked(family.build(dtype=torch.float64, **family.impulse_model))


def scene_of(family: Family, waveforms: list[np.ndarray]) -> Scene:
    model = model_of(family.name)
    inputs = family.clips(model, waveforms)
    inputs = replace(inputs, features=inputs.features.double())
    assert inputs.clips_per_row == (1,) * len(waveforms)
    places = [
        Place(row, index * family.segment_s if index else 0.0)
        for row, count in enumerate(inputs.segments_per_row)
        for index in range(count)
    ]
    return Scene(family, model, inputs, places)


def quiet(family: Family, durations: tuple[float, ...], rate: int) -> list[np.ndarray]:
    """Silence of odd numbers of samples, but for a loud click at the end of every segment."""
    waveforms = []
    for duration in durations:
        waveform = np.zeros((round(duration * rate) - 1) | 1, dtype=np.float32)
        for end_s in segment_ends(family, duration):
            waveform[round((end_s - ANCHOR_S) * rate)] = ANCHOR
        waveforms.append(waveform)
    return waveforms


def segment_ends(family: Family, duration: float) -> list[float]:
    """Ends of the segments of a clip, in seconds."""
    if family.segment_s is None:
        return [duration]
    whole = np.arange(family.segment_s, duration, family.segment_s).tolist()
    return [*whole, duration]


# -------------------------------------------------------------------------------- what lights


@torch.no_grad()
def activations(scene: Scene) -> dict[str, Tensor]:
    """``(rows, positions, d)`` of each part with a time, without any block."""
    model, inputs = scene.model, scene.inputs
    stem = scene.family.stem(model, inputs)
    if not hasattr(model, "connector"):
        return {"encoder": stem}
    sent = model.send_rows(stem, inputs)
    return {"encoder": stem, "connector": sent, "decoder": model.enter_decoder(inputs, sent)}


def change(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """By part, how much each position changes, relative to the one that changes most."""
    sizes = {part: (after[part] - was).abs().amax(-1) for part, was in before.items()}
    return {part: size / size.max() for part, size in sizes.items()}


# -------------------------------------------------------------------------------- what should


def named(
    scene: Scene, timeline: Timeline, part: str, segment: int, seconds: list[float]
) -> Tensor:
    """``(rows, positions)``: those whose support by the map holds one of these feature steps."""
    family, place = scene.family, scene.places[segment]
    reach = family.reach_s if part == "encoder" else family.connector_reach_s
    own = place.row if part == "decoder" else segment
    return torch.stack(
        [
            torch.from_numpy(supports(family, track, seconds, reach)) & (index == own)
            for index, track in enumerate(tracks_of(timeline, part))
        ]
    )


def supports(family: Family, track: Track, seconds: list[float], reach: float) -> np.ndarray:
    """Positions that read one of the feature steps centred at these seconds."""
    centres, steps = track.seconds.numpy()[:, None], np.asarray(seconds)[None]
    near = np.abs(centres - steps) <= reach + EDGE_S
    border = family.chunk_s or family.segment_s
    if border is not None:
        near &= chunk_of(centres, border) == chunk_of(steps, border)
    return near.any(-1)


def chunk_of(seconds: np.ndarray, border: float) -> np.ndarray:
    return np.floor(seconds / border + EDGE_S)


def tracks_of(timeline: Timeline, part: str) -> list[Track]:
    return [track for row in timeline.rows for track in row.segments(part)]


def valid(timeline: Timeline, part: str) -> Tensor:
    return torch.stack([track.valid for track in tracks_of(timeline, part)])


# -------------------------------------------------------------------------------- feature steps


@pytest.mark.mostly_slow(4)
@each_case
def test_a_feature_step_lights_what_the_map_names(
    family: Family, durations: tuple[float, ...]
) -> None:
    rate = model_of(family.name).cfg.sampling_rate
    scene = scene_of(family, quiet(family, durations, rate))
    timeline, before = scene.model.timeline(scene.inputs), activations(scene)
    for segment, step in probes(scene):
        changes = change(before, activations(nudged(scene, segment, step)))
        seconds = [scene.steps(segment)[step]]
        for part, size in changes.items():
            counts = valid(timeline, part)
            expected = named(scene, timeline, part, segment, seconds)
            assert torch.equal(size.gt(1e-9) & counts, expected & counts), (part, segment, step)


def probes(scene: Scene) -> Iterator[tuple[int, int]]:
    """Segments and feature steps: the edges, those about a border of chunks, and some between."""
    generator = np.random.default_rng(0)
    for segment in range(len(scene.places)):
        seconds = scene.steps(segment)
        last = len(seconds) - 1
        chosen = {0, 1, last // 2, last - 1, last, *generator.integers(0, last + 1, 3).tolist()}
        if scene.family.chunk_s is not None:
            chunks = chunk_of(seconds, scene.family.chunk_s)
            borders = np.flatnonzero(np.diff(chunks))[:1].tolist()
            chosen |= {border + shift for border in borders for shift in (0, 1)}
        yield from ((segment, step) for step in sorted(chosen) if 0 <= step <= last)


def nudged(scene: Scene, segment: int, step: int) -> Scene:
    features = scene.inputs.features.clone()
    features.movedim(scene.family.steps_dim, 1)[segment, step] += 1.0
    return scene._replace(inputs=replace(scene.inputs, features=features))


# -------------------------------------------------------------------------------- waveforms


@pytest.mark.mostly_slow(4)
@each_case
def test_a_click_lights_what_the_map_names(family: Family, durations: tuple[float, ...]) -> None:
    check_clicks(family, durations)


@pytest.mark.mostly_slow(4)
@pytest.mark.parametrize("family", HEARD, ids=lambda family: family.name)
def test_clips_of_over_30_s(family: Family) -> None:
    if model_of(family.name).cfg.max_audio_s < LONG_S:
        pytest.skip("longer than this model takes")
    check_clicks(family, (LONG_S,))


def check_clicks(family: Family, durations: tuple[float, ...]) -> None:
    """Through the real feature extractor; only the strongest, where it normalises clips."""
    rate = model_of(family.name).cfg.sampling_rate
    waveforms = quiet(family, durations, rate)
    scene = scene_of(family, waveforms)
    timeline, before = scene.model.timeline(scene.inputs), activations(scene)
    made = list(itertools.chain(*(clicks(family, c, d) for c, d in enumerate(durations))))
    assert made
    for clip, second in made:
        heard = [waveform.copy() for waveform in waveforms]
        sample = round(second * rate)
        heard[clip][sample] += CLICK
        changes = change(before, activations(scene_of(family, heard)))
        for part, size in changes.items():
            counts = valid(timeline, part)
            surely, maybe = (
                touched(scene, timeline, part, clip, sample / rate, reach)
                for reach in window_reaches(family)
            )
            if family.is_local:
                lit = size.gt(1e-9)
                assert not (counts & surely & ~lit).any(), (part, clip, second)
                assert not (counts & lit & ~maybe).any(), (part, clip, second)
            else:
                strongest = torch.where(counts, size, 0).argmax()
                assert maybe.flatten()[strongest], (part, clip, second)


def clicks(family: Family, clip: int, duration: float) -> Iterator[tuple[int, float]]:
    """Seconds of a clip, away from borders of segments and the loud clicks before them."""
    fractions = (0.0, 0.0731, 0.1373, 0.2919, 0.5113, 0.6747, 0.7717, 0.9059)
    ends = np.asarray([0.0, *segment_ends(family, duration)])
    for second in (0.003 + duration * fraction for fraction in fractions):
        to_end = (ends[ends > second] - second).min(initial=np.inf)
        since_start = np.inf if second < 0.1 else (second - ends[ends <= second]).min()
        if to_end > ANCHOR_S + 4 * family.window_s + family.step_s and since_start > 0.02:
            yield clip, second


def window_reaches(family: Family) -> tuple[float, float]:
    """How far from the centre of a feature step a click is surely, and at most, seen."""
    if family.window_s == 0:
        return EDGE_S, EDGE_S
    return family.window_s - MARGIN_S, family.window_s + MARGIN_S


def touched(
    scene: Scene, timeline: Timeline, part: str, clip: int, second: float, reach: float
) -> Tensor:
    """Positions that read a feature step whose window holds this second of this clip."""
    found = torch.zeros_like(valid(timeline, part))
    for segment, place in enumerate(scene.places):
        centres = scene.steps(segment)
        steps = centres[np.abs(centres - second) <= reach].tolist()
        if place.row == clip and steps:
            found |= named(scene, timeline, part, segment, steps)
    return found
