"""Putting an encoder, a connector and a language model together: `compose`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn

from audio_lens.hooks import HookPoint
from audio_lens.models.base import HookedAudioTransformer
from audio_lens.models.compose.model import (
    AUDIO,
    QUESTION,
    ComposedConfig,
    CompositionError,
    HookedComposed,
    children_of_ear,
)
from audio_lens.models.config import AudioConfig, LoadingError
from audio_lens.models.kinds.ear import Ear
from audio_lens.models.layers import Stack
from audio_lens.models.loading.checkpoints import load_pretrained, processor_of, read_model
from audio_lens.models.loading.weights import fill, renamed
from audio_lens.models.parts.connectors import Connector
from audio_lens.models.parts.language_model import (
    LanguageModel,
    language_model_config,
    weight_names,
)
from audio_lens.models.registry import composes

Composed = TypeVar("Composed", bound=HookedComposed)
_OUTSIDE = -1  # id of a placeholder that the tokenizer does not know as one token


@dataclass(frozen=True)
class Placeholder:
    """What stands for a clip in prompts.

    Attributes:
        text: in the text of a prompt.
        token_id: among token ids, in or outside the vocabulary; None is the tokenizer's id of
            the text, or one outside where it knows none.
    """

    text: str = "<|audio|>"
    token_id: int | None = None

    @staticmethod
    def of(merge: str | int | Placeholder, tokenizer: Any) -> Placeholder:
        """Both the text and the id."""
        if isinstance(merge, Placeholder):
            text, token = merge.text, merge.token_id
        else:
            text, token = (merge, None) if isinstance(merge, str) else (Placeholder.text, merge)
        if token is None and tokenizer is not None:
            known = tokenizer.convert_tokens_to_ids(text)
            token = None if known in (None, tokenizer.unk_token_id) else known
        return Placeholder(text, _OUTSIDE if token is None else token)


@composes
def compose(
    encoder: Any,
    connector: nn.Module,
    decoder: Any,
    merge: str | int | Placeholder = Placeholder.text,
    *,
    tokenizer: Any = None,
    template: str | None = None,
    max_segments: int = 1,
    keeps_padding: bool = False,
    name: str = "composed",
    dtype: torch.dtype | None = None,
    family: type[Composed] = HookedComposed,
) -> Composed:
    """An audio LLM put together from parts; see `HookedAudioTransformer.compose`.

    The parts are taken over: hooked models they come from are not for use beside the composed one.

    Args:
        encoder: a hub id or local directory, a Hugging Face model or a hooked model, whose encoder
            is taken; or a mapping from names of parts to these, whose first is the encoder.
        connector: from the encoder's width to the language model's.
        decoder: a hub id or local directory of a causal language model, such a Hugging Face model,
            or a `LanguageModel`.
        merge: the placeholder of a clip: its text in prompts, its token id, or a `Placeholder`.
        tokenizer: None takes that of a decoder named by id or directory.
        template: a prompt with ``{audio}`` and ``{question}``; None uses the tokenizer's chat
            template, with the clips before the question.
        max_segments: into how many windows of the encoder's length a clip may be cut.
        keeps_padding: whether the padding of a window becomes tokens too.
        name: of the model, for results.
        dtype: of what is loaded from disk; None keeps the checkpoints'.
        family: a subclass that changes what composed models do.

    Raises:
        LoadingError: a part that cannot be read or is not implemented.
        CompositionError: parts that do not fit together.
    """
    if not isinstance(connector, Connector):
        raise CompositionError(
            f"the connector is a {type(connector).__name__}: subclass audio_lens.models."
            "Connector and define carry(x), so that its ends have hooks and its tokens have times"
        )
    if template is not None and not (AUDIO in template and QUESTION in template):
        raise CompositionError(f"template must hold {AUDIO} and {QUESTION}, got {template!r}")
    ears = _ears(encoder, connector.taps, dtype)
    if len(ears) > 1 and max_segments > 1:
        raise CompositionError("clips cannot be cut into windows for several ears: max_segments=1")
    language_model, own_tokenizer, generation = _language_model(decoder, dtype)
    tokenizer = own_tokenizer if tokenizer is None else tokenizer
    placeholder = Placeholder.of(merge, tokenizer)
    ear, *others = ears
    fields = {
        field.name: getattr(ears[ear].cfg, field.name) for field in dataclasses.fields(AudioConfig)
    }
    made = {
        "family": name,
        "model_name": name,
        "decoder": language_model.cfg,
        "output_kind": "tokens",
        "labels": (),
        "max_segments": max_segments,
        "ears": {other: ears[other].cfg.need_encoder for other in others},
    }
    cfg = ComposedConfig(
        **{**fields, **made},
        placeholder=placeholder.text,
        template=template,
        keeps_padding=keeps_padding,
    )
    _check_fit(list(ears.values()), connector, language_model)
    model = family(cfg, {"encoder": ears.pop(ear), **ears}, connector, language_model)
    model.audio_token_id = placeholder.token_id
    model.feature_extractor = model.make_feature_extractor()
    model.tokenizer = model.processor = tokenizer
    model.generation_config = generation or _ends_of(tokenizer)
    return model.eval()


def _ends_of(tokenizer: Any) -> transformers.GenerationConfig:
    """Where writing ends, by a tokenizer alone."""
    ids = {name: getattr(tokenizer, name, None) for name in ("eos_token_id", "pad_token_id")}
    return transformers.GenerationConfig(**ids)


def _ears(encoder: Any, taps: tuple[int, ...], dtype: torch.dtype | None) -> dict[str, Ear]:
    """What hears, by the name of its part."""
    sources = dict(encoder) if isinstance(encoder, Mapping) else {"encoder": encoder}
    if not sources:
        raise CompositionError("encoder= names no encoder")
    taken = {"connector", "decoder", "encoder"} & set(list(sources)[1:])
    if taken:
        raise CompositionError(f"an ear beside the encoder cannot be named {', '.join(taken)}")
    ears = {name: _lent(source, dtype) for name, source in sources.items()}
    if taps:
        first = next(iter(ears.values()))
        first.encoder = _cut_behind(first.encoder, taps)
        first.cfg = replace(first.cfg, encoder=first.encoder.cfg)
    return ears


def _lent(source: Any, dtype: torch.dtype | None) -> Ear:
    """A model with nothing behind its encoder, whose parts are those of the source."""
    if isinstance(source, (str, Path)):
        source = load_pretrained(source, dtype, kind=HookedAudioTransformer)
    elif not isinstance(source, HookedAudioTransformer):
        source = HookedAudioTransformer.from_hf(source)
    if not (isinstance(source, Ear) and source.lends_encoder):
        raise CompositionError(
            f"the encoder of {source.cfg.family} cannot be taken out of its model; use one of "
            "Whisper, wav2vec 2.0 and its kin, Qwen2-Audio and its kin"
        )
    ear = copy.copy(source)
    vars(ear).pop("_parts", None)
    ear._modules = {**children_of_ear(source)}
    ear.cfg = replace(source.cfg, decoder=None, output_kind=None)
    ear.feature_extractor = source.feature_extractor or source.make_feature_extractor()
    return ear


def _cut_behind(encoder: Stack, taps: tuple[int, ...]) -> Stack:
    """The encoder up to the last block that is read, without a final norm."""
    n_layers = max(taps) + 1
    if list(taps) != sorted(set(taps)):
        raise CompositionError(f"name the blocks that the connector reads in rising order: {taps}")
    if not 0 <= min(taps) <= max(taps) < encoder.cfg.n_layers or encoder.frames_pooled > 1:
        raise CompositionError(
            f"the connector reads blocks {', '.join(map(str, taps))} of an encoder with "
            f"{encoder.cfg.n_layers} blocks"
            + (" that pools behind them" if encoder.frames_pooled > 1 else "")
        )
    cut = copy.copy(encoder)
    kept = {name: module for name, module in encoder.named_children() if name != "ln_final"}
    cut._modules = {**kept, "blocks": encoder.blocks[:n_layers]}
    cut.cfg = replace(encoder.cfg, n_layers=n_layers, final_norm=False)
    cut.hook_out = HookPoint(borrowed=True)
    return cut


def _language_model(source: Any, dtype: torch.dtype | None) -> tuple[LanguageModel, Any, Any]:
    """A hooked language model, its tokenizer and what it says of generation, where there are."""
    if isinstance(source, LanguageModel):
        return source, None, None
    tokenizer = None
    if isinstance(source, (str, Path)):
        found, _ = processor_of(str(source))
        tokenizer = getattr(found, "tokenizer", found)
        source = read_model(source, _causal_class, dtype)
    if not isinstance(source, transformers.PreTrainedModel):
        raise LoadingError(
            "the decoder is a causal language model of transformers, the name of one or a "
            f"LanguageModel, not a {type(source).__name__}"
        )
    cfg = language_model_config(source.config, source.config.name_or_path)
    with torch.device("meta"):
        model = LanguageModel(cfg)
    prefix = "decoder."
    table = {k: v.removeprefix(prefix) for k, v in weight_names("model", "lm_head").items()}
    fill(model, renamed(source.state_dict(), table))
    return model, tokenizer, getattr(source, "generation_config", None)


def _causal_class(hf_config: Any) -> type:
    """The class of a causal language model that is implemented."""
    language_model_config(hf_config, "")
    return transformers.AutoModelForCausalLM


@torch.no_grad()
def _check_fit(ears: Iterable[Ear], connector: Connector, decoder: LanguageModel) -> None:
    """Raise unless the connector carries what the ears give to the width of the language model.

    Raises:
        CompositionError: naming both sides.
    """
    parts = {"encoder": next(iter(ears)), "connector": connector, "decoder": decoder}
    dtypes = {name: next(part.parameters()).dtype for name, part in parts.items()}
    if len(set(dtypes.values())) > 1:
        named = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise CompositionError(f"parts of several dtypes ({named}): pass dtype=, or convert them")
    given = next(connector.parameters())
    heard = [
        given.new_zeros(1, (ear.cfg.need_encoder.n_ctx or 128) // ear.encoder.frames_pooled, width)
        for ear in ears
        for width in [ear.cfg.need_encoder.d_model]
    ]
    heard[0] = heard[0].repeat(1, 1, len(connector.taps) or 1)
    try:
        made = connector(*heard)
    except (RuntimeError, ValueError) as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in heard)
        raise CompositionError(f"the connector cannot take {shapes}: {error}") from error
    expected = (1, connector.token_count(heard[0].shape[1]), decoder.cfg.d_model)
    if tuple(made.shape) != expected:
        raise CompositionError(
            f"of {heard[0].shape[1]} encoder positions the connector makes {tuple(made.shape)}, "
            f"where its token_count and the language model say {expected}"
        )
