"""Which latents go with a label, and how strongly they are active there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.analysis.autoencoders.autoencoder import Autoencoder
from audio_lens.analysis.autoencoders.evaluating import encoded
from audio_lens.analysis.autoencoders.rows import Given
from audio_lens.analysis.learning import learner
from audio_lens.errors import InputError
from audio_lens.items import Activations, ItemError

KINDS = ("means", "logistic")


@dataclass(frozen=True)
class Ranking:
    """Latents, those first that go with a label's value.

    Attributes:
        latents: their numbers in order.
        scores: of each in that order: the difference of means, or the weight.
        means: of every latent by its number, the mean over the rows of the value.
        others: the same over the other rows.
        items: how many items have the value.
    """

    latents: Int[Tensor, " m"] = field(repr=False)
    scores: Float[Tensor, " m"] = field(repr=False)
    means: Float[Tensor, " m"] = field(repr=False)
    others: Float[Tensor, " m"] = field(repr=False)
    items: int

    def top(self, count: int) -> list[int]:
        """The first of them that go with the value at all: fewer, where few do."""
        return self.latents[self.scores > 0][:count].tolist()


def rank(
    autoencoder: Autoencoder,
    activations: Given,
    label: str | Sequence[Any],
    value: Any,
    against: Any = None,
    *,
    kind: str = "means",
    site: str | None = None,
    layer: int | None = None,
) -> Ranking:
    """Latents by how much more they are active with one value of a label than without.

    Rows are averaged for each item first, so that long clips count as short ones do. That a latent
    goes with a label here says nothing of whether the model uses it: turn it (`steer`), beside
    others.

    Args:
        autoencoder: the autoencoder.
        activations: `Activations`, or ``n d``, of which then each row is an item.
        label: of the items; one for each, where activations are a tensor.
        value: of the label.
        against: the value that it is compared with; None takes all others.
        kind: "means", differences of means; "logistic", weights of a logistic regression on
            standardised latents (extra ``probe``).
        site, layer: of `Activations`; None takes the autoencoder's own.

    Raises:
        InputError: another kind, or labels that are not as many as rows.
        ItemError: a value that no item has.
        ExtraError: without scikit-learn, for "logistic".
        ActivationsError: a label that an item lacks.
    """
    if kind not in KINDS:
        raise InputError(f"kind is one of {', '.join(KINDS)}, got {kind!r}")
    means, labels = item_means(autoencoder, activations, label, site, layer)
    ours = torch.tensor([one == value for one in labels])
    others = torch.tensor([one != value and against in (None, one) for one in labels])
    for name, held in ((value, ours), (against, others)):
        if not held.any():
            known = ", ".join(sorted({repr(one) for one in labels}))
            raise ItemError(f"no item has the value {name!r}; there are {known}")
    mean, rest = means[ours].mean(0), means[others].mean(0)
    scores = mean - rest
    if kind == "logistic":
        either = ours | others
        made = learner("logistic", 10.0, 1).fit(means[either].numpy(), ours[either].numpy())
        scores = torch.as_tensor(made[-1].coef_[0])
    order = scores.argsort(descending=True, stable=True)
    return Ranking(order, scores[order], mean.float(), rest.float(), int(ours.sum()))


def item_means(
    autoencoder: Autoencoder,
    given: Given,
    label: str | Sequence[Any],
    site: str | None,
    layer: int | None,
) -> tuple[Float[Tensor, "n m"], list[Any]]:
    """The mean latents of every item, and its label."""
    if isinstance(given, Activations):
        count = len(given.index["items"])
    else:
        count = len(given)
        if isinstance(label, str) or len(label) != count:
            raise InputError(f"{count} rows of a tensor need as many labels")
    total = torch.zeros(count, autoencoder.width, dtype=torch.float64)
    rows = torch.zeros(count, dtype=torch.float64)
    for block in encoded(autoencoder, given, site, layer):
        total.index_add_(0, block.items, block.latents.double().cpu())
        rows.index_add_(0, block.items, torch.ones(len(block.items), dtype=torch.float64))
    there = rows > 0
    if not isinstance(given, Activations):
        return total, list(label)
    if not isinstance(label, str):
        raise InputError("a label of activations is named: the items have it")
    by_item = dict(zip(given.table(site)["item"].tolist(), given.values(label, site), strict=True))
    labels = [by_item[number] for number in there.nonzero()[:, 0].tolist()]
    return (total / rows[:, None].clamp(min=1))[there], labels
