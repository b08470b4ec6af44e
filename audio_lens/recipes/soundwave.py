"""Soundwave (Zhang et al. 2025, arXiv 2502.12900): Whisper shrunk to where it changes, and Llama.

Two frames of Whisper at a time become one of 40 ms, as wide as Llama. A head gives each the token
of Llama's vocabulary that it sounds like; of every run of equal ones, the first frame goes on. How
many do depends on what is heard. They look back at the frames and enter the prompt.

After `Soundwave.py` of FreedomIntelligence/Soundwave, in whose computation two things are not what
the paper describes; both are kept, since the weights were trained with them:

- The transformer layer of the adapter takes time for the batch, so that its attention runs over one
  position: every frame attends to itself alone, whatever queries and keys say.
- The mask of the look-back hides the frames that were dropped, not padding: kept frames find each
  other and nothing else. What was dropped reaches Llama in no way.

The label for nothing (CTC's blank) is treated as any other: a frame of each of its runs is kept.
"""

from __future__ import annotations

import functools
import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, WhisperConfig

from audio_lens.hooks import HookPoint
from audio_lens.inputs import KEPT, AudioInputs, InputError, padded
from audio_lens.models.audio_llm import Segment
from audio_lens.models.base import LoadingError
from audio_lens.models.composed import CompositionError, HookedComposed, Placeholder, compose
from audio_lens.models.connectors import Connector
from audio_lens.models.language_model import LanguageModel, language_model_config, weight_names
from audio_lens.models.layers import Attention, Context, LayerNorm, PartConfig, PreNormBlock
from audio_lens.models.layers.shrink import FILLER, change_points, frames_at, indices_of, mask_of
from audio_lens.models.loading import load_pretrained, processor_of
from audio_lens.models.weights import fill, read_weights, renamed
from audio_lens.models.whisper import HookedWhisper, encoder_weight_names
from audio_lens.timeline import Track

STACKED = 2  # encoder frames side by side
PLACEHOLDER = "<audio_patch>"
SYSTEM = (
    "You are a helpful language and speech assistant. You are able to understand the speech content"
    " that the user provides, and assist the user with a variety of tasks using natural language."
)
TEMPLATE = (
    f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n{SYSTEM}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n{audio}{question}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n"
)
_NAMED = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    PLACEHOLDER,
)
_BETWEEN = re.compile(rf"({'|'.join(map(re.escape, _NAMED))}|(?<=<\|end_header_id\|>)\n)")
"""What stands between the texts of a prompt: tokens by name, and the line break of a header."""

_ADAPTER = "model.asr_transformer_encoder.layers.0"
_LOOK_BACK = "model.lbm.encoder_attn"
WEIGHT_NAMES: dict[str, str | None] = {
    **encoder_weight_names("model.audio_tower"),
    "model.mm_projector1": "connector.adapter",
    f"{_ADAPTER}.self_attn.q_proj": None,  # of attention to one position: these say nothing
    f"{_ADAPTER}.self_attn.k_proj": None,
    f"{_ADAPTER}.self_attn.v_proj": "connector.blocks.0.attn.v_proj",
    f"{_ADAPTER}.self_attn.out_proj": "connector.blocks.0.attn.o_proj",
    f"{_ADAPTER}.norm1": "connector.blocks.0.ln1",
    f"{_ADAPTER}.norm2": "connector.blocks.0.ln2",
    f"{_ADAPTER}.linear1": "connector.blocks.0.mlp.fc_in",
    f"{_ADAPTER}.linear2": "connector.blocks.0.mlp.fc_out",
    "model.out_norm": "connector.ln_adapted",
    "model.audio_feature_head": "connector.head",
    f"{_LOOK_BACK}.q_proj": "connector.cross_attn.q_proj",
    f"{_LOOK_BACK}.k_proj": "connector.cross_attn.k_proj",
    f"{_LOOK_BACK}.v_proj": "connector.cross_attn.v_proj",
    f"{_LOOK_BACK}.out_proj": "connector.cross_attn.o_proj",
    "model.lbm.atten_layer_norm": "connector.ln_cross",
    **weight_names("model", head="lm_head"),
}
"""The published names, once queries, keys and values are apart (`without_fused`), to ours."""


# -------------------------------------------------------------------------------- the connector


