"""The attention under study, the places it is studied from and to, and other keys to compare with.

A place may differ by item: a function of the item, or a list with one for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.arguments import numbers
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.items import Batch, ControlError, Items
from audio_lens.items.collect import by_item
from audio_lens.items.controls import some_of
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Ground, Where, described
from audio_lens.sites import Site

RANDOM_KEYS, TEXT_KEYS, IDENTITY = "random_keys", "text_keys", "identity"


@dataclass(frozen=True)
class Attention:
    """The attention of one part: its own, or cross-attention.

    Attributes:
        name: ``part.attn`` or ``part.cross_attn``.
    """

    model: HookedAudioTransformer = field(repr=False)
    name: str

    @staticmethod
    def of(model: HookedAudioTransformer, name: str | None) -> Attention:
        """The attention of that name; None is the one by which the decoder reads audio.

        Raises:
            InputError: a model without a decoder, where no name is given.
            SiteError: a name that the model does not have.
        """
        if name is None:
            if model.cfg.decoder is None:
                raise InputError(
                    f"{model.cfg.family} has no decoder that attends to audio: name another "
                    'attention, such as attention="encoder.attn"'
                )
            name = "decoder.cross_attn" if model.decoder_needs_encoder else "decoder.attn"
        site = Site.parse(f"{name}.attn_scores", model)
        return Attention(model, f"{site.part}.{site.sublayer}")

    @property
    def part(self) -> str:
        return self.name.partition(".")[0]

    @property
    def is_cross(self) -> bool:
        """Whether its keys lie on the encoder's positions."""
        return self.name.endswith("cross_attn")

    @property
    def n_layers(self) -> int:
        return self.model.cfg.parts[self.part].n_layers

    @property
    def n_heads(self) -> int:
        return self.model.cfg.parts[self.part].n_heads

    def site(self, last: str) -> str:
        """One of its activations: "attn_scores", "pattern", "v" ..."""
        return f"{self.name}.{last}"

    def hook_name(self, last: str, layer: int) -> str:
        return Site.parse(self.site(last), self.model).hook_name(layer)

    def layers(self, asked: int | Sequence[int] | None, window: int = 1) -> list[int]:
        """The first blocks of windows that were asked for; None takes all that there are.

        Raises:
            InputError: a window that does not fit, or blocks that are not there.
        """
        return chosen("layers", asked, self.n_layers, window, f"blocks of the {self.part}")

    def heads(self, asked: int | Sequence[int] | None) -> list[int]:
        """The heads that were asked for; None takes all.

        Raises:
            InputError: heads that are not there.
        """
        return chosen("heads", asked, self.n_heads, 1, f"heads of {self.name}")

    def ground_of_queries(self, inputs: AudioInputs) -> Ground:
        """The positions that attend."""
        return Ground.of(self.model, inputs, self.part)

    def ground_of_keys(self, inputs: AudioInputs) -> Ground:
        """The positions that are attended to."""
        return Ground.of(self.model, inputs, "encoder" if self.is_cross else self.part)


def chosen(
    what: str, asked: int | Sequence[int] | None, count: int, window: int, of: str
) -> list[int]:
    """Numbers from 0 on that leave room for a window behind each.

    Raises:
        InputError: a window that does not fit, or numbers that are not there.
    """
    if not 1 <= window <= count:
        raise InputError(f"window lies in 1 to {count} {of}, got {window}")
    last = count - window
    if asked is None:
        return list(range(last + 1))
    listed = [int(one) for one in numbers(what, asked)]
    if not listed or len(set(listed)) < len(listed) or not all(0 <= n <= last for n in listed):
        raise InputError(f"{what} lie in 0 to {last} ({of}), each once; got {listed}")
    return listed


@dataclass(frozen=True)
class Spot:
    """A place, which may differ by item.

    Attributes:
        where: as it was given.
        places: one for each item; None where one serves all.
    """

    where: Any
    places: list[Where] | None

    @staticmethod
    def of(where: Any, items: Items) -> Spot:
        """The place in some items.

        Raises:
            InputError: a list of places for another number of items.
        """
        return Spot(where, by_item(where, items))

    def at(self, rows: Sequence[int]) -> Where:
        """The place in the items of a batch."""
        return self.where if self.places is None else [self.places[row] for row in rows]

    def __str__(self) -> str:
        where = self.where
        if isinstance(where, str):
            return where
        return "places by item" if self.places is not None else described(where)


