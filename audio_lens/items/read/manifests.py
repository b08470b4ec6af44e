"""Manifests of speech corpora, as lhotse and NeMo write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from audio_lens.items.item import Excerpt, Item, ItemError
from audio_lens.items.items import Items
from audio_lens.items.read.rows import existing, facts, gather, need, rows_in
from audio_lens.items.tables import Row
from audio_lens.timeline import Span

WHOLE_S = 0.01  # of a recording that a cut may leave out and still be all of it


def nemo(
    manifest: str | Path,
    audio_root: str | Path | None = None,
    *,
    text: str | None = None,
    skip_bad: bool = False,
) -> Items:
    """A manifest of NeMo: JSON lines with audio_filepath, duration, text, and maybe offset.

    What is said, the column ``text``, is the label ``transcript``; other columns that hold a text
    or a number are labels too, and ``speaker`` is also the group. With an offset, the clip is that
    stretch of its file.

    Args:
        manifest: the file, maybe packed (.gz).
        audio_root: what paths are relative to; None is the folder of the manifest.
        text: what is asked about every clip.
        skip_bad: leave out lines that cannot be used, and tell of each, in place of raising.

    Raises:
        ItemError: naming the lines that cannot be used, and the clip that is missing by its path.
    """
    make = partial(_of_nemo, root=_root(manifest, audio_root), text=text)
    return gather(manifest, rows_in(manifest), make, skip_bad)


def _of_nemo(row: Row, root: Path, text: str | None) -> Item:
    path = root / need(row, "audio_filepath")
    said = {"transcript": str(row["text"])} if "text" in row else {}
    speaker = row.get("speaker")
    return Item(
        _stretch(path, _seconds(row, "offset", 0.0), _seconds(row, "duration")),
        text,
        labels=said | facts(row, {"audio_filepath", "text", "offset", "duration", "id"}),
        group=None if speaker is None else str(speaker),
        id=str(row.get("id", "")),
    )


def lhotse(
    cuts: str | Path,
    audio_root: str | Path | None = None,
    *,
    text: str | None = None,
    skip_bad: bool = False,
) -> Items:
    """Cuts of lhotse: stretches of recordings with what is said in them.

    What the supervision says is the label ``transcript``, its speaker the group, and its word
    alignment the item's words; ``language``, ``gender``, ``speaker`` and custom facts are labels.

    Args:
        cuts: a manifest of cuts, ``.jsonl`` or ``.jsonl.gz``. The format is read here, without
            lhotse.
        audio_root: what relative paths are relative to; None is the folder of the manifest.
        text: what is asked about every clip.
        skip_bad: leave out lines that cannot be used, and tell of each, in place of raising.

    Raises:
        ItemError: naming the lines that cannot be used: a clip that is missing, by its path, a
            cut of several tracks, recordings or supervisions, or one whose sound is changed (speed,
            volume) or lies in no file; lhotse saves such cuts as plain ones (``save_audios``).
    """
    make = partial(_of_lhotse, root=_root(cuts, audio_root), text=text)
    return gather(cuts, rows_in(cuts), make, skip_bad)


def _of_lhotse(row: Row, root: Path, text: str | None) -> Item:
    kind, recording = row.get("type", "MonoCut"), row.get("recording")
    if kind != "MonoCut" or not isinstance(recording, Mapping):
        raise ItemError(f"a cut of one recording is read, and this is a {kind}")
    sources = recording.get("sources") or [{}]
    is_file = len(sources) == 1 and sources[0].get("type") == "file"
    if not is_file or recording.get("transforms"):
        raise ItemError("its sound is changed, or lies in no single file: save it (save_audios)")
    start, duration = _seconds(row, "start", 0.0), _seconds(row, "duration")
    said = _supervision(row.get("supervisions") or [])
    named = {"language": said.get("language"), "gender": said.get("gender")}
    named |= {"speaker": said.get("speaker"), "transcript": said.get("text")}
    custom = {**(said.get("custom") or {}), **(row.get("custom") or {})}
    return Item(
        _stretch(root / str(sources[0].get("source")), start, duration),
        text,
        labels=facts({**custom, **named}, ()),
        words=_aligned((said.get("alignment") or {}).get("word") or []),
        group=said.get("speaker"),
        id=need(row, "id"),
    )


def _supervision(given: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    if len(given) > 1:
        raise ItemError(f"it has {len(given)} supervisions: cut it so that each has one")
    return given[0] if given else {}


def _aligned(words: Sequence[Any]) -> list[Span]:
    """Words as lhotse aligns them: symbol, start and duration in seconds of the cut."""
    try:
        return [Span(float(at), float(at) + float(long), word) for word, at, long, *_ in words]
    except (TypeError, ValueError) as error:
        raise ItemError(f"the alignment holds no symbol, start and duration: {error}") from error


# -------------------------------------------------------------------------------- both


def _root(manifest: str | Path, audio_root: str | Path | None) -> Path:
    return Path(manifest).parent if audio_root is None else Path(audio_root)


def _seconds(row: Row, column: str, default: float | None = None) -> float:
    value = row.get(column, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ItemError(f"{column} is a number of seconds, got {value!r}")
    return float(value)


def _stretch(path: Path, start_s: float, duration_s: float) -> Path | Excerpt:
    """A stretch of a file; the whole of it is the file."""
    found = Excerpt(existing(path), start_s, start_s + duration_s)
    is_whole = start_s == 0 and found.file_s - duration_s <= WHOLE_S
    return path if is_whole else found
