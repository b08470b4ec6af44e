"""LoRA adapters as peft keeps them: directories, and models in memory.

Directories are read without peft. Everything is checked against what is implemented: a switch of
the config that would change what the adapter computes is refused by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

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
_KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")  # starts that leave the base as it was


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
    config = _config_in(path)
    _check(config, str(path / CONFIG))
    if config.get("init_lora_weights", True) not in _KEEPS_BASE:
        raise LoadingError(
            f"the adapter began with init_lora_weights={config['init_lora_weights']!r}, which also "
            "changes the base model: save it with path_initial_model_for_weight_conversion"
        )
    halves, saved = _sorted(_tensors_in(path))
    check_patterns(patterns_of(config), halves, path / CONFIG)
    low_rank = {}
    for module, (down, up) in halves.items():
        low_rank[module] = LowRank(down, up, _scale(config, module, len(down)), _dropout(config))
    return Adapter(low_rank, saved, targets=_targets(config))


def _config_in(path: Path) -> dict[str, Any]:
    if not (path / CONFIG).is_file():
        raise LoadingError(f"{path} is no adapter: it holds no {CONFIG}")
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
    """Pairs of A and B by module, and all other tensors."""
    found: dict[str, dict[str, Tensor]] = {}
    saved = {}
    for key, tensor in tensors.items():
        key = key.removeprefix("base_model.model.")
        match = re.fullmatch(r"(.+)\.lora_(A|B)\.weight", key)
        if match and tensor.ndim == 2:
            precise = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            found.setdefault(match[1], {})[match[2]] = precise
        elif ".lora_" in key:
            raise LoadingError(f"this part of the adapter is not implemented: {key}")
        else:
            saved[key] = tensor
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


def _check(config: Mapping[str, Any], source: str) -> None:
    """Raise on any switch whose effect is not implemented."""
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


# -------------------------------------------------------------------------------- in memory


@contextmanager
def refusal_told() -> Iterator[None]:
    """Raise what transformers says against the installed peft as an error that says what to do.

    Raises:
        LoadingError: in place of the ImportError or ValueError about peft.
    """
    try:
        yield
    except (ImportError, ValueError) as error:
        if not re.search(r"\bPEFT\b|'peft\b", str(error)):
            raise
        raise LoadingError(
            f"transformers {transformers.__version__} reads no adapters with the peft that is "
            "installed: pip install --upgrade 'audio_lens[lora]' brings versions that go together "
            f"(transformers says: {str(error).splitlines()[0]})"
        ) from error


def is_adapted(hf_model: nn.Module) -> bool:
    """Whether peft has put adapters into a model."""
    return any(hasattr(module, "base_layer") for module in hf_model.modules())


def taken_apart(hf_model: Any) -> tuple[nn.Module, dict[str, Tensor], Adapter]:
    """A model that carries a live adapter, as the model, its own weights and the adapter.

    All tensors are shared, none is copied.

    Raises:
        LoadingError: several active adapters, one that was merged in place, another kind than
            LoRA, or a variant that is not implemented.
    """
    base = hf_model.get_base_model() if hasattr(hf_model, "get_base_model") else hf_model
    name = _active(hf_model)
    _check(hf_model.peft_config[name].to_dict(), f"the adapter {name!r}")
    low_rank, enabled = {}, True
    for path, layer in base.named_modules():
        if hasattr(layer, "lora_A") and name in layer.lora_A:
            if layer.merged:
                raise LoadingError("the adapter is merged in place: call unmerge_adapter() first")
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            if down.ndim != 2:
                raise LoadingError(f"adapters of convolutions are not implemented: {path}")
            dropout = getattr(layer.lora_dropout[name], "p", 0.0)
            low_rank[path] = LowRank(down, up, float(layer.scaling[name]), dropout)
            enabled = enabled and not layer.disable_adapters
    state, saved = {}, {}
    for key, tensor in base.state_dict().items():
        if not re.search(r"\.lora_[AB]\.", key):
            own = key.replace(f".modules_to_save.{name}.", ".")
            holder = state if own == key else saved
            holder[own.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    return base, state, Adapter(low_rank, saved, enabled)


def _active(hf_model: Any) -> str:
    """The one adapter that is active."""
    with refusal_told():
        active = hf_model.active_adapters
        names = active if isinstance(active, Sequence) else active()
    if len(names) != 1:
        raise LoadingError(
            f"{len(names)} adapters are active ({', '.join(names)}): set_adapter(one of them)"
        )
    return names[0]
