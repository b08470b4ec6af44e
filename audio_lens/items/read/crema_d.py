"""CREMA-D: twelve sentences, acted in six emotions."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from audio_lens.items.item import Item, ItemError
from audio_lens.items.items import Items
from audio_lens.items.read.rows import existing, gather
from audio_lens.items.tables import Row

EMOTIONS = {
    "ANG": "angry",
    "DIS": "disgusted",
    "FEA": "afraid",
    "HAP": "happy",
    "NEU": "neutral",
    "SAD": "sad",
}
LEVELS = {"LO": "low", "MD": "medium", "HI": "high", "XX": "unspecified", "X": "unspecified"}
_NAME = re.compile(r"^(\d{4})_([A-Z]{3})_([A-Z]{3})_([A-Z]{1,2})$")


def crema_d(folder: str | Path, *, text: str | None = None, skip_bad: bool = False) -> Items:
    """CREMA-D: what is acted in a clip, by its name ``{actor}_{sentence}_{EMO}_{level}.wav``.

    ``answer`` is the emotion that was to be acted (not what raters heard), ``options`` the six, and
    the group the actor. Labels are ``emotion``, ``actor``, ``sentence`` and ``level``.

    Args:
        folder: with the clips, in it or in its ``AudioWAV``.
        text: what is asked about every clip.
        skip_bad: leave out files that cannot be used, and tell of each, in place of raising.

    Raises:
        ItemError: no clips, or naming the files that cannot be used.
    """
    root = Path(folder)
    root = root / "AudioWAV" if (root / "AudioWAV").is_dir() else root
    rows = [(path.name, {"path": path}) for path in sorted(root.glob("*.wav"))]
    if not rows:
        raise ItemError(f"no wav files in {root}")
    return gather(root, rows, partial(_item, text=text), skip_bad)


def _item(row: Row, text: str | None) -> Item:
    named = _NAME.match(row["path"].stem)
    if named is None or named[3] not in EMOTIONS or named[4] not in LEVELS:
        raise ItemError("its name is none of {actor}_{sentence}_{EMO}_{level}.wav")
    actor, sentence, code, level = named.groups()
    labels = {"actor": actor, "sentence": sentence, "level": LEVELS[level]}
    return Item(
        existing(row["path"]),
        text,
        EMOTIONS[code],
        options=tuple(EMOTIONS.values()),
        labels={"emotion": EMOTIONS[code]} | labels,
        group=actor,
        id=row["path"].stem,
    )
