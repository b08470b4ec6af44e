"""A prompt as pages show it: its clip, its tokens, and which positions of a part hold the clip."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.audio import AudioSource
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models import HookedAudioTransformer
from audio_lens.report.clips import Clip
from audio_lens.timeline import NO_CLIP, Row, Span, Track

ANSWER_TOKENS = 64
ROUNDING_S = 0.05  # clips end on whole feature steps
VISIBLE = str.maketrans({" ": "\N{OPEN BOX}", "\n": "\N{DOWNWARDS ARROW WITH TIP LEFTWARDS}"})


@dataclass(frozen=True)
class Places:
    """Positions of a part, in the order of its batch.

    Attributes:
        row: which of the prompt's rows in the batch of the part (its segments, in an encoder).
        index: position in that row.
        seconds: centre in the clip; NaN for text.
    """

    row: Int[Tensor, " n"]
    index: Int[Tensor, " n"]
    seconds: Float[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.index)

    def none(self) -> Places:
        """No positions."""
        return Places(self.row[:0], self.index[:0], self.seconds[:0])

    def of_row(self, row: int) -> Int[Tensor, " m"]:
        """The positions in one row."""
        return self.index[self.row == row]

    def bins(
        self, duration_s: float, most: int
    ) -> tuple[Float[np.ndarray, " edges"], Int[Tensor, " n"]]:
        """Stretches of a clip with equally many moments each, and the stretch of every position.

        Stretches meet halfway between positions; positions of one moment (patches of a
        spectrogram) stay together.
        """
        microseconds, moment = self.seconds.mul(1e6).round().unique(return_inverse=True)
        moments = (microseconds / 1e6).numpy()
        size = math.ceil(len(moments) / most)
        between = (moments[1:] + moments[:-1]) / 2
        half = (moments[1] - moments[0]) / 2 if len(moments) > 1 else duration_s
        last = max(moments[-1], min(duration_s, moments[-1] + half))
        edges = [[max(0.0, moments[0] - half)], between[size - 1 :: size], [last]]
        return np.concatenate(edges), moment // size

    def of(self, activation: Float[Tensor, "rows t *d"]) -> Float[Tensor, "n *d"]:
        """An activation of the prompt's rows at these positions."""
        device = activation.device
        return activation[self.row.to(device), self.index.to(device)]


