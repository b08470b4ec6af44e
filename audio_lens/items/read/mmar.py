"""MMAR: questions that need reasoning about what is heard."""

from __future__ import annotations

from pathlib import Path

from audio_lens.items.items import Items
from audio_lens.items.read.rows import QUESTION, of_choices

COLUMNS = {
    "audio": "audio_path",
    "question": "question",
    "choices": "choices",
    "answer": "answer",
}


def mmar(
    table: str | Path,
    audio_root: str | Path | None = None,
    *,
    prompt: str = QUESTION,
    skip_bad: bool = False,
) -> Items:
    """MMAR: a thousand questions that need reasoning about speech, sounds, music and mixtures.

    ``answer`` and ``options`` are the choices without letters. Labels are ``modality``,
    ``category``, ``sub-category``, ``language``, ``source`` and whatever other columns hold a text
    or a number.

    Args:
        table: the list of questions, in JSON or JSON lines.
        audio_root: what ``audio_path`` is relative to; None is the folder of the table.
        prompt: holds {question} and {choices}, which come as ``(a) ... (b) ...``.
        skip_bad: leave out rows that cannot be used, and tell of each, in place of raising.

    Raises:
        ItemError: naming the entries that cannot be used, and the clip that is missing by its path.
    """
    return of_choices(table, audio_root, COLUMNS, prompt, skip_bad)
