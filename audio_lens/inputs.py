"""Everything a forward needs for a batch of prompts, as one object."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class InputError(ValueError):
    """Inputs that the model cannot take; the message says what to change."""


@dataclass(eq=False)
class AudioInputs:
    """A batch of prompts: one row of tokens each, and the clips they hold.

    Made by ``model.prepare``; any mapping a Hugging Face processor returns is accepted in its
    place. Rows are prompts; `features` has one entry per clip, in the order of the prompts.

    Attributes:
        features: log-mel features.
        tokens: decoder token ids; for audio LLMs with one placeholder per audio position.
        attention_mask: True at tokens, False at padding; None if nothing is padded. While
            decoding step by step it covers the earlier tokens too.
        feature_mask: True at mel frames that hold audio; None counts all as audio.
        position_ids: positions of the tokens; None counts them (left padding shifts nothing).
        clips_per_row: how many clips each prompt holds.
        audio: the waveforms, mono at `sampling_rate`, one per clip.
        text: what each row says, as ``model.prepare`` takes it: a whole prompt or its token ids.
        sampling_rate: of `audio`, in Hz.
        remake: ``model.prepare`` with its options, for `with_audio` and `with_text`.
    """

    features: Float[Tensor, "clips mels frames"]
    tokens: Int[Tensor, "b t"]
    clips_per_row: tuple[int, ...]
    attention_mask: Bool[Tensor, "b seen"] | None = None
    feature_mask: Bool[Tensor, "clips frames"] | None = None
    position_ids: Int[Tensor, "b t"] | None = None
    audio: list[np.ndarray] | None = None
    text: list[str] | list[list[int]] | None = None
    sampling_rate: int = 16_000
    remake: Callable[..., AudioInputs] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if len(self.clips_per_row) != len(self.tokens) or sum(self.clips_per_row) != len(
            self.features
        ):
            raise InputError(
                f"{len(self.tokens)} prompts hold {sum(self.clips_per_row)} clips by their tokens, "
                f"but there are features of {len(self.features)} clips"
            )

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: everything but `remake`, behind which is a whole model."""
        return {**vars(self), "remake": None}

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
    def attended(self) -> Bool[Tensor, "b t"]:
        """True at tokens, False at padding."""
        if self.attention_mask is None:
            return torch.ones_like(self.tokens, dtype=torch.bool)
        return self.attention_mask[:, -self.tokens.shape[1] :].bool()

    def counted_positions(self) -> Int[Tensor, "b t"]:
        """Positions that count attended tokens only, so that left padding shifts nothing."""
        return (self.attended.cumsum(1) - 1).clamp(min=0)

    def mel_frames(self, clip: int) -> int:
        """Mel frames (10 ms) of a clip that hold audio; all of them where no mask says."""
        if self.feature_mask is None:
            return self.features.shape[-1]
        return int(self.feature_mask[clip].sum())

    def to(self, device: torch.device | str) -> AudioInputs:
        """The same inputs on another device."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return replace(self, **{name: x.to(device) for name, x in tensors.items()})

    def _clips_of(self, rows: Sequence[int]) -> list[int]:
        starts = np.cumsum([0, *self.clips_per_row])
        return [int(c) for row in rows for c in range(starts[row], starts[row + 1])]

    def __getitem__(self, rows: int | slice | Sequence[int] | Sequence[bool]) -> AudioInputs:
        """Some of the prompts, as a batch: an int, a slice, several ints, or a mask of bools.

        Raises:
            InputError: if that leaves no prompt.
            IndexError: for a row that does not exist.
        """
        chosen = np.arange(len(self))[rows if isinstance(rows, slice) else np.asarray(rows)]
        if chosen.size == 0:
            raise InputError(f"{rows} selects none of the {len(self)} prompts")
        return self._select(np.atleast_1d(chosen).tolist())

    def repeat(self, times: int) -> AudioInputs:
        """The whole batch ``times`` over, copy after copy."""
        return self._select(list(range(len(self))) * times)

    def _select(self, rows: list[int]) -> AudioInputs:
        clips = self._clips_of(rows)

        def take(items: Any, index: list[int]) -> Any:
            if items is None:
                return None
            return items[index] if isinstance(items, torch.Tensor) else [items[i] for i in index]

        return replace(
            self,
            features=take(self.features, clips),
            feature_mask=take(self.feature_mask, clips),
            audio=take(self.audio, clips),
            tokens=take(self.tokens, rows),
            attention_mask=take(self.attention_mask, rows),
            position_ids=take(self.position_ids, rows),
            text=take(self.text, rows),
            clips_per_row=tuple(self.clips_per_row[row] for row in rows),
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
        if not torch.equal(self.attended, other.attended):
            raise InputError(
                f"rows of {mine} and {theirs} are padded differently, so their positions do not "
                "correspond: use texts of equal tokens in every row"
            )
        lengths = [[x.mel_frames(clip) for clip in range(len(x.features))] for x in (self, other)]
        if lengths[0] != lengths[1]:
            raise InputError(
                f"clips of {mine} hold {lengths[0]} mel frames (10 ms), of {theirs} {lengths[1]}: "
                "pad or cut them to equal length"
            )

    def digest(self) -> str:
        """A hash of features, tokens and masks: a result can name what it was computed on."""
        digest = hashlib.sha256()
        masks = (self.attention_mask, self.feature_mask, self.position_ids)
        for tensor in (self.features.float(), self.tokens, *masks):
            if tensor is not None:
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


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
