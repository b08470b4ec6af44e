"""Readers of published sets and of manifests, on small files of their form."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from audio_lens import ItemError, Items
from audio_lens.items import read
from audio_lens.items.read.rows import by_letter, options_in, right_of
from audio_lens.timeline import Span

RATE = 8000


def sound(path: Path, seconds: float = 0.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.linspace(0, 0.5, round(seconds * RATE)), RATE)
    return path


def listed(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    pyarrow, tables = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    path.parent.mkdir(parents=True, exist_ok=True)
    tables.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


# -------------------------------------------------------------------------------- choices


@pytest.mark.parametrize(
    "text",
    [
        "Which? (a) a dog (b) a cat",
        "Which? [A] a dog [B] a cat",
        "Which?\nA. a dog\nB. a cat\n",
        "Which?\nA) a dog\n  B) a cat",
    ],
)
def test_choices_of_a_text(text: str) -> None:
    assert options_in(text) == {"a": "a dog", "b": "a cat"}


@pytest.mark.parametrize("said", ["a cat", " (b) a cat", "B", "(b)", "B.", "b", "B. a cat"])
def test_the_right_one_may_be_told_in_many_ways(said: str) -> None:
    assert right_of(said, {"a": "a dog", "b": "a cat"}) == "a cat"


def test_a_letter_and_a_text_must_agree() -> None:
    with pytest.raises(ItemError, match=r"the answer is \(a\) a cat"):
        right_of("(a) a cat", {"a": "a dog", "b": "a cat"})
    assert right_of("A", {"x": "A", "a": "B"}) == "A"  # a choice is taken before a letter


def test_choices_lose_letters_of_their_own_alone() -> None:
    assert by_letter(["(A) a dog", "(B) a cat"]) == {"a": "a dog", "b": "a cat"}
    assert by_letter(["I. Newton", "A. Lincoln"]) == {"a": "I. Newton", "b": "A. Lincoln"}


# -------------------------------------------------------------------------------- MMAU, MMAR


def question(name: str, column: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": name,
        column: f"./audios/{name}.wav",
        "question": "Who barks? ",
        "choices": ["(A) a dog", "(B) a cat"],
        "answer": "(A) a dog",
        "category": "Reasoning",
        "sub-category": "Event",
        "task": "sound",
        "difficulty": "easy",
        "other": [1],
    } | changes


@pytest.mark.parametrize(
    "reader, column", [(read.mmau, "audio_id"), (read.mmar, "audio_path")], ids=["mmau", "mmar"]
)
def test_questions_with_lists_of_choices(reader: Any, column: str, tmp_path: Path) -> None:
    rows = [question("x", column), question("y", column, answer="a cat", choices=["a cat", "b"])]
    withheld = question("z", column)
    del withheld["answer"]
    for name in "xyz":
        sound(tmp_path / "audios" / f"{name}.wav")
    table = listed(tmp_path / "list.json", [*rows, withheld])
    one, two, three = reader(table)
    assert one.text == "Who barks?\n(a) a dog (b) a cat"
    assert (one.answer, one.options, two.answer) == ("a dog", ("a dog", "a cat"), "a cat")
    assert three.answer is None and one.id == "x"
    assert one.labels["sub-category"] == "Event" and "other" not in one.labels
    assert reader(table, prompt="{choices}|{question}")[0].text.endswith("|Who barks?")
    (tmp_path / "audios" / "y.wav").unlink()
    with pytest.raises(ItemError, match=r"list.json entry 2: no audio file at .*audios/y\.wav"):
        reader(table)
    assert len(reader(table, skip_bad=True)) == 2
    with pytest.raises(ItemError, match=r"no audio file at .*elsewhere/audios/x\.wav"):
        reader(table, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"choices": "a, b"}, "choices is no list"),
        ({"choices": []}, "choices is no list"),
        ({"answer": "a cow"}, "answer 'a cow' is none of the options"),
        ({"question": None}, "there is no question"),
        ({"audio_id": None}, "neither bytes nor a path"),
    ],
)
def test_questions_that_cannot_be_used(changes: dict, told: str, tmp_path: Path) -> None:
    sound(tmp_path / "audios" / "x.wav")
    table = listed(tmp_path / "list.json", [question("x", "audio_id", **changes)])
    with pytest.raises(ItemError, match=rf"list.json entry 1: .*{told}"):
        read.mmau(table)


@pytest.mark.parametrize(
    "content, told", [("{}", "holds no list"), ("[", "is no JSON"), ("[1]", "entry 1 is no object")]
)
def test_lists_that_are_none(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(ItemError, match=told):
        read.mmau(tmp_path / "list.json")
    with pytest.raises(ItemError, match=r"no table at .*none\.json"):
        read.mmar(tmp_path / "none.json")


# -------------------------------------------------------------------------------- AIR-Bench


def air(name: str, task: str, **changes: Any) -> dict[str, Any]:
    known = {"uniq_id": name, "path": f"{name}.wav", "task_name": task, "dataset_name": "set"}
    asked = {"question": "Who?", "choice_a": "male", "choice_b": "female", "choice_c": None}
    return known | asked | {"choice_d": None, "answer_gt": "female"} | changes


def test_air_bench(tmp_path: Path) -> None:
    sound(tmp_path / "Gender_set" / "1.wav")
    sound(tmp_path / "Audio_Grounding_set" / "2.flac")
    rows = [air("1", "Gender"), air("2", "Audio_Grounding", choice_c="both")]
    listed(tmp_path / "Foundation_meta.json", rows)
    one, two = read.air_bench(tmp_path)
    assert (one.answer, one.options) == ("female", ("male", "female")) and len(two.options) == 3
    assert one.labels == {"task": "Gender", "dataset": "set"}
    assert two.audio.name == "2.flac"
    chat = air("1", "Gender", meta_info={"who": "she"}, answer_gt="A woman speaks.")
    listed(tmp_path / "Chat_meta.json", [chat])
    (item,) = read.air_bench(tmp_path, "chat")
    assert item.answer is None and item.text == "Who?"
    assert item.labels["reference"] == "A woman speaks."
    assert item.labels["meta_info"] == '{"who": "she"}'
    listed(tmp_path / "Foundation_meta.json", [air("3", "Gender")])
    with pytest.raises(ItemError, match=r"entry 1: no audio file at .*Gender_set/3\.wav"):
        read.air_bench(tmp_path)
    with pytest.raises(ValueError, match="part is one of foundation, chat"):
        read.air_bench(tmp_path, "all")


# -------------------------------------------------------------------------------- parquet


def test_voicebench(tmp_path: Path) -> None:
    clip = {"bytes": sound(tmp_path / "a.wav").read_bytes(), "path": "a.wav"}
    prompt = "What heats?\nA. the sun\nB. the moon"
    rows = [{"audio": clip, "prompt": prompt, "reference": "A", "domain": "physics"}]
    parquet(tmp_path / "mmsu" / "law-00000-of-00001.parquet", rows)
    (item,) = read.voicebench(tmp_path, "mmsu")
    assert (item.answer, item.options, item.text) == ("the sun", ("the sun", "the moon"), None)
    assert item.labels["letter"] == "A" and item.labels["domain"] == "physics"
    assert item.labels["part"] == "law" and item.duration_s == 0.5
    again = Items.from_table(Items([item]).to_table(tmp_path / "items.jsonl"), verify=True)
    assert again[0].duration_s == 0.5
    with pytest.raises(ValueError, match="advbench asks for what is harmful: read openbookqa"):
        read.voicebench(tmp_path, "advbench")
    with pytest.raises(ValueError, match="ifeval has no choices"):
        read.voicebench(tmp_path, "ifeval")
    with pytest.raises(ItemError, match=r"no parquet files in .*openbookqa"):
        read.voicebench(tmp_path)
    parquet(tmp_path / "mmsu" / "b.parquet", [{"audio": clip, "prompt": "Hm?", "reference": "A"}])
    with pytest.raises(ItemError, match=r"b.parquet row 1: the prompt has no choices"):
        read.voicebench(tmp_path, "mmsu")


def test_temporal_lalm(tmp_path: Path) -> None:
    clip = {"bytes": sound(tmp_path / "a.wav").read_bytes(), "path": None}
    row = {"question": "Which is first?", "options": ["a bell", "a dog"], "answer": "B"}
    path = parquet(tmp_path / "t.parquet", [row | {"clip": clip, "kind": "order"}])
    with pytest.raises(
        ItemError, match=r"no column holds the audio; there is question.*clip, kind"
    ):
        read.temporal_lalm(path)
    with pytest.raises(ItemError, match="no column holds the sound"):
        read.temporal_lalm(path, {"audio": "clip", "sound": "clip"})
    (item,) = read.temporal_lalm(path, {"audio": "clip"})
    assert (item.answer, item.labels) == ("a dog", {"kind": "order"})
    table = tmp_path / "t.jsonl"
    table.write_text(json.dumps(row | {"audio": "gone.wav"}))
    with pytest.raises(ItemError, match=r"t.jsonl line 1: no audio file at .*gone\.wav"):
        read.temporal_lalm(table)
    table.write_text("")
    with pytest.raises(ItemError, match="holds no rows"):
        read.temporal_lalm(table)


# -------------------------------------------------------------------------------- emotions

RATED = """% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]
C-E2:\tNeutral;\t()
[10.0 - 11.0]\tSes01F_impro01_M001\texc\t[4.0000, 3.0000, 2.0000]
[12.0 - 13.0]\tSes01F_impro01_M002\tfru\t[1.0000, 1.0000, 1.0000]
"""


def test_iemocap(tmp_path: Path) -> None:
    wavs = tmp_path / "Session1" / "sentences" / "wav" / "Ses01F_impro01"
    for name in ("F000", "M001"):
        sound(wavs / f"Ses01F_impro01_{name}.wav")
    table = tmp_path / "Session1" / "dialog" / "EmoEvaluation" / "Ses01F_impro01.txt"
    table.parent.mkdir(parents=True)
    table.write_text(RATED)
    one, two = read.iemocap(tmp_path)
    assert [one.answer, two.answer] == ["neutral", "happy"] and two.labels["code"] == "exc"
    assert one.options == ("angry", "happy", "neutral", "sad")
    assert [one.group, two.group] == ["Ses01F", "Ses01M"]
    assert (two.labels["valence"], two.labels["dialog"]) == (4.0, "Ses01F_impro01")
    with pytest.raises(ItemError, match=r"impro01.txt line 6: no audio file at .*M002\.wav"):
        read.iemocap(tmp_path, emotions={"fru": "frustrated", "neu": "neutral"})
    table.write_text("[6.2 - 8.2] Ses01F_impro01_F000 neu\n")
    with pytest.raises(ItemError, match="line 1 is no rated utterance"):
        read.iemocap(tmp_path)
    with pytest.raises(ItemError, match=r"no rated dialogues at .*nowhere/Session1"):
        read.iemocap(tmp_path / "nowhere")


def test_crema_d(tmp_path: Path) -> None:
    sound(tmp_path / "AudioWAV" / "1001_DFA_ANG_XX.wav")
    sound(tmp_path / "AudioWAV" / "1002_IEO_SAD_HI.wav")
    one, two = read.crema_d(tmp_path, text="How?")
    assert (one.answer, one.group, one.id) == ("angry", "1001", "1001_DFA_ANG_XX")
    assert two.labels == {"emotion": "sad", "actor": "1002", "sentence": "IEO", "level": "high"}
    assert one.text == "How?" and len(one.options) == 6
    sound(tmp_path / "AudioWAV" / "noise.wav")
    with pytest.raises(ItemError, match=r"noise.wav: its name is none of \{actor\}"):
        read.crema_d(tmp_path)
    assert len(read.crema_d(tmp_path, skip_bad=True)) == 2
    with pytest.raises(ItemError, match=r"no wav files in .*nowhere"):
        read.crema_d(tmp_path / "nowhere")


def test_musdb18(tmp_path: Path) -> None:
    for part, track in (("train", "A - One"), ("test", "B - Two")):
        for stem in ("vocals", "drums", "mixture"):
            sound(tmp_path / part / track / f"{stem}.wav", 2.0)
    items = read.musdb18(tmp_path, ["vocals", "drums", "mixture"], text="Which?")
    assert [item.answer for item in items] == 2 * ["vocals", "drums", None]
    assert items[0].labels == {"stem": "vocals", "track": "A - One", "part": "train"}
    assert items[0].options == ("vocals", "drums") and items[0].group == "A - One"
    (one, _) = read.musdb18(tmp_path, ["vocals", "drums"], part="test", start_s=0.5, seconds=1)
    assert one.id == "B - Two/vocals" and one.duration_s == 1.0
    assert read.musdb18(tmp_path, ["drums"], start_s=0.5)[0].duration_s == 1.5
    with pytest.raises(ItemError, match=r"A - One/bass.*bass\.wav"):
        read.musdb18(tmp_path)
    assert len(read.musdb18(tmp_path, skip_bad=True)) == 4
    with pytest.raises(ItemError, match=r"is no stretch of .*vocals\.wav"):
        read.musdb18(tmp_path, ["vocals"], start_s=1.5, seconds=1.0)
    with pytest.raises(ValueError, match="stems are some of vocals"):
        read.musdb18(tmp_path, ["voice"])
    with pytest.raises(ValueError, match="part is train or test"):
        read.musdb18(tmp_path, part="valid")
    packed = tmp_path / "packed" / "train" / "A.stem.mp4"
    packed.parent.mkdir(parents=True)
    packed.write_bytes(b"")
    with pytest.raises(ItemError, match=r"no tracks at .*A\.stem\.mp4 is packed"):
        read.musdb18(tmp_path / "packed")


# -------------------------------------------------------------------------------- manifests


def test_nemo(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav", 2.0)
    rows = [
        {"audio_filepath": "a.wav", "duration": 2.0, "text": "hello", "speaker": 7, "lang": "en"},
        {"audio_filepath": "a.wav", "offset": 0.5, "duration": 1.0, "text": "lo"},
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    one, two = read.nemo(path, text="What is said?")
    assert one.audio == tmp_path / "a.wav" and one.group == "7" and one.text == "What is said?"
    assert one.labels == {"transcript": "hello", "speaker": 7, "lang": "en"}
    assert two.duration_s == 1.0
    whole, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    assert np.array_equal(two.clip["array"], whole[RATE // 2 : RATE // 2 + RATE])
    again = Items.from_table(Items([one, two]).to_table(tmp_path / "items.jsonl"), verify=True)
    assert again.digest() == Items([one, two]).digest()
    for change, told in (
        ({"audio_filepath": "b.wav"}, r"no audio file at .*b\.wav"),
        ({"offset": 1.5, "duration": 1.0}, "1.50 to 2.50 s is no stretch of .*lasts 2.00 s"),
        ({"duration": "2"}, "duration is a number of seconds, got '2'"),
    ):
        path.write_text(json.dumps(rows[0] | change))
        with pytest.raises(ItemError, match=rf"m.jsonl line 1: .*{told}"):
            read.nemo(path)


def cut(**changes: Any) -> dict[str, Any]:
    source = {"type": "file", "channels": [0], "source": "a.wav"}
    recording = {"id": "r", "sources": [source], "sampling_rate": RATE, "duration": 2.0}
    said = {"id": "s", "text": "good day", "speaker": "theo", "language": "en", "start": 0.0}
    said |= {"alignment": {"word": [["good", 0.0, 0.4], ["day", 0.4, 0.3, 0.9]]}}
    known = {"id": "c", "start": 0.5, "duration": 1.0, "channel": 0, "type": "MonoCut"}
    return known | {"supervisions": [said], "recording": recording} | changes


def test_lhotse(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav", 2.0)
    path = tmp_path / "cuts.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(cut(custom={"snr": 10.0})) + "\n")
    (item,) = read.lhotse(path)
    assert item.words == (Span(0.0, 0.4, "good"), Span(0.4, 0.7, "day"))
    assert (item.group, item.id, item.duration_s) == ("theo", "c", 1.0)
    assert item.labels == {
        "snr": 10.0,
        "language": "en",
        "speaker": "theo",
        "transcript": "good day",
    }
    path.write_bytes(b"no gzip")
    with pytest.raises(ItemError, match="holds no packed JSON lines"):
        read.lhotse(path)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"type": "MixedCut"}, "a cut of one recording is read, and this is a MixedCut"),
        ({"recording": {"sources": [{"type": "url", "source": "x"}]}}, "save it"),
        ({"recording": cut()["recording"] | {"transforms": [{"name": "Speed"}]}}, "save it"),
        ({"supervisions": [{}, {}]}, "it has 2 supervisions"),
        ({"start": 1.5}, "is no stretch"),
        ({"supervisions": [{"alignment": {"word": [["good"]]}}]}, "the alignment holds no"),
    ],
)
def test_cuts_that_cannot_be_used(changes: dict, told: str, tmp_path: Path) -> None:
    sound(tmp_path / "a.wav", 2.0)
    (tmp_path / "cuts.jsonl").write_text(json.dumps(cut(**changes)))
    with pytest.raises(ItemError, match=rf"cuts.jsonl line 1: .*{told}"):
        read.lhotse(tmp_path / "cuts.jsonl")
