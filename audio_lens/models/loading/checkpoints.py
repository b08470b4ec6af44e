"""From Hugging Face checkpoints to hooked models, strictly and without a second copy of weights.

The checkpoint is read by transformers (which knows every key layout older versions wrote) and its
tensors are taken over one by one through the family's name table; a name without a place, or a
place without a tensor, is an error.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from audio_lens.models.config import LoadingError
from audio_lens.models.loading.adapted import beside_told, is_adapted, taken_apart
from audio_lens.models.loading.adapters import (
    Adapter,
    base_of,
    check_beside,
    is_adapter,
    read_adapter,
)
from audio_lens.models.loading.classes import check_class, check_named, class_of, model_type
from audio_lens.models.loading.fits import UNQUANTISED, check_fits, check_plain
from audio_lens.models.loading.lora import attach
from audio_lens.models.loading.placement import Devices, guard_borders, layout, unit_of
from audio_lens.models.loading.stored import first_line, headers, told_of, weight_files
from audio_lens.models.loading.trust import check_config_code, check_piece_code, processor_loader
from audio_lens.models.loading.weights import check_finite, fill, infinite, renamed
from audio_lens.models.registry import Family, Kind, family_of, supported

EMBEDDED = "embedded"
_log = logging.getLogger(__name__)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def embedded_path() -> Path:
    """Directory of the checkpoint shipped with the package."""
    return Path(str(resources.files("audio_lens") / "models" / "embedded" / "checkpoint"))


def load_pretrained(
    name: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    devices: Devices | None = None,
    adapter: str | Path | None = None,
    merge: bool = False,
    kind: type[Kind] = Family,
) -> Kind:
    """See `HookedAudioTransformer.from_pretrained`.

    Args:
        kind: the class that is wanted, or one above it.
    """
    if dtype not in (None, *_DTYPES):
        raise LoadingError(f"dtype is a floating-point dtype of torch or None, got {dtype}")
    if device is not None and devices is not None:
        raise LoadingError(
            "device= is for the whole model on one device, devices= splits it: not both"
        )
    source = str(embedded_path()) if name == EMBEDDED else str(name)
    if adapter is None and is_adapter(Path(source)):
        adapter, source = source, base_of(Path(source))
    _check_directory(source, is_path=isinstance(name, Path) or _looks_like_path(source))
    hf_config = _config(source)
    with told_of(f"{source}/config.json"):
        family = family_of(hf_config, kind)
        hf_class = _hf_class(family, hf_config)
        family.config_from_hf(_named(hf_config, hf_class))  # refuses before anything is read
    processor, problem = processor_of(source)
    found = None if adapter is None else read_adapter(adapter)
    hf_model = _read(hf_class, hf_config, source, dtype, family.outdated_names)
    base, state = hf_model, hf_model.state_dict()
    if is_adapted(hf_model):  # transformers reads the adapter that lies beside a model
        if found is not None:
            raise LoadingError(f"{source} brings an adapter of its own: adapter= would be a second")
        base, state, found = taken_apart(hf_model)
    elif found is not None:
        found = found.renamed(lambda key: _name_in_memory(key, hf_model))
    if merge and found is None:
        raise LoadingError("merge=True merges an adapter: pass adapter=, or its directory as name")
    model = _built(family, base, state, found, merge, devices if device is None else device)
    with told_of(source):
        _attach(model, processor)
    model.tokenizer_problem = model.tokenizer_problem or problem
    model.cfg.model_name = str(name)
    return model


def read_model(
    name: str | Path,
    hf_class_of: Callable[[Any], Any],
    dtype: torch.dtype | None = None,
) -> transformers.PreTrainedModel:
    """A Hugging Face model from a hub id or a local directory, with every weight from there.

    Args:
        hf_class_of: gives the class to read, or its name in transformers, from the config; and
            raises if that is not implemented, before any weight is read.
        dtype: of the weights; None keeps the checkpoint's.

    Raises:
        LoadingError: no such directory, missing, unexpected, quantised or corrupt weights.
    """
    source = str(name)
    _check_directory(source, is_path=isinstance(name, Path) or _looks_like_path(source))
    hf_config = _config(source)
    with told_of(f"{source}/config.json"):
        hf_class = hf_class_of(hf_config)
    named = getattr(transformers, hf_class) if isinstance(hf_class, str) else hf_class
    return _read(named, hf_config, source, dtype)


def take_over(
    hf_model: nn.Module, processor: Any = None, merge: bool = False, kind: type[Kind] = Family
) -> Kind:
    """See `HookedAudioTransformer.from_hf`."""
    hf_model = _thinker_of(hf_model)
    adapter, base, state = None, hf_model, None
    if is_adapted(hf_model):
        base, state, adapter = taken_apart(hf_model)
    if not isinstance(base, transformers.PreTrainedModel):
        raise LoadingError(f"not a Hugging Face model, but a {type(base).__name__}")
    state = dict(base.state_dict() if state is None else state)
    if merge:  # the weights are shared with the Hugging Face model, which stays as it is
        if adapter is None:
            raise LoadingError("merge=True merges an adapter, and the model carries none")
        state |= {f"{m}.weight": state[f"{m}.weight"].clone() for m in adapter.low_rank}
    family = family_of(_named(base.config, class_of(base)), kind)
    check_class(family, base)
    model = _built(family, base, state, adapter, merge, None)
    _attach(model, processor)
    if wrong := infinite(state):
        _log.warning("weights that are NaN or infinite: %s", ", ".join(wrong))
    return model


def _thinker_of(hf_model: nn.Module) -> nn.Module:
    """Of a whole Omni model what hears and writes; other models as they are."""
    thinker = getattr(hf_model, "thinker", None)
    is_omni = isinstance(hf_model, transformers.PreTrainedModel)
    return thinker if is_omni and isinstance(thinker, nn.Module) else hf_model


def _built(
    family: type[Kind],
    hf_model: nn.Module,
    state: dict[str, Tensor],
    adapter: Adapter | None,
    merge: bool,
    devices: Devices | None,
) -> Kind:
    """The hooked model of a Hugging Face model's tensors, with an adapter's merged or live."""
    _check_tensors(state)
    hf_config = _named(hf_model.config, class_of(hf_model))
    if adapter is not None:
        adapter.check_fits(state)
        if merge:
            state = _merged(state, adapter)
    cfg = family.config_from_hf(hf_config)
    with torch.device("meta"):
        model = family(cfg)
    tensors = renamed(family.adapt_state(state, cfg), family.weight_names)
    ours = {id(tensor): name for name, tensor in tensors.items()}
    if devices is not None:
        placed = layout(tensors, devices)
        tensors = {name: tensor.to(placed[unit_of(name)]) for name, tensor in tensors.items()}
    fill(model, tensors)
    if adapter is not None and not merge:
        _make_live(model, adapter.renamed(lambda key: _named_here(key, state, ours)))
    guard_borders(model)
    model.train(hf_model.training)
    model.take_special_tokens(hf_model.config)
    model.take_modules(hf_model)
    model.generation_config = _generation_of(hf_model)
    return model


def _generation_of(hf_model: nn.Module) -> Any:
    """What a model says of generation; of a class that cannot generate, what its config does."""
    said = getattr(hf_model, "generation_config", None)
    if said is not None or not isinstance(hf_model, transformers.PreTrainedModel):
        return said
    return transformers.GenerationConfig.from_model_config(hf_model.config)


# -------------------------------------------------------------------------------- adapters


@torch.no_grad()
def _merged(state: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The tensors with the adapter's added, in place and one at a time."""
    for module, low_rank in adapter.low_rank.items():
        weight = state[f"{module}.weight"]
        weight.copy_(low_rank.added_to(weight))
    return {**state, **{key: own.to(state[key]) for key, own in adapter.saved.items()}}


