"""Tiny models of every family, and pairs of batches that sweeps of them are tried on."""

from __future__ import annotations

import functools
from typing import Any

import torch

from audio_lens import HookedAudioTransformer
from audio_lens.models.layers import Attention, RMSNorm
from audio_lens.patching import Site, sites_of
from families import FAMILIES
from families.base import AUDIO_TOKEN, length_mask

FRAMES = 14  # encoder positions, of which the longest clip fills 12
ENDING = (7, 8)  # tokens that prompts without padding at their end end with
SMALL = {  # overrides of models
    "whisper": {"max_source_positions": FRAMES, "encoder_ffn_dim": 6, "decoder_ffn_dim": 6},
    "qwen2_audio": {"max_source_positions": FRAMES, "encoder_ffn_dim": 6, "intermediate_size": 6},
}
LAYOUTS = {
    "right": {"lengths": (23, 14), "words": (6, 4), "padding": "right"},
    "left": {"lengths": (23, 14), "words": (6, 4), "padding": "left"},
    "one": {"lengths": (23,), "words": (5,)},
    "clips": {"lengths": ((15, 10), 11), "words": (6, 4), "padding": "left"},
}
LAYOUTS_OF = {"whisper": ("right", "left", "one"), "qwen2_audio": tuple(LAYOUTS)}
THOROUGH = tuple(LAYOUTS_OF)  # the others share what these try in more ways
EVERY_NTH = 6  # site of a family is tried, where tests are quick


@functools.cache
def tiny_model(name: str, dtype: torch.dtype = torch.float64) -> HookedAudioTransformer:
    """Of three layers a part; 0.28 s of audio and 6 neurons where the family is tried in depth.

    In float64 all of its attention and norms are: a softmax in float32 rounds otherwise for every
    number of keys, and engine and loop do not meet the same number; a norm in float32 makes errors
    of its own size of their last bits.
    """
    model = FAMILIES[name].hooked(FAMILIES[name].build(dtype=dtype, **SMALL.get(name, {})))
    for module in model.modules() if dtype == torch.float64 else ():
        if isinstance(module, Attention):
            module.softmax_float32 = False
        if isinstance(module, RMSNorm):
            module.precision = torch.float64
    return model


@functools.cache
def layouts_of(name: str) -> tuple[str, ...]:
    """Names of batches: other numbers of prompts and clips, lengths and paddings.

    Those in which every part has a position that holds something.
    """
    known = LAYOUTS_OF.get(name) or tuple(FAMILIES[name].batches)
    return tuple(layout for layout in known if is_heard(name, layout))


def is_heard(name: str, layout: str) -> bool:
    """Whether clips of a layout are long enough for a position of every part."""
    rows = tiny_model(name).timeline(batch(name, 0, layout)).rows
    parts = [[t for row in rows for t in row.tracks[part]] for part in rows[0].tracks]
    return all(any(track.valid.any() for track in tracks) for tracks in parts)


def usual_layout(name: str) -> str:
    """The layout of tests that try just one."""
    return "left" if name in THOROUGH else layouts_of(name)[0]


def batch(name: str, seed: int, layout: str | None = None, dtype=torch.float64) -> dict:
    """One run's inputs; runs of one layout correspond and differ in audio and words."""
    layout = layout or usual_layout(name)
    options = FAMILIES[name].batches[layout] if name not in THOROUGH else LAYOUTS[layout]
    width = {"n_frames": 2 * FRAMES} if name in THOROUGH else {}
    made = FAMILIES[name].batch(seed=seed, dtype=dtype, **options, **width)
    if name == "whisper":
        made["attention_mask"] = length_mask(options["lengths"], 2 * FRAMES)
    if ends_in_words(made):
        made[text_keys(made)[0]][:, -2:] = torch.tensor(ENDING)
    return made


def text_keys(made: dict) -> tuple[str | None, str]:
    """Names of the tokens and their mask in a batch; None where there are no tokens."""
    if "decoder_input_ids" in made:
        return "decoder_input_ids", "decoder_attention_mask"
    return ("input_ids" if "input_ids" in made else None), "attention_mask"


def ends_in_words(made: dict) -> bool:
    """Whether every prompt ends with three attended words or more."""
    key, mask = text_keys(made)
    if key is None:
        return False
    ends, attended = made[key][:, -3:], made[mask][:, -3:]
    return bool(attended.all() and (ends != AUDIO_TOKEN).all() and ends.shape[1] == 3)


def pair(name: str, layout: str | None = None, same_text: bool = True, **options: Any) -> dict:
    """A clean and a corrupted run; with the same text, they differ in their audio alone."""
    clean, corrupted = (batch(name, seed, layout, **options) for seed in (0, 100))
    if same_text:
        model = tiny_model(name)
        heard = (model.features_key, *model.cfg.ears)
        corrupted = {**clean, **{key: corrupted[key] for key in heard}}
    return {"clean": clean, "corrupted": corrupted}


SITES = [(name, site) for name in FAMILIES for site in sites_of(tiny_model(name))]


def spread(turn: int) -> list[tuple[str, Site]]:
    """A few sites of every family, other ones of each and for each turn, all sites together."""
    found = []
    for number, name in enumerate(FAMILIES):
        own = [(name, site) for of, site in SITES if of == name]
        found += own if name in THOROUGH else own[(number + turn) % EVERY_NTH :: EVERY_NTH]
    return found


def has_time(family: str, site: Site, layout: str | None = None) -> bool:
    """Whether the site's positions lie in time."""
    return tiny_model(family).timeline(batch(family, 0, layout)).has_time(site.positions_of)


def all_logits(logits):
    """A metric of many directions at once: all logits of all positions along one unit vector."""
    weights = torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype).cos()
    return logits.flatten(1) @ (weights / weights.norm())
