"""How pages show a prompt: its clip to draw and to play, and notes on its seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from audio_lens.analysis.prompts import Prompt
from audio_lens.drawing.clips import Clip
from audio_lens.models.kinds.streams import FIRST
from audio_lens.timeline import Span

Tiers = Mapping[str, Sequence[Span]]


def clip_of(prompt: Prompt, tiers: Tiers) -> Clip:
    """The clip of a prompt, with rows of labelled stretches by name."""
    return Clip.load("clip", prompt.samples, prompt.model.cfg.sampling_rate, tiers)


def notes_on(prompt: Prompt) -> list[str]:
    """What the seconds of a codec language model mean, and where there are none."""
    if prompt.has_untimed_audio:
        return [
            "The audio tokens of this model have no seconds: when each of them listens, "
            "audio_lens.analysis.time_profile.time_profile says."
        ]
    if not prompt.is_codec_lm:
        return []
    lags = prompt.lags_s
    late = {name: lag - lags[FIRST] for name, lag in lags.items() if lag > lags[FIRST]}
    told = ", ".join(f"{name} by {lag:.2f} s" for name, lag in late.items())
    return [
        "A position of the decoder lies where the code of the first codebook does that enters "
        "there" + (f"; other streams tell there of what was earlier: {told}." if late else ".")
    ]
