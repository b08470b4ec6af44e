"""Measure the embedded model: ``python -m audio_lens.models.embedded.training.evaluate``.

Writes ``metrics.json`` and the model card beside this file. Clips are drawn with fixed seeds from
words that were not trained on: other takes of the seen speakers, all of the unseen speakers,
other settings of the seen voices, and the voices held out.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from audio_lens.models.embedded import CHECKPOINT
from audio_lens.models.embedded.training import acoustics, material, questions, scenes
from audio_lens.models.embedded.training.batches import (
    Bank,
    Prompter,
    SampledClip,
    Task,
    draw_clip,
    features,
)
from audio_lens.models.embedded.training.card import ADDED, SOUNDS, SOURCES, write_card
from audio_lens.models.embedded.training.material import Wave
from audio_lens.models.embedded.training.network import hear, think

log = logging.getLogger(__name__)
SEED = 11
CLIPS, CLIPS_PER_BATCH = 200, 24
NOISE_DB = 15.0


class Told(NamedTuple):
    """A task and what the tables are made by.

    Attributes:
        kind: of the question.
        condition: ``no transcript``, ``agree`` or ``conflict``, the instruction behind a comma.
        rival: the answer by the transcript.
        task: what is asked.
    """

    kind: str
    condition: str
    rival: str
    task: Task


class Subject:
    """A model that is asked.

    Args:
        folder: its Hugging Face directory.
    """

    def __init__(self, folder: Path):
        self.model = Qwen2AudioForConditionalGeneration.from_pretrained(folder).eval()
        self.prompter = Prompter(AutoProcessor.from_pretrained(folder, trust_remote_code=False))
        self.vocabulary = self.prompter.processor.tokenizer

    @torch.no_grad()
    def answers(
        self, waves: Sequence[Wave], tasks: Sequence[Task], clip: Sequence[int]
    ) -> list[str]:
        """The most probable first token of the answer to each task about ``waves[clip[i]]``."""
        heard = features(waves)
        audio = hear(self.model.model.audio_tower, heard.mel, heard.tokens)[1]
        connected = self.model.model.multi_modal_projector(audio)
        prompts = self.prompter.prompts(tasks, clip, heard.tokens)
        logits = think(self.model, connected, heard.tokens, prompts)
        return [self.vocabulary.decode(token).strip() for token in logits[:, 0].argmax(-1)]


def words_to_test(workdir: Path) -> dict[str, Bank]:
    """A bank of words for each of :data:`SOURCES`."""
    voices = [material.other_setting(voice, 3) for voice in material.train_voices()]
    cache = workdir / "espeak"
    spoken = (
        material.fsdd_words(material.SEEN_SPEAKERS, material.TEST_TAKES),
        material.fsdd_words(material.UNSEEN_SPEAKERS, range(50)),
        material.espeak_words(voices, cache),
        material.espeak_words(material.held_out_voices(), cache),
    )
    return {source: Bank(said) for source, said in zip(SOURCES, spoken, strict=True)}


def spoil(
    wave: Wave,
    rooms: Sequence[Wave],
    noises: Sequence[Wave],
    draw: np.random.Generator,
) -> Wave:
    """The noisy condition: a room that was not trained on, and noise 15 dB below the words."""
    wave = acoustics.in_room(wave, rooms[draw.integers(len(rooms))])
    return acoustics.with_noise(wave, noises[draw.integers(len(noises))], NOISE_DB, draw)


def plain_tasks(clip: SampledClip, draw: np.random.Generator) -> Iterator[Told]:
    """Every question that the clip allows, without a transcript."""
    for kind, form in questions.KINDS.items():
        question = questions.ask(kind, clip.scene.digits, int(draw.integers(len(form.phrasings))))
        if question is not None:
            task = Task(question.text, bool(draw.random() < 0.5), question.answer)
            yield Told(kind, "no transcript", question.answer, task)


def which_tasks(clip: SampledClip, draw: np.random.Generator) -> Iterator[Told]:
    """The which-digit questions among :func:`plain_tasks`."""
    return (told for told in plain_tasks(clip, draw) if told.kind in questions.WHICH)


def trust_tasks(clip: SampledClip, draw: np.random.Generator) -> Iterator[Told]:
    """One which-digit question under every trust condition, in both orders."""
    digits = clip.scene.digits
    question = questions.ask_any(digits, draw, questions.WHICH)
    wrong = digits
    while questions.ask(question.kind, wrong).answer == question.answer:
        wrong = questions.contradict(digits, draw)
    rival = questions.ask(question.kind, wrong).answer
    shown = {"no transcript": ((), (None,)), "agree": (digits, (None, "audio", "text"))}
    shown["conflict"] = (wrong, (None, "audio", "text"))
    for name, (transcript, trusts) in shown.items():
        for trust in trusts:
            condition = f"{name}, {trust}" if trust else name
            believed = rival if condition == "conflict, text" else question.answer
            text = questions.written(question.text, transcript, trust)
            for first in (False, True):
                yield Told(question.kind, condition, rival, Task(text, first, believed))


def interview(
    subject: Subject,
    clips: Sequence[SampledClip],
    tasks_of: Callable[[SampledClip, np.random.Generator], Iterator[Told]],
    heard_as: Callable[[Wave, np.random.Generator], Wave],
    draw: np.random.Generator,
) -> pd.DataFrame:
    """Ask ``tasks_of`` about clips as ``heard_as`` makes them sound; a row per answer."""
    rows = []
    for first in tqdm(range(0, len(clips), CLIPS_PER_BATCH), unit="batch", leave=False):
        chunk = clips[first : first + CLIPS_PER_BATCH]
        asked = [(number, told) for number, c in enumerate(chunk) for told in tasks_of(c, draw)]
        waves = [heard_as(clip.scene.wave, draw) for clip in chunk]
        numbers, tasks = [number for number, _ in asked], [told.task for _, told in asked]
        answers = subject.answers(waves, tasks, numbers)
        rows += [
            {
                "clip": first + number,
                "digits": len(chunk[number].words),
                "kind": told.kind,
                "condition": told.condition,
                "order": "before" if told.task.question_first else "after",
                "right": told.task.answer,
                "rival": told.rival,
                "answer": answer,
            }
            for (number, told), answer in zip(asked, answers, strict=True)
        ]
    return pd.DataFrame(rows)


def with_silence(wave: Wave, before_s: float, after_s: float) -> Wave:
    """The clip with zeros at its ends."""
    return np.pad(wave, (round(before_s * material.RATE), round(after_s * material.RATE)))


def lengthen(subject: Subject, clips: Sequence[SampledClip], seed: Sequence[int]) -> pd.DataFrame:
    """Which-digit questions about clips with silence added, the same ones for every length.

    Every second one of the clips that are short enough for the longest of :data:`ADDED` is asked
    about.
    """
    longest = (scenes.LONGEST_S - max(map(sum, ADDED.values()))) * material.RATE
    short = [clip for clip in clips if len(clip.scene.wave) <= longest][::2]
    tables = []
    for name, ends in ADDED.items():

        def heard_as(wave: Wave, _: np.random.Generator, ends: tuple = ends) -> Wave:
            return with_silence(wave, *ends)

        draw = np.random.default_rng(seed)
        table = interview(subject, short, which_tasks, heard_as, draw)
        tables.append(table.assign(sound="lengthened", added=name))
    return pd.concat(tables)


def measure(subject: Subject, workdir: Path, count: int = CLIPS) -> pd.DataFrame:
    """All questions and answers about ``count`` clips of each source, a row each."""
    rooms = acoustics.rooms(acoustics.TEST_ROOMS)
    noises = acoustics.noises(acoustics.TEST_NOISES, np.random.default_rng(SEED), 8)
    surveys = {
        "clean": (plain_tasks, lambda wave, draw: wave),
        "noisy": (plain_tasks, lambda wave, draw: spoil(wave, rooms, noises, draw)),
        "trust": (trust_tasks, lambda wave, draw: wave),
    }
    tables = []
    for source, bank in words_to_test(workdir).items():
        draw = np.random.default_rng([SEED, SOURCES.index(source)])
        clips = sorted((draw_clip(bank, draw) for _ in range(count)), key=lambda c: c.tokens)
        speakers = {n: bank.words[clip.words[0]].speaker for n, clip in enumerate(clips)}
        for sound, (tasks_of, heard_as) in surveys.items():
            log.info("%s, %s", source, sound)
            table = interview(subject, clips, tasks_of, heard_as, draw)
            about = {"source": source, "sound": sound, "speaker": table["clip"].map(speakers)}
            tables.append(table.assign(**about))
        log.info("%s, lengthened", source)
        longer = lengthen(subject, clips, [SEED, 1, SOURCES.index(source)])
        tables.append(longer.assign(source=source))
    return pd.concat(tables, ignore_index=True)


def rate(rows: pd.DataFrame, by: Sequence[str], hit: pd.Series | None = None) -> dict:
    """Share of hits (by default right answers) and counts, by the values of some columns."""
    hit = (rows.answer == rows.right) if hit is None else hit
    keys = rows[list(by)].astype(str).agg(" | ".join, axis=1)
    return {
        key: {"share": round(float(hits.mean()), 4), "count": len(hits)}
        for key, hits in hit.groupby(keys)
    }


def obedience(trust: pd.DataFrame) -> dict:
    """Conflict with "Trust the audio", where the same question without transcript went right."""
    keys = ["source", "clip", "order"]
    alone = trust[trust.condition == "no transcript"].set_index(keys)
    heard = alone.index[alone.answer == alone.right]
    conflict = trust[trust.condition == "conflict, audio"].set_index(keys)
    return rate(conflict[conflict.index.isin(heard)].reset_index(), ["source"])


def summarise(rows: pd.DataFrame) -> dict:
    """The numbers of the card."""
    plain = rows[rows.sound.isin(SOUNDS)]
    longer = rows[rows.sound == "lengthened"]
    which = plain[plain.kind.isin(questions.WHICH)]
    real = which[which.source.str.endswith("real")]
    trust = rows[rows.sound == "trust"]
    opened = trust[trust.condition == "conflict"]
    place = ["source", "sound"]
    return {
        "which digit": rate(which, place),
        "which digit by speaker": rate(real, ["speaker", "sound"]),
        "by kind": rate(plain, ["kind", *place]),
        "by number of digits": rate(which, ["digits", *place]),
        "by order": rate(plain, ["order", *place]),
        "by silence added": rate(longer, ["added", "source"]),
        "trust": rate(trust[trust.condition != "conflict"], ["condition", "source"]),
        "obeys audio where heard right": obedience(trust),
        "open conflict, follows audio": rate(opened, ["source"], opened.answer == opened.right),
        "open conflict, follows text": rate(opened, ["source"], opened.answer == opened.rival),
    }


def main() -> None:
    """Parse the command line, measure, write metrics and card."""
    parser = argparse.ArgumentParser(description="Measure the embedded model.")
    parser.add_argument("--workdir", type=Path, help="where espeak-ng's wavs are kept")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument(
        "--into", type=Path, default=CHECKPOINT.parent, help="folder of metrics and card"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    subject = Subject(arguments.checkpoint)
    with tempfile.TemporaryDirectory() as temporary:
        metrics = summarise(measure(subject, arguments.workdir or Path(temporary)))
    (arguments.into / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    record = json.loads((arguments.checkpoint.parent / "training.json").read_text())
    parameters = sum(weights.numel() for weights in subject.model.parameters())
    write_card(metrics, record, parameters, arguments.into / "README.md")


if __name__ == "__main__":
    main()
