"""How strongly whole texts are given, and how they differ from what was said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.arguments import listed, names, numbers
from audio_lens.errors import ExtraError
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.metrics.reading import Metric, Reading
from audio_lens.models.kinds.ctc import ctc_of
from audio_lens.models.kinds.encoder_only import EncoderOutput

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

Transcript = str | tuple[int, ...]


def ctc_log_prob(text: str | Sequence[int]) -> Metric:
    """Log-probability (nats) of a transcript under a CTC model, summed over all its alignments.

    Args:
        text: the transcript as the model's tokenizer writes it, or label ids.
    """
    return _CTCLogProb(_as_transcript(text))


def ctc_diff(answer: str | Sequence[int], against: str | Sequence[int]) -> Metric:
    """Log-probability (nats) of one transcript under a CTC model minus that of another.

    Args:
        answer, against: transcripts as the model's tokenizer writes them, or label ids.
    """
    return _CTCDiff(_as_transcript(answer), _as_transcript(against))


def sequence_log_prob(tokens: str | Sequence[int]) -> Metric:
    """Summed log-probability of the tokens the prompts end with (teacher forcing).

    For answers of several tokens: put them at the end of the inputs' text and name them here.
    """
    return _SequenceLogProb(_as_transcript(tokens))


def wer(reference: str | Sequence[str], hypothesis: str | Sequence[str]) -> float:
    """Word error rate of transcripts; case and spacing at the ends are ignored.

    Raises:
        InputError: without a word to compare with, or not as many hypotheses as references.
        ImportError: without jiwer (``pip install audio_lens[asr]``).
    """
    jiwer = _jiwer("metrics.wer")
    return jiwer.wer(*_compared(reference, hypothesis))


def insertion_rate(reference: str | Sequence[str], hypothesis: str | Sequence[str]) -> float:
    """Words that nobody said, over words that were said; case and spacing at the ends are ignored.

    What is made up has many; what is misheard (another word in a word's place) has none.

    Raises:
        InputError, ImportError: as `wer`.
    """
    jiwer = _jiwer("metrics.insertion_rate")
    found = jiwer.process_words(*_compared(reference, hypothesis))
    return found.insertions / (found.hits + found.substitutions + found.deletions)


def _jiwer(asked_by: str) -> Any:
    try:
        import jiwer
    except ImportError as error:
        raise ExtraError(f"{asked_by} needs jiwer: pip install 'audio_lens[asr]'") from error
    return jiwer


def _compared(
    reference: str | Sequence[str], hypothesis: str | Sequence[str]
) -> tuple[list[str], list[str]]:
    """Both as jiwer takes them."""
    said_by = {"reference": reference, "hypothesis": hypothesis}
    pair = [names(name, texts) for name, texts in said_by.items()]
    if len(pair[0]) != len(pair[1]) or not any(text.strip() for text in pair[0]):
        raise InputError(
            f"{len(pair[0])} references need as many hypotheses, got {len(pair[1])}, and a word"
        )
    said, heard = ([text.strip().lower() for text in texts] for texts in pair)
    return said, heard


@dataclass(frozen=True)
class _CTCLogProb(Metric):
    text: Transcript

    @property
    def name(self) -> str:
        return f"CTC log-probability of {self.text!r}"

    def _bind(self, model, inputs, reference) -> Reading:
        return Reading(everywhere(model, inputs), None, ctc_scores(self.text, model, inputs))


@dataclass(frozen=True)
class _CTCDiff(Metric):
    answer: Transcript
    against: Transcript

    @property
    def name(self) -> str:
        return f"CTC log-probability {self.answer!r} - {self.against!r}"

    def _bind(self, model, inputs, reference) -> Reading:
        if self.answer == self.against:
            raise InputError(f"answer and against are the same transcript in {self.name}")
        right, wrong = (ctc_scores(t, model, inputs) for t in (self.answer, self.against))
        return Reading(everywhere(model, inputs), None, lambda rows: right(rows) - wrong(rows))


@dataclass(frozen=True)
class _SequenceLogProb(Metric):
    tokens: str | tuple[int, ...]

    @property
    def name(self) -> str:
        return f"log-probability of {self.tokens!r}"

    def _bind(self, model, inputs, reference) -> Reading:
        if model.cfg.output_kind == "streams":
            raise InputError(
                "sequence_log_prob scores the tokens of models that write a single stream: score "
                "one token at a time, as in metrics.log_prob(token, position=-2)"
            )
        if model.cfg.output_kind != "tokens":
            raise InputError("sequence_log_prob scores what a decoder writes; use ctc_log_prob")
        ids = self.tokens
        if isinstance(ids, str):
            tokenizer = model.need_tokenizer("a sequence of words")
            ids = tokenizer.encode(ids, add_special_tokens=False)
        wanted = torch.tensor(list(ids), device=inputs.device)
        ends = inputs.tokens[:, -len(ids) :]
        read = inputs.attended[:, -len(ids) - 1 :]
        has_room = 0 < len(ids) < inputs.tokens.shape[1]
        if not (has_room and read.all() and (ends == wanted).all()):
            raise InputError(
                f"the prompts (of a sweep: clean and corrupted) must end with the tokens scored "
                f"({list(ids)}), behind at least one other token and without padding; these end "
                f"with {ends.tolist()}"
            )
        width = inputs.tokens.shape[1]
        before = torch.arange(width - len(ids) - 1, width - 1, device=inputs.device)
        return Reading(
            before.expand(len(inputs), -1),
            None,
            lambda rows: rows.log_softmax(-1).gather(-1, ends[..., None]).sum((-1, -2)),
        )


def _as_transcript(text: str | Sequence[int]) -> Transcript:
    if isinstance(text, str):
        return text
    return tuple(numbers("a transcript", listed("a transcript", text, object, "ids"), least=0))


def ctc_scores(
    text: str | int | Sequence[int], model: HookedAudioTransformer, inputs: AudioInputs
) -> Callable[[Float[Tensor, "b t v"]], Float[Tensor, " b"]]:
    """Log-probability of a transcript in every row, from logits at all frames.

    Raises:
        InputError: a model without a CTC head, or a clip with too few frames to say it.
    """
    if model.cfg.output_kind != "ctc" or not isinstance(model, EncoderOutput):
        raise InputError(f"transcripts are scored by CTC models; {model.cfg.family} is none here")
    labels = model.labels_of([[text] if isinstance(text, int) else text])[0]
    attended, blank = model.output_attended(inputs), ctc_of(model.cfg).blank
    lengths = attended.sum(-1)
    needed = len(labels) + int((labels[1:] == labels[:-1]).sum())
    if len(labels) == 0 or int(lengths.min()) < needed:
        raise InputError(
            f"{text!r} is {len(labels)} labels and needs {max(1, needed)} frames; the shortest "
            f"clip has {int(lengths.min())}"
        )

    def score(rows: Float[Tensor, "b t v"]) -> Float[Tensor, " b"]:
        targets = labels.expand(len(rows), -1)
        counts = torch.full_like(lengths, len(labels))
        log_probs = rows.log_softmax(-1).transpose(0, 1)
        return -F.ctc_loss(log_probs, targets, lengths, counts, blank=blank, reduction="none")

    return score


def everywhere(model: HookedAudioTransformer, inputs: AudioInputs) -> Int[Tensor, "b t"]:
    """All positions of the output."""
    attended = model.output_attended(inputs)
    return torch.arange(attended.shape[1], device=inputs.device).expand(attended.shape)
