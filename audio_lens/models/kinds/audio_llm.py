"""Audio LLMs: an encoder that hears, a connector that carries, a language model that answers.

The audio enters the language model in place of its placeholder tokens. What differs between
families is small and named in `HookedAudioLLM`: the encoder, the connector, how many tokens a
segment of audio becomes, and where these lie in time.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.base import AudioPlaces
from audio_lens.models.config import AudioConfig, LoadingError, check_switches
from audio_lens.models.kinds.ear import Ear
from audio_lens.models.kinds.prompts import Prompts
from audio_lens.models.layers import Context, KVCache, Stack, multiplied, padding_mask
from audio_lens.models.parts.language_model import LanguageModel
from audio_lens.timeline import Row, Timeline, Track

_OF_ENCODERS = """
    activation_function conv_chunksize d_model downsample_hidden_size encoder_attention_heads
    encoder_ffn_dim encoder_layers hidden_act hidden_size intermediate_size max_position_embeddings
    max_source_positions n_window n_window_infer num_attention_heads num_hidden_layers
    num_key_value_heads num_mel_bins output_dim rope_parameters vocab_size
"""
FRAME_S = 0.02  # one encoder position of a Whisper-style encoder: two mel frames of 10 ms


class Segment(NamedTuple):
    """A row of the encoder's batch: where it begins in which clip of its prompt, and its length."""

    clip: int
    start_s: float
    n_valid: int


