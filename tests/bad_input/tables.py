"""Tables of items, items, and the command that runs methods over them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from audio_lens import Item, Items, Result, statistics
from audio_lens.items import analysis, demo_items
from bad_input.commands import run
from bad_input.world import NAN, RATE, Case, clip, model, named, shipped, wav, written


@analysis("bad_input")
def method(model: Any, items: Items, *, seed: int = 0, progress: bool | None = None) -> Result:
    """Never reached."""
    raise AssertionError("ran")


def _row(**changes: Any) -> dict[str, Any]:
    return {
        "audio": str(shipped().clean),
        "text": shipped().question,
        "answer": shipped().answer,
        "against": shipped().against,
    } | changes


def _table(*rows: dict[str, Any]) -> Path:
    return written("items.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))


def _read(**changes: Any) -> Items:
    """A table whose second row has something else."""
    return Items.from_table(_table(_row(), _row(**changes)))


def _file(name: str, content: str | bytes) -> Items:
    return Items.from_table(written(name, content))


def _word(start_s: float, end_s: float) -> list[dict[str, Any]]:
    return [{"label": "two", "start_s": start_s, "end_s": end_s}]


def _items(**changes: Any) -> Items:
    return Items([Item(**_row(id="a")), Item(**_row(id="b") | changes)])


def _analysed(*rows: dict[str, Any], **options: Any) -> Callable[[], Any]:
    """The command, on a table of these rows."""
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    return lambda: run("analyse", "bad_input", "--items", _table(*rows), *given)


TABLES = {
    "a table that is not there": lambda: Items.from_table("nothing.jsonl"),
    "a folder": lambda: Items.from_table("."),
    "a table called .json": lambda: _file("items.json", "[]"),
    "a table without rows": lambda: _file("items.csv", "audio,text\n"),
    "a line that is no JSON": lambda: _file("no.jsonl", '{"audio": "a.wav"}\nno\n'),
    "a line that is a list": lambda: _file("list.jsonl", "[1, 2]\n"),
    "a text in Latin-1": lambda: _file("latin.csv", "audio\ncaf\xe9.wav\n".encode("latin-1")),
    "a csv row that lacks a cell": lambda: _file("short.csv", "audio,text\na.wav\n"),
    "a text called .parquet": lambda: _file("text.parquet", "no parquet"),
    "a column that means nothing": lambda: _read(anwser="two"),
    "a row without audio": lambda: _read(audio=""),
    "a clip that is not there": lambda: _read(audio="gone.wav"),
    "a counterpart that is not there": lambda: _read(other_audio="gone.wav"),
    "a clip without samples": lambda: _read(audio=str(wav("none.wav", np.zeros(0)))),
    "a TextGrid that is not there": lambda: _read(words="gone.TextGrid"),
    "words beyond the clip": lambda: _read(words=_word(8.0, 9.0)),
    "words that end before they start": lambda: _read(words=_word(1.0, 0.5)),
    "words that are a mapping": lambda: _read(words={"two": 1.0}),
    "options that are a text": lambda: _read(options="two or nine"),
    "an answer that is no option": lambda: _read(options=["one", "nine"]),
    "an answer that is a number": lambda: _read(answer=2),
    "the same answer on both sides": lambda: _read(against="two"),
    "labels that are a list": lambda: _read(labels=["theo"]),
    "a label of NaN": lambda: Items([Item(clip(), labels={"f0": NAN})]),
    "two items of one name": lambda: Items.from_table(_table(_row(id="a"), _row(id="a"))),
    "a table of another ending": lambda: demo_items().to_table("items.txt"),
}

ITEMS = {
    "no items": lambda: Items([]),
    "samples without a rate": lambda: Items([Item(clip())]).digest(),
    "a label that items do not have": lambda: _items().values("speaker"),
    "a filter that leaves none": lambda: _items().filter(answer="seven"),
    "a label that splits nothing": lambda: _items(labels={}).split("answer"),
    "a share of NaN": lambda: demo_items().split(share=NAN),
    "options that are unequal": lambda: Items(
        [Item(clip(), options=["a", "b"]), Item(clip(), options=["a", "c"])]
    ).common_options(),
    "an answer of two tokens": lambda: _items(answer="two nine").metrics(model()),
    "an item without an answer": lambda: _items(answer=None).metrics(model()),
    "a clip of NaN samples": lambda: _items(
        audio=np.full(RATE, NAN), sampling_rate=RATE
    ).usable(model()),
    "a clip longer than the model takes": lambda: _items(
        audio=np.full(6 * RATE, 0.1), sampling_rate=RATE
    ).usable(model()),
    "an item without a text": lambda: _items(text=None).usable(model()),
    "batches of 0 items": lambda: list(_items().batches(model(), 0)),
    "items without counterparts": lambda: _items().pairs(),
    "items with two counterparts": lambda: demo_items().pairs(),
    "a stream that is none": lambda: demo_items().pairs(stream="video"),
    "another item of one": lambda: statistics.other_item(1),
    "labels of one item, permuted": lambda: statistics.permuted_labels(["a"]),
}  # fmt: skip

COMMANDS = {
    "analyse a method that is none": lambda: run("analyse", "bad_inptu"),
    "analyse --items of a file that is not there": lambda: run(
        "analyse", "bad_input", "--items", "nothing.jsonl"
    ),
    "analyse --items .": lambda: run("analyse", "bad_input", "--items", "."),
    "analyse --out of no method": lambda: run("analyse", "--out", "page.html"),
    "analyse --save to a folder that cannot be made": lambda: run(
        "analyse", "bad_input", "--save", "/proc/nowhere/a.nc"
    ),
    "analyse --seed -1": lambda: run("analyse", "bad_input", "--seed", "-1"),
    "analyse one item": _analysed(_row()),
    "analyse a table without rows": _analysed(),
    "analyse a clip that is not there": _analysed(_row(), _row(audio="gone.wav")),
    "analyse NaN samples": lambda: _analysed(
        _row(), _row(audio=str(wav("nan.wav", np.full(RATE, NAN), subtype="FLOAT")))
    )(),
    "analyse answers of two tokens": _analysed(_row(), _row(answer="two nine")),
    "analyse an item that lacks its answer": _analysed(_row(), _row(answer=None)),
    "analyse over the table": _analysed(_row(), _row(), out="items.jsonl"),
}

CASES: list[Case] = [
    *named("Tables of items", TABLES),
    *named("Items", ITEMS),
    *named("Methods from a shell", COMMANDS),
]
