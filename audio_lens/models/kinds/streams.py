"""What codec language models share: streams of codes that enter and leave side by side, and lag.

A codec turns audio into a few codes per step, one of each of its codebooks. Every codebook is a
stream; at each position a codec language model reads the sum of the embeddings of all of them (and
of text, where it has a text stream). Streams may lag: codebook ``k`` enters ``delays[k]`` positions
later than the step it is of, behind an initial token that stands where nothing was said yet.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from audio_lens.hooks import HookPoint
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.base import HookedAudioTransformer
from audio_lens.models.layers import Block, PartConfig, Stack
from audio_lens.timeline import NO_CLIP, Row, Timeline, Track

UNKNOWN = -1  # a code that is not known yet
FIRST = "audio.0"  # the stream of the first codebook


# -------------------------------------------------------------------------------- delays


def delayed(
    codes: Int[Tensor, "b k t"], delays: Sequence[int], initial: int
) -> Int[Tensor, "b k positions"]:
    """Codes as they enter: position ``1 + s + delays[k]`` holds the code of step ``s``.

    Positions before a stream begins hold ``initial``, those behind its end `UNKNOWN`; there are
    ``1 + t + max(delays)`` of them, of which the first ``1 + t`` are the input of the model.

    Raises:
        InputError: if there is not one delay per codebook.
    """
    _check_delays(codes, delays)
    n_steps = codes.shape[-1]
    held = codes.new_full((*codes.shape[:2], 1 + n_steps + max(delays)), UNKNOWN)
    for k, delay in enumerate(delays):
        held[:, k, : 1 + delay] = initial
        held[:, k, 1 + delay : 1 + delay + n_steps] = codes[:, k]
    return held


def undelayed(streams: Int[Tensor, "b k positions"], delays: Sequence[int]) -> Int[Tensor, "b k t"]:
    """The codes of all steps that are there whole, from streams as `delayed` makes them.

    Raises:
        InputError: if there is not one delay per codebook.
    """
    _check_delays(streams, delays)
    n_steps = max(0, streams.shape[-1] - 1 - max(delays))
    lines = [streams[:, k, 1 + delay : 1 + delay + n_steps] for k, delay in enumerate(delays)]
    return torch.stack(lines, dim=1)


def _check_delays(codes: Int[Tensor, "b k t"], delays: Sequence[int]) -> None:
    if codes.shape[1] != len(delays):
        raise InputError(f"{codes.shape[1]} codebooks were given, the model has {len(delays)}")


# -------------------------------------------------------------------------------- embeddings


class CodecStack(Stack, ABC):
    """A stack whose positions read the sum of the embeddings of several streams of codes.

    `hook_code_embed.{k}` (``b t d``) is what codebook ``k`` adds to `hook_embed`.
    """

    def __init__(self, cfg: PartConfig, block: type[Block], n_codebooks: int):
        super().__init__(cfg, block)
        self.hook_code_embed = nn.ModuleList(HookPoint() for _ in range(n_codebooks))

    @abstractmethod
    def code_vectors(self, codes: Int[Tensor, "b k t"]) -> Sequence[Float[Tensor, "b t d"]]:
        """The embeddings of the codes, one tensor per codebook."""

    def summed_codes(self, codes: Int[Tensor, "b k t"]) -> Float[Tensor, "b t d"]:
        """The sum over codebooks."""
        vectors = zip(self.hook_code_embed, self.code_vectors(codes), strict=True)
        hooked = [hook(vector) for hook, vector in vectors]
        return sum(hooked, torch.zeros_like(hooked[0]))


class CodeTables(nn.ModuleList):
    """Tables of embeddings, one per codebook."""

    def __init__(self, n_codebooks: int, n_codes: int, d_model: int):
        super().__init__(nn.Embedding(n_codes, d_model) for _ in range(n_codebooks))

    def forward(self, codes: Int[Tensor, "b k t"]) -> list[Float[Tensor, "b t d"]]:
        return [table(codes[:, k]) for k, table in enumerate(self)]


# -------------------------------------------------------------------------------- time


class CodecTime(HookedAudioTransformer):
    """Where the positions of a codec language model lie; mixed into a `HookedAudioTransformer`.

    A position is where codes *enter*; what its logits predict enters at the next one. The timeline
    of the decoder is that of the first codebook, which must not be delayed.
    """

    no_gradient_because = "it hears codes, which its codec picks from tables"

    @property
    @abstractmethod
    def initial_code(self) -> int:
        """The code that stands where nothing was said yet."""

    @property
    @abstractmethod
    def lags_s(self) -> Mapping[str, float]:
        """By stream, how many seconds before the step that enters with it lies what it tells of."""

    def first_codes(self, inputs: AudioInputs) -> Int[Tensor, "b ahead"]:
        """The codes of the first codebook that enter, those that lie ahead included."""
        return codes_in(inputs)[:, 0]

    def entering_steps(self, inputs: AudioInputs) -> Int[Tensor, "b t"]:
        """The step of the codec whose first code enters each position; negative before the first.

        The first is where the first codebook holds something other than its initial token.
        """
        codes = self.first_codes(inputs)[:, : inputs.tokens.shape[1]]
        begun = (codes != self.initial_code) & inputs.attended
        first = torch.where(begun.any(1), begun.int().argmax(1), begun.shape[1])
        return torch.arange(begun.shape[1], device=begun.device) - first[:, None]

    def seconds_of(self, steps: Int[Tensor, "*b t"], stream: str) -> Float[Tensor, "*b t"]:
        """The second of the audio that a stream tells of in what enters with these steps.

        NaN where that lies before the audio begins.

        Raises:
            ValueError: if there is no stream of that name.
        """
        if stream not in self.lags_s:
            known = ", ".join(self.lags_s)
            raise InputError(f"no stream named {stream!r}; this model has {known}")
        seconds = (steps.double() + 0.5) * self.cfg.step_s - self.lags_s[stream]
        return seconds.round(decimals=9).masked_fill(seconds < 0, math.nan)

    def stream_seconds(self, inputs: Any, stream: str) -> Float[Tensor, "b t"]:
        """The second of the audio that a stream tells of in what enters at each position.

        NaN where that lies before the audio begins, and at padding. What the logits of a position
        predict of a stream enters at the next one.

        Raises:
            ValueError: if there is no stream of that name.
        """
        inputs = self.as_inputs(inputs)
        seconds = self.seconds_of(self.entering_steps(inputs), stream)
        return seconds.masked_fill(~inputs.attended, math.nan)

    def timeline(self, inputs: Any) -> Timeline:
        """Positions of the decoder by the codes of the first codebook that enter there."""
        inputs = self.as_inputs(inputs)
        durations = self._durations(inputs).tolist()
        if inputs.audio is not None:
            durations = [len(clip) / inputs.sampling_rate for clip in inputs.audio]
        steps, attended = self.entering_steps(inputs).cpu(), inputs.attended.cpu()
        tracks = map(self.tracks, steps, attended)
        return Timeline([Row(*row) for row in zip(tracks, ([s] for s in durations), strict=True)])

    def _durations(self, inputs: AudioInputs) -> Float[Tensor, " b"]:
        """Seconds of the audio whose codes have entered, or lie ahead and are known."""
        steps = self.entering_steps(inputs)
        ahead = self.first_codes(inputs)[:, steps.shape[1] :]
        later = steps[:, -1:] + 1 + torch.arange(ahead.shape[1], device=steps.device)
        is_there = (ahead != UNKNOWN) & (ahead != self.initial_code)
        ends = self.seconds_of(torch.cat([steps, later], dim=1), FIRST) + self.cfg.step_s / 2
        there = torch.cat([inputs.attended, is_there], dim=1)
        return ends.masked_fill(~there, 0.0).nan_to_num(0.0).amax(1)

    def tracks(
        self, steps: Int[Tensor, " t"], attended: Bool[Tensor, " t"]
    ) -> dict[str, list[Track]]:
        """The positions of every part of one prompt: of the decoder alone, here."""
        return {"decoder": [code_track(self.seconds_of(steps, FIRST), attended)]}


def codes_in(inputs: AudioInputs) -> Int[Tensor, "b k ahead"]:
    """The codes that enter, those that lie ahead included.

    Raises:
        InputError: if there are none.
    """
    if inputs.further_tokens is None:
        raise InputError("inputs hold no codes (further_tokens): model.prepare makes them")
    return inputs.further_tokens


def code_track(seconds: Float[Tensor, " t"], attended: Bool[Tensor, " t"]) -> Track:
    """A part whose positions lie in one clip, but for those without a time."""
    return Track(seconds, torch.where(seconds.isfinite(), 0, NO_CLIP), attended)
