"""Items in pairs, clean and corrupted, and those of them that a model answers as a study needs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args, overload, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens import metrics
from audio_lens.corruptions import Corruption, TextSwap
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.items.batches import by_layout, layout_of, prepared
from audio_lens.items.item import Item, ItemError, Spoiled, listed
from audio_lens.models import HookedAudioTransformer
from audio_lens.pairs import Pair

Several = slice | Sequence[int] | Sequence[bool] | np.ndarray
Stream = Literal["audio", "text", "both"]
How = Corruption | TextSwap | Callable[[Item], Corruption | TextSwap]
CLEAN_WRONG = "the clean side is not answered rightly"
CORRUPTED_RIGHT = "the corrupted side is answered rightly too"
UNFIT = "the sides do not fit together"


@runtime_checkable
class ManyItems(Protocol):
    """What pairs ask of `Items`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...

    def __getitem__(self, rows: Any) -> Any: ...

    def of(self, items: Iterable[Item]) -> Any: ...

    def split(self, by: str = "group", share: float = 0.5, seed: int = 0) -> Any: ...

    def check_answers(self, model: HookedAudioTransformer, against: bool = False) -> None: ...


Many = TypeVar("Many", bound=ManyItems)


@dataclass(frozen=True)
class ItemPair:
    """An item and its counterpart, which bears the same name."""

    clean: Item
    corrupted: Item


@dataclass(frozen=True)
class Dropped(Mapping[str, tuple[str, ...]]):
    """Names of what was left out, by why."""

    by_reason: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __getitem__(self, reason: str) -> tuple[str, ...]:
        return self.by_reason[reason]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_reason)

    def __len__(self) -> int:
        return len(self.by_reason)

    @property
    def counts(self) -> dict[str, int]:
        """How many were left out, by why."""
        return {reason: len(names) for reason, names in self.items()}

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        told = [f"{count}: {reason}" for reason, count in self.counts.items()]
        return "; ".join(told) if told else "none"

    def and_(self, reason: str, names: Sequence[str]) -> Dropped:
        """With more of them."""
        more = (*self.by_reason.get(reason, ()), *names)
        return Dropped(self.by_reason | {reason: more}) if names else self


@dataclass(frozen=True)
class PairBatch:
    """Some pairs, prepared, whose layouts are equal.

    Attributes:
        rows: which of all pairs they are, in the order of the inputs.
        pair: both sides; ``patching.sweep(model, **batch.pair, ...)`` takes it.
    """

    rows: list[int]
    pair: Pair = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)


class Pairs(Sequence[ItemPair], Generic[Many]):
    """Items with their counterparts.

    Attributes:
        clean, corrupted: the two sides, in one order and under the same names.
        dropped: what `kept` left out on the way here, by why.
    """

    def __init__(self, clean: Many, corrupted: Many, dropped: Dropped | None = None):
        if [item.id for item in clean] != [item.id for item in corrupted]:
            raise ItemError("the two sides of pairs hold the same names in the same order")
        self.clean, self.corrupted = clean, corrupted
        self.dropped = Dropped() if dropped is None else dropped

    def __len__(self) -> int:
        return len(self.clean)

    @overload
    def __getitem__(self, rows: int | np.integer) -> ItemPair: ...

    @overload
    def __getitem__(self, rows: Several) -> Pairs[Many]: ...

    def __getitem__(self, rows: int | np.integer | Several) -> ItemPair | Pairs[Many]:
        """One pair, or several as `Pairs`, as `Items` are chosen."""
        if isinstance(rows, (int, np.integer)):
            return ItemPair(self.clean[int(rows)], self.corrupted[int(rows)])
        return Pairs(self.clean[rows], self.corrupted[rows], self.dropped)

    def __repr__(self) -> str:
        return f"Pairs({len(self)}; dropped {self.dropped})"

    def split(
        self, by: str = "group", share: float = 0.5, seed: int = 0
    ) -> tuple[Pairs[Many], Pairs[Many]]:
        """Two parts as `Items.split` of the clean side gives them."""
        place = {item.id: row for row, item in enumerate(self.clean)}
        sides = self.clean.split(by, share, seed)
        first, second = ([place[item.id] for item in side] for side in sides)
        return self[first], self[second]

    # ---------------------------------------------------------------- for a model

    def batches(self, model: HookedAudioTransformer, size: int = 16) -> Iterator[PairBatch]:
        """Batches of up to ``size`` pairs; both sides of all pairs of a batch are of one layout.

        Raises:
            ItemError: naming a pair whose sides cannot be prepared or do not fit together; `kept`
                leaves such pairs out.
            ValueError: a size below 1.
        """
        return self._batches(model, size, lost=None)

    def _batches(
        self, model: HookedAudioTransformer, size: int, lost: dict[int, str] | None
    ) -> Iterator[PairBatch]:
        """The batches; why pairs are in none is noted in ``lost``, where that is given."""

        def entries() -> Iterator[tuple[Hashable, tuple[int, AudioInputs, AudioInputs]]]:
            for row in range(len(self)):
                try:
                    clean, corrupted = self._prepared(row, model)
                except ItemError as error:
                    if lost is None:
                        raise
                    lost[row] = str(error)
                else:
                    yield layout_of(clean, model), (row, clean, corrupted)

        for held in by_layout(entries(), size):
            rows, clean, corrupted = zip(*held, strict=True)
            pair = Pair(AudioInputs.joined(clean), AudioInputs.joined(corrupted))
            yield PairBatch(list(rows), pair)

    def _prepared(self, row: int, model: HookedAudioTransformer) -> tuple[AudioInputs, AudioInputs]:
        clean, corrupted = self[row].clean, self[row].corrupted
        sides = prepared(clean, model), prepared(corrupted, model)
        try:
            sides[0].check_pairs_with(sides[1], "the clean side", "the corrupted side")
        except InputError as error:
            raise ItemError(f"{clean.name}: {error}") from error
        if sides[0].digest() == sides[1].digest():
            raise ItemError(f"{clean.name}: clean and corrupted do not differ")
        return sides

    @torch.no_grad()
    def kept(self, model: HookedAudioTransformer, size: int = 16) -> tuple[Pairs[Many], Dropped]:
        """The pairs that a model answers rightly on the clean side, and not on the corrupted.

        What a study finds holds for these: say how many were dropped. What was dropped before is
        counted too, and stays with the pairs (``pairs.dropped``).

        Args:
            model: a model whose answers are one token or class.
            size: of the batches.

        Returns:
            The pairs that are left, and the names of the others by why.

        Raises:
            ItemError: answers that cannot be read off one token, or no pair that is left.
        """
        self.clean.check_answers(model)
        lost: dict[int, str] = {}
        why: dict[str, list[int]] = {UNFIT: [], CLEAN_WRONG: [], CORRUPTED_RIGHT: []}
        rows: list[int] = []
        for batch in self._batches(model, size, lost):
            answers = [str(self.clean[row].answer) for row in batch.rows]
            says = [answered(model, inputs, answers) for inputs in batch.pair.values()]
            for row, clean, corrupted in zip(batch.rows, *says, strict=True):
                reason = CORRUPTED_RIGHT if clean and corrupted else None if clean else CLEAN_WRONG
                (rows if reason is None else why[reason]).append(row)
        why[UNFIT] = list(lost)
        dropped = self.dropped
        for reason, numbers in why.items():
            dropped = dropped.and_(reason, [self.clean[row].id for row in sorted(numbers)])
        if not rows:
            what = f"no pair of {len(self)} is left ({dropped})"
            raise ItemError(listed(what, list(lost.values())) if lost else what)
        rows.sort()
        return Pairs(self.clean[rows], self.corrupted[rows], dropped), dropped


