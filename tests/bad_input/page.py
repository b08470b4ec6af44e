"""The page of what bad input gets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "bad_input.md"
START = "<!-- written by python tests/bad_input --write -->"
MOST_LETTERS = 240  # of a message


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        error: the name of the exception's class; empty where there was none.
        message: what it said, or what came in its place.
        is_ours: whether the exception is the library's.
        n_blocks: how many blocks of the model ran.
        seconds: how long it took.
    """

    subject: str
    what: str
    error: str
    message: str
    is_ours: bool
    n_blocks: int
    seconds: float


def table(found: Sequence[Outcome]) -> str:
    """A heading and a table for every subject."""
    parts = [f"{len(found)} cases."]
    for subject, some in itertools.groupby(found, lambda one: one.subject):
        rows = [f"| {_cell(one.what)} | `{one.error}` | {_cell(one.message)} |" for one in some]
        parts.append(
            "\n".join(
                [f"## {_cell(subject)}\n", "| given | raised | said |", "|---|---|---|", *rows]
            )
        )
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    text = " ".join(text.split())
    text = text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 1]}…"
    for letter in "\\`*_{}[]<>|":
        text = text.replace(letter, f"\\{letter}" if letter not in "<>|" else f"&#{ord(letter)};")
    return text


def written() -> str:
    """The tables as they stand on the page."""
    return PAGE.read_text(encoding="utf-8").partition(START)[2].strip()


def write(found: Sequence[Outcome]) -> None:
    """Put the tables into the page."""
    head = PAGE.read_text(encoding="utf-8").partition(START)[0]
    PAGE.write_text(f"{head}{START}\n\n{table(found)}\n", encoding="utf-8")
