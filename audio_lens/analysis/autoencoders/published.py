"""Autoencoders as others publish them: AudioSAE, sparsify, SAELens; read and written."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from audio_lens import files
from audio_lens.analysis.autoencoders.autoencoder import Autoencoder
from audio_lens.arguments import suggest
from audio_lens.errors import InputError

AUDIOSAE, SPARSIFY, SAELENS = "audiosae", "sparsify", "saelens"
FORMATS = (AUDIOSAE, SPARSIFY, SAELENS)
FILES = {  # weights, and the configuration beside them
    AUDIOSAE: ("ae.pt", "config.json"),
    SPARSIFY: ("sae.safetensors", "cfg.json"),
    SAELENS: ("sae_weights.safetensors", "cfg.json"),
}
_OF_AUDIOSAE = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k", "threshold")
_OF_SPARSIFY = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
_OF_SAELENS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_SPARSIFY_OFF = ("multi_topk", "gram_table_hash", "lookup_max_order", "expansion_factor")
_SPARSIFY_REFUSED = ("skip_connection", "transcode", "embed_skip", "gram_lookup")
_SAELENS_PLAIN = ("d_in", "d_sae", "dtype", "device", "metadata", "k", "architecture")
_SAELENS_KINDS = {"topk": "topk", "jumprelu": "jumprelu", "standard": "relu"}


def read(
    path: str | Path,
    format: str | None = None,
    *,
    site: str | None = None,
    layer: int | None = None,
) -> Autoencoder:
    """An autoencoder that others published.

    - "audiosae": a folder ``layer_{n}`` with ``ae.pt`` (read with ``weights_only=True``). Their n
      is 1-based: the output of block n - 1, ``encoder.blocks.{n-1}.hook_resid_post``. What was
      trained by the batch is kept by its threshold.
    - "sparsify": a folder with ``sae.safetensors`` and ``cfg.json``, named after its module.
    - "saelens": a folder with ``sae_weights.safetensors`` and ``cfg.json``.

    Whatever the format does to activations first is folded into the weights, so that the result
    takes activations as they are.

    Args:
        path: the folder, or the file of weights in it.
        format: one of these; None tells by the files that are there.
        site, layer: whose activations it is of, where the files do not say.

    Raises:
        InputError: files that are missing or hold something else; tensors or settings that are not
            known, are missing, or of the wrong shape, by name.
    """
    folder, format = _found(Path(path), format)
    weights, config = FILES[format]
    settings = _settings(folder / config)
    readers: dict[str, Callable[..., Autoencoder]] = {
        AUDIOSAE: _audiosae,
        SPARSIFY: _sparsify,
        SAELENS: _saelens,
    }
    made = readers[format](_tensors(folder / weights), settings, folder)
    return replace(
        made,
        site=made.site if site is None else site,
        layer=made.layer if layer is None else layer,
        meta={"format": format, "path": str(folder)} | dict(made.meta),
    )


def write(autoencoder: Autoencoder, folder: str | Path, format: str) -> Path:
    """Write an autoencoder as others read it, into a folder, which is made where it is missing.

    Args:
        format: see `read`. "audiosae" holds kinds "topk" and "batchtopk"; "sparsify" "topk";
            "saelens" all, "batchtopk" as "jumprelu" with one threshold.

    Raises:
        InputError: another format, or a kind that it does not hold.
        OutputError: a folder that cannot be written.
    """
    _check_format(format)
    folder = Path(folder)
    writers = {AUDIOSAE: _to_audiosae, SPARSIFY: _to_sparsify, SAELENS: _to_saelens}
    data, settings = writers[format](autoencoder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.OutputError(f"{folder} cannot be made a folder: {error}") from error
    weights, config = FILES[format]
    files.write(folder / config, json.dumps(settings, indent=1).encode())
    files.write(folder / weights, data)
    return folder


# -------------------------------------------------------------------------------- files


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise InputError(f"no format {format!r}; {suggest(format, FORMATS)}")


def _found(path: Path, format: str | None) -> tuple[Path, str]:
    """The folder, and the format."""
    folder = path.parent if path.is_file() else path
    if format is not None:
        _check_format(format)
        return folder, format
    there = [name for name, (weights, _) in FILES.items() if (folder / weights).is_file()]
    if path.is_file():
        there = [name for name in there if FILES[name][0] == path.name]
    if len(there) != 1:
        known = ", ".join(weights for weights, _ in FILES.values())
        raise InputError(f"{path} holds {'several' if there else 'none'} of {known}: name format=")
    return folder, there[0]


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} holds no JSON: {error}") from error
    if not isinstance(held, dict):
        raise InputError(f"{path} holds no settings by name")
    return held


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name; nothing in it is ever run."""
    try:
        if path.suffix == ".pt":
            held = torch.load(path, map_location="cpu", weights_only=True)
        else:
            held = safetensors.torch.load_file(path)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # what pickle raises of files that are none, or that hold code
        raise InputError(f"{path} holds more than tensors, or is no such file: {error}") from error
    if not isinstance(held, Mapping):
        raise InputError(f"{path} holds no tensors by name")
    return {str(name): torch.as_tensor(x) for name, x in held.items()}


