"""Steering while a model writes, and reading along a direction what each written token has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from audio_lens.analysis.steering.directions import Direction, told
from audio_lens.analysis.steering.sweeping import RANDOM, at_random
from audio_lens.arguments import listed, number, whole
from audio_lens.edits import Edit, intervene
from audio_lens.edits.edit import When
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.items import Items, found, method
from audio_lens.items.collect import Place, by_item
from audio_lens.models import HookedAudioTransformer
from audio_lens.models.mixins.settings import end_tokens
from audio_lens.places import Where
from audio_lens.results import Result
from audio_lens.sites import Site

SHOWN = 5  # texts of each strength that a report names


@dataclass(frozen=True)
class Written:
    """What a model wrote while it was steered.

    Attributes:
        texts: of every row.
        tokens: likewise, padded behind the end.
        read: where each token's state lay along the direction that was watched, at the position
            that wrote it: 0 as the mean of b, 1 as the mean of a. NaN behind the end.
    """

    texts: list[str]
    tokens: Int[Tensor, "b n"]
    read: Float[Tensor, "b n"]


def write(
    model: HookedAudioTransformer,
    inputs: AudioInputs,
    direction: Direction,
    alpha: float | int | None = None,
    *,
    target: float | int | None = None,
    watch: Direction | None = None,
    where: Where = "last",
    when: When = "both",
    max_new_tokens: int | None = None,
) -> Written:
    """Write while a direction is added, and read along it what each written token has.

    Args:
        model: a model that writes text.
        inputs: of ``model.prepare``.
        direction: what is added.
        alpha: how often; 0 watches alone.
        target: in place of ``alpha``: as much is added as `Direction.read` lacks to it, token by
            token, and no more.
        watch: another direction to read along, such as the same one in a later layer, where what
            is added has been worked on; None reads along the direction, behind what was added.
        where: the positions to which it is added; "last" is each new token, too.
        when: in the prompt ("prefill"), in what is written ("decode"), or in "both".
        max_new_tokens: as of ``generate``.

    Raises:
        InputError: neither alpha nor target, or both; a direction to watch that is not of the part
            that writes; or what ``generate`` refuses.
    """
    watch = direction if watch is None else watch
    name = _watched(model, watch)
    edits = [_edit(direction, alpha, target, where, when)]
    with intervene(model, edits):
        made: Any = model.generate(
            inputs,
            max_new_tokens,
            return_type="tokens",
            return_cache=True,
            names_filter=[name],
        )
    tokens, cache = made
    new = tokens[:, inputs.tokens.shape[1] :].cpu()
    states = cache[name][:, inputs.tokens.shape[1] - 1 :][:, : new.shape[1]]
    read = watch.read(states).double().cpu().masked_fill(_behind(model, new), torch.nan)
    texts = model.need_tokenizer("text").batch_decode(new, skip_special_tokens=True)
    return Written([text.strip() for text in texts], new, read)


def _watched(model: HookedAudioTransformer, watch: Direction) -> str:
    """The hook point that is read.

    Raises:
        InputError: one that does not run while the model writes.
    """
    site = Site.parse(watch.site, model)
    if site.positions_of != model.output_part or model.cfg.decoder is None:
        raise InputError(
            f"{watch.site} has no position for each written token: watch= takes a direction of the "
            f"{model.output_part}"
        )
    return site.hook_name(watch.layer)


def _edit(
    direction: Direction,
    alpha: float | int | None,
    target: float | int | None,
    where: Where,
    when: When,
) -> Edit:
    if (alpha is None) == (target is None):
        raise InputError("steering takes alpha= or target=, one of them")
    if target is not None:
        return direction.toward(number("target", target), where=where, when=when)
    return direction.edit(number("alpha", alpha), where=where, when=when)


def _behind(model: HookedAudioTransformer, tokens: Int[Tensor, "b n"]) -> Tensor:
    """Which tokens stand behind the end of their row."""
    ends = torch.tensor(end_tokens(model.generation_config), dtype=tokens.dtype)
    is_end = torch.isin(tokens, ends)
    return (is_end.cumsum(1) - is_end.long()) > 0


@method("steering.monitor")
def monitor(
    model: HookedAudioTransformer,
    items: Items,
    direction: Direction,
    alphas: Sequence[float | int] = (0.0, 1.0),
    *,
    watch: Direction | None = None,
    where: Place = "last",
    when: When = "both",
    max_new_tokens: int = 8,
    control: bool = True,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Where what a model writes lies along a direction, token by token, while it is steered.

    Args:
        alphas: how often the direction is added; 0 watches alone.
        control: whether a random direction as long is added beside it, and read likewise along the
            true one.

    The others are those of `write` and of `sweep`.

    Returns:
        Axes "alpha" and "token"; values are `Direction.read`, NaN behind the end of a text. The
        report tells the most frequent texts.

    Raises:
        As `write`.
    """
    strengths = [float(number("alphas", x)) for x in listed("alphas", alphas, object, "numbers")]
    if not strengths or len(set(strengths)) < len(strengths):
        raise InputError(f"alphas are one number or more, each once; got {list(alphas)}")
    count = whole("max_new_tokens", max_new_tokens, least=1)
    seen = direction if watch is None else watch
    _watched(model, seen)
    added = [direction, *([at_random(direction, seed)] if control else [])]
    places = by_item(where, items)
    values = torch.full((len(items), len(added), len(strengths), count), torch.nan).double()
    texts: dict[float, list[str]] = {alpha: [] for alpha in strengths}
    for batch in items.batches(model, size):
        here = where if places is None else [places[row] for row in batch.rows]
        for which, one in enumerate(added):
            for at, alpha in enumerate(strengths):
                run = write(
                    *(model, batch.inputs, one, alpha),
                    watch=seen,
                    where=here,
                    when=when,
                    max_new_tokens=count,
                )
                values[batch.rows, which, at, : run.read.shape[1]] = run.read
                texts[alpha] += run.texts if which == 0 else []
    axes = {"alpha": strengths, "token": list(range(count))}

    def of(part: Tensor, **beside: Any) -> Result:
        return found(part, axes, items, seed=seed, **beside)

    controls = {RANDOM: of(values[:, 1])} if control else {}
    meta = {"title": f"what is written, along the {told(seen)}", "value": "reading"}
    result = of(values[:, 0], controls=controls, meta=meta)
    result.report = [
        *(f"Added {alpha:g} times: {_frequent(said)}." for alpha, said in texts.items()),
        "Behind what is added, a reading is moved by it as a matter of course: watch= a later "
        "layer to see what becomes of it.",
    ]
    return result


def _frequent(texts: Sequence[str]) -> str:
    """The most frequent texts, with how often they were written."""
    return ", ".join(f"{text!r} {n} times" for text, n in Counter(texts).most_common(SHOWN))
