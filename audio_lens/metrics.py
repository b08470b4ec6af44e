"""Metrics of a run: numbers that say how strongly a model gives an answer.

A metric is anything that maps logits ``b t d_vocab`` (``b labels`` of a classifier) to a scalar or
to one value per row. Those here take words, names of classes or token ids and are bound to a model
and inputs by the sweep (or by `bind`), since words need a tokenizer and "the last position" needs
the mask.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.config import TEXT

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

Word = str | int
Words = Word | Sequence[Word]
Transcript = str | tuple[int, ...]
MetricFn = Callable[[Float[Tensor, "b t v"]], Tensor]


@dataclass(frozen=True)
class Reading:
    """A metric as a function of logits ``b t v``, and what it reads of them.

    A sweep computes no more than that.

    Attributes:
        positions: the positions it reads in every row.
        tokens: the columns of the vocabulary it reads in every row; None for all.
        value: from the logits at those positions and columns to one value per row.
    """

    positions: Int[Tensor, "b r"]
    tokens: Int[Tensor, "b c"] | None
    value: Callable[[Float[Tensor, "b r c"]], Float[Tensor, " b"]]

    def __call__(self, logits: Float[Tensor, "b *t v"]) -> Float[Tensor, " b"]:
        by_position = logits if logits.ndim == 3 else logits[:, None]  # a classifier's
        return self.value(self.of_rows(at_positions(by_position, self.positions)))

    def of_rows(self, rows: Float[Tensor, "b r v"]) -> Float[Tensor, "b r c"]:
        """The columns it reads, of logits at its positions."""
        if self.tokens is None:
            return rows
        return rows.gather(-1, self.tokens[:, None].expand(-1, rows.shape[1], -1))


def at_positions(x: Float[Tensor, "b t d"], positions: Int[Tensor, "b r"]) -> Tensor:
    """The given positions of every row, ``b r d``."""
    return x[torch.arange(len(x), device=x.device)[:, None], positions]


class Metric(ABC):
    """A metric that needs a model and inputs before it can read logits."""

    needs_reference: ClassVar[bool] = False  # whether it compares with the clean run
    names_stream: ClassVar[bool] = False  # whether it says which of several streams it reads

    @property
    @abstractmethod
    def name(self) -> str:
        """What the metric is called in results and pictures."""

    def bind(
        self,
        model: HookedAudioTransformer,
        inputs: AudioInputs | Mapping[str, Any],
        reference: Float[Tensor, "b *t v"] | None = None,
    ) -> Reading:
        """The metric as a function of logits, one value per row.

        Args:
            reference: logits of the clean run, for metrics that compare with it.

        Raises:
            TokenError: a word that is not exactly one token.
            InputError: answers that do not fit the batch, positions outside it, or a model that
                writes several streams, where `of_stream` says which is meant.
        """
        if model.cfg.head == "streams" and not self.names_stream:
            streams = ", ".join(name for name, _ in model.cfg.streams)
            raise InputError(
                f"{model.cfg.family} writes several streams ({streams}): say which is meant, as in "
                f"metrics.of_stream({model.cfg.streams[0][0]!r}, metric)"
            )
        return self._bind(model, model.as_inputs(inputs), reference)

    @abstractmethod
    def _bind(
        self,
        model: HookedAudioTransformer,
        inputs: AudioInputs,
        reference: Float[Tensor, "b *t v"] | None,
    ) -> Reading:
        """What `bind` gives, for inputs that are `AudioInputs`."""


def bound(
    metric: Metric | MetricFn,
    model: HookedAudioTransformer,
    inputs: AudioInputs,
    reference: Float[Tensor, "b *t v"] | None = None,
) -> MetricFn:
    """The metric as a function of logits; plain functions are one already.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(metric, Metric):
        return metric.bind(model, inputs, reference)
    if not callable(metric):
        raise TypeError(f"a metric maps logits to numbers, got {type(metric).__name__}")
    return metric


def named(metric: Any) -> dict[str, Any]:
    """One metric or a mapping of them, by name.

    Raises:
        ValueError: for an empty mapping.
    """
    if isinstance(metric, Mapping):
        if not metric:
            raise ValueError("the mapping of metrics is empty")
        return dict(metric)
    return {getattr(metric, "name", None) or getattr(metric, "__name__", "metric"): metric}


def streams_read(metric: Any) -> frozenset[str] | None:
    """The streams that a metric, or several, are known to read alone; None for all there are."""
    wanted = named(metric).values()
    if not all(isinstance(one, _OfStream) for one in wanted):
        return None
    return frozenset(one.stream for one in wanted)


# -------------------------------------------------------------------------------- answers


