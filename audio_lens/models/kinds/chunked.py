"""What audio LLMs share whose encoder hears a clip in short pieces (Qwen's, from 2.5-Omni on)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from audio_lens.audio import AudioError
from audio_lens.inputs import InputError
from audio_lens.models.kinds.audio_llm import HookedAudioLLM


class Sinusoids(nn.Module):
    """Positions that are computed, not learned: sines beside cosines, as Whisper's table has."""

    def __init__(self, n_ctx: int, d_model: int):
        super().__init__()
        self.n_ctx, self.d_model = n_ctx, d_model

    def forward(self, like: Float[Tensor, "b t d"]) -> Float[Tensor, "n_ctx d"]:
        """The table, on the device and in the precision of ``like``."""
        half = self.d_model // 2
        steps = torch.arange(half, device=like.device).float()
        frequencies = torch.exp(-math.log(10_000) / (half - 1) * steps)
        angles = torch.arange(self.n_ctx, device=like.device)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1).to(like.dtype)


class ChunkedAudioLLM(HookedAudioLLM):
    """Audio LLMs that cut the features of a clip into the pieces their encoder hears.

    The features are of the whole clip: its loudest point sets the floor of every piece. Clips are
    extracted one by one, so that what a clip gives does not depend on its batch.
    """

    lends_encoder = False

    def cut(
        self,
        features: Float[Tensor, "clips mels frames"],
        frames: Bool[Tensor, "clips frames"] | None,
    ) -> tuple[Tensor, Bool[Tensor, "segments steps"], tuple[int, ...]]:
        """Features of clips as segments, up to the last that holds audio.

        Raises:
            InputError: for a clip without audio.
        """
        if frames is None:
            frames = torch.ones_like(features[:, 0], dtype=torch.bool)
        width = self.cfg.need_n_frames
        per_clip = [-(-int(n) // width) for n in frames.sum(1)]
        if not all(per_clip):
            raise InputError(f"clip {per_clip.index(0)} holds no audio by its {self.mask_key}")
        room = max(0, max(per_clip, default=0) * width - features.shape[-1])
        pieces = F.pad(features, (0, room)).unfold(-1, width, width)
        heard = F.pad(frames, (0, room)).unfold(-1, width, width)
        cut = [rearrange(x[:, :n], "m s w -> s m w") for x, n in zip(pieces, per_clip, strict=True)]
        masks = [x[:n] for x, n in zip(heard, per_clip, strict=True)]
        return torch.cat(cut), torch.cat(masks), tuple(per_clip)

    def segments_of(
        self, clips: list[Float[Any, " _"]]
    ) -> tuple[Tensor, Bool[Tensor, "segments steps"], tuple[int, ...]]:
        """Features of whole clips, cut into segments."""
        made = [self._extracted(clip) for clip in clips]
        width = max(mask.shape[-1] for _, mask in made)
        features, masks = (
            torch.cat([F.pad(x, (0, width - x.shape[-1])) for x in columns])
            for columns in zip(*made, strict=True)
        )
        return self.cut(features.to(self.device), masks.to(self.device))

    def _extracted(self, clip: Float[Any, " _"]) -> tuple[Tensor, Bool[Tensor, "1 frames"]]:
        try:
            made = self.extracted([clip], truncation=False, **self.padding_of(clip))
        except RuntimeError as error:  # it mirrors the ends of a clip for its first window
            raise AudioError(
                f"the clip has {len(clip)} samples, too few for the feature extractor: {error}"
            ) from error
        return made["input_features"], made["attention_mask"].bool()

    def padding_of(self, clip: Float[Any, " _"]) -> dict[str, Any]:
        """How the feature extractor pads a clip: not at all, here."""
        return {"padding": True}
