"""A prompt and one clip of it: its tokens, and which positions of a part hold the clip."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens import arguments
from audio_lens import audio as sound
from audio_lens.audio import AudioSource
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models import HookedAudioTransformer
from audio_lens.models.config import TEXT
from audio_lens.models.kinds.ctc import ctc_of
from audio_lens.models.kinds.streams import FIRST, UNKNOWN, CodecTime
from audio_lens.timeline import NO_CLIP, Row, Track

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

    def of(self, activation: Float[Tensor, "rows t *d"]) -> Float[Tensor, " n *d"]:
        """An activation of the prompt's rows at these positions."""
        device = activation.device
        return activation[self.row.to(device), self.index.to(device)]


@runtime_checkable
class _GoesOn(Protocol):
    """A model that continues what enters beside its text, too."""

    def continued(self, inputs: AudioInputs, max_new_tokens: int) -> AudioInputs: ...


@dataclass(frozen=True)
class Prompt:
    """One prompt of a batch, and one clip of it.

    Attributes:
        row: which prompt of the batch.
        clip: which clip of the prompt.
        samples: the clip, at the sampling rate of the model.
        timeline: of the whole batch, prompt by prompt.
    """

    model: HookedAudioTransformer
    inputs: AudioInputs
    row: int
    clip: int
    samples: Float[np.ndarray, " samples"]
    timeline: list[Row]

    @staticmethod
    def of(
        model: HookedAudioTransformer,
        inputs: AudioInputs | Mapping[str, Any],
        row: int = 0,
        clip: int = 0,
        audio: AudioSource | None = None,
    ) -> Prompt:
        """A prompt of inputs; ``audio`` is the clip, where the inputs do not hold it.

        Raises:
            InputError: a row or clip that does not exist, inputs without a waveform, or audio that
                is longer than their clip.
            AudioError: audio that cannot be read.
        """
        inputs = model.as_inputs(inputs)
        arguments.whole("row", row)
        arguments.whole("clip", clip)
        if not 0 <= row < len(inputs):
            raise InputError(f"there is no prompt {row}: the inputs hold {len(inputs)}")
        if not 0 <= clip < inputs.clips_per_row[row]:
            raise InputError(f"there is no clip {clip}: prompt {row} holds {inputs.clips_per_row}")
        if audio is None:
            audio = inputs.need_audio[sum(inputs.clips_per_row[:row]) + clip]
        rate = model.cfg.sampling_rate
        samples = sound.load(audio, rate, rate)
        seconds = len(samples) / rate
        timeline = model.timeline(inputs).rows
        longest = timeline[row].duration_s(clip)
        if seconds > longest + max(ROUNDING_S, model.cfg.step_s):
            raise InputError(
                f"the audio is {seconds:.2f} s long, the clip in the inputs at most "
                f"{longest:.2f} s: pass the clip that the inputs were made of"
            )
        return Prompt(model, inputs, row, clip, samples, timeline).with_silence()

    def with_silence(self) -> Prompt:
        """With a clip as long as what the decoder reads of it: codecs hear silence behind it."""
        if not self.is_codec_lm:
            return self
        (track,) = self.tracks("decoder")
        steps = track.seconds[track.valid & track.seconds.isfinite()]
        if not len(steps):
            return self
        end = float(steps.max()) + self.model.cfg.step_s / 2
        missing = max(0, round(end * self.model.cfg.sampling_rate) - len(self.samples))
        return replace(self, samples=np.pad(self.samples, (0, missing)))

    @property
    def seconds(self) -> float:
        """How long the clip is."""
        return len(self.samples) / self.model.cfg.sampling_rate

    def alone(self) -> Prompt:
        """The prompt as a batch of its own."""
        return replace(
            self, inputs=self.inputs[self.row], row=0, timeline=[self.timeline[self.row]]
        )

    def shown(self, answer: int | None = 0) -> Prompt:
        """The prompt alone, with an answer of so many tokens, or of as many as is usual for None.

        Codes that lie ahead enter, as long as no other number of tokens is named.

        Raises:
            InputError: an answer of a model that writes none.
        """
        if self.model.text_of(self.inputs) is None and answer:
            raise InputError(
                "answer= has nothing to do here: this model writes codes, not text; show what it "
                "played by the inputs that hold these codes, and audio="
            )
        wanted = answer or self.n_ahead if self.is_codec_lm else answer
        return self.alone() if wanted == 0 else self.answered(wanted)

    def answered(self, max_new_tokens: int | None = None) -> Prompt:
        """The prompt alone, with what the model writes to it (greedily) behind its tokens.

        None is as many tokens as is usual: what the model's own settings allow, up to 64.
        """
        alone = self.alone()
        cfg, inputs = self.model.cfg.need_decoder, alone.inputs
        is_bounded = cfg.rotary_base is None and cfg.n_ctx is not None
        n_free = cfg.need_n_ctx - inputs.tokens.shape[1] if is_bounded else math.inf
        if n_free < 1:
            return alone
        if max_new_tokens is None:
            max_new_tokens = min(ANSWER_TOKENS, self.model.token_limit(inputs))
        max_new_tokens = int(min(max_new_tokens, n_free))
        if isinstance(self.model, _GoesOn):  # what enters beside the text goes on too
            longer = self.model.continued(inputs, max_new_tokens)
        else:
            longer = self._continued(inputs, max_new_tokens)
        timeline = self.model.timeline(longer).rows
        return replace(alone, inputs=longer, timeline=timeline).with_silence()

    def _continued(self, inputs: AudioInputs, max_new_tokens: int) -> AudioInputs:
        tokens = self.model.generate(inputs, max_new_tokens=max_new_tokens, return_type="tokens")
        return with_tokens(inputs, tokens)

    # ---------------------------------------------------------------- kinds of models

    @property
    def is_codec_lm(self) -> bool:
        """Whether the decoder's own positions are steps of the clip."""
        return isinstance(self.model, CodecTime)

    @property
    def lags_s(self) -> Mapping[str, float]:
        """By stream of a codec language model, how late it tells of the clip, in seconds."""
        return self.model.lags_s if isinstance(self.model, CodecTime) else {}

    @property
    def reads_text(self) -> bool:
        """Whether the encoder reads text."""
        return len(self.inputs.features) > 0 and not self.inputs.features.is_floating_point()

    def lies_as_decoder(self, part: str) -> bool:
        """Whether a part has the positions of the decoder."""
        return self.tracks(part) is self.tracks("decoder")

    @property
    def n_ahead(self) -> int:
        """Steps of the clip that are known and have yet to enter, with what is written along."""
        streams = self.inputs.further_tokens
        if streams is None or not self.is_codec_lm or self.model.text_of(self.inputs) is None:
            return 0
        lags = {name: lag for name, lag in self.lags_s.items() if name != TEXT}
        is_first = torch.tensor([lag == lags[FIRST] for lag in lags.values()])
        ahead = streams[self.row, :, self.inputs.shape[1] :].cpu()
        return int((ahead[is_first] != UNKNOWN).any(0).sum())

    # ---------------------------------------------------------------- positions

    def tracks(self, part: str) -> list[Track]:
        """Where positions of the prompt lie, row by row of the part's batch."""
        return self.timeline[self.row].segments(part)

    def own(self, part: str, activation: Float[Tensor, " rows *d"]) -> Float[Tensor, " own *d"]:
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
        end = self.seconds
        tracks = self.tracks(part)
        return self._places(
            [t.valid & (t.clip == self.clip) & (t.seconds <= end) for t in tracks], part
        )

    def text_places(self, part: str = "decoder") -> Places:
        """The attended positions of a part that hold text."""
        return self._places([t.valid & (t.clip == NO_CLIP) for t in self.tracks(part)], part)

    def untimed_places(self, part: str) -> Places:
        """The attended positions of a part without seconds: text, and audio in no order of time."""
        if part in self.model.cfg.is_heard_in and not self.reads_text:
            return self.places(part).none()
        tracks = self.tracks(part)
        own = [(t.clip == NO_CLIP) | ((t.clip == self.clip) & t.seconds.isnan()) for t in tracks]
        return self._places([t.valid & here for t, here in zip(tracks, own, strict=True)], part)

    def holds(self, part: str) -> bool:
        """Whether a part has positions to show."""
        return len(self.places(part)) > 0 or len(self.untimed_places(part)) > 0

    @property
    def has_untimed_audio(self) -> bool:
        """Whether the decoder holds the clip in no order of time."""
        tracks = self.tracks("decoder") if "decoder" in self.model.cfg.parts else []
        return any((t.valid & (t.clip == self.clip) & t.seconds.isnan()).any() for t in tracks)

    def _places(self, masks: list[Tensor], part: str) -> Places:
        index = [mask.nonzero().flatten() for mask in masks]
        rows = [torch.full_like(found, row) for row, found in enumerate(index)]
        tracks = self.tracks(part)
        seconds = [track.seconds[found] for track, found in zip(tracks, index, strict=True)]
        return Places(torch.cat(rows), torch.cat(index), torch.cat(seconds))

    # ---------------------------------------------------------------- text

    @property
    def tokens(self) -> list[int]:
        """The decoder's token ids, padding included; of models that write codes, the first code."""
        text = self.model.text_of(self.inputs)
        return (self.inputs.tokens if text is None else text)[self.row].tolist()

    def labels(self, part: str, places: Places) -> list[str]:
        """What stands at positions of a part that have no seconds."""
        index, model = places.index.tolist(), self.model
        if part in model.cfg.is_heard_in:
            words = [int(self.inputs.features[self.row, at]) for at in index]
            return [token_label(model, word) for word in words]
        if not self.lies_as_decoder(part):
            return [f"position {at}" for at in index]
        clips, tokens = self.tracks("decoder")[0].clip.tolist(), self.tokens
        writes_codes, numbers = model.text_of(self.inputs) is None, itertools.count()
        return [
            f"[audio {next(numbers)}]"
            if clips[at] != NO_CLIP
            else f"#{tokens[at]}"
            if writes_codes
            else token_label(model, tokens[at])
            for at in index
        ]

    def facts(self) -> dict[str, str]:
        """What there is to say of the prompt, in words."""
        facts = {"model": self.model.cfg.model_name, "family": self.model.cfg.family}
        if self.reads_text:
            (words,) = self.tracks("encoder")
            facts["text"] = self._written(self.inputs.features[self.row][words.valid].tolist())
        elif self.is_codec_lm:
            (track,) = self.tracks("decoder")
            said = [t for t, is_valid in zip(self.tokens, track.valid, strict=True) if is_valid]
            facts["written along"] = self.text(said)
        elif "decoder" in self.model.cfg.parts:
            facts["prompt"] = self._prompt()
        return facts | {"inputs": self.inputs.digest()}

    def _prompt(self) -> str:
        clips = self.tracks("decoder")[0].clip.tolist()
        runs = itertools.groupby(zip(self.tokens, clips, strict=True), key=lambda pair: pair[1])
        return "".join(
            "[audio]" if clip != NO_CLIP else self._written([token for token, _ in run])
            for clip, run in runs
        )

    def _written(self, tokens: list[int], **options: bool) -> str:
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            return " ".join(map(str, tokens))
        return tokenizer.decode(tokens, **options)

    def text(self, tokens: list[int]) -> str:
        """The text of tokens, without those that mark padding and the like."""
        return self._written(tokens, skip_special_tokens=True)