def logit_diff(answer: Words, against: Words, position: int | None = None) -> Metric:
    """Logit of the answer minus logit of the wrong answer, at the last attended position.

    Args:
        answer, against: a word that is one token, a token id, or a list with one per row.
        position: read there instead; negative counts from the end of the row.
    """
    return _LogitDiff(answer, against, position=position)


def log_prob(answer: Words, position: int | None = None) -> Metric:
    """Log-probability (natural log) of the answer at the last attended position."""
    return _LogProb(answer, position=position)


def prob(answer: Words, position: int | None = None) -> Metric:
    """Probability of the answer at the last attended position."""
    return _Prob(answer, position=position)


def kl(position: int | None = None) -> Metric:
    """KL divergence in nats from the clean run's next-token distribution to this run's."""
    return _KL(position=position)


def read_at(
    fn: Callable[[Float[Tensor, "b v"]], Float[Tensor, " b"]],
    position: int | None = None,
    name: str | None = None,
) -> Metric:
    """Your own function of the logits ``b v`` at one position, giving one value per row.

    Prefer it to a bare function of all logits: a sweep then computes no other position.

    Args:
        fn: the function.
        position: which one; None is the last attended, negative counts from the end of the row.
        name: what to call it; None takes the function's.
    """
    return _ReadAt(fn, name or getattr(fn, "__name__", "metric"), position=position)


def forced_choice(answer: Words, among: Sequence[Word], position: int | None = None) -> Metric:
    """Log-probability (nats) of the answer if the model had to choose among some.

    The options share all probability: words at the last attended position, classes of a classifier,
    or, of a CTC model, whole transcripts (each by all its alignments, as `ctc_log_prob`).

    Args:
        answer: one of the options, or a list with one per row.
        among: the options, each a word that is one token, a class, or a CTC model's transcript.
        position: read there instead (not for transcripts).
    """
    return _ForcedChoice(answer, tuple(among), position=position)


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
    return _SequenceLogProb(tokens if isinstance(tokens, str) else tuple(tokens))


def of_stream(stream: str, metric: Metric) -> Metric:
    """A metric of one of the streams a model writes at once (``model.cfg.streams``).

    Args:
        stream: "text", "audio.0" ...
        metric: one of this module at a single position; its words are ids of tokens in that
            stream, or words where the stream is the text. Your own function: `read_at`.

    Raises:
        TypeError: for a bare function, or a metric that names its stream already.
    """
    if not isinstance(metric, Metric) or metric.names_stream:
        raise TypeError(
            "of_stream takes a metric that names no stream yet; a function of the stream's logits "
            "is one by metrics.read_at(fn)"
        )
    return _OfStream(stream, metric)


def wer(reference: str | Sequence[str], hypothesis: str | Sequence[str]) -> float:
    """Word error rate of transcripts; case and spacing at the ends are ignored.

    Raises:
        ImportError: without jiwer (``pip install audio_lens[asr]``).
    """
    try:
        import jiwer
    except ImportError as error:
        raise ImportError("metrics.wer needs jiwer: pip install 'audio_lens[asr]'") from error
    pair = [[x] if isinstance(x, str) else list(x) for x in (reference, hypothesis)]
    said, heard = ([text.strip().lower() for text in texts] for texts in pair)
    return jiwer.wer(said, heard)


@dataclass(frozen=True, kw_only=True)
class _AtPosition(Metric):
    """Reads the logits of one position of each row; None is the last attended one."""

    position: int | None = None

    def _positions(self, model: HookedAudioTransformer, inputs: AudioInputs) -> Int[Tensor, " b"]:
        _check_head(model)
        attended = model.output_attended(inputs)
        batch, width = attended.shape
        if self.position is None:
            if model.cfg.head == "ctc":
                raise InputError(
                    "a CTC model writes at every frame, and the last one says little: pass "
                    "position=, or use metrics.forced_choice or metrics.ctc_log_prob"
                )
            steps = torch.arange(width, device=inputs.device)
            return (attended * steps).argmax(-1)
        if not -width <= self.position < width:
            raise InputError(f"position {self.position} lies outside rows of {width} positions")
        if not attended[:, self.position].all():
            raise InputError(f"position {self.position} is padding in some row")
        return torch.full((batch,), self.position % width, device=inputs.device)

    def _reading(
        self,
        model: HookedAudioTransformer,
        inputs: AudioInputs,
        value: Callable[[Float[Tensor, "b c"]], Float[Tensor, " b"]],
        tokens: Int[Tensor, "b c"] | None = None,
    ) -> Reading:
        """A function of the logits at the position."""
        positions = self._positions(model, inputs)[:, None]
        return Reading(positions, tokens, lambda rows: value(rows[:, 0]))


