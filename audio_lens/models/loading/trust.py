"""Code that a checkpoint brings: none of it is run, and what needs it is refused by name.

Where transformers has a class of its own for a piece, that one is taken, whatever the files name
beside it. transformers is never left to ask: every loader is told ``trust_remote_code=False``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.auto_mappings import (
    CONFIG_MAPPING_NAMES,
    FEATURE_EXTRACTOR_MAPPING_NAMES,
    PROCESSOR_MAPPING_NAMES,
)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from audio_lens.models.config import LoadingError
from audio_lens.models.loading.stored import CONFIG, entries, found, read_config, read_json

_OF_PIECES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_KERNELS = ("attn_implementation", "experts_implementation")
Files = Mapping[Path, Mapping[str, Any]]
_PIECES = {  # transformers' loader, what names its class in a file, its classes by model type
    "AutoProcessor": ("processor_class", PROCESSOR_MAPPING_NAMES),
    "AutoFeatureExtractor": ("feature_extractor_type", FEATURE_EXTRACTOR_MAPPING_NAMES),
    "AutoTokenizer": ("tokenizer_class", TOKENIZER_MAPPING_NAMES),
}


def check_config_code(source: str) -> None:
    """Raise if the config of a checkpoint needs code of its own.

    Raises:
        LoadingError: naming the code; or a file that is no JSON, or asks for what no model has.
    """
    for path, held in _files(source, (CONFIG, "generation_config.json")).items():
        _check_kernels(path, held)
        code = _named_code({path: held}, "AutoConfig")
        if code and held.get("model_type") not in CONFIG_MAPPING_NAMES:
            raise LoadingError(
                f"{code}: code of a checkpoint is never run, and transformers has no model type "
                f"{held.get('model_type')!r} of its own"
            )


def check_piece_code(source: str) -> None:
    """Raise if the processor, feature extractor or tokenizer of a checkpoint needs its own code.

    Raises:
        LoadingError: naming the code; or a file that is no JSON.
    """
    files = _files(source, (*_OF_PIECES, CONFIG))
    for auto, (key, classes) in _PIECES.items():
        code = _named_code(files, auto)
        is_known = _model_type(files) in classes or any(
            hasattr(transformers, name) for name in _named(files, key)
        )
        if code and not is_known:
            raise LoadingError(
                f"{code}: code of a checkpoint is never run, and transformers has no "
                f"{auto.removeprefix('Auto')} of its own for it"
            )


def processor_loader(source: str) -> Any:
    """What loads the processor of a checkpoint.

    That is the class itself where the model type alone tells it: `AutoProcessor` finds that too,
    but forgets on the way what it was told about code.
    """
    files = _files(source, (*_OF_PIECES, CONFIG))
    by_type = PROCESSOR_MAPPING_NAMES.get(_model_type(files))
    if by_type is None or any(True for _ in _named(files, "processor_class")):
        return transformers.AutoProcessor
    return getattr(transformers, by_type)


def _files(source: str, names: Iterable[str]) -> Files:
    """Those files of a checkpoint that are there."""
    paths = [path for name in names if (path := found(source, name)) is not None]
    return {path: (read_config if path.name == CONFIG else read_json)(path) for path in paths}


def _model_type(files: Files) -> str:
    held = {path.name: one for path, one in files.items()}.get(CONFIG, {})
    return str(held.get("model_type"))


def _named(files: Files, key: str) -> Iterable[str]:
    """The classes that files name under a key, at any depth."""
    held = (pair for one in files.values() for pair in entries(one))
    return (value for name, value in held if name == key and isinstance(value, str))


def _named_code(files: Files, auto: str) -> str:
    """What a file names as its own code for a loader, in words; empty where none does."""
    for path, held in files.items():
        for key, names in entries(held):
            if key != "auto_map":
                continue
            if isinstance(names, list):  # as tokenizers had it once
                names = {"AutoTokenizer": names}
            if not isinstance(names, dict):
                raise LoadingError(f"{path} holds an auto_map that is a {type(names).__name__}")
            if auto in names:
                return f"{path} names code of its own ({auto}: {names[auto]})"
    return ""


def _check_kernels(path: Path, config: Mapping[str, Any]) -> None:
    """Raise if a config has parts of a model computed by code from the hub."""
    for key, value in entries(config):
        named = value.values() if isinstance(value, dict) else [value]
        if key.strip("_").startswith(_KERNELS) and any("/" in str(one) for one in named):
            raise LoadingError(f"{path} names code of its own ({key}: {value}), which is never run")
