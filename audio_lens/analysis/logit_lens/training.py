"""Training a tuned lens, and how far any lens is from what the model writes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.logit_lens.reading import LAST, Residuals, residuals, through_lens
from audio_lens.analysis.logit_lens.tuned import TunedLens, translated
from audio_lens.analysis.logit_lens.vocabulary import (
    check_reads_text,
    logits_of_streams,
    stream_hooks,
)
from audio_lens.items import Items, found, method
from audio_lens.items.collect import Place
from audio_lens.models import HookedAudioTransformer
from audio_lens.places import described
from audio_lens.progress import track
from audio_lens.results import Result
from audio_lens.running import evaluating

POSITIONS = 256  # of a step
DECIDING = 0.25  # of the items that are trained on
DECIDED_EVERY = 10  # steps
RIDGES = (1e-2, 1e-1, 1.0, 10.0, float("inf"))
LARGEST, TINY = 1e9, 1e-12


def train(
    model: HookedAudioTransformer,
    items: Items,
    where: Place = "all",
    *,
    steps: int = 100,
    rate: float = 1e-3,
    seed: int = 0,
    progress: bool | None = None,
) -> TunedLens:
    """A tuned lens (2303.08112): for each stream the affine map that predicts best what is written.

    Each translator starts where a least-squares fit of the last stream, of several strengths,
    is best, and goes down the KL divergence from what the model writes to what the translated
    stream would. A quarter of the items, of groups of their own, decides about start and end of
    that. Read other items than you train on: ``train, test = items.split()``.

    Args:
        model: the model.
        items: what it hears.
        where: the positions that are learned from.
        steps: of Adam, each over some positions and all streams.
        rate: of learning.
        seed: of the order of positions, and of which items decide.
        progress: as in `collect`.

    Raises:
        InputError: a model without a vocabulary, or a place that selects nothing in some item.
        ItemError: a single item.
    """
    check_reads_text(model)
    is_one_group = len({item.group for item in items}) == 1
    split = Items.of(item.replaced(group=None) for item in items) if is_one_group else items
    fitted, deciding = (
        _joined(model, part, where, progress) for part in split.split("id", DECIDING, seed)
    )
    best = _Best.of(model, deciding)
    best.try_out(torch.zeros_like(best.weight), torch.zeros_like(best.bias))
    for ridge in RIDGES:
        best.try_out(*_fitted(fitted.resid, ridge))
    with evaluating(model):
        _descend(model, fitted, best, steps, rate, seed, progress)
    told = {
        "where": "a place for each item" if callable(where) else described(where),
        "items": str(len(items)),
        "positions": str(fitted.resid.shape[1]),
        "steps": str(steps),
        "seed": str(seed),
    }
    return TunedLens.of(model, best.weight, best.bias, **told)


def _joined(
    model: HookedAudioTransformer, items: Items, where: Place, progress: bool | None
) -> Residuals:
    """The streams of all items at once, beside the inputs of the first batch."""
    batches = list(residuals(model, items, {"": where}, what="streams", progress=progress))
    before = itertools.accumulate((len(held.rows) for held in batches[:-1]), initial=0)
    return replace(
        batches[0],
        rows=[row for held in batches for row in held.rows],
        resid=torch.cat([held.resid for held in batches], dim=1),
        item=torch.cat([held.item + n for held, n in zip(batches, before, strict=True)]),
        groups={"": torch.cat([held.groups[""] for held in batches])},
    )


@dataclass
class _Best:
    """The translators that diverge least on the items that decide, each stream for itself.

    Attributes:
        reached: the divergence of each.
    """

    model: HookedAudioTransformer
    deciding: Residuals
    weight: Float[Tensor, "early d d"]
    bias: Float[Tensor, "early d"]
    reached: Float[Tensor, " early"]

    @staticmethod
    def of(model: HookedAudioTransformer, deciding: Residuals) -> _Best:
        """Nothing tried yet."""
        streams, _, d = deciding.resid.shape
        precise = torch.promote_types(deciding.resid.dtype, torch.float32)
        empty = deciding.resid.new_zeros(streams - 1, d, d, dtype=precise)
        reached = torch.full((streams - 1,), torch.inf, dtype=torch.float64)
        return _Best(model, deciding, empty, empty[:, 0].clone(), reached)

    def try_out(self, weight: Float[Tensor, "early d d"], bias: Float[Tensor, "early d"]) -> None:
        """Keep the translators that diverge less than those so far."""
        lens = TunedLens(weight.detach(), bias.detach(), "", "")
        found_here = through_lens(self.model, self.deciding, divergences, lens)
        reached = found_here.double().mean(1)[:-1]
        better = reached < self.reached
        self.reached = torch.where(better, reached, self.reached)
        on = better.to(weight.device)
        self.weight = torch.where(on[:, None, None], lens.weight, self.weight)
        self.bias = torch.where(on[:, None], lens.bias, self.bias)


def _fitted(
    resid: Float[Tensor, "streams n d"], ridge: float
) -> tuple[Float[Tensor, "early d d"], Float[Tensor, "early d"]]:
    """The least-squares maps from each stream to what the last one has beside it.

    Args:
        ridge: against the mean square of the stream; infinite for maps that are a bias alone.
    """
    early, last = resid[:-1].double(), resid[-1].double()
    mean, change = early.mean(1, keepdim=True), last - early
    centred = early - mean
    target = change - change.mean(1, keepdim=True)
    square = centred.mT @ centred
    level = (square.diagonal(dim1=-2, dim2=-1).mean(-1) + TINY) * min(ridge, LARGEST)
    eye = torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)
    weight = torch.linalg.solve(square + level[:, None, None] * eye, centred.mT @ target)
    bias = (change.mean(1, keepdim=True) - mean @ weight)[:, 0]
    precise = torch.promote_types(resid.dtype, torch.float32)
    return weight.to(precise), bias.to(precise)


def _descend(
    model: HookedAudioTransformer,
    fitted: Residuals,
    best: _Best,
    steps: int,
    rate: float,
    seed: int,
    progress: bool | None,
) -> None:
    """From the best translators so far down the divergence of what they write."""
    weight, bias = (one.clone().requires_grad_() for one in (best.weight, best.bias))
    optimizer = torch.optim.Adam([weight, bias], rate)
    draw = torch.Generator().manual_seed(seed)
    with track("tuned lens", steps, "steps", show=progress) as advance:
        for step in range(1, steps + 1):
            rows = torch.randint(fitted.resid.shape[1], (POSITIONS,), generator=draw)
            early, last = fitted.resid[:-1, rows], fitted.resid[-1:, rows]
            with torch.enable_grad():
                streams = torch.cat([translated(early, weight, bias), last])
                logits = logits_of_streams(model, streams, fitted.inputs)
                loss = divergences(logits.float().log_softmax(-1))[:-1].mean(1).sum()
                weight.grad, bias.grad = torch.autograd.grad(loss, [weight, bias])
            optimizer.step()
            if step % DECIDED_EVERY == 0 or step == steps:
                best.try_out(weight, bias)
            advance(1, step)


def divergences(log_probs: Float[Tensor, "streams n v"]) -> Float[Tensor, "streams n"]:
    """KL divergence in nats from what the last stream writes to what each would."""
    last = log_probs[-1:].detach()
    return (last.exp() * (last - log_probs)).sum(-1)


@method("logit_lens.divergence")
def divergence(
    model: HookedAudioTransformer,
    items: Items,
    where: Place = LAST,
    *,
    lens: TunedLens | None = None,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How far what each stream would write is from what the model writes (KL, nats).

    Args:
        model: the model.
        items: what it hears.
        where: the positions that are read; an item's value is the mean over them.
        lens: a tuned lens; None reads the streams as they are.
        by: a label whose values are drawn in place of items, such as "group".
        seed: of the interval.
        progress: as in `collect`.

    Raises:
        InputError: a model without a vocabulary, a place that selects nothing in some item, or a
            lens of another model.
    """
    check_reads_text(model)
    if lens is not None:
        lens.check(model)
    n_streams = len(stream_hooks(model, model.output_part))
    values = torch.zeros(len(items), n_streams, dtype=torch.float64)
    for held in residuals(model, items, {"": where}, progress=progress):
        found_here = through_lens(model, held, divergences, lens).double()
        values[torch.tensor(held.rows)] = held.by_item(found_here, "")
    return found(
        values,
        {"layer": list(range(n_streams))},
        items,
        by=by,
        seed=seed,
        meta={"value": "KL divergence from what is written (nats)"},
    )
