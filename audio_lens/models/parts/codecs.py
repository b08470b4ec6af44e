"""Neural audio codecs with hooks where they are readable: EnCodec, Mimi and DAC.

A codec turns audio into codes, ``k`` of them per step of ``1 / frame_rate`` seconds, and codes into
audio. The convolutions inside are Hugging Face's own modules, frozen; hooked is what lies between
them: the latent, the codes, what they stand for, and the audio that comes out.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import transformers
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from audio_lens import audio as audio_io
from audio_lens.hooks import HookedRoot, HookPoint
from audio_lens.inputs import InputError
from audio_lens.models.config import LoadingError
from audio_lens.models.layers import needed
from audio_lens.models.loading.checkpoints import read_model


@dataclass(frozen=True)
class CodecConfig:
    """Shape of a codec.

    Attributes:
        sampling_rate: of the audio, in Hz.
        hop: samples per step.
        n_codebooks: how many codes a step has.
        n_codes: entries of every codebook.
        d_latent: width of the latent.
    """

    family: str
    model_name: str
    sampling_rate: int
    hop: int
    n_codebooks: int
    n_codes: int
    d_latent: int

    @property
    def frame_rate(self) -> float:
        """Steps per second."""
        return self.sampling_rate / self.hop

    def coarsest(self, n_codebooks: int | None) -> CodecConfig:
        """The same with so many codebooks, the coarsest; None keeps all.

        Raises:
            LoadingError: for more than there are, or none.
        """
        kept = self.n_codebooks if n_codebooks is None else n_codebooks
        if not 1 <= kept <= self.n_codebooks:
            raise LoadingError(f"this {self.family} has {self.n_codebooks} codebooks, not {kept}")
        return replace(self, n_codebooks=kept)

    def n_steps(self, n_samples: int) -> int:
        """Steps of so many samples; a last step that is begun counts."""
        return math.ceil(n_samples / self.hop)

    def seconds(self, n_steps: int) -> Float[Tensor, " t"]:
        """Centres of the samples that each step is made of, and makes, in seconds."""
        return (torch.arange(n_steps, dtype=torch.float64) + 0.5) / self.frame_rate


class HookedCodec(HookedRoot, ABC):
    """A frozen codec with hooks; alone, or as `codec` of a model that reads and writes its codes.

    `hook_latent` (``b t d``) is what the encoder makes of the audio, `hook_codes` (``b k t``) the
    nearest entries of the codebooks, `hook_quantized` (``b t d``) what these stand for and the
    decoder reads, `hook_audio` (``b samples``) what it makes of it. A hook that writes takes effect
    on all that follows. Codes are chosen, so gradients reach from the audio to `hook_quantized` and
    no further.

    Use `from_pretrained` or `from_hf`; there is one subclass per family.
    """

    output_part = "codec"
    hf_class: ClassVar[str]
    fills_steps: ClassVar[bool] = False  # whether a last step must be filled up with silence

    def __init__(self, hf_model: nn.Module, n_codebooks: int | None = None):
        super().__init__()
        self.cfg = self.config_from_hf(hf_model.config).coarsest(n_codebooks)
        self.hf = _frozen(hf_model)
        self.hook_latent, self.hook_quantized = HookPoint(), HookPoint()
        self.hook_codes = HookPoint(borrowed=True)  # the caller's, in `decode`
        self.hook_audio = HookPoint()
        self.setup()
        self.train(False)

    # ---------------------------------------------------------------- loading

    @classmethod
    def from_hf(cls, hf_model: nn.Module, n_codebooks: int | None = None) -> HookedCodec:
        """Take over an in-memory codec; the weights are shared, and the model itself not changed.

        Args:
            hf_model: an `EncodecModel`, `MimiModel` or `DacModel`.
            n_codebooks: use so many codes per step, the coarsest; None uses all.

        Raises:
            LoadingError: another model, or a codec of a shape that is not implemented.
        """
        return _family(hf_model.config)(hf_model, n_codebooks)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        n_codebooks: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> HookedCodec:
        """Load a checkpoint: a hub id or a local directory, with safetensors.

        Args:
            n_codebooks: use so many codes per step, the coarsest; None uses all.
            dtype: of the weights; None keeps the checkpoint's.

        Raises:
            LoadingError: no such directory, another architecture, or missing, unexpected or
                corrupt weights.
        """

        def implemented(hf_config: Any) -> str:
            family = _family(hf_config)
            family.config_from_hf(hf_config).coarsest(n_codebooks)
            return family.hf_class

        return cls.from_hf(read_model(name, implemented, dtype), n_codebooks)

    @classmethod
    @abstractmethod
    def config_from_hf(cls, hf_config: Any) -> CodecConfig:
        """The configuration of a Hugging Face config.

        Raises:
            LoadingError: for what is not implemented.
        """

    def train(self, mode: bool = True) -> HookedCodec:
        """A codec is frozen: it stays in evaluation mode."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hf.parameters()).dtype

    # ---------------------------------------------------------------- forward

    def encode(self, audio: Float[Tensor, "b samples"]) -> Int[Tensor, "b k t"]:
        """The codes of audio, mono at ``cfg.sampling_rate`` Hz.

        Raises:
            InputError: for anything but a batch of finite waveforms.
        """
        return self.hook_codes(self._chosen(audio))

    def decode(self, codes: Int[Tensor, "b k t"]) -> Float[Tensor, "b samples"]:
        """The audio of codes, all codebooks or only the coarsest.

        Raises:
            InputError: for another shape, or codes outside the codebooks (also those of a hook).
        """
        return self._sounding(self.hook_codes(codes.to(self.device)))

    def forward(self, audio: Float[Tensor, "b samples"]) -> Float[Tensor, "b made"]:
        """Audio through the codec and back, cut to the length it had.

        Raises:
            InputError: as `encode` and `decode`.
        """
        return self._sounding(self.hook_codes(self._chosen(audio)))[:, : audio.shape[-1]]

    def seconds(self, n_steps: int) -> Float[Tensor, " t"]:
        """Centres of the first steps in seconds; see `CodecConfig.seconds`."""
        return self.cfg.seconds(n_steps)

    def load(self, source: Any, sampling_rate: int | None = None) -> Float[Tensor, "1 samples"]:
        """A clip from a path, array or tensor, as this codec takes it.

        Raises:
            AudioError: if it cannot be read, or an array comes without ``sampling_rate`` (Hz).
        """
        samples = audio_io.load(source, self.cfg.sampling_rate, sampling_rate)
        return torch.from_numpy(samples)[None].to(self.device, self.dtype)

    def _chosen(self, audio: Float[Tensor, "b samples"]) -> Int[Tensor, "b k t"]:
        """The codes, before their hook."""
        if audio.ndim != 2 or audio.shape[-1] == 0 or not audio.isfinite().all():
            raise InputError(
                "audio is a batch of finite waveforms, (b samples) at "
                f"{self.cfg.sampling_rate} Hz (codec.load reads one); got {tuple(audio.shape)}"
            )
        filled = F.pad(audio, (0, -audio.shape[-1] % self.cfg.hop)) if self.fills_steps else audio
        latent = self.hear(filled.to(self.device, self.dtype))
        latent = rearrange(self.hook_latent(rearrange(latent, "b d t -> b t d")), "b t d -> b d t")
        return self.choose(latent)[:, : self.cfg.n_codebooks]

    def _sounding(self, codes: Int[Tensor, "b k t"]) -> Float[Tensor, "b samples"]:
        """What hooked codes sound like."""
        self.check_codes(codes)
        quantized = rearrange(self.look_up(codes), "b d t -> b t d")
        return self.hook_audio(
            self.speak(rearrange(self.hook_quantized(quantized), "b t d -> b d t"))
        )

    def check_codes(self, codes: Tensor) -> None:
        """Raise unless these are codes of this codec.

        Raises:
            InputError: naming what they should be.
        """
        cfg = self.cfg
        if codes.ndim != 3 or not 1 <= codes.shape[1] <= cfg.n_codebooks or not codes.shape[2]:
            raise InputError(
                f"codes are (b, up to {cfg.n_codebooks} codebooks, steps), got {tuple(codes.shape)}"
            )
        unknown = codes[(codes < 0) | (codes >= cfg.n_codes)]
        if len(unknown):
            raise InputError(
                f"no code {unknown[0].item()}: codebooks have {cfg.n_codes} entries (padding and "
                "delays of a language model are no codes: take them out first)"
            )

    # ---------------------------------------------------------------- what a family defines

    @abstractmethod
    def hear(self, audio: Float[Tensor, "b samples"]) -> Float[Tensor, "b d t"]:
        """The latent."""

    @abstractmethod
    def choose(self, latent: Float[Tensor, "b d t"]) -> Int[Tensor, "b k t"]:
        """The codes of a latent, of all codebooks."""

    @abstractmethod
    def look_up(self, codes: Int[Tensor, "b k t"]) -> Float[Tensor, "b d t"]:
        """What codes stand for."""

    @abstractmethod
    def speak(self, quantized: Float[Tensor, "b d t"]) -> Float[Tensor, "b samples"]:
        """The audio of what codes stand for."""


