"""`HookedAudioTransformer`: what every family shares."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from audio_lens import audio as audio_io
from audio_lens.cache import AudioCache
from audio_lens.hooks import HookedRoot, HookPoint, suggest
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.layers import KVCache, PartConfig
from audio_lens.models.part import Part
from audio_lens.timeline import Timeline

ReturnType = Literal["logits", "loss", "both"] | None


@dataclass
class AudioConfig:
    """Shape of a model. `n_frames` is the mel frames (10 ms) its features always have."""

    family: str
    model_name: str
    encoder: PartConfig
    decoder: PartConfig
    n_mels: int
    n_frames: int
    sampling_rate: int = 16_000

    @property
    def parts(self) -> dict[str, PartConfig]:
        return {"encoder": self.encoder, "decoder": self.decoder}

    @property
    def max_audio_s(self) -> float:
        """Longest clip in seconds."""
        return self.n_frames / 100


class TokenError(ValueError):
    """Text that does not give the tokens that are needed."""


class HookedAudioTransformer(HookedRoot, ABC):
    """A model that listens, with a named `HookPoint` on everything it computes.

    Use `from_pretrained` or `from_hf`; subclasses are one per family and are chosen for you.
    """

    output_part = "decoder"
    hf_class: ClassVar[str]
    weight_names: ClassVar[dict[str, str]]

    def __init__(self, cfg: AudioConfig):
        super().__init__()
        self.cfg = cfg
        self.feature_extractor: Any = None
        self.tokenizer: Any = None
        self.processor: Any = None
        self.generation_config: Any = None
        self.hook_logits = HookPoint()

    # ---------------------------------------------------------------- loading

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> HookedAudioTransformer:
        """Load a checkpoint.

        Args:
            name: a hub id, a local Hugging Face directory, or "embedded" for the small trained
                model that ships with the package.
            dtype: of the weights; None keeps the checkpoint's.
            device: where to put the model; None is the CPU.

        Raises:
            LoadingError: unsupported architecture, missing or unexpected weights, or a checkpoint
                without safetensors.
        """
        from audio_lens.models.loading import load_pretrained

        return load_pretrained(name, dtype=dtype, device=device)

    @classmethod
    def from_hf(cls, hf_model: nn.Module, processor: Any = None) -> HookedAudioTransformer:
        """Take over an in-memory Hugging Face model; the weights are shared, not copied.

        Raises:
            LoadingError: unsupported architecture, or weights that do not map one to one.
        """
        from audio_lens.models.loading import take_over

        return take_over(hf_model, processor)

    @classmethod
    @abstractmethod
    def config_from_hf(cls, hf_config: Any) -> AudioConfig:
        """The configuration of a Hugging Face config; unknown features raise."""

    # ---------------------------------------------------------------- what a family defines

    @abstractmethod
    def encode(
        self,
        inputs: AudioInputs,
        resid: Float[Tensor, "clips frames d"] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """What the decoder receives of the audio; with ``stop``, the residual entering that block.

        ``resid`` is the residual stream entering block ``start``; None starts from the features.
        """

    @abstractmethod
    def decode(
        self,
        inputs: AudioInputs,
        encoded: Tensor | None,
        resid: Float[Tensor, "b t d"] | None = None,
        start: int = 0,
        stop: int | None = None,
        past: KVCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        """The final hidden states; with ``stop``, the residual stream entering that block."""

    @abstractmethod
    def inputs_from_mapping(self, mapping: Mapping[str, Any]) -> AudioInputs:
        """Inputs from what a Hugging Face processor returns."""

    @abstractmethod
    def prepare(
        self, audio: Any, text: Any = None, sampling_rate: int | None = None, **options: Any
    ) -> AudioInputs:
        """Inputs from audio and text."""

    @abstractmethod
    def timeline(self, inputs: AudioInputs | Mapping[str, Any]) -> Timeline:
        """Where each position of each part lies in seconds."""

    @property
    def decoder_needs_encoder(self) -> bool:
        """Whether decoder blocks read the encoder (cross-attention)."""
        return hasattr(self.decoder.blocks[0], "cross_attn")

    # ---------------------------------------------------------------- forward

    def forward(
        self,
        x: AudioInputs | Mapping[str, Any] | Tensor | None = None,
        *,
        inputs: AudioInputs | Mapping[str, Any] | None = None,
        return_type: ReturnType = "logits",
        start_at_layer: int | str | None = None,
        stop_at_layer: int | str | None = None,
        encoder_out: Tensor | None = None,
        past: KVCache | None = None,
        **mapping: Any,
    ) -> Any:
        """Run the model.

        Args:
            x: `AudioInputs`, or the mapping a Hugging Face processor returns (which may also be
                given as keywords); with ``start_at_layer``, the residual stream entering it.
            inputs: with ``start_at_layer``, the prompts the residual belongs to (masks, encoder).
            return_type: "logits" (``b t d_vocab``), "loss" (mean next-token cross-entropy over
                attended text tokens), "both", or None.
            start_at_layer: block to start at; earlier blocks, and every part before them, do not
                run. An int is a block of the decoder, "encoder.3" one of the encoder.
            stop_at_layer: block to stop before; returns the residual stream entering it.
                Negative numbers count from the last block, as in TransformerLens.
            encoder_out: what the encoder gave earlier, so that it need not run again.
            past: keys and values of earlier positions, extended by this call.

        Raises:
            InputError: inputs of the wrong form, or a start without its residual stream.
        """
        start, stop = self._address(start_at_layer), self._address(stop_at_layer)
        resid = self._residual(x, start)
        batch = self.as_inputs(inputs if resid is not None else x, mapping, optional=bool(start))
        if batch is None:
            batch = self._context_free(resid, start, encoder_out)
        in_encoder = start is None or start[0] == "encoder"
        if in_encoder and encoder_out is None:
            begin = start[1] if start else 0
            until = stop[1] if stop and stop[0] == "encoder" else None
            encoder_out = self.encode(batch, resid, begin, until)
            if until is not None:
                return encoder_out
            resid = None
        elif self.decoder_needs_encoder and encoder_out is None:
            encoder_out = self.encode(batch)
        begin = start[1] if start and start[0] == "decoder" else 0
        hidden = self.decode(batch, encoder_out, resid, begin, stop[1] if stop else None, past)
        return hidden if stop else self._output(hidden, batch, return_type)

    def _address(self, layer: int | str | None) -> tuple[str, int] | None:
        """``3`` or ``"encoder.3"`` as part and block index."""
        if layer is None:
            return None
        part, _, index = str(layer).rpartition(".")
        part = part or self.output_part
        if part not in self.cfg.parts or not index.lstrip("-").isdigit():
            raise InputError(
                f"a layer is an int or 'part.int' with a part of {', '.join(self.cfg.parts)}; "
                f"got {layer!r}"
            )
        n_layers = self.cfg.parts[part].n_layers
        if not -n_layers <= int(index) <= n_layers:
            raise InputError(f"the {part} has {n_layers} layers, so there is no layer {index}")
        return part, int(index) + (n_layers if int(index) < 0 else 0)

    def _residual(self, x: Any, start: tuple[str, int] | None) -> Tensor | None:
        is_residual = isinstance(x, torch.Tensor) and x.is_floating_point()
        if is_residual != (start is not None):
            raise InputError(
                "start_at_layer takes the residual stream entering that layer as first argument "
                "(b t d), and inputs= for the prompts: model(resid, start_at_layer=3, "
                "inputs=inputs)"
            )
        return x if is_residual else None

    def _context_free(self, resid: Tensor, start: tuple[str, int], encoder_out: Any) -> AudioInputs:
        """Inputs for a residual stream given alone: one unpadded row of decoder positions each."""
        if start[0] == "encoder" or (self.decoder_needs_encoder and encoder_out is None):
            raise InputError(f"starting at {start[0]} layer {start[1]} also needs inputs=")
        tokens = torch.zeros(resid.shape[:2], dtype=torch.long, device=resid.device)
        features = resid.new_zeros(0, self.cfg.n_mels, self.cfg.n_frames)
        return AudioInputs(features, tokens, clips_per_row=(0,) * len(resid))

    def as_inputs(
        self,
        inputs: AudioInputs | Mapping[str, Any] | None,
        mapping: Mapping[str, Any] | None = None,
        optional: bool = False,
    ) -> AudioInputs | None:
        """`AudioInputs` from whatever stands for them.

        Raises:
            InputError: if it is neither `AudioInputs` nor a mapping of a Hugging Face processor.
        """
        if isinstance(inputs, AudioInputs):
            if mapping:
                raise InputError(f"unknown arguments beside the inputs: {', '.join(mapping)}")
            return inputs
        if inputs is not None and not isinstance(inputs, Mapping):
            raise InputError(
                f"inputs must be AudioInputs (model.prepare) or a processor's mapping, got "
                f"{type(inputs).__name__}"
            )
        merged = {**(inputs or {}), **(mapping or {})}
        if not merged and optional:
            return None
        return self.inputs_from_mapping(merged)

    def _mapping_tensors(
        self, mapping: Mapping[str, Any], known: Sequence[str]
    ) -> dict[str, Tensor | None]:
        """The known entries of a processor's mapping on the model's device; others raise."""
        unknown = [key for key in mapping if key not in known]
        if unknown:
            raise InputError(
                f"{self.cfg.family} takes {', '.join(known)}; got unknown {', '.join(unknown)}"
            )
        if mapping.get("input_features") is None:
            raise InputError("inputs hold no input_features: pass audio")
        device = self.device
        return {
            key: None if mapping.get(key) is None else torch.as_tensor(mapping[key]).to(device)
            for key in known
        }

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _output(
        self, hidden: Float[Tensor, "b t d"], inputs: AudioInputs, return_type: ReturnType
    ) -> Any:
        logits = self.hook_logits(self.decoder.unembed(hidden))
        if return_type == "logits":
            return logits
        if return_type is None:
            return None
        if return_type not in ("loss", "both"):
            raise InputError(f"return_type must be logits, loss, both or None, got {return_type!r}")
        loss = self.loss(logits, inputs)
        return loss if return_type == "loss" else (logits, loss)

    def loss(self, logits: Float[Tensor, "b t v"], inputs: AudioInputs) -> Float[Tensor, ""]:
        """Mean next-token cross-entropy over targets that are attended text.

        Raises:
            InputError: if there is no such target (a prompt of one token).
        """
        is_target = self.is_text(inputs)[:, 1:]
        if not is_target.any():
            raise InputError("no token to predict: the loss needs at least two text tokens")
        return F.cross_entropy(logits[:, :-1][is_target].float(), inputs.tokens[:, 1:][is_target])

    def is_text(self, inputs: AudioInputs) -> Bool[Tensor, "b t"]:
        """True at attended tokens that are text."""
        if inputs.attention_mask is None:
            return torch.ones_like(inputs.tokens, dtype=torch.bool)
        return inputs.attention_mask.bool()

    # ---------------------------------------------------------------- parts and caches

    @functools.cached_property
    def _parts(self) -> dict[str, Part]:
        return {name: Part(self, name) for name in self.cfg.parts}

    def part(self, name: str) -> Part:
        """A part as a model of its own, with TransformerLens-local names and configuration.

        Raises:
            ValueError: if the model has no such part.
        """
        if name not in self._parts:
            raise ValueError(f"no part named {name!r}; {suggest(name, self._parts)}")
        return self._parts[name]

    def _as_cache(self, cache: dict[str, Tensor], has_batch_dim: bool) -> AudioCache:
        return AudioCache(cache, self._parts, self.output_part, has_batch_dim)

    # ---------------------------------------------------------------- audio and text

    def load_audio(self, source: Any, sampling_rate: int | None) -> Float[Any, " samples"]:
        """One clip, mono at the model's rate, checked to fit the model.

        Raises:
            AudioError: if it cannot be read or is longer than the model takes.
        """
        samples = audio_io.load(source, self.cfg.sampling_rate, sampling_rate)
        seconds = len(samples) / self.cfg.sampling_rate
        if seconds > self.cfg.max_audio_s:
            raise audio_io.AudioError(
                f"the clip is {seconds:.2f} s long and this model takes "
                f"{self.cfg.max_audio_s:g} s: cut it (it would be silently truncated)"
            )
        return samples

    def extract_features(self, clips: list[Float[Any, " samples"]]) -> dict[str, Tensor]:
        """Log-mel features padded to the model's length, and the mask of frames with audio."""
        made = self.feature_extractor(
            clips,
            sampling_rate=self.cfg.sampling_rate,
            padding="max_length",
            max_length=self.cfg.n_frames * 160,
            truncation=False,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {
            "features": made["input_features"].to(self.device),
            "mask": made["attention_mask"].bool().to(self.device),
        }

    def need_tokenizer(self, purpose: str) -> Any:
        if self.tokenizer is None:
            raise TokenError(
                f"{purpose} needs a tokenizer, and this model was loaded without one: use a "
                "directory with tokenizer files, or from_hf(hf_model, processor=...)"
            )
        return self.tokenizer

    def to_single_token(self, text: str | int) -> int:
        """The id of a word that is one token.

        Raises:
            TokenError: if the word is none or several tokens, or unknown to the tokenizer.
        """
        if isinstance(text, int):
            return text
        tokenizer = self.need_tokenizer(f"the token of {text!r}")
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            pieces = tokenizer.convert_ids_to_tokens(ids)
            raise TokenError(
                f"{text!r} is {len(ids)} tokens ({pieces}), not one: use a word that is one token "
                "(mind the leading space), a token id, or metrics.sequence_log_prob"
            )
        if ids[0] == tokenizer.unk_token_id:
            raise TokenError(f"{text!r} is unknown to the tokenizer")
        return ids[0]

    # ---------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(
        self,
        inputs: AudioInputs | Mapping[str, Any],
        max_new_tokens: int = 64,
        return_type: Literal["text", "tokens"] = "text",
    ) -> list[str] | Int[Tensor, "b t"]:
        """Continue the prompts greedily, with a key-value cache.

        Hooks that are attached run at every step: the first call holds the whole prompt, each
        later one a single new position.

        Args:
            max_new_tokens: how many tokens to add at most.
            return_type: "text" gives the new text of each row; "tokens" prompt and continuation
                ids, padded after the end.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        inputs = self.as_inputs(inputs)
        if return_type == "text":
            self.need_tokenizer("text")
        tokens = self._continue(inputs, max_new_tokens)
        if return_type == "tokens":
            return tokens
        new = tokens[:, inputs.tokens.shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _continue(self, inputs: AudioInputs, max_new_tokens: int) -> Int[Tensor, "b t"]:
        past, encoded = KVCache(), self.encode(inputs)
        ends = torch.tensor(self._end_tokens(), dtype=torch.long, device=inputs.device)
        done = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
        tokens = inputs.tokens
        step = inputs
        for index in range(max_new_tokens):
            hidden = self.decode(step, encoded, past=past)
            logits = self.hook_logits(self.decoder.unembed(hidden))[:, -1]
            new = self._allowed(logits, is_first=index == 0).argmax(-1)
            new = torch.where(done, self._pad_token(), new)
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            done = done | torch.isin(new, ends)
            if done.all():
                break
            step = self._next_step(step, new)
        return tokens

    def _next_step(self, step: AudioInputs, new: Int[Tensor, " b"]) -> AudioInputs:
        """Inputs of the next decoding step: one new token per row, masks grown by one."""
        mask, positions = step.attention_mask, step.position_ids
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return AudioInputs(
            features=step.features,
            tokens=new[:, None],
            clips_per_row=step.clips_per_row,
            attention_mask=mask,
            position_ids=None if positions is None else positions[:, -1:] + 1,
        )

    def _end_tokens(self) -> list[int]:
        ends = getattr(self.generation_config, "eos_token_id", None)
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def _pad_token(self) -> int:
        pad = getattr(self.generation_config, "pad_token_id", None)
        return pad if pad is not None else (self._end_tokens() or [0])[0]

    def _allowed(self, logits: Float[Tensor, "b v"], is_first: bool) -> Float[Tensor, "b v"]:
        """Logits with the tokens the family forbids at this step set to -inf: none here."""
        return logits
