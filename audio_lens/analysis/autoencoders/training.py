"""Training sparse autoencoders on activations that are read from disk as they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import files
from audio_lens.analysis.autoencoders.autoencoder import KINDS, Autoencoder
from audio_lens.analysis.autoencoders.keeping import Kept, keep
from audio_lens.analysis.autoencoders.learning import Learner, Setting
from audio_lens.analysis.autoencoders.rows import Given, Source, Stream
from audio_lens.arguments import number, whole
from audio_lens.digests import of_tensor
from audio_lens.errors import InputError
from audio_lens.progress import track

ACTIVE = 100  # times that a latent is active on average, in rows that make a silent one dead
BATCH, RATE = 512, 3e-3
NOTED = 50  # steps from one line of the history to the next


def train(
    activations: Given,
    width: int,
    k: int,
    *,
    kind: str = "topk",
    steps: int = 1200,
    batch: int = BATCH,
    rate: float = RATE,
    seed: int = 0,
    site: str | None = None,
    layer: int | None = None,
    resample: int = 25,
    dead_after: int | None = None,
    start: Autoencoder | None = None,
    known: Float[Tensor, "n d"] | None = None,
    to: str | Path | None = None,
    every: int = 500,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Autoencoder:
    """An autoencoder whose latents are few at a time, trained on rows of activations.

    Rows come in random order from all clips at once, and are read as they are needed: memory does
    not grow with their number. `items.collect` leaves out padding, so no row of it is learned
    from. Activations are scaled so that they are √d long on average, directions kept at unit
    length; the result takes activations as they are. What goes down is the share of the variance
    that is not reconstructed (FVU). A latent that was not active in the last ``dead_after`` rows is
    turned towards what is lost of a row, drawn by how much that is, and starts anew: auxiliary
    losses do not revive dead latents in short runs. In the last 30 % of the steps the rate falls
    to 0 and none is revived.

    Args:
        activations: `Activations`, or a plain tensor ``n d``.
        width: how many latents.
        k: how many of them are active: of each row ("topk"), or on average. "relu" changes the
            price of activity (L1) on its way so that there are so many, "jumprelu" pays for
            the distance from it.
        kind: "topk", "batchtopk", "relu" or "jumprelu", as `Autoencoder` has them.
        steps: of Adam.
        batch: rows of a step.
        rate: of learning, at first.
        seed: of the start, the order of rows and the revivals.
        site, layer: of `Activations`; None takes the first, and its only layer.
        resample: steps from one revival to the next; 0 revives none.
        dead_after: see above; None takes as many rows as make a latent active a hundred times on
            average, 100 · width / k.
        start: an autoencoder of the same width, size and kind to go on from.
        known: directions that are known to be there: progress and history then tell which share of
            them was found (cosine above 0.9). A share of dead latents is no failure where there
            are more latents than directions.
        to: a file that is written every so many steps and at the end. A run that was stopped goes
            on from it, bit for bit: call it again with the same arguments.
        every: how many steps.
        device: where it is trained; None is where the rows are.
        progress: as in `patching.sweep`; it tells FVU, L0 and the share of dead latents.

    Raises:
        InputError: a kind, width or k that there is not, activations of another shape or that are
            not finite, a ``start`` that does not fit, or a file that holds something else.
        ActivationsError: a site or layer that was not collected.
        OutputError: a file that cannot be written.
    """
    setting = setting_of(width, k, kind, steps, batch, rate, seed, resample, dead_after)
    whole("every", every, least=1)
    source = Source.of(activations, site, layer)
    if known is not None and (known.ndim != 2 or known.shape[1] != source.d):
        raise InputError(f"known directions are n by {source.d}, got {list(known.shape)}")
    asked = _asked(setting, source, start)
    path = None if to is None else Path(to)
    if path is not None:
        files.try_out(path)
    stream = Stream(source, seed)
    kept = None if path is None else Kept.read(path, asked, device)
    if kept is not None and kept.is_whole:
        return kept.made
    if kept is None:
        learner = Learner.of(setting, _placed(stream.peek(), device), start)
    else:
        learner = kept.learner(setting, stream)
    with track("autoencoder", steps, "steps", show=progress) as advance:
        advance(learner.step, learner.step)
        while learner.step < steps:
            fvu, l0 = learner.learn(_placed(stream.next(batch), device))
            is_last = learner.step == steps
            note = ""
            if learner.step % NOTED == 0 or is_last:
                note = learner.note(fvu, l0, known)
            if path is not None and not is_last and learner.step % every == 0:
                keep(path, _made(learner, source, asked), learner, asked, stream)
            advance(1, learner.step, note)
    made = _made(learner, source, asked)
    if path is not None:
        keep(path, made, None, asked, stream)
    return made


def setting_of(
    width: int,
    k: int,
    kind: str,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    resample: int,
    dead_after: int | None,
) -> Setting:
    """What is trained and how, as far as it can be.

    Raises:
        InputError: a kind or a number that cannot be.
    """
    if kind not in KINDS:
        raise InputError(f"kind is one of {', '.join(KINDS)}, got {kind!r}")
    whole("width", width, least=1)
    whole("k", k, least=1, most=width)
    whole("steps", steps, least=1)
    whole("batch", batch, least=2)
    number("rate", rate, above=0)
    whole("seed", seed, least=0)
    whole("resample", resample, least=0)
    silent = -(-ACTIVE * width // k) if dead_after is None else dead_after
    whole("dead_after", silent, least=1)
    return Setting(width, k, kind, steps, batch, rate, seed, resample, silent)


def _placed(rows: Float[Tensor, "n d"], device: Any) -> Float[Tensor, "n d"]:
    return rows if device is None else rows.to(device)


def _made(learner: Learner, source: Source, asked: Mapping[str, Any]) -> Autoencoder:
    """The autoencoder, for activations as they are."""
    setting = learner.setting
    told = {name: str(value) for name, value in asked.items()} | {"scale": f"{learner.scale:.6g}"}
    return Autoencoder(
        **learner.finished(),
        kind=setting.kind,
        k=setting.k,
        site=source.site,
        layer=source.layer,
        meta=told | {"steps": str(learner.step)},
        history={name: list(held) for name, held in learner.history.items()},
    )


def _asked(setting: Setting, source: Source, start: Autoencoder | None) -> dict[str, Any]:
    """What a run must share to go on with another."""
    begun = "" if start is None else of_tensor(torch.cat([start.reads, start.directions]))
    return asdict(setting) | source.origin | ({"start": begun} if begun else {})
