"""From Hugging Face checkpoints to hooked models, strictly and without a second copy of weights.

The checkpoint is read by transformers (which knows every key layout older versions wrote) and its
tensors are taken over one by one through the family's name table; a name without a place, or a
place without a tensor, is an error.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from audio_lens.models.base import HookedAudioTransformer, LoadingError
from audio_lens.models.qwen2_audio import HookedQwen2Audio
from audio_lens.models.whisper import HookedWhisper

FAMILIES: dict[str, type[HookedAudioTransformer]] = {
    "whisper": HookedWhisper,
    "qwen2_audio": HookedQwen2Audio,
}
EMBEDDED = "embedded"
_log = logging.getLogger(__name__)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_UNQUANTISED = "packed weights cannot be hooked: load it in float16, bfloat16 or float32"


def embedded_path() -> Path:
    """Directory of the checkpoint shipped with the package."""
    return Path(str(resources.files("audio_lens") / "models" / "embedded" / "checkpoint"))


def load_pretrained(
    name: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> HookedAudioTransformer:
    """See `HookedAudioTransformer.from_pretrained`."""
    source = str(embedded_path()) if name == EMBEDDED else str(name)
    _check_directory(source, is_path=isinstance(name, Path) or _looks_like_path(source))
    hf_config = _config(source)
    family = family_of(hf_config)
    family.config_from_hf(hf_config)  # refuses what is not implemented before anything is read
    hf_model = _read(getattr(transformers, family.hf_class), source, dtype)
    processor, problem = _processor(source)
    model = take_over(hf_model, processor)
    model.tokenizer_problem = model.tokenizer_problem or problem
    model.cfg.model_name = str(name)
    return model if device is None else model.to(device)


def take_over(hf_model: nn.Module, processor: Any = None) -> HookedAudioTransformer:
    """See `HookedAudioTransformer.from_hf`."""
    if hasattr(hf_model, "peft_config"):
        raise LoadingError("the model carries LoRA adapters: pass hf_model.merge_and_unload()")
    if not isinstance(hf_model, transformers.PreTrainedModel):
        raise LoadingError(f"not a Hugging Face model, but a {type(hf_model).__name__}")
    family = family_of(hf_model.config)
    state = hf_model.state_dict()
    _check_tensors(state)
    with torch.device("meta"):
        model = family(family.config_from_hf(hf_model.config))
    _fill(model, renamed(state, family.weight_names))
    model.train(hf_model.training)
    model.take_special_tokens(hf_model.config)
    model.generation_config = hf_model.generation_config
    _attach(model, processor)
    return model


def family_of(hf_config: Any) -> type[HookedAudioTransformer]:
    """The family that implements a Hugging Face config.

    Raises:
        LoadingError: if none does; the message lists those that exist.
    """
    if hf_config.model_type not in FAMILIES:
        raise LoadingError(
            f"architecture {hf_config.model_type!r} is not supported; supported: "
            + ", ".join(FAMILIES)
        )
    return FAMILIES[hf_config.model_type]


def renamed(state: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors under our names; ``{l}`` in the table stands for a layer number.

    Raises:
        LoadingError: if a tensor has no entry in the table.
    """
    patterns = [
        (re.compile(re.escape(theirs).replace(r"\{l\}", r"(\d+)")), ours)
        for theirs, ours in table.items()
    ]
    found, unknown = {}, []
    for key, tensor in state.items():
        stem, _, kind = key.rpartition(".")
        for pattern, ours in patterns:
            if match := pattern.fullmatch(stem):
                found[f"{ours.format(l=(*match.groups(), '')[0])}.{kind}"] = tensor
                break
        else:
            unknown.append(key)
    if unknown:
        raise LoadingError(f"weights without a place in this model: {', '.join(unknown[:10])}")
    return found


def _fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    wanted = model.state_dict().keys()
    missing, unexpected = wanted - state.keys(), state.keys() - wanted
    if missing or unexpected:
        raise LoadingError(
            f"missing weights: {', '.join(sorted(missing)[:10]) or 'none'}; unexpected weights: "
            f"{', '.join(sorted(unexpected)[:10]) or 'none'}"
        )
    model.load_state_dict(state, assign=True)
    _tie_shared(model)


