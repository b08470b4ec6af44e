"""What a checkpoint's generation settings ask of greedy decoding, honoured as Hugging Face does.

The settings are those of transformers' `GenerationConfig`, and its own `LogitsProcessor` classes
carry them out. What greedy decoding cannot do is refused by name; what acts on sampling alone
changes nothing, so that the sampling defaults of a checkpoint are no error.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.generation.stopping_criteria import StopStringCriteria

from audio_lens.inputs import InputError
from audio_lens.models.mixins.recording import Recording

Neutral = Mapping[str, tuple[Any, ...]]  # by setting, the values beside None that change nothing

HONOURED = (
    *("bad_words_ids", "begin_suppress_tokens", "encoder_no_repeat_ngram_size"),
    *("encoder_repetition_penalty", "eos_token_id", "exponential_decay_length_penalty"),
    *("forced_bos_token_id", "forced_eos_token_id", "max_length", "max_time", "min_length"),
    *("min_new_tokens", "no_repeat_ngram_size", "pad_token_id", "remove_invalid_values"),
    *("renormalize_logits", "repetition_penalty", "sequence_bias", "stop_strings"),
    "suppress_tokens",
)
NOT_GREEDY: Neutral = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "guidance_scale": (1,),
    "token_healing": (False,),
    "watermarking_config": (),
}
OF_SAMPLING: Neutral = {
    "do_sample": (False,),
    "temperature": (0, 1),
    "top_k": (0, 1, 50),
    "top_p": (1,),
    "min_p": (0,),
    "top_h": (1,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}


def settings_apart(
    options: Mapping[str, Any], refused: Neutral = NOT_GREEDY
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of `generate` that are generation settings, and the others."""
    known = {*HONOURED, *refused, *OF_SAMPLING}
    settings = {name: value for name, value in options.items() if name in known}
    return settings, {name: value for name, value in options.items() if name not in known}


def settled(own: Any, asked: Mapping[str, Any], refused: Neutral = NOT_GREEDY) -> GenerationConfig:
    """A checkpoint's settings with what a call asks for in their place.

    Args:
        own: the checkpoint's; None for none.
        refused: what is not implemented, and the values that do not ask for it.

    Raises:
        InputError: naming a setting that is not implemented, or sampling that is asked for.
    """
    settings = GenerationConfig() if own is None else copy.copy(own)
    for name, value in asked.items():
        setattr(settings, name, value)
        if _asks_for(value, OF_SAMPLING.get(name)):
            raise InputError(f"{name}={value!r} is for sampling, and generate decodes greedily")
    if asked.get("max_length") is not None:
        settings.max_new_tokens = None
    check_settings(vars(settings), refused)
    return settings


def check_settings(settings: Mapping[str, Any], refused: Neutral, where: str = "") -> None:
    """Raise if settings ask for what is not implemented.

    Raises:
        InputError: naming the setting, and the value that goes without it.
    """
    for name, neutral in refused.items():
        value = settings.get(name)
        if _asks_for(value, neutral):
            without = neutral[0] if neutral else None
            raise InputError(
                f"{name}={value!r} of the generation settings{where} is not implemented: with "
                f"generate(..., {name}={without}) or model.generation_config.{name} = {without} "
                "decoding is greedy without it"
            )


def _asks_for(value: Any, neutral: tuple[Any, ...] | None) -> bool:
    return neutral is not None and value is not None and value not in neutral


def end_tokens(settings: Any) -> list[int]:
    """The tokens that end a text."""
    ends = getattr(settings, "eos_token_id", None)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def pad_token(settings: Any) -> int:
    """What stands behind the end of a text."""
    pad = getattr(settings, "pad_token_id", None)
    return pad if pad is not None else (end_tokens(settings) or [0])[0]


class Limit(NamedTuple):
    """How many tokens are written at most, and what says so."""

    n_tokens: int
    said_by: str


