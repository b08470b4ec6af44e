"""Texts that repeat themselves, and the parts of a decoder without which they end."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from audio_lens.analysis.encoder_lens.components import Components
from audio_lens.analysis.encoder_lens.forced import check_writes
from audio_lens.analysis.encoder_lens.streams import written
from audio_lens.edits import Edit, Scale
from audio_lens.errors import InputError
from audio_lens.items import ItemError, Items, found, method
from audio_lens.models import HookedAudioTransformer
from audio_lens.progress import track
from audio_lens.results import Result

LONGEST, TIMES, RATIO = 6, 4, 2.4  # of what is repeated, how often, and Whisper's own rule
LIMIT = 64  # tokens in which a loop shows
SHOWN = 60  # letters of a text in a report


@dataclass(frozen=True)
class Loop:
    """What a text repeats.

    Attributes:
        unit: the words (or tokens) that are repeated, the shortest that do.
        times: how often in a row.
        start: the first of them in the text.
    """

    unit: tuple[Hashable, ...]
    times: int
    start: int


def find_loop(said: Sequence[Hashable], longest: int = LONGEST, times: int = TIMES) -> Loop | None:
    """The first stretch of a text that repeats something so often in a row; None without.

    Args:
        said: words or tokens; of a string, its words, whose case does not count.
        longest: of what is repeated, in words.
        times: how often at least.
    """
    words = said.lower().split() if isinstance(said, str) else list(said)
    for start in range(len(words)):
        for length in range(1, longest + 1):
            unit = words[start : start + length]
            count = 1
            while words[start + count * length : start + (count + 1) * length] == unit:
                count += 1
            if len(unit) == length and count >= times:
                return Loop(tuple(unit), count, start)
    return None


def compression_ratio(text: str) -> float:
    """Bytes of a text over bytes of it compressed, as Whisper's decoding asks."""
    held = text.encode()
    return len(held) / len(zlib.compress(held))


def is_looping(text: str) -> bool:
    """Whether a text repeats one to six words four times in a row, or compresses above 2.4."""
    return find_loop(text) is not None or compression_ratio(text) > RATIO


@method("encoder_lens.loops")
def loops(
    model: HookedAudioTransformer,
    items: Items,
    *,
    site: str | None = None,
    heads: bool = True,
    layers: Sequence[int] | None = None,
    max_new_tokens: int = LIMIT,
    by: str | None = None,
    size: int = 8,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Which layers or heads of the decoder a repetition ends without.

    The model writes to every item, and again with each component at zero. Metrics: "ended", the
    share of looping texts that loop no more; and what that costs, "changed", the share of the other
    texts that become another. Either is NaN for items that it is not of.

    The control "identity" multiplies by 1: nothing may end or change.

    Args:
        model: a model whose decoder writes text.
        items: of which some make it loop (`is_looping`).
        site: what is zeroed; None takes the heads of cross-attention (``decoder.cross_attn.z``)
            where there is one, else of self-attention (``decoder.attn.z``).
        heads: whether each head by itself, or each layer whole.
        layers: of the site; None takes all.
        max_new_tokens: how long texts become; a loop takes some to show.
        by, size, seed, progress: as in `encoder_lens`.

    Raises:
        InputError: a model without such a decoder, or a site of another part.
        SiteError: a site or layer that is not there, or heads of a site without any.
        ItemError: items of which no text loops.
    """
    check_writes(model)
    components = Components.of(model, site or _default_site(model), layers, heads)
    if components.site.part != "decoder":
        raise InputError(f"{components.site} is no site of the decoder, which writes the texts")
    before = [said for (said,) in _texts(model, items, [[]], max_new_tokens, size, progress)]
    looping = torch.tensor([is_looping(text) for text in before])
    if not looping.any():
        raise ItemError(
            f"none of the {len(items)} texts repeats itself within {max_new_tokens} tokens: there "
            "is no loop that could end"
        )
    edits = [Edit(str(components.site), Scale(1.0)), *components.edits(Scale(0.0))]
    after = _texts(model, items, [[edit] for edit in edits], max_new_tokens, size, progress)
    has_ended = torch.tensor([[not is_looping(text) for text in said] for said in after])
    has_changed = torch.tensor(
        [[text != own for text in said] for own, said in zip(before, after, strict=True)]
    )
    values = torch.stack([_of(looping, has_ended), _of(~looping, has_changed)], dim=1)
    axes = {"metric": ["ended", "changed"]}
    return found(
        values[..., 1:].unflatten(-1, components.shape),
        axes | components.axes,
        items,
        by=by,
        seed=seed,
        controls={"identity": found(values[..., 0], axes, items, by=by, seed=seed)},
        meta={"site": str(components.site), "max_new_tokens": str(max_new_tokens)},
        report=[
            f"{int(looping.sum())} of {len(items)} texts repeat themselves, such as "
            f"{before[int(looping.long().argmax())][:SHOWN]!r}.",
            "A component without which a loop ends need not be what makes it: a text that goes "
            "wrong otherwise has no loop either. Read ended beside changed.",
        ],
    )


def _default_site(model: HookedAudioTransformer) -> str:
    has_cross = "decoder.blocks.0.cross_attn.hook_z" in model.hook_dict
    return "decoder.cross_attn.z" if has_cross else "decoder.attn.z"


def _texts(
    model: HookedAudioTransformer,
    items: Items,
    runs: Sequence[Sequence[Edit]],
    max_new_tokens: int,
    size: int,
    progress: bool | None,
) -> list[list[str]]:
    """What is written to every item in every run, with its edits in force."""
    texts: list[list[str]] = [[] for _ in items]
    with track("loops", len(items), "items", show=progress) as advance:
        done = 0
        for batch in items.batches(model, size):
            for edits in runs:
                said = written(model, batch.inputs, edits, max_new_tokens)
                for row, text in zip(batch.rows, said, strict=True):
                    texts[row].append(text)
            done += len(batch)
            advance(len(batch), done)
    return texts


def _of(mask: Bool[Tensor, " n"], values: Bool[Tensor, "n cells"]) -> Float[Tensor, "n cells"]:
    """The values of some items, NaN of the others."""
    return values.double().masked_fill(~mask[:, None], torch.nan)
