"""Qwen2-Audio: a Whisper-style encoder, pooling, a linear connector and a Qwen2 language model.

The clip enters the language model in place of its placeholder tokens, one per 40 ms. Unlike in
Whisper, padding is masked in the encoder, and pairs of frames are pooled before the final norm.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from audio_lens.audio import AudioError
from audio_lens.hooks import HookPoint
from audio_lens.inputs import AudioInputs, InputError, padded
from audio_lens.models.base import (
    AudioConfig,
    AudioPlaces,
    HookedAudioTransformer,
    LoadingError,
)
from audio_lens.models.layers import (
    Context,
    KVCache,
    PartConfig,
    PreNormBlock,
    Rotary,
    Stack,
    padding_mask,
)
from audio_lens.models.whisper import WhisperEncoder, encoder_config, encoder_track
from audio_lens.timeline import Row, Timeline, Track

TOKEN_S = 0.04  # one audio token: two encoder frames of 20 ms


class Qwen2AudioEncoder(WhisperEncoder):
    """Whisper's encoder with pairs of frames averaged before the final norm."""

    def __init__(self, cfg: PartConfig, n_mels: int):
        super().__init__(cfg, n_mels)
        self.hook_pooled = HookPoint()

    def pool(self, frames: Float[Tensor, "b t d"]) -> Float[Tensor, "b t2 d"]:
        """The mean of each pair of frames."""
        return rearrange(F.avg_pool1d(rearrange(frames, "b t d -> b d t"), 2), "b d t -> b t d")

    def finish(self, resid: Float[Tensor, "b t d"]) -> Float[Tensor, "b t2 d"]:
        return super().finish(self.hook_pooled(self.pool(resid)))


