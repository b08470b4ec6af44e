"""What copies on disk hold: what a thing is, and nothing that merely hangs on it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NoReturn

from torch import Tensor

from audio_lens.errors import AudioLensError


def alone(tensor: Tensor) -> Tensor:
    """The tensor without the rest of what its memory holds, which pickles would hold too."""
    held = tensor.untyped_storage().nbytes()
    return tensor.clone() if held > tensor.numel() * tensor.element_size() else tensor


def all_alone(fields: dict) -> dict:
    """Fields of an object with every tensor `alone`."""
    return {name: alone(x) if isinstance(x, Tensor) else x for name, x in fields.items()}


class NoModelError(AudioLensError, RuntimeError):
    """A saved cache was asked for what only its model knows."""


class NoModel:
    """Stands where a model stood when its cache was saved; whatever it is asked for raises."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what Python asks every object for
            raise AttributeError(name)
        raise NoModelError(
            f"a saved cache holds no model, and {name!r} is of the model: give it one, by "
            "cache.with_model(model)"
        )

    def __getitem__(self, place: Any) -> NoReturn:
        self.__getattr__("blocks")

    def __iter__(self) -> NoReturn:
        self.__getattr__("blocks")


class SavedShape(NoModel, SimpleNamespace):
    """What a saved cache knows of a part's configuration."""

    n_layers: int


@dataclass(frozen=True)
class SavedPart(NoModel):
    """What a saved cache knows of a part: what its activations are called."""

    name: str
    n_layers: int

    @property
    def cfg(self) -> Any:
        return SavedShape(n_layers=self.n_layers)

    @property
    def module(self) -> Any:
        return NoModel()

    @property
    def blocks(self) -> Any:
        return NoModel()

    def owns(self, name: str) -> bool:
        return name.startswith(f"{self.name}.")

    def local(self, name: str) -> str:
        return name.removeprefix(f"{self.name}.")
