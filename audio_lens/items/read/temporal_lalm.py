"""Questions about when things sound (temporal-lalm)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from audio_lens.items.items import Items
from audio_lens.items.read.rows import QUESTION, columns_of, of_choices

COLUMNS = {
    "audio": ("audio", "audio_path", "audio_id", "path", "file"),
    "question": ("question", "prompt", "instruction", "text"),
    "choices": ("choices", "options"),
    "answer": ("answer", "correct_answer", "answer_gt", "reference"),
}


def temporal_lalm(
    table: str | Path,
    columns: Mapping[str, str] | None = None,
    *,
    audio_root: str | Path | None = None,
    prompt: str = QUESTION,
    skip_bad: bool = False,
) -> Items:
    """temporal-lalm: questions of several choices about order and duration.

    ``answer`` and ``options`` are the choices without letters; further columns that hold a text or
    a number are labels. Any set of this form may be read so.

    Args:
        table: a parquet file of the set (or a list in JSON, or JSON lines).
        columns: the columns that hold audio (a path, or bytes), question, choices (a list) and
            answer, where these are not found by their usual names: ``{"audio": "clip"}``.
        audio_root: what paths are relative to; None is the folder of the table.
        prompt: holds {question} and {choices}, which come as ``(a) ... (b) ...``.
        skip_bad: leave out rows that cannot be used, and tell of each, in place of raising.

    Raises:
        ItemError: a column that is not found, naming those that are there; or naming the rows that
            cannot be used.
        ImportError: parquet without pyarrow (extra ``tables``).
    """
    named = columns_of(table, COLUMNS, columns or {})
    return of_choices(table, audio_root, named, prompt, skip_bad)
