"""One family of models as the generic tests see it, and what its entries are built from.

Models are tiny and random. Hugging Face initialises biases to 0 and norms to 1, which hides swapped
norms and lost biases: `randomise` makes every parameter random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from audio_lens import AudioInputs, HookedAudioTransformer

PAD, START, END = 0, 1, 2
FIRST_WORD, AUDIO_TOKEN = 5, 90  # ids between them are words; vocabularies hold 100
TINY_LANGUAGE_MODEL = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}
"""Of every text config of the qwen and llama kind."""


def decoder_attended(name: str, tensor: Tensor, inputs: AudioInputs) -> Tensor:
    """What of an activation is compared: the decoder at attended tokens, all else whole."""
    if not (name.startswith("decoder") or name == "hook_logits") or not inputs.tokens.shape[1]:
        return tensor
    by_position = tensor.transpose(1, 2) if name.endswith("hook_pattern") else tensor
    return by_position[inputs.attended]


@dataclass(frozen=True)
class Family:
    """An entry of the registry; the tests of all families run over it.

    Attributes:
        name: one word; several entries may be of one of our families ("hubert", "wavlm").
        build: ``build(seed=0, dtype=torch.float32, attn="eager", **overrides)``: a random Hugging
            Face model, every parameter by `randomise`, in eval mode.
        batch: ``batch(seed=0, dtype=torch.float32, **options)``: what the processor would return.
        hooked: our model of what ``build`` made, sharing its weights.
        reference: ``reference(hf, batch)``: Hugging Face's activations under our hook names: the
            logits (or the output of a bare encoder), resid_pre of every block, hook_out of every
            part, and every pattern (not with fused attention); see `run_hf`.
        models: parity cases by shape of model: name -> overrides of ``build``.
        model_batches: options of ``batch`` that go with a model of that name.
        batches: parity cases by inputs: name -> options of ``batch``.
        no_float64: batches that Hugging Face itself does not do in float64 (NaN, or a softmax that
            is float32); `Entry.not_float64` of the catalogue says what is measured of them.
        bfloat16: batches compared in bfloat16; none named: the first.
        absent: pieces of hook names that have no equal in Hugging Face (nothing to compare).
        mask_of: ``mask_of(name, tensor, inputs)``: what of the activation is compared.
        float16_biases: biases of the encoder's first two blocks that make the stream overflow
            float16 when 60,000 is added; None where the encoder does not clamp.
        draw: overrides of ``build`` and options of ``batch``, drawn by hypothesis.
        clips: inputs of one prompt per waveform (16 kHz unless ``cfg.sampling_rate`` differs)
            through the real feature extractor, with random tokens about the placeholders.
        durations: batches of clips for the time map, in seconds; made odd in samples.
        impulse_model: overrides of ``build`` for the time map, such as a norm that is local.
        stem: what enters the encoder's blocks; a position of it reads exactly the feature steps
            centred within ``reach_s`` seconds of it, and one of the connector those within
            ``connector_reach_s``.
        step_s, first_step_s: distance of the feature steps, centre of the first (0.01 and 0 for
            centred mel frames; 1/16000 and 0 for waveforms; 0.01 and 0.0125 for Kaldi frames).
        window_s: half the samples that one feature step reads, in seconds (0 for waveforms).
        steps_dim: axis of the feature steps.
        segment_s: length of the encoder's rows that clips are cut into; None: not cut.
        chunk_s: convolutions do not reach over multiples of this; None: they reach anywhere.
        is_local: a click of the waveform changes no far feature as long as a louder one is there
            (False where waveforms are divided by their deviation and the like).
    """

    name: str
    build: Callable[..., nn.Module]
    batch: Callable[..., dict[str, Any]]
    reference: Callable[[nn.Module, dict[str, Any]], dict[str, Tensor]]
    hooked: Callable[[nn.Module], HookedAudioTransformer] = HookedAudioTransformer.from_hf
    models: Mapping[str, dict] = field(default_factory=lambda: {"tiny": {}})
    model_batches: Mapping[str, dict] = field(default_factory=dict)
    batches: Mapping[str, dict] = field(default_factory=lambda: {"default": {}})
    no_float64: Sequence[str] = ()
    bfloat16: Sequence[str] = ()
    absent: Sequence[str] = ()
    mask_of: Callable[[str, Tensor, AudioInputs], Tensor] = decoder_attended
    float16_biases: Callable[[nn.Module], Sequence[nn.Parameter]] | None = None
    draw: Callable[[Any], tuple[dict, dict]] | None = None
    clips: Callable[[HookedAudioTransformer, list[np.ndarray]], AudioInputs] | None = None
    durations: Sequence[Sequence[float]] = ((0.75,), (2.0,), (0.6, 1.9))
    impulse_model: Mapping[str, Any] = field(default_factory=dict)
    stem: Callable[[HookedAudioTransformer, AudioInputs], Tensor] = lambda model, inputs: (
        model.enter_encoder(inputs)
    )
    reach_s: float = 0.02
    connector_reach_s: float = 0.03
    step_s: float = 0.01
    first_step_s: float = 0.0
    window_s: float = 0.0125
    steps_dim: int = -1
    segment_s: float | None = None
    chunk_s: float | None = None
    is_local: bool = True

    @property
    def is_hf(self) -> bool:
        """Whether the reference is a Hugging Face model, with checkpoints of its own."""
        return self.hooked == HookedAudioTransformer.from_hf


# -------------------------------------------------------------------------------- models


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, in place: norm gains about 1, all else about 0; ready to run."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            is_gain = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_gain else 0.15 * noise)
    return model.eval()


def ready(model: nn.Module, seed: int, dtype: torch.dtype, attn: str) -> nn.Module:
    """A Hugging Face model with random parameters and the attention that is asked for."""
    model.set_attn_implementation(attn)
    return randomise(model, seed).to(dtype)


def whisper_biases(hf: nn.Module) -> list[nn.Parameter]:
    """For `Family.float16_biases`, of audio LLMs with an ear like Whisper's."""
    return [layer.fc2.bias for layer in hf.model.audio_tower.layers[:2]]


