"""The tuned lens: an affine translator for each stream, into the basis of the last one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from audio_lens import files
from audio_lens.digests import of_state
from audio_lens.inputs import InputError
from audio_lens.models import HookedAudioTransformer

FORMAT = "audio_lens tuned lens"


@dataclass(frozen=True, eq=False)
class TunedLens:
    """Translators of residual streams: ``h + h @ weight + bias``, for each stream its own.

    The last stream stays as it is.

    Attributes:
        weight, bias: of all streams but the last.
        model: the name of the model that they are of.
        weights: a hash of its weights.
        meta: how it was trained, in words.
    """

    weight: Float[Tensor, "early d d"] = field(repr=False)
    bias: Float[Tensor, "early d"] = field(repr=False)
    model: str
    weights: str
    meta: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(
        model: HookedAudioTransformer,
        weight: Float[Tensor, "early d d"],
        bias: Float[Tensor, "early d"],
        **meta: str,
    ) -> TunedLens:
        """Translators of a model as it is now."""
        weight, bias = weight.contiguous(), bias.contiguous()
        return TunedLens(weight, bias, model.cfg.model_name, of_state(model), meta)

    def __call__(self, resid: Float[Tensor, "streams n d"]) -> Float[Tensor, "streams n d"]:
        """The streams in the basis of the last one, which is handed on as it is."""
        early, last = resid[:-1], resid[-1:]
        return torch.cat([translated(early, self.weight, self.bias), last])

    def check(self, model: HookedAudioTransformer) -> None:
        """Raise unless it was trained on this model.

        Raises:
            InputError: another model, other weights, or another dtype.
        """
        if self.weights != of_state(model):
            raise InputError(
                f"this tuned lens is of {self.model} with other weights (or another dtype) than "
                f"{model.cfg.model_name} has: train one for it"
            )

    def save(self, path: str | Path) -> Path:
        """Write it as safetensors; an old file stays until the new one is whole.

        Raises:
            OutputError: a path that cannot be written.
        """
        told = {"model": self.model, "weights": self.weights, "meta": json.dumps(self.meta)}
        tensors = {"weight": self.weight.cpu(), "bias": self.bias.cpu()}
        return files.write(path, safetensors.torch.save(tensors, {"format": FORMAT, **told}))

    @staticmethod
    def load(path: str | Path) -> TunedLens:
        """What `save` wrote.

        Raises:
            InputError: a file that is missing, or holds something else.
        """
        try:
            with safe_open(str(path), "pt") as file:
                told: dict[str, Any] = file.metadata() or {}
                if told.get("format") != FORMAT:
                    raise InputError(f"{path} holds no tuned lens")
                weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
                return TunedLens(
                    weight, bias, told["model"], told["weights"], json.loads(told["meta"])
                )
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path} holds no tuned lens: {error}") from error


def translated(
    early: Float[Tensor, "early n d"], weight: Float[Tensor, "early d d"], bias: Tensor
) -> Float[Tensor, "early n d"]:
    """Every stream through its own translator."""
    return early + torch.baddbmm(bias.to(early)[:, None], early, weight.to(early))
