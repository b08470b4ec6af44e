"""What the mixins count on: the parts of a model and how they run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.hooks import HookPoint
from audio_lens.inputs import AudioInputs
from audio_lens.models.layers import KVCache, Stack
from audio_lens.models.registry import Family
from audio_lens.timeline import Timeline


class Host(Family, ABC):
    """A model as its mixins see it; `HookedAudioTransformer` is one.

    Families define `inputs_from_mapping` and `timeline`.

    Attributes:
        encoder, decoder: where the config has one.
        hook_logits: where there is a head.
    """

    encoder: Stack
    decoder: Stack
    hook_logits: HookPoint

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where inputs go and the output comes from."""

    @abstractmethod
    def load_audio(self, source: Any, sampling_rate: int | None) -> Float[Any, " samples"]:
        """One clip, mono at the model's rate, checked to fit the model."""

    @abstractmethod
    def inputs_from_mapping(self, mapping: Mapping[str, Any]) -> AudioInputs:
        """Inputs from what a Hugging Face processor returns."""

    @abstractmethod
    def timeline(self, inputs: AudioInputs | Mapping[str, Any]) -> Timeline:
        """Where each position of each part lies in seconds."""

    @abstractmethod
    def check_encoded(self, inputs: AudioInputs, encoded: Tensor) -> None:
        """Raise unless what an encoder gave is of these inputs."""

    @abstractmethod
    def encode(
        self,
        inputs: AudioInputs,
        resid: Float[Tensor, "segments frames d"] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor | None:
        """What the decoder receives of the audio; with ``stop``, the residual entering that block.

        ``resid`` is the residual stream entering block ``start``; None starts from the features.
        Without an encoder it is None.
        """

    @abstractmethod
    def hear(
        self, inputs: AudioInputs, resid: Tensor | None, start: int, stop: int | None
    ) -> Tensor | None:
        """`encode` of inputs that hold audio, row by row as they are."""

    @abstractmethod
    def decode(
        self,
        inputs: AudioInputs,
        encoded: Tensor | None,
        resid: Float[Tensor, "b t d"] | None = None,
        start: int = 0,
        stop: int | None = None,
        past: KVCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        """The final hidden states; with ``stop``, the residual stream entering that block."""