class HookedEncodec(HookedCodec):
    """EnCodec (Défossez et al. 2022, arXiv:2210.13438), mono and in one piece.

    That of 24 kHz is causal but for its first steps: its padding reflects what follows.
    """

    hf_class = "EncodecModel"
    hf: transformers.EncodecModel

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> CodecConfig:
        """The shape of an `EncodecConfig`."""
        _refuse(
            hf_config,
            {"normalize": False, "chunk_length_s": None, "audio_channels": 1},
            "EnCodec that normalises, cuts or mixes its audio (48 kHz) is not implemented",
        )
        return _config(hf_config, hf_config.hop_length, hf_config.num_quantizers)

    def hear(self, audio: Float[Tensor, "b samples"]) -> Float[Tensor, "b d t"]:
        return self.hf.encoder(audio[:, None])

    def choose(self, latent: Float[Tensor, "b d t"]) -> Int[Tensor, "b k t"]:
        return rearrange(self.hf.quantizer.encode(latent), "k b t -> b k t")

    def look_up(self, codes: Int[Tensor, "b k t"]) -> Float[Tensor, "b d t"]:
        return self.hf.quantizer.decode(rearrange(codes, "b k t -> k b t"))

    def speak(self, quantized: Float[Tensor, "b d t"]) -> Float[Tensor, "b samples"]:
        return self.hf.decoder(quantized)[:, 0]


