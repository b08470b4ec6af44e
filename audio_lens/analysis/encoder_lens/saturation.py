"""From which layer of the decoder on each token of the model's own text is decided."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.analysis.encoder_lens.forced import check_writes, forced, right_tokens, top_tokens
from audio_lens.analysis.encoder_lens.said import transcripts
from audio_lens.analysis.encoder_lens.streams import first_stable, shuffled_before_last
from audio_lens.items import ItemError, Items, found, method
from audio_lens.models import HookedAudioTransformer
from audio_lens.progress import track
from audio_lens.results import Result


@dataclass(frozen=True)
class _Texts:
    """The tokens of all items' texts, one after the other.

    Attributes:
        item: whose each is.
        top: the likeliest token by each layer where it was written.
        is_right: whether it stands in the item's transcript; None without transcripts.
        is_top: whether the last layer holds what was written.
    """

    item: Int[Tensor, " tokens"]
    top: Int[Tensor, "layers tokens"]
    is_right: Bool[Tensor, " tokens"] | None
    is_top: Bool[Tensor, " tokens"]


@method("encoder_lens.saturation")
def saturation(
    model: HookedAudioTransformer,
    items: Items,
    *,
    max_new_tokens: int | None = None,
    by: str | None = None,
    size: int = 8,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Up to which layer of the decoder the tokens of its own text are decided.

    The model writes greedily, and reads what it wrote in one pass. Layer l of a token is what the
    final norm and the unembedding make of the residual stream behind block l, where the token is
    written; the token is decided at the first layer from which that is what the last layer says.
    The value is the share of an item's tokens that are decided at a layer or before, of all and,
    with transcripts (``answer``, else ``words``), of those that stand in them ("right") and of the
    others ("wrong"). The end of a text and other signs do not count.

    The control "random_sites" takes the layers before the last in random order.

    Args:
        model: a model whose decoder writes text.
        items: what it hears.
        max_new_tokens, by, size, seed, progress: as in `encoder_lens`.

    Raises:
        InputError: a model without such a decoder.
        ItemError: items of which none makes the model write, or some have no transcript.
    """
    check_writes(model)
    texts = _read(model, items, max_new_tokens, size, progress)
    groups = {"all": torch.ones_like(texts.is_top)}
    if texts.is_right is not None:
        groups |= {"right": texts.is_right, "wrong": ~texts.is_right}
    n_layers = len(texts.top)
    axes = {"group": list(groups), "layer": list(range(n_layers))}
    layers = first_stable(texts.top)
    drawn = first_stable(shuffled_before_last(texts.top.T, seed).T)
    values, chance = (
        _decided(x, n_layers, texts.item, groups, len(items)) for x in (layers, drawn)
    )
    report = [
        f"{int(mask.sum())} tokens ({name}): decided at layer "
        f"{layers[mask].double().mean():.2f} of {n_layers - 1} on average."
        for name, mask in groups.items()
        if mask.any()
    ]
    share = texts.is_top.double().mean()
    return found(
        values,
        axes,
        items,
        by=by,
        seed=seed,
        controls={"random_sites": found(chance, axes, items, by=by, seed=seed)},
        report=[
            *report,
            f"{share:.1%} of the tokens are what the last layer finds likeliest; settings of "
            "generation may forbid that.",
            "That a layer's lens does not show a token does not show that the layer does not hold "
            "it: lenses fail in early layers of many models.",
        ],
    )


def _read(
    model: HookedAudioTransformer,
    items: Items,
    max_new_tokens: int | None,
    size: int,
    progress: bool | None,
) -> _Texts:
    truth = transcripts(items)
    tops, owners, right, written = [], [], [], []
    with track("saturation", len(items), "items", show=progress) as advance:
        done = 0
        for batch in items.batches(model, size):
            given = forced(model, batch.inputs, max_new_tokens)
            top = top_tokens(model, given).cpu()
            for place, row in enumerate(batch.rows):
                held = given.is_text[place].cpu()
                tokens = given.tokens[place].cpu()[held]
                tops.append(top[:, place, held])
                owners.append(torch.full_like(tokens, row))
                written.append(tokens)
                if truth is not None:
                    right.append(right_tokens(model, tokens, truth[row]))
            done += len(batch)
            advance(len(batch), done)
    top, tokens = torch.cat(tops, dim=1), torch.cat(written)
    if not len(tokens):
        raise ItemError(f"the model writes nothing to any of the {len(items)} items")
    return _Texts(
        torch.cat(owners), top, torch.cat(right) if truth is not None else None, top[-1] == tokens
    )


def _decided(
    layers: Int[Tensor, " tokens"],
    n_layers: int,
    item: Int[Tensor, " tokens"],
    groups: dict[str, Bool[Tensor, " tokens"]],
    count: int,
) -> Float[Tensor, "n groups layers"]:
    """The share of every item's tokens of a group that are decided at a layer or before."""
    is_decided = (layers[:, None] <= torch.arange(n_layers)).double()
    shares = []
    for mask in groups.values():
        sums = torch.zeros(count, n_layers).double().index_add(0, item[mask], is_decided[mask])
        shares.append(sums / torch.bincount(item[mask], minlength=count)[:, None])
    return torch.stack(shares, dim=1)
