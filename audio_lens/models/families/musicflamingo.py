"""Music Flamingo: Audio Flamingo 3 that is told the time.

Before the connector's MLP the encoder's output is turned by where it lies: pairs of its leading
dimensions rotate with the number of the window within the clip, the pairs behind them with the
place within the window, and both the faster the later in the clip (a rotary time embedding, after
Goel et al. 2024, arXiv:2410.12109, as the released checkpoints have it).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.hooks import HookPoint
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.config import LoadingError
from audio_lens.models.families.audioflamingo3 import HookedAudioFlamingo3
from audio_lens.models.parts.connectors import ConnectedConfig, ConnectorConfig, MLPConnector

FRAMES_PER_TOKEN = 4  # mel frames


@dataclass
class TimeConfig:
    """Shape of the rotary time embedding.

    Attributes:
        n_dims: dimensions that turn with the window, and as many with the place within it.
        base: of the speeds of their pairs; windows and places are counted in this many, too.
        token_s: seconds per place.
        n_places: places in a window.
    """

    n_dims: int
    base: float
    token_s: float
    n_places: int


@dataclass(kw_only=True)
class MusicFlamingoConfig(ConnectedConfig):
    """Shape of a Music Flamingo."""

    time: TimeConfig


class TimedConnector(MLPConnector):
    """The encoder's output turned by its time, and the MLP of it."""

    def __init__(self, cfg: ConnectorConfig, time: TimeConfig, d_in: int, d_out: int):
        super().__init__(cfg, d_in, d_out)
        self.time = time
        self.hook_turned = HookPoint()

    def carry(
        self, x: Float[Tensor, "segments t d_in"], window: Int[Tensor, " segments"]
    ) -> Float[Tensor, "segments t d_out"]:
        angles = time_angles(self.time, window, x.shape[1])
        return super().carry(self.hook_turned(turned(x, angles)))


def time_angles(
    cfg: TimeConfig, window: Int[Tensor, " segments"], n_places: int
) -> Float[Tensor, "segments t pairs"]:
    """By how much each pair of dimensions turns at the first places of windows with these numbers.

    In float32, as Hugging Face computes them.
    """
    places = torch.arange(n_places, device=window.device, dtype=torch.float32)
    steps = torch.arange(0, cfg.n_dims, 2, device=window.device, dtype=torch.float32)
    speeds = 1.0 / cfg.base ** (steps / cfg.n_dims)
    by_window = repeat(torch.outer(window.float() / cfg.base, speeds), "w e -> w t e", t=n_places)
    by_place = torch.outer(places / cfg.base * (2 * math.pi), speeds).expand_as(by_window)
    seconds = (window * cfg.n_places)[:, None] * cfg.token_s + places * cfg.token_s
    return torch.cat([by_window, by_place], dim=-1) * (-seconds * 2 * math.pi)[..., None]


def turned(
    x: Float[Tensor, "segments t d"], angles: Float[Tensor, "segments t pairs"]
) -> Float[Tensor, "segments t d"]:
    """The leading dimensions turned pair by pair, in float64 (float32 where there is none)."""
    precise = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
    n_dims = 2 * angles.shape[-1]
    first, second = rearrange(precise[..., :n_dims], "b t (e two) -> two b t e", two=2)
    cos, sin = angles.cos().to(precise), angles.sin().to(precise)
    pairs = [first * cos - second * sin, second * cos + first * sin]
    leading = rearrange(pairs, "two b t e -> b t (e two)")
    return torch.cat([leading, precise[..., n_dims:]], dim=-1).to(x.dtype)


class HookedMusicFlamingo(HookedAudioFlamingo3):
    """Music Flamingo with every activation hooked. It hears up to 20 minutes.

    The window of a segment is counted within its clip. (Where a clip ends in a window too short
    for a token, Hugging Face counts that window to the next clip, or fails if there is none.)
    """

    model_types = ("musicflamingo",)
    hf_class = "MusicFlamingoForConditionalGeneration"
    max_segments: ClassVar[int] = 40

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> MusicFlamingoConfig:
        """The shape of a `MusicFlamingoConfig`.

        Raises:
            LoadingError: what `HookedAudioFlamingo3` refuses, or another kind of time embedding.
        """
        rope, pieces = hf_config.rope_parameters, cls.pieces(hf_config)
        if rope.get("rope_type", "default") != "default":
            raise LoadingError(f"a time embedding of type {rope['rope_type']!r} is not implemented")
        time = TimeConfig(
            n_dims=int(hf_config.head_dim * rope.get("partial_rotary_factor", 1.0)),
            base=float(rope["rope_theta"]),
            token_s=FRAMES_PER_TOKEN * hf_config.audio_frame_step,
            n_places=pieces["encoder"].n_ctx // 2,
        )
        return MusicFlamingoConfig(**pieces, time=time)

    def make_connector(self, cfg: MusicFlamingoConfig) -> TimedConnector:
        widths = cfg.need_encoder.d_model, cfg.need_decoder.d_model
        return TimedConnector(cfg.connector, cfg.time, *widths)

    def take_special_tokens(self, hf_config: Any) -> None:
        """Remember the tokens that stand for audio, and where it begins and ends."""
        super().take_special_tokens(hf_config)
        self.begin_token_id = hf_config.audio_bos_token_id
        self.end_token_id = hf_config.audio_eos_token_id

    def send(self, resid: Float[Tensor, "segments frames d"]) -> Tensor:
        """Not possible: what is sent depends on the window.

        Raises:
            InputError: always; use `send_rows`.
        """
        raise InputError("the connector turns by the window: use send_rows(resid, inputs)")

    def send_rows(
        self,
        resid: Float[Tensor, "rows frames d"],
        inputs: AudioInputs,
        segment: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, "rows t d_out"]:
        """The connector's output of some segments (all, in order, where ``segment`` is None)."""
        clips = inputs.clip_of_segment
        windows = [index - clips.index(clip) for index, clip in enumerate(clips)]
        window = torch.tensor(windows, device=resid.device)
        own = window if segment is None else window[segment]
        return self.connector(self.encoder.finish(resid), own)

    def _prompt_of(self, text: Any, n_clips: int) -> str:
        """The prompt with every clip between its tokens of begin and end."""
        prompt = super()._prompt_of(text, n_clips)
        begin, audio, end = self.tokenizer.convert_ids_to_tokens(
            [self.begin_token_id, self.audio_token_id, self.end_token_id]
        )
        bare = f"(?:{re.escape(begin)})?{re.escape(audio)}(?:{re.escape(end)})?"
        return re.sub(bare, lambda match: begin + audio + end, prompt)