class HookedMimi(HookedCodec):
    """Mimi (Défossez et al. 2024, arXiv:2410.00037): the first codebook is distilled from WavLM."""

    hf_class = "MimiModel"
    hf: transformers.MimiModel

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> CodecConfig:
        """The shape of a `MimiConfig`."""
        if hf_config.encoder_config is None or hf_config.decoder_config is None:
            raise LoadingError("half a Mimi (encoder_config or decoder_config None) is no codec")
        _refuse(hf_config, {"audio_channels": 1}, "only mono Mimi is implemented")
        hop = round(hf_config.sampling_rate / hf_config.frame_rate)
        return _config(hf_config, hop, hf_config.num_quantizers)

    def hear(self, audio: Float[Tensor, "b samples"]) -> Float[Tensor, "b d t"]:
        encoder = needed(self.hf.encoder, "half a Mimi (without its encoder) hears nothing")
        return encoder(audio[:, None], use_streaming=False).latents

    def choose(self, latent: Float[Tensor, "b d t"]) -> Int[Tensor, "b k t"]:
        return rearrange(self.hf.quantizer.encode(latent), "k b t -> b k t")

    def look_up(self, codes: Int[Tensor, "b k t"]) -> Float[Tensor, "b d t"]:
        return self.hf.quantizer.decode(codes)

    def speak(self, quantized: Float[Tensor, "b d t"]) -> Float[Tensor, "b samples"]:
        decoder = needed(self.hf.decoder, "half a Mimi (without its decoder) says nothing")
        return decoder(quantized).audio_values[:, 0]

    def _apply(self, fn: Any, recurse: bool = True) -> HookedMimi:
        """As `nn.Module`; Mimi keeps its codebooks a second time, outside of its buffers."""
        for module in self.hf.quantizer.modules():
            if hasattr(module, "_embed"):
                vars(module)["_embed"] = None
        return super()._apply(fn, recurse)


