"""Turning latents up and down while the model runs; what is not reconstructed stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import edits
from audio_lens.analysis.autoencoders.autoencoder import Autoencoder
from audio_lens.analysis.autoencoders.splicing import place_of
from audio_lens.arguments import number
from audio_lens.edits import Edit
from audio_lens.edits.edit import When
from audio_lens.edits.written import writable
from audio_lens.errors import InputError
from audio_lens.places import Where

MODES = ("zero", "negate", "clamp", "scale")
ALPHA = 1.0  # of "negate", where none is named


@writable
@dataclass(frozen=True, eq=False)
class Change:
    """A change of some latents.

    Attributes:
        latents: which.
        mode: "zero" turns them off; "negate" makes them -value times what they are; "clamp" sets
            them to the value; "scale" multiplies by it.
        value: one number, or one for each latent.
    """

    latents: list[int]
    mode: str
    value: float | int | Float[Tensor, " n"] | None = None

    def __call__(self, latents: Float[Tensor, "*b m"]) -> Float[Tensor, "*b m"]:
        now = latents[..., self.latents]
        value = torch.as_tensor(0.0 if self.value is None else self.value).to(latents)
        made = {
            "zero": lambda: torch.zeros_like(now),
            "negate": lambda: -value * now,
            "clamp": lambda: value.expand_as(now),
            "scale": lambda: value * now,
        }[self.mode]()
        return latents.index_copy(-1, torch.tensor(self.latents, device=latents.device), made)


def steering(
    autoencoder: Autoencoder,
    latents: Any,
    mode: str = "clamp",
    value: float | int | Float[Tensor, " n"] | None = None,
    *,
    site: str | None = None,
    layer: int | None = None,
    where: Where = "audio",
    when: When = "both",
) -> Edit:
    """An edit that turns latents off, round, up or down; it is written to files as others are.

    The activation becomes ``x + (f' - f) @ directions``: what the autoencoder does not reconstruct
    stays (METHODS of AudioSAE, 2602.05027).

    Args:
        autoencoder: whose latents.
        latents: their numbers.
        mode: "zero", "negate" (suppression beyond 0; ``value`` is α, 1 if None), "clamp" (sets to
            ``value``) or "scale" (multiplies by ``value``).
        value: one number, or one for each latent, in the units of the activations.
        site, layer: None takes the autoencoder's own.
        where, when: as of `Edit`.

    Raises:
        InputError: latents that are not there, another mode, or a value that is missing, has
            nothing to do, or changes nothing.
    """
    chosen = autoencoder.of(latents)
    if mode not in MODES:
        raise InputError(f"mode is one of {', '.join(MODES)}, got {mode!r}")
    value = _checked(mode, value, len(chosen))
    site, layer = place_of(autoencoder, site, layer)
    do = edits.Latents(autoencoder, Change(chosen, mode, value))
    return Edit(site, do, layer=layer, where=where, when=when)


def _checked(mode: str, value: Any, count: int) -> Any:
    if mode == "zero" and value is not None:
        raise InputError("mode 'zero' takes no value: it turns latents off")
    if mode == "negate" and value is None:
        return ALPHA
    if mode in ("clamp", "scale") and value is None:
        raise InputError(f"mode {mode!r} needs a value")
    if isinstance(value, Tensor) and value.ndim:
        if value.shape != (count,) or not bool(value.isfinite().all()):
            raise InputError(f"{count} latents take one finite number, or one each, got {value}")
        return value.detach().cpu()
    if value is None:
        return None
    value = float(number("value", value.item() if isinstance(value, Tensor) else value))
    if mode == "scale" and value == 1:
        raise InputError("mode 'scale' by 1 changes nothing")
    return value
