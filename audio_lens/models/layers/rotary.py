"""Rotary positions."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from audio_lens.models.layers.config import PartConfig, needed

Angles = tuple[Float[Tensor, "#b t turn"], Float[Tensor, "#b t turn"]]


class Rotary(nn.Module):
    """Rotary positions, half-split; angles in float32 as in Hugging Face.

    Where only part of a head turns, ``turn`` is that part: its leading dimensions.
    """

    def __init__(self, cfg: PartConfig):
        super().__init__()
        self.cfg = cfg

    def _frequencies(self, device: torch.device) -> Float[Tensor, " half"]:
        if self.cfg.rotary_frequencies is not None:
            return torch.tensor(self.cfg.rotary_frequencies, device=device)
        n_dims = self.cfg.rotary_dim or self.cfg.d_head
        steps = torch.arange(0, n_dims, 2, device=device, dtype=torch.float)
        base = needed(self.cfg.rotary_base, "no rotary positions: rotary_base is None")
        return 1.0 / base ** (steps / n_dims)

    def forward(self, positions: Int[Tensor, "#b t"], dtype: torch.dtype) -> Angles:
        """Cosines and sines of the positions."""
        angles = positions[..., None].float() * self._frequencies(positions.device)
        angles = torch.cat([angles, angles], dim=-1)
        factor = self.cfg.rotary_factor
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(x: Float[Tensor, "b t h e"], rotary: Angles | None) -> Float[Tensor, "b t h e"]:
    """Turn queries or keys by their positions; without rotary positions they stay as they are."""
    if rotary is None:
        return x
    cos, sin = (angle[:, :, None, :] for angle in rotary)
    n_dims = cos.shape[-1]
    turning, rest = x[..., :n_dims], x[..., n_dims:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat([-second, first], dim=-1) * sin
    return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], dim=-1)
