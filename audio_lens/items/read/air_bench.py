"""AIR-Bench: nineteen tasks of listening, and open questions."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from audio_lens.errors import InputError
from audio_lens.items.item import Item, Label
from audio_lens.items.items import Items
from audio_lens.items.read.rows import QUESTION, chosen, existing, gather, need, rows_in
from audio_lens.items.tables import Row

META = {"foundation": "Foundation_meta.json", "chat": "Chat_meta.json"}
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
IN_FLAC = "Audio_Grounding"  # the task whose clips have another ending than the list says


def air_bench(
    folder: str | Path,
    part: str = "foundation",
    *,
    prompt: str = QUESTION,
    skip_bad: bool = False,
) -> Items:
    """AIR-Bench: questions of two to four choices (foundation), or open ones (chat).

    Labels are ``task`` and ``dataset``. Of the open questions no answer is the right one: what is
    given is the label ``reference``, beside ``meta_info``, which describes the clip.

    Args:
        folder: with ``Foundation_meta.json`` or ``Chat_meta.json``, and the clips in
            ``{task}_{dataset}/``.
        part: "foundation" or "chat".
        prompt: holds {question} and {choices}, which come as ``(a) ... (b) ...``.
        skip_bad: leave out rows that cannot be used, and tell of each, in place of raising.

    Raises:
        ItemError: naming the entries that cannot be used, and the clip that is missing by its path.
        ValueError: another ``part``.
    """
    if part not in META:
        raise InputError(f"part is one of {', '.join(META)}, got {part!r}")
    table = Path(folder) / META[part]
    if part == "chat":
        return gather(table, rows_in(table), partial(_open, folder=Path(folder)), skip_bad)
    make = partial(_closed, folder=Path(folder), prompt=prompt)
    return gather(table, rows_in(table), make, skip_bad)


def _closed(row: Row, folder: Path, prompt: str) -> Item:
    choices = [str(row[name]) for name in CHOICES if name in row]
    answer = need(row, "answer_gt")
    known = {"labels": _labels(row), "id": need(row, "uniq_id")}
    return chosen(_clip(row, folder), need(row, "question"), choices, answer, prompt, **known)


def _open(row: Row, folder: Path) -> Item:
    described = row.get("meta_info")
    if described is not None and not isinstance(described, Label):
        described = json.dumps(described, ensure_ascii=False)
    labels = {"reference": row.get("answer_gt"), "meta_info": described}
    return Item(
        _clip(row, folder),
        need(row, "question"),
        labels=_labels(row) | {name: said for name, said in labels.items() if said is not None},
        id=need(row, "uniq_id"),
    )


def _labels(row: Row) -> dict[str, str]:
    return {"task": need(row, "task_name"), "dataset": need(row, "dataset_name")}


def _clip(row: Row, folder: Path) -> Path:
    task, dataset = _labels(row).values()
    path = folder / f"{task}_{dataset}" / need(row, "path")
    return existing(path.with_suffix(".flac") if task == IN_FLAC else path)
