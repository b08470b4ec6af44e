"""`Session`: a clip, a question and a stack of touches, and what the model answers to them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import corruptions, metrics
from audio_lens.analysis.prompts import token_label
from audio_lens.edits import Edit, intervene
from audio_lens.errors import InputError
from audio_lens.explorer.clips import Sound
from audio_lens.explorer.touches import Stretch, Touch
from audio_lens.inputs import AudioInputs
from audio_lens.patching.clip_pair import language_options
from audio_lens.patching.run import run
from audio_lens.running import evaluating
from audio_lens.sites import Site, sites_of

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer

MOST_TOUCHES = 64
MOST_STEPS = 256  # that can be undone
MOST_KEPT = 8  # activations of sources
MOST_LETTERS = 4000  # of a question
N_ANSWERS = 6  # that are shown, of either run


@dataclass(frozen=True)
class Option:
    """One thing that the model may say next.

    Attributes:
        token: its id, or the number of a class.
        before, now: its probability without and with the touches.
    """

    token: int
    word: str
    before: float
    now: float


class Session:
    """A clip, a question, and a stack of touches on clip and model.

    Args:
        model: one that writes text token by token, or names a class.
        clip: a path, or what `prepare` takes as audio.
        question: what an audio LLM is asked; of Whisper, what it has written so far.
        other: another clip to take stretches from; it is cut or lengthened to the clip's length.
        language: what Whisper hears.

    Raises:
        InputError: a model that answers in another way, a question it does not take or needs.
        AudioError: a clip that cannot be used.
    """

    def __init__(
        self,
        model: HookedAudioTransformer,
        clip: Any,
        question: str | None = None,
        other: Any = None,
        language: str | None = None,
        touches: Sequence[Touch] = (),
    ):
        check_model(model)
        self.model, self.language = model, language
        self.question = _checked_question(model, question)
        self._options = language_options(model, language)
        self._steps: list[tuple[Touch, ...]] = [()]
        self._at = 0
        self.clip = Sound.of(model, clip)
        self.other = None if other is None else Sound.of(model, other).as_long_as(self.clip)
        self._made: dict[str, AudioInputs] = {}  # of this clip and question: sources, and the clip
        self._heard: tuple[tuple[Touch, ...], Sound, AudioInputs] | None = None
        self._before: Tensor | None = None
        self._now_logits: tuple[tuple[Touch, ...], Tensor] | None = None
        self._kept: OrderedDict[tuple[str, str], Tensor] = OrderedDict()  # activations of sources
        for touch in touches:
            self.touch(touch)

    def fork(self) -> Session:
        """Another session of the same model, clip, question and touches."""
        return Session(
            self.model, self.clip, self.question, self.other, self.language, self.touches
        )

    def become(self, other: Session) -> Session:
        """Take everything over from another session of the same model."""
        vars(self).update(vars(other))
        return self

    # ---------------------------------------------------------------- clip and question

    def hear(self, clip: Any, name: str | None = None) -> None:
        """Take another clip; touches that lie in it stay.

        Raises:
            AudioError, InputError: a clip that cannot be used.
        """
        self._change(Sound.of(self.model, clip, name), self.question, self.other)

    def hear_beside(self, clip: Any, name: str | None = None) -> None:
        """Take another clip to take stretches from.

        Raises:
            AudioError, InputError: a clip that cannot be used.
        """
        self._change(self.clip, self.question, Sound.of(self.model, clip, name))

    def ask(self, question: str | None) -> None:
        """Ask something else.

        Raises:
            InputError: a question that the model does not take, or none where it needs one.
        """
        self._change(self.clip, _checked_question(self.model, question), self.other)

    def _change(self, clip: Sound, question: str | None, other: Sound | None) -> None:
        """Take what is new, unless the model cannot run on it: then all stays as it was."""
        before = dict(vars(self))
        self.clip, self.question = clip, question
        self.other = None if other is None else other.as_long_as(clip)
        self._made, self._heard, self._before, self._now_logits = {}, None, None, None
        self._kept = OrderedDict()
        kept = [touch for touch in self.touches if _lies_in(touch, clip)]
        self._steps, self._at = ([()] if not kept else [(), tuple(kept)]), int(bool(kept))
        try:
            self.answers()
        except Exception:
            vars(self).update(before)
            raise

    # ---------------------------------------------------------------- touches

    @property
    def touches(self) -> tuple[Touch, ...]:
        """The stack, in the order in which they were made."""
        return self._steps[self._at]

    @property
    def can_undo(self) -> bool:
        return self._at > 0

    @property
    def can_redo(self) -> bool:
        return self._at + 1 < len(self._steps)

    def touch(self, touch: Touch, at: int | None = None) -> None:
        """Do something to clip or model; ``at`` replaces that place of the stack.

        Raises:
            InputError, SiteError: what the model or the clip does not have.
        """
        self._check(touch)
        stack = list(self.touches)
        if at is None:
            stack.append(touch)
        else:
            stack[self._place(at)] = touch
        if len(stack) > MOST_TOUCHES:
            raise InputError(f"a stack holds {MOST_TOUCHES} touches: take some off")
        self._step(tuple(stack))

    def drop(self, at: int) -> None:
        """Take one touch off the stack."""
        at = self._place(at)
        self._step((*self.touches[:at], *self.touches[at + 1 :]))

    def clear(self) -> None:
        """Take all touches off; `undo` brings them back."""
        if self.touches:
            self._step(())

    def undo(self) -> None:
        """Go back a step."""
        self._at = max(0, self._at - 1)

    def redo(self) -> None:
        """Go forward a step again."""
        self._at = min(len(self._steps) - 1, self._at + 1)

    def _step(self, stack: tuple[Touch, ...]) -> None:
        before = (self._steps, self._at)
        self._steps = [*self._steps[: self._at + 1], stack][-MOST_STEPS:]
        self._at = len(self._steps) - 1
        try:
            self.logits()  # what cannot take effect raises, and is not on the stack then
        except Exception:
            self._steps, self._at = before
            raise

    def _place(self, at: int) -> int:
        if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < len(self.touches):
            raise InputError(f"the stack holds {len(self.touches)} touches; there is no {at!r}")
        return at

    def _check(self, touch: Touch) -> None:
        touch.check(self.model)
        if isinstance(touch, Stretch) and touch.by == "other" and self.other is None:
            raise InputError("there is no other clip to take the stretch from: choose one first")
        if not _lies_in(touch, self.clip):
            raise InputError(
                f"the clip is {self.clip.seconds:.2f} s long: the stretch lies behind its end"
            )

    # ---------------------------------------------------------------- what runs

    @property
    def heard(self) -> Sound:
        """The clip with the touches of the sound."""
        return self._now()[1]

    @property
    def inputs(self) -> AudioInputs:
        """The clip with the touches of the sound, and the question."""
        return self._now()[2]

    def _now(self) -> tuple[tuple[Touch, ...], Sound, AudioInputs]:
        """The touches of the sound, the clip with them, and its inputs."""
        on_sound = tuple(t for t in self.touches if isinstance(t, Stretch) and t.is_sound)
        if self._heard is None or self._heard[0] != on_sound:
            samples = self.clip.samples
            for touch in on_sound:
                samples = self._replaced(samples, touch)
            sound = self.clip.with_samples(samples)
            inputs = self._prepared(samples) if on_sound else self.source("clip")
            self._heard = (on_sound, sound, inputs)
        return self._heard

    def _replaced(
        self, samples: Float[np.ndarray, " n"], touch: Stretch
    ) -> Float[np.ndarray, " n"]:
        rate = self.clip.rate
        given = corruptions.OtherUtterance(
            self.samples_of(touch.by), rate, span=(touch.start_s, touch.end_s)
        )
        return given(samples, rate)[0]

    def samples_of(self, by: str) -> Float[np.ndarray, " n"]:
        """What stretches are taken from: "silence", "noise", "other"; or "clip", as it came."""
        if by == "clip":
            return self.clip.samples
        if by != "other":
            return self.clip.of_kind(by)
        if self.other is None:
            raise InputError("there is no other clip: choose one first")
        return self.other.samples

    def source(self, by: str) -> AudioInputs:
        """Inputs to take activations from; made once."""
        if by not in self._made:
            self._made[by] = self._prepared(self.samples_of(by))
        return self._made[by]

    def _prepared(self, samples: Float[np.ndarray, " n"]) -> AudioInputs:
        return self.model.prepare(
            samples, text=self.question, sampling_rate=self.clip.rate, **self._options
        )

    def _activations(self, stretch: Stretch) -> dict[str, Tensor]:
        """What a source has where a stretch of a layer is put in; the last ones are kept."""
        site = Site.parse(f"{stretch.part}.resid_pre", self.model)
        name, by = site.hook_name(stretch.layer), stretch.by
        if (by, name) not in self._kept:
            with torch.no_grad(), evaluating(self.model), self.model.without_hooks():
                found = self.model.run_with_cache(
                    self.source(by), names_filter=[name], return_cache_object=False
                )[1]
            self._kept[by, name] = found[name]
        self._kept.move_to_end((by, name))
        while len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return {name: self._kept[by, name]}

    @property
    def edits(self) -> list[Edit]:
        """The touches of the model, as edits."""
        found = (touch.edit(self._activations) for touch in self.touches)
        return [edit for edit in found if edit is not None]

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Inside a ``with`` block the touches of the model act on whatever runs it."""
        edits = self.edits
        if not edits:
            yield
            return
        with intervene(self.model, edits):
            yield

    # ---------------------------------------------------------------- answers

    def logits(self) -> Float[Tensor, " v"]:
        """Of the next token (or of the classes), with the touches in force."""
        if self._now_logits is None or self._now_logits[0] != self.touches:
            found = last_logits(self.model, self.inputs, self.edits)
            self._now_logits = (self.touches, found)
        return self._now_logits[1]

    @property
    def before(self) -> Float[Tensor, " v"]:
        """Probabilities without any touch."""
        if self._before is None:
            self._before = last_logits(self.model, self.source("clip"), []).softmax(-1)
        return self._before

    def answers(self, also: int | None = None) -> list[Option]:
        """The likeliest answers without and with the touches; those without come first.

        Args:
            also: a token that is told of wherever it stands.
        """
        before = self.before
        now = self.logits().softmax(-1) if self.touches else before
        tokens = [int(t) for p in (before, now) for t in p.topk(min(N_ANSWERS, len(p))).indices]
        if also is not None:
            tokens.append(self.check_token(also))
        words = namer(self.model)
        return [
            Option(token, words(token), float(before[token]), float(now[token]))
            for token in dict.fromkeys(tokens)
        ]

    def check_token(self, token: int) -> int:
        """The token, if it is one.

        Raises:
            InputError: for what is none.
        """
        count = len(self.before)
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < count:
            raise InputError(f"tokens are 0 to {count - 1}; got {token!r}")
        return token

    def said(self) -> str:
        """What the model says, with the touches in force."""
        with torch.no_grad(), self.in_force():
            return self.model.generate(self.inputs)[0]

    # ---------------------------------------------------------------- what there is

    @property
    def parts(self) -> list[str]:
        """Parts whose layers have moments of the clip, where a stretch can be put in."""
        known = {str(site) for site in sites_of(self.model)}
        tracks = self.model.timeline(self.source("clip")).rows[0].tracks
        timed = [part for part in tracks if f"{part}.resid_pre" in known]
        return [part for part in timed if self._has_seconds(part)]

    def _has_seconds(self, part: str) -> bool:
        row = self.model.timeline(self.source("clip")).rows[0]
        return any(bool(track.seconds.isfinite().any()) for track in row.segments(part))