class LinearConnector(nn.Module):
    """One linear map from encoder width to the width of the language model."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.hook_in = HookPoint(borrowed=True)  # the encoder's hook_out
        self.hook_out = HookPoint()
        self.linear = nn.Linear(d_in, d_out)

    def forward(self, x: Float[Tensor, "clips t d_in"]) -> Float[Tensor, "clips t d_out"]:
        return self.hook_out(self.linear(self.hook_in(x)))


class Qwen2Decoder(Stack):
    """The Qwen2 language model: RMS norms, rotary positions, grouped keys and values, gated MLP."""

    def __init__(self, cfg: PartConfig):
        super().__init__(cfg, PreNormBlock)
        self.token_embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.rotary = Rotary(cfg)
        self.hook_token_embed, self.hook_audio_embed = HookPoint(), HookPoint()
        self.unembed = nn.Linear(cfg.d_model, cfg.d_vocab, bias=False)

    def merge(
        self,
        tokens: Int[Tensor, "b t"],
        is_audio: Bool[Tensor, "b t"],
        audio: Float[Tensor, "n d"] | None,
    ) -> Float[Tensor, "b t d"]:
        """Token embeddings with the audio written over its placeholders, in order."""
        embed = self.hook_token_embed(self.token_embed(tokens))
        if audio is not None:
            audio = self.hook_audio_embed(audio.to(embed.dtype))
            embed = embed.masked_scatter(is_audio[..., None], audio)
        return self.hook_embed(embed)


class HookedQwen2Audio(HookedAudioTransformer):
    """Qwen2-Audio with every activation hooked."""

    hf_class = "Qwen2AudioForConditionalGeneration"
    takes_question = True
    weight_names: ClassVar = {
        "model.audio_tower.conv1": "encoder.conv1",
        "model.audio_tower.conv2": "encoder.conv2",
        "model.audio_tower.embed_positions": "encoder.pos_embed",
        "model.audio_tower.layers.{l}.self_attn.q_proj": "encoder.blocks.{l}.attn.q_proj",
        "model.audio_tower.layers.{l}.self_attn.k_proj": "encoder.blocks.{l}.attn.k_proj",
        "model.audio_tower.layers.{l}.self_attn.v_proj": "encoder.blocks.{l}.attn.v_proj",
        "model.audio_tower.layers.{l}.self_attn.out_proj": "encoder.blocks.{l}.attn.o_proj",
        "model.audio_tower.layers.{l}.self_attn_layer_norm": "encoder.blocks.{l}.ln1",
        "model.audio_tower.layers.{l}.fc1": "encoder.blocks.{l}.mlp.fc_in",
        "model.audio_tower.layers.{l}.fc2": "encoder.blocks.{l}.mlp.fc_out",
        "model.audio_tower.layers.{l}.final_layer_norm": "encoder.blocks.{l}.ln2",
        "model.audio_tower.layer_norm": "encoder.ln_final",
        "model.multi_modal_projector.linear": "connector.linear",
        "model.language_model.embed_tokens": "decoder.token_embed",
        "model.language_model.layers.{l}.self_attn.q_proj": "decoder.blocks.{l}.attn.q_proj",
        "model.language_model.layers.{l}.self_attn.k_proj": "decoder.blocks.{l}.attn.k_proj",
        "model.language_model.layers.{l}.self_attn.v_proj": "decoder.blocks.{l}.attn.v_proj",
        "model.language_model.layers.{l}.self_attn.o_proj": "decoder.blocks.{l}.attn.o_proj",
        "model.language_model.layers.{l}.input_layernorm": "decoder.blocks.{l}.ln1",
        "model.language_model.layers.{l}.mlp.gate_proj": "decoder.blocks.{l}.mlp.gate",
        "model.language_model.layers.{l}.mlp.up_proj": "decoder.blocks.{l}.mlp.fc_in",
        "model.language_model.layers.{l}.mlp.down_proj": "decoder.blocks.{l}.mlp.fc_out",
        "model.language_model.layers.{l}.post_attention_layernorm": "decoder.blocks.{l}.ln2",
        "model.language_model.norm": "decoder.ln_final",
        "lm_head": "decoder.unembed",
    }

    def __init__(self, cfg: AudioConfig):
        super().__init__(cfg)
        self.audio_token_id: int | None = None
        self.encoder = Qwen2AudioEncoder(cfg.encoder, cfg.n_mels)
        self.connector = LinearConnector(cfg.encoder.d_model, cfg.decoder.d_model)
        self.decoder = Qwen2Decoder(cfg.decoder)
        self.setup()

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> AudioConfig:
        """The shape of a `Qwen2AudioConfig`.

        Raises:
            LoadingError: another language model than Qwen2, or a feature that is not implemented
                (sliding windows, scaled rotary positions).
        """
        ear, text = hf_config.audio_config, hf_config.text_config
        _check_language_model(text)
        decoder = PartConfig(
            n_layers=text.num_hidden_layers,
            n_heads=text.num_attention_heads,
            n_key_value_heads=text.num_key_value_heads,
            d_model=text.hidden_size,
            d_head=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            d_mlp=text.intermediate_size,
            n_ctx=text.max_position_embeddings,
            act_fn=text.hidden_act,
            eps=text.rms_norm_eps,
            normalization_type="RMS",
            model_name=hf_config.name_or_path,
            d_vocab=text.vocab_size,
            attn_biases=("q", "k", "v"),
            causal=True,
            gated_mlp=True,
            mlp_bias=False,
            softmax_float32=True,
            rotary_base=text.rope_parameters["rope_theta"],
        )
        return AudioConfig(
            family="qwen2_audio",
            model_name=hf_config.name_or_path,
            encoder=encoder_config(ear, hf_config.name_or_path),
            decoder=decoder,
            n_mels=ear.num_mel_bins,
            n_frames=2 * ear.max_source_positions,
        )

    def take_special_tokens(self, hf_config: Any) -> None:
        """Remember which token stands for audio."""
        self.audio_token_id = hf_config.audio_token_id

    # ---------------------------------------------------------------- forward

    def encoder_context(self, inputs: AudioInputs) -> Context:
        """Padding is masked."""
        return Context(allowed=self._frames_allowed(inputs))

    def encoder_reach(self, inputs: AudioInputs) -> int:
        """The frames of the longest clip, in whole pairs: what lies behind is masked and cut."""
        if inputs.feature_mask is None:
            return self.cfg.encoder.n_ctx
        longest = max(inputs.mel_frames(clip) for clip in range(len(inputs.features)))
        return min(self.cfg.encoder.n_ctx, 2 * ((longest - 1) // 4 + 1))

    def send(self, resid: Float[Tensor, "clips frames d"]) -> Float[Tensor, "clips t d_out"]:
        """The connector's output."""
        return self.connector(self.encoder.finish(resid))

    def _frames_allowed(self, inputs: AudioInputs) -> Bool[Tensor, "clips 1 1 frames"] | None:
        if inputs.feature_mask is None or inputs.feature_mask.all():
            return None
        n_frames = (inputs.feature_mask.sum(1) - 1) // 2 + 1
        frames = torch.arange(self.cfg.encoder.n_ctx, device=n_frames.device)
        return padding_mask(frames < n_frames[:, None], n_queries=1, causal=False)

    def decoder_context(
        self, inputs: AudioInputs, encoded: Tensor | None, past: KVCache | None = None
    ) -> Context:
        """Masks and rotary positions."""
        earlier = past.length if past is not None else 0
        positions = inputs.position_ids
        if positions is None:
            n_new = inputs.tokens.shape[1]
            positions = torch.arange(earlier, earlier + n_new, device=inputs.device)[None]
        return Context(
            allowed=self.decoder_mask(inputs, past),
            rotary=self.decoder.rotary(positions, self.dtype),
            past=past,
        )

    def enter_decoder(
        self, inputs: AudioInputs, encoded: Tensor | None, past: KVCache | None = None
    ) -> Float[Tensor, "b t d"]:
        """Embedded tokens with the audio in its places."""
        is_later = past is not None and past.length > 0
        return self._merged(inputs, None if is_later else encoded)

    def _merged(
        self, inputs: AudioInputs, encoded: Float[Tensor, "clips s d"] | None
    ) -> Float[Tensor, "b t d"]:
        """The residual stream entering block 0; without ``encoded``, of tokens that are text."""
        is_audio = inputs.tokens == self.audio_token_id
        if encoded is not None:
            return self.decoder.merge(inputs.tokens, is_audio, self._audio_tokens(inputs, encoded))
        if inputs.tokens.shape[1] > 1 and is_audio.any():
            raise InputError("all audio must be in the first call with a cache, not a later one")
        return self.decoder.merge(inputs.tokens, is_audio, None)

    def _audio_tokens(
        self, inputs: AudioInputs, encoded: Float[Tensor, "clips s d"]
    ) -> Float[Tensor, "n d"]:
        """The connector's output at positions that hold audio, clip after clip."""
        counts = torch.tensor(self._token_counts(inputs), device=encoded.device)
        return encoded[torch.arange(encoded.shape[1], device=encoded.device) < counts[:, None]]

    def audio_places(self, inputs: AudioInputs) -> AudioPlaces:
        """Where each connector position of each clip enters the language model."""
        row, position = (inputs.tokens == self.audio_token_id).nonzero(as_tuple=True)
        counts = torch.tensor(self._token_counts(inputs), device=inputs.device)
        clip = torch.arange(len(counts), device=inputs.device).repeat_interleave(counts)
        index = torch.cat([torch.arange(int(n), device=inputs.device) for n in counts])
        return AudioPlaces(row, position, clip, index)

    def _token_counts(self, inputs: AudioInputs) -> list[int]:
        return [audio_token_count(inputs.mel_frames(c)) for c in range(len(inputs.features))]

    def is_text(self, inputs: AudioInputs) -> Bool[Tensor, "b t"]:
        """True at attended tokens that are not audio placeholders."""
        return inputs.attended & (inputs.tokens != self.audio_token_id)

    # ---------------------------------------------------------------- inputs

    def inputs_from_mapping(self, mapping: Mapping[str, Any]) -> AudioInputs:
        """Inputs from what `Qwen2AudioProcessor` returns; single placeholders are expanded."""
        known = (
            "input_ids",
            "attention_mask",
            "input_features",
            "feature_attention_mask",
            "position_ids",
        )
        given = self._mapping_tensors(mapping, known)
        tokens, features = given["input_ids"], given["input_features"]
        if tokens is None:
            raise InputError("inputs hold no input_ids: an audio LLM needs a text prompt")
        self.check_tokens(tokens)
        self.check_features(features)
        frames = given["feature_attention_mask"]
        n_mel = features.new_full((len(features),), features.shape[-1]).long()
        counts = [audio_token_count(n) for n in (frames.sum(1) if frames is not None else n_mel)]
        mask = given["attention_mask"]
        mask = torch.ones_like(tokens) if mask is None else mask
        tokens, mask = self._expanded(tokens, mask.bool(), counts)
        return AudioInputs(
            features=features,
            tokens=tokens,
            clips_per_row=self._clips_per_row(tokens, counts),
            attention_mask=None if mask.all() else mask,
            feature_mask=None if frames is None else frames.bool(),
            position_ids=self._positions_of(tokens, given["position_ids"]),
        )

    def _expanded(
        self, tokens: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"], counts: list[int]
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
                f"one each, or {sum(counts)} (one per 40 ms). Put <|AUDIO|> where each clip belongs"
            )
        rows, remaining = [], iter(counts)
        for row, kept in zip(tokens.tolist(), mask.tolist(), strict=True):
            expanded: list[int] = []
            for token in itertools.compress(row, kept):
                is_audio = token == self.audio_token_id
                expanded += [token] * (next(remaining) if is_audio else 1)
            rows.append(expanded)
        return padded(rows, self._pad_token(), self.device, left=bool(mask[:, -1].all()))

    def _clips_per_row(self, tokens: Int[Tensor, "b t"], counts: list[int]) -> tuple[int, ...]:
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
                prompt with the placeholder ``<|AUDIO|>`` where each clip belongs; or a
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
        made = self.extract_features(clips)
        encoded = self.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        inputs = self.inputs_from_mapping(
            {
                "input_ids": encoded["input_ids"],
                "attention_mask": encoded["attention_mask"],
                "input_features": made["features"],
                "feature_attention_mask": made["mask"],
            }
        )
        rate = self.cfg.sampling_rate
        return replace(inputs, audio=clips, text=prompts, sampling_rate=rate, remake=self.prepare)

    def _checked_clip(self, source: Any, sampling_rate: int | None) -> Float[Any, " samples"]:
        clip = self.load_audio(source, sampling_rate)
        n_mel = -(-len(clip) // 160)
        if audio_token_count(n_mel) < 1:
            raise AudioError(
                f"the clip is {1000 * len(clip) / self.cfg.sampling_rate:.0f} ms long, too short "
                "for one audio token (40 ms)"
            )
        return clip

    def _prompt_of(self, text: Any, n_clips: int) -> str:
        placeholder = self.tokenizer.convert_ids_to_tokens(self.audio_token_id)
        if not (isinstance(text, str) or _is_conversation(text)):
            raise InputError(
                "an audio LLM needs a question: pass text= (str, or a conversation), got "
                f"{type(text).__name__}"
            )
        if isinstance(text, str) and ("<|im_start|>" in text or placeholder in text):
            prompt = text
        else:
            prompt = self.processor.apply_chat_template(
                _conversation(text, n_clips), add_generation_prompt=True, tokenize=False
            )
        if prompt.count(placeholder) != n_clips:
            raise InputError(
                f"the prompt holds {prompt.count(placeholder)} placeholder(s) {placeholder} for "
                f"{n_clips} clip(s): put one where each clip belongs, or pass the bare question"
            )
        return prompt

    def timeline(self, inputs: AudioInputs | Mapping[str, Any]) -> Timeline:
        """Encoder frame i is centred at 0.02 i s, audio token j at 0.04 j + 0.01 s."""
        inputs = self.as_inputs(inputs)
        is_audio = (inputs.tokens == self.audio_token_id).cpu()
        attended = inputs.attended.cpu()
        rows, first = [], 0
        for row, n_clips in enumerate(inputs.clips_per_row):
            mels = [inputs.mel_frames(clip) for clip in range(first, first + n_clips)]
            first += n_clips
            tracks = {
                "encoder": [encoder_track(self.cfg, n, i) for i, n in enumerate(mels)],
                "connector": [self._connector_track(n, i) for i, n in enumerate(mels)],
                "decoder": [_decoder_track(is_audio[row], attended[row], mels)],
            }
            rows.append(Row(tracks, [n / 100 for n in mels]))
        return Timeline(rows)

    def _connector_track(self, n_mel: int, clip: int) -> Track:
        seconds = token_seconds(self.cfg.encoder.n_ctx // 2)
        return Track.of_clip(seconds, audio_token_count(n_mel), clip)


def audio_token_count(n_mel: int | Tensor) -> int:
    """Audio tokens of a clip with ``n_mel`` mel frames of 10 ms."""
    return int(((n_mel - 1) // 2 + 1) // 2)


def token_seconds(count: int) -> Float[Tensor, " t"]:
    """Centres of audio tokens: the middle of the two frames each was pooled from."""
    return TOKEN_S * torch.arange(count, dtype=torch.float64) + 0.01


def _decoder_track(
    is_audio: Bool[Tensor, " t"], attended: Bool[Tensor, " t"], mels: Sequence[int]
) -> Track:
    track = Track.of_tokens(attended)
    index = is_audio.nonzero().flatten()
    for clip, n_mel in enumerate(mels):
        count = audio_token_count(n_mel)
        here, index = index[:count], index[count:]
        track.seconds[here], track.clip[here] = token_seconds(count), clip
    return track


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


def _check_language_model(text: Any) -> None:
    """Raise on what this implementation does not know."""
    if text.model_type != "qwen2":
        raise LoadingError(
            f"the language model is a {text.model_type!r}; only qwen2 is implemented"
        )
    sliding = sorted({kind for kind in text.layer_types if kind != "full_attention"})
    if sliding:
        raise LoadingError(f"attention of kind {', '.join(sliding)} is not implemented")
    rope = text.rope_parameters.get("rope_type", "default")
    if rope != "default":
        raise LoadingError(f"rotary positions of type {rope!r} are not implemented")
