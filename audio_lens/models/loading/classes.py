"""Which class of transformers a checkpoint or a model in memory is of, and whether it is known."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from audio_lens.models.config import LoadingError
from audio_lens.models.registry import Family, classes_of


def model_type(class_name: str) -> str:
    """The ``model_type`` of the configs of a class of transformers; empty where it has several."""
    hf_config = getattr(transformers, class_name).config_class
    return getattr(hf_config, "model_type", "")


def class_of(hf_model: nn.Module) -> type:
    """The class of transformers that a model is of, or is a subclass of."""
    kinds = type(hf_model).__mro__
    return next((kind for kind in kinds if kind.__module__.startswith("transformers.")), kinds[0])


def check_class(family: type[Family], hf_model: transformers.PreTrainedModel) -> None:
    """Raise on a model whose head is not implemented, or that is a part of a whole.

    Raises:
        LoadingError: naming its class and those that are.
    """
    kind, own = hf_model.config.model_type, class_of(hf_model).__name__
    known = classes_of(kind)
    if known and own not in (*known, family.bare_class):
        kinds = [name for name in known if model_type(name) == kind]
        raise LoadingError(f"a {own} is not implemented; implemented: {', '.join(kinds or known)}")


def check_named(hf_config: Any, hf_class: str) -> None:
    """Raise on a checkpoint that names another head of transformers for the same config.

    Raises:
        LoadingError: naming its class and those that are implemented.
    """
    kind, named = model_type(hf_class), list(hf_config.architectures or ())
    heads = [n for n in named if "For" in n and n != hf_class and hasattr(transformers, n)]
    if named and len(heads) == len(named) and all(model_type(name) == kind for name in heads):
        raise LoadingError(
            f"this {kind} checkpoint is a {', '.join(named)}; implemented: "
            + ", ".join(classes_of(kind))
        )
