"""Kimi-Audio (arXiv 2504.18425): a stream of text and a stream of speech, both read and written.

Every position of a prompt holds a token of either stream, and their embeddings are summed. Where a
clip stands, the audio stream holds its discrete tokens, and Whisper's encoder (windows of 30 s,
four frames to a token, an MLP with a norm) is heard with them: the embedding there is
``(token + heard) * sqrt(2)``. Behind block `fork` of the decoder the residual stream parts: the
blocks that remain write text, those of the part `speaker` write speech. The logits of both stand
side by side, ``b t (text audio)``; ``model.stream(logits, "text")`` gives those of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from audio_lens.audio import Rates, sources_of
from audio_lens.hooks import HookPoint
from audio_lens.inputs import AudioInputs, InputError, padded
from audio_lens.models.config import LoadingError
from audio_lens.models.families.voxtral import StackedAudioLLM
from audio_lens.models.families.whisper import WhisperEncoder
from audio_lens.models.layers import KVCache, PartConfig, PreNormBlock, Stack
from audio_lens.models.loading.generation import stored_settings
from audio_lens.models.loading.stored import read_config, reads_checkpoint
from audio_lens.models.loading.weights import fill, read_weights, renamed
from audio_lens.models.mixins.settings import GreedyRun, stated_limit
from audio_lens.models.mixins.templates import chat_prompt
from audio_lens.models.parts.connectors import NormedConnector
from audio_lens.models.parts.language_model import LanguageModel
from audio_lens.recipes.kimi_audio_config import (
    ANSWERS,
    AUDIO,
    BEGIN,
    BLANK,
    CHAT,
    CLIP,
    END,
    TEXT,
    TEXT_END,
    WEIGHT_NAMES,
    WHISPER_FOLDER,
    WHISPER_WEIGHT_NAMES,
    Answer,
    KimiAudioConfig,
    SpeechTokenizer,
    kimi_audio_config,
    special_tokens,
)
from audio_lens.recipes.tiktoken import tiktoken_tokenizer
from audio_lens.timeline import Timeline

SPOKEN_LIMIT = 750  # new tokens of each stream, where nothing else is said

# -------------------------------------------------------------------------------- the model


class TwoStreamLanguageModel(LanguageModel):
    """A language model that reads two streams of tokens from one vocabulary.

    Of the audio stream there are `hook_token_embed` and `hook_audio_embed`, of the text stream
    `hook_text_embed`.
    """

    def __init__(self, cfg: PartConfig):
        super().__init__(cfg)
        self.hook_text_embed = HookPoint()

    def merge(
        self,
        tokens: Int[Tensor, "b t"],
        is_audio: Bool[Tensor, "b t"],
        audio: Float[Tensor, "n d"] | None,
    ) -> Float[Tensor, "b t d"]:
        """What the audio stream adds: its tokens, with the audio heard at its places."""
        embed = self.hook_token_embed(self.token_embed(tokens))
        if audio is None:
            return embed
        heard: Tensor = self.hook_audio_embed(audio.to(embed.dtype))
        return embed.masked_scatter(is_audio[..., None], self.heard(embed[is_audio], heard))

    @staticmethod
    def heard(embed: Float[Tensor, "n d"], audio: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """What discrete tokens and the audio heard with them add."""
        return (embed + audio) * embed.new_tensor(2.0).sqrt()

    def written(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """What the text stream adds.

        As in the published code, rows that hold nothing but token 0 add nothing: in a step of
        decoding this concerns the word of that id.
        """
        return self.token_embed(tokens) * tokens.any(1)[:, None, None]

    def with_text(
        self, spoken: Float[Tensor, "b t d"], tokens: Int[Tensor, "b t"]
    ) -> Float[Tensor, "b t d"]:
        """The residual stream entering block 0, from what the audio stream adds."""
        return self.hook_embed(spoken + self.hook_text_embed(self.written(tokens)))


class Speaker(Stack):
    """The blocks that write the audio stream."""

    def __init__(self, cfg: PartConfig):
        super().__init__(cfg, PreNormBlock)
        self.hook_embed = HookPoint(borrowed=True)  # what the last shared block gave
        self.unembed = nn.Linear(cfg.d_model, cfg.need_d_vocab, bias=False)


class TextAndCodes(NamedTuple):
    """What `HookedKimiAudio.speak` answers to one prompt: a text, and discrete audio tokens."""

    text: str
    codes: list[int]


class HookedKimiAudio(StackedAudioLLM):
    """Kimi-Audio with every activation hooked.

    `generate` writes text while the audio stream stays blank (its tokens are those of the text
    stream), `speak` writes both.

    Attributes:
        speech_tokenizer: makes the discrete tokens of a clip (mono, 16 kHz), for prompts that bring
            none; None if there is no such function.
    """

    cfg: KimiAudioConfig
    decoder: TwoStreamLanguageModel

    def __init__(self, cfg: KimiAudioConfig):
        super().__init__(cfg)
        self.audio_token_id = -1  # where discrete tokens are to come; no token of the vocabulary
        self.speech_tokenizer: SpeechTokenizer | None = None
        self.speaker = Speaker(cfg.further_decoders["speaker"])
        self.setup()

    def make_encoder(self, cfg: KimiAudioConfig) -> WhisperEncoder:
        return WhisperEncoder(cfg.need_encoder, cfg.need_n_mels)

    def make_connector(self, cfg: KimiAudioConfig) -> NormedConnector:
        width, decoder = cfg.need_encoder.d_model, cfg.need_decoder
        return NormedConnector(cfg.connector, width, decoder.d_model, decoder.eps)

    def make_decoder(self, cfg: KimiAudioConfig) -> TwoStreamLanguageModel:
        return TwoStreamLanguageModel(replace(cfg.need_decoder, d_vocab=cfg.d_stream))

    def token_count(self, n_valid: int) -> int:
        """One token per group of encoder frames; the last one is filled up with padding."""
        return -(-self.frame_count(n_valid) // self.frames_per_token)

    # ---------------------------------------------------------------- forward

    def enter_decoder(
        self, inputs: AudioInputs, encoded: Tensor | None, past: KVCache | None = None
    ) -> Float[Tensor, "b t d"]:
        """Both streams summed, with the audio in its places.

        Raises:
            InputError: without a text stream.
        """
        written = _text_stream(inputs)[:, 0]
        spoken = super().enter_decoder(inputs, encoded, past)
        return self.decoder.with_text(spoken, written)

    def enter_audio(
        self,
        audio: Float[Tensor, "m d"],
        inputs: AudioInputs,
        prompt: Int[Tensor, " m"],
        position: Int[Tensor, " m"],
    ) -> Float[Tensor, "m d"]:
        """The residual stream that audio becomes at positions of prompts, entering block 0."""
        embed = self.decoder.token_embed(inputs.tokens[prompt, position])
        written = self.decoder.written(_text_stream(inputs)[:, 0])[prompt, position]
        return self.decoder.heard(embed, audio) + written

    def _decode(
        self,
        inputs: AudioInputs,
        encoded: Tensor | None,
        resid: Tensor | None,
        start: int,
        stop: int | None,
        past: KVCache | None,
    ) -> Float[Tensor, "b t states"]:
        """The final hidden states of text and audio side by side, ``b t (text audio)``.

        With ``stop``, the residual stream entering that block of the decoder.

        Raises:
            InputError: for a start behind the block where the streams part.
        """
        if stop is not None:
            return super()._decode(inputs, encoded, resid, start, stop, past)
        parting = self.cfg.fork + 1
        if start > parting:
            raise InputError(
                f"the speaker reads what enters decoder layer {parting}: start there or before"
            )
        resid = self.enter_decoder(inputs, encoded, past) if resid is None else resid
        context = self.decoder_context(inputs, encoded, past)
        shared = self.decoder.run_blocks(resid, context, start, parting)
        text = self.decoder.run_blocks(shared, context, parting, self.cfg.need_decoder.n_layers)
        audio = self.speaker.hook_embed(shared)
        audio = self.speaker.run_blocks(audio, context, 0, len(self.speaker.blocks))
        if past is not None:
            past.length += resid.shape[1]
        return torch.cat([self.decoder.finish(text), self.speaker.finish(audio)], dim=-1)

    def read_out(self, hidden: Float[Tensor, "b t states"], inputs: AudioInputs) -> Tensor:
        """The logits of text and audio side by side; of the text alone, if its states are alone."""
        text, *audio = hidden.split(self.cfg.need_decoder.d_model, dim=-1)
        return torch.cat([self.decoder.unembed(text), *map(self.speaker.unembed, audio)], dim=-1)

    def timeline(self, inputs: AudioInputs | Mapping[str, Any]) -> Timeline:
        """Positions of every part in seconds; those of the speaker are the decoder's."""
        timeline = super().timeline(inputs)
        for row in timeline.rows:
            row.tracks["speaker"] = row.tracks["decoder"]
        return timeline

    # ---------------------------------------------------------------- inputs

    @property
    def known_keys(self) -> tuple[str, ...]:
        """What a mapping may hold."""
        return (*super().known_keys, "text_input_ids", "is_continuous_mask")

    def inputs_from_mapping(self, mapping: Mapping[str, Any]) -> AudioInputs:
        """Inputs from both streams of published prompts, and the log-mel features of their clips.

        ``input_ids`` is the audio stream, discrete tokens and all, ``text_input_ids`` the text
        stream; ``is_continuous_mask`` says where audio is heard, which without it is between the
        tokens that open and close a clip. ``input_features`` (one entry per window of 30 s) and
        their ``input_features_mask`` are those of Whisper's feature extractor.

        Raises:
            InputError: without streams or features, or where places and clips do not fit.
        """
        given = self._mapping_tensors(mapping, self.known_keys, needs_audio=False)
        spoken, written = given.get("input_ids"), given.get("text_input_ids")
        if spoken is None or written is None or spoken.shape != written.shape:
            raise InputError("prompts are input_ids and text_input_ids, of equal shape")
        self.check_tokens(spoken)
        self.check_tokens(written)
        mask = given.get("is_continuous_mask")
        is_heard = self._between_marks(spoken) if mask is None else mask.bool()
        both = {"text_input_ids", "is_continuous_mask"}
        line = {key: value for key, value in mapping.items() if key not in both}
        line["input_ids"] = spoken.masked_fill(is_heard, self.need_audio_token)
        inputs = super().inputs_from_mapping(line)
        if inputs.shape != spoken.shape:
            raise InputError(
                f"the audio stream has room for {int(is_heard.sum())} tokens, the clips are "
                f"{sum(self._token_counts(inputs))}: one per {self._token_ms}"
            )
        return replace(inputs, tokens=spoken, further_tokens=written[:, None], audio_mask=is_heard)

    def _between_marks(self, tokens: Int[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        """True between the tokens that open and close a clip."""
        begins = tokens == self.cfg.special(BEGIN)
        ends = tokens == self.cfg.special(END)
        return (begins.cumsum(1) > ends.cumsum(1)) & ~begins

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise unless every id is one of a stream, or stands for a discrete token to come.

        Raises:
            InputError: naming the first that is not.
        """
        n = self.cfg.d_stream
        unknown = tokens[((tokens < 0) & (tokens != self.audio_token_id)) | (tokens >= n)]
        if len(unknown):
            raise InputError(f"no token {unknown[0].item()}: either stream has {n} tokens")

    def prepare(
        self,
        audio: Any,
        text: str | list | None = None,
        sampling_rate: Rates = None,
        audio_tokens: Any = None,
        answer: Answer = "text",
    ) -> AudioInputs:
        """Inputs from clips, their discrete tokens, and what is asked about them.

        Args:
            audio: a path, array or tensor; a list of them gives one prompt each; a list of lists
                gives several clips per prompt, or none (``[]``). None is text alone.
            text: the question, which is put before the clips; None if they say all; or a whole
                prompt with ``<|im_media_begin|><|im_media_end|>`` where each clip belongs; or a
                conversation; or a list of these, one per prompt.
            sampling_rate: of arrays, in Hz, or one per clip; files and mappings know their own.
            audio_tokens: the discrete tokens of every clip, one sequence each in the order of the
                clips (a bare sequence for a single clip), numbered from 0 as the GLM-4 speech
                tokenizer gives them: one per 80 ms. None asks `speech_tokenizer`.
            answer: whether the model is asked to answer in text or in text and speech ("both").

        Raises:
            AudioError: unusable or too long audio.
            InputError: no discrete tokens, or not as many as a clip has; unequal list lengths.
            TokenError: the model was loaded without a tokenizer.
        """
        if answer not in ANSWERS:
            raise InputError(f"answer must be text or both, got {answer!r}")
        line = super().prepare(audio, text, sampling_rate)
        clips = line.audio or []
        codes = self._codes(line, clips, audio_tokens)
        known = list(zip(clips, codes, strict=True))
        return replace(
            self._in_two_streams(line, codes, answer), remake=partial(self._again, known, answer)
        )

    def _codes(self, line: AudioInputs, clips: Sequence[np.ndarray], given: Any) -> list[list[int]]:
        """The discrete tokens of every clip, checked against its length.

        Those of a clip that several prompts hold are given, or made, once.
        """
        own = {id(clip): clip for clip in clips}
        if given is not None or not clips:
            made = _per_clip([] if given is None else given)
        elif self.speech_tokenizer is not None:
            made = map(self.speech_tokenizer, own.values())
        else:
            raise InputError(
                "Kimi-Audio reads a clip as discrete tokens, too: pass audio_tokens=, one sequence "
                "per clip as the GLM-4 speech tokenizer gives it (THUDM/glm-4-voice-tokenizer, not "
                "in transformers), or set model.speech_tokenizer to a function that makes them"
            )
        codes = [[int(code) for code in of_clip] for of_clip in made]
        if len(codes) == len(own):
            by_clip = dict(zip(own, codes, strict=True))
            codes = [by_clip[id(clip)] for clip in clips]
        counts = [0] * len(clips)
        for clip, count in zip(line.clip_of_segment, self._token_counts(line), strict=True):
            counts[clip] += count
        if list(map(len, codes)) != counts:
            raise InputError(
                f"the clips are {counts} tokens long (one per {self._token_ms}), the audio_tokens "
                f"{list(map(len, codes))}"
            )
        odd = [code for of_clip in codes for code in of_clip if not 0 <= code < self.cfg.n_codes]
        if odd:
            raise InputError(
                f"no audio token {odd[0]}: there are {self.cfg.n_codes}, numbered from 0"
            )
        return codes

    def _in_two_streams(
        self, line: AudioInputs, codes: Iterable[list[int]], answer: Answer
    ) -> AudioInputs:
        """Both streams of prompts in which, as one line of tokens, they take turns.

        Words and the end of the text are of the text stream.
        """
        cfg, tokens = self.cfg, line.tokens
        is_heard = tokens == self.audio_token_id
        heard = [code for of_clip in codes for code in of_clip]
        spoken = torch.tensor(heard, dtype=torch.long, device=line.device)
        tokens = tokens.masked_scatter(is_heard, spoken + cfg.first_code)
        asked = tokens == cfg.special(ANSWERS["text"])
        tokens = tokens.masked_fill(asked, cfg.special(ANSWERS[answer]))
        is_text = (tokens < cfg.first_special) | (tokens == cfg.special(TEXT_END))
        blank = cfg.special(BLANK)
        return replace(
            line,
            tokens=tokens.masked_fill(is_text, blank),
            further_tokens=tokens.masked_fill(~is_text, blank)[:, None],
            audio_mask=is_heard,
        )

    def _again(
        self,
        known: Sequence[tuple[np.ndarray, list[int]]],
        answer: Answer,
        audio: Any,
        text: Any,
        sampling_rate: Rates,
    ) -> AudioInputs:
        """`prepare` of other clips or another text; clips that are known keep their tokens."""
        clips = [clip for prompt in sources_of(audio) for clip in sources_of(prompt)]
        by_clip = {id(own): codes for own, codes in known}
        codes = [by_clip[id(clip)] for clip in clips if id(clip) in by_clip]
        if len(codes) == len(clips):
            return self.prepare(audio, text, sampling_rate, codes, answer)
        return self.prepare(audio, text, sampling_rate, answer=answer)

    def encoded_prompts(self, prompts: list[str]) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
        """Prompts as one line of tokens, padded on the left, and the mask of what is no padding."""
        return padded([self._line(p) for p in prompts], self._pad_token(), self.device)

    def _line(self, prompt: str) -> list[int]:
        pieces = [self.tokenizer.encode(p, add_special_tokens=False) for p in prompt.split(CLIP)]
        clip = [self.cfg.special(BEGIN), self.audio_token_id, self.cfg.special(END)]
        return [*pieces[0], *(token for piece in pieces[1:] for token in (*clip, *piece))]

    @property
    def placeholder(self) -> str:
        return CLIP

    def _prompt_of(self, text: Any, n_clips: int) -> str:
        """Questions come before their clips, as in the published examples."""
        if (text is None and n_clips) or (isinstance(text, str) and CLIP not in text):
            question = [{"type": "text", "text": text}] if text else []
            clips = [{"type": "audio"}] * n_clips
            text = [{"role": "user", "content": [*question, *clips]}]
        return super()._prompt_of(text, n_clips)

    def templated(self, conversation: list) -> str:
        return chat_prompt(self.tokenizer, conversation, chat_template=CHAT)

    def text_of(self, inputs: AudioInputs) -> Int[Tensor, "b t"]:
        """What stands at every position: the text, and the audio stream where that is blank."""
        text = _text_stream(inputs)[:, 0]
        return torch.where(text == self.cfg.special(BLANK), inputs.tokens, text)

    # ---------------------------------------------------------------- decoding

    @torch.no_grad()
    def speak(
        self,
        inputs: AudioInputs | Mapping[str, Any],
        max_new_tokens: int | None = None,
        **settings: Any,
    ) -> list[TextAndCodes]:
        """Continue both streams greedily: a text and discrete audio tokens for every prompt.

        Prompts are those prepared with ``answer="both"``. The audio tokens are numbered as those of
        `prepare`; a detokenizer that makes sound of them is published with the model. Settings are
        those of `generate`, and act on the text; without a limit of theirs there are 750 tokens of
        each stream at most, a minute.

        Raises:
            InputError: prompts that are padded on the right, or settings that are not implemented.
            TokenError: the model was loaded without a tokenizer.
        """
        tokenizer = self.need_tokenizer("text")
        if max_new_tokens is None and stated_limit(self.generation_settings(settings)) is None:
            max_new_tokens = SPOKEN_LIMIT
        inputs, run = self._begun(inputs, max_new_tokens, settings)
        audio, text = self._written(inputs, run, speaks=True).unbind(1)
        texts = tokenizer.batch_decode(text, skip_special_tokens=True)
        first = self.cfg.first_code
        codes = [[token - first for token in row if token >= first] for row in audio.tolist()]
        return [TextAndCodes(*answer) for answer in zip(texts, codes, strict=True)]

    @torch.no_grad()
    def continued(
        self,
        inputs: AudioInputs | Mapping[str, Any],
        max_new_tokens: int | None = None,
        **settings: Any,
    ) -> AudioInputs:
        """The prompts with the text that the model writes greedily behind them.

        Limits and settings are those of `generate`.

        Raises:
            InputError: prompts that are padded on the right, or settings that are not implemented.
        """
        inputs, run = self._begun(inputs, max_new_tokens, settings)
        new = self._written(inputs, run, speaks=False)
        run.tell_cut()
        added = torch.ones_like(new[:, 0], dtype=torch.bool)
        tokens = torch.cat([inputs.tokens, new[:, 0]], dim=1)
        heard, seen = self.is_audio(inputs), inputs.attention_mask
        longer = replace(
            inputs,
            tokens=tokens,
            further_tokens=torch.cat([_text_stream(inputs), new[:, 1:]], dim=2),
            audio_mask=torch.cat([heard, ~added], dim=1),
            attention_mask=None if seen is None else torch.cat([seen.bool(), added], dim=1),
            position_ids=None,
        )
        is_padded = longer.attention_mask is not None
        return replace(longer, position_ids=longer.counted_positions()) if is_padded else longer

    def _begun(
        self,
        inputs: object,
        max_new_tokens: int | None,
        options: Mapping[str, Any],
        **own: Any,
    ) -> tuple[AudioInputs, GreedyRun]:
        """Texts end with a token of their own, and are blank behind it."""
        own |= {"eos_token_id": self.cfg.special(TEXT_END), "pad_token_id": self._pad_token()}
        return super()._begun(inputs, max_new_tokens, options, **own)

    def _repeatable(self, inputs: AudioInputs) -> Int[Tensor, "b t"]:
        return _text_stream(inputs)[:, 0]

    def _continue(self, inputs: AudioInputs, run: GreedyRun) -> Int[Tensor, "b t"]:
        """The text stream with its continuation, while the audio stream stays blank."""
        text = self._written(inputs, run, speaks=False)[:, 1]
        return torch.cat([_text_stream(inputs)[:, 0], text], dim=1)

    def _written(self, inputs: AudioInputs, run: GreedyRun, speaks: bool) -> Int[Tensor, "b 2 n"]:
        """What is written to the audio stream and to the text stream."""
        cfg, past, encoded = self.cfg, KVCache(), self._heard_in(inputs, run)
        blank = cfg.special(BLANK)
        ends = torch.tensor([cfg.special("<|im_msg_end|>"), cfg.special(END)]).to(inputs.device)
        has_spoken = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
        written, step = [], inputs
        for index in range(run.limit.n_tokens):
            hidden = self.decode(step, encoded, past=past)
            logits = self.hook_logits(self.read_out(hidden, step))[:, -1]
            text = run.choose(self.stream(logits, TEXT))
            is_silent = has_spoken | (not speaks or index < cfg.delay)
            audio = self.stream(logits, AUDIO).argmax(-1).masked_fill(is_silent, blank)
            has_spoken = has_spoken | torch.isin(audio, ends)
            written.append(torch.stack([audio, text], dim=1))
            step = self._next_step(replace(step, further_tokens=None), audio)
            step = replace(step, further_tokens=text[:, None, None])
            if (has_spoken.all() or run.is_late) if speaks else run.is_over:
                break
        if run.record is not None:  # the last tokens enter, too
            self.hook_logits(self.read_out(self.decode(step, encoded, past=past), step))
        if speaks:
            run.done = has_spoken
            run.tell_cut()
        return torch.stack(written, dim=-1)

    def _pad_token(self) -> int:
        return self.cfg.special(BLANK)


def _text_stream(inputs: AudioInputs) -> Int[Tensor, "b 1 t"]:
    """The text that enters beside the audio stream.

    Raises:
        InputError: if there is none.
    """
    if inputs.further_tokens is None:
        raise InputError("the inputs hold no text stream: pass further_tokens (b 1 t)")
    return inputs.further_tokens


def _per_clip(audio_tokens: Any) -> Iterable[Any]:
    """One sequence per clip, of a bare one."""
    is_bare = len(audio_tokens) > 0 and np.ndim(audio_tokens[0]) == 0
    return [audio_tokens] if is_bare else audio_tokens


# -------------------------------------------------------------------------------- loading


@reads_checkpoint
def kimi_audio(
    checkpoint: str | Path,
    dtype: torch.dtype | None = None,
    speech_tokenizer: SpeechTokenizer | None = None,
) -> HookedKimiAudio:
    """Kimi-Audio-7B or Kimi-Audio-7B-Instruct, from a directory with the published files.

    Args:
        checkpoint: holds ``config.json``, the safetensors, the folder ``whisper-large-v3`` with
            both, and for texts ``tiktoken.model``.
        dtype: of the weights; None keeps the checkpoint's.
        speech_tokenizer: makes the discrete tokens of a clip (mono, 16 kHz): one per 80 ms, as
            the GLM-4 speech tokenizer, which is not published with the model.

    Raises:
        LoadingError: a file that is missing or corrupt, a config of another model, or weights
            without a place.
    """
    folder = Path(checkpoint)
    own, ear = (_read_config(where) for where in (folder, folder / WHISPER_FOLDER))
    state, whisper = (read_weights(where) for where in (folder, folder / WHISPER_FOLDER))
    model = kimi_audio_of(kimi_audio_config(own, ear, str(checkpoint)), state, whisper, dtype)
    model.speech_tokenizer = speech_tokenizer
    model.generation_config = stored_settings(folder)
    words = folder / "tiktoken.model"
    if words.is_file():
        model.tokenizer = model.processor = kimi_audio_tokenizer(words, model.cfg)
    else:
        model.tokenizer_problem = f"{folder} holds no tiktoken.model"
    return model


def kimi_audio_of(
    cfg: KimiAudioConfig,
    state: Mapping[str, Tensor],
    whisper: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> HookedKimiAudio:
    """The model of published weights, and of those of its Whisper.

    Raises:
        LoadingError: for weights that are missing, misshapen or without a place.
    """
    with torch.device("meta"):
        model = HookedKimiAudio(cfg)
    tensors = {**renamed(state, WEIGHT_NAMES), **renamed(whisper, WHISPER_WEIGHT_NAMES)}
    fill(model, {name: x.to(dtype or x.dtype) for name, x in tensors.items()})
    model.feature_extractor = model.make_feature_extractor()
    return model.eval()


def kimi_audio_tokenizer(path: str | Path, cfg: KimiAudioConfig) -> PreTrainedTokenizerFast:
    """The tokenizer of a published ``tiktoken.model``."""
    names = special_tokens(cfg.first_code - cfg.first_special)
    return tiktoken_tokenizer(
        path, names, bos_token="[BOS]", eos_token="[EOS]", pad_token=names[-1], chat_template=CHAT
    )


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise LoadingError(f"{folder} holds no config.json, so this is no directory of Kimi-Audio")
    return read_config(file)
