"""Shapes of whole models, and what reading them from Hugging Face configurations needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from audio_lens.arguments import suggest
from audio_lens.errors import AudioLensError
from audio_lens.inputs import InputError
from audio_lens.models.layers import PartConfig, needed

OutputKind = Literal["tokens", "streams", "ctc", "classes", None]
MOST_LAYERS = 1_000  # the largest models have hundreds
TEXT = "text"  # the stream that a tokenizer writes; of several writing stacks, the decoder's


@dataclass
class AudioConfig:
    """Shape of a model.

    Attributes:
        encoder: None where the decoder itself reads the audio, as codes.
        decoder: None where the encoder itself makes the output.
        n_mels: mel bins of the features; None where the model hears waveforms.
        n_frames: feature steps (mel frames or samples) every segment is padded to; None where
            segments may have any length.
        hop: samples per feature step; 1 for waveforms.
        max_segments: into how many segments a clip may be cut.
        output_kind: what the output means: logits of the next token, of the next tokens of several
            streams side by side, of CTC labels at every position, of classes of the whole clip;
            None for bare hidden states.
        labels: names of the classes.
        ears: encoders beside the encoder, by the name of their part.
        further_decoders: stacks that make output beside or behind the decoder, by the name of their
            part.
        streams: names and widths of the columns of the logits, with output kind "streams".
    """

    family: str
    model_name: str
    encoder: PartConfig | None
    decoder: PartConfig | None
    n_mels: int | None
    n_frames: int | None
    sampling_rate: int = 16_000
    hop: int = 160
    max_segments: int = 1
    output_kind: OutputKind = "tokens"
    labels: tuple[str, ...] = ()
    ears: dict[str, PartConfig] = field(default_factory=dict)
    further_decoders: dict[str, PartConfig] = field(default_factory=dict)
    streams: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        """Raise on sizes that no model has.

        Raises:
            LoadingError: naming them.
        """
        held = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name, part in (held | self.parts).items():
            if isinstance(part, PartConfig):
                check_part(name, part)
        _check_sizes(
            self.model_name or self.family,
            {key: getattr(self, key) for key in ("n_mels", "n_frames", "sampling_rate", "hop")},
        )

    @property
    def parts(self) -> dict[str, PartConfig]:
        """The parts there are, in the order in which they run."""
        parts = {
            "encoder": self.encoder,
            **self.ears,
            "decoder": self.decoder,
            **self.further_decoders,
        }
        return {name: cfg for name, cfg in parts.items() if cfg is not None}

    @property
    def head(self) -> OutputKind:
        """Former name of `output_kind`."""
        return self.output_kind

    @property
    def is_heard_in(self) -> tuple[str, ...]:
        """The parts whose rows are segments of audio, not prompts."""
        return () if self.encoder is None else ("encoder", *self.ears)

    def columns(self, stream: str) -> slice:
        """The columns of the logits that belong to a stream.

        Raises:
            InputError: if there is no such stream.
        """
        names = [name for name, _ in self.streams]
        if stream not in names:
            known = suggest(stream, names) if names else "it writes a single one"
            raise InputError(f"{self.family} writes no stream {stream!r}; {known}")
        index = names.index(stream)
        start = sum(width for _, width in self.streams[:index])
        return slice(start, start + self.streams[index][1])

    @property
    def need_encoder(self) -> PartConfig:
        """Shape of the encoder.

        Raises:
            InputError: where the decoder itself reads the audio.
        """
        return needed(self.encoder, f"{self.family} has no encoder")

    @property
    def need_decoder(self) -> PartConfig:
        """Shape of the decoder.

        Raises:
            InputError: where the encoder itself makes the output.
        """
        return needed(self.decoder, f"{self.family} has no decoder")

    @property
    def need_n_mels(self) -> int:
        """Mel bins of the features.

        Raises:
            InputError: where the model hears waveforms, or codes.
        """
        return needed(self.n_mels, f"{self.family} hears no mel bins")

    @property
    def need_n_frames(self) -> int:
        """Feature steps of a segment.

        Raises:
            InputError: where segments may have any length.
        """
        return needed(self.n_frames, f"segments of {self.family} have no fixed length")

    @property
    def output(self) -> PartConfig:
        """The part that makes the output."""
        return self.need_encoder if self.decoder is None else self.decoder

    @property
    def n_unembedded(self) -> int:
        """How many columns of the output, the first ones, are an unembedding of hidden states."""
        if self.output_kind in (None, "classes"):
            return 0
        return self.columns(TEXT).stop if self.further_decoders else self.output.need_d_vocab

    @property
    def step_s(self) -> float:
        """Seconds per feature step."""
        return self.hop / self.sampling_rate

    @property
    def segment_s(self) -> float:
        """Longest segment in seconds."""
        return math.inf if self.n_frames is None else self.n_frames * self.step_s

    @property
    def max_audio_s(self) -> float:
        """Longest clip in seconds."""
        return self.max_segments * self.segment_s


class LoadingError(AudioLensError, ValueError):
    """A checkpoint or model that cannot be taken over; the message says why."""


class HubError(LoadingError, OSError):
    """A checkpoint that is neither a folder here nor to be had from the hub."""


def check_part(name: str, part: PartConfig) -> None:
    """Raise unless a part has sizes that one can be built of and run with.

    Raises:
        LoadingError: naming what it has.
    """
    sizes = ("n_heads", "n_key_value_heads", "d_model", "d_head", "d_mlp", "n_ctx", "d_vocab")
    source = f"the {name} of {part.model_name}" if part.model_name else f"the {name}"
    _check_sizes(source, {"n_layers": part.n_layers or 1} | {k: getattr(part, k) for k in sizes})
    if part.n_layers > MOST_LAYERS:
        raise LoadingError(f"{source} has {part.n_layers} layers: no model has so many")
    if part.n_heads % part.n_key_value_heads:
        raise LoadingError(
            f"{source} has {part.n_heads} heads of queries for {part.n_key_value_heads} of keys, "
            "which do not divide them"
        )
    if part.act_fn not in ACT2FN:
        raise LoadingError(
            f"{source} has the activation {part.act_fn!r}; {suggest(str(part.act_fn), ACT2FN)}"
        )
    if not (isinstance(part.eps, int | float) and 0 <= part.eps < math.inf):
        raise LoadingError(f"{source} has norms with eps={part.eps!r}")
    if part.rotary_base is not None and not 0 < part.rotary_base < math.inf:
        raise LoadingError(f"{source} turns its heads by the base {part.rotary_base!r}")


def _check_sizes(source: str, sizes: Mapping[str, Any]) -> None:
    wrong = [
        f"{key}={size!r}"
        for key, size in sizes.items()
        if size is not None and not (isinstance(size, int) and size >= 1)
    ]
    if wrong:
        raise LoadingError(f"{source} has {', '.join(wrong)}: whole numbers from 1 on are needed")


_OF_TRAINING = """
    activation_dropout apply_spec_augment attention_dropout begin_suppress_tokens bos_token_id
    decoder_layerdrop decoder_start_token_id dropout encoder_layerdrop eos_token_id
    feat_proj_dropout final_dropout hidden_dropout ignore_keys_at_rope_validation init_std
    initializer_range layerdrop mask_feature_length mask_feature_min_masks mask_feature_prob
    mask_time_length mask_time_min_masks mask_time_prob median_filter_width output_router_logits
    pad_token_id pretraining_tp router_aux_loss_coef suppress_tokens tie_word_embeddings use_cache