def _make_live(model: Family, adapter: Adapter) -> None:
    others = [m for m in adapter.low_rank if type(model.get_submodule(m)) is not nn.Linear]
    if others:
        raise LoadingError(
            f"live adapters go beside linear maps, and {', '.join(others[:5])} is none: merge=True"
        )
    low_rank = {}
    for module, one in adapter.low_rank.items():
        weight = model.get_parameter(f"{module}.weight")
        dtype = torch.promote_types(one.down.dtype, weight.dtype)
        low_rank[module] = one.to(weight.device, dtype)
    own = {key: own.to(model.get_parameter(key)) for key, own in adapter.saved.items()}
    attach(model, low_rank, own).enabled = adapter.enabled


def _named_here(key: str, state: Mapping[str, Tensor], ours: Mapping[int, str]) -> str:
    """Our name of a Hugging Face tensor."""
    if id(state[key]) not in ours:
        raise LoadingError(f"a live adapter on {key} is not implemented: pass merge=True")
    return ours[id(state[key])]


def _name_in_memory(key: str, hf_model: transformers.PreTrainedModel) -> str:
    """The name a weight has in the Hugging Face model, from one that older versions gave it."""
    state = hf_model.state_dict()
    if key in state:
        return key
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(hf_model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    return rename_source_key(key, renamings, [], hf_model.base_model_prefix, state)[0]


# -------------------------------------------------------------------------------- families


def _hf_class(family: type[Family], hf_config: Any) -> Any:
    """The Hugging Face class to read: the family's, or of several the one the checkpoint names.

    Raises:
        LoadingError: if it names only others.
    """
    kind = hf_config.model_type
    if isinstance(family.hf_class, str):
        check_named(hf_config, family.hf_class)
        return getattr(transformers, family.hf_class)
    own = [name for name in family.hf_class if model_type(name) == kind]
    named = list(hf_config.architectures or own)
    known = [name for name in named if name in family.hf_class]
    if not known:
        raise LoadingError(
            f"this {kind} checkpoint is a {', '.join(named)}; implemented: {', '.join(own)}"
        )
    return getattr(transformers, known[0])


def _named(hf_config: Any, hf_class: type) -> Any:
    """The config, saying which class it is for."""
    named = copy.copy(hf_config)
    named.architectures = [hf_class.__name__]
    return named


def _looks_like_path(source: str) -> bool:
    """Whether it can be no hub id."""
    return source.startswith(("/", "./", "../", "~")) or source.endswith(("/", os.sep))


def _check_directory(source: str, is_path: bool) -> None:
    path = Path(source)
    if not path.is_dir():
        if path.exists():
            raise LoadingError(f"{path} is a file; pass the checkpoint's directory")
        if is_path:
            raise LoadingError(f"no such directory: {path}")
        return
    if not (path / "config.json").is_file():
        raise LoadingError(f"{path} holds no config.json, so it is no Hugging Face checkpoint")
    if not list(path.glob("*.safetensors")):
        pickles = [p.name for p in (*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth"))]
        raise LoadingError(
            f"{path} holds no safetensors"
            + (f", only pickles ({', '.join(pickles)}), which can run code" if pickles else "")
            + ": save the model with save_pretrained(..., safe_serialization=True)"
        )


def _config(source: str) -> Any:
    with told_of(f"{source}/config.json" if Path(source).is_dir() else source):
        check_config_code(source)
        try:
            hf_config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        except ValueError as error:
            raise LoadingError(
                f"the architecture of {source} is not supported; supported: {supported()} "
                f"(transformers says: {first_line(error)})"
            ) from error
    quantised = getattr(hf_config, "quantization_config", None)
    if quantised is not None:
        method = dict(quantised).get("quant_method", "of an unnamed kind")
        raise LoadingError(f"{source} is quantised ({method}); {UNQUANTISED}")
    return hf_config


def _read(
    hf_class: Any,
    hf_config: Any,
    source: str,
    dtype: torch.dtype | None,
    outdated: tuple[str, ...] = (),
) -> transformers.PreTrainedModel:
    """The Hugging Face model, with every weight from the checkpoint but the outdated."""
    with told_of(source):
        stored = headers(weight_files(source, getattr(hf_config, "transformers_weights", None)))
        if stored:
            check_plain(stored, source)
            check_fits(hf_class, hf_config, stored, source)
            check_beside(Path(source), stored)
        with beside_told(source):
            hf_model, info = hf_class.from_pretrained(
                source,
                dtype="auto" if dtype is None else dtype,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are reported below, by name
                output_loading_info=True,
            )
    info["unexpected_keys"] = set(info["unexpected_keys"]) - set(outdated)
    problems = {
        what.replace("_", " "): sorted(map(str, info[what]))[:10]
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if info.get(what)
    }
    if problems:
        raise LoadingError(
            f"{source} does not hold the weights its config describes: "
            + "; ".join(f"{what}: {', '.join(keys)}" for what, keys in problems.items())
        )
    check_finite(hf_model.state_dict(), source)
    return hf_model


def stored_file(source: str, name: str) -> Path:
    """A file of a hub id, in its local copy, or of a local directory.

    Raises:
        OSError: if it is not there.
    """
    path = cached_file(source, name)
    if path is None:
        raise OSError(f"{source} holds no {name}")
    return Path(path)


def _check_tensors(state: Mapping[str, Tensor]) -> None:
    plain = (*_DTYPES, torch.int64, torch.bool)
    packed = [key for key, tensor in state.items() if tensor.dtype not in plain]
    if packed:
        raise LoadingError(f"the model is quantised ({', '.join(packed[:3])} ...); {UNQUANTISED}")
    offloaded = [key for key, tensor in state.items() if tensor.is_meta]
    if offloaded:
        raise LoadingError(f"weights that are offloaded or empty: {', '.join(offloaded[:3])} ...")


def processor_of(source: str) -> tuple[Any, str]:
    """The checkpoint's processor or the pieces of it that load, and why a tokenizer does not.

    Raises:
        LoadingError: if one of them needs code of its own, or a file is no JSON.
    """
    with told_of(source):
        check_piece_code(source)
        loader = processor_loader(source)
    processor, _ = _loaded(loader, source)
    if processor is not None:
        return processor, ""
    extractor, no_extractor = _loaded(transformers.AutoFeatureExtractor, source)
    tokenizer, no_tokenizer = _loaded(transformers.AutoTokenizer, source)
    for problem in filter(None, (no_extractor, no_tokenizer)):
        _log.warning("%s: %s", source, problem)
    return SimpleNamespace(feature_extractor=extractor, tokenizer=tokenizer), no_tokenizer


def _loaded(auto: Any, source: str) -> tuple[Any, str]:
    """What a class of transformers loads, or None and the cause."""
    try:
        return auto.from_pretrained(source, trust_remote_code=False), ""
    except Exception as error:  # pieces that fail to load do so in many ways
        return None, f"{auto.__name__} says: {first_line(error)}"


def _attach(model: Family, processor: Any) -> None:
    """Give the model its processor's pieces; without one, the feature extractor its shape tells."""
    is_tokenizer = isinstance(processor, transformers.PreTrainedTokenizerBase)
    is_extractor = isinstance(processor, transformers.FeatureExtractionMixin)
    tokenizer = processor if is_tokenizer else getattr(processor, "tokenizer", None)
    if tokenizer is not None and _is_empty(tokenizer):
        model.tokenizer_problem = "the tokenizer holds no words: its files are missing"
        tokenizer = None
    model.tokenizer = tokenizer
    model.processor = processor if hasattr(processor, "apply_chat_template") else tokenizer
    inner = (getattr(processor, name, None) for name in ("feature_extractor", "audio_processor"))
    extractor: Any = processor if is_extractor else next(filter(None, inner), None)
    cfg = model.cfg
    if extractor is None:
        extractor = model.make_feature_extractor()
    if cfg.n_mels is not None and _n_mels(extractor) != cfg.n_mels:
        raise LoadingError(
            f"the processor makes {_n_mels(extractor)} mel bins, the model takes {cfg.n_mels}"
        )
    if extractor.sampling_rate != cfg.sampling_rate:
        raise LoadingError(
            f"the processor works at {extractor.sampling_rate} Hz, the model at {cfg.sampling_rate}"
        )
    model.feature_extractor = extractor


def _n_mels(extractor: Any) -> int:
    """Mel bins that a feature extractor makes (of AST, one feature of so many bins)."""
    return getattr(extractor, "num_mel_bins", extractor.feature_size)


def _is_empty(tokenizer: Any) -> bool:
    """Whether it holds special tokens only: what transformers makes where there are no files."""
    return len(tokenizer) <= len(set(tokenizer.all_special_ids))