def answered(
    model: HookedAudioTransformer, inputs: AudioInputs, answers: Sequence[str]
) -> Bool[np.ndarray, " b"]:
    """Whether the likeliest token (or class) of every row is its answer.

    Raises:
        TokenError: an answer of several tokens.
    """
    said = top_token(model, inputs, model(inputs))
    return np.array([model.to_single_token(a) for a in answers]) == said.cpu().numpy()


def top_token(
    model: HookedAudioTransformer, inputs: AudioInputs, logits: Float[Tensor, "b *t v"]
) -> Int[Tensor, " b"]:
    """The likeliest token (or class) of every row, where it is written: at its last position."""
    likeliest = metrics.read_at(lambda rows: rows.argmax(-1).double(), name="likeliest")
    return likeliest.bind(model, inputs)(logits).long()


# -------------------------------------------------------------------------------- making them


def pairs_of(items: Many, how: How | Sequence[Item] | None, stream: Stream | None) -> Pairs[Many]:
    """Items and their counterparts; see `Items.pairs`."""
    if stream is not None and stream not in get_args(Stream):
        raise InputError(f"stream is one of {', '.join(get_args(Stream))}, got {stream!r}")
    if how is not None and stream is not None:
        raise ItemError("stream= is for items that bring their counterparts: leave it out")
    if isinstance(how, Sequence):
        return _sides(items, how)
    made, wrong = [], []
    for item in items:
        try:
            made.append(_given(item, stream) if how is None else _made(item, how))
        except ValueError as error:  # of items, of audio, of what cannot be swapped
            wrong.append(f"{item.name}: {error}")
    if wrong:
        raise ItemError(listed(f"{len(wrong)} of {len(items)} items have no counterpart", wrong))
    return Pairs(items, items.of(made))


def _sides(clean: Many, corrupted: Sequence[Item]) -> Pairs[Many]:
    """Two sides that are given, pair by pair."""
    if len(clean) != len(corrupted):
        raise ItemError(f"{len(clean)} clean items and {len(corrupted)} corrupted make no pairs")
    named = [other.replaced(id=one.id) for one, other in zip(clean, corrupted, strict=True)]
    return Pairs(clean, clean.of(named))


def _given(item: Item, stream: Stream | None) -> Item:
    """The counterpart that an item brings."""
    there = {"audio": item.other_audio, "text": item.other_text}
    brought = [name for name, other in there.items() if other is not None]
    if stream is None:
        if len(brought) == 2:
            raise ItemError("it brings other_audio and other_text: choose stream=")
        if not brought:
            raise ItemError("it brings neither other_audio nor other_text")
        stream = "audio" if brought == ["audio"] else "text"
    wanted = ["audio", "text"] if stream == "both" else [stream]
    lacking = [f"other_{name}" for name in wanted if there[name] is None]
    if lacking:
        raise ItemError(f"it brings no {' and no '.join(lacking)}")
    return item.replaced(**{name: there[name] for name in wanted})


def _made(item: Item, how: How) -> Item:
    """The counterpart that a corruption makes."""
    change = how if isinstance(how, (Corruption, TextSwap)) else how(item)
    if isinstance(change, TextSwap):
        if item.text is None:
            raise ItemError("it has no text to swap words in")
        return item.replaced(text=change(item.text))
    if not isinstance(change, Corruption):
        raise ItemError(f"it got no corruption, but {change!r}")
    spoiled = Spoiled(item.clip, change)
    spoiled()  # raises now what it would raise later
    return item.replaced(audio=spoiled, other_audio=None)