def _of(
    held: Mapping[str, Tensor], known: Sequence[str], optional: Sequence[str], where: Path
) -> dict[str, Tensor]:
    """The tensors, all of them known and none missing.

    Raises:
        InputError: naming what is unknown, or missing.
    """
    if odd := sorted(held.keys() - set(known)):
        raise InputError(f"{where} holds tensors that are not known: {', '.join(odd)}")
    lacking = [name for name in known if name not in held and name not in optional]
    if lacking:
        raise InputError(f"{where} lacks {', '.join(lacking)}")
    return dict(held)


def _check_shapes(held: Mapping[str, Tensor], shapes: Mapping[str, tuple], where: Path) -> None:
    for name, shape in shapes.items():
        if name in held and tuple(held[name].shape) != shape:
            raise InputError(f"{where}: {name} is {tuple(held[name].shape)}, expected {shape}")


def _matrix(held: Mapping[str, Tensor], name: str, where: Path) -> tuple[int, int]:
    if held[name].ndim != 2:
        raise InputError(f"{where}: {name} is {tuple(held[name].shape)}, expected two sizes")
    rows, columns = held[name].shape
    return rows, columns


# -------------------------------------------------------------------------------- AudioSAE


def _audiosae(held: Mapping[str, Tensor], settings: dict[str, Any], where: Path) -> Autoencoder:
    held = _of(held, _OF_AUDIOSAE, ("threshold",), where)
    m, d = _matrix(held, "encoder.weight", where)
    shapes = {"encoder.bias": (m,), "decoder.weight": (d, m), "b_dec": (d,), "k": ()}
    _check_shapes(held, shapes | {"threshold": ()}, where)
    threshold = held.get("threshold")
    if threshold is not None and not threshold >= 0:
        raise InputError(f"{where}: threshold is {threshold.item():g}, as if it was never set")
    number = re.fullmatch(r"layer_(\d+)", where.name)
    if number is not None and int(number[1]) < 1:
        raise InputError(f"{where}: their layers are counted from 1")
    return Autoencoder(
        held["encoder.weight"],
        held["encoder.bias"],
        held["decoder.weight"].mT.contiguous(),
        held["b_dec"],
        kind="topk" if threshold is None else "batchtopk",
        k=int(held["k"]),
        threshold=None if threshold is None else threshold.to(held["b_dec"]),
        site=None if number is None else "encoder.resid_post",
        layer=None if number is None else int(number[1]) - 1,
        meta=_said(settings),
    )


