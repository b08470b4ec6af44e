"""The sweeps that are compared, and the random models they run on.

Every method gets the same `Task`: one Hugging Face model with random weights, audio_lens on the
same weights, a clean and a corrupted input, and the cells to patch.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from audio_lens import HookedAudioTransformer, metrics

Key = TypeVar("Key", bound=Hashable)
ANSWER, AGAINST = 17, 42  # token ids whose logits are compared
PROMPT_TOKENS = 4  # of Whisper's decoder
TEXT_BEFORE, TEXT_BEHIND = 10, 20  # text tokens around the audio of an audio LLM
AUDIO_TOKEN = 3
FIRST_WORD = 50
MEL_PER_FRAME, FRAMES_PER_TOKEN = 2, 2


# -------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class WhisperShape:
    """A Whisper, or the ear of an audio LLM."""

    layers: int
    width: int
    heads: int
    frames: int = 1500
    n_mels: int = 80
    vocabulary: int = 51865


@dataclass(frozen=True)
class LLMShape:
    """An audio LLM of Qwen2-Audio's kind.

    The vocabularies of the small ones are small: peers unembed every position, and a real
    vocabulary on a small model would count against them only.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    ear: WhisperShape
    vocabulary: int = 1000

    @property
    def audio_tokens(self) -> int:
        return self.ear.frames // FRAMES_PER_TOKEN


WHISPERS = {
    "micro": WhisperShape(2, 32, 2, frames=50, n_mels=16, vocabulary=100),
    "quick": WhisperShape(3, 256, 4, frames=500, vocabulary=1000),
    "tiny": WhisperShape(4, 384, 6),
    "base": WhisperShape(6, 512, 8),
    "small": WhisperShape(12, 768, 12),
    "medium": WhisperShape(24, 1024, 16),
    "large-v3": WhisperShape(32, 1280, 20, n_mels=128, vocabulary=51866),
}
LLMS = {
    "micro": LLMShape(3, 48, 4, 2, 64, WhisperShape(2, 32, 2, frames=24, n_mels=16), 100),
    "quick": LLMShape(4, 256, 4, 2, 1024, WhisperShape(2, 128, 2, frames=80, n_mels=16)),
    "base": LLMShape(12, 768, 12, 4, 3072, WhisperShape(6, 512, 8, frames=240)),
    "1b": LLMShape(24, 1536, 12, 4, 8192, WhisperShape(12, 768, 12)),
    "7b": LLMShape(32, 4096, 32, 32, 11008, WHISPERS["large-v3"], 156032),
}


def whisper(
    shape: WhisperShape, has_encoder: bool = True
) -> transformers.WhisperForConditionalGeneration:
    """A Whisper of this shape, or one whose encoder has no blocks."""
    config = transformers.WhisperConfig(
        vocab_size=shape.vocabulary,
        num_mel_bins=shape.n_mels,
        d_model=shape.width,
        encoder_layers=shape.layers if has_encoder else 0,
        decoder_layers=shape.layers,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=4 * shape.width,
        decoder_ffn_dim=4 * shape.width,
        max_source_positions=shape.frames,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 2),
        decoder_start_token_id=1,
    )
    config._attn_implementation = "sdpa"
    return transformers.WhisperForConditionalGeneration(config)


def audio_llm(shape: LLMShape) -> transformers.Qwen2AudioForConditionalGeneration:
    """An audio LLM of this shape."""
    ear = transformers.Qwen2AudioEncoderConfig(
        num_mel_bins=shape.ear.n_mels,
        encoder_layers=shape.ear.layers,
        encoder_attention_heads=shape.ear.heads,
        encoder_ffn_dim=4 * shape.ear.width,
        d_model=shape.ear.width,
        max_source_positions=shape.ear.frames,
    )
    text = transformers.Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 2),
    )
    config = transformers.Qwen2AudioConfig(
        audio_config=ear.to_dict(), text_config=text.to_dict(), audio_token_index=AUDIO_TOKEN
    )
    model = transformers.Qwen2AudioForConditionalGeneration(config)
    model.set_attn_implementation("sdpa")
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Weights that keep activations near one and attention uneven, so that patches have effects."""
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.normal_(1.0, 0.1)
        elif parameter.ndim == 1:
            parameter.normal_(0.0, 0.1)
        else:
            gain = 2.0 if "q_proj" in name else 1.0
            parameter.normal_(0.0, gain / math.sqrt(parameter[0].numel()))
    return model.eval().requires_grad_(False)


def twin(model: nn.Module) -> nn.Module:
    """Another model object on the same weights, for libraries that change the one they wrap."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


