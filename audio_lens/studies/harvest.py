"""Activations of many items as a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from audio_lens.arguments import whole
from audio_lens.items import Activations, Items
from audio_lens.places import Where
from audio_lens.studies.engines import Engine
from audio_lens.studies.errors import StudyError
from audio_lens.studies.spec import HARVEST
from audio_lens.studies.study import Study


def harvest_study(
    items: str | Path | Items,
    model: str = "embedded",
    sites: str | Sequence[str] = "decoder.resid_post",
    where: Where = "audio",
    *,
    out: str | Path,
    layers: Sequence[int] | None = None,
    pool: str | None = None,
    keep: str | None = "bfloat16",
    size: int = 16,
    unit: int = 64,
    **options: Any,
) -> Study:
    """The study behind `harvest`, of which nothing has run yet; arguments and errors as there."""
    if keep is not None and not isinstance(getattr(torch, keep, None), torch.dtype):
        raise StudyError(f"keep is a name of a dtype such as 'bfloat16', or None, got {keep!r}")
    if pool not in (None, "mean"):
        raise StudyError(f"pool is 'mean' or None, got {pool!r}")
    return Study(
        items,
        model,
        out=out,
        method=HARVEST,
        unit=unit,
        sites=[sites] if isinstance(sites, str) else list(sites),
        where=where,
        layers=None if layers is None else list(layers),
        pool=pool,
        keep=keep,
        size=whole("size", size, least=1),
        **options,
    )


def harvest(
    items: str | Path | Items,
    model: str = "embedded",
    sites: str | Sequence[str] = "decoder.resid_post",
    where: Where = "audio",
    *,
    out: str | Path,
    engine: Engine | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Activations:
    """Activations of items, computed by any engine and kept as `collect` keeps them.

    Every unit of items is one shard, whoever computes it: its bytes are the same with one worker
    and with many, and after a stop the same call goes on. `Activations.check` finds a shard that
    was changed since.

    Args:
        items, model: as in `Study`.
        sites, where: as in `collect`; a place that is a function of the item cannot be sent to
            workers.
        out: a folder that all workers see, or the address of an object store
            (``s3://bucket/folder``), from which `Activations` fetch rows as they are needed.
        engine: as in `Study.run`.
        progress: as in `patching.sweep`.
        options: ``layers``, ``pool`` and ``size`` of `collect`; ``keep``, the dtype in which
            activations are kept ("bfloat16"; None keeps what the model computes); ``unit``, how
            many items are in a shard (64); and ``dtype``, ``device``, ``loader``, ``threads``,
            ``skip_bad`` of `Study`.

    Raises:
        StudyError: tasks of Slurm that were submitted and are not done yet; or items without
            activations, by their reasons.
        ItemError, BucketError, OutputError, ExtraError: as `Study`.
    """
    study = harvest_study(items, model, sites, where, out=out, **options)
    status = study.run(engine, progress=progress)
    if not status.is_done:
        raise StudyError(
            f"{status.done_items} of {status.items} items are there; the same call goes on, and "
            "gives the activations once all are"
        )
    if status.n_failed:
        raise StudyError(
            f"{status.n_failed} items have no activations: {'; '.join(status.failed)}. Take them "
            "out of the table, or mend them and call Study.open(out).retry()"
        )
    return Activations.load(out)
