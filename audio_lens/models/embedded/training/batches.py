"""Training batches: clips drawn from a bank of words, and questions about them."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Qwen2AudioProcessor

from audio_lens.models.embedded import DIGITS
from audio_lens.models.embedded.training import acoustics, questions, scenes
from audio_lens.models.embedded.training.material import RATE, Utterance, Wave
from audio_lens.models.embedded.training.network import PromptBatch

SILENCE = len(DIGITS)
CONDITIONS = {
    "silent": 0.36,
    "agree": 0.04,
    "agree, audio": 0.03,
    "agree, text": 0.09,
    "conflict, audio": 0.17,
    "conflict, text": 0.31,
}
# Looking up what follows a digit is learned last, so it is drilled.
DRILL = (*questions.KINDS, *["after first", "after second"] * 2)


class Bank:
    """Words to draw clips from.

    Args:
        spoken: words by speaker.
        real: which of the speakers are drawn half of the time together.
    """

    def __init__(self, spoken: dict[str, list[Utterance]], real: Sequence[str] = ()):
        self.words = [utterance for said in spoken.values() for utterance in said]
        self.groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, utterance in enumerate(self.words):
            self.groups[utterance.speaker][utterance.word].append(number)
        self.kinds = [
            kind
            for kind in (list(real), [name for name in self.groups if name not in set(real)])
            if kind
        ]

    def draw(self, count: int, draw: np.random.Generator) -> list[int]:
        """Numbers of ``count`` words of one random speaker."""
        names = self.kinds[draw.integers(len(self.kinds))]
        said = self.groups[names[draw.integers(len(names))]]
        spoken = list(said)
        chosen = [said[spoken[draw.integers(len(spoken))]] for _ in range(count)]
        return [numbers[draw.integers(len(numbers))] for numbers in chosen]


@dataclass(frozen=True)
class SampledClip:
    """A clip before room and noise, and the numbers of its words in the bank.

    Attributes:
        scene: what is said when.
        words: numbers in the bank.
        recorded: first and one-past-last sample that room and noise are heard in, if not in all;
            the others are padding, all zero.
    """

    scene: scenes.Scene
    words: list[int]
    recorded: tuple[int, int] | None = None

    @property
    def tokens(self) -> int:
        return len(self.scene.wave) // scenes.TOKEN


@dataclass(frozen=True)
class Heard:
    """A batch of clips as the encoder takes them."""

    mel: Float[Tensor, "batch 80 frames"]
    tokens: Int[Tensor, " batch"]


def draw_clip(bank: Bank, draw: np.random.Generator, roomy: float = 0.0) -> SampledClip:
    """One to three words of one speaker, somewhere in one to four seconds.

    Args:
        bank: words.
        draw: decides.
        roomy: share of clips with silence of any length around and between the words; a half of
            them is padded with zeros from somewhere before the first word and behind the last.
    """
    numbers = bank.draw(int(draw.choice([1, 2, 3], p=[0.15, 0.35, 0.5])), draw)
    utterances = [bank.words[number] for number in numbers]
    slots = [scenes.seconds(utterance) for utterance in utterances]
    gaps = scenes.draw_gaps(slots, draw)
    more = bool(roomy) and draw.random() < roomy
    if more:
        gaps = scenes.draw_room(slots, gaps, draw)
    scene = scenes.compose(utterances, *scenes.lay_out(slots, gaps))
    padded = more and draw.random() < 0.5
    return SampledClip(scene, numbers, draw_recorded(scene, draw) if padded else None)


def draw_recorded(scene: scenes.Scene, draw: np.random.Generator) -> tuple[int, int]:
    """Some stretch of samples that holds all words."""
    first, last = scene.words[0].start_s * RATE, scene.words[-1].end_s * RATE
    return int(draw.uniform(0, first)), math.ceil(draw.uniform(last, len(scene.wave)))


def draw_clips(
    bank: Bank, size: int, seed: Sequence[int], roomy: float = 0.0, pool: int = 4
) -> list[SampledClip]:
    """The batch of step ``seed[-1]``; ``pool`` neighbouring steps share out clips by length.

    Args:
        bank: words.
        size: of the batch.
        seed: whose last number is the step.
        roomy: as :func:`draw_clip` takes it.
        pool: steps that share clips.
    """
    *stage, step = seed
    draw = np.random.default_rng([*stage, step // pool])
    clips = [draw_clip(bank, draw, roomy) for _ in range(size * pool)]
    clips.sort(key=lambda clip: clip.tokens)
    share = draw.permutation(pool)[step % pool]
    return clips[share * size : (share + 1) * size]


class Surroundings:
    """Rooms, noises and channels that training clips are heard through."""

    def __init__(self, seed: int):
        self.rooms = acoustics.rooms(acoustics.TRAIN_ROOMS)
        self.noises = acoustics.noises(acoustics.TRAIN_NOISES, np.random.default_rng(seed), 24)

    def spoil(self, wave: Wave, draw: np.random.Generator) -> Wave:
        """The clip at a random level, some in a room, most with noise of 5 to 40 dB below."""
        if draw.random() < 0.3:
            wave = acoustics.in_room(wave, self.rooms[draw.integers(len(self.rooms))])
        if draw.random() < 0.8:
            noise = self.noises[draw.integers(len(self.noises))]
            wave = acoustics.with_noise(wave, noise, draw.uniform(5, 40), draw)
        return wave * np.float32(10 ** draw.uniform(-0.7, 0.5))

    def hear(self, clips: Sequence[SampledClip], draw: np.random.Generator) -> Heard:
        """Features of spoiled clips, each through a channel and from a warped vocal tract."""
        waves = [padded(self.spoil(clip.scene.wave, draw), clip.recorded) for clip in clips]
        channel = np.stack([acoustics.draw_channel(draw) for _ in clips])
        warps = draw.integers(len(acoustics.WARPS), size=len(clips))
        return features(waves, torch.tensor(channel, dtype=torch.float32), warps.tolist())


def padded(wave: Wave, recorded: tuple[int, int] | None) -> Wave:
    """The clip with zeros in place of all that was not recorded."""
    if recorded is None:
        return wave
    kept = np.zeros_like(wave)
    kept[slice(*recorded)] = wave[slice(*recorded)]
    return kept


def features(
    waves: Sequence[Wave],
    channel: Float[Tensor, "batch bins"] | None = None,
    warps: Sequence[int] | None = None,
) -> Heard:
    """Features of clips of unequal length, with 40 ms of padding behind all but the fullest."""
    tokens = torch.tensor([len(wave) // scenes.TOKEN for wave in waves])
    rows = torch.zeros(len(waves), (int(tokens.max()) + 2) * scenes.TOKEN)
    for row, wave in zip(rows, waves, strict=True):
        row[: len(wave)] = torch.from_numpy(wave)
    mel = acoustics.log_mel(rows, channel, warps)
    frames = min(4 * (int(tokens.max()) + 1), round(scenes.LONGEST_S * 100))
    return Heard(mel[..., :frames], tokens)


def frame_labels(clips: Sequence[SampledClip], length: int) -> Int[Tensor, "batch tokens"]:
    """Which digit sounds in the middle of each 40 ms (:data:`SILENCE` for none)."""
    middle = (np.arange(length) + 0.5) * scenes.TOKEN / RATE
    labels = np.full((len(clips), length), SILENCE)
    for row, clip in zip(labels, clips, strict=True):
        for placed in clip.scene.words:
            row[(middle >= placed.start_s) & (middle < placed.end_s)] = DIGITS.index(placed.word)
    return torch.from_numpy(labels)


@dataclass(frozen=True)
class Task:
    """A user turn and the answer that is right under its instruction.

    Attributes:
        text: transcript, instruction and question.
        question_first: whether the text stands before the audio.
        answer: the right one.
        audio: whether the turn has any.
    """

    text: str
    question_first: bool
    answer: str
    audio: bool = True


def draw_task(digits: Sequence[str], draw: np.random.Generator) -> Task:
    """A question about the digits, in one of :data:`CONDITIONS`.

    Conflicts without an instruction are not among them: what the model makes of those is
    measured, never taught. Most conflicts are about a question that the conflict decides.
    """
    condition = str(draw.choice(list(CONDITIONS), p=list(CONDITIONS.values())))
    agreement, _, trust = condition.partition(", ")
    conflict = agreement == "conflict"
    transcript = questions.contradict(digits, draw) if conflict else tuple(digits)
    believed, doubted = (transcript, digits) if trust == "text" else (digits, transcript)
    for _ in range(4 if conflict else 1):
        question = questions.ask_any(believed, draw, DRILL)
        rival = questions.ask(question.kind, doubted)
        if rival is None or rival.answer != question.answer:
            break
    shown = () if condition == "silent" else transcript
    text = questions.written(question.text, shown, trust or None)
    return Task(text, bool(draw.random() < 0.5), question.answer)


def draw_reading(draw: np.random.Generator) -> Task:
    """A question about a transcript alone, without any audio; half of them to be trusted."""
    digits = tuple(str(digit) for digit in draw.choice(DIGITS, draw.integers(1, 4)))
    question = questions.ask_any(digits, draw, DRILL)
    text = questions.written(question.text, digits, "text" if draw.random() < 0.5 else None)
    return Task(text, False, question.answer, audio=False)


class Prompter:
    """Turns tasks into token rows with the model's own chat template and tokenizer."""

    def __init__(self, processor: Qwen2AudioProcessor):
        self.processor = processor
        tokenizer = processor.tokenizer
        self.pad = tokenizer.pad_token_id
        self.answers = {word: tokenizer(word).input_ids[0] for word in questions.ANSWERS}

    def row(self, task: Task, tokens: int) -> list[int]:
        """Prompt and answer as token ids, ``tokens`` of them for the audio."""
        turns = questions.conversation(task.text, task.question_first, task.audio)
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        text = text.replace("<|AUDIO|>", "<|AUDIO|>" * tokens)
        return [*self.processor.tokenizer(text).input_ids, self.answers[task.answer]]

    def prompts(
        self,
        tasks: Sequence[Task],
        clip: Sequence[int] = (),
        tokens: Int[Tensor, " batch"] | None = None,
    ) -> PromptBatch:
        """Rows for ``tasks[i]`` about clip ``clip[i]``, whose length is ``tokens[clip[i]]``.

        Tasks without audio need no clips.
        """
        lengths = [0] * len(tasks) if tokens is None else tokens[list(clip)].tolist()
        rows = [self.row(task, length) for task, length in zip(tasks, lengths, strict=True)]
        ids = torch.full((len(rows), max(map(len, rows))), self.pad)
        for out, row in zip(ids, rows, strict=True):
            out[: len(row)] = torch.tensor(row)
        asked = torch.tensor([len(row) - 2 for row in rows])
        answer = ids[torch.arange(len(ids)), asked + 1]
        return PromptBatch(ids, torch.tensor(clip, dtype=torch.long), asked, answer)
