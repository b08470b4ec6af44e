"""The classifier lens: what a classifier would say of every stream of its encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens.analysis.adapters.streams import beside_none, streams_of_part
from audio_lens.analysis.encoder_lens.said import answer_tokens
from audio_lens.analysis.encoder_lens.streams import check_readable
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.items import Items, found, method, statistics
from audio_lens.models import HookedAudioTransformer
from audio_lens.models.layers.blocks import Stack
from audio_lens.progress import track
from audio_lens.results import Result
from audio_lens.running import evaluating

KL, AGREES, RIGHT = "kl", "agrees", "right"
OTHER = "other_item"


@method("adapters.classifier_lens")
def classifier_lens(
    model: HookedAudioTransformer,
    items: Items,
    *,
    apply_final_ln: bool = True,
    controls: bool = True,
    by: str | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """From which layer on an encoder's classifier would say what it says (2509.08454).

    Every stream goes through the head: "kl" is the divergence of that from what the model says, in
    nats (0 at the last stream), "agrees" whether the likeliest class is the same, and "right"
    whether it is the item's answer, where all have one. Stream 0 enters the first block, stream l
    leaves block l - 1. Controls: "other_item" compares with what is said of another item, and, for
    a model with a live adapter, "no_adapter" is the same without it.

    Args:
        model: an encoder with a head for classes.
        items: what it hears.
        apply_final_ln: whether streams before the last go through the encoder's final norm, which
            the head was trained behind. The published code leaves it out, and so False gives its
            values; the last stream has it either way.
        controls, by, size, progress: as in `alignment`.
        seed: of control and intervals.

    Raises:
        InputError: a model without classes, or, without the norm, an encoder that has none or does
            more in the end than to apply it.
        ItemError: an answer that is no class, or a single item.
    """
    check_readable(model)
    if model.cfg.output_kind != "classes":
        raise InputError(
            f"{model.cfg.family} writes {model.cfg.output_kind}, not classes: read its encoder by "
            "encoder_lens, its decoder by logit_lens"
        )
    if not apply_final_ln:
        _check_skippable(model)
    has_answers = all(item.answer is not None for item in items)
    wanted = answer_tokens(model, items) if has_answers else None
    order = statistics.other_item(len(items), seed=seed).tolist() if controls else None
    names = [KL, AGREES, *([RIGHT] if has_answers else [])]
    axes = {"metric": names, "layer": list(range(model.cfg.need_encoder.n_layers + 1))}

    def result(said: _Said, of: Sequence[int] | None = None, **beside: Result) -> Result:
        values = said.values(of, wanted)
        return found(values, axes, items, by=by, seed=seed, controls=beside)

    said, others = beside_none(
        model, controls, lambda what: _read(model, items, apply_final_ln, size, what, progress)
    )
    beside = {name: result(one) for name, one in others.items()}
    if order is not None:
        beside[OTHER] = result(said, order)
    own = result(said, None, **beside)
    own.meta |= {"value": "KL from what is said (nats), or share of items"}
    own.report = _told(own.values.mean(1))
    return own


@dataclass(frozen=True)
class _Said:
    """What is said of every item: by the model, and of each stream."""

    own: Float[Tensor, "n classes"]
    streams: Float[Tensor, "n streams classes"]

    def values(
        self, of: Sequence[int] | None, wanted: Tensor | None
    ) -> Float[Tensor, "n metrics streams"]:
        """The metrics; of other items' words, where they are named."""
        rows = torch.arange(len(self.own)) if of is None else torch.tensor(list(of))
        truth = self.own[rows][:, None]
        likeliest = self.streams.argmax(-1)
        told = [
            (truth.exp() * (truth - self.streams)).sum(-1),
            (likeliest == truth.argmax(-1)).double(),
        ]
        if wanted is not None:
            told.append((likeliest == wanted[rows][:, None]).double())
        return torch.stack(told, dim=1)


@torch.no_grad()
def _read(
    model: HookedAudioTransformer,
    items: Items,
    apply_final_ln: bool,
    size: int,
    what: str,
    progress: bool | None,
) -> _Said:
    n_streams = model.cfg.need_encoder.n_layers + 1
    n_classes = model.cfg.output.need_d_vocab
    own = torch.zeros(len(items), n_classes, dtype=torch.float64)
    streams = torch.zeros(len(items), n_streams, n_classes, dtype=torch.float64)
    title = f"classifier lens {what}".strip()
    with evaluating(model), track(title, len(items), "items", show=progress) as advance:
        done = 0
        for batch in items.batches(model, size):
            own[batch.rows] = _log_probs(model(batch.inputs))
            read = streams_of_part(model, batch.inputs, "encoder")
            for i, stream in enumerate(read):
                is_last = i == n_streams - 1
                logits = _through_head(model, batch.inputs, stream, apply_final_ln or is_last)
                streams[batch.rows, i] = _log_probs(logits)
            done += len(batch)
            advance(len(batch), done)
    return _Said(own, streams)


def _through_head(
    model: HookedAudioTransformer,
    inputs: AudioInputs,
    stream: Float[Tensor, "b t d"],
    apply_final_ln: bool,
) -> Float[Tensor, "b classes"]:
    with model.running(inputs):
        return model.read_out(model.send_rows(stream, inputs) if apply_final_ln else stream, inputs)


def _log_probs(logits: Float[Tensor, "b classes"]) -> Float[Tensor, "b classes"]:
    return logits.double().log_softmax(-1).cpu()


def _check_skippable(model: HookedAudioTransformer) -> None:
    """Raise unless the encoder ends with a norm, and with nothing else.

    Raises:
        InputError: naming the model.
    """
    is_plain = type(model.encoder).finish is Stack.finish
    if not (is_plain and model.cfg.need_encoder.final_norm):
        raise InputError(
            f"apply_final_ln=False has no meaning here: the encoder of {model.cfg.family} does not "
            "end with a norm alone"
        )


def _told(means: Float[Tensor, "metrics streams"]) -> list[str]:
    agrees = means[1]
    behind = (agrees < 0.9).nonzero().flatten()
    first = 0 if not len(behind) else int(behind[-1]) + 1
    inner = means[0][1:-1]
    told = [f"From stream {first} on, 90% of the items are classed as by the model."]
    if len(inner):
        least = 1 + int(inner.argmin())
        told.append(
            f"Of the streams between, {least} is nearest to what the model says: "
            f"{means[0][least]:.3g} nats."
        )
    return told