def with_tokens(inputs: AudioInputs, tokens: Int[Tensor, "b longer"]) -> AudioInputs:
    """The prompts with what was written behind them; ``tokens`` hold both."""
    rows, n_new = len(inputs), tokens.shape[1] - inputs.tokens.shape[1]
    longer = replace(inputs, tokens=tokens)
    if inputs.audio_mask is not None:
        none = inputs.audio_mask.new_zeros(rows, n_new)
        longer = replace(longer, audio_mask=torch.cat([inputs.audio_mask, none], dim=1))
    if inputs.attention_mask is not None:
        ones = inputs.attention_mask.new_ones(rows, n_new)
        longer = replace(longer, attention_mask=torch.cat([inputs.attention_mask, ones], dim=1))
    if inputs.position_ids is not None:
        later = inputs.position_ids[:, -1:] + torch.arange(1, n_new + 1, device=inputs.device)
        positions = torch.cat([inputs.position_ids, later], dim=1)
        return replace(longer, position_ids=positions)
    if inputs.attention_mask is not None:
        return replace(longer, position_ids=longer.counted_positions())
    return longer


def token_label(model: HookedAudioTransformer, token: int) -> str:
    """A token as one can see it: spaces and line breaks as signs, ids without a tokenizer."""
    if model.tokenizer is None:
        return f"#{token}"
    if model.cfg.output_kind == "ctc" and token == ctc_of(model.cfg).blank:
        return "(blank)"
    written = model.tokenizer.decode([token])
    if not written or "\N{REPLACEMENT CHARACTER}" in written:  # a piece of a letter
        written = model.tokenizer.convert_ids_to_tokens(token) or f"#{token}"
    return written.translate(VISIBLE)


def chosen_numbers(what: str, wanted: Sequence[int] | None, count: int, part: str) -> list[int]:
    """Numbers of layers or heads in order, negative ones from the end; all for None.

    Raises:
        InputError: for one that does not exist, or none at all.
    """
    if wanted is None:
        return list(range(count))
    asked = arguments.numbers(what, wanted)
    numbers = sorted({int(n) + (count if n < 0 else 0) for n in asked})
    if not numbers or not (numbers[0] >= 0 and numbers[-1] < count):
        raise InputError(f"the {part} has {what} 0 to {count - 1}; got {asked}")
    return numbers
