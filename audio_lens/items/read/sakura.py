"""SAKURA: what attribute a clip has, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from audio_lens.errors import InputError
from audio_lens.items.item import Item
from audio_lens.items.items import Items
from audio_lens.items.read.rows import existing, facts, gather, need, options_in, right_of
from audio_lens.items.tables import Row, rows_of

ATTRIBUTES = ("Animal", "Emotion", "Gender", "Language")
FOLDER = "the folder"  # a column beside those of the file


def sakura(
    folder: str | Path,
    attributes: Sequence[str] = ATTRIBUTES,
    hop: str = "single",
    *,
    skip_bad: bool = False,
) -> Items:
    """SAKURA: questions about the animal, emotion, gender or language in a clip.

    ``answer`` and ``options`` are the choices without their letters; labels are ``attribute``,
    ``label`` (what the clip holds) and whatever other columns there are. The animals are not
    balanced.

    Args:
        folder: of the set, with ``Gender/metadata.csv`` and ``Gender/audio/`` in it or in its
            ``data``.
        attributes: which of the four.
        hop: "single" is the question about the attribute, "multi" the one that needs knowledge
            beside it.
        skip_bad: leave out rows that cannot be used, and tell of each, in place of raising.

    Raises:
        ItemError: naming the file that is missing, or the rows that cannot be used.
        ValueError: another ``hop``.
    """
    root = Path(folder)
    root = root / "data" if (root / "data").is_dir() else root
    if hop not in ("single", "multi"):
        raise InputError(f"hop is 'single' or 'multi', got {hop!r}")

    def rows() -> Iterator[tuple[str, Row]]:
        for attribute in attributes:
            for where, row in rows_of(root / attribute / "metadata.csv"):
                yield f"{attribute}/{where}", row | {FOLDER: attribute}

    return gather(root, rows(), partial(_item, root=root, hop=hop), skip_bad)


def _item(row: Row, root: Path, hop: str) -> Item:
    attribute, name = row[FOLDER], need(row, "file")
    folder = root / attribute
    text = need(row, f"{hop}_instruction").strip()
    options = options_in(text)
    questions = {f"{h}_{what}" for h in ("single", "multi") for what in ("instruction", "answer")}
    known = facts(row, {FOLDER, "file", "attribute_label", *questions})
    return Item(
        existing(folder / name if "/" in name else folder / "audio" / name),
        text,
        right_of(need(row, f"{hop}_answer"), options),
        options=tuple(options.values()),
        labels={"attribute": attribute, "label": need(row, "attribute_label"), **known},
        id=f"{attribute}/{Path(name).stem}",
    )
