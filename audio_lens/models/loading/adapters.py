"""LoRA adapters, and the directories in which peft keeps them.

They are read without peft. Everything is checked against what is implemented: a switch of
the config that would change what the adapter computes is refused by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio_lens.models.config import LoadingError
from audio_lens.models.loading.lora import LowRank
from audio_lens.models.loading.patterns import check_patterns, patterns_of
from audio_lens.models.loading.stored import read_json
from audio_lens.models.loading.weights import read_weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Keys of a LoRA config that are read here, and keys that matter only while training or searching.
_READ = (
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "alpha_pattern"),
    *("rank_pattern", "target_modules", "modules_to_save", "init_lora_weights"),
    *("base_model_name_or_path", "bias"),
)
_HARMLESS = (
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config"),
    *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("runtime_config", "ensure_weight_tying", "qalora_group_size"),
)
_KEEPS_BASE = (
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
    "mica",
)  # starts that leave it as it was
_NOT_IMPLEMENTED = {  # by what the names of their tensors hold
    ".lora_embedding_": "embeddings",
    ".lora_magnitude_vector": "magnitudes (DoRA)",
    ".lora_B.bias": "biases of their own (lora_bias)",
    ".lora_A.weight": "convolutions",
    ".lora_B.weight": "convolutions",
}


_INNER = re.compile(r"\.(base_layer|modules_to_save)\.")  # peft's, around trained biases


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, by the names of the Hugging Face model it belongs to.

    Attributes:
        low_rank: what is added to the linear map of each module.
        saved: tensors that stand in place of the model's own (`modules_to_save`, biases).
        enabled: whether it was switched on where it comes from.
        targets: ends of the names of modules that are said to be adapted, as far as they are known.
    """

    low_rank: dict[str, LowRank]
    saved: dict[str, Tensor] = field(default_factory=dict)
    enabled: bool = True
    targets: tuple[str, ...] = ()

    def renamed(self, rename: Callable[[str], str]) -> Adapter:
        """The adapter under other names of weights (``module.weight``)."""
        return replace(
            self,
            low_rank={
                rename(f"{module}.weight").removesuffix(".weight"): low_rank
                for module, low_rank in self.low_rank.items()
            },
            saved={rename(key): tensor for key, tensor in self.saved.items()},
        )

    def check_fits(self, state: Mapping[str, Tensor]) -> None:
        """Raise unless everything has a place of the right shape in the model.

        Raises:
            LoadingError: naming what has none.
        """
        shapes = {key: tuple(tensor.shape) for key, tensor in self.saved.items()}
        for module, one in self.low_rank.items():
            if one.down.shape[0] != one.up.shape[1]:
                raise LoadingError(f"the adapter's ranks at {module} differ between A and B")
            shapes[f"{module}.weight"] = (len(one.up), one.down.shape[1])
        for target in self.targets:
            of_target = f".{target}.weight"
            is_there = any(f".{key}".endswith(of_target) for key in state)
            if is_there and not any(f".{key}".endswith(of_target) for key in shapes):
                raise LoadingError(f"the adapter lists {target} and holds no weights for it")
        strangers = [key for key in shapes if key not in state]
        if strangers:
            raise LoadingError(
                f"the adapter changes what this model does not have: {', '.join(strangers[:10])}"
            )
        for key, shape in shapes.items():
            if tuple(state[key].shape) != shape:
                raise LoadingError(
                    f"the adapter was made for another size: {key} is {tuple(state[key].shape)} in "
                    f"the model and {shape} in the adapter"
                )


# -------------------------------------------------------------------------------- directories


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    return (path / CONFIG).is_file() and not (path / "config.json").is_file()


def check_beside(path: Path, weights: Iterable[str]) -> None:
    """Raise if an adapter that lies beside a model is a pickle, or its patterns never end.

    Args:
        weights: of the model, by name.

    Raises:
        LoadingError: naming what is missing, or the patterns.
    """
    if not (path / CONFIG).is_file():
        return
    if not (path / WEIGHTS).is_file():
        raise LoadingError(f"{path} holds an {CONFIG} and no {WEIGHTS}: others can run code")
    modules = {name.rpartition(".")[0] for name in weights}
    check_patterns(patterns_of(_config_in(path)), modules, path / CONFIG)


