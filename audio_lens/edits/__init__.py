"""Edits: one language of interventions, in force in whatever runs the model."""

from audio_lens.edits.attention import Bias, Block, Multiply, Sharpen, Weights
from audio_lens.edits.do import (
    Add,
    Do,
    Erase,
    Latents,
    Mix,
    Project,
    Put,
    Reconstruct,
    Scale,
    Swap,
)
from audio_lens.edits.edit import Edit, intervene
from audio_lens.edits.enrich import Enrich
from audio_lens.edits.written import from_dict, load, save, to_dict

__all__ = [
    "Add",
    "Bias",
    "Block",
    "Do",
    "Edit",
    "Enrich",
    "Erase",
    "Latents",
    "Mix",
    "Multiply",
    "Project",
    "Put",
    "Reconstruct",
    "Scale",
    "Sharpen",
    "Swap",
    "Weights",
    "from_dict",
    "intervene",
    "load",
    "save",
    "to_dict",
]
