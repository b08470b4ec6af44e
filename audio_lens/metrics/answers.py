"""How strongly one answer is given, at one position of every row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.arguments import listed, whole
from audio_lens.errors import KindError
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.metrics.reading import Metric, Reading, at_positions, check_head
from audio_lens.metrics.transcripts import ctc_scores, everywhere

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

Word = str | int
_WORDS = "words or token ids, or one"
Words = Word | Sequence[Word]


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
    if not callable(fn):
        raise KindError(f"a metric maps logits to numbers, got {type(fn).__name__}")
    own = getattr(fn, "name", None) or getattr(fn, "__name__", "metric")
    return _ReadAt(fn, name or own, position=position)


def forced_choice(answer: Words, among: Sequence[Word], position: int | None = None) -> Metric:
    """Log-probability (nats) of the answer if the model had to choose among some.

    The options share all probability: words at the last attended position, classes of a classifier,
    or, of a CTC model, whole transcripts (each by all its alignments, as `ctc_log_prob`).

    Args:
        answer: one of the options, or a list with one per row.
        among: the options, each a word that is one token, a class, or a CTC model's transcript.
        position: read there instead (not for transcripts).
    """
    options = listed("among", among, (str, Integral), "words or token ids")
    return _ForcedChoice(answer, tuple(options), position=position)


@dataclass(frozen=True, kw_only=True)
class _AtPosition(Metric):
    """Reads the logits of one position of each row; None is the last attended one."""

    position: int | None = None

    def of_rows(self, rows: Sequence[int], count: int) -> Metric:
        named = {name: getattr(self, name, "") for name in ("answer", "against")}
        each = {name: _words(x) for name, x in named.items() if not isinstance(x, (str, Integral))}
        for words in each.values():
            if len(words) != count:
                raise InputError(f"{count} rows need as many answers, got {len(words)}")
        return replace(self, **{name: [x[row] for row in rows] for name, x in each.items()})

    def _positions(self, model: HookedAudioTransformer, inputs: AudioInputs) -> Int[Tensor, " b"]:
        check_head(model)
        attended = model.output_attended(inputs)
        batch, width = attended.shape
        if self.position is not None:
            whole("position", self.position)
        if self.position is None:
            if model.cfg.output_kind == "ctc":
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
        reading = self._reading(model, inputs, lambda logits: logits[:, 0] - logits[:, 1], tokens)
        return replace(reading, by_row=True)


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
        if model.cfg.output_kind == "ctc":
            if self.position is not None:
                raise InputError("transcripts are read at all frames: leave out position=")
            options = [ctc_scores(option, model, inputs) for option in self.among]

            def value(rows: Float[Tensor, "b t v"]) -> Float[Tensor, " b"]:
                scores = torch.stack([score(rows) for score in options], dim=-1)
                return _at(scores.log_softmax(-1), chosen)

            return Reading(everywhere(model, inputs), None, value)
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


def _shown(words: Words) -> str:
    if isinstance(words, (str, int)):
        return str(words).strip()
    return "/".join(dict.fromkeys(str(word).strip() for word in words))


def _ids(words: Words, model: HookedAudioTransformer, inputs: AudioInputs) -> Int[Tensor, " b"]:
    """One token id per row."""
    check_head(model)
    many = _per_row(words, inputs)
    return torch.tensor([model.to_single_token(word) for word in many], device=inputs.device)


def _per_row(words: Words, inputs: AudioInputs) -> list[Word]:
    """One word per row; a single one serves all."""
    one = isinstance(words, (str, Integral))
    many: list[Any] = [words] * len(inputs)
    if not one:
        many = _words(words)
    if any(isinstance(word, bool) for word in many):
        raise InputError(f"an answer must be a word or a token id, got {words!r}")
    if len(many) != len(inputs):
        raise InputError(f"{len(inputs)} rows need as many answers, got {len(many)}")
    return many


def _words(words: Words) -> list[Word]:
    return listed("an answer", words, (str, Integral), _WORDS)


def _at_one(x: Float[Tensor, "b *t v"], position: Int[Tensor, " b"]) -> Float[Tensor, "b v"]:
    """One position of every row."""
    return at_positions(x if x.ndim == 3 else x[:, None], position[:, None])[:, 0]


def _at(values: Float[Tensor, "b v"], ids: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    return values.gather(-1, ids[:, None]).squeeze(-1)
