"""Whisper: an audio encoder, and a text decoder that reads it by cross-attention.

Every size, English-only and multilingual, large-v3, turbo and distilled checkpoints with fewer
decoder layers. The encoder here is also the ear of Qwen2-Audio.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig

from audio_lens.audio import Rates
from audio_lens.hooks import HookPoint
from audio_lens.inputs import AudioInputs, InputError, padded, texts_per_clip
from audio_lens.models.base import HookedAudioTransformer
from audio_lens.models.config import AudioConfig, LoadingError, check_switches
from audio_lens.models.families.whisper_prompt import DETECTED, control_tokens, settled_prompt
from audio_lens.models.kinds.ear import Ear
from audio_lens.models.layers import (
    Block,
    Context,
    CrossAttentionBlock,
    Float16SafeBlock,
    KVCache,
    PartConfig,
    Stack,
)
from audio_lens.models.mixins.settings import NOT_GREEDY, Limit, Neutral, stated_limit
from audio_lens.models.mixins.vocabulary import TokenError
from audio_lens.timeline import Row, Timeline, Track

UNDERSTOOD = """
    activation_function classifier_proj_size d_model decoder_attention_heads decoder_ffn_dim
    decoder_layers encoder_attention_heads encoder_ffn_dim encoder_layers max_source_positions
    max_target_positions num_mel_bins use_weighted_layer_sum vocab_size