@dataclass(frozen=True)
class _LogitDiff(_AtPosition):
    answer: Words
    against: Words

    @property
    def name(self) -> str:
        return f"logit difference {_shown(self.answer)} - {_shown(self.against)}"

    def _bind(self, model, inputs, reference) -> Reading:
        right, wrong = (_ids(w, model, inputs) for w in (self.answer, self.against))
        if (right == wrong).any():
            raise InputError(f"answer and against are the same token in {self.name}")
        tokens = torch.stack([right, wrong], dim=-1)
        return self._reading(model, inputs, lambda logits: logits[:, 0] - logits[:, 1], tokens)


@dataclass(frozen=True)
class _LogProb(_AtPosition):
    answer: Words

    @property
    def name(self) -> str:
        return f"log-probability of {_shown(self.answer)}"

    def _bind(self, model, inputs, reference) -> Reading:
        ids = _ids(self.answer, model, inputs)
        return self._reading(model, inputs, lambda logits: _at(logits.log_softmax(-1), ids))


@dataclass(frozen=True)
class _Prob(_LogProb):
    @property
    def name(self) -> str:
        return f"probability of {_shown(self.answer)}"

    def _bind(self, model, inputs, reference) -> Reading:
        log_prob = super()._bind(model, inputs, reference)
        return replace(log_prob, value=lambda rows: log_prob.value(rows).exp())


@dataclass(frozen=True)
class _KL(_AtPosition):
    needs_reference: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "KL from the clean run (nats)"

    def _bind(self, model, inputs, reference) -> Reading:
        if reference is None:
            raise InputError("kl compares with the clean run: pass its logits as reference=")
        clean = _at_one(reference, self._positions(model, inputs)).log_softmax(-1)
        return self._reading(
            model, inputs, lambda logits: (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)
        )


@dataclass(frozen=True)
class _ReadAt(_AtPosition):
    fn: Callable[[Float[Tensor, "b v"]], Float[Tensor, " b"]]
    called: str

    @property
    def name(self) -> str:
        return self.called

    def _bind(self, model, inputs, reference) -> Reading:
        return self._reading(model, inputs, self.fn)


@dataclass(frozen=True)
class _ForcedChoice(_AtPosition):
    answer: Words
    among: tuple[Word, ...]

    @property
    def name(self) -> str:
        return f"choice of {_shown(self.answer)} among {', '.join(map(_shown, self.among))}"

    def _bind(self, model, inputs, reference) -> Reading:
        chosen = self._chosen(inputs)
        if model.cfg.head == "ctc":
            if self.position is not None:
                raise InputError("transcripts are read at all frames: leave out position=")
            options = [_ctc_scores(option, model, inputs) for option in self.among]

            def value(rows: Float[Tensor, "b t v"]) -> Float[Tensor, " b"]:
                scores = torch.stack([score(rows) for score in options], dim=-1)
                return _at(scores.log_softmax(-1), chosen)

            return Reading(_everywhere(model, inputs), None, value)
        columns = torch.stack([_ids(option, model, inputs) for option in self.among], dim=-1)
        return self._reading(
            model, inputs, lambda logits: _at(logits.log_softmax(-1), chosen), columns
        )

    def _chosen(self, inputs: AudioInputs) -> Int[Tensor, " b"]:
        """Which option each row's answer is."""
        if len(set(self.among)) < max(2, len(self.among)):
            raise InputError(f"a choice needs two or more different options, got {self.among}")
        answers = _per_row(self.answer, inputs)
        unknown = [answer for answer in answers if answer not in self.among]
        if unknown:
            raise InputError(f"the answer {unknown[0]!r} is none of the options {self.among}")
        return torch.tensor([self.among.index(a) for a in answers], device=inputs.device)


@dataclass(frozen=True)
class _OfStream(Metric):
    stream: str
    metric: Metric

    names_stream: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"{self.metric.name} in {self.stream}"

    @property
    def needs_reference(self) -> bool:
        return self.metric.needs_reference

    def _bind(self, model, inputs, reference) -> Reading:
        columns = model.cfg.columns(self.stream)
        width = columns.stop - columns.start
        own = None if reference is None else reference[..., columns]
        reading = self.metric._bind(_WritingStream(model, self.stream, width), inputs, own)
        tokens = reading.tokens
        if tokens is None:
            tokens = torch.arange(width, device=inputs.device).expand(len(inputs), -1)
        return replace(reading, tokens=columns.start + tokens)


