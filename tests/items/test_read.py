"""Readers of published sets, on tables of their form."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_lens import ItemError
from audio_lens.items import read

COLUMNS = (
    *("file", "attribute_label", "single_instruction", "single_answer"),
    *("multi_instruction", "multi_answer"),
)
GENDERS = [
    (
        "a.wav",
        "Male",
        "Which gender? (a) Male (b) Female",
        " (a) Male",
        "Who? (a) Bob (b) Eve",
        "Bob",
    ),
    (
        "b.wav",
        "Female",
        "Which gender?\n(a) Female\n(b) Male",
        "(a) Female",
        "Who? (a) X (b) Y",
        "(b) Y",
    ),
]


def sound(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(400, 0.1), 8000)


def sakura(root: Path, rows: list, columns: tuple = COLUMNS) -> Path:
    for name, *_ in rows:
        sound(root / "data" / "Gender" / "audio" / name)
    with open(root / "data" / "Gender" / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return root


def stimulus(name: str = "EN_1", **changes: object) -> dict:
    question = {
        "question_text": "Is it hot?",
        "choices": ["yes", "no"],
        "correct_answer": "yes",
        "flip_type": "adjective_swap",
    }
    return {
        "stimulus_id": name,
        "audio_path": "en/clips/x.wav",
        "language": "EN",
        "ref_text": "It is hot.",
        "conflict_text": "It is cold.",
        "question": question | changes,
    }


def alme(root: Path, *rows: dict) -> Path:
    sound(root / "cv" / "en" / "clips" / "x.wav")
    path = root / "stimuli.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_sakura(tmp_path: Path) -> None:
    one, two = read.sakura(sakura(tmp_path, GENDERS), ["Gender"])
    assert (one.answer, one.options, one.labels["label"]) == ("Male", ("Male", "Female"), "Male")
    assert two.options == ("Female", "Male") and two.id == "Gender/b"
    assert one.text == GENDERS[0][2] and one.labels["attribute"] == "Gender"
    assert one.audio == tmp_path / "data" / "Gender" / "audio" / "a.wav"
    multi = read.sakura(tmp_path / "data", ["Gender"], hop="multi")
    assert [item.answer for item in multi] == ["Bob", "Y"]


def test_sakura_keeps_further_columns(tmp_path: Path) -> None:
    rows = [(*row, "loud") for row in GENDERS]
    items = read.sakura(sakura(tmp_path, rows, (*COLUMNS, "how")), ["Gender"])
    assert items.values("how") == ["loud", "loud"]


def test_sakura_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ItemError, match=r"no table at .*Animal/metadata\.csv"):
        read.sakura(sakura(tmp_path, GENDERS))
    (tmp_path / "data" / "Gender" / "audio" / "b.wav").unlink()
    with pytest.raises(ItemError, match=r"Gender/metadata.csv line 3: no audio file at .*b\.wav"):
        read.sakura(tmp_path, ["Gender"])
    items = read.sakura(tmp_path, ["Gender"], skip_bad=True)
    assert len(items) == 1 and len(items.skipped) == 1
    with pytest.raises(ValueError, match="single"):
        read.sakura(tmp_path, ["Gender"], hop="both")


@pytest.mark.parametrize(
    "answer, told",
    [("(b) Male", "the text says"), ("Neither", "none of the options"), ("", "no single_answer")],
)
def test_sakura_answers_must_fit(answer: str, told: str, tmp_path: Path) -> None:
    rows = [(*GENDERS[0][:3], answer, *GENDERS[0][4:])]
    with pytest.raises(ItemError, match=rf"line 2: .*{told}"):
        read.sakura(sakura(tmp_path, rows), ["Gender"])


def test_alme(tmp_path: Path) -> None:
    table = alme(tmp_path, stimulus(), stimulus("EN_2", correct_answer="no"))
    one, two = read.alme(table, tmp_path / "cv")
    assert (one.answer, one.against, two.answer, two.against) == ("yes", "no", "no", "yes")
    assert "It is cold." in str(one.text) and "It is hot." in str(one.other_text)
    assert one.labels == {"language": "EN", "flip_type": "adjective_swap"}
    assert one.group == two.group == "en/clips/x.wav" and one.id == "EN_1"
    own = read.alme(table, tmp_path / "cv", prompt="{transcript}|{question}|{choices}")
    assert own[0].text == "It is cold.|Is it hot?|yes, no"


def test_alme_of_synthesised_clips(tmp_path: Path) -> None:
    sound(tmp_path / "tts" / "en" / "tts_EN_1.wav")
    (item,) = read.alme(alme(tmp_path, stimulus()), tmp_path / "tts", tts=True)
    assert item.audio == tmp_path / "tts" / "en" / "tts_EN_1.wav"


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"choices": ["yes", "no", "maybe"]}, "leaves it open"),
        ({"correct_answer": "maybe"}, "leaves it open"),
        ({"question_text": None}, "there is no question_text"),
    ],
)
def test_alme_names_lines_that_cannot_be_used(changes: dict, told: str, tmp_path: Path) -> None:
    table = alme(tmp_path, stimulus(), stimulus("EN_2", **changes))
    with pytest.raises(ItemError, match=rf"stimuli.jsonl line 2: .*{told}"):
        read.alme(table, tmp_path / "cv")


def test_alme_names_the_clip_that_is_missing(tmp_path: Path) -> None:
    table = alme(tmp_path, stimulus())
    with pytest.raises(ItemError, match=r"line 1: no audio file at .*elsewhere/en/clips/x\.wav"):
        read.alme(table, tmp_path / "elsewhere")
    table.write_text(json.dumps(stimulus() | {"question": None}))
    with pytest.raises(ItemError, match="question is no mapping"):
        read.alme(table, tmp_path / "cv")
