"""Distributed alignment search: the directions whose exchange exchanges the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from audio_lens import metrics
from audio_lens.analysis.interchange.sources import (
    CHANGED,
    UNCHANGED,
    Sources,
    answers_of,
    mapped,
)
from audio_lens.analysis.subspaces.curve import places_of_part
from audio_lens.analysis.subspaces.exchange import Spot
from audio_lens.analysis.subspaces.subspace import Subspace
from audio_lens.arguments import whole
from audio_lens.digests import of_state
from audio_lens.edits import Swap, intervene
from audio_lens.errors import InputError
from audio_lens.inputs import AudioInputs
from audio_lens.items import Items, Pairs
from audio_lens.items.collect import Place
from audio_lens.models import HookedAudioTransformer
from audio_lens.patching.attribution.runs import differentiable
from audio_lens.progress import track
from audio_lens.running import evaluating

SHARE_CHANGED = 0.75  # of the exchanges that are learned from
LAST = 10  # steps whose mean loss is told


def das(
    model: HookedAudioTransformer,
    pairs: Pairs[Items],
    site: str,
    where: Place = "all",
    *,
    layer: int | None = None,
    rank: int,
    steps: int = 120,
    rate: float = 0.05,
    mapping: Mapping[str, str] | None = None,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Subspace:
    """The k directions whose exchange brings the other run's answer (DAS, 2303.02536).

    Each step exchanges what lies in them between clean runs and others of the same layout, both
    sides of the pairs, and goes down the cross-entropy of the answer that should follow: that of
    the run that lends. Three of four exchanges change the answer, in the others it must stay. The
    encoder runs once. Test the result on other pairs, best of other speakers: `iia`, or `align`,
    which does both.

    Args:
        model: the model.
        pairs: kept are those that are answered rightly on the clean side, and not on the corrupted.
        site: ``part.activation``, such as ``decoder.resid_pre``.
        where: a place, or a function of the item.
        layer: the block.
        rank: how many directions.
        steps: of Adam, whose rate falls to 0 (cosine).
        rate: of learning, at first.
        mapping: what each answer stands for in place of itself: as a control, a `shuffled` one.
        size: exchanges of a step.
        seed: of the start and the exchanges.
        progress: as in `patching.sweep`.

    Returns:
        A subspace of ``rank`` orthonormal directions; ``meta["loss"]`` is the mean of its last ten
        steps, in nats.

    Raises:
        SiteError: a site or block that the model does not have, or a block that nobody names.
        InputError: a rank beyond the width of the site, or a mapping that lacks an answer.
        ItemError: answers that are not one token each, or no pair that is left.
    """
    check_search(pairs, rank, steps, mapping)
    Spot.of(model, pairs.clean, site, where, layer)
    kept, _ = pairs.kept(model, size)
    place = places_of_part(where, pairs, kept)
    options = {"rank": rank, "steps": steps, "rate": rate, "mapping": mapping, "size": size}
    return learned(model, kept, site, place, layer=layer, seed=seed, progress=progress, **options)


def learned(
    model: HookedAudioTransformer,
    kept: Pairs[Items],
    site: str,
    where: Place,
    *,
    layer: int | None,
    rank: int,
    steps: int,
    rate: float = 0.05,
    mapping: Mapping[str, str] | None = None,
    asked: bool = True,
    size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
) -> Subspace:
    """What `das` learns, of pairs that are kept already, with options that are checked.

    Args:
        asked: as in `Sources.of`: not, where an untrained model stands in for the one that answers.
    """
    order = np.random.default_rng(seed).permutation(len(kept)).tolist()
    drawn = kept[order]
    spot = Spot.of(model, drawn.clean, site, places_of_part(where, kept, drawn), layer)
    with evaluating(model):
        search = _Search.of(spot, drawn, mapping, asked, size, seed)
        basis, losses = search.learned(rank, steps, rate, progress)
    told = {
        "model": model.cfg.model_name,
        "weights_hash": of_state(model),
        "items_hash": f"{drawn.clean.digest()} {drawn.corrupted.digest()}",
        "pairs": str(len(drawn)),
        "steps": str(steps),
        "mapping": "true" if mapping is None else "another",
        "seed": str(seed),
        "loss": f"{sum(losses[-LAST:]) / len(losses[-LAST:]):.6g}",
    }
    place = {"site": str(spot.site), "layer": spot.layer}
    return Subspace.spanned(basis.cpu(), kind="das", meta=told, **place)


def check_search(
    pairs: Pairs[Items], rank: int, steps: int, mapping: Mapping[str, str] | None = None
) -> None:
    """Raise for what cannot be learned.

    Raises:
        InputError: no directions or steps, or a mapping that lacks an answer.
    """
    whole("rank", rank, least=1)
    whole("steps", steps, least=1)
    lacking = sorted(set(answers_of(pairs)) - mapping.keys()) if mapping is not None else []
    if lacking:
        raise InputError(f"the mapping says nothing of {', '.join(lacking)}")


@dataclass(frozen=True)
class _Bench:
    """Some clean runs, ready to take from others.

    Attributes:
        resid: what enters the first part of the encoder that runs again; None where none does.
        encoded: what the decoder receives of the audio; None where that is edited.
    """

    rows: list[int]
    inputs: AudioInputs
    sources: Sources
    resid: Tensor | None
    encoded: Tensor | None

    @staticmethod
    @torch.no_grad()
    def of(spot: Spot, inputs: AudioInputs, rows: list[int], sources: Sources) -> _Bench:
        model = spot.model
        if spot.site.part == "decoder":
            return _Bench(rows, inputs, sources, None, model.encode(inputs))
        return _Bench(rows, inputs, sources, model.encode(inputs, stop=_first(spot)), None)

    def logits(self, spot: Spot) -> Float[Tensor, "b *t v"]:
        """Of the run with the edits in force, from the first block on that is edited."""
        model, encoded = spot.model, self.encoded
        if encoded is None:
            encoded = model.encode(self.inputs, self.resid, _first(spot))
        return model(self.inputs, encoder_out=encoded)


def _first(spot: Spot) -> int:
    """The block of the encoder where an edit in front of the decoder begins."""
    layer, n_layers = spot.layer, spot.model.cfg.need_encoder.n_layers
    return layer if spot.site.part == "encoder" and layer is not None else n_layers


@dataclass(frozen=True)
class _Search:
    """What is learned from.

    Attributes:
        mapping: what each answer stands for; None for itself.
    """

    spot: Spot
    benches: list[_Bench]
    mapping: Mapping[str, str] | None
    seed: int

    @staticmethod
    def of(
        spot: Spot,
        pairs: Pairs[Items],
        mapping: Mapping[str, str] | None,
        asked: bool,
        size: int,
        seed: int,
    ) -> _Search:
        if spot.site.part not in ("encoder", "connector", "decoder"):
            raise InputError(f"das learns in the encoder, connector or decoder, not at {spot}")
        benches = [
            _Bench.of(spot, batch.pair.clean, batch.rows, Sources.of([spot], pairs, batch, asked))
            for batch in pairs.batches(spot.model, size)
        ]
        return _Search(spot, benches, mapping, seed)

    def learned(
        self, rank: int, steps: int, rate: float, progress: bool | None
    ) -> tuple[Float[Tensor, "d k"], list[float]]:
        """The directions, and the loss of every step."""
        like = self.benches[0].sources.states[0]
        width = like.shape[-1]
        if rank > width:
            raise InputError(
                f"vectors of {self.spot} have {width} entries: rank {rank} is too many"
            )
        start = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(width, rank, generator=start, dtype=torch.float64)
        wide = torch.promote_types(like.dtype, torch.float32)
        basis = torch.linalg.qr(drawn)[0].to(like.device, wide).requires_grad_()
        optimizer, draw = torch.optim.Adam([basis], rate), np.random.default_rng(self.seed)
        losses = []
        with (
            track("DAS", steps, "steps", show=progress) as advance,
            differentiable(self.spot.model),
        ):
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
                loss = self._loss(basis, self.benches[step % len(self.benches)], draw)
                (basis.grad,) = torch.autograd.grad(loss, [basis])
                optimizer.step()
                with torch.no_grad():  # the rotation stays one: QR retraction
                    basis.copy_(torch.linalg.qr(basis)[0])
                losses.append(loss.item())
                advance(1, step + 1)
        return basis.detach(), losses

    def _loss(self, basis: Tensor, bench: _Bench, draw: np.random.Generator) -> Float[Tensor, ""]:
        """The cross-entropy of the answers that should follow."""
        lenders = self._lenders(bench, draw)
        sources, spot = bench.sources, self.spot
        wanted = [mapped(sources.answers[run], self.mapping) for run in lenders]
        edit = spot.edit(Swap(basis, sources.states[0][lenders]), bench.rows)
        with intervene(spot.model, edit):
            logits = bench.logits(spot)
        told = metrics.log_prob([str(one) for one in wanted]).bind(spot.model, bench.inputs)
        return -told(logits).mean()

    def _lenders(self, bench: _Bench, draw: np.random.Generator) -> list[int]:
        """Who lends to each row: mostly one with another answer; itself, if nobody else can."""
        count, sources = len(bench.rows), bench.sources
        either = [sources.drawn(count, kind, draw) for kind in (CHANGED, UNCHANGED)]
        turned = draw.random(count) >= SHARE_CHANGED
        chosen = []
        for row in range(count):
            first, second = (either[int(turned[row])][row], either[1 - int(turned[row])][row])
            lender = first if first is not None else second
            chosen.append(row if lender is None else lender)
        return chosen
