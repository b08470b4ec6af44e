"""MMAU: questions about speech, sounds and music."""

from __future__ import annotations

from pathlib import Path

from audio_lens.items.items import Items
from audio_lens.items.read.rows import QUESTION, of_choices

COLUMNS = {
    "audio": "audio_id",
    "question": "question",
    "choices": "choices",
    "answer": "answer",
}


def mmau(
    table: str | Path,
    audio_root: str | Path | None = None,
    *,
    prompt: str = QUESTION,
    skip_bad: bool = False,
) -> Items:
    """MMAU: questions of two to eight choices about speech, sounds and music.

    ``answer`` and ``options`` are the choices without letters; the answers of the test part are
    withheld, and items then have none. Labels are ``task``, ``category``, ``sub-category``,
    ``difficulty`` and whatever other columns hold a text or a number.

    Args:
        table: ``mmau-test-mini.json``, or ``mmau-test.json``. Say which version: v05.15.25 changed
            a quarter of the questions.
        audio_root: what ``audio_id`` is relative to; None is the folder of the table.
        prompt: holds {question} and {choices}, which come as ``(a) ... (b) ...``.
        skip_bad: leave out rows that cannot be used, and tell of each, in place of raising.

    Raises:
        ItemError: naming the entries that cannot be used, and the clip that is missing by its path.
    """
    return of_choices(table, audio_root, COLUMNS, prompt, skip_bad)
