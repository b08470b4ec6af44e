"""Edits as files: JSON that people can read, with tensors beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from audio_lens import files
from audio_lens.combining import Either, Outside, Without
from audio_lens.edits.attention import Bias, Block, Multiply, Sharpen, Weights
from audio_lens.edits.do import Add, Erase, Latents, Mix, Project, Put, Reconstruct, Scale, Swap
from audio_lens.edits.edit import Edit
from audio_lens.edits.enrich import Enrich
from audio_lens.inputs import AudioInputs, InputError
from audio_lens.places import Named, Words
from audio_lens.timeline import Band, Span

_CLASSES: tuple[type, ...] = (
    *(Put, Mix, Scale, Add, Project, Swap, Block, Bias, Weights, Multiply, Sharpen, Latents),
    *(Enrich, Erase, Reconstruct),
    *(Words, Named, Either, Without, Outside, Span, Band, Edit),
)
KINDS = {kind.__name__: kind for kind in _CLASSES}  # what is written field by field
KIND, OWN_KIND = "kind", "its kind"  # what a thing is, and a field of it of that name
_NOT_WRITTEN = ("audio", "text", "remake", "copies")  # of inputs: no edit reads them
Kind = TypeVar("Kind", bound=type)


def writable(kind: Kind) -> Kind:
    """Have a dataclass written field by field, wherever edits and places are."""
    KINDS[kind.__name__] = kind
    return kind


def to_dict(edit: Edit) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An edit as what JSON holds, and the tensors it names.

    Raises:
        InputError: an edit that holds a function or a module (`Latents`).
    """
    tensors: dict[str, Tensor] = {}
    return _written(edit, tensors, str(edit)), tensors


def from_dict(written: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
    """The edit that `to_dict` wrote.

    Raises:
        InputError: what is no edit.
    """
    edit = _read(written, tensors)
    if not isinstance(edit, Edit):
        raise InputError(f"no edit is written here, but {type(edit).__name__}")
    return edit


def save(edits: Edit | Sequence[Edit], path: str | Path) -> None:
    """Write edits to ``path`` (JSON), and their tensors beside it (``.safetensors``).

    Raises:
        InputError: an edit that holds a function or a module (`Latents`).
        OutputError: a file that cannot be written.
    """
    listed = [edits] if isinstance(edits, Edit) else list(edits)
    write_value(listed, path, "edits")


def load(path: str | Path) -> list[Edit]:
    """The edits that `save` wrote.

    Raises:
        InputError: no such file, or one that holds no edits.
    """
    listed = read_value(path, "edits")
    if not isinstance(listed, list) or not all(isinstance(one, Edit) for one in listed):
        raise InputError(f"{path} holds no edits")
    return listed


def write_value(value: Any, path: str | Path, called: str) -> None:
    """Write edits, places or what holds them under a name, with their tensors beside.

    Raises:
        InputError: functions or modules.
        OutputError: a file that cannot be written.
    """
    path = Path(path)
    form, tensors = held(value, called)
    if tensors:
        alone = {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}
        files.write(_beside(path), safetensors.torch.save(alone))
    files.write(path, json.dumps({called: form}, indent=1).encode())


def read_value(path: str | Path, called: str) -> Any:
    """What `write_value` wrote.

    Raises:
        InputError: no such file, or one that holds nothing of that name.
    """
    path = Path(path)
    try:
        form = json.loads(path.read_text())[called]
        beside = _beside(path)
        tensors = safetensors.torch.load_file(beside) if beside.exists() else {}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{path} holds no {called}: {error}") from error
    return again(form, tensors)


def _beside(path: Path) -> Path:
    return path.with_suffix(".safetensors")


def held(value: Any, whose: str) -> tuple[Any, dict[str, Tensor]]:
    """Edits, places, or what holds them, as what JSON holds, and the tensors that it names.

    Raises:
        InputError: functions or modules, naming what holds them.
    """
    tensors: dict[str, Tensor] = {}
    return _written(value, tensors, whose), tensors


def again(written: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `held` wrote."""
    return _read(written, tensors)


def _written(value: Any, tensors: dict[str, Tensor], whose: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        tensors[name := str(len(tensors))] = value
        return {"tensor": name}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, (list, tuple)):
        items = [_written(one, tensors, whose) for one in value]
        return items if isinstance(value, list) else {"tuple": items}
    kind = Edit if issubclass(type(value), Edit) else type(value)
    is_known = KINDS.get(kind.__name__) is kind
    if is_known or isinstance(value, AudioInputs):
        whose = str(value) if isinstance(value, Edit) else whose
        own = [f.name for f in fields(value) if f.name not in _NOT_WRITTEN or is_known]
        held = {name: _written(getattr(value, name), tensors, whose) for name in own}
        if KIND in held:
            held[OWN_KIND] = held.pop(KIND)
        return {KIND: kind.__name__, **held}
    if isinstance(value, Mapping) or hasattr(value, "keys"):
        items = {str(key): _written(value[key], tensors, whose) for key in value.keys()}  # noqa: SIM118
        return {"mapping": items}
    raise InputError(
        f"{whose} holds a {type(value).__name__}, which no file can: edits with functions or "
        "modules of one's own are made anew each time"
    )


def _read(written: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(written, list):
        return [_read(one, tensors) for one in written]
    if not isinstance(written, Mapping):
        return written
    if "tensor" in written:
        if written["tensor"] not in tensors:
            raise InputError(f"tensor {written['tensor']} of an edit is missing beside it")
        return tensors[written["tensor"]]
    if "slice" in written:
        return slice(*written["slice"])
    if "tuple" in written:
        return tuple(_read(written["tuple"], tensors))
    if "mapping" in written:
        return {name: _read(one, tensors) for name, one in written["mapping"].items()}
    kind, held = written.get(KIND), {k: v for k, v in written.items() if k != KIND}
    if OWN_KIND in held:
        held[KIND] = held.pop(OWN_KIND)
    if kind == AudioInputs.__name__:
        return AudioInputs(**{name: _read(one, tensors) for name, one in held.items()})
    if kind not in KINDS:
        raise InputError(f"no edit or place is called {kind!r}: known are {', '.join(KINDS)}")
    try:
        return KINDS[kind](**{name: _read(one, tensors) for name, one in held.items()})
    except TypeError as error:
        raise InputError(f"{kind} cannot be read: {error}") from error