@dataclass(frozen=True)
class Prompt:
    """One prompt of a batch, and one clip of it.

    Attributes:
        row: which prompt of the batch.
        clip: which clip of the prompt.
        heard: the clip, to draw and to play.
        timeline: of the whole batch, prompt by prompt.
    """

    model: HookedAudioTransformer
    inputs: AudioInputs
    row: int
    clip: int
    heard: Clip
    timeline: list[Row]

    @staticmethod
    def of(
        model: HookedAudioTransformer,
        inputs: AudioInputs | Mapping[str, Any],
        row: int = 0,
        clip: int = 0,
        audio: AudioSource | None = None,
        tiers: Mapping[str, Sequence[Span]] | None = None,
    ) -> Prompt:
        """A prompt of inputs; ``audio`` is the clip, where the inputs do not hold it.

        Raises:
            InputError: a row or clip that does not exist, inputs without a waveform, or audio that
                is longer than their clip.
            AudioError: audio that cannot be read.
        """
        inputs = model.as_inputs(inputs)
        if not 0 <= row < len(inputs):
            raise InputError(f"there is no prompt {row}: the inputs hold {len(inputs)}")
        if not 0 <= clip < inputs.clips_per_row[row]:
            raise InputError(f"there is no clip {clip}: prompt {row} holds {inputs.clips_per_row}")
        if audio is None:
            if inputs.audio is None:
                raise InputError("these inputs hold no waveform to show and play: pass audio=")
            audio = inputs.audio[sum(inputs.clips_per_row[:row]) + clip]
        heard = Clip.load("clip", audio, model.cfg.sampling_rate, tiers or {})
        timeline = model.timeline(inputs).rows
        longest = timeline[row].duration_s(clip)
        if heard.seconds > longest + ROUNDING_S:
            raise InputError(
                f"the audio is {heard.seconds:.2f} s long, the clip in the inputs at most "
                f"{longest:.2f} s: pass the clip that the inputs were made of"
            )
        return Prompt(model, inputs, row, clip, heard, timeline)

    def alone(self) -> Prompt:
        """The prompt as a batch of its own."""
        return replace(
            self, inputs=self.inputs[self.row], row=0, timeline=[self.timeline[self.row]]
        )

    def answered(self, max_new_tokens: int = ANSWER_TOKENS) -> Prompt:
        """The prompt alone, with what the model writes to it (greedily) behind its tokens."""
        alone = self.alone()
        cfg, inputs = self.model.cfg.decoder, alone.inputs
        if cfg.rotary_base is None:
            max_new_tokens = min(max_new_tokens, cfg.n_ctx - inputs.tokens.shape[1])
        if max_new_tokens < 1:
            return alone
        tokens = self.model.generate(inputs, max_new_tokens=max_new_tokens, return_type="tokens")
        longer = replace(inputs, tokens=tokens)
        n_new = tokens.shape[1] - inputs.tokens.shape[1]
        if inputs.attention_mask is not None:
            ones = inputs.attention_mask.new_ones(1, n_new)
            longer = replace(longer, attention_mask=torch.cat([inputs.attention_mask, ones], dim=1))
        if inputs.position_ids is not None:
            later = inputs.position_ids[:, -1:] + torch.arange(1, n_new + 1, device=inputs.device)
            positions = torch.cat([inputs.position_ids, later], dim=1)
            longer = replace(longer, position_ids=positions)
        elif inputs.attention_mask is not None:
            longer = replace(longer, position_ids=longer.counted_positions())
        return replace(alone, inputs=longer, timeline=self.model.timeline(longer).rows)

    # ---------------------------------------------------------------- positions

    def tracks(self, part: str) -> list[Track]:
        """Where positions of the prompt lie, row by row of the part's batch."""
        return self.timeline[self.row].segments(part)

    def own(self, part: str, activation: Float[Tensor, "rows *d"]) -> Float[Tensor, "own *d"]:
        """The rows of an activation that belong to the prompt.

        Raises:
            InputError: an activation of another batch.
        """
        counts = [len(row.segments(part)) for row in self.timeline]
        if len(activation) != sum(counts):
            raise InputError(
                f"the cache holds {len(activation)} rows of the {part}, these inputs "
                f"{sum(counts)}: pass the inputs that the cache is of"
            )
        start = sum(counts[: self.row])
        return activation[start : start + counts[self.row]]

    def places(self, part: str) -> Places:
        """The positions of a part that hold the clip, none of padding."""
        end = self.heard.seconds
        tracks = self.tracks(part)
        return self._places(
            [t.valid & (t.clip == self.clip) & (t.seconds <= end) for t in tracks], part
        )

    def text_places(self) -> Places:
        """The attended positions of the decoder that hold text."""
        return self._places([t.valid & (t.clip == NO_CLIP) for t in self.tracks("decoder")])

    def _places(self, masks: list[Tensor], part: str = "decoder") -> Places:
        index = [mask.nonzero().flatten() for mask in masks]
        rows = [torch.full_like(found, row) for row, found in enumerate(index)]
        tracks = self.tracks(part)
        seconds = [track.seconds[found] for track, found in zip(tracks, index, strict=True)]
        return Places(torch.cat(rows), torch.cat(index), torch.cat(seconds))

    # ---------------------------------------------------------------- text

    @property
    def tokens(self) -> list[int]:
        """The decoder's token ids, padding included."""
        return self.inputs.tokens[self.row].tolist()

    def facts(self) -> dict[str, str]:
        """What a page says of the prompt."""
        facts = {"model": self.model.cfg.model_name, "family": self.model.cfg.family}
        if "decoder" in self.model.cfg.parts:
            track = self.tracks("decoder")[0]
            runs = itertools.groupby(
                zip(self.tokens, track.clip.tolist(), strict=True), key=lambda pair: pair[1]
            )
            facts["prompt"] = "".join(
                "[audio]" if clip != NO_CLIP else self._written([token for token, _ in run])
                for clip, run in runs
            )
        return facts | {"inputs": self.inputs.digest()}

    def _written(self, tokens: list[int]) -> str:
        tokenizer = self.model.tokenizer
        return " ".join(map(str, tokens)) if tokenizer is None else tokenizer.decode(tokens)


def token_label(model: HookedAudioTransformer, token: int) -> str:
    """A token as one can see it: spaces and line breaks as signs, ids without a tokenizer."""
    if model.tokenizer is None:
        return f"#{token}"
    if model.cfg.head == "ctc" and token == model.cfg.ctc.blank:
        return "(blank)"
    written = model.tokenizer.decode([token])
    if not written or "\N{REPLACEMENT CHARACTER}" in written:  # a piece of a letter
        written = model.tokenizer.convert_ids_to_tokens(token) or f"#{token}"
    return written.translate(VISIBLE)


def drawn(label: str) -> str:
    """Text as plotly takes it, which knows some HTML."""
    return html.escape(label, quote=False)


def chosen_numbers(what: str, wanted: Sequence[int] | None, count: int, part: str) -> list[int]:
    """Numbers of layers or heads in order, negative ones from the end; all for None.

    Raises:
        InputError: for one that does not exist, or none at all.
    """
    if wanted is None:
        return list(range(count))
    numbers = sorted({int(n) + (count if n < 0 else 0) for n in wanted})
    if not numbers or not (numbers[0] >= 0 and numbers[-1] < count):
        raise InputError(f"the {part} has {what} 0 to {count - 1}; got {list(wanted)}")
    return numbers