def of_items(
    entries: Float[Tensor, " entries *cells"], ground: Ground, count: int
) -> Float[Tensor, " items *cells"]:
    """The mean over what a batch holds of every item: mostly one row, of cut clips several."""
    prompts = torch.tensor(ground.prompts)
    sums = entries.new_zeros(count, *entries.shape[1:]).index_add(0, prompts, entries)
    held = torch.bincount(prompts, minlength=count).to(entries)
    return sums / held.reshape(-1, *[1] * (entries.ndim - 1))


# -------------------------------------------------------------------------------- other keys


@dataclass(frozen=True)
class OtherKeys:
    """Draws keys to compare with.

    ``random_keys``: as many others of the same kind (audio, text, or any), fewer where there are
    fewer; where the keys are all there is of their kind, a random part of them, as many as there
    are text keys, but never more than half. ``text_keys``: as many of the text, or as many as
    there are. The first key, which causal queries would be deaf without, is never drawn, nor the
    last text, which asks.

    Attributes:
        counts: of every control, how many keys were drawn of how many that could be.
    """

    attention: Attention
    keys: Spot
    seed: int
    counts: dict[str, set[tuple[int, int]]] = field(default_factory=dict)

    def draw(self, control: str, batch: Batch) -> Bool[Tensor, "b t"]:
        """The keys of a control in a batch.

        Raises:
            ControlError: where there are none to draw from.
        """
        ground = self.attention.ground_of_keys(batch.inputs)
        keys = ground.held(self.keys.at(batch.rows))
        pool, counts = (self._text if control == TEXT_KEYS else self._alike)(ground, keys)
        for row in (counts < 1).nonzero()[:, 0].tolist():
            of = batch.rows[ground.prompts[row]]
            raise ControlError(f"{control}: no other keys to draw from in item number {of}")
        drawn = some_of(pool, counts, self.seed + batch.rows[0])
        told = zip(drawn.sum(1).tolist(), pool.sum(1).tolist(), strict=True)
        self.counts.setdefault(control, set()).update(told)
        return drawn

    def can_draw_text(self, batch: Batch) -> bool:
        """Whether text keys are something else than the keys, and there."""
        ground = self.attention.ground_of_keys(batch.inputs)
        keys = ground.held(self.keys.at(batch.rows))
        _, counts = self._text(ground, keys)
        return bool((keys & ground.is_audio).any() and (counts > 0).all())

    def are_others(self, batch: Batch) -> bool:
        """Whether there are others of the kind of the keys."""
        ground = self.attention.ground_of_keys(batch.inputs)
        keys = ground.held(self.keys.at(batch.rows))
        return not (self._alike(ground, keys)[0] & keys).any()

    def _text(self, ground: Ground, keys: Tensor) -> tuple[Tensor, Int[Tensor, " b"]]:
        text = ground.valid & ~ground.is_audio & ~keys
        pool = text & ~ground.mask("last") & ~self._first(ground)
        return pool, torch.minimum(keys.sum(1), pool.sum(1))

    def _alike(self, ground: Ground, keys: Tensor) -> tuple[Tensor, Int[Tensor, " b"]]:
        pools, counts = [], []
        n_text = self._text(ground, keys)[1]
        for row, own in enumerate(keys):
            kind = self._kind(ground, own, row) & ~self._first(ground)[row]
            others, count = kind & ~own, int(own.sum())
            if others.any():
                pools.append(others)
                counts.append(min(count, int(others.sum())))
            else:
                half = int((kind & own).sum()) // 2
                pools.append(kind & own)
                counts.append(min(half, int(n_text[row]) or half))
        return torch.stack(pools), torch.tensor(counts)

    @staticmethod
    def _kind(ground: Ground, keys: Bool[Tensor, " t"], row: int) -> Bool[Tensor, " t"]:
        """The positions of the kind that the keys are all of."""
        valid, audio = ground.valid[row], ground.is_audio[row]
        for kind in (audio, valid & ~audio):
            if not (keys & ~kind).any():
                return kind
        return valid

    def _first(self, ground: Ground) -> Bool[Tensor, "b t"]:
        """The first position of every row, where queries see no later ones."""
        return ground.valid & (ground.valid.cumsum(1) == 1) & (not self.attention.is_cross)

    def told(self, control: str) -> str:
        """How many keys a control had, in words."""
        drawn, pools = zip(*self.counts[control], strict=True)
        kind = "text keys" if control == TEXT_KEYS else "such keys"
        return f"{_between(drawn)} of {_between(pools)} {kind}"


def _between(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"