def _to_audiosae(made: Autoencoder) -> tuple[bytes, dict[str, Any]]:
    if made.kind not in ("topk", "batchtopk"):
        raise InputError(f"{AUDIOSAE} holds kinds topk and batchtopk, not {made.kind!r}")
    held = {
        "encoder.weight": made.reads,
        "encoder.bias": made.offsets,
        "decoder.weight": made.directions.mT,
        "b_dec": made.centre,
        "k": torch.tensor(_need_k(made, AUDIOSAE)),
    }
    if made.threshold is not None:
        held["threshold"] = made.threshold
    file = io.BytesIO()
    torch.save({name: x.detach().cpu().clone().contiguous() for name, x in held.items()}, file)
    told = {"activation_dim": made.d, "dict_size": made.width, "k": made.k}
    return file.getvalue(), told | {"site": made.site, "layer": made.layer}


def _need_k(made: Autoencoder, format: str) -> int:
    if made.k is None:
        raise InputError(f"{format} needs k, which this autoencoder does not know")
    return made.k


# -------------------------------------------------------------------------------- sparsify


def _sparsify(held: Mapping[str, Tensor], settings: dict[str, Any], where: Path) -> Autoencoder:
    held = _of(held, _OF_SPARSIFY, (), where)
    known = ("activation", "normalize_decoder", "num_latents", "k", "d_in")
    known = (*known, *_SPARSIFY_OFF, *_SPARSIFY_REFUSED)
    _check_settings(settings, known, where)
    if settings.get("activation", "topk") != "topk":
        raise InputError(f"{where}: activation {settings['activation']!r} is not known, topk is")
    on = [name for name in _SPARSIFY_REFUSED if settings.get(name)]
    if on:
        raise InputError(f"{where}: {', '.join(on)} makes it more than an autoencoder")
    m, d = _matrix(held, "encoder.weight", where)
    if settings.get("d_in", d) != d:
        raise InputError(f"{where}: d_in is {settings['d_in']}, and vectors have {d} entries")
    _check_shapes(held, {"encoder.bias": (m,), "W_dec": (m, d), "b_dec": (d,)}, where)
    if "k" not in settings:
        raise InputError(f"{where} lacks k: there is no cfg.json that says it")
    layer = re.fullmatch(r"(?:.*\.)?layers\.(\d+)", where.name)
    return Autoencoder(
        held["encoder.weight"],
        held["encoder.bias"],
        held["W_dec"],
        held["b_dec"],
        kind="topk",
        k=int(settings["k"]),
        layer=None if layer is None else int(layer[1]),
        meta=_said(settings) | {"hookpoint": where.name},
    )


