"""Models in memory that carry adapters of peft: the model, and its active adapter beside it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.utils.import_utils import is_peft_available
from transformers.utils.peft_utils import find_adapter_config_file

from audio_lens.models.config import LoadingError
from audio_lens.models.loading.adapters import Adapter, check_directory, check_variant
from audio_lens.models.loading.lora import LowRank

_log = logging.getLogger(__name__)
_INNER = ("base_layer", "original_module", "token_adapter")  # where peft keeps the model's own
_WHOLE = "modules_to_save"  # what stands in place of them, by adapter


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


@contextmanager
def beside_told(source: str) -> Iterator[None]:
    """Read a model inside, knowing of the adapter that may lie beside it, which transformers reads.

    Without peft it would leave the adapter out without a word.

    Args:
        source: a hub id, or the directory of a model.

    Raises:
        LoadingError: no peft, another kind than LoRA, a variant that is not implemented, or an
            adapter that transformers cannot read there.
    """
    found = find_adapter_config_file(source)
    apart = "move its files into a directory of their own, and pass that as adapter="
    if found is not None:
        check_directory(Path(found).parent)
        if not is_peft_available():
            raise LoadingError(
                f"an adapter lies beside the model in {source}, and reading it there takes peft: "
                f"pip install 'audio_lens[lora]' (or {apart})"
            )
    try:
        with refusal_told():
            yield
    except (ValueError, LookupError) as error:
        if found is None or isinstance(error, LoadingError):
            raise
        raise LoadingError(
            f"transformers cannot read the adapter that lies beside the model in {source}: {apart} "
            f"(it says: {(str(error).splitlines() or [type(error).__name__])[0]})"
        ) from error


def is_adapted(hf_model: nn.Module) -> bool:
    """Whether peft has put adapters into a model, or wrapped it."""
    return hasattr(hf_model, "get_base_model") or bool(_wrappers(hf_model))


def taken_apart(hf_model: Any) -> tuple[nn.Module, dict[str, Tensor], Adapter | None]:
    """A model that carries adapters, as the model, its own weights and the active adapter.

    Adapters that are not active are left out; of a model whose adapters were all taken off again
    there is none. All tensors are shared, none is copied.

    Raises:
        LoadingError: several active adapters, or one here and another there; one that was merged in
            place or is switched off in places; another kind than LoRA, or a variant that is not
            implemented.
    """
    base = hf_model.get_base_model() if hasattr(hf_model, "get_base_model") else hf_model
    wrappers = _wrappers(base)
    if not wrappers and not getattr(hf_model, "prompt_encoder", None):
        return base, dict(base.state_dict()), None
    name = _active(hf_model)
    config = hf_model.peft_config[name].to_dict()
    check_variant(config, f"the adapter {name!r}")
    _check_active(wrappers, name)
    if config.get("bias", "none") != "none":
        _log.warning(
            "the adapter %r trained biases (bias=%r) in place of the model's own, which are lost "
            "in memory: switching the adapter off leaves them trained",
            name,
            config["bias"],
        )
    holders = {path: module for path, module in wrappers.items() if name in _held(module)}
    low_rank = {
        path: _low_rank(path, layer, name)
        for path, layer in holders.items()
        if "base_layer" in layer._modules
    }
    state, saved = _sorted(base.state_dict(), wrappers, name)
    return base, state, Adapter(low_rank, saved, _is_enabled(holders))


def _wrappers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that peft has put around others."""
    named = model.named_modules()
    return {path: m for path, m in named if any(inner in m._modules for inner in _INNER)}


def _active(hf_model: Any) -> str:
    """The one adapter that is active."""
    with refusal_told():
        active = hf_model.active_adapters
        names = [active] if isinstance(active, str) else active
        names = names if isinstance(names, Sequence) else names()
    if len(names) != 1:
        raise LoadingError(
            f"{len(names)} adapters are active ({', '.join(names)}): set_adapter(one of them)"
        )
    return names[0]


def _held(wrapper: nn.Module) -> set[str]:
    """The adapters that a wrapper holds something of."""
    inside = (child for key, child in wrapper._modules.items() if key not in _INNER)
    by_name = (child for child in inside if isinstance(child, nn.ModuleDict | nn.ParameterDict))
    return {name for child in by_name for name in child}


def _check_active(wrappers: Mapping[str, Any], name: str) -> None:
    """Raise unless every module computes with just this adapter, and beside its own weights."""
    for path, module in wrappers.items():
        held = _held(module)
        if getattr(module, "merged", False):
            raise LoadingError(
                f"an adapter is merged in place at {path}: call unmerge_adapter() first"
            )
        used = [one for one in module.active_adapters if one in held]
        if used != [one for one in (name,) if one in held]:
            raise LoadingError(
                f"{path} uses the adapter {', '.join(used) or 'of no name'}, and the model is set "
                f"to {name!r}: call the model's set_adapter({name!r})"
            )


def _is_enabled(holders: Mapping[str, Any]) -> bool:
    """Whether the adapter is switched on."""
    off = [path for path, module in holders.items() if module.disable_adapters]
    if off and len(off) < len(holders):
        raise LoadingError(f"the adapter is switched off in places: {', '.join(off[:5])}")
    return not off


def _low_rank(path: str, layer: Any, name: str) -> LowRank:
    """What an adapter adds to a linear map."""
    if name in getattr(layer, "lora_embedding_A", ()):
        raise LoadingError(f"adapters of embeddings are not implemented: {path}")
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    if down.ndim != 2:
        raise LoadingError(f"adapters of convolutions are not implemented: {path}")
    dropout = getattr(layer.lora_dropout[name], "p", 0.0)
    return LowRank(down, up, float(layer.scaling[name]), dropout)


def _sorted(
    tensors: Mapping[str, Tensor], wrappers: Mapping[str, nn.Module], name: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's own tensors and those an adapter puts in their place, by the model's names."""
    state, saved = {}, {}
    for key, tensor in tensors.items():
        own, is_saved = _own_name(key, wrappers, name)
        if own is not None:
            (saved if is_saved else state)[own] = tensor
    return state, saved


def _own_name(key: str, wrappers: Mapping[str, nn.Module], name: str) -> tuple[str | None, bool]:
    """The name of a tensor without peft's modules, and whether it is an adapter's.

    None stands for what an adapter adds, and for what belongs to another one.
    """
    pieces = key.split(".")
    kept, is_saved, index = [], False, 0
    while index < len(pieces):
        if ".".join(pieces[:index]) not in wrappers:
            kept.append(pieces[index])
        elif pieces[index : index + 2] == [_WHOLE, name]:
            is_saved, index = True, index + 1
        elif pieces[index] not in _INNER:
            return None, False
        index += 1
    return ".".join(kept), is_saved
