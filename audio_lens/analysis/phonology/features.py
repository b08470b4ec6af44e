"""Features of speech sounds, and which pairs of sounds differ by the same ones."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from audio_lens.errors import ExtraError, InputError

ARPABET = {
    **{"AA": "\u0251", "AE": "æ", "AH": "ʌ", "AO": "ɔ", "B": "b", "CH": "t͡ʃ", "D": "d"},
    **{"DH": "ð", "EH": "ɛ", "F": "f", "G": "\u0261", "HH": "h", "IH": "\u026a", "IY": "i"},
    **{"JH": "d͡ʒ", "K": "k", "L": "l", "M": "m", "N": "n", "NG": "ŋ", "P": "p", "R": "ɹ"},
    **{"S": "s", "SH": "ʃ", "T": "t", "TH": "θ", "UH": "ʊ", "UW": "u", "V": "v", "W": "w"},
    **{"Y": "j", "Z": "z", "ZH": "ʒ"},
}
"""In IPA what ARPAbet calls by letters, but for sounds that change on their way (AY, OW, ER)."""

Features = Mapping[str, Sequence[int]]
"""Of every sound, each feature: 1 has it, -1 has it not, 0 does not apply."""
Pair = tuple[str, str]


def features(labels: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The features of sounds by panphon (extra ``phones``); sounds that it does not know are left.

    Args:
        labels: in IPA, or in capitals as ARPAbet has them.

    Raises:
        ExtraError: without panphon.
    """
    try:
        table: Any = importlib.import_module("panphon").FeatureTable()
    except ImportError as error:
        raise ExtraError(
            "features of sounds are known by panphon: pip install 'audio_lens[phones]', or pass "
            "features of your own"
        ) from error
    found = {}
    for label in dict.fromkeys(labels):
        segments = table.word_to_vector_list(ARPABET.get(label, label), numeric=True)
        if len(segments) == 1:
            found[label] = tuple(int(value) for value in segments[0])
    return found


def kinds_of(features: Features) -> dict[tuple[int, ...], list[Pair]]:
    """Ordered pairs of sounds by how the first differs from the second; two pairs or more of each.

    What a feature is, and what it is not, are compared apart: from 0 to 1 is another difference
    than from -1 to 0. Of a difference and its opposite there is one.

    Raises:
        InputError: features that are not -1, 0 or 1, or unequally many, or the same of two sounds.
    """
    counts = {len(one) for one in features.values()}
    if len(counts) != 1 or not all(x in (-1, 0, 1) for one in features.values() for x in one):
        raise InputError("features are -1, 0 or 1, equally many of every sound")
    seen: dict[tuple[int, ...], str] = {}
    for label, one in features.items():
        if (twin := seen.setdefault(tuple(one), label)) != label:
            raise InputError(f"{twin} and {label} have the same features: give them one name")
    halves = {
        label: [*(x == 1 for x in one), *(x == -1 for x in one)] for label, one in features.items()
    }
    kinds = defaultdict(list)
    for first, own in halves.items():
        for second, other in halves.items():
            changed = tuple(int(a) - int(b) for a, b in zip(own, other, strict=True))
            if changed > tuple(-x for x in changed):
                kinds[changed].append((first, second))
    return {changed: pairs for changed, pairs in kinds.items() if len(pairs) > 1}
