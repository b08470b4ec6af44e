"""Metrics of a run: numbers that say how strongly a model gives an answer.

A metric is anything that maps logits ``b t d_vocab`` to a scalar or to one value per row. Those
here take words or token ids and are bound to a model and inputs by the sweep (or by `bind`), since
words need a tokenizer and "the last position" needs the mask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.inputs import AudioInputs, InputError

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

Word = str | int
Words = Word | Sequence[Word]
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

    def __call__(self, logits: Float[Tensor, "b t v"]) -> Float[Tensor, " b"]:
        return self.value(self.of_rows(at_positions(logits, self.positions)))

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

    @property
    @abstractmethod
    def name(self) -> str:
        """What the metric is called in results and pictures."""

    def bind(
        self,
        model: HookedAudioTransformer,
        inputs: AudioInputs | Mapping[str, Any],
        reference: Float[Tensor, "b t v"] | None = None,
    ) -> Reading:
        """The metric as a function of logits, one value per row.

        Args:
            reference: logits of the clean run, for metrics that compare with it.

        Raises:
            TokenError: a word that is not exactly one token.
            InputError: answers that do not fit the batch, or positions outside it.
        """
        return self._bind(model, model.as_inputs(inputs), reference)

    @abstractmethod
    def _bind(
        self,
        model: HookedAudioTransformer,
        inputs: AudioInputs,
        reference: Float[Tensor, "b t v"] | None,
    ) -> Reading:
        """What `bind` gives, for inputs that are `AudioInputs`."""


def bound(
    metric: Metric | MetricFn,
    model: HookedAudioTransformer,
    inputs: AudioInputs,
    reference: Float[Tensor, "b t v"] | None = None,
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


def sequence_log_prob(tokens: str | Sequence[int]) -> Metric:
    """Summed log-probability of the tokens the prompts end with (teacher forcing).

    For answers of several tokens: put them at the end of the inputs' text and name them here.
    """
    return _SequenceLogProb(tokens if isinstance(tokens, str) else tuple(tokens))


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

    def _positions(self, inputs: AudioInputs) -> Int[Tensor, " b"]:
        batch, width = inputs.tokens.shape
        if self.position is None:
            steps = torch.arange(width, device=inputs.device)
            return (inputs.attended * steps).argmax(-1)
        if not -width <= self.position < width:
            raise InputError(f"position {self.position} lies outside rows of {width} tokens")
        if not inputs.attended[:, self.position].all():
            raise InputError(f"position {self.position} is padding in some row")
        return torch.full((batch,), self.position % width, device=inputs.device)

    def _reading(
        self,
        inputs: AudioInputs,
        value: Callable[[Float[Tensor, "b c"]], Float[Tensor, " b"]],
        tokens: Int[Tensor, "b c"] | None = None,
    ) -> Reading:
        """A function of the logits at the position."""
        positions = self._positions(inputs)[:, None]
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
        return self._reading(inputs, lambda logits: logits[:, 0] - logits[:, 1], tokens)


@dataclass(frozen=True)
class _LogProb(_AtPosition):
    answer: Words

    @property
    def name(self) -> str:
        return f"log-probability of {_shown(self.answer)}"

    def _bind(self, model, inputs, reference) -> Reading:
        ids = _ids(self.answer, model, inputs)
        return self._reading(inputs, lambda logits: _at(logits.log_softmax(-1), ids))


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
        clean = at_positions(reference, self._positions(inputs)[:, None])[:, 0].log_softmax(-1)
        return self._reading(
            inputs, lambda logits: (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)
        )


@dataclass(frozen=True)
class _ReadAt(_AtPosition):
    fn: Callable[[Float[Tensor, "b v"]], Float[Tensor, " b"]]
    called: str

    @property
    def name(self) -> str:
        return self.called

    def _bind(self, model, inputs, reference) -> Reading:
        return self._reading(inputs, self.fn)


@dataclass(frozen=True)
class _SequenceLogProb(Metric):
    tokens: str | tuple[int, ...]

    @property
    def name(self) -> str:
        return f"log-probability of {self.tokens!r}"

    def _bind(self, model, inputs, reference) -> Reading:
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
    many = [words] * len(inputs) if isinstance(words, (str, int)) else list(words)
    if len(many) != len(inputs):
        raise InputError(f"{len(inputs)} rows need as many answers, got {len(many)}")
    return torch.tensor([model.to_single_token(word) for word in many], device=inputs.device)


def _at(values: Float[Tensor, "b v"], ids: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    return values.gather(-1, ids[:, None]).squeeze(-1)
