"""What every result keeps beside its numbers, and the checks of unpatched runs."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from audio_lens.inputs import AudioInputs, InputError

if TYPE_CHECKING:
    from audio_lens.models.base import HookedAudioTransformer


def check_pair(
    model: HookedAudioTransformer,
    one: AudioInputs,
    other: AudioInputs,
    names: tuple[str, str] = ("clean", "corrupted"),
) -> None:
    """Raise unless every position of two batches corresponds.

    Raises:
        InputError: naming the difference.
    """
    one.check_pairs_with(other, *names)
    if not model.timeline(one).corresponds_to(model.timeline(other)):
        raise InputError(
            f"the audio of {' and '.join(names)} lies at different positions of the prompt, so "
            "these do not correspond: use texts that put it in the same place"
        )


def check_finite(values: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raise where a metric is NaN or infinite before anything is patched.

    Raises:
        ValueError: naming metric and run.
    """
    for run, of_metrics in values.items():
        broken = [
            n for n, value in zip(names, of_metrics, strict=True) if not value.isfinite().all()
        ]
        if broken:
            raise ValueError(f"metric {', '.join(broken)} is not finite on the {run} run")


def batch_dims(
    metric: Any, names: Sequence[str], batch: int, baseline: Float[Tensor, "metrics *batch"]
) -> tuple[tuple[str, ...], dict[str, list]]:
    """The dims in front of the axes and their coordinates: several metrics, several stimuli."""
    dims: dict[str, list] = {}
    if isinstance(metric, Mapping):
        dims["metric"] = list(names)
    if baseline.ndim == 2 and batch > 1:
        dims["stimulus"] = list(range(batch))
    return tuple(dims), dims


def provenance(
    model: HookedAudioTransformer,
    clean: AudioInputs,
    corrupted: AudioInputs,
    names: Sequence[str],
) -> dict[str, str]:
    """What it takes to make the map again."""
    return {
        "model": model.cfg.model_name,
        "metric": ", ".join(names),
        "clean_hash": clean.digest(),
        "corrupted_hash": corrupted.digest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attn_mode": model.attn_mode,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **_versions(),
    }


@functools.cache
def _versions() -> dict[str, str]:
    packages = ("audio_lens", "torch", "transformers", "transformer_lens")
    return {package: version(package) for package in packages}
