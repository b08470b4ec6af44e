"""Tables of items: three kinds, there and back, and every bad row by its line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_lens import Item, ItemError, Items
from audio_lens.timeline import Span

KINDS = ("jsonl", "csv", "parquet")
TEXTGRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "theo - words"
        xmin = 0
        xmax = 1
        intervals: size = 2
        intervals [1]:
            xmin = 0
            xmax = 0.4
            text = ""
        intervals [2]:
            xmin = 0.4
            xmax = 1
            text = "seven"
    item [2]:
        class = "IntervalTier"
        name = "theo - {second}"
        xmin = 0
        xmax = 1
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 1
            text = "S"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    for name in ("a", "b"):
        samples = np.random.default_rng(ord(name)).uniform(-0.1, 0.1, 800)
        soundfile.write(tmp_path / "clips" / f"{name}.wav", samples, 8000)
    return tmp_path


def jsonl(folder: Path, *rows: dict) -> Path:
    path = folder / "items.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def whole(folder: Path) -> Items:
    """One item with everything, in files; one in memory, with nothing but odd text."""
    return Items(
        [
            Item(
                folder / "clips" / "a.wav",
                'Is it "a", or b?\nSay so.',
                "a",
                "b",
                ["a", "b", "neither"],
                {"speaker": "thé", "take": 3, "loud": True, "f0": 120.5},
                [Span(0.0, 0.05, "a"), Span(0.05, 0.1)],
                "theo",
                "first",
                other_audio=folder / "clips" / "b.wav",
                other_text="Is it b, or a?",
            ),
            Item(np.linspace(-1, 1, 321, dtype=np.float32), id="a/b", sampling_rate=16_000),
        ]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_read_as_they_were_written(kind: str, folder: Path) -> None:
    items = whole(folder)
    path = items.to_table(folder / f"items.{kind}")
    read = Items.from_table(path, verify=True)
    assert [item.told() for item in read] == [item.told() for item in items]
    assert [item.digest() for item in read] == [item.digest() for item in items]
    assert read[0].labels["loud"] is True and read[0].labels["take"] == 3
    again = folder / f"again.{kind}"
    assert Items.from_table(read.to_table(again)).digest() == items.digest()


def test_paths_are_relative_to_the_table(folder: Path, monkeypatch) -> None:
    path = whole(folder).to_table(folder / "items.jsonl")
    first, second = map(json.loads, path.read_text().splitlines())
    assert first["audio"] == "clips/a.wav" and second["audio"].startswith("items_audio/a-b-")
    moved = folder.rename(folder.with_name("moved"))
    assert len(Items.from_table(moved / "items.jsonl", verify=True)) == 2
    monkeypatch.chdir(moved)
    assert len(Items.from_table("items.jsonl")) == 2


def test_a_table_written_by_hand(folder: Path) -> None:
    path = folder / "by_hand.csv"
    path.write_text(
        "audio,text,answer,label.speaker,options\n"
        'clips/a.wav,"What, and\nwhen?",a,theo,"[""a"", ""b""]"\n'
        "clips/b.wav,Which?,,nicolas,\n"
    )
    one, two = Items.from_table(path)
    assert one.text == "What, and\nwhen?" and one.options == ("a", "b")
    assert two.answer is None and two.labels == {"speaker": "nicolas"}


def test_columns_of_other_names(folder: Path) -> None:
    path = jsonl(folder, {"file": "clips/a.wav", "who": "theo", "note": "x", "take": 1})
    columns = {"file": "audio", "who": "label.speaker", "note": None, "take": "id"}
    (item,) = Items.from_table(path, columns)
    assert item.labels == {"speaker": "theo"} and item.id == "1"
    with pytest.raises(ItemError, match=r"line 1: no column is called 'take'.*label\.take"):
        Items.from_table(path, columns | {"take": "take"})
    with pytest.raises(ItemError, match="two columns are both called 'audio'"):
        Items.from_table(path, columns | {"note": "audio"})


@pytest.mark.parametrize(
    "row, told",
    [
        ({"audio": "clips/gone.wav"}, "no audio file at .*clips/gone.wav"),
        ({"audio": "clips/a.wav", "other_audio": "gone.wav"}, "no audio file at .*gone.wav"),
        ({"text": "Which?"}, "the column audio is empty"),
        ({"audio": "clips/a.wav", "answer": 7}, "answer must be text, got 7"),
        ({"audio": "clips/a.wav", "id": 1.5}, "id must be text or a whole number"),
        ({"audio": "clips/a.wav", "options": "yes or no"}, "options must be a list"),
        ({"audio": "clips/a.wav", "options": [1]}, "options must be a list of texts"),
        ({"audio": "clips/a.wav", "labels": ["x"]}, "labels must be a mapping"),
        ({"audio": "clips/a.wav", "labels": {"x": [1]}}, "label 'x' is text or a number"),
        ({"audio": "clips/a.wav", "labels": {"x": 1}, "label.x": 2}, "'x' is given twice"),
        ({"audio": "clips/a.wav", "words": [{"label": "x"}]}, "words must be a list of"),
        ({"audio": "clips/a.wav", "words": [{"start_s": 1, "end_s": 0}]}, "end after it starts"),
        ({"audio": "clips/a.wav", "words": "gone.TextGrid"}, "no TextGrid at .*gone.TextGrid"),
        ({"audio": "clips/a.wav", "answer": "a", "against": "a"}, "both 'a'"),
        ({"audio": "clips/a.wav", "answer": "c", "options": ["a"]}, "none of the options"),
        ({"audio": "clips/a.wav", "words": "[{]"}, "words must be a list"),
        (
            {"audio": "clips/a.wav", "words": [{"label": "a", "start_s": 0.1, "end_s": 0.3}]},
            r"the word 'a' lies at 0\.10 to 0\.30 s, and the clip lasts 0\.10 s",
        ),
        ({"audio": "clips/a.wav", "id": "good"}, "items.jsonl line 1 is called 'good' too"),
    ],
)
def test_a_bad_row_is_named_by_its_line(row: dict, told: str, folder: Path, caplog) -> None:
    path = jsonl(folder, {"audio": "clips/a.wav", "id": "good"}, row)
    with pytest.raises(ItemError, match=rf"1 rows of .*\n  items.jsonl line 2: .*({told})"):
        Items.from_table(path)
    items = Items.from_table(path, skip_bad=True)
    assert [item.id for item in items] == ["good"]
    assert len(items.skipped) == 1 and "line 2" in items.skipped[0] and "line 2" in caplog.text


def test_every_bad_row_counts(folder: Path) -> None:
    path = jsonl(folder, *[{"audio": f"{i}.wav"} for i in range(8)])
    with pytest.raises(ItemError, match=r"8 rows of (.|\n)*line 5(.|\n)*and 3 more"):
        Items.from_table(path)
    with pytest.raises(ItemError, match=r"no items\n.*line 1"):
        Items.from_table(path, skip_bad=True)


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("a.jsonl", '{"audio": "clips/a.wav"}\n{"audio"\n', "a.jsonl line 2 is no JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl line 1 is no object"),
        ("a.jsonl", "\n\n", "holds no rows"),
        ("a.csv", "audio,text\nclips/a.wav\n", "a.csv line 2 has not as many cells"),
        ("a.csv", 'audio,text\n\nclips/a.wav,"x\ny",z\n', "a.csv line 3 has not as many"),
        ("a.csv", "audio,text\nclips/a.wav,x,y\n", "a.csv line 2 has not as many cells"),
        ("a.csv", "", "holds no rows"),
        ("a.csv", 'audio\n"x\n', "a.csv line 2: unexpected end"),
        ("a.parquet", "no parquet", "cannot be read as parquet"),
        ("a.txt", "x", "is no table: .jsonl, .csv, .parquet are"),
    ],
)
def test_what_is_no_table_says_so(name: str, text: str, told: str, folder: Path) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ItemError, match=told):
        Items.from_table(folder / name)


def test_missing_tables_and_odd_bytes_are_named(folder: Path) -> None:
    with pytest.raises(ItemError, match=r"no table at .*none\.csv"):
        Items.from_table(folder / "none.csv")
    with pytest.raises(ItemError, match="clips is a folder: name the table in it"):
        Items.from_table(folder / "clips")
    (folder / "latin.csv").write_bytes("audio\nclips/é.wav\n".encode("latin-1"))
    with pytest.raises(ItemError, match="no text in UTF-8"):
        Items.from_table(folder / "latin.csv")
    with pytest.raises(ItemError, match="names no kind of table"):
        whole(folder).to_table(folder / "items.txt")


def test_changed_clips_are_found(folder: Path) -> None:
    path = whole(folder).to_table(folder / "items.jsonl")
    soundfile.write(folder / "clips" / "b.wav", np.zeros(800), 8000)
    assert len(Items.from_table(path)) == 2
    with pytest.raises(ItemError, match="line 1: item 'first' has changed"):
        Items.from_table(path, verify=True)


def test_words_of_textgrids(folder: Path) -> None:
    pytest.importorskip("praatio")
    soundfile.write(folder / "clips" / "a.wav", np.full(8000, 0.1), 8000)
    (folder / "a.TextGrid").write_text(TEXTGRID.replace("{second}", "phones"))
    (item,) = Items.from_table(jsonl(folder, {"audio": "clips/a.wav", "words": "a.TextGrid"}))
    assert item.words == (Span(0.4, 1.0, "seven"),)
    (folder / "a.TextGrid").write_text(TEXTGRID.replace("theo - {second}", "words"))
    with pytest.raises(ItemError, match="has 2 tiers named words"):
        Items.from_table(folder / "items.jsonl")


def test_parquet_of_other_programs(folder: Path) -> None:
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    rows = [
        {
            "id": 4,
            "audio": "clips/a.wav",
            "options": ["a", "b"],
            "label.speaker": "theo",
            "label.age": 30.0,
            "words": [{"label": "a", "start_s": 0.0, "end_s": 0.1}],
        },
        {"id": 5, "audio": "clips/b.wav", "label.age": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "items.parquet")
    one, two = Items.from_table(folder / "items.parquet")
    assert one.labels == {"speaker": "theo", "age": 30.0} and one.words == (Span(0.0, 0.1, "a"),)
    assert two.labels == {} and two.id == "5"