def stated_limit(settings: Any, n_prompt: int = 0) -> Limit | None:
    """The limit that settings state: ``max_new_tokens``, or ``max_length`` less the prompt.

    Raises:
        InputError: for what is no number of tokens, or leaves none.
    """
    for name, n_before in (("max_new_tokens", 0), ("max_length", n_prompt)):
        value = getattr(settings, name, None)
        if value is not None:
            checked = checked_count(value, name)
            if checked <= n_before:
                raise InputError(
                    f"{name}={value} of the generation settings leaves no room behind the "
                    f"{n_prompt} tokens of the prompt: pass max_new_tokens="
                )
            return Limit(checked - n_before, f"{name}={value} of the generation settings")
    return None


def checked_count(value: Any, name: str = "max_new_tokens") -> int:
    """A number of tokens.

    Raises:
        InputError: unless it is a whole number above zero.
    """
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be at least 1, and whole; got {value!r}")
    return value


class GreedyRun:
    """One run of greedy decoding: what is chosen next, and which rows have ended.

    Args:
        settings: as `settled` gives them.
        limit: how many tokens are chosen at most.
        prompts: the tokens that repetitions are counted in, beside the new ones.
        mask: which of them are no padding; None for all.
        n_unread: how many tokens of the prompts are not among them (Hugging Face counts no
            repetitions in prompts that enter as embeddings).
        are_encoded: whether an encoder's settings act on the prompts, as in models without one.
        tokenizer: reads ``stop_strings``.

    Attributes:
        done: True for rows that have ended, ``b``.
        n_chosen: how many tokens were chosen.
        encoder_out: what the encoder gave earlier; None runs it.
        record: keeps activations of every step; None keeps none.

    Raises:
        InputError: for settings that cannot be carried out, naming what is wrong.
    """

    def __init__(
        self,
        settings: GenerationConfig,
        limit: Limit,
        prompts: Int[Tensor, "b t"],
        mask: Tensor | None = None,
        n_unread: int = 0,
        are_encoded: bool = True,
        tokenizer: Any = None,
    ):
        self.settings, self.limit = settings, limit
        self.seen: Any = prompts
        self.n_chosen = 0
        self.encoder_out: Tensor | None = None
        self.record: Recording | None = None
        self.done = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
        self._pad = pad_token(settings)
        ends = torch.tensor(end_tokens(settings), dtype=torch.long, device=prompts.device)
        self._ends = ends if len(ends) else None
        self._mask, self._n_unread, self._are_encoded = mask, n_unread, are_encoded
        strings = settings.stop_strings
        if strings is not None and tokenizer is None:
            raise InputError(
                f"stop_strings={strings!r} of the generation settings need a tokenizer"
            )
        try:
            asked = [*self._of_repetition(), *self._of_length(), *self._of_tokens()]
            self._processors = LogitsProcessorList(asked)
            self._stop = None if strings is None else StopStringCriteria(tokenizer, strings)
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"the generation settings cannot be used: {error}") from error
        seconds = settings.max_time
        self._deadline = None if seconds is None else time.monotonic() + seconds

    # ---------------------------------------------------------------- what settings ask for

    def _of_repetition(self) -> Iterator[LogitsProcessor]:
        asked, prompts = self.settings, self.seen
        if asked.sequence_bias is not None:
            yield SequenceBiasLogitsProcessor(asked.sequence_bias)
        if self._acts_on_prompt("encoder_repetition_penalty", 1):
            yield EncoderRepetitionPenaltyLogitsProcessor(asked.encoder_repetition_penalty, prompts)
        if asked.repetition_penalty not in (None, 1):
            padding = None if self._mask is None else self._mask.int().argmax(1)
            yield RepetitionPenaltyLogitsProcessor(asked.repetition_penalty, padding)
        if asked.no_repeat_ngram_size not in (None, 0):
            yield NoRepeatNGramLogitsProcessor(asked.no_repeat_ngram_size)
        if self._acts_on_prompt("encoder_no_repeat_ngram_size", 0):
            yield EncoderNoRepeatNGramLogitsProcessor(asked.encoder_no_repeat_ngram_size, prompts)
        if asked.bad_words_ids is not None:
            yield NoBadWordsLogitsProcessor(asked.bad_words_ids, self._ends)

    def _acts_on_prompt(self, name: str, neutral: int) -> bool:
        """Whether a setting of an encoder's tokens is asked for; they are the prompt's."""
        value = getattr(self.settings, name)
        if value is None or value == neutral:
            return False
        if not self._are_encoded:
            warnings.warn(
                f"{name}={value} has nothing to act on, as in Hugging Face: the encoder reads no "
                "tokens",
                stacklevel=2,
            )
        return self._are_encoded

    def _of_length(self) -> Iterator[LogitsProcessor]:
        asked, ends, n_prompt = self.settings, self._ends, self.seen.shape[1]
        device = str(self.seen.device)
        least = max((asked.min_length or 0) - self._n_unread, 0)
        if ends is not None and least:
            yield MinLengthLogitsProcessor(least, ends, device)
        if ends is not None and asked.min_new_tokens:
            yield MinNewTokensLengthLogitsProcessor(n_prompt, asked.min_new_tokens, ends, device)
        if asked.forced_bos_token_id is not None:
            yield ForcedBOSTokenLogitsProcessor(asked.forced_bos_token_id)
        if asked.forced_eos_token_id is not None:
            last = n_prompt + self.limit.n_tokens
            yield ForcedEOSTokenLogitsProcessor(last, asked.forced_eos_token_id, device)
        if asked.remove_invalid_values:
            yield InfNanRemoveLogitsProcessor()
        if asked.exponential_decay_length_penalty is not None and ends is not None:
            decay = asked.exponential_decay_length_penalty
            yield ExponentialDecayLengthPenalty(decay, ends, n_prompt)

    def _of_tokens(self) -> Iterator[LogitsProcessor]:
        asked, n_prompt, device = self.settings, self.seen.shape[1], str(self.seen.device)
        if asked.suppress_tokens is not None:
            yield SuppressTokensLogitsProcessor(asked.suppress_tokens, device)
        if asked.begin_suppress_tokens is not None:
            is_forced = n_prompt <= 1 and asked.forced_bos_token_id is not None
            begin = n_prompt + is_forced
            yield SuppressTokensAtBeginLogitsProcessor(asked.begin_suppress_tokens, begin, device)
        if asked.renormalize_logits:
            yield LogitNormalization()

    # ---------------------------------------------------------------- decoding

    def choose(self, logits: Float[Tensor, "b v"]) -> Int[Tensor, " b"]:
        """The likeliest token that settings allow in every row, padding where one has ended.

        Raises:
            InputError: for settings that do not fit the vocabulary.
        """
        try:
            scores = self._processors(self.seen, logits.float())
        except (ValueError, IndexError, RuntimeError) as error:
            raise InputError(f"the generation settings cannot be used: {error}") from error
        new = torch.where(self.done, self._pad, scores.argmax(-1))
        self.seen = torch.cat([self.seen, new[:, None]], dim=1)
        self.n_chosen += 1
        if self._ends is not None:
            self.done = self.done | torch.isin(new, self._ends)
        if self._stop is not None:
            self.done = self.done | self._stop(self.seen, None)
        return new

    @property
    def is_over(self) -> bool:
        """Whether every row has ended, or the time is up."""
        return bool(self.done.all()) or self.is_late

    @property
    def is_late(self) -> bool:
        """Whether ``max_time`` is up."""
        return self._deadline is not None and time.monotonic() > self._deadline

    def tell_cut(self) -> None:
        """Warn of texts that a limit has cut before they ended."""
        n_cut = int((~self.done).sum())
        if not n_cut:
            return
        is_short = self.n_chosen < self.limit.n_tokens
        why = f"max_time={self.settings.max_time}" if is_short else self.limit.said_by
        which = "the text was" if len(self.done) == 1 else f"{n_cut} of {len(self.done)} texts were"
        known = "" if self._ends is not None else "; no token is named that would end it"
        warnings.warn(
            f"{which} cut after {self.n_chosen} new token{'s' * (self.n_chosen > 1)}, by {why}"
            f"{known}. max_new_tokens sets another",
            stacklevel=5,
        )
