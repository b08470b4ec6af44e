"""What `audio-lens map` compares: two clips, what is said in them, and what tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audio_lens.cli import shared

if TYPE_CHECKING:
    from audio_lens.patching.clip_pair import ClipPair

TOKEN = "id:"  # what stands before a token id in place of a word
WORDS, PHONES = "words", "phones"


class MetricName(StrEnum):
    """What a map can be read by: metrics of one answer, or of one against another."""

    logit_diff = "logit_diff"
    log_prob = "log_prob"
    prob = "prob"
    ctc_diff = "ctc_diff"
    ctc_log_prob = "ctc_log_prob"

    @property
    def takes_against(self) -> bool:
        return self in (MetricName.logit_diff, MetricName.ctc_diff)

    @property
    def is_of_transcripts(self) -> bool:
        return self in (MetricName.ctc_diff, MetricName.ctc_log_prob)


@dataclass(frozen=True)
class Case:
    """Two clips, and the answer that tells them apart.

    Attributes:
        against: the answer to the corrupted clip; None where the metric reads one answer.
        said: labelled stretches of each clip by tier, "words" and "phones".
        metric: what the map is read by; None leaves it to the model.
    """

    clips: ClipPair
    answer: str
    against: str | None
    said: Sequence[dict[str, Sequence[Any]]] = field(default=({}, {}))
    metric: MetricName | None = None

    @staticmethod
    def of(
        clips: Sequence[Path | None],
        question: str | None,
        answers: Sequence[str | None],
        language: str | None,
        textgrids: Sequence[Path | None],
        metric: MetricName | None,
    ) -> Case:
        """The user's clips with their answers, or the shipped pair with what is not overridden.

        Args:
            clips, answers, textgrids: of the clean clip and of the corrupted one.
        """
        given = dict(zip(("--answer", "--against"), answers, strict=True))
        shared.check_not_empty({"--question": question, **given})
        takes_against = metric is None or metric.takes_against
        if not takes_against and answers[1] is not None:
            raise ValueError(f"--metric {metric} reads one answer: leave out --against")
        if clips == (None, None):
            if any(textgrids):
                raise ValueError("a TextGrid is of your own clip: name --clean and --corrupted too")
            case = _shipped(question, answers, language)
            against = case.against if takes_against else None
            return replace(case, metric=metric, against=against)
        given = dict(zip(("--clean", "--corrupted"), map(_text, clips), strict=True)) | given
        missing = [n for n, x in given.items() if x is None and (takes_against or n != "--against")]
        if missing:
            raise ValueError(f"your own clips also need {', '.join(missing)}")
        from audio_lens.patching.clip_pair import ClipPair

        clean, corrupted = (Path(str(clip)) for clip in clips)
        pair = ClipPair(clean, corrupted, question, language)
        return Case(pair, str(answers[0]), answers[1], [_said(x) for x in textgrids], metric)

    @property
    def title(self) -> str:
        """The headline of its page."""
        against = "" if self.against is None else f" against {self.against.strip()!r}"
        return f"What decides {self.answer.strip()!r}{against}"

    def measured_by(self, model: Any) -> Any:
        """The metric, with token ids in place of the words that name them.

        Raises:
            ValueError: a metric that this model's output has not, or what is no id.
        """
        from audio_lens import metrics

        is_ctc = model.cfg.output_kind == "ctc"
        name = self.metric or (MetricName.ctc_diff if is_ctc else MetricName.logit_diff)
        if name.is_of_transcripts != is_ctc:
            fitting = [one for one in MetricName if one.is_of_transcripts == is_ctc]
            raise ValueError(
                f"--metric {name} does not fit {model.cfg.model_name}: choose of "
                f"{', '.join(fitting)}"
            )
        answers = [self.answer] if self.against is None else [self.answer, self.against]
        return getattr(metrics, name)(*(x if is_ctc else _token(x, model) for x in answers))

    def doubts(self, answers: dict[str, str], values: dict[str, float]) -> str | None:
        """Why a map may explain nothing, from what the model says to both clips."""
        if answers["clean"] == answers["corrupted"]:
            return "the model answers both clips the same: a map can hardly explain that"
        if values["clean"] < values["corrupted"]:
            swapped = ": are --answer and --against swapped?" if self.against else ""
            return f"the metric is larger for the corrupted clip{swapped}"
        asked = {"clean": self.answer, "corrupted": self.against}
        words = {name: x for name, x in asked.items() if x and not x.startswith(TOKEN)}
        if words and not any(_is_said(word, answers[name]) for name, word in words.items()):
            raised = " and ".join(f"{word.strip()!r} to the {name}" for name, word in words.items())
            return f"the model says neither: asked for is {raised} clip; the table has what it says"
        return None


def _shipped(question: str | None, answers: Sequence[str | None], language: str | None) -> Case:
    from audio_lens.models.embedded import default_pair
    from audio_lens.patching.clip_pair import ClipPair

    pair = default_pair()
    asked = pair.question if question is None else question
    answer, against = answers
    return Case(
        clips=ClipPair(pair.clean, pair.corrupted, asked, language),
        answer=pair.answer if answer is None else answer,
        against=pair.against if against is None else against,
        said=({WORDS: pair.words}, {WORDS: pair.corrupted_words}),
    )


def _said(textgrid: Path | None) -> dict[str, Sequence[Any]]:
    """What a TextGrid says: its tiers "words" and "phones"; of other names the first as words."""
    if textgrid is None:
        return {}
    from audio_lens.alignment import read_textgrid

    tiers: dict[str, Sequence[Any]] = {**read_textgrid(textgrid)}
    known = {name: spans for name, spans in tiers.items() if name in (WORDS, PHONES)}
    return known or dict(zip((WORDS,), tiers.values(), strict=False))


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _token(word: str, model: Any) -> int:
    """The token that a word is, or that it names by its id.

    Raises:
        ValueError: a word that is no single token, or what is no id.
    """
    from audio_lens.models.mixins.vocabulary import TokenError

    number = word.removeprefix(TOKEN)
    if number != word and not number.isdecimal():
        raise ValueError(f"{word!r} names no token: a whole number stands behind {TOKEN}")
    try:
        return model.to_single_token(word if number == word else int(number))
    except TokenError as error:
        what, advice, _ = str(error).partition(": use ")
        instead = f": use a word that is one (mind the leading space), or {TOKEN} and a token id"
        raise ValueError(what + instead if advice else what) from error


def _is_said(word: str, answer: str) -> bool:
    return word.strip().casefold() in answer.casefold()