# -------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """A kind of sweep.

    Attributes:
        kind: "whisper" or "llm".
        site, axes: as `audio_lens.patching.sweep` takes them.
        windows: how many windows of time, "position" for single positions, None for no windows.
        stack: where the blocks are in the Hugging Face model.
        patched: the module inside a block whose input is the site; empty for the block itself.
        rounds: how many count as one, where a sweep is short beside the unpatched runs.
        has_encoder: False takes the encoder's blocks out, which lets cells be told from the
            unpatched runs.
        most: so many times the roofline at its own shapes a cell may take.
    """

    kind: str
    site: str
    axes: tuple[str, ...]
    windows: int | str | None
    stack: str
    patched: str = ""
    rounds: int = 1
    has_encoder: bool = True
    most: float = 1.15


ROWS = {
    "encoder-resid": Row(
        "whisper", "encoder.resid_pre", ("layer", "time"), 25, "model.encoder.layers"
    ),
    "encoder-heads": Row(
        "whisper",
        "encoder.attn.z",
        ("layer", "head", "time"),
        4,
        "model.encoder.layers",
        "self_attn.out_proj",
    ),
    "cross-heads": Row(
        "whisper",
        "decoder.cross_attn.z",
        ("layer", "head"),
        None,
        "model.decoder.layers",
        "encoder_attn.out_proj",
        rounds=5,
        most=1.5,
    ),
    "cross-cells": Row(
        "whisper",
        "decoder.cross_attn.z",
        ("layer", "head"),
        None,
        "model.decoder.layers",
        "encoder_attn.out_proj",
        rounds=5,
        has_encoder=False,
        most=1.5,
    ),
    "lm-resid": Row(
        "llm",
        "decoder.resid_pre",
        ("layer", "time"),
        "position",
        "model.language_model.layers",
        most=1.1,
    ),
    "lm-heads": Row(
        "llm",
        "decoder.attn.z",
        ("layer", "head", "time"),
        10,
        "model.language_model.layers",
        "self_attn.o_proj",
        most=1.1,
    ),
}


@dataclass(frozen=True)
class Cell:
    """One patch: a block, a head (None: all) and the positions ``start`` to ``stop``."""

    layer: int
    head: int | None
    start: int
    stop: int


@dataclass(frozen=True)
class Task:
    """One sweep, for every method the same."""

    row: Row
    size: str
    hf_model: nn.Module
    model: HookedAudioTransformer
    clean: dict[str, Tensor]
    corrupted: dict[str, Tensor]
    windows: float | str | None
    cells: list[Cell]

    @property
    def part(self) -> str:
        return self.row.site.partition(".")[0]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def layers(self) -> range:
        return range(self.model.cfg.parts[self.part].n_layers)

    @property
    def metric(self) -> metrics.Metric:
        return metrics.logit_diff(ANSWER, AGAINST)

    def block_path(self, layer: int) -> str:
        """Path of a block in the Hugging Face model."""
        return f"{self.row.stack}.{layer}"

    def path(self, layer: int) -> str:
        """Path of the module in the Hugging Face model whose input is patched."""
        return ".".join(filter(None, (self.block_path(layer), self.row.patched)))

    def columns(self, cell: Cell) -> slice:
        """The columns of that input that belong to the cell: all, or those of its head."""
        if cell.head is None:
            return slice(None)
        width = self.model.cfg.parts[self.part].d_head
        return slice(cell.head * width, (cell.head + 1) * width)

    def patched(self, x: Tensor, cell: Cell, source: dict[int, Tensor]) -> Tensor:
        """The input of the patched module (``b t d``), with the cell taken from the source run."""
        place = (slice(None), slice(cell.start, cell.stop), self.columns(cell))
        x = x.clone()
        x[place] = source[cell.layer][place]
        return x

    # ---------------------------------------------------------------- running Hugging Face

    def whole_call(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Keywords of a forward of the Hugging Face model from the features on."""
        return {**inputs, "use_cache": False}

    def call_behind_encoder(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Keywords of a forward that starts behind the encoder, which runs once, here."""
        if self.row.kind == "whisper":
            heard = self.hf_model.model.encoder(inputs["input_features"]).last_hidden_state
            return {
                "decoder_input_ids": inputs["decoder_input_ids"],
                "encoder_outputs": BaseModelOutput(last_hidden_state=heard),
                "use_cache": False,
            }
        return {"inputs_embeds": self.merged(inputs), "use_cache": False}

    def merged(self, inputs: dict[str, Tensor]) -> Tensor:
        """Token embeddings of an audio LLM with the audio in its place, ``b t d``."""
        inner = self.hf_model.model
        embeds = inner.get_input_embeddings()(inputs["input_ids"])
        heard = inner.audio_tower(inputs["input_features"]).last_hidden_state
        is_audio = (inputs["input_ids"] == AUDIO_TOKEN)[..., None]
        return embeds.masked_scatter(is_audio, inner.multi_modal_projector(heard))

    def inputs_of(self, paths: Mapping[Key, str], call: dict[str, Any]) -> dict[Key, Tensor]:
        """What enters the modules at these paths in one forward, by the names they are given."""
        found: dict[Key, Tensor] = {}

        def keeper(key: Key) -> Any:
            return lambda module, args: found.__setitem__(key, args[0])

        handles = [
            self.hf_model.get_submodule(path).register_forward_pre_hook(keeper(key))
            for key, path in paths.items()
        ]
        try:
            self.hf_model(**call)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def source(self) -> dict[int, Tensor]:
        """The clean run's input of the patched module, by layer."""
        paths = {layer: self.path(layer) for layer in self.layers}
        return self.inputs_of(paths, self.whole_call(self.clean))

    @staticmethod
    def difference(logits: Tensor) -> float:
        """The metric by hand, of logits ``1 t v``."""
        return float(logits[0, -1, ANSWER] - logits[0, -1, AGAINST])


def make_task(
    name: str,
    shape: WhisperShape | LLMShape,
    size: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    windows: int | None = None,
) -> Task:
    """The task of a row on a model of this shape; ``windows`` overrides how many."""
    row = ROWS[name]
    torch.manual_seed(0)
    with torch.device(device):
        is_whisper = row.kind == "whisper"
        built = whisper(shape, row.has_encoder) if is_whisper else audio_llm(shape)
        hf_model = randomise(built.to(dtype))
    model = HookedAudioTransformer.from_hf(hf_model)
    draw = _whisper_inputs if row.kind == "whisper" else _llm_inputs
    clean = draw(shape)
    corrupted = {**clean, "input_features": torch.randn(clean["input_features"].shape)}
    clean, corrupted = (_placed(inputs, device, dtype) for inputs in (clean, corrupted))
    timeline, part = model.timeline(clean), row.site.partition(".")[0]
    count = row.windows if windows is None or row.windows is None else windows
    width = count if not isinstance(count, int) else timeline.duration_s() / count
    if width is None:
        places = [(0, clean["decoder_input_ids"].shape[1])]
    elif width == "position":
        places = [(t, t + 1) for t in range(*timeline.audio_span.indices(10**9))]
    else:
        spans = timeline.windows(part, width)
        found = [timeline.positions(part, span) for span in spans]
        places = [(where.start, where.stop) for where in found]
    return Task(
        row, size, hf_model, model, clean, corrupted, width, list(_cells(row, model, places))
    )


def _cells(row: Row, model: HookedAudioTransformer, places: list[tuple[int, int]]) -> Iterator:
    """Cells in the order of a sweep's values: layer, head, window."""
    cfg = model.cfg.parts[row.site.partition(".")[0]]
    heads = range(cfg.n_heads) if "head" in row.axes else [None]
    for layer, head, (start, stop) in itertools.product(range(cfg.n_layers), heads, places):
        yield Cell(layer, head, start, stop)


def _whisper_inputs(shape: WhisperShape) -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(1, shape.n_mels, MEL_PER_FRAME * shape.frames),
        "decoder_input_ids": torch.randint(FIRST_WORD, shape.vocabulary, (1, PROMPT_TOKENS)),
    }


def _llm_inputs(shape: LLMShape) -> dict[str, Tensor]:
    text = torch.randint(FIRST_WORD, shape.vocabulary, (1, TEXT_BEFORE + TEXT_BEHIND))
    audio = torch.full((1, shape.audio_tokens), AUDIO_TOKEN)
    n_mel = MEL_PER_FRAME * shape.ear.frames
    return {
        "input_ids": torch.cat([text[:, :TEXT_BEFORE], audio, text[:, TEXT_BEFORE:]], dim=1),
        "input_features": torch.randn(1, shape.ear.n_mels, n_mel),
        "feature_attention_mask": torch.ones(1, n_mel, dtype=torch.long),
    }


def _placed(inputs: dict[str, Tensor], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs on the device, floating-point ones in the dtype."""
    return {
        name: x.to(device, dtype if x.is_floating_point() else None) for name, x in inputs.items()
    }
