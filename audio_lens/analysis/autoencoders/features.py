"""What a listener needs to judge latents: clips, moments, courses, what is said, what they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import metrics
from audio_lens.analysis.autoencoders.autoencoder import Autoencoder
from audio_lens.analysis.autoencoders.changing import steering
from audio_lens.analysis.autoencoders.evaluating import encoded
from audio_lens.analysis.autoencoders.firing import Firing, firings, profile, purity
from audio_lens.analysis.autoencoders.splicing import place_of
from audio_lens.arguments import number, whole
from audio_lens.audio import resample
from audio_lens.items import Activations, ItemError, Items, measured
from audio_lens.items.collect import Place, by_item
from audio_lens.items.item import Item, heard
from audio_lens.models import HookedAudioTransformer, TokenError
from audio_lens.timeline import Span

GAIN = 2.0  # times its largest value, to which a latent is turned up
MOST_ANSWERS = 24  # whose probabilities are compared
SHOWN = 12  # latents, where none are named
MOST_ITEMS = 16  # to which a latent is turned up
SILENCE = "(nothing)"


@dataclass(frozen=True)
class HeardClip:
    """A clip as it is played, and what is said in it when.

    Attributes:
        tiers: labelled stretches by name: "words", "phones".
    """

    item: str
    samples: Float[np.ndarray, " samples"] = field(repr=False)
    sampling_rate: int
    tiers: Mapping[str, Sequence[Span]]


@dataclass(frozen=True)
class Moment:
    """A moment at which a latent is strong, with its course over the whole clip.

    Attributes:
        start_s, end_s: the stretch around it in which the latent never falls to 0.
        seconds, values: of every position of the clip.
    """

    firing: Firing
    start_s: float
    end_s: float
    seconds: list[float] = field(repr=False)
    values: list[float] = field(repr=False)


@dataclass(frozen=True)
class Feature:
    """A latent.

    Attributes:
        share: of rows, at which it is active.
        peak: its largest value.
        moments: at which it is strongest, of different clips.
        said: of every tier, what is said most often at its strongest moments, and at which share.
        effects: of every answer, its mean probability without and with the latent turned up.
    """

    latent: int
    share: float
    peak: float
    moments: list[Moment]
    said: Mapping[str, tuple[str, float]]
    effects: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Features:
    """Latents, and the clips that they are heard in.

    Attributes:
        clips: by the name of their item.
        facts, notes: what they are of, and how to read them.
    """

    features: list[Feature]
    clips: dict[str, HeardClip]
    facts: dict[str, str]
    notes: list[str]


def features(
    model: HookedAudioTransformer,
    items: Items,
    activations: Activations,
    autoencoder: Autoencoder,
    latents: Any = None,
    *,
    most: int = 6,
    phones: Mapping[str, Sequence[Span]] | None = None,
    gain: float = GAIN,
    where: Place = "audio",
    site: str | None = None,
    layer: int | None = None,
    size: int = 16,
    progress: bool | None = None,
) -> Features:
    """What a listener needs to judge latents, for `report.feature_page`.

    Args:
        model: the model.
        items: those whose activations were collected.
        activations: of every position of their clips.
        autoencoder: of these activations.
        latents: their numbers; None takes the twelve that are active in the most items, of those
            active at less than a tenth of the rows.
        most: how many clips of each are shown, those first that excite it most.
        phones: of items by name, what sounds when; words are the items' own.
        gain: a latent is turned up to so many times its largest value.
        where: at which positions it is turned up.
        site, layer: None takes the autoencoder's own.
        size: of the batches.
        progress: as in `patching.sweep`.

    Raises:
        InputError: latents that are not there, or pooled activations.
        ItemError: activations of an item that is not among these, or no latent that is active.
    """
    whole("most", most, least=1)
    number("gain", gain, above=0)
    site, layer = place_of(autoencoder, site, layer)
    by_name = {item.id: item for item in items}
    strange = [str(one["id"]) for one in activations.items if str(one["id"]) not in by_name]
    if strange:
        raise ItemError(f"activations are of {strange[0]!r}, which is not among the items")
    shares, peaks, spread = _counts(autoencoder, activations, site, layer)
    wanted = _telling(shares, spread) if latents is None else autoencoder.of(latents)
    placed = {"site": site, "layer": layer}
    strongest = firings(autoencoder, activations, wanted, most=20, **placed)
    effects, told = _effects(
        model, items, autoencoder, wanted, peaks * gain, where, placed, size, progress
    )
    found, clips = [], {}
    tiers = _tiers(items, phones)
    for latent in wanted:
        first = _of_different_clips(strongest[latent], by_name)[:most]
        moments = [_moment(autoencoder, activations, latent, one, placed) for one in first]
        for one in moments:
            name = one.firing.item
            clips.setdefault(name, _heard(by_name[name], tiers, model.cfg.sampling_rate))
        said = {
            tier: purity(strongest[latent], spans, SILENCE)
            for tier, spans in tiers.items()
            if strongest[latent] and all(one.item in spans for one in strongest[latent])
        }
        share, peak = shares[latent].item(), peaks[latent].item()
        found.append(Feature(latent, share, peak, moments, said, effects.get(latent, {})))
    facts = {"model": model.cfg.model_name, "site": f"{site} {'' if layer is None else layer}"}
    facts |= {"latents": f"{autoencoder.width}, of kind {autoencoder.kind}"}
    facts |= {"items": str(len(activations.items)), "turned up to": f"{gain:g} times its peak"}
    notes = [
        "What excites a latent most is what its strongest moments have in common; what it is at "
        "weaker ones these do not tell. Compare with other latents before you name one.",
        *told,
    ]
    return Features(found, clips, facts, notes)


def _counts(
    autoencoder: Autoencoder, activations: Activations, site: str, layer: int | None
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Of each latent its share of rows, its largest value, and in how many items it is active."""
    active = torch.zeros(autoencoder.width, dtype=torch.float64)
    peaks = torch.zeros(autoencoder.width)
    inside = torch.zeros(len(activations.index["items"]), autoencoder.width, dtype=torch.bool)
    rows = 0
    for block in encoded(autoencoder, activations, site, layer):
        on = (block.latents > 0).cpu()
        active += on.sum(0)
        peaks = torch.maximum(peaks, block.latents.max(0).values.cpu())
        for item in block.items.unique().tolist():
            inside[item] |= on[block.items == item].any(0)
        rows += len(on)
    return active / rows, peaks, inside.double().sum(0)


