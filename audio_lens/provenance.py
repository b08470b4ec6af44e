"""What every result records beside its numbers: what it was made with, and what was asked."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from audio_lens import metrics
from audio_lens.edits.written import KINDS
from audio_lens.inputs import AudioInputs
from audio_lens.models.base import HookedAudioTransformer
from audio_lens.timeline import Band, Span

SEED = 0  # of everything a sweep draws at random: the cells that are verified
PROBES = 16  # numbers of every tensor of weights that go into their hash
OWN = "own"  # marks what a file cannot hold


def provenance(
    model: HookedAudioTransformer,
    clean: AudioInputs,
    corrupted: AudioInputs,
    names: Sequence[str],
) -> dict[str, str]:
    """What a result was made with: model and weights, inputs, versions, seed."""
    revision = revision_of(model.cfg.model_name)
    return {
        "model": model.cfg.model_name,
        **({} if revision is None else {"revision": revision}),
        "weights_hash": weights_hash(model),
        "metric": ", ".join(names),
        "clean_hash": clean.digest(),
        "corrupted_hash": corrupted.digest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attn_mode": model.attn_mode,
        "seed": str(SEED),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **versions(),
    }


@torch.no_grad()
def weights_hash(model: nn.Module) -> str:
    """A hash of the weights: names, shapes, dtypes, and some numbers of every tensor.

    Quick, and the same on every device; a change of few numbers may escape it.
    """
    digest, probes = hashlib.sha256(), {}
    for name, weight in model.named_parameters():
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        step = max(1, weight.numel() // PROBES)
        probes.setdefault(weight.device, []).append(weight.reshape(-1)[::step].double())
    for tensors in probes.values():
        digest.update(torch.cat(tensors).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def revision_of(name: str) -> str | None:
    """The commit of a checkpoint from the hub, as it lies in the cache; None for any other."""
    if name.count("/") != 1 or Path(name).exists():
        return None
    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages a value depends on."""
    packages = ("audio_lens", "torch", "transformers", "transformer_lens")
    return {package: version(package) for package in packages} | {
        "python": platform.python_version()
    }


# -------------------------------------------------------------------------------- arguments


def recorded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as JSON holds them; what it cannot hold (functions, activations) is marked."""
    return {name: _recorded(value) for name, value in arguments.items()}


def _recorded(value: Any) -> Any:
    try:
        return _to_json(value)
    except TypeError:
        return {OWN: type(value).__name__}


def _to_json(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    kind = next((name for name, kind in _kinds().items() if type(value) is kind), None)
    if kind is not None:
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"kind": kind, **{name: _to_json(one) for name, one in fields.items()}}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"named": {key: _recorded(one) for key, one in value.items()}}
    if isinstance(value, (Tensor, Mapping, AudioInputs)):
        raise TypeError(f"a file of results holds no {type(value).__name__}")
    if isinstance(value, Sequence):
        items = [_to_json(one) for one in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    raise TypeError(f"a file of results holds no {type(value).__name__}")


def is_own(value: Any) -> bool:
    """Whether a recorded argument, or a part of it, is of a kind that could not be written."""
    if not isinstance(value, dict):
        return False
    return OWN in value or any(map(is_own, value.get("named", {}).values()))


def recalled(value: Any) -> Any:
    """The value of a recorded argument."""
    if isinstance(value, list):
        return [recalled(one) for one in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(recalled(value["tuple"]))
    if "named" in value:
        return {name: recalled(one) for name, one in value["named"].items()}
    fields = {name: recalled(one) for name, one in value.items() if name != "kind"}
    return _kinds()[value["kind"]](**fields)


def _kinds() -> dict[str, type]:
    """What is recorded field by field, by its name in files."""
    return KINDS | {"Span": Span, "Band": Band} | metrics.Metric.kinds
