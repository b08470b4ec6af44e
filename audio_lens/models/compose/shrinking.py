"""Composed models that decide by what they hear how many tokens a clip becomes."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.hooks import HookPoint
from audio_lens.inputs import KEPT, AudioInputs, InputError, padded
from audio_lens.models.compose.model import CompositionError, HookedComposed
from audio_lens.models.compose.runs import FILLER, change_points, frames_at, indices_of
from audio_lens.models.kinds.audio_llm import Segment
from audio_lens.models.layers import needed
from audio_lens.models.parts.connectors import Connector
from audio_lens.models.parts.language_model import LanguageModel
from audio_lens.timeline import Track


class ShrinkingConnector(Connector):
    """A connector that labels its frames and passes on the first of every run of equal labels.

    Subclasses define `adapt` and `label_logits`, and may define `shrink`. Which frames are kept is
    decided once for given inputs (`HookedShrinking.extra_of`) and does not change in a patched run.

    Attributes:
        blank: the label whose runs are dropped; None keeps a frame of these as of any other.
    """

    blank: int | None = None

    def __init__(self, *arguments: Any, frames_per_token: int = 1):
        super().__init__(*arguments, frames_per_token=frames_per_token)
        self.hook_frames = HookPoint(borrowed=True)  # adapt may hand on what it was given
        self.hook_kept = HookPoint()

    @abstractmethod
    def adapt(self, x: Float[Tensor, "b frames d_in"]) -> Float[Tensor, "b t d"]:
        """The frames that are labelled, ``frames_per_token`` positions of the encoder each."""

    @abstractmethod
    def label_logits(self, frames: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        """How much each frame sounds like each label."""

    def shrink(
        self, frames: Float[Tensor, "b t d"], kept: Int[Tensor, "b n"]
    ) -> Float[Tensor, "b n d"]:
        """What becomes of the kept frames (zeros behind the last of a row): nothing, here."""
        return self.hook_kept(frames_at(frames, kept))

    def frames_of(self, x: Float[Tensor, "b frames d_in"]) -> Float[Tensor, "b t d"]:
        """The frames alone, of the encoder's output."""
        return self.hook_frames(self.adapt(self.hook_in(x)))

    @torch.no_grad()
    def labels_of(self, frames: Float[Tensor, "b t d"]) -> Int[Tensor, "b t"]:
        """The likeliest label of every frame, one row after the other: logits are large."""
        return torch.cat([self.label_logits(row[None]).argmax(-1) for row in frames])

    def carry(
        self, x: Float[Tensor, "b frames d_in"], kept: Int[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """What enters the language model of the frames named; of all, where none are."""
        frames = self.hook_frames(self.adapt(x))
        if kept is None:
            kept = torch.arange(frames.shape[1], device=frames.device).repeat(len(frames), 1)
        return self.shrink(frames, kept)


class Segmentation(NamedTuple):
    """How a connector labels its frames, and which of them it keeps.

    Attributes:
        logits: of every label.
        labels: the likeliest.
        kept: indices of the frames that go on; -1 behind the last of a segment.
        seconds: their centres in seconds from the start of the segment; NaN behind the last.
    """

    logits: Float[Tensor, "segments t v"]
    labels: Int[Tensor, "segments t"]
    kept: Int[Tensor, "segments n"]
    seconds: Float[Tensor, "segments n"]


class ShrunkSegment(Segment):
    """A segment, and which of its frames are kept."""

    kept: Int[Tensor, " n"]

    @classmethod
    def of(cls, segment: Segment, kept: Int[Tensor, " n"]) -> ShrunkSegment:
        shrunk = cls(*segment)
        shrunk.kept = kept
        return shrunk


class HookedShrinking(HookedComposed):
    """A composed model whose connector decides by what it hears how many tokens a clip becomes.

    Which frames are kept (``inputs.extra["kept"]``, indices of frames of the connector, -1 behind
    the last of a segment) is part of the inputs: `prepare` lets the model decide, without hooks,
    and every run of these inputs holds it fixed, so that patched and unpatched runs have equal
    shapes. `segmentation` tells what a run would keep, hooks and all; `with_segmentation` puts two
    clips on the same frames.
    """

    connector: ShrinkingConnector

    def __init__(self, cfg: Any, ears: Mapping[str, Any], connector: Any, decoder: LanguageModel):
        if not isinstance(connector, ShrinkingConnector) or connector.taps or len(ears) > 1:
            raise CompositionError(
                "a shrinking model has one encoder and a ShrinkingConnector without taps"
            )
        super().__init__(cfg, ears, connector, decoder)

    # ---------------------------------------------------------------- which frames are kept

    def segmentation(self, inputs: AudioInputs | Mapping[str, Any]) -> Segmentation:
        """How frames are labelled, and which would be kept, under the hooks that are attached.

        The model itself goes on with those of ``inputs.extra["kept"]``, hooks or not.
        """
        inputs = self.as_inputs(inputs)
        logits = self.connector.label_logits(self._frames(inputs))
        labels = logits.argmax(-1)
        kept = self._kept(labels, inputs)
        return Segmentation(logits, labels, kept, self._kept_seconds(kept))

    def with_segmentation(
        self, inputs: AudioInputs | Mapping[str, Any], like: AudioInputs | Mapping[str, Any]
    ) -> AudioInputs:
        """The inputs with the frames kept that other inputs keep, for a counterfactual pair.

        Clips changed later (`with_audio`) are put on these frames too.

        Raises:
            InputError: clips of other lengths.
        """
        inputs, like = self.as_inputs(inputs), self.as_inputs(like)
        lengths = [self._lengths(one) for one in (inputs, like)]
        if lengths[0] != lengths[1] or inputs.segments_per_clip != like.segments_per_clip:
            raise InputError(
                f"the clips hold {lengths[0]} and {lengths[1]} mel frames, so they cannot be on "
                "one segmentation: pad or cut them to equal length"
            )
        tokens, mask = self._recounted(inputs, self.counts_of(lengths[0], like.extra))
        made = replace(
            inputs,
            tokens=tokens,
            attention_mask=None if mask.all() else mask,
            position_ids=None,
            extra={**inputs.extra, KEPT: like.extra[KEPT]},
            remake=functools.partial(self._prepared_like, like=like),
        )
        if inputs.position_ids is None:
            return made
        return replace(made, position_ids=made.counted_positions())

    def _prepared_like(
        self, audio: Any, text: Any, sampling_rate: int | None, like: AudioInputs
    ) -> AudioInputs:
        return self.with_segmentation(self.prepare(audio, text, sampling_rate), like)

    def _recounted(
        self, inputs: AudioInputs, counts: Sequence[int]
    ) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
        """Prompts whose segments have so many placeholders each, and their mask."""
        places = self.audio_places(inputs)
        first = places.index == 0
        begins = torch.zeros_like(inputs.attended)
        begins[places.row[first], places.position[first]] = True
        stays = inputs.attended & (begins | ~self.is_audio(inputs))
        remaining, rows = iter(counts), []
        for row, own in zip(inputs.tokens, stays, strict=True):
            made: list[int] = []
            for token in row[own].tolist():
                is_audio = token == self.audio_token_id
                made += self.placeholders(next(remaining)) if is_audio else [token]
            rows.append(made)
        left = bool(inputs.attended[:, -1].all())
        return padded(rows, self._pad_token(), self.device, left=left)

    def _kept(self, labels: Int[Tensor, "segments t"], inputs: AudioInputs) -> Tensor:
        """The frames that are kept of those that may become tokens, ``segments n``."""
        counts = [self.token_count(n) for n in self._lengths(inputs)]
        index = torch.arange(labels.shape[1], device=labels.device)
        may = index < torch.tensor(counts, device=labels.device)[:, None]
        return indices_of(change_points(labels, self.connector.blank) & may)

    def _frames(self, inputs: AudioInputs) -> Float[Tensor, "segments t d"]:
        heard = self.encode(inputs, stop=self.cfg.need_encoder.n_layers)
        resid = needed(heard, "a shrinking model hears with an encoder, and there is none")
        return self.connector.frames_of(self.encoder.finish(resid))

    def extra_of(
        self,
        features: Tensor,
        frames: Bool[Tensor, "segments frames"] | None,
        extra: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Which frames are kept: as given, or as the model decides without anybody's hooks.

        Raises:
            InputError: indices of no frames, or a segment of which nothing is kept.
        """
        tokens = torch.zeros(len(features), 0, dtype=torch.long, device=features.device)
        heard = AudioInputs(features, tokens, (1,) * len(features), feature_mask=frames)
        kept = extra.get(KEPT)
        if kept is None:
            with torch.no_grad(), self.without_hooks():
                labels = self.connector.labels_of(self._frames(heard))
            kept = self._kept(labels, heard).to(self.device)
        _check_kept(kept, len(features), self._tokens_of(self.encoder_length(heard)))
        return {**extra, KEPT: kept}

    # ---------------------------------------------------------------- forward

    def send_rows(
        self,
        resid: Float[Tensor, "rows frames d"],
        inputs: AudioInputs,
        segment: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, "rows n d_out"]:
        """The connector's output, of the frames that the inputs say are kept."""
        kept = inputs.extra[KEPT]
        chosen = kept if segment is None else kept[segment.to(kept.device)]
        return self.connector(self.encoder.finish(resid), chosen.to(resid.device))

    # ---------------------------------------------------------------- lengths and times

    def counts_of(self, lengths: Sequence[int], extra: Mapping[str, Tensor]) -> list[int]:
        """Tokens of every segment: the frames that are kept."""
        return (extra[KEPT] != FILLER).sum(1).tolist()

    def _kept_seconds(self, kept: Int[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        """Centres of kept frames in seconds from the start of their segment."""
        seconds = self.token_seconds(1 + max(kept.flatten().tolist(), default=0)).to(kept.device)
        return seconds[kept.clamp(min=0)].masked_fill(kept == FILLER, torch.nan)

    def _segments(self, inputs: AudioInputs) -> Iterator[list[ShrunkSegment]]:
        kept = iter(inputs.extra[KEPT].cpu() if len(inputs.features) else ())
        for segments in super()._segments(inputs):
            yield [ShrunkSegment.of(segment, next(kept)) for segment in segments]

    def _connector_track(self, length: int, segment: ShrunkSegment) -> Track:
        kept = segment.kept
        heard = -(-self.frame_count(segment.n_valid) // self.connector.frames_per_token)
        return Track(
            self._kept_seconds(kept) + segment.start_s,
            torch.full_like(kept, segment.clip),
            (kept != FILLER) & (kept < heard),
        )

    def _decoder_track(
        self,
        is_audio: Bool[Tensor, " t"],
        attended: Bool[Tensor, " t"],
        segments: Sequence[ShrunkSegment],
    ) -> Track:
        track, index = Track.of_tokens(attended), is_audio.nonzero().flatten()
        for segment in segments:
            kept = segment.kept[segment.kept != FILLER]
            here, index = index[: len(kept)], index[len(kept) :]
            track.seconds[here] = self._kept_seconds(kept) + segment.start_s
            track.clip[here] = segment.clip
        return track

    # ---------------------------------------------------------------- inputs

    @property
    def known_keys(self) -> tuple[str, ...]:
        """What a mapping may hold."""
        return (*super().known_keys, KEPT)

    def extra_given(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The frames to keep, where a mapping names them."""
        return {KEPT: given[KEPT]} if KEPT in given else {}


def _check_kept(kept: Int[Tensor, "segments n"], n_segments: int, n_frames: int) -> None:
    """Raise unless these are indices of frames, in order, some of every segment.

    Raises:
        InputError: saying what they are to be.
    """
    is_filler = kept == FILLER
    ordered = (kept[:, 1:] > kept[:, :-1]) | is_filler[:, 1:]
    packed = ~(is_filler[:, :-1] & ~is_filler[:, 1:])
    inside = is_filler | ((kept >= 0) & (kept < n_frames))
    if len(kept) != n_segments or not (ordered.all() and packed.all() and inside.all()):
        raise InputError(
            f"{KEPT!r} are, for each of {n_segments} segments, increasing indices of its "
            f"{n_frames} frames, with {FILLER} behind the last"
        )
    empty = is_filler.all(1).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"nothing is kept of segment {', '.join(map(str, empty))}: all of it is labelled as "
            "blank, and the language model would hear nothing"
        )
