"""VoiceBench: spoken questions of several choices."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from audio_lens.errors import InputError
from audio_lens.items.item import Item, ItemError
from audio_lens.items.items import Items
from audio_lens.items.read.rows import clip_in, facts, gather, need, options_in, right_of
from audio_lens.items.tables import Row, rows_of

SUBSETS = ("openbookqa", "mmsu")
HARMFUL = "advbench"
OPEN = ("alpacaeval", "bbh", "commoneval", "ifeval", "sd-qa", "wildvoice")


def voicebench(
    folder: str | Path,
    subset: str = "openbookqa",
    *,
    text: str | None = None,
    skip_bad: bool = False,
) -> Items:
    """VoiceBench: questions that are spoken, with their choices.

    ``answer`` and ``options`` are the choices without letters, as the spoken prompt has them;
    labels are ``prompt`` (what is said), ``letter`` (of the right choice) and whatever other
    columns hold a text or a number.

    Args:
        folder: of the set, with parquet files in ``{subset}/``.
        subset: "openbookqa" or "mmsu". The others have no choices, and advbench, which asks for
            what is harmful, is not read.
        text: what is asked beside the clip; the published runs ask nothing.
        skip_bad: leave out rows that cannot be used, and tell of each, in place of raising.

    Raises:
        ItemError: no such files, or naming the rows that cannot be used.
        ValueError: another subset.
        ImportError: without pyarrow (extra ``tables``).
    """
    if subset not in SUBSETS:
        whys = {HARMFUL: "asks for what is harmful"} | dict.fromkeys(OPEN, "has no choices")
        why = whys.get(subset, "is no subset with choices")
        raise InputError(f"{subset} {why}: read {' or '.join(SUBSETS)}")
    paths = sorted((Path(folder) / subset).rglob("*.parquet"))
    if not paths:
        raise ItemError(f"no parquet files in {Path(folder) / subset}")

    def rows() -> Iterator[tuple[str, Row]]:
        for path in paths:
            for where, row in rows_of(path):
                yield where, {"part": path.stem.partition("-")[0]} | row

    make = partial(_item, folder=Path(folder), text=text)
    return gather(Path(folder) / subset, rows(), make, skip_bad)


def _item(row: Row, folder: Path, text: str | None) -> Item:
    said, letter = need(row, "prompt"), need(row, "reference").strip()
    options = options_in(said)
    if len(options) < 2:
        raise ItemError(f"the prompt has no choices: {said!r}")
    return Item(
        clip_in(row.get("audio"), folder),
        text,
        right_of(letter, options),
        options=tuple(options.values()),
        labels=facts(row, {"audio", "reference", "id"}) | {"letter": letter},
        id=str(row.get("id", "")),
    )
