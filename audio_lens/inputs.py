"""Everything a forward needs for a batch of prompts, as one object."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from audio_lens.arguments import numbers, whole
from audio_lens.digests import of_tensor
from audio_lens.errors import InputError as InputError
from audio_lens.errors import RangeError
from audio_lens.pickles import all_alone

_ROWS = (  # what `AudioInputs` hold row by row, clip by clip or segment by segment
    *("features", "tokens", "attention_mask", "feature_mask", "position_ids"),
    *("further_tokens", "audio_mask", "labels", "audio", "text"),
)
MOST_COPIES = 1_000_000
KEPT = "kept"  # in `extra`: the frames of a segment that become tokens, where models choose some


@dataclass(eq=False, repr=False)
class AudioInputs:
    """A batch of prompts: one row of tokens each, and the clips they hold.

    Made by ``model.prepare``; any mapping a Hugging Face processor returns is accepted in its
    place. Rows are prompts, which hold clips; `features` has one entry per segment, in the order of
    the clips. A segment is what the encoder hears at once: a whole clip, or a window of one where
    the model cuts clips into windows.

    Attributes:
        features: log-mel features, or waveforms, as the model takes them; token ids where the
            encoder reads text.
        tokens: decoder token ids; for audio LLMs with one placeholder per audio position; none in
            models without a decoder.
        attention_mask: True at tokens, False at padding; None if nothing is padded. While
            decoding step by step it covers the earlier tokens too.
        feature_mask: True at feature steps (mel frames or samples) that hold audio; None counts
            all as audio.
        position_ids: positions of the tokens; None counts them (left padding shifts nothing).
        further_tokens: those that enter the decoder at the same positions (codes of audio), and
            those that are known to enter behind the last.
        audio_mask: True where audio stands in the prompts; None: at the model's placeholders.
        clips_per_row: how many clips each prompt holds.
        segments_per_clip: how many segments each clip is cut into; None means one.
        extra: what else a family needs of every segment, by name: features for further encoders,
            choices that are made once and held fixed.
        labels: what the loss of a model without a decoder compares with, padded with -100.
        audio: the waveforms, mono at `sampling_rate`, one per clip.
        text: what each row says, as ``model.prepare`` takes it: a whole prompt or its token ids.
        sampling_rate: of `audio`, in Hz.
        remake: ``model.prepare`` with its options, for `with_audio` and `with_text`.
        copies: how many times over the batch holds the same prompts (`repeat`).
    """

    features: Shaped[Tensor, " segments *shape"]
    tokens: Int[Tensor, "b t"]
    clips_per_row: tuple[int, ...]
    attention_mask: Bool[Tensor, "b seen"] | None = None
    feature_mask: Bool[Tensor, "segments frames"] | None = None
    position_ids: Int[Tensor, "b t"] | None = None
    further_tokens: Int[Tensor, "b k ahead"] | None = None
    audio_mask: Bool[Tensor, "b t"] | None = None
    extra: Mapping[str, Shaped[Tensor, " segments *_"]] = field(default_factory=dict)
    segments_per_clip: tuple[int, ...] | None = None
    labels: Int[Tensor, "b n"] | None = None
    audio: list[np.ndarray] | None = None
    text: list[str] | list[list[int]] | None = None
    sampling_rate: int = 16_000
    remake: Callable[..., AudioInputs] | None = None
    copies: int = 1

    def __post_init__(self) -> None:
        n_segments = len(self.clip_of_segment)
        if len(self.clips_per_row) != len(self.tokens) or n_segments != len(self.features):
            what = "clips" if self.segments_per_clip is None else "segments"
            raise InputError(
                f"{len(self.tokens)} prompts hold {n_segments} {what} by their tokens, but there "
                f"are features of {len(self.features)} {what}"
            )

    def __repr__(self) -> str:
        n, n_clips = len(self), sum(self.clips_per_row)
        heard = [len(x) / self.sampling_rate for x in self.audio or ()]
        seconds = f" of {', '.join(f'{x:.2f}' for x in heard)} s" if heard else ""
        padded = "" if self.attention_mask is None or self.attention_mask.all() else ", padded"
        shape = " x ".join(map(str, self.features.shape))
        tokens = f"tokens {n} x {self.tokens.shape[-1]}{padded}"
        return (
            f"AudioInputs of {n} prompt{'s' * (n != 1)}: {tokens}, "
            f"{n_clips} clip{'s' * (n_clips != 1)}{seconds}, features {shape}, on {self.device}"
        )

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: everything but `remake`, behind which is a whole model."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**all_alone(held), "extra": all_alone(dict(self.extra)), "remake": None}

    @property
    def shape(self) -> torch.Size:
        """``(batch, positions)`` of the decoder, as TransformerLens reads it."""
        return self.tokens.shape

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def streams(self) -> Int[Tensor, "b k ahead"] | None:
        """Former name of `further_tokens`."""
        return self.further_tokens

    @property
    def attended(self) -> Bool[Tensor, "b t"]:
        """True at tokens, False at padding."""
        if self.attention_mask is None:
            return torch.ones_like(self.tokens, dtype=torch.bool)
        return self.attention_mask[:, -self.tokens.shape[1] :].bool()

    @property
    def need_audio(self) -> list[np.ndarray]:
        """The waveforms, one per clip.

        Raises:
            InputError: inputs that hold none.
        """
        if not self.audio:
            raise InputError(
                "these inputs hold no waveform to show and play: pass audio= (what was heard, or "
                "made of the codes)"
            )
        return self.audio

    def counted_positions(self) -> Int[Tensor, "b t"]:
        """Positions that count attended tokens only, so that left padding shifts nothing."""
        return (self.attended.cumsum(1) - 1).clamp(min=0)

    @property
    def clip_of_segment(self) -> list[int]:
        """The clip, counted over the batch, that each segment is of."""
        counts = self.segments_per_clip or (1,) * sum(self.clips_per_row)
        return [clip for clip, count in enumerate(counts) for _ in range(count)]

    @property
    def segments_per_row(self) -> tuple[int, ...]:
        """How many segments each prompt holds."""
        return tuple(len(self._segments_of([row])) for row in range(len(self)))

    def n_valid(self, segment: int) -> int:
        """Feature steps of a segment that hold audio; all of them where no mask says."""
        if self.feature_mask is None:
            return self.features.shape[-1]
        return int(self.feature_mask[segment].sum())

    def clip_lengths(self) -> list[int]:
        """Feature steps of every clip that hold audio."""
        lengths = [0] * sum(self.clips_per_row)
        for segment, clip in enumerate(self.clip_of_segment):
            lengths[clip] += self.n_valid(segment)
        return lengths

    def to(self, device: torch.device | str) -> AudioInputs:
        """The same inputs on another device."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        extra = {name: x.to(device) for name, x in self.extra.items()}
        return replace(self, extra=extra, **{name: x.to(device) for name, x in tensors.items()})

    def _clips_of(self, rows: Sequence[int]) -> list[int]:
        starts = np.cumsum([0, *self.clips_per_row])
        return [int(c) for row in rows for c in range(starts[row], starts[row + 1])]

    def _segments_of(self, rows: Sequence[int]) -> list[int]:
        segments: dict[int, list[int]] = {}
        for segment, clip in enumerate(self.clip_of_segment):
            segments.setdefault(clip, []).append(segment)
        return [segment for clip in self._clips_of(rows) for segment in segments.get(clip, [])]

    def __getitem__(self, rows: int | slice | Sequence[int] | Sequence[bool]) -> AudioInputs:
        """Some of the prompts, as a batch: an int, a slice, several ints, or a mask of bools.

        Raises:
            InputError: if that leaves no prompt.
            IndexError: for a row that does not exist.
        """
        chosen = self._chosen(rows)
        if not chosen:
            raise InputError(f"{rows} selects none of the {len(self)} prompts")
        return self._select(chosen)

    def _chosen(self, rows: Any) -> list[int]:
        everything = list(range(len(self)))
        if isinstance(rows, slice):
            return everything[rows]
        asked = rows.tolist() if hasattr(rows, "tolist") else rows  # of arrays and tensors
        if isinstance(asked, (list, tuple)) and all(isinstance(one, bool) for one in asked):
            if len(asked) != len(self):
                raise RangeError(f"a mask of {len(asked)} rows does not fit {len(self)} prompts")
            return list(itertools.compress(everything, asked))
        numbered = numbers("rows", asked)
        if not all(-len(self) <= row < len(self) for row in numbered):
            raise RangeError(f"there is no row {asked}: the batch holds {len(self)} prompts")
        return [everything[row] for row in numbered]

    @staticmethod
    def joined(batches: Sequence[AudioInputs]) -> AudioInputs:
        """Batches of equal layout as one, row after row.

        Raises:
            InputError: none, or batches that would have to be padded.
        """
        if not batches:
            raise InputError("no inputs to join")

        def rows(name: str, parts: list[Any]) -> Any:
            if all(part is None for part in parts):
                return None
            if any(part is None for part in parts):
                raise InputError(f"inputs with and without {name} cannot be joined")
            if not isinstance(parts[0], torch.Tensor):
                return [row for part in parts for row in part]
            if len({part.shape[1:] for part in parts}) > 1:
                shapes = ", ".join(str(tuple(part.shape)) for part in parts[:3])
                raise InputError(f"{name} of {shapes} cannot be joined: they are not as long")
            return torch.cat(parts)

        per_clip = rows("segments_per_clip", [x.segments_per_clip for x in batches])
        names = {name for x in batches for name in x.extra}
        extra = {name: rows(name, [x.extra.get(name) for x in batches]) for name in names}
        return replace(
            batches[0],
            **{name: rows(name, [getattr(x, name) for x in batches]) for name in _ROWS},
            extra={name: held for name, held in extra.items() if held is not None},
            clips_per_row=tuple(count for x in batches for count in x.clips_per_row),
            segments_per_clip=None if per_clip is None else tuple(per_clip),
        )

    def repeat(self, times: int) -> AudioInputs:
        """The whole batch ``times`` over, copy after copy.

        Raises:
            InputError: for fewer than one.
        """
        whole("times", times, least=1, most=MOST_COPIES)
        repeated = self._select(list(range(len(self))) * times)
        return replace(repeated, copies=self.copies * times)

    def _select(self, rows: list[int]) -> AudioInputs:
        clips, segments = self._clips_of(rows), self._segments_of(rows)
        counts = self.segments_per_clip

        def take(items: Any, index: list[int]) -> Any:
            if items is None:
                return None
            return items[index] if isinstance(items, torch.Tensor) else [items[i] for i in index]

        return replace(
            self,
            features=take(self.features, segments),
            feature_mask=take(self.feature_mask, segments),
            segments_per_clip=None if counts is None else tuple(counts[clip] for clip in clips),
            labels=take(self.labels, rows),
            audio=take(self.audio, clips),
            tokens=take(self.tokens, rows),
            attention_mask=take(self.attention_mask, rows),
            position_ids=take(self.position_ids, rows),
            further_tokens=take(self.further_tokens, rows),
            audio_mask=take(self.audio_mask, rows),
            extra={name: take(x, segments) for name, x in self.extra.items()},
            text=take(self.text, rows),
            clips_per_row=tuple(self.clips_per_row[row] for row in rows),
            copies=1,
        )

    def with_audio(self, audio: Any, sampling_rate: int | None = None) -> AudioInputs:
        """The same prompts with other clips, for a counterfactual pair.

        Args:
            audio: as ``model.prepare`` takes it, for as many prompts as there are here.
            sampling_rate: of arrays, in Hz; files know their own.

        Raises:
            InputError: if the new clips do not give the same shapes (make them equally long), or
                these inputs were not made by ``model.prepare``.
        """
        return self._remade(audio, self.text, sampling_rate)

    def with_text(self, text: Any) -> AudioInputs:
        """The same clips with another text, for a counterfactual pair.

        Raises:
            InputError: if the new text does not give the same number of tokens, or these inputs
                were not made by ``model.prepare``.
        """
        stops = np.cumsum(self.clips_per_row)
        prompts = [
            (self.audio or [])[stop - count : stop]
            for stop, count in zip(stops, self.clips_per_row, strict=True)
        ]
        clips = [prompt[0] if len(prompt) == 1 else prompt for prompt in prompts]
        return self._remade(clips, text, self.sampling_rate)

    def with_features(
        self, features: Shaped[Tensor, " segments *shape"], beside: Mapping[str, Tensor] = {}
    ) -> AudioInputs:
        """The same prompts with other features, which may carry gradients.

        What was chosen for the earlier ones (`extra`) is held fixed. The waveforms are left out:
        nobody knows those of the new features.

        Args:
            features: such as ``model.features(waveform)``.
            beside: what goes in place of entries of `extra`.

        Raises:
            InputError: features that do not have the shape of those here.
        """
        new, known = {"features": features, **beside}, {"features": self.features, **self.extra}
        for name, x in new.items():
            if name not in known or x.shape != known[name].shape:
                expected = tuple(known[name].shape) if name in known else "none"
                raise InputError(
                    f"{name} of these inputs: {expected}; got {tuple(x.shape)}. Use waveforms as "
                    "long as the clips here"
                )
        return replace(
            self, features=features, extra={**self.extra, **beside}, audio=None, remake=None
        )

    def _remade(self, audio: Any, text: Any, sampling_rate: int | None) -> AudioInputs:
        if self.remake is None:
            raise InputError(
                "with_audio and with_text need inputs made by model.prepare (copies and pickles of "
                "inputs leave the model behind): prepare them anew"
            )
        made = self.remake(audio, text, sampling_rate)
        self.check_pairs_with(made, "the original", "the changed inputs")
        return made

    def check_pairs_with(self, other: AudioInputs, mine: str, theirs: str) -> None:
        """Raise unless every position of the two batches corresponds.

        Raises:
            InputError: naming the difference and what to do about it.
        """
        kept = [x.extra[KEPT] for x in (self, other) if KEPT in x.extra]
        if self.clips_per_row == other.clips_per_row and len(kept) == 2 and not torch.equal(*kept):
            raise InputError(
                f"{mine} and {theirs} keep different frames of their clips, so their positions do "
                "not correspond: put both on the same, by model.with_segmentation(inputs, "
                "like=other)"
            )
        if self.tokens.shape != other.tokens.shape or self.clips_per_row != other.clips_per_row:
            raise InputError(
                f"{mine} is {tuple(self.tokens.shape)} tokens with {self.clips_per_row} clips, "
                f"{theirs} {tuple(other.tokens.shape)} with {other.clips_per_row}: patching needs "
                "equal shapes. Use clips of equal length (pad or cut) and texts of equal tokens"
            )
        if self.features.shape != other.features.shape:
            raise InputError(
                f"features of {mine} are {tuple(self.features.shape)}, of {theirs} "
                f"{tuple(other.features.shape)}: patching needs equal shapes"
            )
        shapes = [x._further_shapes() for x in (self, other)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{mine} brings {shapes[0]} beside tokens and features, {theirs} {shapes[1]}: "
                "patching needs equal shapes"
            )
        if not torch.equal(self.attended, other.attended):
            raise InputError(
                f"rows of {mine} and {theirs} are padded differently, so their positions do not "
                "correspond: use texts of equal tokens in every row"
            )
        lengths = [[x.n_valid(i) for i in range(len(x.features))] for x in (self, other)]
        if lengths[0] != lengths[1] or self.segments_per_clip != other.segments_per_clip:
            raise InputError(
                f"clips of {mine} hold {lengths[0]} feature steps, of {theirs} {lengths[1]}: pad "
                "or cut them to equal length"
            )

    def _further_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what stands beside tokens and features."""
        given = {"further_tokens": self.further_tokens, **self.extra}
        return {name: tuple(x.shape) for name, x in given.items() if x is not None}

    def same_audio(self, other: AudioInputs) -> bool:
        """Whether the encoders hear the same."""
        return (
            _same_or_none(self.feature_mask, other.feature_mask)
            and torch.equal(self.features, other.features)
            and self.extra.keys() == other.extra.keys()
            and all(torch.equal(x, other.extra[name]) for name, x in self.extra.items())
        )

    def heard_once(self) -> tuple[AudioInputs, list[int]]:
        """The prompts that hear something of their own, and where every segment is among theirs.

        A prompt whose clips equal those of an earlier one is left out. The inputs themselves where
        there is none, or where the features carry gradients, which belong to each row.
        """
        rows = [self._segments_of([row]) for row in range(len(self))]
        everything = list(range(len(self.features)))
        if self.features.requires_grad or len(rows) < 2:
            return self, everything
        loudest = self.features.flatten(1).amax(1).tolist()
        known: dict[tuple, list[int]] = {}
        first_row = []
        for row, segments in enumerate(rows):
            kind = (self._cuts_of(row), *(loudest[segment] for segment in segments))
            equal = (r for r in known.get(kind, []) if self._sounds_same(rows[r], segments))
            first_row.append(next(equal, row))
            if first_row[-1] == row:
                known.setdefault(kind, []).append(row)
        distinct = sorted(set(first_row))
        if len(distinct) == len(rows):
            return self, everything
        starts = dict(
            zip(distinct, np.cumsum([0, *(len(rows[r]) for r in distinct)]), strict=False)
        )
        return self._select(distinct), [
            int(starts[first]) + index
            for first, segments in zip(first_row, rows, strict=True)
            for index in range(len(segments))
        ]

    def _cuts_of(self, row: int) -> tuple[int, ...]:
        """How many segments each clip of a prompt has."""
        counts = self.segments_per_clip
        return tuple(1 if counts is None else counts[clip] for clip in self._clips_of([row]))

    def _sounds_same(self, one: list[int], other: list[int]) -> bool:
        """Whether these segments hold the same."""
        masks = () if self.feature_mask is None else (self.feature_mask,)
        of_segments = (self.features, *masks, *self.extra.values())
        return all(torch.equal(x[one], x[other]) for x in of_segments)

    def digest(self) -> str:
        """A hash of what a model reads: a result can name what it was computed on.

        That is features, tokens, masks, and which clips and segments belong to which prompt.
        """
        read = ("features", "tokens", "attention_mask", "feature_mask", "position_ids")
        tensors = {name: getattr(self, name) for name in (*read, "further_tokens", "audio_mask")}
        parts = [f"{list(self.clips_per_row)} {self.segments_per_row}"]
        parts += [
            f"{name} {of_tensor(x)}"
            for name, x in sorted({**tensors, **self.extra}.items())
            if x is not None
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _same_or_none(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def padded(
    rows: list[list[int]], pad: int, device: torch.device, left: bool = True
) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """Rows of token ids as one tensor, and the mask of what is no padding."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, where], mask[i, where] = torch.tensor(row), True
    return tokens.to(device), mask.to(device)


def texts_per_clip(text: Any, n_clips: int) -> list[Any]:
    """One text per clip; a single text serves all.

    Raises:
        InputError: if there are no clips, or not as many texts as clips.
    """
    if n_clips == 0:
        raise InputError("no audio: pass at least one clip")
    is_many = isinstance(text, (list, tuple)) and len(text) and not isinstance(text[0], int)
    if not is_many:
        return [text] * n_clips
    if len(text) != n_clips:
        raise InputError(f"{n_clips} clips need as many texts, got {len(text)}")
    return list(text)
