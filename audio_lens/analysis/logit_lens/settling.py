"""From which layer on a token stands, as the model writes it (2508.15882)."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from audio_lens.analysis.logit_lens.reading import BATCH, Asked
from audio_lens.analysis.logit_lens.scores import OUTCOMES
from audio_lens.analysis.logit_lens.vocabulary import (
    check_reads_text,
    logits_of_streams,
    option_log_probs,
    stream_hooks,
)
from audio_lens.hooks import HookFn, HookPoint
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.items import Items, found, method
from audio_lens.models import HookedAudioTransformer
from audio_lens.models.mixins.settings import end_tokens
from audio_lens.progress import track
from audio_lens.results import Result
from audio_lens.running import evaluating


def saturation_layer(top: Int[Tensor, " streams *b"]) -> Int[Tensor, " *b"]:
    """The first stream from which on all have the likeliest token of the last one.

    Args:
        top: the likeliest token of every stream.
    """
    stays = (top == top[-1:]).int().flip(0).cummin(0).values.flip(0)
    return stays.argmax(0)


@method("logit_lens.saturation")
def saturation(
    model: HookedAudioTransformer,
    items: Items,
    *,
    new_tokens: int = 1,
    by: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """The share of written tokens that are settled in each layer.

    A token is settled in a layer from which on every stream has it as its likeliest token. Tokens
    are the model's own, greedily written. The axis "outcome" is of items that are answered rightly
    by their first token, and of those that are not; an item has NaN in the other one.

    Args:
        model: the model.
        items: what it hears, with answers.
        new_tokens: how many tokens it writes at most; behind an end nothing counts.
        by, seed, progress: as in `information`.

    Raises:
        InputError: a model that does not write one token after the other.
        ItemError, TokenError: items whose answers cannot be told apart, as in `information`.
    """
    check_reads_text(model)
    if model.cfg.output_kind != "tokens":
        raise InputError(
            f"{model.cfg.model_name} does not write one token after the other: saturation is of "
            "tokens as they are written"
        )
    asked = Asked.of(model, items)
    n_streams = len(stream_hooks(model, model.output_part))
    settled = torch.zeros(len(items), n_streams, dtype=torch.float64)
    is_right = torch.zeros(len(items), dtype=torch.bool)
    with track("items", len(items), "items", show=progress) as advance:
        done = 0
        for batch in items.batches(model, BATCH):
            top, first, counts = _written(model, batch.inputs, new_tokens)
            layer = saturation_layer(top)
            by_layer = layer[..., None] <= torch.arange(n_streams)
            shares = (by_layer & counts[..., None]).double().sum(1) / counts.sum(1)[:, None]
            rows = torch.tensor(batch.rows)
            settled[rows] = shares
            options = option_log_probs(first, asked.tokens)
            is_right[rows] = options.argmax(-1) == asked.right[rows]
            done += len(batch)
            advance(len(batch), done)
    sides = torch.stack([is_right, ~is_right], 1)
    return found(
        settled[:, None].masked_fill(~sides[..., None], torch.nan),
        {"outcome": list(OUTCOMES), "layer": list(range(n_streams))},
        items,
        by=by,
        seed=seed,
        meta={"value": "share of written tokens that are settled", "tokens": str(new_tokens)},
        report=_report(settled, is_right),
    )


def _report(settled: Float[Tensor, "n layers"], is_right: Bool[Tensor, " n"]) -> list[str]:
    """Mean saturation layers in words; the steps of a cumulative share say how many lie where."""
    layers = (1 - settled).sum(1)
    return [
        f"{int(side.sum())} items are answered {name}; their tokens are settled in layer "
        f"{layers[side].mean():.2f} on average."
        for name, side in zip(("rightly", "wrongly"), (is_right, ~is_right), strict=True)
        if side.any()
    ]


@torch.no_grad()
def _written(
    model: HookedAudioTransformer, inputs: AudioInputs, new_tokens: int
) -> tuple[Int[Tensor, "streams b steps"], Float[Tensor, "b v"], Bool[Tensor, "b steps"]]:
    """Likeliest tokens of all streams at each step; the first logits; which steps count."""
    names = stream_hooks(model, model.output_part)
    kept: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(tensor: Tensor, hook: HookPoint) -> None:
        kept[str(hook.name)].append(tensor[:, -1].detach().to(model.device))

    keep.only_reads = True
    hooks: list[tuple[str, HookFn]] = [(name, keep) for name in names]
    with evaluating(model), model.hooks(fwd_hooks=hooks), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*max_new_tokens sets another")  # it is what was asked
        tokens = model.generate(inputs, new_tokens, return_type="tokens")
    steps = [torch.stack(each) for each in zip(*kept.values(), strict=True)]
    logits = [logits_of_streams(model, resid, inputs).cpu() for resid in steps]
    top = torch.stack([one.argmax(-1) for one in logits], -1)
    written = tokens[:, inputs.tokens.shape[1] :].cpu()[:, : len(steps)]
    is_end = torch.isin(written, torch.tensor(end_tokens(model.generation_config)))
    return top, logits[0][-1].float().log_softmax(-1), is_end.cumsum(1) - is_end.int() == 0
