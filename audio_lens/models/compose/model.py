"""Audio LLMs put together from parts: an encoder of one model, a connector, a language model.

For models that are published as pieces, and for one's own. The parts are taken over, not copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from audio_lens.errors import AudioLensError
from audio_lens.inputs import AudioInputs, InputError, padded
from audio_lens.models.base import HookedAudioTransformer
from audio_lens.models.config import AudioConfig
from audio_lens.models.kinds.audio_llm import AudioLLM, Segment
from audio_lens.models.kinds.ear import Ear
from audio_lens.models.layers import Context, needed
from audio_lens.models.mixins.templates import chat_prompt
from audio_lens.models.parts.connectors import Connector
from audio_lens.models.parts.language_model import LanguageModel
from audio_lens.timeline import Track

AUDIO, QUESTION = "{audio}", "{question}"
_OF_EARS = ("encoder", "frontend")  # what is taken of a model that lends its encoder


class CompositionError(AudioLensError, ValueError):
    """Parts that do not fit together; the message says which and why."""


@dataclass(kw_only=True)
class ComposedConfig(AudioConfig):
    """Shape of a composed model.

    Attributes:
        placeholder: what stands for a clip in the text of prompts.
        template: a prompt with ``{audio}`` where the clips and ``{question}`` where the question
            go; None uses the chat template of the tokenizer.
        keeps_padding: whether the padding of a segment becomes tokens too.
    """

    placeholder: str
    template: str | None
    keeps_padding: bool


class HookedComposed(AudioLLM):
    """An audio LLM put together by `compose`, with every activation hooked.

    Attributes:
        ears: what hears, by the name of its part: models without what lay behind their encoder.
    """

    masks_padding = False
    reads_prompts = False  # prompts enter the language model as embeddings
    cfg: ComposedConfig
    connector: Connector
    ears: dict[str, Ear]

    def __init__(
        self,
        cfg: ComposedConfig,
        ears: Mapping[str, Ear],
        connector: Connector,
        decoder: LanguageModel,
    ):
        ear, *others = ears.values()
        super().__init__(cfg, ear.encoder, connector, decoder)
        for name, module in children_of_ear(ear).items():
            self.add_module(name, module)
        for name, other in zip(cfg.ears, others, strict=True):
            for child, module in children_of_ear(other).items():
                self.add_module(name if child == "encoder" else f"{name}_{child}", module)
        vars(self)["ears"] = dict(ears)  # no children of this model: their encoders are
        self.setup()

    @property
    def ear(self) -> Ear:
        """What hears, without a language model."""
        return self.ears["encoder"]

    @property
    def features_key(self) -> str:
        """Name of the features in a mapping."""
        return self.ear.features_key

    def make_feature_extractor(self) -> Any:
        """The feature extractor of what hears."""
        return self.ear.feature_extractor

    # ---------------------------------------------------------------- hearing

    @property
    def mixes_lengths(self) -> str:
        """Where one of the ears does so, or the connector may read what an ear makes of padding."""
        reasons = (
            ear.mixes_lengths and f"{name}: {ear.mixes_lengths}" for name, ear in self.ears.items()
        )
        if reason := next(filter(None, reasons), ""):
            return reason
        is_open = any(ear.cfg.need_encoder.n_ctx is None for ear in self.ears.values())
        if is_open and not self.connector.reads_apart:
            return "its connector may read what the encoder makes of padding"
        return ""

    def enter_encoder(self, inputs: AudioInputs) -> Float[Tensor, "segments frames d"]:
        return self.ear.enter_encoder(inputs)

    def encoder_context(self, inputs: AudioInputs) -> Context:
        return self.ear.encoder_context(inputs)

    def encoder_length(self, inputs: AudioInputs) -> int:
        return self.ear.encoder_length(inputs)

    def encoder_reach(self, inputs: AudioInputs) -> int:
        """All positions: connectors may read any of them."""
        return self.encoder_length(inputs)

    def check_features(self, features: Tensor) -> None:
        self.ear.check_features(features)

    def extract_features(self, clips: list[Float[Any, " _"]]) -> dict[str, Tensor]:
        return self.ear.extract_features(clips)

    def hear_beside(
        self, name: str, inputs: AudioInputs, segment: Int[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "rows frames d"]:
        """The output of an ear beside the encoder, for some segments or for all."""
        ear, own = self.heard_by(name, inputs)
        resid = ear.enter_encoder(own)
        resid = ear.encoder.run_blocks(resid, ear.encoder_context(own), 0, len(ear.encoder.blocks))
        heard = ear.encoder.finish(resid)
        return heard if segment is None else heard[segment]

    def heard_by(
        self, part: str, inputs: AudioInputs
    ) -> tuple[HookedAudioTransformer, AudioInputs]:
        """An ear, and the inputs as it takes them: beside the encoder, with features of its own."""
        if part not in self.cfg.ears:
            return super().heard_by(part, inputs)
        features, mask = inputs.extra[part], inputs.extra.get(f"{part}.mask")
        own = replace(inputs, features=features, feature_mask=mask, extra={})
        return self.ears[part], own

    @property
    def sent_from(self) -> tuple[int, ...]:
        """The blocks that the connector reads."""
        return self.connector.taps or super().sent_from

    def hear(
        self, inputs: AudioInputs, resid: Tensor | None, start: int, stop: int | None
    ) -> Tensor | None:
        """As in every model; where the connector reads several blocks, these are kept for it.

        Args:
            resid: behind a block that the connector reads, the streams that left such blocks
                stand before it, side by side.

        Raises:
            InputError: a start behind a block that the connector reads, without its stream.
        """
        taps = self.connector.taps
        if not taps:
            return super().hear(inputs, resid, start, stop)
        given, resid = self._apart(resid, start)
        if stop is not None:
            return super().hear(inputs, resid, start, stop)
        tapped, begin = given, start
        for tap in taps[len(given) :]:
            heard = super().hear(inputs, resid, begin, tap + 1)
            resid = needed(heard, "the connector reads an encoder, and there is none")
            begin = tap + 1
            tapped.append(resid.to(tapped[0].device if tapped else resid.device))
        return self.send_rows(torch.cat(tapped, dim=-1), inputs).to(self.device)

    def _apart(self, resid: Tensor | None, start: int) -> tuple[list[Tensor], Tensor | None]:
        """The streams of the blocks before a start that the connector reads, and what enters it.

        Raises:
            InputError: where they are missing.
        """
        if resid is None:
            return [], None
        taps = self.connector.taps
        *given, resid = resid.split(self.cfg.need_encoder.d_model, dim=-1)
        if len(given) != sum(tap < start for tap in taps[:-1]):
            raise InputError(
                f"the connector reads blocks {', '.join(map(str, taps))} of the encoder: start at "
                f"encoder layer {min(taps)} or before"
            )
        return given, resid

    def send_rows(
        self,
        resid: Float[Tensor, "rows frames d"],
        inputs: AudioInputs,
        segment: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, "rows t d_out"]:
        """The connector's output, of what all ears heard.

        Args:
            resid: the stream leaving the encoder; those of all blocks that the connector reads,
                side by side.
        """
        beside = {name: self.hear_beside(name, inputs, segment) for name in self.cfg.ears}
        return self._carried(resid, beside)

    def send_heard(
        self,
        heard: Mapping[str, Tensor],
        inputs: AudioInputs,
        segment: Int[Tensor, " rows"] | None = None,
    ) -> Tensor:
        if not self.cfg.ears:
            return self.send_rows(heard["encoder"], inputs, segment)
        return self._carried(heard["encoder"], heard)

    def _carried(self, resid: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        """What the connector makes of the encoder's streams and of what other ears gave."""
        *tapped, last = resid.split(self.cfg.need_encoder.d_model, dim=-1)
        last = self.encoder.finish(last)
        sent = torch.cat([*tapped, last], dim=-1) if tapped else last
        return self.connector(sent, *(beside[name] for name in self.cfg.ears))

    def enter_decoder(self, inputs: AudioInputs, *rest: Any) -> Float[Tensor, "b t d"]:
        """Embedded tokens with the audio in its places."""
        if self._is_outside:  # nothing to embed: the audio is written over whatever stands there
            is_audio = self.is_audio(inputs)
            inputs = replace(
                inputs, tokens=inputs.tokens.masked_fill(is_audio, 0), audio_mask=is_audio
            )
        return super().enter_decoder(inputs, *rest)

    @property
    def _is_outside(self) -> bool:
        """Whether the placeholder is no token of the vocabulary."""
        return not 0 <= self.need_audio_token < self.cfg.need_decoder.need_d_vocab

    # ---------------------------------------------------------------- lengths and times

    def frame_count(self, n_valid: int) -> int:
        return self.ear.frame_count(n_valid)

    def frame_seconds(self, count: int) -> Float[Tensor, " t"]:
        return self.ear.frame_seconds(count)

    def token_count(self, n_valid: int) -> int:
        if self.cfg.keeps_padding:
            n_valid = self.cfg.need_n_frames
        return self._tokens_of(self.frame_count(n_valid))

    def valid_count(self, n_valid: int) -> int:
        """Tokens that hold audio; the last may be one that ends in padding."""
        if not self.cfg.keeps_padding:
            return self.token_count(n_valid)
        heard = self.frame_seconds(self.frame_count(n_valid))
        tokens = self.token_seconds(self.token_count(n_valid))
        return len(tokens) if tokens.isnan().all() else int((tokens <= heard[-1]).sum())

    def token_seconds(self, count: int) -> Float[Tensor, " t"]:
        return self._seconds_of(self.cfg.need_encoder.n_ctx or self._frames_for(count))[:count]

    def _frames_for(self, count: int) -> int:
        """Encoder positions enough for so many tokens, where any number of them can be heard."""
        n_frames = count
        while self._tokens_of(n_frames) < count:
            n_frames *= 2
        return n_frames

    def _tokens_of(self, n_frames: int) -> int:
        """Tokens of a segment with so many encoder positions."""
        return self.connector.token_count(n_frames // self.encoder.frames_pooled)

    def _seconds_of(self, n_frames: int) -> Float[Tensor, " t"]:
        """Centres of the tokens of so many encoder positions."""
        pooled = self.encoder.frames_pooled
        whole = self.frame_seconds(n_frames - n_frames % pooled)
        return self.connector.token_seconds(whole.unflatten(0, (-1, pooled)).mean(-1))

    def _connector_track(self, length: int, segment: Segment) -> Track:
        n_valid = self.valid_count(segment.n_valid)
        return Track.of_segment(self._seconds_of(length), n_valid, segment.clip, segment.start_s)

    def encoder_track(self, length: int, n_valid: int, clip: int, start_s: float | int) -> Track:
        return self.ear.encoder_track(length, n_valid, clip, start_s)

    def tracks_beside(
        self, inputs: AudioInputs, first: int, segments: Sequence[Segment]
    ) -> dict[str, list[Track]]:
        """The positions of the ears beside the encoder."""
        if not segments:
            return {name: [] for name in self.cfg.ears}
        tracks = {}
        for name in self.cfg.ears:
            ear, (_, heard) = self.ears[name], self.heard_by(name, inputs)
            length = ear.encoder_length(heard)
            tracks[name] = [
                ear.encoder_track(length, heard.n_valid(index), segment.clip, segment.start_s)
                for index, segment in enumerate(segments, start=first)
            ]
        return tracks

    # ---------------------------------------------------------------- inputs

    @property
    def known_keys(self) -> tuple[str, ...]:
        """What a mapping may hold."""
        beside = [key for name in self.cfg.ears for key in (name, f"{name}.mask")]
        return (*super().known_keys, *beside)

    def extra_given(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features for the ears beside the encoder.

        Raises:
            InputError: if there are none for one of them.
        """
        lacking = [name for name in self.cfg.ears if name not in given]
        if lacking:
            raise InputError(f"inputs hold no features for {', '.join(lacking)}")
        keys = [key for name in self.cfg.ears for key in (name, f"{name}.mask")]
        return {key: given[key] for key in keys if key in given}

    def heard_beside(self, clips: list[Float[Any, " _"]]) -> dict[str, Tensor]:
        """Features for the ears beside the encoder."""
        extra = {}
        for name in self.cfg.ears:
            made = self.ears[name].extract_features(clips)
            extra |= {name: made["features"], f"{name}.mask": made["mask"]}
        return extra

    def check_tokens(self, tokens: Tensor) -> None:
        super().check_tokens(tokens[tokens != self.audio_token_id])

    def encoded_prompts(self, prompts: list[str]) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
        """Prompts as token ids, cut at the placeholders; the first piece begins the text."""
        return padded([self._encoded(p) for p in prompts], self._pad_token(), self.device)

    def _encoded(self, prompt: str) -> list[int]:
        first, *others = prompt.split(self.cfg.placeholder)
        begin = getattr(self.tokenizer, "bos_token", None)
        is_begun = begin is not None and first.startswith(begin)
        tokens = self.tokenizer.encode(first, add_special_tokens=not is_begun)
        for piece in others:
            tokens.append(self.need_audio_token)
            tokens += self.tokenizer.encode(piece, add_special_tokens=False) if piece else []
        return tokens

    @property
    def placeholder(self) -> str:
        return self.cfg.placeholder

    def templated(self, conversation: list) -> str:
        """The prompt of a conversation: the template's, or the tokenizer's chat template.

        Raises:
            InputError: a conversation that the template has no place for, or no chat template.
        """
        texts = [_as_text(turn["content"], self.cfg.placeholder) for turn in conversation]
        if self.cfg.template is not None:
            if len(texts) > 1:
                raise InputError("this model's template is for one turn: pass the whole prompt")
            audio, question = texts[0]
            return self.cfg.template.replace(AUDIO, audio).replace(QUESTION, question)
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise InputError(
                "the tokenizer has no chat template: pass template= to compose, or whole prompts "
                f"with {self.cfg.placeholder} where each clip belongs"
            )
        turns = [
            {**turn, "content": "\n".join(filter(None, text))}
            for turn, text in zip(conversation, texts, strict=True)
        ]
        return chat_prompt(self.tokenizer, turns, add_generation_prompt=True)


def _as_text(content: Any, placeholder: str) -> tuple[str, str]:
    """The clips and the text of a turn."""
    if isinstance(content, str):
        return "", content
    kinds = [piece["type"] for piece in content]
    texts = [piece["text"] for piece in content if piece["type"] == "text"]
    return placeholder * kinds.count("audio"), "\n".join(texts)


def children_of_ear(model: HookedAudioTransformer) -> dict[str, nn.Module]:
    """What hears, of a model's children."""
    return {name: module for name, module in model.named_children() if name in _OF_EARS}
