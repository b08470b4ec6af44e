"""Published sets of questions about audio, as `Items`; their audio is fetched by the user.

Tables of one's own are read by `Items.from_table`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from audio_lens.audio import AudioError, check
from audio_lens.errors import AudioLensError, InputError
from audio_lens.items.item import Item, ItemError
from audio_lens.items.items import Items, gathered
from audio_lens.items.tables import Row, rows_of

ATTRIBUTES = ("Animal", "Emotion", "Gender", "Language")
_OPTION = re.compile(r"\(([a-z])\)\s*(.*?)\s*(?=\([a-z]\)|$)", re.DOTALL)
_MARK = re.compile(r"^\(([a-z])\)\s*")
Made = Iterator[tuple[str, Item | AudioLensError, str | None]]


def sakura(
    folder: str | Path,
    attributes: Sequence[str] = ATTRIBUTES,
    hop: str = "single",
    *,
    skip_bad: bool = False,
) -> Items:
    """SAKURA: questions about the animal, emotion, gender or language in a clip.

    ``answer`` and ``options`` are the choices without their letters; labels are ``attribute``,
    ``label`` (what the clip holds) and whatever other columns there are. The animals are not
    balanced.

    Args:
        folder: of the set, with ``Gender/metadata.csv`` and ``Gender/audio/`` in it or in its
            ``data``.
        attributes: which of the four.
        hop: "single" is the question about the attribute, "multi" the one that needs knowledge
            beside it.
        skip_bad: leave out rows that cannot be used, and tell of each, in place of raising.

    Raises:
        ItemError: naming the file that is missing, or the rows that cannot be used.
        ValueError: another ``hop``.
    """
    root = Path(folder)
    root = root / "data" if (root / "data").is_dir() else root
    if hop not in ("single", "multi"):
        raise InputError(f"hop is 'single' or 'multi', got {hop!r}")

    def rows() -> Made:
        for attribute in attributes:
            for where, row in rows_of(root / attribute / "metadata.csv"):
                place = f"{attribute}/{where}"
                yield place, _made(_sakura_item, row, root / attribute, hop), None

    return gathered(root, rows(), skip_bad)


def _sakura_item(row: Row, folder: Path, hop: str) -> Item:
    name = _need(row, "file")
    text = _need(row, f"{hop}_instruction").strip()
    options = {letter: said for letter, said in _OPTION.findall(text)}
    answer = _need(row, f"{hop}_answer").strip()
    marked = _MARK.match(answer)
    if marked is not None:
        answer = _MARK.sub("", answer).strip()
        if options and options.get(marked[1], answer) != answer:
            raise ItemError(f"the answer is ({marked[1]}) {answer}, but the text says {options}")
    questions = {f"{h}_{what}" for h in ("single", "multi") for what in ("instruction", "answer")}
    facts = {k: x for k, x in row.items() if k not in {"file", "attribute_label", *questions}}
    return Item(
        _existing(folder / name if "/" in name else folder / "audio" / name),
        text,
        answer,
        options=tuple(options.values()),
        labels={"attribute": folder.name, "label": _need(row, "attribute_label"), **facts},
        id=f"{folder.name}/{Path(name).stem}",
    )


PROMPT = (
    'A transcript of the audio, which may be wrong: "{transcript}"\n'
    "Go by what you hear. {question}\nAnswer with one of: {choices}"
)


def alme(
    table: str | Path,
    audio_root: str | Path,
    *,
    tts: bool = False,
    prompt: str = PROMPT,
    skip_bad: bool = False,
) -> Items:
    """ALME: clips whose transcript contradicts them, each with a question of two choices.

    ``answer`` is what the clip says, ``against`` what the transcript says, and ``other_text`` the
    same prompt with the right transcript. Labels are ``language`` and ``flip_type``; items of one
    clip are a group.

    Args:
        table: ``stimuli.jsonl``.
        audio_root: what its paths are relative to: the folder of Common Voice 22.0, or with
            ``tts`` that of the synthesised clips.
        tts: take ``{language}/tts_{stimulus_id}.wav`` in place of the recordings.
        prompt: holds {transcript}, {question} and {choices}; the published one also tells the
            model to go by what it hears, and shares of followed transcripts depend on it.
        skip_bad: leave out rows that cannot be used, and tell of each, in place of raising.

    Raises:
        ItemError: naming the lines that cannot be used: a clip that is missing, by its path, or a
            question that has not two choices.
    """

    def rows() -> Made:
        for where, row in rows_of(table):
            yield where, _made(_alme_item, row, Path(audio_root), tts, prompt), None

    return gathered(table, rows(), skip_bad)


def _alme_item(row: Row, audio_root: Path, tts: bool, prompt: str) -> Item:
    name, language, clip = (_need(row, key) for key in ("stimulus_id", "language", "audio_path"))
    question = row.get("question")
    if not isinstance(question, dict):
        raise ItemError(f"question is no mapping, but {question!r}")
    choices, answer = question.get("choices"), _need(question, "correct_answer")
    if not isinstance(choices, list) or len(choices) != 2 or answer not in choices:
        raise ItemError(
            f"what the transcript says is the other of two choices; {answer!r} among {choices} "
            "leaves it open"
        )
    told = {"question": _need(question, "question_text"), "choices": ", ".join(choices)}
    path = f"{language.lower()}/tts_{name}.wav" if tts else clip
    return Item(
        _existing(audio_root / path),
        prompt.format(transcript=_need(row, "conflict_text"), **told),
        answer,
        next(choice for choice in choices if choice != answer),
        choices,
        labels={"language": language, "flip_type": question.get("flip_type") or "unknown"},
        group=clip,
        id=name,
        other_text=prompt.format(transcript=_need(row, "ref_text"), **told),
    )


def _made(make: Any, *given: Any) -> Item | AudioLensError:
    """The item, or why there is none."""
    try:
        return make(*given)
    except (ItemError, AudioError) as error:
        return error


def _need(row: Row, column: str) -> str:
    if row.get(column) in (None, ""):
        raise ItemError(f"there is no {column}; the row has {', '.join(row)}")
    return str(row[column])


def _existing(path: Path) -> Path:
    check(path)
    return path
