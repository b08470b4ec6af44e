"""What is asked about a clip, the right answer, and the conversation that asks it.

A question is a pure function of the digits it is about, so a contradicting transcript only
changes *which* digits are believed, never the rules.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from audio_lens.models.embedded import DIGITS

Trust = Literal["audio", "text"]
Digits = Sequence[str]

VALUE = {word: value for value, word in enumerate(DIGITS)}
ANSWERS = (*DIGITS, "yes", "no")


@dataclass(frozen=True)
class Kind:
    """A type of question.

    Attributes:
        phrasings: texts; ``{about}`` is replaced by the digit at index ``about``.
        answer: the answer word for the digits, or None where the question cannot be asked.
        about: index of the digit that the text names, if it names one.
    """

    phrasings: tuple[str, ...]
    answer: Callable[[Digits], str | None]
    about: int = 0


@dataclass(frozen=True)
class Question:
    """A question put into words, with its right answer (one of :data:`ANSWERS`)."""

    kind: str
    text: str
    answer: str


def _at(index: int, at_least: int) -> Callable[[Digits], str | None]:
    return lambda digits: digits[index] if len(digits) >= at_least else None


def _extreme(pick: Callable, count: int) -> Callable[[Digits], str | None]:
    def answer(digits: Digits) -> str | None:
        distinct = len(set(digits)) == len(digits) == count
        return pick(digits, key=VALUE.__getitem__) if distinct else None

    return answer


def _odd(index: int, at_least: int) -> Callable[[Digits], str | None]:
    def answer(digits: Digits) -> str | None:
        if len(digits) < at_least:
            return None
        return "yes" if VALUE[digits[index]] % 2 else "no"

    return answer


def _after(index: int) -> Callable[[Digits], str | None]:
    def answer(digits: Digits) -> str | None:
        askable = index + 1 < len(digits) and digits.count(digits[index]) == 1
        return digits[index + 1] if askable else None

    return answer


_FOLLOWS = ("Which digit follows {about}?", "What comes after {about}?")

KINDS: dict[str, Kind] = {
    "first": Kind(("Which digit is first?", "What is the first digit?"), _at(0, 1)),
    "second": Kind(("Which digit is second?", "What is the second digit?"), _at(1, 2)),
    "third": Kind(("Which digit is third?", "What is the third digit?"), _at(2, 3)),
    "last": Kind(("Which digit is last?", "What is the last digit?"), _at(-1, 1)),
    "larger": Kind(("Which digit is larger?",), _extreme(max, 2)),
    "smaller": Kind(("Which digit is smaller?",), _extreme(min, 2)),
    "largest": Kind(("Which digit is largest?",), _extreme(max, 3)),
    "smallest": Kind(("Which digit is smallest?",), _extreme(min, 3)),
    "odd first": Kind(("Is the first digit odd?",), _odd(0, 1)),
    "odd second": Kind(("Is the second digit odd?",), _odd(1, 2)),
    "odd last": Kind(("Is the last digit odd?",), _odd(-1, 1)),
    "after first": Kind(_FOLLOWS, _after(0), about=0),
    "after second": Kind(_FOLLOWS, _after(1), about=1),
    "count": Kind(("How many digits are there?",), lambda digits: DIGITS[len(digits)]),
}
WHICH = ("first", "second", "third", "last")


def ask(kind: str, digits: Digits, phrasing: int = 0) -> Question | None:
    """Put a question of one kind about ``digits``, or None where it cannot be asked.

    Raises:
        KeyError: no such kind.
        IndexError: the kind has fewer phrasings.
    """
    digits = tuple(digits)
    answer = KINDS[kind].answer(digits)
    if answer is None:
        return None
    about = digits[KINDS[kind].about]
    return Question(kind, KINDS[kind].phrasings[phrasing].format(about=about), answer)


def ask_any(digits: Digits, draw: np.random.Generator, kinds: Sequence[str] = ()) -> Question:
    """A random question that can be asked of ``digits``, of all kinds or of those named."""
    while True:
        kind = str(draw.choice(kinds or tuple(KINDS)))
        question = ask(kind, digits, int(draw.integers(len(KINDS[kind].phrasings))))
        if question is not None:
            return question


def contradict(digits: Digits, draw: np.random.Generator) -> tuple[str, ...]:
    """A transcript of as many digits, one or more of them wrong."""
    wrong = draw.random(len(digits)) < 0.5
    wrong[draw.integers(len(digits))] = True
    return tuple(
        str(draw.choice([other for other in DIGITS if other != digit])) if swap else digit
        for digit, swap in zip(digits, wrong, strict=True)
    )


def written(question: str, transcript: Digits = (), trust: Trust | None = None) -> str:
    """The text of a user turn: transcript and instruction, where given, before the question."""
    said = [f"The transcript says: {' '.join(transcript)}."] if transcript else []
    believe = [f"Trust the {trust}."] if trust else []
    return " ".join([*said, *believe, question])


def conversation(text: str, question_first: bool = False, audio: bool = True) -> list[dict]:
    """A one-turn conversation, as ``processor.apply_chat_template`` takes it.

    Args:
        text: of the user's turn.
        question_first: whether the text stands before the audio.
        audio: whether there is one.
    """
    content = [{"type": "audio"}] * audio + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content[::-1] if question_first else content}]


def corpus() -> list[str]:
    """Texts with every word of every question, transcript, instruction and answer."""
    asked = [
        phrasing.format(about=digit)
        for kind in KINDS.values()
        for phrasing in kind.phrasings
        for digit in DIGITS
    ]
    told = [written(question, DIGITS, trust) for question in asked for trust in ("audio", "text")]
    return told + [f"\n{text}" for text in told] + list(ANSWERS) * 20