class LoneAttention(Attention):
    """Attention of every position to itself alone: `hook_pattern` is 1 there and 0 elsewhere.

    Queries and keys could change nothing, so there are none. A hook may write the pattern.
    """

    def __init__(self, cfg: PartConfig, causal: bool):
        super().__init__(cfg, causal)
        del self.q_proj, self.k_proj, self.hook_q, self.hook_k, self.hook_attn_scores

    def forward(self, x: Float[Tensor, "b t d"], context: Context) -> Float[Tensor, "b t d"]:
        v = self.hook_v(self._split(self.v_proj(x)))
        return self.output(self.hook_z(self._weighed(v) if self._is_explicit() else v))

    def _is_explicit(self) -> bool:
        if self.attn_mode == "auto":
            return self.hook_pattern.has_hooks()
        return self.attn_mode == "explicit"

    def _weighed(self, v: Float[Tensor, "b t h e"]) -> Float[Tensor, "b t h e"]:
        own = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
        return self.weigh(self.hook_pattern(own.repeat(len(v), self.n_heads, 1, 1)), v)


class LoneBlock(PreNormBlock):
    """A pre-norm block in which positions see nothing of each other."""

    attention = LoneAttention


class ShrinkingConnector(Connector):
    """A connector that labels its frames and passes on the first of every run of equal labels.

    Subclasses define `adapt` and `label_logits`, and may define `shrink`. Which frames are kept is
    decided once for given inputs (`HookedShrinking.extra_of`) and does not change in a patched run.

    Attributes:
        blank: the label whose runs are dropped; None keeps a frame of these as of any other.
    """

    blank: int | None = None

    def __init__(self, *arguments: Any, frames_per_token: int = 1):
        super().__init__(*arguments, frames_per_token=frames_per_token)
        self.hook_frames, self.hook_kept = HookPoint(), HookPoint()

    @abstractmethod
    def adapt(self, x: Float[Tensor, "b frames d_in"]) -> Float[Tensor, "b t d"]:
        """The frames that are labelled, ``frames_per_token`` positions of the encoder each."""

    @abstractmethod
    def label_logits(self, frames: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        """How much each frame sounds like each label."""

    def shrink(
        self, frames: Float[Tensor, "b t d"], kept: Int[Tensor, "b n"]
    ) -> Float[Tensor, "b n d"]:
        """What becomes of the kept frames (zeros behind the last of a row): nothing, here."""
        return self.hook_kept(frames_at(frames, kept))

    def frames_of(self, x: Float[Tensor, "b frames d_in"]) -> Float[Tensor, "b t d"]:
        """The frames alone, of the encoder's output."""
        return self.hook_frames(self.adapt(self.hook_in(x)))

    @torch.no_grad()
    def labels_of(self, frames: Float[Tensor, "b t d"]) -> Int[Tensor, "b t"]:
        """The likeliest label of every frame, one row after the other: logits are large."""
        return torch.cat([self.label_logits(row[None]).argmax(-1) for row in frames])

    def carry(
        self, x: Float[Tensor, "b frames d_in"], kept: Int[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """What enters the language model of the frames named; of all, where none are."""
        frames = self.hook_frames(self.adapt(x))
        if kept is None:
            kept = torch.arange(frames.shape[1], device=frames.device).repeat(len(frames), 1)
        return self.shrink(frames, kept)


class SoundwaveConnector(ShrinkingConnector):
    """Pairs of frames, a linear map, a block without exchange, a norm; and the look-back.

    The keys of `cross_attn` are all frames, so that a row of `cross_attn.hook_pattern`
    (``b h q k``) tells which of them a kept one finds; those that were dropped have 0.
    """

    def __init__(self, cfg: PartConfig, d_in: int):
        super().__init__(frames_per_token=STACKED)
        self.adapter = nn.Linear(STACKED * d_in, cfg.d_model)
        self.blocks = nn.ModuleList([LoneBlock(cfg)])
        self.ln_adapted = LayerNorm(cfg.d_model, cfg.eps)
        self.head = nn.Linear(cfg.d_model, cfg.d_vocab, bias=False)
        self.cross_attn = Attention(cfg, causal=False, d_memory=cfg.d_model)
        self.ln_cross = LayerNorm(cfg.d_model, cfg.eps)
        self.hook_stacked, self.hook_adapter_out = HookPoint(), HookPoint()
        self.hook_cross_attn_out, self.hook_resid_mid_cross = HookPoint(), HookPoint()

    def adapt(self, x: Float[Tensor, "b frames d_in"]) -> Float[Tensor, "b t d"]:
        whole = x[:, : self.token_count(x.shape[1]) * STACKED]
        stacked = self.hook_stacked(rearrange(whole, "b (t k) d -> b t (k d)", k=STACKED))
        resid = self.hook_adapter_out(self.adapter(stacked))
        return self.ln_adapted(self.blocks[0](resid, Context()))

    def label_logits(self, frames: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        return self.head(frames)

    def shrink(
        self, frames: Float[Tensor, "b t d"], kept: Int[Tensor, "b n"]
    ) -> Float[Tensor, "b n d"]:
        resid = super().shrink(frames, kept)
        attn, allowed = self.cross_attn, mask_of(kept, frames.shape[1])[:, None, None]
        z = attn.mix(attn.queries(resid), *attn.keys_values(frames), allowed)
        found = self.hook_cross_attn_out(attn.output(attn.hook_z(z)))
        return self.ln_cross(self.hook_resid_mid_cross(resid + found))


# -------------------------------------------------------------------------------- the model


class Segmentation(NamedTuple):
    """How a connector labels its frames, and which of them it keeps.

    Attributes:
        logits: of every label.
        labels: the likeliest.
        kept: indices of the frames that go on; -1 behind the last of a segment.
        seconds: their centres in seconds from the start of the segment; NaN behind the last.
    """

    logits: Float[Tensor, "segments t v"]
    labels: Int[Tensor, "segments t"]
    kept: Int[Tensor, "segments n"]
    seconds: Float[Tensor, "segments n"]


class ShrunkSegment(Segment):
    """A segment, and which of its frames are kept."""

    kept: Int[Tensor, " n"]

    @classmethod
    def of(cls, segment: Segment, kept: Int[Tensor, " n"]) -> ShrunkSegment:
        shrunk = cls(*segment)
        shrunk.kept = kept
        return shrunk


class HookedShrinking(HookedComposed):
    """A composed model whose connector decides by what it hears how many tokens a clip becomes.

    Which frames are kept (``inputs.extra["kept"]``, indices of frames of the connector, -1 behind
    the last of a segment) is part of the inputs: `prepare` lets the model decide, without hooks,
    and every run of these inputs holds it fixed, so that patched and unpatched runs have equal
    shapes. `segmentation` tells what a run would keep, hooks and all; `with_segmentation` puts two
    clips on the same frames.
    """

    connector: ShrinkingConnector

    def __init__(self, cfg: Any, ears: Mapping[str, Any], connector: Any, decoder: LanguageModel):
        if not isinstance(connector, ShrinkingConnector) or connector.taps or len(ears) > 1:
            raise CompositionError(
                "a shrinking model has one encoder and a ShrinkingConnector without taps"
            )
        super().__init__(cfg, ears, connector, decoder)

    # ---------------------------------------------------------------- which frames are kept

    def segmentation(self, inputs: AudioInputs | Mapping[str, Any]) -> Segmentation:
        """How frames are labelled, and which would be kept, under the hooks that are attached.

        The model itself goes on with those of ``inputs.extra["kept"]``, hooks or not.
        """
        inputs = self.as_inputs(inputs)
        logits = self.connector.label_logits(self._frames(inputs))
        labels = logits.argmax(-1)
        kept = self._kept(labels, inputs)
        return Segmentation(logits, labels, kept, self._kept_seconds(kept))

    def with_segmentation(
        self, inputs: AudioInputs | Mapping[str, Any], like: AudioInputs | Mapping[str, Any]
    ) -> AudioInputs:
        """The inputs with the frames kept that other inputs keep, for a counterfactual pair.

        Clips changed later (`with_audio`) are put on these frames too.

        Raises:
            InputError: clips of other lengths.
        """
        inputs, like = self.as_inputs(inputs), self.as_inputs(like)
        lengths = [self._lengths(one) for one in (inputs, like)]
        if lengths[0] != lengths[1] or inputs.segments_per_clip != like.segments_per_clip:
            raise InputError(
                f"the clips hold {lengths[0]} and {lengths[1]} mel frames, so they cannot be on "
                "one segmentation: pad or cut them to equal length"
            )
        tokens, mask = self._recounted(inputs, self.counts_of(lengths[0], like.extra))
        made = replace(
            inputs,
            tokens=tokens,
            attention_mask=None if mask.all() else mask,
            position_ids=None,
            extra={**inputs.extra, KEPT: like.extra[KEPT]},
            remake=functools.partial(self._prepared_like, like=like),
        )
        if inputs.position_ids is None:
            return made
        return replace(made, position_ids=made.counted_positions())

    def _prepared_like(
        self, audio: Any, text: Any, sampling_rate: int | None, like: AudioInputs
    ) -> AudioInputs:
        return self.with_segmentation(self.prepare(audio, text, sampling_rate), like)

    def _recounted(
        self, inputs: AudioInputs, counts: Sequence[int]
    ) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
        """Prompts whose segments have so many placeholders each, and their mask."""
        places = self.audio_places(inputs)
        first = places.index == 0
        begins = torch.zeros_like(inputs.attended)
        begins[places.row[first], places.position[first]] = True
        stays = inputs.attended & (begins | ~self.is_audio(inputs))
        remaining, rows = iter(counts), []
        for row, own in zip(inputs.tokens, stays, strict=True):
            made: list[int] = []
            for token in row[own].tolist():
                is_audio = token == self.audio_token_id
                made += self.placeholders(next(remaining)) if is_audio else [token]
            rows.append(made)
        left = bool(inputs.attended[:, -1].all())
        return padded(rows, self._pad_token(), self.device, left=left)

    def _kept(self, labels: Int[Tensor, "segments t"], inputs: AudioInputs) -> Tensor:
        """The frames that are kept of those that may become tokens, ``segments n``."""
        counts = [self.token_count(n) for n in self._lengths(inputs)]
        index = torch.arange(labels.shape[1], device=labels.device)
        may = index < torch.tensor(counts, device=labels.device)[:, None]
        return indices_of(change_points(labels, self.connector.blank) & may)

    def _frames(self, inputs: AudioInputs) -> Float[Tensor, "segments t d"]:
        resid = self.encode(inputs, stop=self.cfg.encoder.n_layers)
        return self.connector.frames_of(self.encoder.finish(resid))

    def extra_of(
        self,
        features: Tensor,
        frames: Bool[Tensor, "segments frames"] | None,
        extra: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Which frames are kept: as given, or as the model decides without anybody's hooks.

        Raises:
            InputError: indices of no frames, or a segment of which nothing is kept.
        """
        tokens = torch.zeros(len(features), 0, dtype=torch.long, device=features.device)
        heard = AudioInputs(features, tokens, (1,) * len(features), feature_mask=frames)
        kept = extra.get(KEPT)
        if kept is None:
            with torch.no_grad(), self.without_hooks():
                labels = self.connector.labels_of(self._frames(heard))
            kept = self._kept(labels, heard).to(self.device)
        _check_kept(kept, len(features), self._tokens_of(self.encoder_length(heard)))
        return {**extra, KEPT: kept}

    # ---------------------------------------------------------------- forward

    def send_rows(
        self,
        resid: Float[Tensor, "rows frames d"],
        inputs: AudioInputs,
        segment: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, "rows n d_out"]:
        """The connector's output, of the frames that the inputs say are kept."""
        kept = inputs.extra[KEPT]
        chosen = kept if segment is None else kept[segment.to(kept.device)]
        return self.connector(self.encoder.finish(resid), chosen.to(resid.device))

    # ---------------------------------------------------------------- lengths and times

    def counts_of(self, lengths: Sequence[int], extra: Mapping[str, Tensor]) -> list[int]:
        """Tokens of every segment: the frames that are kept."""
        return (extra[KEPT] != FILLER).sum(1).tolist()

    def _kept_seconds(self, kept: Int[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        """Centres of kept frames in seconds from the start of their segment."""
        seconds = self.token_seconds(1 + max(kept.flatten().tolist(), default=0)).to(kept.device)
        return seconds[kept.clamp(min=0)].masked_fill(kept == FILLER, torch.nan)

    def _segments(self, inputs: AudioInputs) -> Iterator[list[ShrunkSegment]]:
        kept = iter(inputs.extra[KEPT].cpu())
        for segments in super()._segments(inputs):
            yield [ShrunkSegment.of(segment, next(kept)) for segment in segments]

    def _connector_track(self, length: int, segment: ShrunkSegment) -> Track:
        kept = segment.kept
        heard = -(-self.frame_count(segment.n_valid) // self.connector.frames_per_token)
        return Track(
            self._kept_seconds(kept) + segment.start_s,
            torch.full_like(kept, segment.clip),
            (kept != FILLER) & (kept < heard),
        )

    def _decoder_track(
        self,
        is_audio: Bool[Tensor, " t"],
        attended: Bool[Tensor, " t"],
        segments: Sequence[ShrunkSegment],
    ) -> Track:
        track, index = Track.of_tokens(attended), is_audio.nonzero().flatten()
        for segment in segments:
            kept = segment.kept[segment.kept != FILLER]
            here, index = index[: len(kept)], index[len(kept) :]
            track.seconds[here] = self._kept_seconds(kept) + segment.start_s
            track.clip[here] = segment.clip
        return track

    # ---------------------------------------------------------------- inputs

    @property
    def known_keys(self) -> tuple[str, ...]:
        """What a mapping may hold."""
        return (*super().known_keys, KEPT)

    def extra_given(self, given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The frames to keep, where a mapping names them."""
        return {} if given[KEPT] is None else {KEPT: given[KEPT]}


class HookedSoundwave(HookedShrinking):
    """Soundwave with every activation hooked."""

    def _encoded(self, prompt: str) -> list[int]:
        """The prompt piece by piece, as the published code has it.

        Every piece of text is encoded as if it stood alone: a tokenizer that begins texts with a
        token of its own begins each with it.
        """
        tokens: list[int] = []
        for piece in filter(None, _BETWEEN.split(prompt)):
            if piece == PLACEHOLDER:
                tokens.append(self.audio_token_id)
            elif piece in _NAMED:
                tokens.append(self.tokenizer.convert_tokens_to_ids(piece))
            else:
                tokens += self.tokenizer(piece)["input_ids"]
        return tokens


def _check_kept(kept: Int[Tensor, "segments n"], n_segments: int, n_frames: int) -> None:
    """Raise unless these are indices of frames, in order, some of every segment.

    Raises:
        InputError: saying what they are to be.
    """
    is_filler = kept == FILLER
    ordered = (kept[:, 1:] > kept[:, :-1]) | is_filler[:, 1:]
    packed = ~(is_filler[:, :-1] & ~is_filler[:, 1:])
    inside = is_filler | ((kept >= 0) & (kept < n_frames))
    if len(kept) != n_segments or not (ordered.all() and packed.all() and inside.all()):
        raise InputError(
            f"{KEPT!r} are, for each of {n_segments} segments, increasing indices of its "
            f"{n_frames} frames, with {FILLER} behind the last"
        )
    empty = is_filler.all(1).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"nothing is kept of segment {', '.join(map(str, empty))}: all of it is labelled as "
            "blank, and the language model would hear nothing"
        )


# -------------------------------------------------------------------------------- checkpoints


def soundwave(
    checkpoint: str | Path, whisper: str | Path | None = None, dtype: torch.dtype | None = None
) -> HookedSoundwave:
    """Soundwave, from a directory with the published files.

    Args:
        checkpoint: holds ``config.json``, the safetensors, and for texts the tokenizer's files.
        whisper: hub id or directory of the Whisper it hears with; None takes the one that the
            config names. Its weights are read only where the checkpoint brings none.
        dtype: of the weights; None keeps the checkpoint's.

    Raises:
        LoadingError: a file that is missing or corrupt, a config of another model, or weights that
            are missing, misshapen or without a place.
    """
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise LoadingError(f"{folder} holds no config.json, so it is no directory of Soundwave")
    config = json.loads((folder / "config.json").read_text())
    text = soundwave_text_config(config, str(checkpoint))
    whisper = whisper or config.get("audio_tower")
    if whisper is None:
        raise LoadingError("the config names no Whisper (audio_tower): pass whisper=")
    state = read_weights(folder)
    dtype = dtype or next(iter(state.values())).dtype
    ear = _shape_of_ear(whisper) if _has_ear(state) else _whole_ear(whisper, dtype)
    found, problem = processor_of(str(folder))
    tokenizer = getattr(found, "tokenizer", found)
    model = soundwave_of(
        state, text, ear, tokenizer, token_id=config.get("audio_patch_token"), dtype=dtype
    )
    model.tokenizer_problem = problem
    return model


def soundwave_text_config(config: Mapping[str, Any], model_name: str = "") -> LlamaConfig:
    """The language model that a published ``config.json`` tells of.

    Raises:
        LoadingError: if it is of another model.
    """
    if "adapter_size" not in config:
        raise LoadingError("this config has no adapter_size, so it is of no Soundwave")
    own = {key: value for key, value in config.items() if key != "model_type"}
    text = LlamaConfig(**own)
    text.name_or_path = model_name
    return text


def soundwave_of(
    state: Mapping[str, Tensor],
    text: LlamaConfig,
    ear: WhisperConfig | HookedWhisper,
    tokenizer: Any = None,
    token_id: int | None = None,
    dtype: torch.dtype | None = None,
) -> HookedSoundwave:
    """The model of published weights.

    Args:
        state: by their published names.
        ear: the shape of Whisper where the weights bring its encoder, otherwise the model.
        token_id: of the placeholder, where there is no tokenizer to ask.

    Raises:
        LoadingError: for weights that are missing, misshapen or without a place.
    """
    if _has_ear(state) != isinstance(ear, WhisperConfig):
        brings = "bring their own encoder" if _has_ear(state) else "bring no encoder"
        raise LoadingError(f"the weights {brings}, so ear cannot be a {type(ear).__name__}")
    tensors = renamed(without_fused(state), WEIGHT_NAMES)
    if isinstance(ear, WhisperConfig):
        heard = HookedWhisper.config_from_hf(ear)
    else:
        heard = ear.cfg
        tensors |= {f"encoder.{name}": x for name, x in ear.encoder.state_dict().items()}
    cfg = language_model_config(text, text.name_or_path)
    with torch.device("meta"):
        parts = (
            HookedWhisper(replace(heard, decoder=None, head=None)),
            SoundwaveConnector(_connector_config(cfg), heard.encoder.d_model),
            LanguageModel(cfg),
        )
    model = compose(
        *parts,
        Placeholder(PLACEHOLDER, token_id if tokenizer is None else None),
        tokenizer=tokenizer,
        template=TEMPLATE,
        keeps_padding=True,
        name="soundwave",
        family=HookedSoundwave,
    )
    fill(model, {name: x.to(dtype or x.dtype) for name, x in tensors.items()})
    model.cfg.model_name = text.name_or_path or model.cfg.model_name
    if tokenizer is not None:
        end = tokenizer.eos_token_id
        model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    return model


def without_fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with queries, keys and values of the connector apart, as views."""
    apart: dict[str, Tensor] = {}
    for name, tensor in state.items():
        before, fused, kind = name.rpartition("in_proj_")
        if fused:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            apart |= {f"{before}{part}_proj.{kind}": piece for part, piece in parts}
        else:
            apart[name] = tensor
    return apart


def _has_ear(state: Mapping[str, Tensor]) -> bool:
    """Whether the weights bring the encoder."""
    return any(name.startswith("model.audio_tower.") for name in state)


def _shape_of_ear(whisper: str | Path) -> WhisperConfig:
    try:
        return WhisperConfig.from_pretrained(whisper)
    except (OSError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise LoadingError(f"no shape of Whisper at {whisper} (pass whisper=): {cause}") from error


def _whole_ear(whisper: str | Path, dtype: torch.dtype) -> HookedWhisper:
    ear = load_pretrained(whisper, dtype)
    if not isinstance(ear, HookedWhisper):
        raise LoadingError(f"{whisper} is a {ear.cfg.family}, and Soundwave hears with a Whisper")
    return ear


def _connector_config(text: PartConfig) -> PartConfig:
    """The shape of torch's own transformer layer and attention, as wide as the language model."""
    return PartConfig(
        n_layers=1,
        n_heads=text.n_heads,
        n_key_value_heads=text.n_heads,
        d_model=text.d_model,
        d_head=text.d_model // text.n_heads,
        d_mlp=2 * text.d_model,
        n_ctx=None,
        act_fn="relu",
        eps=1e-5,
        normalization_type="LN",
        attn_biases=("q", "k", "v", "o"),
        d_vocab=text.d_vocab,
    )