def base_of(path: Path) -> str:
    """The model that an adapter's directory names as its base.

    Raises:
        LoadingError: if it names none.
    """
    base = _config_in(path).get("base_model_name_or_path")
    if not base:
        raise LoadingError(
            f"{path / CONFIG} does not say what the adapter is for: pass the model and adapter="
        )
    return base


def read_adapter(path: str | Path) -> Adapter:
    """The adapter in a peft directory, in float32 or better (as peft holds it).

    Raises:
        LoadingError: not an adapter, another kind than LoRA, a variant that is not implemented, or
            tensors that do not go together.
    """
    path = Path(path)
    check_directory(path)
    config = _config_in(path)
    halves, saved = _sorted(_tensors_in(path))
    check_patterns(patterns_of(config), halves, path / CONFIG)
    low_rank = {}
    for module, (down, up) in halves.items():
        low_rank[module] = LowRank(down, up, _scale(config, module, len(down)), _dropout(config))
    return Adapter(low_rank, saved, targets=_targets(config))


def check_directory(path: Path) -> None:
    """Raise unless the adapter in a directory is of a kind that is implemented.

    Raises:
        LoadingError: not an adapter, another kind than LoRA, or a variant that is not implemented.
    """
    config, source = _config_in(path), str(path / CONFIG)
    check_variant(config, source)
    start = config.get("init_lora_weights", True)
    if start not in _KEEPS_BASE:
        raise LoadingError(
            f"the adapter began with init_lora_weights={start!r}, which also changes the base "
            "model: save it with path_initial_model_for_weight_conversion"
        )


def _config_in(path: Path) -> dict[str, Any]:
    if not (path / CONFIG).is_file():
        inside = sorted(found.parent.name for found in path.glob(f"*/{CONFIG}"))
        hint = f" (those in it do: {', '.join(inside)})" if inside else ""
        raise LoadingError(f"{path} is no adapter: it holds no {CONFIG}{hint}")
    return read_json(path / CONFIG)


def _tensors_in(path: Path) -> dict[str, Tensor]:
    if not (path / WEIGHTS).is_file():
        raise LoadingError(
            f"{path} holds no {WEIGHTS}: save the adapter with safe_serialization=True"
        )
    return read_weights(path / WEIGHTS)


def _sorted(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Pairs of A and B by module, and all other tensors by the names the model gives them."""
    found: dict[str, dict[str, Tensor]] = {}
    saved = {}
    for key, tensor in tensors.items():
        key = key.removeprefix("base_model.model.")
        match = re.fullmatch(r"(.+)\.lora_(A|B)\.weight", key)
        if match and tensor.ndim == 2:
            precise = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            found.setdefault(match[1], {})[match[2]] = precise
        elif ".lora_" in key:
            kinds = [kind for piece, kind in _NOT_IMPLEMENTED.items() if piece in key]
            of = f"adapters of {kinds[0]} are" if kinds else "this part of the adapter is"
            raise LoadingError(f"{of} not implemented: {key}")
        elif ".original_module." not in key:  # which nothing reads while the adapter is on
            saved[_INNER.sub(".", key)] = tensor
    halved = [module for module, pair in found.items() if len(pair) != 2]
    if halved or not found:
        raise LoadingError(
            f"the adapter holds only one of lora_A and lora_B of {', '.join(halved[:5])}"
            if halved
            else "the adapter holds no lora_A and lora_B at all"
        )
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}, saved


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config["lora_alpha"]
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = own
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _dropout(config: Mapping[str, Any]) -> float:
    return float(config.get("lora_dropout") or 0.0)


def check_variant(config: Mapping[str, Any], source: str) -> None:
    """Raise on any switch whose effect is not implemented.

    Raises:
        LoadingError: another kind than LoRA, or switches by their names.
    """
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind != "LORA":
        raise LoadingError(f"{source} is of kind {kind!r}; only LoRA adapters are implemented")
    unknown = [key for key, value in config.items() if value and key not in (*_READ, *_HARMLESS)]
    if unknown:
        switches = ", ".join(f"{key}={config[key]!r}" for key in unknown)
        raise LoadingError(f"{source} asks for what is not implemented: {switches}")


def _targets(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The last pieces of the names of all modules that are adapted, where the config lists them."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") is not None:
        return ()
    return tuple(targets)