"""
FRAME_S = 0.02  # one encoder position: two mel frames of 10 ms


def encoder_weight_names(theirs: str) -> dict[str, str]:
    """The name table of a Whisper-style encoder with this prefix."""
    block = {
        "self_attn.q_proj": "attn.q_proj",
        "self_attn.k_proj": "attn.k_proj",
        "self_attn.v_proj": "attn.v_proj",
        "self_attn.out_proj": "attn.o_proj",
        "self_attn_layer_norm": "ln1",
        "fc1": "mlp.fc_in",
        "fc2": "mlp.fc_out",
        "final_layer_norm": "ln2",
    }
    return {
        f"{theirs}.conv1": "encoder.conv1",
        f"{theirs}.conv2": "encoder.conv2",
        f"{theirs}.embed_positions": "encoder.pos_embed",
        **{f"{theirs}.layers.{{l}}.{a}": f"encoder.blocks.{{l}}.{b}" for a, b in block.items()},
        f"{theirs}.layer_norm": "encoder.ln_final",
    }


class ConvEncoder(Stack):
    """Two convolutions (the second halves the frames), then blocks."""

    def __init__(self, cfg: PartConfig, n_mels: int, block: type[Block] = Float16SafeBlock):
        super().__init__(cfg, block)
        self.hook_mel = HookPoint(borrowed=True)  # the caller's features
        self.hook_conv1 = HookPoint()
        self.conv1 = nn.Conv1d(n_mels, cfg.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(cfg.d_model, cfg.d_model, kernel_size=3, stride=2, padding=1)

    def embed(self, features: Float[Tensor, "b mels frames"]) -> Float[Tensor, "b t d"]:
        """The residual stream entering block 0."""
        mel = self.hook_mel(features.to(self.conv1.weight))
        x = self.hook_conv1(F.gelu(self.conv1(mel)))
        return self.hook_embed(rearrange(F.gelu(self.conv2(x)), "b d t -> b t d"))


class WhisperEncoder(ConvEncoder):
    """Two convolutions, a position table, pre-norm blocks."""

    def __init__(self, cfg: PartConfig, n_mels: int):
        super().__init__(cfg, n_mels)
        self.pos_embed = nn.Embedding(cfg.need_n_ctx, cfg.d_model)
        self.hook_pos_embed = HookPoint()

    def embed(self, features: Float[Tensor, "b mels frames"]) -> Float[Tensor, "b t d"]:
        """The residual stream entering block 0."""
        x = super().embed(features)
        positions = self.pos_embed.weight[: x.shape[1]].repeat(len(x), 1, 1)
        return x + self.hook_pos_embed(positions)


class WhisperDecoder(Stack):
    """Text decoder with learned positions; its unembedding is tied to its embedding."""

    def __init__(self, cfg: PartConfig):
        super().__init__(cfg, CrossAttentionBlock)
        self.token_embed = nn.Embedding(cfg.need_d_vocab, cfg.d_model)
        self.pos_embed = nn.Embedding(cfg.need_n_ctx, cfg.d_model)
        self.hook_pos_embed = HookPoint()
        self.unembed = nn.Linear(cfg.d_model, cfg.need_d_vocab, bias=False)

    def embed_tokens(
        self, tokens: Int[Tensor, "b t"], positions: Int[Tensor, "b t"]
    ) -> Float[Tensor, "b t d"]:
        """The residual stream entering block 0."""
        embed = self.hook_embed(self.token_embed(tokens))
        return embed + self.hook_pos_embed(self.pos_embed(positions))


class HookedWhisper(Ear, HookedAudioTransformer):
    """Whisper with every activation hooked."""

    encoder: WhisperEncoder
    decoder: WhisperDecoder
    lends_encoder = True
    encodes_prompts = False
    refused_settings: ClassVar[Neutral] = {
        **NOT_GREEDY,
        "return_timestamps": (False,),
        "no_speech_threshold": (),
    }
    model_types = ("whisper",)
    hf_class = "WhisperForConditionalGeneration"
    bare_class = "WhisperModel"
    weight_names: ClassVar = {
        **encoder_weight_names("model.encoder"),
        "model.decoder.embed_tokens": "decoder.token_embed",
        "model.decoder.embed_positions": "decoder.pos_embed",
        "model.decoder.layers.{l}.self_attn.q_proj": "decoder.blocks.{l}.attn.q_proj",
        "model.decoder.layers.{l}.self_attn.k_proj": "decoder.blocks.{l}.attn.k_proj",
        "model.decoder.layers.{l}.self_attn.v_proj": "decoder.blocks.{l}.attn.v_proj",
        "model.decoder.layers.{l}.self_attn.out_proj": "decoder.blocks.{l}.attn.o_proj",
        "model.decoder.layers.{l}.self_attn_layer_norm": "decoder.blocks.{l}.ln1",
        "model.decoder.layers.{l}.encoder_attn.q_proj": "decoder.blocks.{l}.cross_attn.q_proj",
        "model.decoder.layers.{l}.encoder_attn.k_proj": "decoder.blocks.{l}.cross_attn.k_proj",
        "model.decoder.layers.{l}.encoder_attn.v_proj": "decoder.blocks.{l}.cross_attn.v_proj",
        "model.decoder.layers.{l}.encoder_attn.out_proj": "decoder.blocks.{l}.cross_attn.o_proj",
        "model.decoder.layers.{l}.encoder_attn_layer_norm": "decoder.blocks.{l}.ln_cross",
        "model.decoder.layers.{l}.fc1": "decoder.blocks.{l}.mlp.fc_in",
        "model.decoder.layers.{l}.fc2": "decoder.blocks.{l}.mlp.fc_out",
        "model.decoder.layers.{l}.final_layer_norm": "decoder.blocks.{l}.ln2",
        "model.decoder.layer_norm": "decoder.ln_final",
        "proj_out": "decoder.unembed",
    }

    def __init__(self, cfg: AudioConfig):
        super().__init__(cfg)
        self.forced_ids: Sequence | None = None  # by position, as older configs name them
        self.encoder = WhisperEncoder(cfg.need_encoder, cfg.need_n_mels)
        if cfg.decoder is not None:  # else it is what hears, in a composed model
            self.decoder = WhisperDecoder(cfg.decoder)
        self.setup()

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> AudioConfig:
        """The shape of a `WhisperConfig`.

        Raises:
            LoadingError: for a switch that is not implemented, or a bare model whose head is not
                its embedding.
        """
        check_switches(hf_config, UNDERSTOOD.split())
        is_bare = cls.bare_class in (hf_config.architectures or ())
        if is_bare and not hf_config.tie_word_embeddings:
            raise LoadingError(
                f"a {cls.bare_class} with tie_word_embeddings=False holds no head: load a "
                f"{cls.hf_class}"
            )
        encoder = encoder_config(hf_config, hf_config.name_or_path)
        decoder = replace(
            encoder,
            n_layers=hf_config.decoder_layers,
            n_heads=hf_config.decoder_attention_heads,
            n_key_value_heads=hf_config.decoder_attention_heads,
            d_head=hf_config.d_model // hf_config.decoder_attention_heads,
            d_mlp=hf_config.decoder_ffn_dim,
            n_ctx=hf_config.max_target_positions,
            d_vocab=hf_config.vocab_size,
            causal=True,
        )
        return AudioConfig(
            family="whisper",
            model_name=hf_config.name_or_path,
            encoder=encoder,
            decoder=decoder,
            n_mels=hf_config.num_mel_bins,
            n_frames=2 * hf_config.max_source_positions,
        )

    @classmethod
    def adapt_state(cls, state: Mapping[str, Tensor], cfg: AudioConfig) -> Mapping[str, Tensor]:
        """The tensors by the names they have in the whole; a bare model's head is its embedding."""
        if any(key.startswith("model.") for key in state):
            return state
        whole = {f"model.{key}": tensor for key, tensor in state.items()}
        return {**whole, "proj_out.weight": whole["model.decoder.embed_tokens.weight"]}

    def take_special_tokens(self, hf_config: Any) -> None:
        """Remember the control tokens that older configs force."""
        self.forced_ids = getattr(hf_config, "forced_decoder_ids", None)

    # ---------------------------------------------------------------- forward

    def decoder_context(
        self, inputs: AudioInputs, encoded: Tensor | None, past: KVCache | None = None
    ) -> Context:
        """Masks, and the encoder's output as memory."""
        return Context(allowed=self.decoder_mask(inputs, past), memory=encoded, past=past)

    def enter_decoder(
        self, inputs: AudioInputs, encoded: Tensor | None, past: KVCache | None = None
    ) -> Float[Tensor, "b t d"]:
        """Embedded tokens; the audio is read later, by cross-attention."""
        return self.decoder.embed_tokens(inputs.tokens, self._positions(inputs, past))

    def _positions(self, inputs: AudioInputs, past: KVCache | None) -> Int[Tensor, "b t"]:
        earlier = past.length if past is not None else 0
        last = earlier + inputs.tokens.shape[1]
        n_ctx = self.cfg.need_decoder.need_n_ctx
        if last > n_ctx:
            raise InputError(f"{last} tokens are more than the {n_ctx} it takes")
        if inputs.position_ids is not None:
            return inputs.position_ids
        mask = inputs.attention_mask
        if mask is not None and not mask[:, 0].all():  # padding on the left shifts nothing
            return (mask.long().cumsum(1) - 1).clamp(min=0)[:, earlier:]
        return torch.arange(earlier, last, device=inputs.device).expand(inputs.tokens.shape)

    def frame_count(self, n_valid: int) -> int:
        """Pairs of mel frames, the last one begun included."""
        return (n_valid - 1) // 2 + 1

    def frame_seconds(self, count: int) -> Float[Tensor, " t"]:
        """Frame i is centred at 0.02 i seconds."""
        return FRAME_S * torch.arange(count, dtype=torch.float64)

    # ---------------------------------------------------------------- inputs

    def inputs_from_mapping(self, mapping: Mapping[str, Any]) -> AudioInputs:
        """Inputs from what `WhisperProcessor` returns.

        Without tokens the prompts are the control tokens that `prepare` makes; the mapping may name
        their ``language`` and ``task`` as well.
        """
        known = (
            "input_features",
            "attention_mask",
            "decoder_input_ids",
            "decoder_attention_mask",
            "decoder_position_ids",
        )
        spoken = {name: mapping[name] for name in ("language", "task") if name in mapping}
        given = self._mapping_tensors(
            {key: value for key, value in mapping.items() if key not in spoken}, known
        )
        features, tokens = given["input_features"], given.get("decoder_input_ids")
        self.check_features(features)
        if tokens is None:
            tokens = torch.tensor(self._controls(features, **spoken), device=features.device)
        elif any(value is not None for value in spoken.values()):
            raise InputError(
                f"decoder_input_ids say all of a prompt: leave out {', '.join(spoken)}"
            )
        self.check_tokens(tokens)
        mask, frames = given.get("decoder_attention_mask"), given.get("attention_mask")
        return AudioInputs(
            features=features,
            tokens=tokens,
            clips_per_row=(1,) * len(tokens),
            attention_mask=None if mask is None else mask.bool(),
            feature_mask=None if frames is None else frames.bool(),
            position_ids=self._positions_of(tokens, given.get("decoder_position_ids")),
        )

    def prepare(
        self,
        audio: Any,
        text: str | Sequence | None = None,
        sampling_rate: Rates = None,
        language: str | Sequence[str | None] | None = None,
        task: str | None = None,
    ) -> AudioInputs:
        """Inputs from clips (one per prompt) and, if given, the text decoded so far.

        Args:
            audio: a path, array, tensor or mapping (see `audio.load`), or a list of them (a
                batch is a list, not an array).
            text: what the decoder has already written, after the control tokens; or token ids,
                which are then the whole decoder prompt; or a list of either, one per clip.
            sampling_rate: of arrays, in Hz, or one per clip; files and mappings know their own.
            language: for multilingual checkpoints: a name, a code or a token ("french", "fr",
                "<|fr|>"), or a list with one per clip; None takes that of the checkpoint's
                generation settings, and lets the model choose where they name none.
            task: "transcribe" or "translate" (multilingual checkpoints); None takes that of the
                generation settings.

        Raises:
            AudioError: unusable or too long audio.
            InputError: one text per clip is needed, an unknown language or task, or one that the
                checkpoint does not take.
            TokenError: text without a tokenizer.
        """
        clips = self.load_clips(audio, sampling_rate)
        texts = texts_per_clip(text, len(clips))
        made = self.extract_features(clips)
        if any(written is None or isinstance(written, str) for written in texts):
            controls = self._controls(made["features"], language, task)
        else:  # whole prompts of token ids
            controls = [[] for _ in clips]
        prompts = [self._prompt_of(*one) for one in zip(texts, controls, strict=True)]
        if not all(prompts):
            raise TokenError("the decoder needs at least one token to start from")
        tokens, mask = padded(prompts, self._pad_token(), self.device)
        self.check_tokens(tokens[mask])
        inputs = AudioInputs(
            features=made["features"],
            tokens=tokens,
            clips_per_row=(1,) * len(clips),
            attention_mask=None if mask.all() else mask,
            feature_mask=made["mask"],
            audio=clips,
            text=prompts,
            sampling_rate=self.cfg.sampling_rate,
            remake=functools.partial(self.prepare, language=language, task=task),
        )
        is_padded = inputs.attention_mask is not None
        return replace(inputs, position_ids=inputs.counted_positions()) if is_padded else inputs

    def prompt(self, language: str | None = None, task: str | None = None) -> list[int]:
        """The control tokens decoding starts from: start, language, task, no timestamps.

        Raises:
            InputError: an unknown language or task, one given to an English-only model, or a
                language that nobody names, so that only a clip can tell it.
        """
        config = self.generation_config
        (spoken,), wanted = settled_prompt(config, language, task, 1)
        tokens = control_tokens(config, self.forced_ids, spoken, wanted)
        if DETECTED in tokens:
            raise InputError("the language is found by the clip: name one, or prepare(audio)")
        return tokens

    def _prompt_of(self, text: Any, control: list[int]) -> list[int]:
        if text is not None and not isinstance(text, str):
            return [int(token) for token in text]
        written = []
        if text:
            tokenizer = self.need_tokenizer("text for the decoder")
            written = tokenizer.encode(text, add_special_tokens=False)
        return control + written

    def _controls(
        self,
        features: Float[Tensor, "b mels frames"],
        language: str | Sequence[str | None] | None = None,
        task: str | None = None,
    ) -> list[list[int]]:
        """The control tokens of each clip, with the language that the model itself finds likeliest
        where nobody names one.
        """
        config = self.generation_config
        languages, wanted = settled_prompt(config, language, task, len(features))
        rows = [control_tokens(config, self.forced_ids, one, wanted) for one in languages]
        if any(DETECTED in row for row in rows):
            found = self._languages(features)
            rows = [
                [best if token == DETECTED else token for token in row]
                for row, best in zip(rows, found, strict=True)
            ]
        return rows

    @torch.no_grad()
    def _languages(self, features: Float[Tensor, "b mels frames"]) -> list[int]:
        """The token of the likeliest language of each clip."""
        config = self.generation_config
        tokens = torch.full((len(features), 1), config.decoder_start_token_id).to(features.device)
        with self.without_hooks():  # the user's hooks are for the run that follows
            logits = self(AudioInputs(features, tokens, (1,) * len(tokens)))[:, -1]
        ids = torch.tensor(list(config.lang_to_id.values()), device=logits.device)
        return ids[logits[:, ids].argmax(-1)].tolist()

    def timeline(self, inputs: AudioInputs | Mapping[str, Any]) -> Timeline:
        """Encoder frame i is centred at 0.02 i seconds; decoder positions have no time."""
        inputs = self.as_inputs(inputs)
        rows = []
        for row in range(len(inputs)):
            n_mel = inputs.n_valid(row)
            seconds = self.frame_seconds(self.cfg.need_encoder.need_n_ctx)
            tracks = {
                "encoder": [Track.of_clip(seconds, self.frame_count(n_mel), clip=0)],
                "decoder": [Track.of_tokens(inputs.attended[row].cpu())],
            }
            rows.append(Row(tracks, [n_mel / 100]))
        return Timeline(rows)

    # ---------------------------------------------------------------- generation

    def _stated_limit(self, settings: GenerationConfig, n_prompt: int) -> Limit | None:
        """As Hugging Face reads it here: ``max_length`` counts no control tokens."""
        n_free = self.cfg.need_decoder.need_n_ctx // 2 - 1
        return stated_limit(settings, max(n_prompt - n_free, 0))

    def _usual_limit(self, inputs: AudioInputs) -> Limit:
        """As many as the decoder has positions for."""
        n_ctx = self.cfg.need_decoder.need_n_ctx
        return Limit(n_ctx - inputs.tokens.shape[1], f"the {n_ctx} positions of the decoder")


# -------------------------------------------------------------------------------- shared pieces


def encoder_config(ear: Any, model_name: str, n_ctx: int | None = None) -> PartConfig:
    """The shape of a Whisper-style encoder, from the Hugging Face config that describes it.

    ``n_ctx`` is for encoders that hear less at once than their table of positions holds.
    """
    return PartConfig(
        n_layers=ear.encoder_layers,
        n_heads=ear.encoder_attention_heads,
        n_key_value_heads=ear.encoder_attention_heads,
        d_model=ear.d_model,
        d_head=ear.d_model // ear.encoder_attention_heads,
        d_mlp=ear.encoder_ffn_dim,
        n_ctx=n_ctx or ear.max_source_positions,
        act_fn=ear.activation_function,
        eps=1e-5,
        normalization_type="LN",
        scales_queries=True,
        model_name=model_name,
    )