def _telling(
    shares: Float[Tensor, " m"], spread: Float[Tensor, " m"], count: int = 12
) -> list[int]:
    """Latents that many items have and few rows."""
    fits = (shares > 0) & (shares < 0.1)
    order = spread.where(fits, -1.0).argsort(descending=True, stable=True)
    chosen = [one for one in order[:count].tolist() if fits[one]]
    if not chosen:
        raise ItemError("no latent is active at less than a tenth of the rows: name latents")
    return chosen


def _of_different_clips(strongest: Sequence[Firing], by_name: Mapping[str, Item]) -> list[Firing]:
    """The strongest moment of each clip, which several items may ask about."""
    best: dict[str, Firing] = {}
    for one in strongest:
        clip = by_name[one.item].audio
        best.setdefault(str(clip) if isinstance(clip, (str, Path)) else one.item, one)
    return list(best.values())


def _moment(
    autoencoder: Autoencoder,
    activations: Activations,
    latent: int,
    firing: Firing,
    placed: Mapping[str, Any],
) -> Moment:
    """A moment with the stretch in which the latent is active, and its course."""
    course = profile(autoencoder, activations, firing.item, [latent], **placed)
    windows, values = course.coords["time"], course.values[0].tolist()
    centres = [window.centre_s for window in windows]
    at = min(range(len(centres)), key=lambda i: abs(centres[i] - firing.second))
    first = last = at
    while first > 0 and values[first - 1] > 0:
        first -= 1
    while last + 1 < len(values) and values[last + 1] > 0:
        last += 1
    return Moment(firing, windows[first].start_s, windows[last].end_s, centres, values)


def _tiers(
    items: Items, phones: Mapping[str, Sequence[Span]] | None
) -> dict[str, dict[str, list[Span]]]:
    """What is said when, by tier and the name of the item."""
    words = {item.id: list(map(Span.of, item.words)) for item in items if item.words}
    sounds = {name: list(map(Span.of, spans)) for name, spans in (phones or {}).items()}
    return {name: held for name, held in (("words", words), ("phones", sounds)) if held}


def _heard(item: Item, tiers: Mapping[str, Mapping[str, list[Span]]], rate: int) -> HeardClip:
    samples, own = heard(item.clip)
    said = {tier: held[item.id] for tier, held in tiers.items() if item.id in held}
    return HeardClip(item.id, np.asarray(resample(samples, own, rate)), rate, said)


def _effects(
    model: HookedAudioTransformer,
    items: Items,
    autoencoder: Autoencoder,
    wanted: Sequence[int],
    values: Float[Tensor, " m"],
    where: Place,
    placed: Mapping[str, Any],
    size: int,
    progress: bool | None,
) -> tuple[dict[int, dict[str, tuple[float, float]]], list[str]]:
    """Of each latent, the mean probability of every answer without it and with it turned up."""
    answers = list(dict.fromkeys(item.answer for item in items if item.answer is not None))
    try:
        for answer in answers:
            model.to_single_token(answer)
    except TokenError:
        answers = []
    if not answers or len(answers) > MOST_ANSWERS:
        why = "more than" if answers else "none"
        return {}, [
            f"What latents do is not shown: the items have {why} "
            f"{MOST_ANSWERS if answers else 'with'} different answers of one token."
        ]
    part = items[: min(len(items), MOST_ITEMS)]
    turned = [one for one in wanted if values[one] > 0]
    places = by_item(where, part)

    def cells(batch: Any) -> Any:
        here: Any = where if places is None else [places[row] for row in batch.rows]
        yield batch.inputs, []
        for latent in turned:
            value = values[latent].item()
            yield (
                batch.inputs,
                [steering(autoencoder, latent, "clamp", value, where=here, **placed)],
            )

    asked = {answer: metrics.prob(answer) for answer in answers}
    told = measured(model, part, cells, asked, size=size, what="turned up", progress=progress)
    means = told.values.mean(0)
    found = {
        latent: {
            answer: (means[row, 0].item(), means[row, 1 + place].item())
            for row, answer in enumerate(answers)
        }
        for place, latent in enumerate(turned)
    }
    return found, [f"Effects are means over {len(part)} items, of all positions turned up at once."]
