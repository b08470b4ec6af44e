"""ALME: clips whose transcript contradicts them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from audio_lens.items.item import Item, ItemError
from audio_lens.items.items import Items
from audio_lens.items.read.rows import existing, gather, need
from audio_lens.items.tables import Row, rows_of

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
    make = partial(_item, audio_root=Path(audio_root), tts=tts, prompt=prompt)
    return gather(table, rows_of(table), make, skip_bad)


def _item(row: Row, audio_root: Path, tts: bool, prompt: str) -> Item:
    name, language, clip = (need(row, key) for key in ("stimulus_id", "language", "audio_path"))
    question = row.get("question")
    if not isinstance(question, dict):
        raise ItemError(f"question is no mapping, but {question!r}")
    choices, answer = question.get("choices"), need(question, "correct_answer")
    if not isinstance(choices, list) or len(choices) != 2 or answer not in choices:
        raise ItemError(
            f"what the transcript says is the other of two choices; {answer!r} among {choices} "
            "leaves it open"
        )
    told = {"question": need(question, "question_text"), "choices": ", ".join(choices)}
    path = f"{language.lower()}/tts_{name}.wav" if tts else clip
    return Item(
        existing(audio_root / path),
        prompt.format(transcript=need(row, "conflict_text"), **told),
        answer,
        next(choice for choice in choices if choice != answer),
        choices,
        labels={"language": language, "flip_type": question.get("flip_type") or "unknown"},
        group=clip,
        id=name,
        other_text=prompt.format(transcript=need(row, "ref_text"), **told),
    )