"""
"""Switches of Hugging Face configs that matter to training, decoding and bookkeeping only."""


def _declared_by(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """The switches that a class of configs declares, and their defaults."""
    return vars(kind())


def declared(hf_config: PreTrainedConfig, name: str, otherwise: Any) -> Any:
    """A switch of a Hugging Face config where its class declares it, else ``otherwise``.

    A config file may hold more than its class declares. Models do not read that, with few
    exceptions, so that `getattr` would follow a switch that Hugging Face ignores.
    """
    return getattr(hf_config, name) if name in _declared_by(type(hf_config)) else otherwise


def check_switches(hf_config: Any, known: Iterable[str]) -> None:
    """Raise if a Hugging Face config switches on what is not implemented.

    Whatever its class declares must be known, or matter to training only, or be something every
    config has, or have its default.

    Raises:
        LoadingError: naming the switches and their values.
    """
    usual = _declared_by(type(hf_config))
    switches = usual.keys() - {*known, *_OF_TRAINING.split(), *vars(PreTrainedConfig())}
    unknown = [
        f"{name}={getattr(hf_config, name)!r}"
        for name in sorted(switches)
        if getattr(hf_config, name, usual[name]) != usual[name]
    ]
    if unknown:
        raise LoadingError(f"{hf_config.model_type} with {', '.join(unknown)} is not implemented")
