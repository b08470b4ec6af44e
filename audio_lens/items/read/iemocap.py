"""IEMOCAP: acted and improvised dialogues, with what raters heard in each utterance."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from audio_lens.items.item import Item, ItemError
from audio_lens.items.items import Items
from audio_lens.items.read.rows import existing, gather
from audio_lens.items.tables import Row

FOUR = {"ang": "angry", "hap": "happy", "exc": "happy", "neu": "neutral", "sad": "sad"}
"""The usual four classes, in which excited counts as happy."""
_LINE = re.compile(
    r"^\[\s*([\d.]+)\s*-\s*([\d.]+)\s*\]\s+(\S+)\s+(\w+)\s+\[([\d.]+),\s*([\d.]+),\s*([\d.]+)\]"
)
_NAME = re.compile(r"^(Ses(\d\d)[FM]_.+)_([FM])\d+$")


def iemocap(
    folder: str | Path,
    *,
    emotions: Mapping[str, str] = FOUR,
    text: str | None = None,
    skip_bad: bool = False,
) -> Items:
    """IEMOCAP: the utterances of some emotions; by default the usual four classes.

    ``answer`` is the emotion, ``options`` all of them, and the group the speaker, ``Ses01F``.
    Labels are ``emotion``, ``code`` (as rated), ``speaker``, ``session``, ``dialog``, ``valence``,
    ``activation`` and ``dominance``. Utterances of other codes are left out.

    Args:
        folder: with ``Session1`` to ``Session5``, of which some may be missing.
        emotions: the codes that count, and what they are called.
        text: what is asked about every clip.
        skip_bad: leave out rows that cannot be used, and tell of each, in place of raising.

    Raises:
        ItemError: no rated dialogues, or naming the lines that cannot be used, and the clip that is
            missing by its path.
    """
    root = Path(folder)
    paths = sorted(root.glob("Session[1-5]/dialog/EmoEvaluation/*.txt"))
    paths = [path for path in paths if not path.name.startswith(".")]
    if not paths:
        raise ItemError(f"no rated dialogues at {root}/Session1/dialog/EmoEvaluation/*.txt")
    rows = (found for path in paths for found in _rows(path, emotions))
    return gather(root, rows, partial(_item, emotions=emotions, text=text), skip_bad)


def _rows(path: Path, emotions: Mapping[str, str]) -> Iterator[tuple[str, Row]]:
    """The rated utterances of a dialogue; lines of single raters begin otherwise."""
    wavs = path.parents[2] / "sentences" / "wav" / path.stem
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ItemError(f"{path} is no text in UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        rated = _LINE.match(line)
        if rated is None:
            if line.startswith("[") and "Ses" in line:
                raise ItemError(f"{path} line {number} is no rated utterance: {line!r}")
            continue
        start, end, name, code, *ratings = rated.groups()
        if code in emotions:
            row = {"name": name, "code": code, "ratings": ratings, "wav": wavs / f"{name}.wav"}
            yield f"{path.name} line {number}", row | {"start": start, "end": end}


def _item(row: Row, emotions: Mapping[str, str], text: str | None) -> Item:
    named = _NAME.match(row["name"])
    if named is None:
        raise ItemError(f"{row['name']!r} does not say its session and speaker")
    dialog, session, sex = named.groups()
    speaker, emotion = f"Ses{session}{sex}", emotions[row["code"]]
    ratings = map(float, row["ratings"])
    scales = dict(zip(("valence", "activation", "dominance"), ratings, strict=True))
    labels = {"emotion": emotion, "code": row["code"], "speaker": speaker, "dialog": dialog}
    return Item(
        existing(row["wav"]),
        text,
        emotion,
        options=tuple(dict.fromkeys(emotions.values())),
        labels=labels | {"session": int(session)} | scales,
        group=speaker,
        id=row["name"],
    )
