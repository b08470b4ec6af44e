"""Items in tables: JSON lines, csv or parquet, one row an item, with lines named in errors."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from audio_lens import files
from audio_lens.alignment import AlignmentError, read_textgrid
from audio_lens.arguments import suggest
from audio_lens.audio import AudioError
from audio_lens.errors import AudioLensError, ExtraError
from audio_lens.items.item import Item, ItemError, heard, rated
from audio_lens.timeline import Span

CLIPS = ("audio", "other_audio")
TEXTS = ("text", "answer", "against", "other_text")
NAMES = ("id", "group")
COLUMNS = (*NAMES, *CLIPS, *TEXTS, "options", "labels", "words", "hash")
LABEL = "label."  # begins the name of a column that holds one label
Row = dict[str, Any]
Columns = Mapping[str, str | None]


# -------------------------------------------------------------------------------- reading


def rows_of(path: str | Path) -> Iterator[tuple[str, Row]]:
    """Every row of a table and where it stands: "items.jsonl line 3"; empty cells are left out.

    Raises:
        ItemError: no such file, another kind of file, or one that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise ItemError(f"{path} is a folder: name the table in it")
    if not path.is_file():
        raise ItemError(f"no table at {path}")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ItemError(f"{path} is no table: {', '.join(_READERS)} are, by their names")
    try:
        for where, row in reader(path):
            yield f"{path.name} {where}", {k: x for k, x in row.items() if not _is_missing(x)}
    except UnicodeDecodeError as error:
        raise ItemError(f"{path} is no text in UTF-8: {error}") from error


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ItemError(f"{path.name} line {number} is no JSON: {error}") from error
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise ItemError(f"{path.name} line {number} is no object in braces, but a {kind}")
            yield f"line {number}", row


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            n_columns = len(reader.fieldnames or [])
            for row in reader:
                cells = [*row.values(), *(row.get(None) or [])]  # None: those beyond the head
                within = sum(cell.count("\n") for cell in cells if isinstance(cell, str))
                where = f"line {reader.line_num - within}"
                if None in row or None in cells:
                    raise ItemError(
                        f"{path.name} {where} has not as many cells as the head ({n_columns}): "
                        "quote cells that hold commas"
                    )
                yield where, row
        except csv.Error as error:
            raise ItemError(f"{path.name} line {reader.reader.line_num}: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    pyarrow = need_pyarrow()
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ItemError(f"{path} cannot be read as parquet: {error}") from error
    with file:
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row


def need_pyarrow() -> Any:
    """The library that reads and writes parquet.

    Raises:
        ExtraError: naming the extra that brings it.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ExtraError("parquet needs pyarrow: pip install 'audio_lens[tables]'") from error
    return pyarrow


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _is_missing(cell: Any) -> bool:
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


# -------------------------------------------------------------------------------- rows to items


def read_items(
    path: str | Path, columns: Columns | None = None, folder: Path | None = None
) -> Iterator[tuple[str, Item | AudioLensError, str | None]]:
    """Where each row stands, its item or why there is none, and the hash written beside it.

    Args:
        path: the table.
        columns: names of columns by what they are called in the table; None leaves one out.
        folder: what paths of clips are relative to; None is the table's folder.

    Raises:
        ItemError: a table that cannot be read, or a column that means nothing.
    """
    beside = Path(path).parent
    for where, row in rows_of(path):
        named = renamed(row, columns or {}, where)
        try:
            item = item_of(named, beside if folder is None else folder, beside)
            item.check()
            yield where, item, named.get("hash")
        except (ItemError, AudioError, AlignmentError) as error:
            yield where, error, None


def renamed(row: Row, columns: Columns, where: str) -> Row:
    """A row under the names of `COLUMNS`.

    Raises:
        ItemError: for a column that means nothing, or two that mean the same.
    """
    found: Row = {}
    for name, cell in row.items():
        ours = columns.get(name, name)
        if ours is None:
            continue
        if ours not in COLUMNS and not ours.startswith(LABEL):
            raise ItemError(
                f"{where}: no column is called {ours!r}; {suggest(ours, COLUMNS)}. Name a fact of "
                f"your own {LABEL}{ours}, or pass columns={{{name!r}: None}} to leave it out"
            )
        if ours in found:
            raise ItemError(f"{where}: two columns are both called {ours!r}")
        found[ours] = cell
    return found


def item_of(row: Row, folder: Path, beside: Path) -> Item:
    """The item of a row; clips lie in ``folder``, TextGrids beside the table.

    Raises:
        ItemError: a cell that does not hold what its column is for.
        AlignmentError: a TextGrid that cannot be read.
    """
    if "audio" not in row:
        raise ItemError("the column audio is empty")
    fields: Row = {name: _text(row, name) for name in TEXTS if name in row}
    fields |= {name: _name(row, name) for name in NAMES if name in row}
    fields |= {name: folder / _text(row, name) for name in CLIPS if name in row}
    if "options" in row:
        fields["options"] = _options(row["options"])
    if "words" in row:
        fields["words"] = _words(row["words"], beside)
    return Item(**fields, labels=_labels(row))


def _text(row: Row, name: str) -> str:
    if not isinstance(row[name], str):
        raise ItemError(f"{name} must be text, got {row[name]!r}")
    return row[name]


def _name(row: Row, name: str) -> str:
    if isinstance(row[name], bool) or not isinstance(row[name], (str, int)):
        raise ItemError(f"{name} must be text or a whole number, got {row[name]!r}")
    return str(row[name])


def _options(cell: Any) -> list[str]:
    options = _parsed(cell, "options", 'a list of texts: ["yes", "no"]')
    if not isinstance(options, list) or not all(isinstance(one, str) for one in options):
        raise ItemError(f'options must be a list of texts, ["yes", "no"], got {cell!r}')
    return options


def _labels(row: Row) -> dict[str, Any]:
    columns = {n.removeprefix(LABEL): x for n, x in row.items() if n.startswith(LABEL)}
    cell = row.get("labels", {})
    given = _parsed(cell, "labels", 'a mapping: {"speaker": "theo"}')
    if isinstance(given, list) and all(isinstance(x, tuple) and len(x) == 2 for x in given):
        given = dict(given)  # as parquet holds maps
    if not isinstance(given, dict):
        raise ItemError(f'labels must be a mapping, {{"speaker": "theo"}}, got {cell!r}')
    if both := columns.keys() & given.keys():
        raise ItemError(f"label {sorted(both)[0]!r} is given twice: in labels, and as a column")
    return {name: x for name, x in (given | columns).items() if not _is_missing(x)}


def _words(cell: Any, beside: Path) -> list[Span]:
    if isinstance(cell, str) and not cell.lstrip().startswith("["):
        return words_of_textgrid(beside / cell)
    words = _parsed(cell, "words", 'a list of {"label", "start_s", "end_s"}, or a TextGrid')
    try:
        return [Span(float(w["start_s"]), float(w["end_s"]), w.get("label")) for w in words]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ItemError(
            f'words must be a list of {{"label", "start_s", "end_s"}} in seconds, or the path of '
            f"a TextGrid, got {cell!r} ({error})"
        ) from error


def words_of_textgrid(path: Path) -> list[Span]:
    """The words of a TextGrid: of its tier "words", or "... - words" as aligners name it.

    Raises:
        ItemError: no or several such tiers.
        AlignmentError: a file that cannot be read.
    """
    tiers = read_textgrid(path)
    fitting = [name for name in tiers if name.lower().split("-")[-1].strip() == "words"]
    chosen = fitting or (list(tiers) if len(tiers) == 1 else [])
    if len(chosen) != 1:
        raise ItemError(
            f"{path} has {len(fitting)} tiers named words, among {', '.join(tiers)}: keep one"
        )
    return tiers[chosen[0]]


def _parsed(cell: Any, column: str, wanted: str) -> Any:
    """A cell that is no text by itself: as it is, or as JSON."""
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except json.JSONDecodeError as error:
        raise ItemError(f"{column} must be {wanted}, got {cell!r} ({error})") from error


# -------------------------------------------------------------------------------- writing


def write_items(items: Iterable[Item], path: str | Path) -> Path:
    """A table that `read_items` reads back; clips in memory become files in a folder beside it.

    Paths are relative to the table, and a hash stands beside every item.

    Raises:
        ItemError: a name that ends in nothing known.
        OutputError: a path that cannot be written; an old table stays.
        AudioError: a clip that cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise ItemError(f"{path} names no kind of table: end it in {', '.join(_WRITERS)}")
    files.try_out(path)
    rows = [_row_of(item, path) for item in items]
    return files.write(path, _WRITERS[path.suffix.lower()](rows))


def _row_of(item: Item, table: Path) -> Row:
    clips = {name: getattr(item, name) for name in CLIPS if getattr(item, name) is not None}
    called = {"audio": item.id, "other_audio": f"{item.id}.other"}
    paths = {
        name: _placed(clip, item.sampling_rate, table, called[name]) for name, clip in clips.items()
    }
    return {**item.told(), **paths, "hash": item.digest()}


def _placed(clip: Any, sampling_rate: int | None, table: Path, name: str) -> str:
    """Where a clip lies, seen from the table; one in memory is written there, sample for sample."""
    if not isinstance(clip, (str, Path)):
        samples, rate = heard(rated(clip, sampling_rate))
        folder = table.parent / f"{table.stem}_audio"
        folder.mkdir(exist_ok=True)
        clip = files.write(folder / f"{_file_name(name)}.wav", _wav(samples, rate))
    return Path(os.path.relpath(Path(clip).resolve(), table.parent.resolve())).as_posix()


def _file_name(name: str) -> str:
    """A name for a file, of its own for every item."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _wav(samples: np.ndarray, rate: int) -> bytes:
    memory = io.BytesIO()
    soundfile.write(memory, samples, rate, subtype="FLOAT", format="WAV")
    return memory.getvalue()


def _as_jsonl(rows: Sequence[Row]) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def _as_csv(rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, [name for name in COLUMNS if any(name in row for row in rows)])
    writer.writeheader()
    writer.writerows(_flat(row) for row in rows)
    return text.getvalue().encode()


def _as_parquet(rows: Sequence[Row]) -> bytes:
    pyarrow = need_pyarrow()
    schema = pyarrow.schema([(name, pyarrow.string()) for name in COLUMNS])
    memory = io.BytesIO()
    flat = pyarrow.Table.from_pylist([_flat(row) for row in rows], schema)
    pyarrow.parquet.write_table(flat, memory)
    return memory.getvalue()


def _flat(row: Row) -> Row:
    """A row of texts: lists and mappings as JSON."""
    return {
        name: cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False)
        for name, cell in row.items()
    }


_WRITERS: dict[str, Callable[[Sequence[Row]], bytes]] = {
    ".jsonl": _as_jsonl,
    ".csv": _as_csv,
    ".parquet": _as_parquet,
}
