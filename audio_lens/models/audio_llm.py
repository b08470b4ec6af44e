"""Audio LLMs: an encoder that hears, a connector that carries, a language model that answers.

The audio enters the language model in place of its placeholder tokens. What differs between
families is small and named in `HookedAudioLLM`: the encoder, the connector, how many tokens a
segment of audio becomes, and where these lie in time.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from audio_lens.audio import AudioError
from audio_lens.inputs import AudioInputs, InputError, padded
from audio_lens.models.base import AudioPlaces, HookedAudioTransformer
from audio_lens.models.config import AudioConfig, LoadingError, check_switches
from audio_lens.models.language_model import LanguageModel
from audio_lens.models.layers import Context, KVCache, Stack, padding_mask
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


class AudioLLM(HookedAudioTransformer):
    """An encoder, a connector and a language model into whose prompts the audio is merged.

    Attributes:
        mask_key: name of the mask of feature steps in a processor's mapping.
        masks_padding: whether the encoder is kept from hearing the padding of a segment.
        frames_per_token: encoder positions that become one token.
    """

    takes_question = True
    mask_key: ClassVar[str] = "feature_attention_mask"
    masks_padding: ClassVar[bool] = True
    frames_per_token: ClassVar[int] = 2

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

    @abstractmethod
    def token_count(self, n_valid: int) -> int:
        """Tokens that a segment with so many valid feature steps becomes."""

    def valid_count(self, n_valid: int) -> int:
        """How many of these hold audio and not padding: all, here."""
        return self.token_count(n_valid)

    @abstractmethod
    def token_seconds(self, count: int) -> Float[Tensor, " t"]:
        """Centres of a segment's tokens in seconds from its start."""

    def counts_of(self, lengths: Sequence[int], extra: Mapping[str, Tensor]) -> list[int]:
        """Tokens of every segment, from its valid feature steps; what goes beside them is known."""
        return [self.token_count(n) for n in lengths]

    def extra_of(
        self,
        features: Tensor,
        frames: Bool[Tensor, "segments frames"] | None,
        extra: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        """What goes beside the features of segments into inputs: what was given, here."""
        return extra

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
        counts = torch.tensor(self._token_counts(inputs), device=inputs.device)
        segment = torch.arange(len(counts), device=inputs.device).repeat_interleave(counts)
        index = torch.cat([torch.arange(int(n), device=inputs.device) for n in counts])
        return AudioPlaces(row, position, segment, index)

    def _lengths(self, inputs: AudioInputs) -> list[int]:
        return [inputs.n_valid(segment) for segment in range(len(inputs.features))]

    def _token_counts(self, inputs: AudioInputs) -> list[int]:
        return self.counts_of(self._lengths(inputs), inputs.extra)

    def is_text(self, inputs: AudioInputs) -> Bool[Tensor, "b t"]:
        """True at attended tokens that are not audio."""
        return inputs.attended & ~self.is_audio(inputs)

    # ---------------------------------------------------------------- inputs

    def inputs_from_mapping(self, mapping: Mapping[str, Any]) -> AudioInputs:
        """Inputs from what the family's processor returns; single placeholders are expanded.

        Raises:
            InputError: without tokens or features, or placeholders that do not fit the clips.
        """
        given = self._mapping_tensors(mapping, self.known_keys)
        if given["input_ids"] is None:
            raise InputError("inputs hold no input_ids: an audio LLM needs a text prompt")
        self.check_tokens(given["input_ids"])
        frames = given[self.mask_key]
        features, frames, per_clip = self.cut(
            given[self.features_key], None if frames is None else frames.bool()
        )
        per_clip = self.segments_given(given) or per_clip
        return self._assembled(
            given["input_ids"],
            given["attention_mask"],
            features,
            frames,
            per_clip,
            self.extra_given(given),
            position_ids=given["position_ids"],
        )

    @property
    def known_keys(self) -> tuple[str, ...]:
        """What a processor's mapping may hold."""
        return ("input_ids", "attention_mask", self.features_key, self.mask_key, "position_ids")

    def extra_given(self, given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """What a processor's mapping holds beside the features of segments: nothing, here."""
        return {}

    def segments_given(self, given: Mapping[str, Tensor | None]) -> tuple[int, ...] | None:
        """How many segments each clip has, where a processor's mapping says so: not here."""
        return None

    def cut(
        self, features: Tensor, frames: Bool[Tensor, "clips frames"] | None
    ) -> tuple[Tensor, Bool[Tensor, "segments frames"] | None, tuple[int, ...] | None]:
        """A processor's features as segments, their masks, and how many segments each clip has.

        Here processors give segments already; None leaves their number to the placeholders.
        """
        return features, frames, None

    def _assembled(
        self,
        tokens: Int[Tensor, "b t"],
        mask: Tensor | None,
        features: Tensor,
        frames: Bool[Tensor, "segments frames"] | None,
        per_clip: tuple[int, ...] | None,
        extra: Mapping[str, Tensor],
        position_ids: Tensor | None = None,
    ) -> AudioInputs:
        """Inputs of prompts and segments, with one placeholder per token of audio."""
        self.check_features(features)
        n_frames = features.shape[-1]
        lengths = [n_frames] * len(features) if frames is None else frames.sum(1).tolist()
        extra = self.extra_of(features, frames, extra)
        counts = self.counts_of(lengths, extra)
        per_clip = per_clip or self._segments_per_clip(tokens, counts, lengths, n_frames)
        of_clips = _summed(counts, per_clip)
        mask = torch.ones_like(tokens) if mask is None else mask
        tokens, mask = self._expanded(tokens, mask.bool(), of_clips)
        return AudioInputs(
            features=features,
            tokens=tokens,
            clips_per_row=self._clips_per_row(tokens, of_clips),
            attention_mask=None if mask.all() else mask,
            feature_mask=frames,
            position_ids=self._positions_of(tokens, position_ids),
            extra=extra,
            segments_per_clip=None if max(per_clip, default=1) == 1 else per_clip,
        )

    def _segments_per_clip(
        self,
        tokens: Int[Tensor, "b t"],
        counts: Sequence[int],
        lengths: Sequence[int],
        n_frames: int,
    ) -> tuple[int, ...]:
        """How segments make up clips: a clip is one run of placeholders, full but for its last."""
        if self.cfg.max_segments == 1:
            return (1,) * len(counts)
        per_clip, segment = [], 0
        for run in self._runs(tokens):
            n = 0
            while segment < len(counts) and (run > 0 or counts[segment] == 0):
                run, n, segment = run - counts[segment], n + 1, segment + 1
                if lengths[segment - 1] < n_frames:
                    per_clip.append(n)
                    n = 0
            per_clip += [n] if n else []
        if sum(per_clip) != len(counts):
            raise InputError(
                f"the placeholders of the prompts do not match the {len(counts)} segments of audio"
            )
        return tuple(per_clip)

    def _runs(self, tokens: Int[Tensor, "b t"]) -> Iterator[int]:
        """Lengths of the runs of placeholders, prompt after prompt."""
        for row in (tokens == self.audio_token_id).tolist():
            yield from (len(list(run)) for is_audio, run in itertools.groupby(row) if is_audio)

    def _expanded(
        self, tokens: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"], counts: Sequence[int]
    ) -> tuple[Int[Tensor, "b t2"], Bool[Tensor, "b t2"]]:
        """One placeholder per audio position, where the prompt has only one per clip.

        Raises:
            InputError: if the placeholders fit neither the clips nor their lengths.
        """
        n_placeholders = int((tokens == self.audio_token_id).sum())
        if n_placeholders == sum(counts):
            return tokens, mask
        if n_placeholders != len(counts):
            raise InputError(
                f"the prompts hold {n_placeholders} audio placeholders; {len(counts)} clip(s) need "
                f"one each, or {sum(counts)} (one per {self._token_ms}). Put the placeholder "
                "where each clip belongs"
            )
        rows, remaining = [], iter(counts)
        for row, kept in zip(tokens.tolist(), mask.tolist(), strict=True):
            expanded: list[int] = []
            for token in itertools.compress(row, kept):
                is_audio = token == self.audio_token_id
                expanded += self.placeholders(next(remaining)) if is_audio else [token]
            rows.append(expanded)
        return padded(rows, self._pad_token(), self.device, left=bool(mask[:, -1].all()))

    def placeholders(self, count: int) -> list[int]:
        """The tokens a clip of so many audio tokens takes in a prompt: placeholders only, here."""
        return [self.audio_token_id] * count

    def _clips_per_row(self, tokens: Int[Tensor, "b t"], counts: Sequence[int]) -> tuple[int, ...]:
        """How many clips each prompt holds, from its number of placeholders."""
        clips, remaining = [], list(counts)
        for total in (tokens == self.audio_token_id).sum(1).tolist():
            n = 0
            while total > 0 and n < len(remaining):
                total -= remaining[n]
                n += 1
            if total != 0:
                raise InputError(
                    "the placeholders of a prompt do not match the lengths of its clips"
                )
            clips.append(n)
            remaining = remaining[n:]
        return tuple(clips)

    def prepare(
        self,
        audio: Any,
        text: str | list | None = None,
        sampling_rate: int | None = None,
    ) -> AudioInputs:
        """Inputs from clips and what is asked about them.

        Args:
            audio: a path, array or tensor; a list of them gives one prompt each; a list of lists
                gives several clips per prompt. A batch is a list, not one stacked array.
            text: the question, which is put behind the clips in the chat template; or a whole
                prompt with the model's audio placeholder where each clip belongs; or a
                conversation (a list of messages) as the chat template takes it; or a list of
                these, one per prompt.
            sampling_rate: of arrays, in Hz; files know their own.

        Raises:
            AudioError: unusable, too short or too long audio.
            InputError: no text, placeholders that do not match the clips, unequal list lengths.
            TokenError: the model was loaded without a tokenizer.
        """
        self.need_tokenizer("a prompt")
        groups = _grouped(audio)
        texts = _one_per_prompt(text, len(groups))
        prompts = [self._prompt_of(t, len(group)) for t, group in zip(texts, groups, strict=True)]
        clips = [self._checked_clip(c, sampling_rate) for group in groups for c in group]
        segments = self.segments_of(clips)
        inputs = self._assembled(
            *self.encoded_prompts(prompts), *segments, self.heard_beside(clips)
        )
        rate = self.cfg.sampling_rate
        return replace(inputs, audio=clips, text=prompts, sampling_rate=rate, remake=self.prepare)

    def encoded_prompts(self, prompts: list[str]) -> tuple[Int[Tensor, "b t"], Tensor]:
        """Prompts as token ids, padded on the left, and the mask of what is no padding."""
        made = self.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        return made["input_ids"].to(self.device), made["attention_mask"].to(self.device)

    def heard_beside(self, clips: list[Float[Any, " _"]]) -> dict[str, Tensor]:
        """What goes beside the features of these clips: nothing, here."""
        return {}

    def segments_of(
        self, clips: list[Float[Any, " _"]]
    ) -> tuple[Tensor, Bool[Tensor, "segments frames"], tuple[int, ...]]:
        """Features of clips as segments, their masks, and how many segments each clip has."""
        longest = None if self.cfg.n_frames is None else self.cfg.n_frames * self.cfg.hop
        pieces = [
            [clip[start : start + longest] for start in range(0, len(clip), longest)]
            if longest
            else [clip]
            for clip in clips
        ]
        made = self.extract_features([piece for of_clip in pieces for piece in of_clip])
        return made["features"], made["mask"], tuple(map(len, pieces))

    def _checked_clip(self, source: Any, sampling_rate: int | None) -> Float[Any, " samples"]:
        clip = self.load_audio(source, sampling_rate)
        if self.token_count(-(-len(clip) // self.cfg.hop)) < 1:
            raise AudioError(
                f"the clip is {1000 * len(clip) / self.cfg.sampling_rate:.0f} ms long, too short "
                f"for one audio token ({self._token_ms})"
            )
        return clip

    @property
    def _token_ms(self) -> str:
        """How far tokens of audio lie apart, for people."""
        steps = self.token_seconds(2).diff()
        return f"{1000 * steps.item():.0f} ms" if steps.isfinite().any() else "of any length"

    @property
    def placeholder(self) -> str:
        """What stands for a clip in the text of a prompt."""
        return self.tokenizer.convert_ids_to_tokens(self.audio_token_id)

    def _prompt_of(self, text: Any, n_clips: int) -> str:
        placeholder = self.placeholder
        if not (isinstance(text, str) or _is_conversation(text)):
            raise InputError(
                "an audio LLM needs a question: pass text= (str, or a conversation), got "
                f"{type(text).__name__}"
            )
        if isinstance(text, str) and ("<|im_start|>" in text or placeholder in text):
            prompt = text
        else:
            prompt = self.templated(_conversation(text, n_clips))
        if prompt.count(placeholder) != n_clips:
            raise InputError(
                f"the prompt holds {prompt.count(placeholder)} placeholder(s) {placeholder} for "
                f"{n_clips} clip(s): put one where each clip belongs, or pass the bare question"
            )
        return prompt

    def templated(self, conversation: list) -> str:
        """The prompt of a conversation by the chat template, with one placeholder per clip."""
        return self.processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=False
        )

    # ---------------------------------------------------------------- time

    def timeline(self, inputs: AudioInputs | Mapping[str, Any]) -> Timeline:
        """Positions of the encoder, the connector and the audio in the prompt, in seconds."""
        inputs = self.as_inputs(inputs)
        is_audio = self.is_audio(inputs).cpu()
        attended = inputs.attended.cpu()
        length = self.encoder_length(inputs)
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
        return LanguageModel(cfg.decoder)


def check_encoder(ear: Any, known: str) -> None:
    """Raise unless the config of an encoder is of the kind that is implemented.

    Raises:
        LoadingError: naming both, or the switches that are not implemented.
    """
    if ear.model_type != known:
        raise LoadingError(f"the encoder is a {ear.model_type!r}; implemented: {known!r}")
    check_switches(ear, _OF_ENCODERS.split())


def _summed(counts: Sequence[int], per_clip: Sequence[int]) -> list[int]:
    """Tokens of each clip, from those of its segments."""
    remaining = iter(counts)
    return [sum(itertools.islice(remaining, n)) for n in per_clip]


def _grouped(audio: Any) -> list[list[Any]]:
    """Clips by prompt."""
    prompts = audio if isinstance(audio, (list, tuple)) else [audio]
    groups = [list(p) if isinstance(p, (list, tuple)) else [p] for p in prompts]
    if not groups or not all(groups):
        raise InputError("no audio: pass at least one clip per prompt")
    return groups


def _is_conversation(text: Any) -> bool:
    return isinstance(text, (list, tuple)) and bool(text) and isinstance(text[0], Mapping)


def _one_per_prompt(text: Any, n_prompts: int) -> list[Any]:
    """One text per prompt; a single one serves all."""
    if not isinstance(text, (list, tuple)) or _is_conversation(text):
        return [text] * n_prompts
    if len(text) != n_prompts:
        raise InputError(f"{n_prompts} prompts need as many texts, got {len(text)}")
    return list(text)


def _conversation(text: Any, n_clips: int) -> Any:
    """The question behind its clips, as one user turn; conversations stay as they are."""
    if _is_conversation(text):
        return text
    clips = [{"type": "audio", "audio_url": ""} for _ in range(n_clips)]
    return [{"role": "user", "content": [*clips, {"type": "text", "text": text}]}]