def _to_sparsify(made: Autoencoder) -> tuple[bytes, dict[str, Any]]:
    if made.kind != "topk":
        raise InputError(f"{SPARSIFY} holds kind topk, not {made.kind!r}")
    held: dict[str, Tensor] = dict(zip(_OF_SPARSIFY, _four(made), strict=True))
    told = {
        "activation": "topk",
        "expansion_factor": max(1, made.width // made.d),
        "normalize_decoder": True,
        "num_latents": made.width,
        "k": made.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": made.d,
    }
    return safetensors.torch.save(held), told


# -------------------------------------------------------------------------------- SAELens


def _saelens(held: Mapping[str, Tensor], settings: dict[str, Any], where: Path) -> Autoencoder:
    held = _of(held, _OF_SAELENS, ("threshold",), where)
    behaviour = ("apply_b_dec_to_input", "normalize_activations", "reshape_activations")
    known = (*_SAELENS_PLAIN, *behaviour, "rescale_acts_by_decoder_norm")
    _check_settings(settings, known, where)
    kind = _SAELENS_KINDS.get(settings.get("architecture", "standard"))
    if kind is None:
        known_kinds = ", ".join(_SAELENS_KINDS)
        raise InputError(
            f"{where}: architecture {settings['architecture']!r} is not known, {known_kinds} are"
        )
    for name in behaviour[1:]:
        if settings.get(name, "none") != "none":
            raise InputError(f"{where}: {name} {settings[name]!r} is not known, 'none' is")
    d, m = _matrix(held, "W_enc", where)
    shapes = {"b_enc": (m,), "W_dec": (m, d), "b_dec": (d,), "threshold": (m,)}
    _check_shapes(held, shapes, where)
    if (kind == "jumprelu") != ("threshold" in held):
        raise InputError(f"{where}: a threshold belongs to jumprelu, and only there")
    reads, offsets, directions = held["W_enc"].mT, held["b_enc"], held["W_dec"]
    if not settings.get("apply_b_dec_to_input", True):
        offsets = offsets + reads @ held["b_dec"]
    if settings.get("rescale_acts_by_decoder_norm", False):
        lengths = directions.norm(dim=1)
        reads, offsets = reads * lengths[:, None], offsets * lengths
        directions = directions / lengths[:, None]
    if kind == "topk" and "k" not in settings:
        raise InputError(f"{where} lacks k in cfg.json")
    site, layer = _of_hook((settings.get("metadata") or {}).get("hook_name"))
    return Autoencoder(
        reads.contiguous(),
        offsets,
        directions,
        held["b_dec"],
        kind=kind,
        k=int(settings["k"]) if kind == "topk" else None,
        threshold=held["threshold"].relu() if "threshold" in held else None,
        site=site,
        layer=layer,
        meta=_said(settings),
    )


def _to_saelens(made: Autoencoder) -> tuple[bytes, dict[str, Any]]:
    reads, offsets, directions, centre = _four(made)
    held = {"W_enc": reads.mT.contiguous(), "b_enc": offsets, "W_dec": directions, "b_dec": centre}
    kinds = {own: theirs for theirs, own in _SAELENS_KINDS.items()} | {"batchtopk": "jumprelu"}
    if made.threshold is not None:
        threshold = made.threshold.detach().cpu().to(offsets)
        held["threshold"] = threshold.expand(made.width).clone()
    hook = None if made.site is None else _hook_of(made.site, made.layer)
    metadata = {"hook_name": hook, "model_name": made.meta.get("model")}
    told: dict[str, Any] = {
        "architecture": kinds[made.kind],
        "d_in": made.d,
        "d_sae": made.width,
        "dtype": str(reads.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if made.kind == "topk":
        told |= {"k": made.k, "rescale_acts_by_decoder_norm": False}
    return safetensors.torch.save(held), told


def _of_hook(name: str | None) -> tuple[str | None, int | None]:
    """Site and layer of a hook's name such as ``encoder.blocks.3.hook_resid_post``."""
    found = re.fullmatch(r"(?:(\w+)\.)?blocks\.(\d+)\.((?:\w+\.)*)hook_(\w+)", name or "")
    if found is None:
        return None, None
    return f"{found[1] or 'decoder'}.{found[3]}{found[4]}", int(found[2])


def _hook_of(site: str, layer: int | None) -> str:
    part, _, rest = site.partition(".")
    before, _, activation = rest.rpartition(".")
    inside = f"{before}." if before else ""
    block = "" if layer is None else f"blocks.{layer}."
    return f"{part}.{block}{inside}hook_{activation}"


# -------------------------------------------------------------------------------- shared


def _four(made: Autoencoder) -> list[Tensor]:
    own = (made.reads, made.offsets, made.directions, made.centre)
    return [x.detach().cpu().clone().contiguous() for x in own]


def _check_settings(settings: Mapping[str, Any], known: Sequence[str], where: Path) -> None:
    if odd := sorted(settings.keys() - set(known)):
        raise InputError(f"{where}: settings that are not known: {', '.join(odd)}")


def _said(settings: Mapping[str, Any]) -> dict[str, str]:
    told = {name: one for name, one in settings.items() if name != "metadata"}
    metadata = {name: x for name, x in (settings.get("metadata") or {}).items() if x is not None}
    return {name: str(one) for name, one in (told | metadata).items()}
