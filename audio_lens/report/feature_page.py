"""The page of an autoencoder's latents: what excites each, to be heard, and what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from audio_lens.analysis.autoencoders import Feature, Features
from audio_lens.arguments import text
from audio_lens.drawing.clips import Clip, envelope, flac
from audio_lens.errors import InputError
from audio_lens.report.html import write_drawn

MOST_EFFECTS = 6  # answers of a latent that are shown
LEAST_S, AHEAD_S = 0.4, 0.03  # of what is played of a moment, and how much sooner it begins


def feature_page(
    found: Features, path: str | Path, *, title: str = "What the latents listen to"
) -> Path:
    """Write latents as one page to listen to: a gallery, and each with the clips that excite it.

    The file needs no network. Each clip has its waveform, the latent's course over it, and what is
    said; a click plays from the moment at which the latent becomes active, or from anywhere.

    Args:
        found: what `autoencoders.features` gives.
        path: the HTML file to write.
        title: headline of the page.

    Returns:
        The path written.

    Raises:
        InputError: no latent.
        OutputError: a path that cannot be written; an old page stays.
    """
    text("title", title)
    if not found.features:
        raise InputError("no latents: a page needs at least one")
    numbers = {name: place for place, name in enumerate(found.clips)}
    rates = {one.sampling_rate for one in found.clips.values()}
    if len(rates) > 1:
        raise InputError(f"clips have different rates: {sorted(rates)}")
    clips = [
        _clip(Clip(one.item, one.samples, one.sampling_rate, one.tiers))
        for one in found.clips.values()
    ]
    data = {
        "rate": rates.pop() if rates else 16_000,
        "clips": clips,
        "features": [_feature(one, numbers) for one in found.features],
    }
    return write_drawn(
        path,
        "features.html",
        data,
        title=title,
        count=len(found.features),
        facts=found.facts,
        notes=found.notes,
    )


def _clip(clip: Clip) -> dict[str, Any]:
    step, levels = envelope(clip.samples, clip.sampling_rate)
    loudest = max(float(np.abs(levels).max(initial=0)), 1e-9)
    return {
        "name": clip.name,
        "seconds": clip.seconds,
        "step": step,
        "wave": (levels / loudest * 100).round().astype(int).tolist(),
        "tiers": {
            tier: [[span.start_s, span.end_s, span.label or ""] for span in spans]
            for tier, spans in clip.tiers.items()
        },
        "flac": flac(clip),
    }


def _feature(one: Feature, numbers: dict[str, int]) -> dict[str, Any]:
    moves = sorted(one.effects.items(), key=lambda held: -abs(held[1][1] - held[1][0]))
    return {
        "latent": one.latent,
        "share": one.share,
        "peak": one.peak,
        "said": [[tier, label, share] for tier, (label, share) in one.said.items()],
        "effects": [[answer, *both] for answer, both in moves[:MOST_EFFECTS]],
        "moments": [
            {
                "clip": numbers[moment.firing.item],
                "second": moment.firing.second,
                "value": moment.firing.value,
                "play": [
                    max(0.0, moment.start_s - AHEAD_S),
                    max(moment.end_s, moment.start_s + LEAST_S),
                ],
                "seconds": [round(at, 4) for at in moment.seconds],
                "values": [round(value, 4) for value in moment.values],
            }
            for moment in one.moments
        ],
    }
