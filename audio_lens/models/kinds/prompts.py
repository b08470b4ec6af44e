"""Prompts of audio LLMs: text with a place for every clip, and what a clip becomes in it."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.audio import AudioError, Rates, sources_of, with_rates
from audio_lens.inputs import AudioInputs, InputError, padded
from audio_lens.models.base import HookedAudioTransformer
from audio_lens.models.mixins.features import Clips
from audio_lens.models.mixins.templates import chat_prompt


class Prompts(HookedAudioTransformer):
    """How an `AudioLLM` makes inputs of clips and what is asked about them; mixed into it.

    Attributes:
        mask_key: name of the mask of feature steps in a processor's mapping.
        audio_token_id: the placeholder; None until a checkpoint or composition names it.
    """

    mask_key: ClassVar[str] = "feature_attention_mask"
    audio_token_id: int | None

    # ---------------------------------------------------------------- what the model tells

    @abstractmethod
    def token_count(self, n_valid: int) -> int:
        """Tokens that a segment with so many valid feature steps becomes."""

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

    @property
    def need_audio_token(self) -> int:
        """The placeholder's token id.

        Raises:
            InputError: if nothing named it.
        """
        if self.audio_token_id is None:
            raise InputError("no token stands for audio: set model.audio_token_id")
        return self.audio_token_id

    # ---------------------------------------------------------------- inputs

    def inputs_from_mapping(self, mapping: Mapping[str, Any]) -> AudioInputs:
        """Inputs from what the family's processor returns; single placeholders are expanded.

        Without features, prompts of text alone.

        Raises:
            InputError: without tokens, or placeholders that do not fit the clips.
        """
        given = self._mapping_tensors(mapping, self.known_keys, needs_audio=False)
        if "input_ids" not in given:
            raise InputError("inputs hold no input_ids: an audio LLM needs a text prompt")
        self.check_tokens(given["input_ids"])
        if not len(given[self.features_key]):
            return self._of_text(given)
        frames = given.get(self.mask_key)
        features, frames, per_clip = self.cut(
            given[self.features_key], None if frames is None else frames.bool()
        )
        per_clip = self.segments_given(given) or per_clip
        return self._assembled(
            given["input_ids"],
            given.get("attention_mask"),
            features,
            frames,
            per_clip,
            self.extra_given(given),
            position_ids=given.get("position_ids"),
        )

    def _of_text(self, given: Mapping[str, Tensor]) -> AudioInputs:
        """Inputs of prompts without audio.

        Raises:
            InputError: if these have a place for some, or anything beside it was given.
        """
        if (given["input_ids"] == self.audio_token_id).any():
            raise InputError(
                f"the prompts have places for audio, and the inputs hold no {self.features_key}"
            )
        own = ("input_ids", "attention_mask", "position_ids", self.features_key)
        beside = [key for key, x in given.items() if key not in own and x.numel()]
        if beside:
            raise InputError(f"{', '.join(beside)} without {self.features_key}: pass audio")
        return self._assembled(
            given["input_ids"],
            given.get("attention_mask"),
            self.no_features(),
            None,
            (),
            {},
            position_ids=given.get("position_ids"),
        )

    @property
    def known_keys(self) -> tuple[str, ...]:
        """What a processor's mapping may hold."""
        return ("input_ids", "attention_mask", self.features_key, self.mask_key, "position_ids")

    def extra_given(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a processor's mapping holds beside the features of segments: nothing, here."""
        return {}

    def segments_given(self, given: Mapping[str, Tensor]) -> tuple[int, ...] | None:
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
        n_frames, counts = features.shape[-1], []
        lengths = [n_frames] * len(features) if frames is None else frames.sum(1).tolist()
        if len(features):
            self.check_features(features)
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
        return [self.need_audio_token] * count

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
        sampling_rate: Rates = None,
    ) -> AudioInputs:
        """Inputs from clips and what is asked about them.

        Args:
            audio: a path, array, tensor or mapping (see `audio.load`); a list of them gives one
                prompt each; a list of lists gives several clips per prompt, or none (``[]`` or
                None). None alone is text alone. A batch is a list, not one stacked array.
            text: the question, which is put behind the clips in the chat template; or a whole
                prompt with the model's audio placeholder where each clip belongs; or a
                conversation (a list of messages) as the chat template takes it; or a list of
                these, one per prompt. Several about the clips of a single prompt give as many
                prompts about them, which are encoded once.
            sampling_rate: of arrays, in Hz, or one per clip; files and mappings know their own.

        Raises:
            AudioError: unusable, too short or too long audio.
            InputError: no text, placeholders that do not match the clips, unequal list lengths.
            TokenError: the model was loaded without a tokenizer.
        """
        self.need_tokenizer("a prompt")
        groups = _grouped(audio)
        texts = _one_per_prompt(text, len(groups))
        times = len(texts) // len(groups)
        asked = zip(texts, groups * times, strict=True)
        prompts = [self._prompt_of(question, len(group)) for question, group in asked]
        clips = [
            self._checked_clip(clip, rate)
            for group, of_group in with_rates(groups, sampling_rate)
            for clip, rate in with_rates(group, of_group)
        ]
        self.tell_of_lengths([len(clip) for clip in clips])
        tokens, mask = self.encoded_prompts(prompts)
        self.check_tokens(tokens)
        inputs = self._assembled(tokens, mask, *self._heard(clips, times))
        rate, clips = self.cfg.sampling_rate, clips * times
        return replace(inputs, audio=clips, text=prompts, sampling_rate=rate, remake=self.prepare)

    def _heard(
        self, clips: list[Float[Any, " _"]], times: int
    ) -> tuple[Tensor, Tensor | None, tuple[int, ...], dict[str, Tensor]]:
        """Segments of the clips and what goes beside them, all of them so many times over."""
        if not clips:
            return self.no_features(), None, (), {}
        features, frames, per_clip = self.segments_of(clips)
        beside = self.heard_beside(clips)
        features, frames, *others = (
            x.repeat(times, *[1] * (x.ndim - 1)) for x in (features, frames, *beside.values())
        )
        return features, frames, per_clip * times, dict(zip(beside, others, strict=True))

    def encoded_prompts(self, prompts: list[str]) -> tuple[Int[Tensor, "b t"], Tensor]:
        """Prompts as token ids, padded on the left, and the mask of what is no padding."""
        made = self.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        return made["input_ids"].to(self.device), made["attention_mask"].to(self.device)

    def features_of(self, clips: Clips) -> Float[Tensor, " segments *shape"]:
        """The features of the segments of clips."""
        return self.segments_of(list(clips))[0]

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
        return self.tokenizer.convert_ids_to_tokens(self.need_audio_token)

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
        return chat_prompt(self.processor, conversation, add_generation_prompt=True)


