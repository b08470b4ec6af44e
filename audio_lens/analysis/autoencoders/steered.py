"""What is answered with latents turned up, beside as many others turned up as far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import metrics
from audio_lens.analysis.autoencoders.autoencoder import Autoencoder
from audio_lens.analysis.autoencoders.changing import steering
from audio_lens.analysis.autoencoders.splicing import place_of
from audio_lens.arguments import listed, whole
from audio_lens.edits import Edit
from audio_lens.errors import InputError
from audio_lens.items import Batch, Items, found, measured, method
from audio_lens.items.collect import Place, by_item
from audio_lens.items.controls import ControlError
from audio_lens.items.measuring import Cell
from audio_lens.models import HookedAudioTransformer
from audio_lens.results import Result
from audio_lens.running import evaluating

SAYS, LOG_PROB = "says", "log_prob"
UNEDITED, RANDOM = "unedited", "random_latents"
CONTROLS = (UNEDITED, RANDOM)


@method("autoencoders.steer")
def steer(
    model: HookedAudioTransformer,
    items: Items,
    autoencoder: Autoencoder,
    latents: Any,
    target: str,
    *,
    mode: str = "clamp",
    value: float | int | Float[Tensor, " n"] | None = None,
    among: Sequence[int] | None = None,
    site: str | None = None,
    layer: int | None = None,
    where: Place = "audio",
    controls: Sequence[str] = CONTROLS,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How often an answer is given when latents are turned up, and how likely it becomes.

    "says" is the share of items to which the target is the likeliest answer, "log_prob" its
    log-probability (nats). Controls: "unedited" is the model as it is, "random_latents" changes as
    many other latents in the same way, by the same values.

    Args:
        model: the model.
        items: what it hears, best such as it answers otherwise.
        autoencoder: of its activations.
        latents: which are turned.
        target: the answer, one token.
        mode, value: as of `steering`.
        among: the latents that the random ones are drawn from, such as those that are ever active;
            None takes all.
        site, layer: None takes the autoencoder's own.
        where: at which positions; a function of the item where they differ.
        controls: of "unedited" and "random_latents".
        by: a label whose values are drawn in place of items for intervals.
        size: of the batches.
        seed: of the random latents and the interval.
        progress: as in `patching.sweep`.

    Raises:
        InputError: what `steering` refuses, or other controls.
        TokenError: a target of several tokens.
        ControlError: too few other latents.
    """
    asked = listed("controls", controls, str, "names")
    if odd := [name for name in asked if name not in CONTROLS]:
        raise InputError(f"controls are some of {', '.join(CONTROLS)}, got {odd[0]!r}")
    token = model.to_single_token(target)
    wanted = autoencoder.of(latents)
    site, layer = place_of(autoencoder, site, layer)
    sets: dict[str, list[int] | None] = {"steered": wanted}
    if UNEDITED in asked:
        sets[UNEDITED] = None
    if RANDOM in asked:
        sets[RANDOM] = random_latents(autoencoder, wanted, among, seed)
    places = by_item(where, items)
    steering(autoencoder, wanted, mode, value, site=site, layer=layer)  # raises now

    def cells(batch: Batch) -> Iterator[Cell]:
        here: Any = where if places is None else [places[row] for row in batch.rows]
        for chosen in sets.values():
            laid: list[Edit] = []
            if chosen is not None:
                placed = {"site": site, "layer": layer, "where": here}
                laid = [steering(autoencoder, chosen, mode, value, **placed)]
            yield batch.inputs, laid

    def says(logits: Float[Tensor, "b v"]) -> Float[Tensor, " b"]:
        return (logits.argmax(-1) == token).double()

    wanted_metrics = {SAYS: metrics.read_at(says, name=SAYS), LOG_PROB: metrics.log_prob(target)}
    with evaluating(model):
        told = measured(
            model, items, cells, wanted_metrics, size=size, what="steering", progress=progress
        )
    columns = dict(zip(sets, told.values.unbind(-1), strict=True))

    def result(values: Tensor, **beside: Any) -> Result:
        return found(values, {"metric": told.metrics}, items, by=by, seed=seed, **beside)

    means = {name: values[:, 0].mean().item() for name, values in columns.items()}
    said = ", ".join(f"{name} {mean:.3g}" for name, mean in means.items())
    return result(
        columns.pop("steered"),
        controls={name: result(values) for name, values in columns.items()},
        meta={"target": target, "site": site, "latents": ", ".join(map(str, wanted[:50]))},
        report=[f"{target!r} is answered to this share of items: {said}."],
    )


def random_latents(
    autoencoder: Autoencoder, wanted: Sequence[int], among: Sequence[int] | None, seed: int
) -> list[int]:
    """As many other latents.

    Raises:
        ControlError: too few others.
    """
    pool = range(autoencoder.width) if among is None else autoencoder.of(among)
    others = sorted(set(pool) - set(wanted))
    whole("seed", seed, least=0)
    if len(others) < len(wanted):
        raise ControlError(f"{RANDOM}: {len(wanted)} wanted, and {len(others)} others there")
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    return [others[i] for i in order[: len(wanted)].tolist()]
