"""What a probe is compared with: the sound's own spectrum, and a model of weights in disorder."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import WhisperFeatureExtractor

from audio_lens.audio import resample
from audio_lens.items import Items
from audio_lens.items.collect import Place, by_item
from audio_lens.items.item import heard
from audio_lens.models import HookedAudioTransformer
from audio_lens.models.mixins.features import log_mel
from audio_lens.timeline import Span

RATE = 16_000  # Hz, of the spectra
LEAST_S = 0.025  # a window of the spectrum


def mean_log_mels(items: Items, where: Place = "audio") -> Float[Tensor, "n mels"]:
    """The mean over time of every clip's log-mel spectrum: 80 bands, every 10 ms.

    Args:
        items: whose clips.
        where: seconds, or a function or list of them, are cut out first; other places take the
            whole clip.

    Raises:
        AudioError: a clip that cannot be read.
    """
    extractor, places = WhisperFeatureExtractor(), by_item(where, items)
    each = [where] * len(items) if places is None else places
    found = []
    for item, place in zip(items, each, strict=True):
        samples, rate = heard(item.clip)
        part = _cut(resample(samples, rate, RATE), place)
        wave = torch.as_tensor(part, dtype=torch.float64)[None]
        found.append(log_mel(wave, extractor)[0].mean(-1))
    return torch.stack(found)


def _cut(samples: Float[np.ndarray, " n"], place: Any) -> Float[np.ndarray, " m"]:
    is_seconds = isinstance(place, Span) or (isinstance(place, tuple) and len(place) == 2)
    if is_seconds:
        span = Span.of(place)
        samples = samples[round(max(span.start_s, 0) * RATE) : round(span.end_s * RATE)]
    least = round(LEAST_S * RATE)
    return np.pad(samples, (0, max(0, least - len(samples))))


def untrained(model: HookedAudioTransformer, seed: int = 0) -> HookedAudioTransformer:
    """A copy of the model in which the numbers of every weight stand in random order.

    Every weight keeps its size and spread, and nothing that was learned but these.
    """
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
            weight.copy_(weight.flatten()[order].reshape(weight.shape))
    return other
