"""`HookedAudioTransformer`: what every family shares."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from audio_lens.arguments import suggest
from audio_lens.audio import Rates
from audio_lens.cache import AudioCache
from audio_lens.hooks import HookPoint
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models import registry
from audio_lens.models.config import AudioConfig
from audio_lens.models.layers import Context, KVCache, needed, padding_mask
from audio_lens.models.loading.checkpoints import load_pretrained, take_over
from audio_lens.models.loading.lora import Adaptable
from audio_lens.models.loading.placement import Devices, Placed, moved
from audio_lens.models.mixins.decoding import GreedyDecoding
from audio_lens.models.mixins.hearing import Hearing
from audio_lens.models.mixins.shown import Shown
from audio_lens.models.mixins.vocabulary import Vocabulary
from audio_lens.models.mixins.writing import ReturnType, Writing
from audio_lens.models.part import Part
from audio_lens.models.registry import Family

Own = TypeVar("Own", bound="HookedAudioTransformer")
Address = tuple[str, int]  # a part and the index of one of its blocks
Entry = tuple[Tensor, Address]  # a residual stream and the block it enters


class AudioPlaces(NamedTuple):
    """Where audio enters a language model: one entry per audio position, in the order of the merge.

    Position ``index`` of row ``clip`` of the connector's output (a clip, or a segment of one)
    stands at ``position`` of prompt ``row``.
    """

    row: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    clip: Int[Tensor, " n"]
    index: Int[Tensor, " n"]


class HookedAudioTransformer(
    GreedyDecoding, Hearing, Writing, Vocabulary, Shown, Adaptable, Placed, Family, ABC
):
    """A model that listens, with a named `HookPoint` on everything it computes.

    Use `from_pretrained` or `from_hf`; subclasses are one per family and are chosen for you.
    """

    takes_question: ClassVar[bool] = False  # whether it answers questions about what it hears

    def __init__(self, cfg: AudioConfig):
        super().__init__(cfg)
        if cfg.output_kind is not None:
            self.hook_logits = HookPoint()

    # ---------------------------------------------------------------- loading

    @classmethod
    def from_pretrained(
        cls: type[Own],
        name: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        devices: Devices | None = None,
        adapter: str | Path | None = None,
        merge: bool = False,
    ) -> Own:
        """Load a checkpoint.

        The class that implements it is found; a subclass loads checkpoints of its own kind only.

        Args:
            name: a hub id, a local Hugging Face directory, or "embedded" for the small trained
                model that ships with the package; or a directory with a LoRA adapter of peft that
                says what its base is.
            dtype: of the weights; None keeps the checkpoint's.
            device: where to put the model; None is the CPU.
            devices: several devices to split it over, as `place` takes them.
            adapter: a directory with a LoRA adapter of peft.
            merge: add the adapter to the weights; otherwise it stays live, with hooks on its
                low-rank path (``...q_proj.hook_lora_A``) and a switch (``model.lora.enabled``).

        Raises:
            LoadingError: unsupported architecture, missing, unexpected, quantised, corrupt, NaN or
                infinite weights, a checkpoint without safetensors or with code of its own, an
                adapter that does not fit, or no such directory.
            HubError: a name that is no folder here and that the hub does not give.
            PlacementError: devices that are not there, or a part without one.
        """
        if not isinstance(name, (str, Path)):
            raise InputError(f"a checkpoint is a hub id or a directory, got {name!r}")
        return load_pretrained(name, dtype, device, devices, adapter, merge, kind=cls)

    @classmethod
    def from_hf(
        cls: type[Own], hf_model: nn.Module, processor: Any = None, merge: bool = False
    ) -> Own:
        """Take over an in-memory Hugging Face model; the weights are shared, not copied.

        A model that carries a LoRA adapter of peft keeps it live, or with ``merge`` added to
        copies of the weights it changes.

        Raises:
            LoadingError: unsupported architecture, weights that do not map one to one, or an
                adapter that is not implemented.
        """
        if not isinstance(hf_model, nn.Module):
            raise InputError(f"from_hf takes a Hugging Face model, got {type(hf_model).__name__}")
        return take_over(hf_model, processor, merge, kind=cls)

    @staticmethod
    def compose(
        encoder: Any, connector: nn.Module, decoder: Any, merge: Any = "<|audio|>", **options: Any
    ) -> HookedAudioTransformer:
        """An audio LLM put together from parts, with hooks, time and sweeps like any other.

        Args:
            encoder: a hub id or local directory, a Hugging Face model or a hooked model, whose
                encoder is taken; or a mapping from names to these, whose first is the encoder and
                whose others hear the same audio beside it.
            connector: a `Connector` from the encoder's width to the language model's.
            decoder: a hub id or local directory of a causal language model, such a Hugging Face
                model, or a `LanguageModel`.
            merge: the placeholder of a clip: its text in prompts, its token id (which may lie
                outside the vocabulary), or a `Placeholder` with both.
            options: see `audio_lens.models.compose.assemble.compose`.

        Raises:
            LoadingError: parts that are not implemented.
            CompositionError: parts that do not fit together.
        """
        composed = registry.compose(encoder, connector, decoder, merge, **options)
        return cast(HookedAudioTransformer, composed)

    # ---------------------------------------------------------------- what a family defines

    def encoder_context(self, inputs: AudioInputs) -> Context:
        """What the encoder's blocks need beside the residual stream: nothing is masked, here."""
        return Context()

    def send(self, resid: Float[Tensor, "segments frames d"]) -> Tensor:
        """From the encoder's last residual stream to what the decoder receives."""
        return self.encoder.finish(resid)

    def send_rows(
        self,
        resid: Float[Tensor, "rows frames d"],
        inputs: AudioInputs,
        segment: Int[Tensor, " rows"] | None = None,
    ) -> Tensor:
        """`send` of some segments of the inputs; of all of them, in order, where none are named.

        Families whose connector depends on where in its clip a segment lies define this too.
        """
        return self.send(resid)

    def send_heard(
        self,
        heard: Mapping[str, Tensor],
        inputs: AudioInputs,
        segment: Int[Tensor, " rows"] | None = None,
    ) -> Tensor:
        """`send_rows` of what all ears gave, so that none of them runs again.

        Args:
            heard: by part; of the encoder the streams that it sends, of ears beside it the output.
        """
        return self.send_rows(heard["encoder"], inputs, segment)

    @property
    def sent_from(self) -> tuple[int, ...]:
        """The blocks of the encoder whose streams are sent on, side by side: the last, here."""
        return (self.cfg.need_encoder.n_layers - 1,)

    def heard_by(
        self, part: str, inputs: AudioInputs
    ) -> tuple[HookedAudioTransformer, AudioInputs]:
        """The model whose encoder is a part that hears, and the inputs as that one takes them."""
        return self, inputs

    def decoder_context(
        self, inputs: AudioInputs, encoded: Tensor | None, past: KVCache | None = None
    ) -> Context:
        """What the decoder's blocks need beside the residual stream: masks, rotary positions."""
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
        """The residual stream entering the decoder's block 0."""
        raise NotImplementedError(f"{self.cfg.family} has no decoder")

    def enter_encoder(self, inputs: AudioInputs) -> Float[Tensor, "segments frames d"]:
        """The residual stream entering the encoder's block 0."""
        return self.encoder.embed(inputs.features)

    def encoder_length(self, inputs: AudioInputs) -> int:
        """Positions of every row of the encoder, padding included."""
        return self.cfg.need_encoder.need_n_ctx

    def encoder_reach(self, inputs: AudioInputs) -> int:
        """How many of the encoder's positions can matter to anything: all of them, here."""
        return self.encoder_length(inputs)

    def whole_because(self, place: str, streams: Set[str] | None) -> str:
        """Why sweeps of a place run whole forwards with hooks; empty where they need not.

        Args:
            place: ``part.activation``.
            streams: those that are read; None for all.
        """
        if beside := self.written_beside(streams):
            return f"its output is also that of the {' and '.join(beside)}"
        return ""

    def audio_places(self, inputs: AudioInputs) -> AudioPlaces:
        """Where each connector position enters the decoder's residual stream (audio LLMs)."""
        raise NotImplementedError(f"{self.cfg.family} reads its audio by cross-attention")

    def enter_audio(
        self,
        audio: Float[Tensor, "m d"],
        inputs: AudioInputs,
        prompt: Int[Tensor, " m"],
        position: Int[Tensor, " m"],
    ) -> Float[Tensor, "m d"]:
        """The residual stream that audio becomes at positions of prompts (audio LLMs)."""
        raise NotImplementedError(f"{self.cfg.family} reads its audio by cross-attention")

    @abstractmethod
    def prepare(
        self, audio: Any, text: Any = None, sampling_rate: Rates = None, **options: Any
    ) -> AudioInputs:
        """Inputs from audio and text."""

    # ---------------------------------------------------------------- forward

    def hear(
        self, inputs: AudioInputs, resid: Tensor | None, start: int, stop: int | None
    ) -> Tensor | None:
        """`encode` of inputs that hold audio, row by row as they are."""
        self.check_features(inputs.features)
        inputs = moved(inputs, self.device_of("encoder"))
        resid = self.enter_encoder(inputs) if resid is None else resid
        until = self.cfg.need_encoder.n_layers if stop is None else stop
        resid = self.encoder.run_blocks(resid, self.encoder_context(inputs), start, until)
        return self.send_rows(resid, inputs).to(self.device) if stop is None else resid

    def decode(
        self,
        inputs: AudioInputs,
        encoded: Tensor | None,
        resid: Float[Tensor, "b t d"] | None = None,
        start: int = 0,
        stop: int | None = None,
        past: KVCache | None = None,
    ) -> Float[Tensor, "b t states"]:
        """The final hidden states; with ``stop``, the residual stream entering that block."""
        with self.running(inputs, past):
            return self._decode(inputs, encoded, resid, start, stop, past)

    def _decode(
        self,
        inputs: AudioInputs,
        encoded: Tensor | None,
        resid: Tensor | None,
        start: int,
        stop: int | None,
        past: KVCache | None,
    ) -> Float[Tensor, "b t d"]:
        resid = self.enter_decoder(inputs, encoded, past) if resid is None else resid
        context = self.decoder_context(inputs, encoded, past)
        until = self.cfg.need_decoder.n_layers if stop is None else stop
        resid = self.decoder.run_blocks(resid, context, start, until)
        if past is not None:
            past.length += resid.shape[1]
        return resid if stop is not None else self.decoder.finish(resid)

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
            past: keys and values of earlier positions, extended by this call; once it holds some,
                the encoder does not run.

        Raises:
            InputError: inputs of the wrong form, a start without its residual stream, or one (or
                an ``encoder_out``) whose shape these inputs do not have.
        """
        if return_type not in get_args(ReturnType):
            raise InputError(f"return_type must be logits, loss, both or None, got {return_type!r}")
        start, stop = self._address(start_at_layer), self._address(stop_at_layer)
        is_heard = encoder_out is not None or (past is not None and past.length > 0)
        self._check_route(start, stop, is_heard)
        entry = self._entry(x, start)
        if x is not None and entry is None and inputs is not None:
            raise InputError("inputs were given twice: inputs= goes with start_at_layer only")
        given = inputs if x is None or entry is not None else x
        is_alone = not mapping and (given is None or (isinstance(given, Mapping) and not given))
        if entry is not None and is_alone:
            batch = self._context_free(*entry, encoder_out, return_type)
        else:
            batch = self.as_inputs(given, mapping)
        self._check_fits(batch, entry, encoder_out)
        resid = None if entry is None else entry[0]
        with self.running(batch, past):
            return self._run(batch, resid, start, stop, encoder_out, past, return_type)

    def _run(
        self,
        batch: AudioInputs,
        resid: Tensor | None,
        start: Address | None,
        stop: Address | None,
        encoder_out: Tensor | None,
        past: KVCache | None,
        return_type: ReturnType,
    ) -> Any:
        """A forward of checked arguments."""
        is_heard = encoder_out is not None or (past is not None and past.length > 0)
        if stop and stop[0] == "encoder":
            return self.encode(batch, resid, start[1] if start else 0, stop[1])
        if self.cfg.decoder is None:
            hidden = needed(
                self.encode(batch, resid, start[1] if start else 0),
                f"{self.cfg.family} has no encoder and no decoder",
            )
            return self._output(hidden, batch, return_type)
        if not is_heard and (start is None or start[0] == "encoder"):
            encoder_out, resid = self.encode(batch, resid, start[1] if start else 0), None
        elif not is_heard and self.decoder_needs_encoder:
            encoder_out = self.encode(batch)
        begin = start[1] if start and start[0] == "decoder" else 0
        hidden = self.decode(batch, encoder_out, resid, begin, stop[1] if stop else None, past)
        return hidden if stop else self._output(hidden, batch, return_type)

    def _address(self, layer: int | str | None) -> Address | None:
        """``3`` or ``"encoder.3"`` as part and block index."""
        if layer is None:
            return None
        part, _, index = str(layer).rpartition(".")
        part = part or self.output_part
        parts = [name for name in ("encoder", "decoder") if name in self.cfg.parts]
        if part not in parts or not index.removeprefix("-").isdigit():
            raise InputError(
                f"a layer is an int or 'part.int' with a part of {', '.join(parts)}; got {layer!r}"
            )
        n_layers = self.cfg.parts[part].n_layers
        if not -n_layers <= int(index) <= n_layers:
            raise InputError(f"the {part} has {n_layers} layers, so there is no layer {index}")
        return part, int(index) + (n_layers if int(index) < 0 else 0)

    def _check_route(self, start: Address | None, stop: Address | None, is_heard: bool) -> None:
        """Raise unless the model can start, stop and leave out the encoder in this way."""
        order = list(self.cfg.parts)
        if start and stop and (order.index(stop[0]), stop[1]) < (order.index(start[0]), start[1]):
            raise InputError(
                f"stop_at_layer ({stop[0]} {stop[1]}) lies before start_at_layer "
                f"({start[0]} {start[1]})"
            )
        if is_heard and self.cfg.decoder is None:
            raise InputError(f"{self.cfg.family} has no decoder: encoder_out and past go nowhere")
        if is_heard and "encoder" in {place[0] for place in (start, stop) if place}:
            raise InputError(
                "encoder_out or a filled cache stands for the encoder: start and stop behind it"
            )

    def _entry(self, x: object, start: Address | None) -> Entry | None:
        """The residual stream that was given, and where it enters; None where the model starts."""
        resid = x if isinstance(x, torch.Tensor) and x.is_floating_point() else None
        if resid is not None and start is not None:
            return resid, start
        if resid is not None or start is not None:
            raise InputError(
                "start_at_layer takes the residual stream entering that layer as first argument "
                "(b t d), and inputs= for the prompts: model(resid, start_at_layer=3, "
                "inputs=inputs)"
            )
        return None

    def _context_free(
        self, resid: Tensor, start: Address, encoder_out: Any, return_type: ReturnType
    ) -> AudioInputs:
        """Inputs for a residual stream given alone: one unpadded row of decoder positions each."""
        if start[0] == "encoder" or (self.decoder_needs_encoder and encoder_out is None):
            raise InputError(f"starting at {start[0]} layer {start[1]} also needs inputs=")
        if return_type in ("loss", "both"):
            raise InputError("the loss needs the tokens: pass inputs= beside the residual stream")
        tokens = torch.zeros(resid.shape[:2], dtype=torch.long, device=resid.device)
        return AudioInputs(self.no_features(), tokens, clips_per_row=(0,) * len(resid))

    def _check_fits(
        self, inputs: AudioInputs, entry: Entry | None, encoder_out: Tensor | None
    ) -> None:
        """Raise unless the residual stream and the encoder's output belong to these inputs."""
        n_clips = len(inputs.features)
        if not n_clips and (entry is not None or self.decoder_needs_encoder):
            n_clips = len(inputs)  # of a residual stream given alone
        if encoder_out is not None:
            self.check_encoded(inputs, encoder_out, n_clips)
        if entry is None:
            return
        resid, start = entry
        cfg = self.cfg.parts[start[0]]
        is_decoder = start[0] == "decoder"
        rows = inputs.shape if is_decoder else (n_clips, self.encoder_length(inputs))
        if tuple(resid.shape) != (*rows, cfg.d_model):
            raise InputError(
                f"the residual stream entering {start[0]} layer {start[1]} is "
                f"{(*rows, cfg.d_model)} for these inputs; got {tuple(resid.shape)}"
            )

    def check_encoded(
        self, inputs: AudioInputs, encoded: Tensor, n_clips: int | None = None
    ) -> None:
        """Raise unless what an encoder gave is of these inputs.

        Args:
            n_clips: how many clips there are, where the inputs do not say.

        Raises:
            InputError: a model without an encoder, other clips, or another shape.
        """
        if self.cfg.encoder is None:
            raise InputError(f"{self.cfg.family} has no encoder: encoder_out goes nowhere")
        n_clips = len(inputs.features) if n_clips is None else n_clips
        if len(encoded) != n_clips:
            raise InputError(f"encoder_out is of {len(encoded)} clips, the inputs of {n_clips}")
        width = self.cfg.need_decoder.d_model
        least = self.least_encoded(inputs) if len(inputs.features) else 1
        if encoded.ndim != 3 or encoded.shape[2] != width or encoded.shape[1] < least:
            raise InputError(
                f"encoder_out is (clips, {least} or more positions, {width}) for these inputs, got "
                f"{tuple(encoded.shape)}: take what model.encode(inputs) gives"
            )

    def least_encoded(self, inputs: AudioInputs) -> int:
        """Positions of a clip that the decoder receives at least."""
        return self.encoder_reach(inputs)

    @property
    def device(self) -> torch.device:
        """Where inputs go and the output comes from."""
        return self.device_of(self.output_part)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def decoder_mask(
        self, inputs: AudioInputs, past: KVCache | None
    ) -> Bool[Tensor, "b 1 t seen"] | None:
        """What each decoder position may attend to; None where causality alone decides."""
        mask, n_new = inputs.attention_mask, inputs.tokens.shape[1]
        earlier = past.length if past is not None else 0
        if mask is not None and not mask.all():
            return padding_mask(mask.bool(), n_new, causal=True)
        if earlier and n_new > 1:
            everything = inputs.tokens.new_ones(len(inputs), earlier + n_new, dtype=torch.bool)
            return padding_mask(everything, n_new, causal=True)
        return None

    # ---------------------------------------------------------------- parts and caches

    @functools.cached_property
    def _parts(self) -> dict[str, Part[Any]]:
        return {name: Part(self, name) for name in self.cfg.parts}

    def part(self, name: str) -> Part[Any]:
        """A part as a model of its own, with TransformerLens-local names and configuration.

        Raises:
            ValueError: if the model has no such part.
        """
        if name not in self._parts:
            raise InputError(f"no part named {name!r}; {suggest(name, self._parts)}")
        return self._parts[name]

    def _as_cache(self, cache: dict[str, Tensor], has_batch_dim: bool) -> AudioCache:
        return AudioCache(cache, self._parts, self.output_part, has_batch_dim)