class AudioLLM(Prompts, Ear):
    """An encoder, a connector and a language model into whose prompts the audio is merged.

    Families define `token_count` and `token_seconds`.

    Attributes:
        masks_padding: whether the encoder is kept from hearing the padding of a segment.
        frames_per_token: encoder positions that become one token.
    """

    takes_question = True
    masks_padding: ClassVar[bool] = True
    frames_per_token: ClassVar[int] = 2
    connector: nn.Module
    decoder: LanguageModel

    def __init__(
        self, cfg: AudioConfig, encoder: Stack, connector: nn.Module, decoder: LanguageModel
    ):
        super().__init__(cfg)
        self.audio_token_id: int | None = None
        self.encoder = encoder
        self.connector = connector
        self.decoder = decoder
        self.setup()

    # ---------------------------------------------------------------- what a family defines

    def valid_count(self, n_valid: int) -> int:
        """How many of these hold audio and not padding: all, here."""
        return self.token_count(n_valid)

    def frame_count(self, n_valid: int) -> int:
        """Encoder positions of a segment with so many valid feature steps."""
        return (n_valid - 1) // 2 + 1

    def frame_seconds(self, count: int) -> Float[Tensor, " t"]:
        """Centres of a segment's encoder positions in seconds from its start."""
        return FRAME_S * torch.arange(count, dtype=torch.float64)

    def take_special_tokens(self, hf_config: Any) -> None:
        """Remember which token stands for audio."""
        self.audio_token_id = hf_config.audio_token_id

    # ---------------------------------------------------------------- forward

    def encoder_context(self, inputs: AudioInputs) -> Context:
        """Padding is masked, where the family masks it."""
        return Context(allowed=self._frames_allowed(inputs) if self.masks_padding else None)

    def _frames_allowed(self, inputs: AudioInputs) -> Bool[Tensor, "segments 1 1 frames"] | None:
        if inputs.feature_mask is None or inputs.feature_mask.all():
            return None
        lengths = inputs.feature_mask.sum(1).tolist()
        counts = torch.tensor([self.frame_count(n) for n in lengths], device=inputs.device)
        frames = torch.arange(self.encoder_length(inputs), device=inputs.device)
        return padding_mask(frames < counts[:, None], n_queries=1, causal=False)

    def encoder_reach(self, inputs: AudioInputs) -> int:
        """The frames of the longest segment, in whole tokens: what lies behind is masked."""
        length = self.encoder_length(inputs)
        if inputs.feature_mask is None or not self.masks_padding:
            return length
        longest = self.frame_count(max(self._lengths(inputs)))
        return min(length, -(-longest // self.frames_per_token) * self.frames_per_token)

    def send(self, resid: Float[Tensor, "segments frames d"]) -> Float[Tensor, "segments t d_out"]:
        """The connector's output."""
        return self.connector(self.encoder.finish(resid))

    def enter_decoder(
        self, inputs: AudioInputs, encoded: Tensor | None, past: KVCache | None = None
    ) -> Float[Tensor, "b t d"]:
        """Embedded tokens with the audio in its places."""
        is_later = past is not None and past.length > 0
        is_audio = self.is_audio(inputs)
        if encoded is not None and not is_later:
            return self.decoder.merge(inputs.tokens, is_audio, self._audio_tokens(inputs, encoded))
        if inputs.tokens.shape[1] > 1 and is_audio.any():
            raise InputError("all audio must be in the first call with a cache, not a later one")
        return self.decoder.merge(inputs.tokens, is_audio, None)

    def is_audio(self, inputs: AudioInputs) -> Bool[Tensor, "b t"]:
        """True where audio stands in the prompts."""
        if inputs.audio_mask is not None:
            return inputs.audio_mask
        return inputs.tokens == self.audio_token_id

    def _audio_tokens(
        self, inputs: AudioInputs, encoded: Float[Tensor, "segments t d"]
    ) -> Float[Tensor, "n d"]:
        """The connector's output at positions that become tokens, segment after segment."""
        counts = torch.tensor(self._token_counts(inputs), device=encoded.device)
        return encoded[torch.arange(encoded.shape[1], device=encoded.device) < counts[:, None]]

    def audio_places(self, inputs: AudioInputs) -> AudioPlaces:
        """Where each connector position of each segment enters the language model."""
        row, position = self.is_audio(inputs).nonzero(as_tuple=True)
        counts = torch.tensor(self._token_counts(inputs), dtype=torch.long, device=inputs.device)
        segment = torch.arange(len(counts), device=inputs.device).repeat_interleave(counts)
        index = torch.arange(len(segment), device=inputs.device)
        index = index - (counts.cumsum(0) - counts)[segment]
        return AudioPlaces(row, position, segment, index)

    def enter_audio(
        self,
        audio: Float[Tensor, "m d"],
        inputs: AudioInputs,
        prompt: Int[Tensor, " m"],
        position: Int[Tensor, " m"],
    ) -> Float[Tensor, "m d"]:
        """The residual stream that audio becomes at positions of prompts, entering block 0."""
        return multiplied(audio, self.cfg.need_decoder.embed_multiplier)

    def _lengths(self, inputs: AudioInputs) -> list[int]:
        return [inputs.n_valid(segment) for segment in range(len(inputs.features))]

    def _token_counts(self, inputs: AudioInputs) -> list[int]:
        if not len(inputs.features):
            return []
        return self.counts_of(self._lengths(inputs), inputs.extra)

    def least_encoded(self, inputs: AudioInputs) -> int:
        """The tokens of the longest segment."""
        return max(self._token_counts(inputs))

    def is_text(self, inputs: AudioInputs) -> Bool[Tensor, "b t"]:
        """True at attended tokens that are not audio."""
        return inputs.attended & ~self.is_audio(inputs)

    # ---------------------------------------------------------------- time

    def timeline(self, inputs: AudioInputs | Mapping[str, Any]) -> Timeline:
        """Positions of the encoder, the connector and the audio in the prompt, in seconds."""
        inputs = self.as_inputs(inputs)
        is_audio = self.is_audio(inputs).cpu()
        attended = inputs.attended.cpu()
        length = self.encoder_length(inputs) if len(inputs.features) else 0
        rows, first = [], 0
        for row, segments in enumerate(self._segments(inputs)):
            tracks = {
                "encoder": [
                    self.encoder_track(length, s.n_valid, s.clip, s.start_s) for s in segments
                ],
                "connector": [self._connector_track(length, s) for s in segments],
                "decoder": [self._decoder_track(is_audio[row], attended[row], segments)],
            }
            tracks |= self.tracks_beside(inputs, first, segments)
            first += len(segments)
            durations = [0.0] * inputs.clips_per_row[row]
            for segment in segments:
                durations[segment.clip] += segment.n_valid * self.cfg.step_s
            rows.append(Row(tracks, durations))
        return Timeline(rows)

    def _segments(self, inputs: AudioInputs) -> Iterator[list[Segment]]:
        """The segments of every prompt; clips are counted within it."""
        lengths, first = iter(self._lengths(inputs)), 0
        clips = iter(inputs.clip_of_segment)
        for n_clips, n_segments in zip(inputs.clips_per_row, inputs.segments_per_row, strict=True):
            made: list[Segment] = []
            for clip in itertools.islice(clips, n_segments):
                earlier = sum(s.clip == clip - first for s in made)
                start_s = earlier * self.cfg.segment_s if earlier else 0.0
                made.append(Segment(clip - first, start_s, next(lengths)))
            first += n_clips
            yield made

    def tracks_beside(
        self, inputs: AudioInputs, first: int, segments: Sequence[Segment]
    ) -> dict[str, list[Track]]:
        """The positions of further parts, for segments from the first of them on: none here."""
        return {}

    def _connector_track(self, length: int, segment: Segment) -> Track:
        seconds = self.token_seconds(length // self.frames_per_token)
        n_valid = self.valid_count(segment.n_valid)
        return Track.of_segment(seconds, n_valid, segment.clip, segment.start_s)

    def _decoder_track(
        self,
        is_audio: Bool[Tensor, " t"],
        attended: Bool[Tensor, " t"],
        segments: Sequence[Segment],
    ) -> Track:
        track = Track.of_tokens(attended)
        index = is_audio.nonzero().flatten()
        for segment in segments:
            count = self.token_count(segment.n_valid)
            here, index = index[:count], index[count:]
            track.seconds[here] = self.token_seconds(count) + segment.start_s
            track.clip[here] = segment.clip
        return track


class HookedAudioLLM(AudioLLM):
    """An audio LLM whose parts a configuration tells of: the families that transformers has."""

    def __init__(self, cfg: AudioConfig):
        parts = self.make_encoder(cfg), self.make_connector(cfg), self.make_decoder(cfg)
        super().__init__(cfg, *parts)

    @abstractmethod
    def make_encoder(self, cfg: AudioConfig) -> Stack:
        """The encoder."""

    @abstractmethod
    def make_connector(self, cfg: AudioConfig) -> nn.Module:
        """From the encoder's output to the width of the language model."""

    def make_decoder(self, cfg: AudioConfig) -> LanguageModel:
        """The language model."""
        return LanguageModel(cfg.need_decoder)


def check_encoder(ear: Any, known: str) -> None:
    """Raise unless the config of an encoder is of the kind that is implemented.

    Raises:
        LoadingError: naming both, or the switches that are not implemented.
    """
    if ear.model_type != known:
        raise LoadingError(f"the encoder is a {ear.model_type!r}; implemented: {known!r}")
    check_switches(ear, _OF_ENCODERS.split())
