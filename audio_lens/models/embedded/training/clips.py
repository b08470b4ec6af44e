"""Make the shipped clips: ``python -m audio_lens.models.embedded.training.clips``.

Minimal pairs of voices that were held out from training: both sides have one layout and length
and differ in one digit. Of the voices, the first is taken for which the model answers every
which-digit question on both sides, in both orders.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile

from audio_lens.models.embedded import CHECKPOINT, CLIPS
from audio_lens.models.embedded.training import acoustics, material, questions, scenes
from audio_lens.models.embedded.training.batches import Task
from audio_lens.models.embedded.training.evaluate import Subject
from audio_lens.models.embedded.training.material import Wave

log = logging.getLogger(__name__)
LEAD_S, GAP_S, TAIL_S = 0.32, 0.36, 0.36
NOISE_DB = 30.0


@dataclass(frozen=True)
class PairToMake:
    """A minimal pair to make: digits, the swapped one's index, what replaces it, what is asked."""

    digits: tuple[str, ...]
    index: int
    other: str
    kind: str
    noisy: bool = False

    @property
    def swapped(self) -> tuple[str, ...]:
        return (*self.digits[: self.index], self.other, *self.digits[self.index + 1 :])


PAIRS = (
    PairToMake(("seven", "two", "five"), 1, "nine", "second"),
    PairToMake(("four", "one", "eight"), 0, "six", "first"),
    PairToMake(("three", "nine", "zero"), 2, "two", "last"),
    PairToMake(("six", "three"), 1, "eight", "larger", noisy=True),
)


def make(pair: PairToMake, voice: material.Voice, cache: Path) -> tuple[scenes.Scene, scenes.Scene]:
    """Clean and corrupted clip of a pair in a voice; noise, if any, is the same on both."""
    utterances = [material.espeak_word(voice, word, cache) for word in pair.digits]
    other = material.espeak_word(voice, pair.other, cache)
    gaps = [LEAD_S, *[GAP_S] * (len(utterances) - 1), TAIL_S]
    return scenes.minimal_pair(utterances, pair.index, other, gaps)


def noise_for(scene: scenes.Scene) -> Wave:
    """Light pink noise for a clip."""
    draw = np.random.default_rng(0)
    hiss = acoustics.coloured_noise(draw, len(scene.wave) + 1, 1.0)
    return acoustics.with_noise(scene.wave, hiss, NOISE_DB, draw) - scene.wave


def tasks(pair: PairToMake, digits: Sequence[str]) -> list[Task]:
    """The pair's own question and every which-digit question, before and after the audio."""
    kinds = dict.fromkeys([pair.kind, *questions.WHICH])
    asked = [question for kind in kinds if (question := questions.ask(kind, digits))]
    return [Task(q.text, first, q.answer) for q in asked for first in (False, True)]


def understood(subject: Subject, pair: PairToMake, waves: Sequence[Wave]) -> bool:
    """Whether the model answers all :func:`tasks` on both sides of a pair."""
    sides = [tasks(pair, pair.digits), tasks(pair, pair.swapped)]
    clip = [side for side, asked in enumerate(sides) for _ in asked]
    asked = [*sides[0], *sides[1]]
    return subject.answers(waves, asked, clip) == [task.answer for task in asked]


def ship(subject: Subject, folder: Path, cache: Path) -> None:
    """Write the clips of all pairs and ``clips.json``.

    Raises:
        RuntimeError: no held-out voice is understood on both sides of some pair.
    """
    folder.mkdir(exist_ok=True)
    index: dict = {"sampling_rate": material.RATE, "pairs": [], "clips": {}}
    voices = [v for v in material.held_out_voices() if v.name.startswith("en")]
    for number, pair in enumerate(PAIRS):
        voice, sides, waves = _first_understood(subject, pair, voices[number:], cache)
        names = ["-".join(side.digits) + ".wav" for side in sides]
        for name, side, wave in zip(names, sides, waves, strict=True):
            soundfile.write(folder / name, wave, material.RATE, subtype="PCM_16")
            words = [asdict(placed) for placed in side.words]
            text = " ".join(side.digits)
            index["clips"][name] = {"voice": voice.speaker, "text": text, "words": words}
        question = questions.ask(pair.kind, pair.digits)
        index["pairs"].append(
            {
                "clean": names[0],
                "corrupted": names[1],
                "swapped": pair.index,
                "question": question.text,
                "answer": question.answer,
                "against": questions.ask(pair.kind, pair.swapped).answer,
                "noise_db": -NOISE_DB if pair.noisy else None,
                "answered_correctly_on_both_sides": True,
            }
        )
        log.info("%s: %s", " / ".join(names), voice.speaker)
    (folder / "clips.json").write_text(json.dumps(index, indent=1) + "\n")


def _first_understood(
    subject: Subject, pair: PairToMake, voices: Sequence[material.Voice], cache: Path
) -> tuple[material.Voice, tuple[scenes.Scene, scenes.Scene], list[Wave]]:
    for voice in voices:
        sides = make(pair, voice, cache)
        noise = noise_for(sides[0]) if pair.noisy else np.float32(0)
        waves = [side.wave + noise for side in sides]
        if understood(subject, pair, waves):
            return voice, sides, waves
    raise RuntimeError(f"no held-out voice is understood on both sides of {pair.digits}")


def main() -> None:
    """Parse the command line and write the clips."""
    parser = argparse.ArgumentParser(description="Make the shipped clips.")
    parser.add_argument("--workdir", type=Path, help="where espeak-ng's wavs are kept")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as temporary:
        cache = (arguments.workdir or Path(temporary)) / "espeak"
        ship(Subject(arguments.checkpoint), CLIPS, cache)


if __name__ == "__main__":
    main()