def _tie_shared(model: nn.Module) -> None:
    """Make parameters that share their memory one parameter, so that moving keeps them tied."""
    by_memory: dict[tuple[int, torch.Size], nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            key = (parameter.data_ptr(), parameter.shape)
            setattr(module, name, by_memory.setdefault(key, parameter))


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
    try:
        hf_config = transformers.AutoConfig.from_pretrained(source)
    except ValueError as error:
        raise LoadingError(
            f"the architecture of {source} is not supported; supported: {', '.join(FAMILIES)} "
            f"(transformers says: {str(error).splitlines()[0]})"
        ) from error
    if getattr(hf_config, "quantization_config", None) is not None:
        raise LoadingError(f"{source} is quantised; {_UNQUANTISED}")
    return hf_config


def _read(hf_class: Any, source: str, dtype: torch.dtype | None) -> nn.Module:
    """The Hugging Face model, with every weight from the checkpoint."""
    try:
        hf_model, info = hf_class.from_pretrained(
            source,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported below, by name
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise LoadingError(f"{_corrupt_file(source)} is corrupt: {error}") from error
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
    return hf_model


def _corrupt_file(source: str) -> Path:
    """The first file of weights that cannot be opened."""
    for path in sorted(Path(source).glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            return path
    return Path(source)


def _check_tensors(state: Mapping[str, Tensor]) -> None:
    packed = [key for key, tensor in state.items() if tensor.dtype not in _DTYPES]
    if packed:
        raise LoadingError(f"the model is quantised ({', '.join(packed[:3])} ...); {_UNQUANTISED}")
    offloaded = [key for key, tensor in state.items() if tensor.is_meta]
    if offloaded:
        raise LoadingError(f"weights that are offloaded or empty: {', '.join(offloaded[:3])} ...")


def _processor(source: str) -> tuple[Any, str]:
    """The checkpoint's processor or the pieces of it that load, and why a tokenizer does not."""
    processor, _ = _loaded(transformers.AutoProcessor, source)
    if processor is not None:
        return processor, ""
    extractor, no_extractor = _loaded(transformers.AutoFeatureExtractor, source)
    tokenizer, no_tokenizer = _loaded(transformers.AutoTokenizer, source)
    for problem in filter(None, (no_extractor, no_tokenizer)):
        _log.warning("%s: %s", source, problem)
    return SimpleNamespace(feature_extractor=extractor, tokenizer=tokenizer), no_tokenizer


def _loaded(auto: Any, source: str) -> tuple[Any, str]:
    """What a transformers Auto class loads, or None and the cause."""
    try:
        return auto.from_pretrained(source), ""
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        return None, f"{auto.__name__} says: {cause}"


def _attach(model: HookedAudioTransformer, processor: Any) -> None:
    """Give the model its processor's pieces; without one, the feature extractor its shape tells."""
    is_tokenizer = isinstance(processor, transformers.PreTrainedTokenizerBase)
    is_extractor = isinstance(processor, transformers.FeatureExtractionMixin)
    tokenizer = processor if is_tokenizer else getattr(processor, "tokenizer", None)
    if tokenizer is not None and _is_empty(tokenizer):
        model.tokenizer_problem = "the tokenizer holds no words: its files are missing"
        tokenizer = None
    model.tokenizer = tokenizer
    model.processor = processor if hasattr(processor, "apply_chat_template") else tokenizer
    extractor = processor if is_extractor else getattr(processor, "feature_extractor", None)
    cfg = model.cfg
    if extractor is None:
        extractor = transformers.WhisperFeatureExtractor(feature_size=cfg.n_mels)
    if extractor.feature_size != cfg.n_mels:
        raise LoadingError(
            f"the processor makes {extractor.feature_size} mel bins, the model takes {cfg.n_mels}"
        )
    if extractor.sampling_rate != cfg.sampling_rate:
        raise LoadingError(f"the processor works at {extractor.sampling_rate} Hz, not 16000")
    model.feature_extractor = extractor


def _is_empty(tokenizer: Any) -> bool:
    """Whether it holds special tokens only: what transformers makes where there are no files."""
    return len(tokenizer) <= len(set(tokenizer.all_special_ids))
