"""Many items: read from tables, filtered, split by speaker, put in batches, written down."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from audio_lens import metrics
from audio_lens.errors import AudioLensError, InputError
from audio_lens.inputs import AudioInputs
from audio_lens.items.batches import Batch, batches, prepared
from audio_lens.items.item import SHOWN, Item, ItemError, Label, listed
from audio_lens.items.pairs import How, Pairs, Stream, pairs_of
from audio_lens.items.tables import read_items, write_items
from audio_lens.metrics import Metric
from audio_lens.models import HookedAudioTransformer, TokenError

log = logging.getLogger(__name__)
Rows = int | np.integer | slice | Sequence[int] | Sequence[bool] | np.ndarray


class Items(Sequence[Item]):
    """Items in order, each with a name of its own.

    Args:
        items: one or more; those without an id are numbered from 0.
        skipped: of a table, the rows that could not be used, with why.

    Raises:
        ItemError: no item, or two of one name.
    """

    def __init__(self, items: Iterable[Item], skipped: Sequence[str] = ()):
        given = [x if x.id else x.replaced(id=str(i)) for i, x in enumerate(items)]
        if not given:
            raise ItemError("no items" + ("".join(f"\n  {why}" for why in skipped[:SHOWN])))
        names: dict[str, int] = {}
        for number, item in enumerate(given):
            if (first := names.setdefault(item.id, number)) != number:
                raise ItemError(f"items {first} and {number} are both called {item.id!r}")
        self._items = given
        self.skipped = tuple(skipped)

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, rows: int | np.integer) -> Item: ...

    @overload
    def __getitem__(self, rows: slice | Sequence[int] | Sequence[bool] | np.ndarray) -> Items: ...

    def __getitem__(self, rows: Rows) -> Item | Items:
        """One item, or several as `Items`: a slice, numbers, or a mask of bools.

        Raises:
            ItemError: if that leaves none, or a mask is not as long as the items.
            IndexError: for an item that is not there.
        """
        if isinstance(rows, (int, np.integer)):
            return self._items[int(rows)]
        index = np.arange(len(self))
        if not isinstance(rows, slice):
            rows = np.asarray(rows)
            if rows.dtype == bool and rows.shape != index.shape:
                raise ItemError(f"a mask of {len(rows)} for {len(self)} items")
            rows = rows if rows.size else rows.astype(int)
        return Items(self._items[i] for i in index[rows])

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def __repr__(self) -> str:
        labels = sorted({name for item in self for name in item.labels})
        groups = {item.group for item in self} - {None}
        said = [f"{len(groups)} groups"] * bool(groups)
        said += [f"labels {', '.join(labels)}"] * bool(labels)
        return f"Items({', '.join([str(len(self)), *said])})"

    # ---------------------------------------------------------------- tables

    @staticmethod
    def from_table(
        path: str | Path,
        columns: Mapping[str, str | None] | None = None,
        *,
        skip_bad: bool = False,
        verify: bool = False,
    ) -> Items:
        """Items from JSON lines, csv or parquet, as `to_table` writes them.

        Columns, all but ``audio`` optional: id, audio, text, answer, against, options, other_audio,
        other_text, group, labels (a mapping) or columns ``label.NAME``, words (a list of label,
        start_s and end_s, or a TextGrid's path), hash. Paths are relative to the table. In csv,
        lists and mappings are written as JSON.

        Args:
            path: the table.
            columns: what columns of the table mean, where they have other names:
                ``{"file": "audio", "speaker": "label.speaker"}``; None leaves a column out.
            skip_bad: leave out rows that cannot be used, and tell of each in ``items.skipped``
                and the log, in place of raising.
            verify: read all clips and compare them with the column hash.

        Raises:
            ItemError: naming file and line of each row that cannot be used; an unknown column; two
                items of one name.
            ImportError: parquet without pyarrow (extra ``tables``).
        """
        return gathered(path, read_items(path, columns), skip_bad, verify)

    def to_table(self, path: str | Path) -> Path:
        """Write a table that `from_table` reads, with a hash beside every item.

        Clips in memory become files in a folder beside it, sample for sample.

        Raises:
            ItemError: a name that ends in none of .jsonl, .csv, .parquet.
            OutputError: a path that cannot be written; an old table stays.
        """
        return write_items(self, path)

    def digest(self) -> str:
        """A hash of all items in order, by what is heard and said in them."""
        digests = "".join(item.digest() for item in self)
        return hashlib.sha256(digests.encode()).hexdigest()[:16]

    # ---------------------------------------------------------------- parts

    def filter(self, keep: Callable[[Item], bool] | None = None, **labels: Any) -> Items:
        """Those for which ``keep`` is true and whose labels are these: ``filter(speaker="theo")``.

        A list of values takes items of any of them. Labels are found as `Item.value` finds them.

        Raises:
            ItemError: if that leaves none, or an item does not have the label.
        """
        wanted = {n: x if isinstance(x, (list, tuple, set)) else [x] for n, x in labels.items()}

        def fits(item: Item) -> bool:
            has = all(item.value(name) in values for name, values in wanted.items())
            return has and (keep is None or bool(keep(item)))

        chosen = [fits(item) for item in self]
        if not any(chosen):
            asked = f" with {labels}" if labels else ""
            raise ItemError(f"none of the {len(self)} items is left{asked}")
        return self[chosen]

    def values(self, label: str) -> list[Label]:
        """A label, or another field, of every item.

        Raises:
            ItemError: naming an item that lacks it.
        """
        found = [item.value(label) for item in self]
        lacking = [item.name for item, value in zip(self, found, strict=True) if value is None]
        if lacking:
            raise ItemError(f"{len(lacking)} items have no {label}, such as {lacking[0]}")
        return [value for value in found if value is not None]

    def by(self, label: str) -> dict[Label, Items]:
        """The items of each value of a label, in the order in which the values come.

        Raises:
            ItemError: naming an item that lacks it.
        """
        values = self.values(label)
        return {one: self[[value == one for value in values]] for one in dict.fromkeys(values)}

    def split(self, by: str = "group", share: float = 0.5, seed: int = 0) -> tuple[Items, Items]:
        """Two parts that share no value of a label, and no group: for training and testing.

        Items that share a value, or a group, stay together, so that no speaker is on both sides
        whatever the label. ``by="id"`` keeps groups apart and nothing else.

        Args:
            by: a label or another field, as `Item.value` finds it.
            share: of the items that go to the second part, about.
            seed: of which do.

        Raises:
            ItemError: a label that splits nothing, since all items hang together; or that an item
                lacks.
            ValueError: a share that is not between 0 and 1.
        """
        if not 0 < share < 1:
            raise InputError(f"share lies between 0 and 1, got {share}")
        units = _hanging_together(
            [(v, x.group) for v, x in zip(self.values(by), self, strict=True)]
        )
        if len(units) < 2:
            raise ItemError(
                f"{by!r} splits nothing: all {len(self)} items hang together by it, or by their "
                "groups"
            )
        order = np.random.default_rng(seed).permutation(len(units))
        second = _about(len(self) * share, [units[i] for i in order])
        mask = np.isin(np.arange(len(self)), second)
        return self[~mask], self[mask]

    @staticmethod
    def of(items: Iterable[Item]) -> Items:
        """`Items` of these."""
        return Items(items)

    def pairs(
        self, how: How | Sequence[Item] | None = None, stream: Stream | None = None
    ) -> Pairs[Items]:
        """The items beside their counterparts, under the same names.

        Args:
            how: a corruption of the clip or a swap of words, one for all or a function that gives
                one for each item; or the counterparts themselves, one by one. None takes
                ``other_audio`` and ``other_text``.
            stream: which of these: "audio", "text" or "both"; None takes the one there is.

        Raises:
            ItemError: naming items that have no counterpart, or where it cannot be made.
        """
        return pairs_of(self, how, stream)

    # ---------------------------------------------------------------- for a model

    def prepare(self, model: HookedAudioTransformer) -> AudioInputs:
        """All items as one batch for a model; shorter rows are padded as the model pads.

        Padding may change answers: `batches` has none.

        Raises:
            AudioError: a clip that cannot be used.
            InputError: items that the model cannot take, or of which some have no text.
        """
        texts = [item.text for item in self]
        if any(text is None for text in texts):
            lacking = next((x for x in self if x.text is None), None)
            if lacking is not None and any(text is not None for text in texts):
                raise ItemError(f"{lacking.name} has no text, and others have")
            return model.prepare([item.clip for item in self])
        return model.prepare([item.clip for item in self], texts)

    def batches(self, model: HookedAudioTransformer, size: int = 16) -> Iterator[Batch]:
        """Batches of up to ``size`` items of equal layout: nothing is padded.

        Together they hold every item once; ``batch.rows`` says which.

        Raises:
            ItemError: naming an item that cannot be prepared.
            ValueError: a size below 1.
        """
        return batches(self, model, size)

    def usable(self, model: HookedAudioTransformer, *, skip_bad: bool = False) -> Items:
        """The items, after every clip and text, those of counterparts too, was prepared once.

        What a long run would meet at its end is met before it: samples that are NaN, clips that are
        too long, texts that the model does not take, and answers of several tokens where it writes
        tokens.

        Args:
            model: which is to take them.
            skip_bad: leave out items that cannot be used, and tell of each in ``skipped`` and the
                log, in place of raising.

        Raises:
            ItemError: naming the items that cannot be used.
        """
        whys = {item.id: _unusable(item, model) for item in self}
        bad = {name: why for name, why in whys.items() if why}
        if bad and not skip_bad:
            raise ItemError(listed(f"{len(bad)} items cannot be used", [*bad.values()]))
        for why in bad.values():
            log.warning("left out %s", why)
        return Items((x for x in self if x.id not in bad), (*self.skipped, *bad.values()))

    def check_answers(self, model: HookedAudioTransformer, against: bool = False) -> None:
        """Raise unless the model can give every answer as one token (or class).

        Args:
            model: whose tokens.
            against: look at ``against`` too, which every item then needs.

        Raises:
            ItemError: naming the first items that lack an answer, or whose is several tokens.
        """
        fields = ("answer", "against") if against else ("answer",)
        wrong: list[str] = []
        for item in self:
            wrong += [f"{item.name} has no {one}" for one in fields if getattr(item, one) is None]
            wrong += _unreadable(item, model, fields)
        if wrong:
            raise ItemError(listed(f"{len(wrong)} answers cannot be read off one token", wrong))

    def metrics(self, model: HookedAudioTransformer) -> dict[str, Metric]:
        """What the answers are measured by: their log-probability, and the logit difference.

        The difference is to ``against``, where all items have one.

        Raises:
            ItemError: items without an answer, or with one of several tokens.
        """
        has_against = all(item.against is not None for item in self)
        self.check_answers(model, against=has_against)
        answers = [str(item.answer) for item in self]
        found: dict[str, Metric] = {"log_prob": metrics.log_prob(answers)}
        if has_against:
            found["logit_diff"] = metrics.logit_diff(answers, [str(x.against) for x in self])
        return found

    def common_options(self) -> tuple[str, ...]:
        """The options, where all items have the same ones.

        Raises:
            ItemError: naming two items whose options differ, or one that has none.
        """
        first = self[0]
        if not first.options:
            raise ItemError(f"{first.name} has no options")
        for item in self:
            if set(item.options) != set(first.options):
                raise ItemError(
                    f"options are unequal: {first.name} has {list(first.options)}, {item.name} "
                    f"{list(item.options)}. Take one kind at a time: items.filter(...)"
                )
        return tuple(first.options)


def _unusable(item: Item, model: HookedAudioTransformer) -> str:
    """Why a model cannot take an item; empty where it can."""
    try:
        for side in filter(None, (item, item.counterpart)):
            prepared(side, model)
    except ItemError as error:
        return str(error)
    fields = ("answer", "against") if model.cfg.output_kind == "tokens" else ()
    return next(_unreadable(item, model, fields), "")


def _unreadable(item: Item, model: HookedAudioTransformer, fields: Sequence[str]) -> Iterator[str]:
    """Why answers that an item has are no single tokens."""
    for field in fields:
        if (said := getattr(item, field)) is None:
            continue
        try:
            model.to_single_token(said)
        except TokenError as error:
            yield f"{item.name}, {field}: {error}"


def gathered(
    path: str | Path,
    rows: Iterable[tuple[str, Item | AudioLensError, str | None]],
    skip_bad: bool,
    verify: bool = False,
) -> Items:
    """The items of a table's rows.

    Raises:
        ItemError: naming the rows that cannot be used, unless they are skipped.
    """
    good: list[Item] = []
    bad: list[str] = []
    places: dict[str, str] = {}
    for where, item, digest in rows:
        if isinstance(item, Exception):
            bad.append(f"{where}: {item}")
            continue
        item = item if item.id else item.replaced(id=str(len(good)))
        if item.id in places:
            bad.append(f"{where}: {places[item.id]} is called {item.id!r} too")
        elif verify and digest is not None and digest != item.digest():
            bad.append(f"{where}: {item.name} has changed since it was written down")
        else:
            places[item.id] = where
            good.append(item.replaced(place=where))
    if bad and not skip_bad:
        raise ItemError(listed(f"{len(bad)} rows of {path} cannot be used", bad))
    for why in bad:
        log.warning("left out %s", why)
    if not good and not bad:
        raise ItemError(f"{path} holds no rows")
    return Items(good, bad)


def _hanging_together(keys: Sequence[tuple[Any, Any]]) -> list[list[int]]:
    """Numbers of items that share a first or a second key, directly or by others; None shares none.

    Every number is in one list.
    """
    root = list(range(len(keys)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for column in zip(*keys, strict=True):
        first: dict[Any, int] = {}
        for i, key in enumerate(column):
            if key is not None:
                root[find(i)] = find(first.setdefault(key, i))
    units: dict[int, list[int]] = {}
    for i in range(len(keys)):
        units.setdefault(find(i), []).append(i)
    return list(units.values())


def _about(wanted: float, units: Sequence[list[int]]) -> list[int]:
    """Whole units, in their order, as near to so many as they come: never none and never all."""
    chosen = list(units[0])
    for unit in units[1:-1]:
        if abs(len(chosen) + len(unit) - wanted) < abs(len(chosen) - wanted):
            chosen += unit
    return chosen
