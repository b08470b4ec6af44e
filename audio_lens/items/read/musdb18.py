"""MUSDB18-HQ: tracks of music, whole and by the four stems they are mixed of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from audio_lens.arguments import number
from audio_lens.errors import InputError
from audio_lens.items.item import Excerpt, Item, ItemError
from audio_lens.items.items import Items
from audio_lens.items.read.rows import existing, gather
from audio_lens.items.tables import Row

STEMS = ("vocals", "drums", "bass", "other")
MIXTURE = "mixture"
PARTS = ("train", "test")


def musdb18(
    folder: str | Path,
    stems: Sequence[str] = STEMS,
    *,
    part: str | None = None,
    start_s: float | int = 0.0,
    seconds: float | int | None = None,
    text: str | None = None,
    skip_bad: bool = False,
) -> Items:
    """MUSDB18-HQ: one item for each stem of a track, ``{train,test}/{track}/{stem}.wav``.

    ``answer`` is the stem and ``options`` the stems that were asked for; the mixture has no answer.
    The group is the track, so that no track is on both sides of a split. Labels are ``stem``,
    ``track`` and ``part``. The ``.stem.mp4`` files of MUSDB18 itself are not read: convert them.

    Args:
        folder: with ``train`` and ``test``, of which one may be missing.
        stems: of "vocals", "drums", "bass", "other" and "mixture".
        part: "train" or "test"; None takes both.
        start_s, seconds: the stretch of every file, in seconds; None takes all from the start on.
            Tracks last minutes, and most models hear less.
        text: what is asked about every clip.
        skip_bad: leave out files that cannot be used, and tell of each, in place of raising.

    Raises:
        InputError: stems or a part that are none.
        ItemError: no tracks, or naming the tracks that cannot be used, and the file that is missing
            by its path.
    """
    known = (*STEMS, MIXTURE)
    if isinstance(stems, str) or not stems or any(one not in known for one in stems):
        raise InputError(f"stems are some of {', '.join(known)}, got {stems!r}")
    if part is not None and part not in PARTS:
        raise InputError(f"part is {' or '.join(PARTS)}, or None for both, got {part!r}")
    number("start_s", start_s, least=0, unit="seconds")
    if seconds is not None:
        number("seconds", seconds, above=0, unit="seconds")
    root = Path(folder)
    rows = list(_rows(root, PARTS if part is None else (part,), list(stems)))
    if not rows:
        raise ItemError(
            f"no tracks at {root}/{part or '{train,test}'}/*/{stems[0]}.wav{_hint(root)}"
        )
    make = partial(_item, stems=list(stems), start_s=start_s, seconds=seconds, text=text)
    return gather(root, rows, make, skip_bad)


def _rows(root: Path, parts: Sequence[str], stems: list[str]) -> Iterator[tuple[str, Row]]:
    for part in parts:
        for track in sorted(path for path in (root / part).glob("*") if path.is_dir()):
            for stem in stems:
                row = {"path": track / f"{stem}.wav", "stem": stem, "part": part}
                yield f"{part}/{track.name}/{stem}", row


def _hint(root: Path) -> str:
    packed = next(root.rglob("*.stem.mp4"), None)
    return "" if packed is None else f"; {packed} is packed: convert it, or take MUSDB18-HQ"


def _item(
    row: Row, stems: list[str], start_s: float | int, seconds: float | int | None, text: str | None
) -> Item:
    path, stem = existing(row["path"]), row["stem"]
    clip: Any = path
    if start_s or seconds is not None:
        end_s = Item(path).duration_s if seconds is None else start_s + seconds
        clip = Excerpt(path, float(start_s), float(end_s))
    options = tuple(one for one in stems if one != MIXTURE)
    return Item(
        clip,
        text,
        None if stem == MIXTURE else stem,
        options=options if len(options) > 1 else (),
        labels={"stem": stem, "track": path.parent.name, "part": row["part"]},
        group=path.parent.name,
        id=f"{path.parent.name}/{stem}",
    )
