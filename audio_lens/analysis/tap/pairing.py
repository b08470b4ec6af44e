"""The pairs of a study: whose roles hold, which are kept, and by what else they are corrupted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from audio_lens.analysis.subspaces.curve import two_parts
from audio_lens.corruptions import Corruption, Silence
from audio_lens.errors import InputError
from audio_lens.items import Dropped, Item, ItemError, Items, Pairs
from audio_lens.items.item import heard, rated
from audio_lens.models import HookedAudioTransformer
from audio_lens.timeline import Span

OWN, SILENCE = "counterpart", "silence"
LIKE_CHANCE = 0.001  # of the sign test of roles, from which on they do not hold
TINY = 1e-4  # of the largest sample, from which on two clips differ
Corruptions = Any  # one, several in order or by name, or None


@dataclass(frozen=True)
class Roles:
    """Whether the clean sides of pairs are the ones that are answered rightly.

    Attributes:
        kept: the pairs answered rightly on the clean side alone; None where there are none.
        dropped: the others, by why.
        n_right, n_reversed: of how many pairs the clean side alone is answered rightly, and of how
            many the corrupted side alone.
    """

    kept: Pairs[Items] | None
    dropped: Dropped
    n_right: int
    n_reversed: int

    @property
    def p(self) -> float:
        """How often at least as many would be right on the clean side if sides did not matter."""
        n = self.n_right + self.n_reversed
        return sum(math.comb(n, k) for k in range(self.n_right, n + 1)) / 2**n

    @property
    def hold(self) -> bool:
        return self.p < LIKE_CHANCE

    def __str__(self) -> str:
        told = (
            f"the clean side alone is answered rightly in {self.n_right} pairs, the corrupted side "
            f"alone in {self.n_reversed} (sign test: p = {self.p:.2g})"
        )
        if self.hold:
            return told
        return (
            f"{told}: that is not more than chance gives (p < {LIKE_CHANCE:g}), so there is "
            "nothing to locate, and nothing is claimed"
        )


def roles_of(model: HookedAudioTransformer, pairs: Pairs[Items], size: int) -> Roles:
    """The pairs to study, and whether their labels mean anything to the model."""
    kept, dropped = kept_or_none(model, pairs, size)
    turned = [
        other.replaced(answer=one.answer, against=one.against)
        for one, other in zip(pairs.clean, pairs.corrupted, strict=True)
    ]
    wrong = set() if kept is None else {item.id for item in kept.clean}
    rest = [row for row, item in enumerate(pairs.clean) if item.id not in wrong]
    reversed_ = None
    if rest:
        other = Pairs(Items(turned[row] for row in rest), pairs.clean[rest])
        reversed_, _ = kept_or_none(model, other, size)
    counts = (0 if one is None else len(one) for one in (kept, reversed_))
    return Roles(kept, dropped, *counts)


def kept_or_none(
    model: HookedAudioTransformer, pairs: Pairs[Items], size: int
) -> tuple[Pairs[Items] | None, Dropped]:
    """The pairs that are left, or None; what is wrong with all of them raises."""
    pairs.clean.check_answers(model)
    try:
        return pairs.kept(model, size)
    except ItemError as error:
        none = Dropped({"no pair is left": tuple(item.id for item in pairs.clean)})
        if "is left" not in str(error):
            raise
        return None, none


def families(pairs: Pairs[Items], corruptions: Corruptions) -> dict[str, Pairs[Items]]:
    """The pairs under every corruption: their own counterparts first.

    Args:
        corruptions: further ones, by name or in order; each is a corruption, a function of the item
            that gives one, or pairs of the same clean items. None silences the seconds in which the
            two clips differ.

    Raises:
        InputError: none at all, or what is no corruption.
        ItemError: a counterpart that cannot be made, or sides that are heard alike.
    """
    found = {OWN: pairs}
    if corruptions is None:
        spans = differing(pairs)
        how = dict(zip((item.id for item in pairs.clean), spans, strict=True))
        found[SILENCE] = pairs.clean.pairs(lambda item: Silence(span=how[item.id]))
        return found
    if not isinstance(corruptions, Mapping):
        listed = [corruptions] if not isinstance(corruptions, Sequence) else corruptions
        named = {_name(one, number): one for number, one in enumerate(listed, start=1)}
    else:
        named = dict(corruptions)
    if OWN in named:
        raise InputError(
            f"{OWN!r} is what the pairs' own corruption is called: give yours another name"
        )
    if not named:
        raise InputError(
            "the protocol asks for two corruptions or more: the counterparts that the pairs have, "
            f"called {OWN!r}, and at least one beside them; None silences where the clips differ"
        )
    for name, one in named.items():
        found[name] = _pairs_by(pairs, one, name)
    return found


def _pairs_by(pairs: Pairs[Items], how: Any, name: str) -> Pairs[Items]:
    if isinstance(how, Pairs):
        if [x.id for x in how.clean] != [x.id for x in pairs.clean]:
            raise InputError(f"corruption {name!r}: its pairs are of other items")
        return how
    if not (isinstance(how, Corruption) or callable(how)):
        raise InputError(
            f"corruption {name!r} is one of audio_lens.corruptions, a function of the item that "
            f"gives one, or pairs; got {how!r}"
        )
    made: Any = how
    return pairs.clean.pairs(made)


def _name(how: Any, number: int) -> str:
    return f"{type(how).__name__.lower()} {number}" if isinstance(how, Corruption) else str(number)


def differing(pairs: Pairs[Items]) -> list[Span | None]:
    """The seconds from the first to the last sample in which the two clips of a pair differ.

    None where they sound alike: such a pair is then left out, as one whose sides do not differ.

    Raises:
        ItemError: if all do.
    """
    found = [_apart(one, other) for one, other in zip(pairs.clean, pairs.corrupted, strict=True)]
    if all(span is None for span in found):
        raise ItemError(
            "the clips of all pairs sound alike on both sides: windows of seconds are searched for "
            "what a change of the clip does; give pairs that differ in sound"
        )
    return found


def _apart(one: Item, other: Item) -> Span | None:
    """Where two clips differ."""
    (a, rate), (b, other_rate) = (heard(rated(x.audio, x.sampling_rate)) for x in (one, other))
    if rate != other_rate:
        return Span(0.0, len(a) / rate)
    length = min(len(a), len(b))
    loudest = max(float(np.abs(a).max(initial=0)), float(np.abs(b).max(initial=0)))
    differs = np.abs(a[:length] - b[:length]) > TINY * loudest
    if len(a) > length:
        differs = np.append(differs, np.ones(len(a) - length, bool))
    at = differs.nonzero()[0]
    return None if not len(at) else Span(float(at[0]) / rate, float(at[-1] + 1) / rate)


def parts_of(kept: Pairs[Items], seed: int) -> tuple[Pairs[Items], Pairs[Items]]:
    """The pairs that are searched, and those that are confirmed on; no group is on both sides."""
    return two_parts(kept, 0.5, seed)
