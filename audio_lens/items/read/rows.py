"""What readers of published sets share: rows of tables and JSON lists, choices, columns, clips."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from audio_lens.audio import AudioError, check
from audio_lens.errors import AudioLensError
from audio_lens.items.item import Item, ItemError, Label
from audio_lens.items.items import Items, gathered
from audio_lens.items.tables import Row, rows_of

Rows = Iterable[tuple[str, Row]]
QUESTION = "{question}\n{choices}"  # how a question of several choices is asked
_OPTION = re.compile(r"[(\[]([A-Za-z])[)\]]\s*(.*?)\s*(?=[(\[][A-Za-z][)\]]|$)", re.DOTALL)
_LINE = re.compile(r"^\s*([A-Z])[.):]\s+(.+?)\s*$", re.MULTILINE)
_MARK = re.compile(r"^\s*(?:[(\[]([A-Za-z])[)\]]|([A-Za-z])[.):](?=\s))\s*")


def gather(
    source: str | Path, rows: Rows, make: Callable[[Row], Item], skip_bad: bool = False
) -> Items:
    """The items that a function makes of rows.

    Raises:
        ItemError: naming the rows that it cannot use, unless they are skipped.
    """
    return gathered(source, ((where, _made(make, row), None) for where, row in rows), skip_bad)


def _made(make: Callable[[Row], Item], row: Row) -> Item | AudioLensError:
    """The item, or why there is none."""
    try:
        return make(row)
    except (ItemError, AudioError) as error:
        return error


# -------------------------------------------------------------------------------- files


def rows_in(path: str | Path) -> Iterator[tuple[str, Row]]:
    """The rows of a table, of JSON lines that are packed, or of a list in JSON.

    Raises:
        ItemError: no such file, or one that cannot be read.
    """
    path = Path(path)
    if path.suffix == ".json":
        return _json_list(path)
    return _packed_lines(path) if path.suffix == ".gz" else rows_of(path)


def _json_list(path: Path) -> Iterator[tuple[str, Row]]:
    if not path.is_file():
        raise ItemError(f"no table at {path}")
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ItemError(f"{path} is no JSON: {error}") from error
    if not isinstance(rows, list):
        raise ItemError(f"{path} holds no list, but a {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        yield _entry(row, f"{path.name} entry {number}")


def _packed_lines(path: Path) -> Iterator[tuple[str, Row]]:
    if not path.is_file():
        raise ItemError(f"no table at {path}")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield _entry(json.loads(line), f"{path.name} line {number}")
    except (json.JSONDecodeError, UnicodeDecodeError, OSError, EOFError) as error:
        raise ItemError(f"{path} holds no packed JSON lines: {error}") from error


def _entry(row: Any, where: str) -> tuple[str, Row]:
    if not isinstance(row, dict):
        raise ItemError(f"{where} is no object in braces, but a {type(row).__name__}")
    return where, {name: cell for name, cell in row.items() if cell is not None and cell != ""}


def existing(path: Path) -> Path:
    """The path of a clip.

    Raises:
        AudioError: no sound file is there.
    """
    check(path)
    return path


def clip_in(cell: Any, folder: Path) -> Any:
    """A clip as parquet files hold it: its bytes, or a path relative to a folder.

    Raises:
        AudioError: no sound file at the path.
        ItemError: neither.
    """
    held = cell if isinstance(cell, dict) else {"path": cell}
    if held.get("bytes") is not None:
        return {"bytes": held["bytes"]}
    if not isinstance(held.get("path"), str):
        raise ItemError(f"the clip is neither bytes nor a path, but {cell!r}")
    return existing(folder / held["path"])


# -------------------------------------------------------------------------------- cells


def need(row: Row, column: str) -> str:
    """A cell that must be there, as text.

    Raises:
        ItemError: naming the columns that are.
    """
    if row.get(column) in (None, ""):
        raise ItemError(f"there is no {column}; the row has {', '.join(map(str, row))}")
    return str(row[column])


def facts(row: Row, besides: Iterable[str]) -> dict[str, Label]:
    """The further columns that hold a text or a number, as labels."""
    known = set(besides)
    return {n: x for n, x in row.items() if n not in known and isinstance(x, Label)}


def columns_of(
    table: str | Path, wanted: Mapping[str, Sequence[str]], given: Mapping[str, str]
) -> dict[str, str]:
    """Which columns of a table hold what is wanted, by its first row.

    Args:
        table: the table.
        wanted: names that each may have.
        given: names by what they hold, of the user.

    Raises:
        ItemError: no rows, or a column that is not found; naming those there are.
    """
    where, row = next(iter(rows_in(table)), (str(table), {}))
    if not row:
        raise ItemError(f"{table} holds no rows")
    found = dict(given)
    for what, names in wanted.items():
        found.setdefault(what, next((name for name in names if name in row), ""))
    missing = [what for what, name in found.items() if what not in wanted or name not in row]
    if missing:
        raise ItemError(
            f"{where}: no column holds the {missing[0]}; there is {', '.join(map(str, row))}. "
            f"Pass columns={{{missing[0]!r}: ...}}, of {', '.join(wanted)}"
        )
    return found


# -------------------------------------------------------------------------------- choices


def options_in(text: str) -> dict[str, str]:
    """The choices in a text by their letters: (a) one (b) two, [A] one, or A. one in lines."""
    found = _OPTION.findall(text) or _LINE.findall(text)
    return {letter.lower(): said for letter, said in found}


def unmarked(text: str) -> str:
    """A choice without its letter."""
    return _MARK.sub("", text).strip()


def right_of(said: str, options: Mapping[str, str]) -> str:
    """The right one of choices by letters; it may be told by its letter, its text, or both.

    Raises:
        ItemError: a letter and a text that are of different choices.
    """
    said = said.strip()
    if said in options.values():
        return said
    alone = re.fullmatch(r"[(\[]?([A-Za-z])[)\].:]?", said)
    if alone and alone[1].lower() in options:
        return options[alone[1].lower()]
    mark, answer = _MARK.match(said), unmarked(said)
    letter = (mark[1] or mark[2]).lower() if mark else None
    if letter is not None and options.get(letter, answer) != answer:
        raise ItemError(f"the answer is ({letter}) {answer}, but the text says {dict(options)}")
    return answer


def by_letter(choices: Sequence[str]) -> dict[str, str]:
    """Choices in their order, by letters; where all have their own, they lose them."""
    letters = [chr(ord("a") + i) for i in range(len(choices))]
    marks = [_MARK.match(str(choice)) for choice in choices]
    theirs = [(mark[1] or mark[2]).lower() if mark else None for mark in marks]
    said = [unmarked(str(x)) if theirs == letters else str(x).strip() for x in choices]
    return dict(zip(letters, said, strict=True))


def chosen(
    clip: Any, question: str, choices: Sequence[str], answer: Any, prompt: str, **known: Any
) -> Item:
    """The item of a question with its choices; None for an answer that is withheld.

    Args:
        prompt: holds {question} and {choices}.
        known: further fields of the item.
    """
    options = by_letter(choices)
    listed = " ".join(f"({letter}) {said}" for letter, said in options.items())
    return Item(
        clip,
        prompt.format(question=question.strip(), choices=listed),
        None if answer is None else right_of(str(answer), options),
        options=tuple(options.values()),
        **known,
    )


def of_choices(
    table: str | Path,
    audio_root: str | Path | None,
    named: Mapping[str, str],
    prompt: str,
    skip_bad: bool,
) -> Items:
    """The items of a list of questions whose choices are lists.

    Args:
        table: the list.
        audio_root: what its paths are relative to; None is its folder.
        named: its columns, by what they hold: audio, question, choices, answer.
        prompt: holds {question} and {choices}.
        skip_bad: leave out rows that cannot be used.
    """
    root = Path(table).parent if audio_root is None else Path(audio_root)
    make = partial(_of_choices, root=root, named=named, prompt=prompt)
    return gather(table, rows_in(table), make, skip_bad)


def _of_choices(row: Row, root: Path, named: Mapping[str, str], prompt: str) -> Item:
    choices = row.get(named["choices"])
    if not isinstance(choices, list) or not choices:
        raise ItemError(f"{named['choices']} is no list, but {choices!r}")
    labels = facts(row, {"id", *named.values()})
    known = {"labels": labels, "id": str(row.get("id", ""))}
    clip, answer = clip_in(row.get(named["audio"]), root), row.get(named["answer"])
    return chosen(clip, need(row, named["question"]), choices, answer, prompt, **known)
