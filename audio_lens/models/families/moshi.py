"""Moshi (Défossez et al. 2024, arXiv:2410.00037): a voice that listens while it speaks.

At every step of 80 ms the decoder reads the sum of one text token, eight codes of what Moshi says
and eight of what the user says. It writes the next text token; from its hidden state and that token
the depth decoder writes the eight codes that Moshi says next, each from those before it. Codebooks
but the first enter one step late.

What the published model does is what is done here. It differs from transformers 5.23 in this:

- The depth decoder is causal. In transformers it is with fused attention (sdpa) only: written out
  ("eager") and called without a mask, every codebook there sees the later ones too.
- A position sees the ``window`` last ones (3000, four minutes) and none before. In transformers it
  does so while decoding step by step, but a prompt is read whole.
- The depth decoder of a step is given the text and the codes that the *next* position reads, as
  when decoding. ``forward(text_labels=..., audio_labels=...)`` of transformers takes them as they
  are: labels that are not shifted by one position give other logits.
- ``depth_hidden_states`` and ``depth_attentions`` of transformers are the decoder's; here
  ``depth.blocks.{l}`` are the depth decoder's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig

from audio_lens.audio import Rates
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.config import LoadingError, check_switches
from audio_lens.models.kinds.codec_lm import (
    CodecLMConfig,
    HookedCodecLM,
    MoshiStack,
    block_weight_names,
    decoder_config,
    shape_of_stack,
)
from audio_lens.models.kinds.streams import UNKNOWN, CodeTables, code_track, codes_in, delayed
from audio_lens.models.mixins.settings import NOT_GREEDY, GreedyRun
from audio_lens.models.parts.depth import DepthConfig, DepthDecoder
from audio_lens.timeline import Track

_UNDERSTOOD = """
    audio_encoder_config audio_vocab_size depth_decoder_config ffn_dim head_dim hidden_act
    hidden_size input_size max_position_embeddings num_attention_heads num_codebooks
    num_hidden_layers num_key_value_heads rms_norm_eps rope_parameters sliding_window vocab_size
"""

_NOT_OF_CODES = {
    **NOT_GREEDY,
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"), ([],)),
    **dict.fromkeys(("sequence_bias", "forced_bos_token_id", "forced_eos_token_id"), ()),
}
"""Settings of the depth decoder's generation that are not implemented, and what is neutral."""


@dataclass(kw_only=True)
class MoshiConfig(CodecLMConfig):
    """Shape of a Moshi: its one further decoder ("depth") writes the codes of a step."""

    further_decoders: dict[str, DepthConfig] = field(default_factory=dict)


class MoshiDecoder(MoshiStack):
    """A stack with one table of embeddings per codebook; each holds the initial token too."""

    def __init__(self, cfg: CodecLMConfig):
        super().__init__(cfg.need_decoder, cfg.n_codebooks, cfg.n_texts + 1, cfg.n_texts)
        self.code_embed = CodeTables(cfg.n_codebooks, cfg.n_codes, cfg.need_decoder.d_model)

    def code_vectors(self, codes: Int[Tensor, "b k t"]) -> list[Float[Tensor, "b t d"]]:
        return self.code_embed(codes)


