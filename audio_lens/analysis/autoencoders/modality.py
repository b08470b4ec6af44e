"""Which stream feeds a latent: what is heard, what is read, or both."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.autoencoders.autoencoder import Autoencoder
from audio_lens.analysis.autoencoders.ranking import item_means
from audio_lens.analysis.autoencoders.splicing import place_of
from audio_lens.arguments import number
from audio_lens.errors import InputError
from audio_lens.items import ItemError, Items, collect, method
from audio_lens.items.collect import Place
from audio_lens.items.findings import MEAN, TOGETHER
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result

STREAMS = ("audio", "text")
ONE = 0.9  # share of the change from which on one stream alone feeds a latent
TINY = 1e-9


@method("autoencoders.modality_of")
def modality_of(
    model: HookedAudioTransformer,
    items: Items,
    autoencoder: Autoencoder,
    latents: Any = None,
    *,
    site: str | None = None,
    layer: int | None = None,
    where: Place = "all",
    one: float = ONE,
    size: int = 16,
    progress: bool | None = None,
) -> Result:
    """Which stream feeds each latent: the change with another clip, and with another text.

    A latent's activity is averaged over the positions of an item. "audio" is by how much that
    changes, in size, with the item's ``other_audio`` in place of its clip, "text" with its
    ``other_text``; ``estimate`` has their means. `modalities` tells of each latent whether audio
    or text makes ``one`` of both together, or neither does ("both"), or nothing changes it
    ("silent").

    Args:
        model: the model.
        items: with ``other_audio`` and ``other_text``.
        autoencoder: of its activations.
        latents: their numbers; None takes all.
        site, layer: None takes the autoencoder's own.
        where: at which positions.
        one: from which share of the change on one stream alone feeds a latent.
        size: of the batches.
        progress: as in `collect`.

    Raises:
        ItemError: naming an item without a counterpart of a stream.
        InputError: an autoencoder without a site, or latents that are not there.
    """
    number("one", one, above=0.5, most=1)
    wanted = list(range(autoencoder.width)) if latents is None else autoencoder.of(latents)
    site, layer = place_of(autoencoder, site, layer)
    for item in items:
        if item.other_audio is None or item.other_text is None:
            lacking = "other_audio" if item.other_audio is None else "other_text"
            raise ItemError(f"{item.name} has no {lacking}: each stream is moved alone")
    sides = {
        "": items,
        "audio": Items.of(x.replaced(audio=x.other_audio) for x in items),
        "text": Items.of(x.replaced(text=x.other_text) for x in items),
    }
    means = {
        name: _means(model, side, autoencoder, site, layer, where, size, progress)[:, wanted]
        for name, side in sides.items()
    }
    changes = torch.stack([(means[name] - means[""]).abs() for name in STREAMS], dim=1)
    result = Result(
        changes,
        ("stimulus", "stream", "latent"),
        {"stimulus": [item.id for item in items], "stream": list(STREAMS), "latent": wanted},
        estimate=changes.mean(0),
        meta={"site": site, "one": f"{one:g}", "value": "change of a latent", TOGETHER: MEAN},
        n_kept=len(items),
    )
    kinds = list(modalities(result).values())
    result.report = [
        ", ".join(f"{kinds.count(kind)} {kind}" for kind in (*STREAMS, "both", "silent"))
    ]
    return result


def _means(
    model: HookedAudioTransformer,
    items: Items,
    autoencoder: Autoencoder,
    site: str,
    layer: int | None,
    where: Place,
    size: int,
    progress: bool | None,
) -> Float[Tensor, "n m"]:
    layers = None if layer is None else [layer]
    acts = collect(model, items, site, where, layers=layers, size=size, progress=progress)
    return item_means(autoencoder, acts, "id", site, layer)[0]


def modalities(result: Result) -> dict[int, str]:
    """Of every latent in a result of `modality_of`: "audio", "text", "both" or "silent".

    Raises:
        InputError: a result of something else.
    """
    if result.dims != ("stimulus", "stream", "latent") or result.estimate is None:
        raise InputError("modalities are told of results of modality_of")
    one = float(result.meta["one"])
    audio, text = result.estimate.unbind(0)
    told = {}
    for latent, a, t in zip(result.coords["latent"], audio.tolist(), text.tolist(), strict=True):
        both = a + t
        share = a / both if both > TINY else 0.0
        kind = "audio" if share >= one else "text" if 1 - share >= one else "both"
        told[latent] = kind if both > TINY else "silent"
    return told
