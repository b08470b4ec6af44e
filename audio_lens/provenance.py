"""What every result records beside its numbers: what it was made with, and what was asked."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import safetensors.torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from audio_lens import metrics
from audio_lens.digests import of_state
from audio_lens.edits.edit import edits_of
from audio_lens.edits.written import KINDS, again, held
from audio_lens.identity import NoIdentityError, identity_of
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.models.base import HookedAudioTransformer
from audio_lens.models.loading.lora import LoraLinear
from audio_lens.timeline import Band, Span

SEED = 0  # of everything a sweep draws at random: the cells that are verified
OWN = "own"  # marks what a file cannot hold
_steady: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
MOST_BYTES = 2**26  # of the tensors of an argument that a file of results holds
_WITH_TENSORS = (  # arguments whose tensors are held
    *("do", "where", "groups", "edits", "hypothesis", "selection", "direction", "directions"),
    *("autoencoder", "value"),
)


def provenance(
    model: HookedAudioTransformer,
    clean: AudioInputs,
    corrupted: AudioInputs,
    names: Sequence[str],
    weights: str | None = None,
) -> dict[str, str]:
    """What a result was made with: model and weights, inputs, versions, seed.

    Args:
        names: of the metrics.
        weights: their hash, where it is known.
    """
    return of_model(model, weights) | {
        "metric": ", ".join(names),
        "clean_hash": clean.digest(),
        "corrupted_hash": corrupted.digest(),
        "seed": str(SEED),
    }


def of_model(model: HookedAudioTransformer, weights: str | None = None) -> dict[str, str]:
    """The model and its weights, where and when it ran, and the versions of what ran it.

    Args:
        weights: their hash, where it is known.
    """
    revision = revision_of(model.cfg.model_name)
    return {
        "model": model.cfg.model_name,
        **({} if revision is None else {"revision": revision}),
        "weights_hash": weights_hash(model) if weights is None else weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attn_mode": model.attn_mode,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **versions(),
    }


def weights_hash(model: nn.Module) -> str:
    """A hash of the weights, whole: names, shapes, dtypes, every number; and of adapters' switches.

    The same on every device. Asked again, it takes a fraction of the time while nothing changes;
    within `steady`, none.
    """
    if (held := _steady.get(model)) is not None:
        return held
    digest = hashlib.sha256(of_state(model).encode())
    for name, one in model.named_modules():
        if isinstance(one, LoraLinear):
            digest.update(f"{name} {one.enabled} {one.scale}".encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def steady(model: nn.Module) -> Iterator[None]:
    """Take the weights to stay as they are while this lasts, so that they are hashed once.

    For loops whose every step is known to leave them alone.
    """
    outer = _steady.get(model)
    _steady[model] = weights_hash(model)
    try:
        yield
    finally:
        del _steady[model]
        if outer is not None:
            _steady[model] = outer


def known(value: Any) -> str:
    """What a value is, as a hash; empty where it has no identity."""
    try:
        return identity_of(value)
    except NoIdentityError:
        return ""


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
    return {
        name: _with_tensors(name, value) if name in _WITH_TENSORS else _recorded(value)
        for name, value in arguments.items()
    }


def edits_in_force(model: HookedAudioTransformer) -> Any:
    """The edits in force (`intervene`), as recipes hold them; None without any."""
    edits = edits_of(model)
    return recorded({"edits": edits})["edits"] if edits else None


def _with_tensors(name: str, value: Any) -> Any:
    """Edits and places, with their tensors beside them where they are not too large."""
    plain = _recorded(value)
    if not is_own(plain):
        return plain
    try:
        form, tensors = held(value, name)
    except InputError:
        return plain
    if sum(x.nbytes for x in tensors.values()) > MOST_BYTES:
        return plain
    alone = {key: x.detach().cpu().clone().contiguous() for key, x in tensors.items()}
    return {
        "written": form,
        "tensors": base64.b64encode(safetensors.torch.save(alone)).decode(),
    }


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
    if "written" in value:
        tensors = safetensors.torch.load(base64.b64decode(value["tensors"]))
        return again(value["written"], tensors)
    if "tuple" in value:
        return tuple(recalled(value["tuple"]))
    if "named" in value:
        return {name: recalled(one) for name, one in value["named"].items()}
    fields = {name: recalled(one) for name, one in value.items() if name != "kind"}
    return _kinds()[value["kind"]](**fields)


def _kinds() -> dict[str, type]:
    """What is recorded field by field, by its name in files."""
    return KINDS | {"Span": Span, "Band": Band} | metrics.Metric.kinds