def _summed(counts: Sequence[int], per_clip: Sequence[int]) -> list[int]:
    """Tokens of each clip, from those of its segments."""
    remaining = iter(counts)
    return [sum(itertools.islice(remaining, n)) for n in per_clip]


def _grouped(audio: Any) -> list[list[Any]]:
    """Clips by prompt; where None stands for a prompt's or for all, it has none."""
    groups = [[] if own is None else sources_of(own) for own in sources_of(audio)]
    if not groups:
        raise InputError("no audio: pass at least one clip, or None for text alone")
    return groups


def _is_conversation(text: Any) -> bool:
    return isinstance(text, (list, tuple)) and bool(text) and isinstance(text[0], Mapping)


def _one_per_prompt(text: Any, n_prompts: int) -> list[Any]:
    """One text per prompt, of which a single one serves all; or several of a single prompt."""
    if not isinstance(text, (list, tuple)) or _is_conversation(text):
        return [text] * n_prompts
    if not text or n_prompts not in (1, len(text)):
        raise InputError(f"{n_prompts} prompts need as many texts, got {len(text)}")
    return list(text)


def _conversation(text: Any, n_clips: int) -> Any:
    """The question behind its clips, as one user turn; conversations stay as they are."""
    if _is_conversation(text):
        return text
    clips = [{"type": "audio", "audio_url": ""} for _ in range(n_clips)]
    return [{"role": "user", "content": [*clips, {"type": "text", "text": text}]}]
