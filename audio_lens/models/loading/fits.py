"""Whether a config and the weights beside it are of one model, before one of that size is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from audio_lens.models.config import LoadingError
from audio_lens.models.loading.stored import Header, told_of

_SLACK, _SMALL = 1.5, 2**22  # what tied, converted and computed tensors may add; numbers
UNQUANTISED = "packed weights cannot be hooked: load it in float16, bfloat16 or float32"
_PLAIN = ("F64", "F32", "F16", "BF16", "I64", "BOOL")  # how safetensors names what is not packed


def check_plain(stored: Mapping[str, Header], source: str) -> None:
    """Raise on files that hold packed numbers: transformers may take them for plain ones.

    Raises:
        LoadingError: naming the first tensor.
    """
    packed = [key for key, one in stored.items() if one.dtype not in _PLAIN]
    if packed:
        raise LoadingError(
            f"{source} is quantised ({packed[0]} is stored as {stored[packed[0]].dtype}); "
            f"{UNQUANTISED}"
        )


def check_fits(hf_class: Any, hf_config: Any, stored: Mapping[str, Header], source: str) -> None:
    """Raise if the model of a config is larger than the files of its weights can fill.

    Weights that are missing or of another shape are found when they are read, by name; but that
    builds the model first.

    Raises:
        LoadingError: naming what differs; or a config of which no model can be built.
    """
    with told_of(f"{source}/config.json"), torch.device("meta"):
        empty = _empty(hf_class, hf_config, source)
    described = sum(x.numel() for x in (*empty.parameters(), *empty.buffers()))
    held = sum(one.numel for one in stored.values())
    if described > _SLACK * held + _SMALL:
        raise LoadingError(
            f"{source}/config.json describes a model of {described:,} numbers, and the weights "
            f"beside it are {held:,}{_differences(empty, stored)}"
        )


def _empty(hf_class: Any, hf_config: Any, source: str) -> nn.Module:
    if hasattr(hf_class, "from_config"):  # one of transformers' Auto classes
        return hf_class.from_config(hf_config, trust_remote_code=False)
    kind = hf_class.config_class
    is_own = isinstance(hf_config, kind)  # and not that of a larger model it is a part of
    return hf_class(hf_config if is_own else kind.from_pretrained(source))


def _differences(empty: nn.Module, stored: Mapping[str, Header]) -> str:
    """Where a model and files differ, in words."""
    shapes = {name: tuple(x.shape) for name, x in empty.state_dict().items()}
    misfits = [
        f"{name} is {one.shape}, not {shapes[name]}"
        for name, one in stored.items()
        if name in shapes and one.shape != shapes[name]
    ]
    return f" ({'; '.join(misfits[:3])})" if misfits else ""
