"""Models by their configs alone: for plans of what they would cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from audio_lens.models.config import AudioConfig, LoadingError
from audio_lens.models.layers import PartConfig
from audio_lens.models.loading import checkpoints
from audio_lens.models.loading.stored import told_of
from audio_lens.models.registry import Family, family_of

WIDTH, HEAD = 32, 8  # of a stand-in's streams and MLPs, and of its heads
SPREAD = 0.05  # of its weights


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
    model: Any = _made(name, "meta", lambda cfg: cfg).to(dtype or torch.float32)
    model.__class__ = type(type(model).__name__, (type(model),), {"device_of": _hears_on_cpu})
    return model


def stand_in(name: str | Path) -> Family:
    """A model of a config's blocks and heads that runs anywhere, since its streams are narrow.

    It hears, asks and answers as many tokens as the model would, through as many blocks, so that
    what a method runs can be counted; its weights are random, and its answers mean nothing.

    Args:
        name: as `on_paper` takes it.

    Raises:
        LoadingError: as `on_paper`, and a model that cannot be made narrow.
    """
    try:
        model = _made(name, "cpu", _narrow)
    except (ValueError, RuntimeError, TypeError) as error:
        if isinstance(error, LoadingError):
            raise
        raise LoadingError(f"{name} cannot be made narrow: {error}") from error
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for place, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=SPREAD, generator=generator)
            else:
                weight.fill_(0.0 if place.endswith("bias") else 1.0)
    return model.eval().requires_grad_(False)


def _made(
    name: str | Path, device: str, shaped: Callable[[AudioConfig], AudioConfig]
) -> Family | Any:
    """The model of a config as shaped, with its processor."""
    is_shipped = name == checkpoints.EMBEDDED
    source = str(checkpoints.embedded_path()) if is_shipped else str(name)
    if checkpoints._looks_like_path(source) and not Path(source, "config.json").is_file():
        raise LoadingError(f"{source} holds no config.json")
    config = checkpoints._config(source)
    with told_of(f"{source}/config.json"):
        family = family_of(config, Family)
        named = checkpoints._named(config, checkpoints._hf_class(family, config))
        cfg = shaped(family.config_from_hf(named))
    with torch.device(device):
        model: Any = family(cfg)
    processor, problem = checkpoints.processor_of(source)
    with told_of(source):
        model.take_special_tokens(config)
        checkpoints._attach(model, processor)
    model.tokenizer_problem = model.tokenizer_problem or problem
    return model


def _narrow(cfg: AudioConfig) -> AudioConfig:
    """The same blocks and heads, all of them narrow."""
    parts = {
        name: None if part is None else _narrowed(part)
        for name, part in {"encoder": cfg.encoder, "decoder": cfg.decoder}.items()
    }
    ears = {name: _narrowed(part) for name, part in cfg.ears.items()}
    further = {name: _narrowed(part) for name, part in cfg.further_decoders.items()}
    return replace(cfg, **parts, ears=ears, further_decoders=further)


def _narrowed(part: PartConfig) -> PartConfig:
    turned = part.rotary_frequencies
    return replace(
        part,
        d_model=WIDTH,
        d_mlp=WIDTH,
        d_head=HEAD,
        rotary_dim=None if part.rotary_dim is None else min(part.rotary_dim, HEAD),
        rotary_frequencies=None if turned is None else turned[: HEAD // 2],
    )


def _hears_on_cpu(self: Any, part: str) -> torch.device:
    """Where inputs go: they have numbers, though the weights have none."""
    return torch.device("cpu")