class HookedMoshi(HookedCodecLM):
    """Moshi with every activation of its decoder and its depth decoder hooked.

    Logits (``b t text+8*codes``) are those of the text token and of the eight codes that enter at
    the next position, side by side: `stream` cuts them apart ("text", "audio.0" ...). Codes are
    predicted from the text and the earlier codes that do enter there. Behind the last position
    these are not known and initial tokens stand in for them: logits of codes at a last position
    are not to be read (those of the text are).

    Streams that enter are eight of Moshi's own codes ("audio.0" ...), then eight of the user's
    ("user.0" ...).
    """

    cfg: MoshiConfig
    decoder: MoshiDecoder
    encodes_prompts = False  # they enter Hugging Face's as embeddings
    depth: DepthDecoder
    writes_behind = True
    features_key = "user_audio_codes"
    model_types = ("moshi",)
    hf_class = "MoshiForConditionalGeneration"
    codec_name = "audio_encoder"
    weight_names: ClassVar = {
        "embed_tokens.{l}": "decoder.code_embed.{l}",
        "decoder.model.embed_tokens": "decoder.token_embed",
        **block_weight_names("decoder.model", "decoder"),
        "decoder.model.norm": "decoder.ln_final",
        "decoder.lm_head": "decoder.unembed",
        "depth_decoder.text_embed_tokens": "depth.text_embed",
        "depth_decoder.embed_tokens.{l}": "depth.code_embed.{l}",
        "depth_decoder.input_projections": "depth.hidden_embed",
        **block_weight_names("depth_decoder", "depth"),
        "depth_decoder.lm_heads": "depth.code_heads",
    }

    def __init__(self, cfg: MoshiConfig):
        super().__init__(cfg)
        self.decoder = MoshiDecoder(cfg)
        self.depth = DepthDecoder(cfg.further_decoders["depth"])
        self.setup()

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> MoshiConfig:
        """The shape of a `MoshiConfig` of transformers.

        Raises:
            LoadingError: for what is not implemented, or parts that do not fit together.
        """
        depth, codec = hf_config.depth_decoder_config, hf_config.audio_encoder_config
        check_switches(hf_config, _UNDERSTOOD.split())
        check_switches(depth, _UNDERSTOOD.split())
        _check_depth(hf_config, depth)
        n_codebooks, n_texts, n_codes = (
            hf_config.num_codebooks,
            hf_config.vocab_size,
            hf_config.audio_vocab_size,
        )
        return MoshiConfig(
            family="moshi",
            model_name=hf_config.name_or_path,
            encoder=None,
            decoder=decoder_config(hf_config, d_vocab=n_texts + n_codebooks * n_codes),
            n_mels=None,
            n_frames=None,
            sampling_rate=codec.sampling_rate,
            hop=round(codec.sampling_rate / codec.frame_rate),
            further_decoders={
                "depth": DepthConfig(
                    **shape_of_stack(depth),
                    n_ctx=None,
                    final_norm=False,
                    n_codebooks=n_codebooks,
                    n_codes=n_codes,
                    n_texts=n_texts + 1,
                    d_hidden=hf_config.hidden_size,
                )
            },
            output_kind="streams",
            streams=(("text", n_texts), *((f"audio.{k}", n_codes) for k in range(n_codebooks))),
            n_codebooks=2 * n_codebooks,
            n_codes=n_codes + 1,
            n_texts=n_texts,
            window=hf_config.sliding_window,
        )

    @property
    def n_spoken(self) -> int:
        return self.cfg.n_codebooks // 2

    @property
    def initial_text(self) -> int:
        return self.cfg.n_texts

    @property
    def initial_code(self) -> int:
        return self.cfg.n_codes - 1

    @property
    def delays(self) -> tuple[int, ...]:
        """By how many positions each stream of codes is late, Moshi's own and the user's."""
        return (0, *(1,) * (self.n_spoken - 1)) * 2

    def first_codes(self, inputs: AudioInputs) -> Int[Tensor, "b ahead"]:
        """The codes of Moshi's first codebook; of the user's, where Moshi's are not known yet."""
        own, user = codes_in(inputs)[:, [0, self.n_spoken]].unbind(1)
        return torch.where(own == UNKNOWN, user, own)

    @property
    def lags_s(self) -> dict[str, float]:
        names = [f"{voice}.{k}" for voice in ("audio", "user") for k in range(self.n_spoken)]
        late = {
            name: delay * self.cfg.step_s for name, delay in zip(names, self.delays, strict=True)
        }
        return {"text": 0.0, **late}

    def tracks(
        self, steps: Int[Tensor, " t"], attended: Bool[Tensor, " t"]
    ) -> dict[str, list[Track]]:
        """Positions of the decoder by what enters; of the depth decoder by the code it writes."""
        written = [self.seconds_of(steps + 1, f"audio.{k}") for k in range(self.n_spoken)]
        depth = code_track(
            torch.stack(written, dim=1).flatten(), attended.repeat_interleave(self.n_spoken)
        )
        return {**super().tracks(steps, attended), "depth": [depth]}

    # ---------------------------------------------------------------- forward

    def read_out(
        self, hidden: Float[Tensor, "b t d"], inputs: AudioInputs
    ) -> Float[Tensor, "b t v"]:
        """Logits of the text, and of the codes that are said with the next position's text."""
        return self._columns(hidden, *self.next_tokens(inputs))

    def read_rows(
        self,
        hidden: Float[Tensor, "m d"],
        inputs: AudioInputs,
        prompt: Int[Tensor, " m"],
        position: Int[Tensor, " m"],
    ) -> Float[Tensor, "m v"]:
        """The output of final hidden states that stand at positions of prompts of the inputs."""
        if not len(hidden):
            return hidden.new_zeros(0, self.cfg.output.need_d_vocab)
        text, codes = self.next_tokens(inputs)
        own = text[prompt, position][:, None], codes[prompt, :, position][..., None]
        return self._columns(hidden[:, None], *own)[:, 0]

    def _columns(
        self, hidden: Float[Tensor, "b t d"], text: Int[Tensor, "b t"], codes: Int[Tensor, "b k t"]
    ) -> Float[Tensor, "b t v"]:
        place = self.device_of("depth")
        spoken = self.depth.write(hidden.to(place), text.to(place), codes.to(place))
        return torch.cat([self.decoder.unembed(hidden), spoken.to(hidden.device)], dim=-1)

    def next_tokens(self, inputs: AudioInputs) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b k t"]]:
        """The text and Moshi's own codes that enter at the next position.

        Initial tokens where there is no next position.
        """
        n_given = inputs.tokens.shape[1]
        own = codes_in(inputs)[:, : self.n_spoken, :n_given]
        known = F.pad(inputs.attended[:, 1:], (0, 1), value=False)
        text = F.pad(inputs.tokens[:, 1:], (0, 1))
        codes = F.pad(own[..., 1:], (0, 1))
        return (
            torch.where(known, text, self.initial_text),
            torch.where(known[:, None], codes, self.initial_code),
        )

    def loss(self, logits: Float[Tensor, "b t v"], inputs: AudioInputs) -> Float[Tensor, ""]:
        """Mean cross-entropy of the next text token, plus that of Moshi's next codes.

        Raises:
            InputError: if there is no such target (a prompt of one position).
        """
        text, codes = self.next_tokens(inputs)
        said = logits[..., self.cfg.n_texts :]
        said = rearrange(said, "b t (k v) -> b k t v", k=self.n_spoken)
        of_text = self._cross_entropy(self.stream(logits, "text"), text, inputs.attended)
        return of_text + self._cross_entropy(said, codes, inputs.attended[:, None])

    @staticmethod
    def _cross_entropy(
        logits: Float[Tensor, "*b v"], targets: Int[Tensor, "*b"], counts: Bool[Tensor, "*#b"]
    ) -> Float[Tensor, ""]:
        """Mean over the targets that can be written."""
        counts = counts & (targets < logits.shape[-1])
        if not counts.any():
            raise InputError("nothing to predict: the loss needs at least two positions")
        precise = logits[counts].to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(precise, targets[counts])

    # ---------------------------------------------------------------- inputs

    def inputs_from_mapping(self, mapping: Mapping[str, Any]) -> AudioInputs:
        """Inputs from what `MoshiForConditionalGeneration.forward` takes, as codes.

        Codes are those that enter at each position: behind an initial token and late, as
        `conversation` makes them of codes of a codec.

        Raises:
            InputError: without tokens or codes, or for what the model cannot read.
        """
        keys = ("input_ids", "moshi_audio_codes", "user_audio_codes", "attention_mask")
        given = self._mapping_tensors(mapping, keys)
        voices = [given[key] for key in keys[1:3] if key in given]
        if len(voices) < 2:
            raise InputError(f"inputs need the codes of both voices: {' and '.join(keys[1:3])}")
        if voices[0].shape != voices[1].shape:
            shapes = " and ".join(str(tuple(voice.shape)) for voice in voices)
            raise InputError(f"the codes of both voices are of different shapes: {shapes}")
        codes = torch.cat(voices, 1)
        return self.assembled(given["input_ids"], codes, given.get("attention_mask"))

    def conversation(
        self,
        user: Int[Tensor, "b k t"],
        own: Int[Tensor, "b k n"] | None = None,
        text: Any = None,
        **made: Any,
    ) -> AudioInputs:
        """Inputs from codes of the codec.

        Args:
            user: what the user says.
            own: what Moshi says along; None leaves it to `continued`.
            text: the token ids that Moshi writes along, one per step, in a list per prompt: so
                many positions follow the first, and the codes of later steps lie ahead.

        Raises:
            InputError: more text than codes, or text without Moshi's codes.
        """
        own = user[..., :0] if own is None else own
        n_steps = max(user.shape[-1], own.shape[-1])
        both = [F.pad(one, (0, n_steps - one.shape[-1]), value=UNKNOWN) for one in (own, user)]
        streams = delayed(torch.cat(both, dim=1), self.delays, self.initial_code)
        tokens = self.texts_before(text, len(user))
        return self.assembled(tokens, streams, text=text, **made)

    def prepare(
        self, audio: Any, text: Any = None, sampling_rate: Rates = None, own: Any = None
    ) -> AudioInputs:
        """Inputs from what the user says, and what Moshi says and writes along.

        With audio alone nothing of Moshi's is known: prompts are one position, behind which the
        user's codes lie ahead; `continued` and `generate` let Moshi answer while they enter.

        Args:
            audio: what the user says: a path, array or tensor, or a list of them (a batch is a
                list, not an array).
            text: token ids that Moshi writes, one per step of 80 ms, in a list per prompt.
            sampling_rate: of arrays, in Hz, or one per clip; files and mappings know their own.
            own: what Moshi says, as ``audio``.

        Raises:
            AudioError: unusable audio.
            InputError: no clip, text without what Moshi says, or more text than audio.
        """
        heard = self.load_clips(audio, sampling_rate)
        return self.conversation(
            self.encoded(heard),
            None if own is None else self.encoded(self.load_clips(own, sampling_rate)),
            text,
            audio=heard,
            sampling_rate=self.cfg.sampling_rate,
            remake=partial(self.prepare, own=own),
        )

    # ---------------------------------------------------------------- generation

    def generation_settings(self, asked: Mapping[str, Any]) -> GenerationConfig:
        """The generation settings of the text; codes are chosen without any.

        Raises:
            InputError: naming a setting of either that is not implemented.
        """
        found = super().generation_settings(asked)
        of_depth = getattr(found, "depth_decoder_config", None) or {}
        for name, neutral in _NOT_OF_CODES.items():
            if of_depth.get(name) not in (None, *neutral):
                raise InputError(
                    f"{name}={of_depth[name]!r} in depth_decoder_config of the generation settings "
                    "is not implemented: codes are the likeliest"
                )
        return found

    def choose(
        self, hidden: Float[Tensor, "b 1 d"], ahead: Int[Tensor, "b k 1"], run: GreedyRun
    ) -> tuple[Int[Tensor, " b"], Int[Tensor, "b k 1"]]:
        """The most probable text and, given it, code after code; silence where the user is unknown.

        Codes that are known ahead take the place of those that are chosen, after all are.
        """
        text = ahead.new_full((len(hidden), 1), self.initial_text)
        own = ahead.new_full((len(hidden), self.n_spoken, 1), self.initial_code)
        for index, (stream, _) in enumerate(self.cfg.streams):
            logits = self.stream(self.hook_logits(self._columns(hidden, text, own)), stream)
            if index == 0:
                text = run.choose(logits[:, -1])[:, None]
            else:
                own[:, index - 1] = logits.argmax(-1)
        is_known = ahead != UNKNOWN
        user = ahead[:, self.n_spoken :]
        if not is_known[:, self.n_spoken :].all():
            user = self._silence.to(ahead.device).expand(len(hidden), -1, -1)
        return text[:, 0], torch.where(is_known, ahead, torch.cat([own, user], dim=1))

    @cached_property
    def _silence(self) -> Int[Tensor, "1 k 1"]:
        """The codes of one step without a sound."""
        return self.codec.encode(torch.zeros(1, self.cfg.hop))


def _check_depth(hf_config: Any, depth: Any) -> None:
    """Raise unless a depth decoder fits its decoder, and is of the kind that is implemented."""
    pairs = {
        "num_codebooks": hf_config.num_codebooks,
        "input_size": hf_config.hidden_size,
        "vocab_size": hf_config.vocab_size,
        "audio_vocab_size": hf_config.audio_vocab_size,
    }
    for name, ours in pairs.items():
        if getattr(depth, name) != ours:
            raise LoadingError(f"{name} of the depth decoder is {getattr(depth, name)}, not {ours}")
    if not 1 < depth.num_codebooks <= depth.sliding_window:
        raise LoadingError(
            f"a depth decoder of {depth.num_codebooks} codebooks with a window of "
            f"{depth.sliding_window} is not implemented"
        )