class HookedDac(HookedCodec):
    """DAC (Kumar et al. 2023, arXiv:2306.06546); the last step is filled up with silence.

    Where a downsampling ratio is odd (those of 16 and 24 kHz), it makes a few samples less audio
    than it hears.
    """

    hf_class = "DacModel"
    hf: transformers.DacModel
    fills_steps = True

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> CodecConfig:
        """The shape of a `DacConfig`."""
        hop = math.prod(hf_config.downsampling_ratios)
        return _config(hf_config, hop, hf_config.n_codebooks)

    def hear(self, audio: Float[Tensor, "b samples"]) -> Float[Tensor, "b d t"]:
        return self.hf.encoder(audio[:, None])

    def choose(self, latent: Float[Tensor, "b d t"]) -> Int[Tensor, "b k t"]:
        return self.hf.quantizer(latent)[1]

    def look_up(self, codes: Int[Tensor, "b k t"]) -> Float[Tensor, "b d t"]:
        quantized: Any = self.hf.quantizer.from_codes(codes)[0]  # said to be a number, by its type
        return quantized

    def speak(self, quantized: Float[Tensor, "b d t"]) -> Float[Tensor, "b samples"]:
        return self.hf.decoder(quantized)[:, 0]


class Speaking(ABC):
    """A model that reads and writes the codes of a codec; mixed into a `HookedAudioTransformer`.

    The codec is no part of the model: it runs when audio is prepared or made, its hook points are
    its own (``with model.codec.hooks(...)``), and it stays where it is when the model is moved
    (``model.codec.to(device)``).

    Attributes:
        codec_name: of the codec in the Hugging Face model.
        device: of the model.
    """

    codec_name: ClassVar[str]
    device: torch.device

    @property
    @abstractmethod
    def n_spoken(self) -> int:
        """Codebooks of the codec that the model reads and writes."""

    @property
    def codec(self) -> HookedCodec:
        """The codec.

        Raises:
            InputError: if the model has none.
        """
        held = vars(self).get("_codec")
        if held is None:
            raise InputError("this model was built without a codec: pass codes, not audio")
        return held

    def take_modules(self, hf_model: nn.Module) -> None:
        """Keep the codec."""
        codec = HookedCodec.from_hf(getattr(hf_model, self.codec_name), self.n_spoken)
        vars(self)["_codec"] = codec.to(self.device)  # past torch, which would make it a part


CODECS: dict[str, type[HookedCodec]] = {
    "encodec": HookedEncodec,
    "mimi": HookedMimi,
    "dac": HookedDac,
}


def _family(hf_config: Any) -> type[HookedCodec]:
    """The codec of a Hugging Face config."""
    kind = hf_config.model_type
    if kind not in CODECS:
        raise LoadingError(f"{kind!r} is no codec; implemented: {', '.join(CODECS)}")
    return CODECS[kind]


def _config(hf_config: Any, hop: int, n_codebooks: int) -> CodecConfig:
    """The shape of a codec of all its codebooks."""
    return CodecConfig(
        family=hf_config.model_type,
        model_name=hf_config.name_or_path,
        sampling_rate=hf_config.sampling_rate,
        hop=hop,
        n_codebooks=n_codebooks,
        n_codes=hf_config.codebook_size,
        d_latent=hf_config.hidden_size,
    )


def _refuse(hf_config: Any, implemented: dict[str, Any], message: str) -> None:
    """Raise if a switch is not as it is implemented."""
    for name, value in implemented.items():
        if getattr(hf_config, name) != value:
            raise LoadingError(f"{message}: {name}={getattr(hf_config, name)!r}")


def _frozen(hf_model: nn.Module) -> nn.Module:
    """A copy that shares the weights, without their gradients."""
    shared: dict[int, Tensor] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in hf_model.parameters()
    }
    return copy.deepcopy(hf_model, shared | {id(b): b for b in hf_model.buffers()})
