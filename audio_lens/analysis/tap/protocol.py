"""`tap`: Temporal Attribution Patching in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from audio_lens import metrics as measures
from audio_lens.analysis.tap import pairing
from audio_lens.analysis.tap.nodes import KINDS, Windows, kinds_of
from audio_lens.analysis.tap.pairing import Corruptions
from audio_lens.analysis.tap.report import Report
from audio_lens.analysis.tap.stages import Stages
from audio_lens.analysis.tap.work import LOCATING, STAGES, Study, digest
from audio_lens.arguments import whole
from audio_lens.errors import InputError
from audio_lens.items import Items, Pairs
from audio_lens.models import HookedAudioTransformer
from audio_lens.provenance import of_model


def tap(
    model: HookedAudioTransformer,
    pairs: Pairs[Items],
    *,
    corruptions: Corruptions = None,
    metrics: Any = None,
    k: int | None = None,
    windows: Windows = 0.2,
    part: str | None = None,
    kinds: Sequence[str] = KINDS,
    rank: int = 16,
    stages: Sequence[str] = STAGES,
    checkpoint: str | Path | None = None,
    size: int = 64,
    seed: int = 0,
    progress: bool | None = None,
) -> Report:
    """Where, when and in which directions is the answer carried: claims that can be attacked.

    One protocol. Pairs whose roles hold are split, no group (speaker) on both sides. On the first
    part attribution patching estimates every node and the number of nodes to confirm is chosen; on
    the second they are patched exactly, both ways, under every corruption and in every metric,
    beside their controls. What is confirmed is then followed: hand-over, subspace, transfer between
    groups, causal scrubbing, and what probes read there.

    Args:
        model: any model whose answers are tokens or classes.
        pairs: clean and corrupted, with ``answer`` and ``against``; the clips must differ.
        corruptions: beside the pairs' own counterparts; see `pairing.families`.
        metrics: two or more by name; None takes the log-probability and the logit difference of the
            answers. Estimates are of "logit_diff" or else of the first.
        k: how many nodes of every kind to confirm; None chooses on the pairs that are searched.
        windows: width in seconds, or width and stride.
        part: whose blocks; None takes the decoder where audio lies at its positions, and else the
            encoder.
        kinds: of "window" (the residual stream at some seconds), "head", "neuron", "connector".
        rank: how many directions the confirmed place may need.
        stages: which to run, from the first on: ``tap.LOCATING`` ends with the claims.
        checkpoint: a file that keeps every stage that is done; the same call goes on from there.
        size: of the batches.
        seed: of all that is drawn.
        progress: a bar over the stages, as in `patching.sweep`.

    Raises:
        InputError: fewer than two corruptions or metrics, or arguments that do not fit the model.
        ItemError: answers that are not one token, or pairs that sound alike on both sides.
        CheckpointError: a file of another study, or metrics that nobody can know again.
    """
    if not isinstance(pairs, Pairs):
        raise InputError(f"tap takes pairs (items.pairs(...)), got {type(pairs).__name__}")
    if list(stages) != list(STAGES[: len(stages)]) or len(stages) < len(LOCATING):
        raise InputError(f"stages are the first ones of {', '.join(STAGES)}, up to claims at least")
    whole("rank", rank, least=1)
    whole("size", size, least=1)
    whole("seed", seed, least=0)
    if k is not None:
        whole("k", k, least=1)
    study = Study(
        model=model,
        families=pairing.families(pairs, corruptions),
        metrics=_metrics(model, pairs, metrics),
        kinds=kinds_of(model, pairs.clean, windows, part, kinds),
        k=k,
        rank=rank,
        size=size,
        seed=seed,
    )
    asked = {
        **{"corruptions": ", ".join(study.families), "metrics": ", ".join(study.metrics)},
        **{"k": str(k), "windows": str(windows), "part": str(part), "kinds": ", ".join(kinds)},
        **{"rank": str(rank), "size": str(size), "seed": str(seed)},
    }
    identity = {} if checkpoint is None else study.identity(asked, metrics)
    kept = Stages(identity, None if checkpoint is None else Path(checkpoint))
    parts = study.run(kept, stages, progress)
    meta = of_model(model) | {"items_hash": digest(pairs), "seed": str(seed)}
    return Report(parts, meta, asked)


def _metrics(model: HookedAudioTransformer, pairs: Pairs[Items], given: Any) -> dict[str, Any]:
    found = pairs.clean.metrics(model) if given is None else measures.named(given)
    if len(found) < 2:
        raise InputError(
            "the protocol asks for two metrics or more, as no claim may rest on one: give items "
            "`against`, or metrics={'name': ..., 'other': ...}"
        )
    return dict(found)
