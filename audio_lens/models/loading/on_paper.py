"""Models by their configs alone: for plans of what they would cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from audio_lens.models.config import LoadingError
from audio_lens.models.loading import checkpoints
from audio_lens.models.loading.stored import told_of
from audio_lens.models.registry import Family, family_of


def on_paper(name: str | Path, dtype: torch.dtype | None = None) -> Family:
    """The model of a config, without weights: it prepares inputs and is planned with, but never
    runs.

    Args:
        name: as ``from_pretrained`` takes it; of a directory the config and the processor are read,
            and weights need not be there.
        dtype: of the weights; None is float32.

    Raises:
        LoadingError: no such directory, or a model that is not implemented.
    """
    is_shipped = name == checkpoints.EMBEDDED
    source = str(checkpoints.embedded_path()) if is_shipped else str(name)
    if checkpoints._looks_like_path(source) and not Path(source, "config.json").is_file():
        raise LoadingError(f"{source} holds no config.json")
    config = checkpoints._config(source)
    with told_of(f"{source}/config.json"):
        family = family_of(config, Family)
        named = checkpoints._named(config, checkpoints._hf_class(family, config))
        cfg = family.config_from_hf(named)
    with torch.device("meta"):
        model: Any = family(cfg)
    model = model.to(dtype or torch.float32)
    processor, problem = checkpoints.processor_of(source)
    with told_of(source):
        model.take_special_tokens(config)
        checkpoints._attach(model, processor)
    model.tokenizer_problem = model.tokenizer_problem or problem
    model.__class__ = type(family.__name__, (family,), {"device_of": _hears_on_cpu})
    return model


def _hears_on_cpu(self: Any, part: str) -> torch.device:
    """Where inputs go: they have numbers, though the weights have none."""
    return torch.device("cpu")