class _WritingStream:
    """A model as a metric of one of its streams sees it: with the tokens of that stream alone."""

    def __init__(self, model: HookedAudioTransformer, stream: str, width: int):
        self.model, self.stream, self.width = model, stream, width

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def to_single_token(self, word: Word) -> int:
        if isinstance(word, str) and self.stream != TEXT:
            raise InputError(
                f"{word!r} is a word, and {self.stream} writes none: name its tokens by their ids, "
                f"0 to {self.width - 1}"
            )
        token = self.model.to_single_token(word) if isinstance(word, str) else operator.index(word)
        if not 0 <= token < self.width:
            raise InputError(f"{self.stream} has {self.width} tokens, so none is {token}")
        return token


@dataclass(frozen=True)
class _CTCLogProb(Metric):
    text: Transcript

    @property
    def name(self) -> str:
        return f"CTC log-probability of {self.text!r}"

    def _bind(self, model, inputs, reference) -> Reading:
        return Reading(_everywhere(model, inputs), None, _ctc_scores(self.text, model, inputs))


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
        right, wrong = (_ctc_scores(t, model, inputs) for t in (self.answer, self.against))
        return Reading(_everywhere(model, inputs), None, lambda rows: right(rows) - wrong(rows))


def _as_transcript(text: str | Sequence[int]) -> Transcript:
    return text if isinstance(text, str) else tuple(text)


def _ctc_scores(
    text: str | int | Sequence[int], model: HookedAudioTransformer, inputs: AudioInputs
) -> Callable[[Float[Tensor, "b t v"]], Float[Tensor, " b"]]:
    """Log-probability of a transcript in every row, from logits at all frames.

    Raises:
        InputError: a model without a CTC head, or a clip with too few frames to say it.
    """
    if model.cfg.head != "ctc":
        raise InputError(f"transcripts are scored by CTC models; {model.cfg.family} is none here")
    labels = model.labels_of([[text] if isinstance(text, int) else text])[0]
    attended = model.output_attended(inputs)
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
        return -F.ctc_loss(
            log_probs, targets, lengths, counts, blank=model.cfg.ctc.blank, reduction="none"
        )

    return score


def _everywhere(model: HookedAudioTransformer, inputs: AudioInputs) -> Int[Tensor, "b t"]:
    """All positions of the output."""
    attended = model.output_attended(inputs)
    return torch.arange(attended.shape[1], device=inputs.device).expand(attended.shape)


@dataclass(frozen=True)
class _SequenceLogProb(Metric):
    tokens: str | tuple[int, ...]

    @property
    def name(self) -> str:
        return f"log-probability of {self.tokens!r}"

    def _bind(self, model, inputs, reference) -> Reading:
        if model.cfg.head == "streams":
            raise InputError(
                "sequence_log_prob scores the tokens of models that write a single stream: score "
                "one token at a time, as in metrics.log_prob(token, position=-2)"
            )
        if model.cfg.head != "tokens":
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
                f"the prompts must end with the tokens scored ({list(ids)}), behind at least one "
                f"other token and without padding; they end with {ends.tolist()}"
            )
        width = inputs.tokens.shape[1]
        before = torch.arange(width - len(ids) - 1, width - 1, device=inputs.device)
        return Reading(
            before.expand(len(inputs), -1),
            None,
            lambda rows: rows.log_softmax(-1).gather(-1, ends[..., None]).sum((-1, -2)),
        )


def _shown(words: Words) -> str:
    if isinstance(words, (str, int)):
        return str(words).strip()
    return "/".join(dict.fromkeys(str(word).strip() for word in words))


def _ids(words: Words, model: HookedAudioTransformer, inputs: AudioInputs) -> Int[Tensor, " b"]:
    """One token id per row."""
    _check_head(model)
    many = _per_row(words, inputs)
    return torch.tensor([model.to_single_token(word) for word in many], device=inputs.device)


def _per_row(words: Words, inputs: AudioInputs) -> list[Word]:
    """One word per row; a single one serves all."""
    many = [words] * len(inputs) if isinstance(words, (str, int)) else list(words)
    if len(many) != len(inputs):
        raise InputError(f"{len(inputs)} rows need as many answers, got {len(many)}")
    return many


def _check_head(model: HookedAudioTransformer) -> None:
    if model.cfg.head is None:
        raise InputError(
            f"{model.cfg.family} without a head gives hidden states (b t d), not logits: pass your "
            "own function of them as metric"
        )


def _at_one(x: Float[Tensor, "b *t v"], position: Int[Tensor, " b"]) -> Float[Tensor, "b v"]:
    """One position of every row."""
    return at_positions(x if x.ndim == 3 else x[:, None], position[:, None])[:, 0]


def _at(values: Float[Tensor, "b v"], ids: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    return values.gather(-1, ids[:, None]).squeeze(-1)