def draw_decoder(data: st.DataObject) -> dict[str, int]:
    """Overrides of a language model: any shape, with queries that share keys and values."""
    heads = data.draw(st.sampled_from((4, 6)), "heads")
    divisors = {4: (1, 2, 4), 6: (1, 2, 3, 6)}[heads]
    return {
        "hidden_size": data.draw(st.sampled_from((24, 48)), "hidden_size"),
        "num_hidden_layers": data.draw(st.integers(1, 3), "decoder_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": data.draw(st.sampled_from(divisors), "key_value_heads"),
    }


# -------------------------------------------------------------------------------- inputs


def random_words(count: int, generator: torch.Generator) -> list[int]:
    """Token ids that are words."""
    return torch.randint(FIRST_WORD, AUDIO_TOKEN, (count,), generator=generator).tolist()


def with_clips(row: list[int], placeholders: Sequence[int], audio_token: int = AUDIO_TOKEN) -> list:
    """A word, the placeholders of each clip with a word after them, and the remaining words."""
    made, words = row[:1], iter(row[1:])
    for count in placeholders:
        made += [audio_token] * count + [next(words)]
    return made + list(words)


def padded_rows(rows: Sequence[list[int]], side: str = "right") -> tuple[Tensor, Tensor]:
    """Rows of token ids as one tensor, and the mask of what is no padding (both int64)."""
    width = max(map(len, rows))

    def pad(row: list[int], filler: int) -> list[int]:
        gap = [filler] * (width - len(row))
        return gap + row if side == "left" else row + gap

    tokens = torch.tensor([pad(row, PAD) for row in rows], dtype=torch.long)
    mask = torch.tensor([pad([1] * len(row), 0) for row in rows], dtype=torch.long)
    return tokens, mask


def length_mask(lengths: Sequence[int], width: int) -> Tensor:
    """``(len(lengths), width)`` of 1 where a row holds something and 0 where it is padded."""
    return (torch.arange(width) < torch.tensor(list(lengths))[:, None]).long()


def enclosed(row: list[int], around: tuple[int, ...]) -> list[int]:
    """The row with the first of ``around`` before each run of placeholders, the second behind."""
    if not around:
        return row
    begin, end = around
    made: list[int] = []
    for before, token, after in zip([None, *row[:-1]], row, [*row[1:], None], strict=True):
        is_audio = token == AUDIO_TOKEN
        made += [begin] * (is_audio and before != AUDIO_TOKEN) + [token]
        made += [end] * (is_audio and after != AUDIO_TOKEN)
    return made


def prompts(
    texts: Sequence[list[int]],
    placeholders: Sequence[Sequence[int]],
    padding: str,
    audio_token: int = AUDIO_TOKEN,
    around: tuple[int, ...] = (),
) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of words about clips of so many placeholders each.

    Args:
        around: the tokens before and behind the placeholders of a clip.
    """
    rows = [with_clips(*of, audio_token) for of in zip(texts, placeholders, strict=True)]
    tokens, mask = padded_rows([enclosed(row, around) for row in rows], padding)
    return {"input_ids": tokens, "attention_mask": mask}


def prompts_about(counts: Sequence[int], **options: Any) -> dict[str, Tensor]:
    """A prompt per clip that has so many placeholders; with options of `prompts`."""
    return prompts([[7, 8, 9]] * len(counts), [[count] for count in counts], "left", **options)


def clips_of(lengths: Sequence[int | Sequence[int]]) -> list[list[int]]:
    """The lengths of each prompt's clips, of which a prompt with one names just that."""
    return [[n] if isinstance(n, int) else list(n) for n in lengths]


def draw_clips(data: st.DataObject, clip: st.SearchStrategy[int]) -> dict[str, list]:
    """Options of a batch: one or two prompts about one or two clips of a drawn length each."""
    prompt = st.lists(clip, min_size=1, max_size=2)
    lengths = data.draw(st.lists(prompt, min_size=1, max_size=2), "lengths")
    return {"lengths": lengths, "words": [3 + len(clips) for clips in lengths]}


# -------------------------------------------------------------------------------- references

EVERYTHING = {"output_hidden_states": True, "output_attentions": True}
"""What Hugging Face returns besides logits, where it is asked to."""


@torch.no_grad()
def run_hf(
    hf: nn.Module,
    batch: Mapping[str, Any],
    entering: Mapping[str, nn.Module] | None = None,
    leaving: Mapping[str, nn.Module] | None = None,
    patterns: Mapping[str, nn.Module] | None = None,
    **wanted: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """Run a Hugging Face model: its output, and what went through some of its modules.

    ``entering`` and ``leaving`` name the first tensor that enters or leaves a module by our hook
    name; ``patterns`` names the second thing an attention module returns (left out if None). A
    module that runs several times gives its tensors one after the other along axis 0.
    """
    found: dict[str, list[Tensor]] = {}
    with recorded(found, entering or {}, leaving or {}, patterns or {}):
        out = hf(**batch, **wanted)
    return out, {name: torch.cat(tensors) for name, tensors in found.items()}


@contextmanager
def recorded(
    found: dict[str, list[Tensor]],
    entering: Mapping[str, nn.Module],
    leaving: Mapping[str, nn.Module],
    patterns: Mapping[str, nn.Module],
) -> Iterator[None]:
    """While inside, what goes through the modules is appended to ``found``; see `run_hf`."""

    def keep(name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            found.setdefault(name, []).append(tensor)

    def before(name: str) -> Callable:
        return lambda module, args, kwargs: keep(name, _first([*args, *kwargs.values()]))

    def after(name: str) -> Callable:
        return lambda module, args, out: keep(name, _first(out))

    def second(name: str) -> Callable:
        return lambda module, args, out: keep(name, out[1])

    handles = [
        *(m.register_forward_pre_hook(before(n), with_kwargs=True) for n, m in entering.items()),
        *(module.register_forward_hook(after(name)) for name, module in leaving.items()),
        *(module.register_forward_hook(second(name)) for name, module in patterns.items()),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(value: Any) -> Tensor:
    """The tensor itself, or the first of a tuple or model output."""
    return value if isinstance(value, Tensor) else value[0]


def by_layer(name: str, modules: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """``"encoder.blocks.{l}.hook_resid_pre"`` of every layer -> the module of that layer."""
    return {name.format(l=layer): module for layer, module in enumerate(modules)}


def entering_blocks(part: str, layers: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """The blocks of a part by the name of what enters each."""
    return by_layer(f"{part}.blocks.{{l}}.hook_resid_pre", layers)


def attending(
    part: str, layers: Sequence[nn.Module], attention: str = "self_attn", attn: str = "attn"
) -> dict[str, nn.Module]:
    """The attention modules of a part's blocks by the name of their pattern."""
    modules = [layer.get_submodule(attention) for layer in layers]
    return by_layer(f"{part}.blocks.{{l}}.{attn}.hook_pattern", modules)


def hidden_states(part: str, states: Sequence[Tensor]) -> dict[str, Tensor]:
    """``hidden_states`` of an output under our names, where the last is taken after the norm."""
    *before, last = states
    named = {f"{part}.blocks.{i}.hook_resid_pre": state for i, state in enumerate(before)}
    return {**named, f"{part}.hook_out": last}


def attentions(part: str, patterns: Sequence[Tensor | None] | None, attn: str = "attn") -> dict:
    """``attentions`` of an output under our names; nothing where attention was fused."""
    return {
        f"{part}.blocks.{i}.{attn}.hook_pattern": pattern
        for i, pattern in enumerate(patterns or ())
        if pattern is not None
    }


def decoder_of(out: Any) -> dict[str, Tensor]:
    """Logits, streams and patterns of a language model's output under our names."""
    return {
        "hook_logits": out.logits,
        **hidden_states("decoder", out.hidden_states),
        **attentions("decoder", out.attentions),
    }


def encoder_and_decoder_of(out: Any) -> dict[str, Tensor]:
    """The same of both parts, and what the decoder reads of the encoder, but no logits."""
    return {
        **hidden_states("encoder", out.encoder_hidden_states),
        **hidden_states("decoder", out.decoder_hidden_states),
        **attentions("encoder", out.encoder_attentions),
        **attentions("decoder", out.decoder_attentions),
        **attentions("decoder", out.cross_attentions, "cross_attn"),
    }


def on_diagonal(patterns: Tensor, n_rows: int) -> Tensor:
    """Patterns of windows, ``(row window) h q k``, as those of whole rows, zero between windows."""
    by_head = patterns.unflatten(0, (n_rows, -1)).transpose(1, 2)  # row head window q k
    wholes = [torch.block_diag(*windows) for windows in by_head.flatten(0, 1)]
    return torch.stack(wholes).unflatten(0, by_head.shape[:2])


def side_by_side(tensor: Tensor, n_rows: int) -> Tensor:
    """What was computed window by window for every row, as the positions of whole rows."""
    if tensor.ndim == 4:
        return on_diagonal(tensor, n_rows)
    return tensor.reshape(n_rows, -1, tensor.shape[-1])
