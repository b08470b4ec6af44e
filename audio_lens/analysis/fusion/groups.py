"""Named groups of the positions of a decoder: parts of the prompt, and thirds of the audio."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.items import Item, ItemError
from audio_lens.models import HookedAudioTransformer, TokenError
from audio_lens.places import Ground, Words

Masks = dict[str, Bool[Tensor, " t"]]
ATTRIBUTE = "attribute"  # the label that names the word for what is asked


@dataclass(frozen=True)
class Groups:
    """Groups of positions, found anew in every prompt.

    Attributes:
        names: of the groups, in their order.
        find: the positions of each in one prompt, for its item.
    """

    names: tuple[str, ...]
    find: Callable[[Ground, Item], Masks]

    @staticmethod
    def given(places: Mapping[str, Any]) -> Groups:
        """Places by name; or functions that give one for each item.

        Raises:
            InputError: no groups.
        """
        if not places:
            raise InputError("groups are places by name, and here is none")
        return Groups(tuple(places), lambda ground, item: _given(places, ground, item))

    @staticmethod
    def of_prompt(items: Iterable[Item]) -> Groups:
        """The parts of a prompt, split at the list of options, or else at the question.

        "text" is all text, "audio" all audio; "early", "options" (or "question"), "late" and
        "last" share out the text among them.
        """
        middle = "options" if all(options_of(item) for item in items) else "question"
        names = ("text", "audio", "early", middle, "late", "last")
        return Groups(names, lambda ground, item: _prompt(ground, item, middle))

    @staticmethod
    def of_tokens() -> Groups:
        """The classes of tokens of FCCT, which share out all positions among them.

        The word for what is asked is the item's label "attribute", as the text has it.
        """
        audio = ("audio early", "audio mid", "audio late")
        return Groups((*audio, "instruction", "options", ATTRIBUTE, "last"), _tokens)

    def masks(
        self, model: HookedAudioTransformer, inputs: AudioInputs, items: Sequence[Item]
    ) -> dict[str, Bool[Tensor, "b t"]]:
        """The positions of every group in a batch; a prompt may have none.

        Raises:
            ItemError: a given place that an item's prompt does not hold.
        """
        found = [
            self.find(Ground.of(model, inputs[[row]], "decoder"), item)
            for row, item in enumerate(items)
        ]
        return {name: torch.stack([masks[name] for masks in found]) for name in self.names}


def _given(places: Mapping[str, Any], ground: Ground, item: Item) -> Masks:
    found = {}
    for name, place in places.items():
        try:
            found[name] = ground.held(place(item) if callable(place) else place)[0]
        except (InputError, TokenError) as error:
            raise ItemError(f"{item.name}, group {name!r}: {error}") from error
    return found


def _prompt(ground: Ground, item: Item, middle: str) -> Masks:
    audio, last = ground.is_audio[0], ground.mask("last")[0]
    text = ground.valid[0] & ~audio
    asked = options_of(item) if middle == "options" else item.text
    inside = _words(ground, asked) & ~last
    after = inside.cumsum(0) > 0
    return {
        "text": text,
        "audio": audio,
        "early": text & ~after & ~last,
        middle: inside,
        "late": text & after & ~inside & ~last,
        "last": last,
    }


def _tokens(ground: Ground, item: Item) -> Masks:
    audio, last = ground.is_audio[0], ground.mask("last")[0]
    thirds = torch.zeros(3, len(audio), dtype=torch.bool)
    for third, own in zip(thirds, audio.nonzero()[:, 0].tensor_split(3), strict=True):
        third[own] = True
    attribute = _words(ground, attribute_of(item)) & ~last
    options = _words(ground, options_of(item)) & ~last & ~attribute
    return {
        "audio early": thirds[0],
        "audio mid": thirds[1],
        "audio late": thirds[2],
        "instruction": ground.valid[0] & ~audio & ~options & ~attribute & ~last,
        "options": options,
        ATTRIBUTE: attribute,
        "last": last,
    }


def _words(ground: Ground, text: str | None) -> Bool[Tensor, " t"]:
    """The tokens of some text; none where the prompt does not have it."""
    if text is None or not text.strip():
        return torch.zeros(ground.n_positions, dtype=torch.bool)
    try:
        return ground.mask(Words(text.strip()))[0]
    except (InputError, TokenError):  # not there, or no tokenizer to look with
        return torch.zeros(ground.n_positions, dtype=torch.bool)


def options_of(item: Item) -> str | None:
    """The shortest stretch of an item's text that has all its options as words, if there is one."""
    if item.text is None or len(item.options) < 2:
        return None
    places = [[found.span() for found in _as_words(item.text, one)] for one in item.options]
    stretches = []
    for start in sorted(start for own in places for start, _ in own):
        ends = [min((e for s, e in own if s >= start), default=None) for own in places]
        if None not in ends:
            stretches.append((start, max(end for end in ends if end is not None)))
    if not stretches:
        return None
    start, end = min(stretches, key=lambda stretch: stretch[1] - stretch[0])
    return item.text[start:end]


def attribute_of(item: Item) -> str | None:
    """The item's label "attribute", written as its text has it, if it does."""
    named = item.labels.get(ATTRIBUTE)
    if item.text is None or not isinstance(named, str) or not named.strip():
        return None
    found = next(iter(_as_words(item.text, named)), None)
    return None if found is None else found[0]


def _as_words(text: str, part: str) -> Iterable[re.Match[str]]:
    return re.finditer(rf"(?<!\w){re.escape(part.strip())}(?!\w)", text, re.IGNORECASE)
