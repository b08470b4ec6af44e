"""What can be told of an encoder on which a model can be put together: `Ear`."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from audio_lens.models.base import HookedAudioTransformer
from audio_lens.timeline import Track


class Ear(HookedAudioTransformer):
    """Positions of an encoder by the length of what it hears; mixed into models.

    Attributes:
        lends_encoder: whether `compose` can take the encoder out of the model.
    """

    lends_encoder: ClassVar[bool] = False

    @abstractmethod
    def frame_count(self, n_valid: int) -> int:
        """Encoder positions of a segment with so many valid feature steps."""

    @abstractmethod
    def frame_seconds(self, count: int) -> Float[Tensor, " t"]:
        """Centres of a segment's encoder positions in seconds from its start."""

    def encoder_track(self, length: int, n_valid: int, clip: int, start_s: float | int) -> Track:
        """Where the encoder's positions of a segment lie that has so many valid feature steps."""
        heard = min(length, self.frame_count(n_valid))
        return Track.of_segment(self.frame_seconds(length), heard, clip, start_s)
