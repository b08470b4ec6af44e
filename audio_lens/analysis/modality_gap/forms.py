"""The same words heard and read: prompts of both forms, and the states of what is said in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.errors import AudioLensError, InputError
from audio_lens.inputs import AudioInputs
from audio_lens.items import Batch, Item, ItemError, Items
from audio_lens.items.collect import Place, by_item
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import Ground, Words
from audio_lens.sites import Site, SiteError
from audio_lens.timeline import Span

TEMPLATE = "{words}\n{text}"
TRANSCRIPT = "transcript"
Said = str | Callable[[Item], str] | None


@dataclass(frozen=True)
class Spoken:
    """What is heard of an item.

    Attributes:
        states: of every layer.
        positions: in the prompt.
        seconds: in the clip.
    """

    states: Float[Tensor, "layers frames d"]
    positions: Int[Tensor, " frames"]
    seconds: Float[Tensor, " frames"]


@dataclass(frozen=True)
class Forms:
    """Items and the same in writing.

    Attributes:
        said: the words of every clip.
        prompts: the written form of every item: text alone.
        site: where states are taken, with layers.
        layers: its blocks.
        where: the place of the words in the spoken form.
    """

    model: HookedAudioTransformer
    items: Items
    said: list[str]
    prompts: list[str]
    site: Site
    layers: list[int]
    where: Place

    @staticmethod
    def of(
        model: HookedAudioTransformer,
        items: Items,
        words: Said,
        template: str,
        site: str,
        layers: Sequence[int] | None,
        where: Place = "audio",
    ) -> Forms:
        """Both forms of items.

        Raises:
            SiteError: a site or layer that is not there, or without vectors at the decoder's
                positions.
            InputError: a model that reads no text alone, or a template without {words}.
            ItemError: items without words.
        """
        parsed = Site.parse(site, model)
        if parsed.n_layers is None or parsed.reads_attention or parsed.positions_of != "decoder":
            raise SiteError(f"{parsed} holds no vectors at positions of the decoder, by block")
        if parsed.unit is not None:
            raise SiteError(f"{parsed} is split in {parsed.unit}s: choose a stream or its parts")
        if model.decoder_needs_encoder or model.cfg.output_kind != "tokens":
            raise InputError(
                f"{model.cfg.family} cannot be asked in writing: the gap is of models that read "
                "the same words as text"
            )
        there = range(parsed.n_layers)
        odd = [x for x in layers or [] if not -parsed.n_layers <= x < parsed.n_layers]
        if odd or (layers is not None and not len(layers)):
            raise SiteError(f"{parsed} has layers 0 to {parsed.n_layers - 1}, not {odd or 'none'}")
        chosen = list(there) if layers is None else sorted({there[x] for x in layers})
        if "{words}" not in template:
            raise InputError(f"a template holds {{words}} (and {{text}}), got {template!r}")
        said = [said_in(item, words) for item in items]
        prompts = [
            template.format(words=one, text=item.text or "").strip()
            for item, one in zip(items, said, strict=True)
        ]
        return Forms(model, items, said, prompts, parsed, chosen, where)

    @property
    def names(self) -> list[str]:
        """Of the hook points."""
        return [self.site.hook_name(layer) for layer in self.layers]

    # ---------------------------------------------------------------- heard

    def spoken(self, batch: Batch) -> tuple[Float[Tensor, "layers b t d"], list[Spoken]]:
        """The states of a batch, and what of them is heard of every item."""
        places = by_item(self.where, self.items)
        where = self.where if places is None else [places[row] for row in batch.rows]
        ground = Ground.of(self.model, batch.inputs, "decoder")
        held = ground.held(where)
        states = self.states(batch.inputs)
        found = []
        for row, mask in enumerate(held):
            at = mask.nonzero()[:, 0]
            found.append(
                Spoken(states[:, row, at.to(states.device)], at, ground.tracks[row].seconds[at])
            )
        return states, found

    @torch.no_grad()
    def states(self, inputs: AudioInputs) -> Float[Tensor, "layers b t d"]:
        """The site at every layer."""
        _, cache = self.model.run_with_cache(
            inputs, names_filter=self.names, return_cache_object=False
        )
        return torch.stack([cache[name] for name in self.names])

    # ---------------------------------------------------------------- read

    def written(self, row: int) -> AudioInputs:
        """The written form of an item.

        Raises:
            ItemError: naming the item, where the model does not take it.
        """
        try:
            return self.model.prepare(None, [self.prompts[row]])
        except AudioLensError as error:
            raise ItemError(f"{self.items[row].name} in writing: {error}") from error

    def read(self, row: int) -> Float[Tensor, "layers tokens d"]:
        """The states of the words in the written form."""
        inputs = self.written(row)
        at = self._mask(inputs, row, self.said[row]).nonzero()[:, 0]
        return self.states(inputs)[:, 0, at]

    def owners(self, row: int) -> Int[Tensor, " tokens"] | None:
        """Which of the item's timed words every token of the written form is of; None without."""
        labels = [Span.of(word).label for word in self.items[row].words]
        if not labels or " ".join(map(str, labels)) != self.said[row]:
            return None
        inputs = self.written(row)
        whole = self._mask(inputs, row, self.said[row])
        owner = torch.full(whole.shape, -1)
        for number in range(len(labels)):
            begun = self._mask(inputs, row, " ".join(map(str, labels[: number + 1])))
            if (begun & ~whole).any():
                return None  # the words stand in the template, too
            owner[begun & (owner < 0)] = number
        return owner[whole]

    def _mask(self, inputs: AudioInputs, row: int, words: str) -> Bool[Tensor, " t"]:
        try:
            return Ground.of(self.model, inputs, "decoder").held(Words(words))[0]
        except InputError as error:
            raise ItemError(f"{self.items[row].name} in writing: {error}") from error


def said_in(item: Item, words: Said) -> str:
    """What is said in an item's clip.

    Raises:
        ItemError: an item that does not tell.
    """
    if callable(words):
        found: Any = words(item)
    elif words is not None:
        found = item.value(words)
    else:
        found = item.labels.get(TRANSCRIPT) or " ".join(
            str(Span.of(word).label or "") for word in item.words
        )
    if not isinstance(found, str) or not found.strip():
        raise ItemError(
            f"{item.name} does not tell what is said in it: give it words or a label "
            f"{TRANSCRIPT!r}, or pass words="
        )
    return found.strip()