def check_model(model: HookedAudioTransformer) -> None:
    """Raise for a model that answers neither with a next token nor with a class.

    Raises:
        InputError: saying what else there is.
    """
    cfg = model.cfg
    if cfg.output_kind not in ("tokens", "classes") or cfg.streams:
        raise InputError(
            f"{cfg.model_name} gives {cfg.output_kind or 'hidden states'}: the explorer shows "
            "models that write text token by token or name a class. audio-lens map, attention and "
            "lens take others"
        )


def last_logits(
    model: HookedAudioTransformer, inputs: AudioInputs, edits: Sequence[Edit]
) -> Float[Tensor, " v"]:
    """Logits behind the prompt, of one prompt, with edits in force."""
    kept: list[Tensor] = []

    def keep(rows: Float[Tensor, "b v"]) -> Float[Tensor, " b"]:
        kept[:] = [rows[0].float().cpu()]
        return rows[:, 0]

    run(model, inputs, edits, metrics.read_at(keep, name="logits"))
    return kept[0]


def namer(model: HookedAudioTransformer) -> Callable[[int], str]:
    """What tokens are called: their text, or the names of classes."""
    if model.cfg.output_kind == "classes":
        labels = dict(enumerate(model.cfg.labels or ()))
        return lambda token: labels.get(token, f"class {token}")
    return lambda token: token_label(model, token)


def _checked_question(model: HookedAudioTransformer, question: str | None) -> str | None:
    name = model.cfg.model_name
    if question is not None and not isinstance(question, str):
        raise InputError(f"a question is text, got {question!r:.100}")
    question = question or None
    if question is not None and len(question) > MOST_LETTERS:
        raise InputError(f"a question has at most {MOST_LETTERS} letters")
    if model.takes_question and question is None:
        raise InputError(f"{name} answers questions: ask it one")
    if question is not None and "decoder" not in model.cfg.parts:
        raise InputError(f"{name} takes no text: leave the question out")
    return question


def _lies_in(touch: Touch, clip: Sound) -> bool:
    end = getattr(touch, "start_s", None)
    return end is None or end < clip.seconds
