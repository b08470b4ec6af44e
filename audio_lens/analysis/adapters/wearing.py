"""Adapters put on a model and taken off again; drawn by peft, live as those that are loaded."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from audio_lens import files
from audio_lens.arguments import path_of
from audio_lens.errors import ExtraError, InputError
from audio_lens.models import HookedAudioTransformer
from audio_lens.models.loading.lora import Lora, LoraLinear, LowRank, attach, detach

ADAPTER = "audio_lens adapter"  # what a file says it holds


def peft() -> Any:
    """The package that draws adapters.

    Raises:
        ExtraError: where it is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ExtraError("adapters are made by peft: pip install 'audio_lens[lora]'") from error


def put_on(
    model: HookedAudioTransformer, ranks: Mapping[str, int], scale: float, seed: int
) -> list[nn.Parameter]:
    """Give linear maps adapters as peft draws them, which add nothing at first; live.

    Args:
        ranks: by the names of the maps.
        scale: of what each adds, ``alpha / r``, the same for every rank.
        seed: of the draw.

    Returns:
        What is to be trained.

    Raises:
        ExtraError: no peft.
    """
    library = peft()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = {
            name: _drawn(library, model.get_submodule(name), rank, scale)
            for name, rank in ranks.items()
        }
    lora = attach(model, made, {})
    return [one for linear in lora.linears.values() for one in (linear.lora_A, linear.lora_B)]


def _drawn(library: Any, linear: nn.Module, rank: int, scale: float) -> LowRank:
    """An adapter of one map by peft, whose wrapper stays outside the model."""
    holder = nn.ModuleDict({"linear": linear})
    trained = [one.requires_grad for one in linear.parameters()]
    config = library.LoraConfig(
        r=rank, lora_alpha=scale * rank, target_modules=["linear"], lora_dropout=0.0
    )
    wrapper: Any = library.inject_adapter_in_model(config, holder, "default")["linear"]
    for one, requires_grad in zip(linear.parameters(), trained, strict=True):
        one.requires_grad_(requires_grad)  # peft froze it
    down, up = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    return LowRank(down, up, float(wrapper.scaling["default"]))


def take_off(model: HookedAudioTransformer) -> None:
    """Take the live adapter off a model.

    Raises:
        LoraError: if it carries none.
    """
    detach(model)


def save(model: HookedAudioTransformer, path: str | Path) -> Path:
    """Write the live adapter, as `load` puts it on; an old file stays until then.

    Raises:
        LoraError: if the model carries none.
        OutputError: a path that cannot be written.
    """
    return files.write(path_of("path", path), safetensors.torch.save(*held(model)))


def held(model: HookedAudioTransformer) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the live adapter by name, and what a file says beside them."""
    lora = Lora(model)
    tensors = {
        f"{name}.{half}": getattr(linear, half).detach().cpu().contiguous()
        for name, linear in lora.linears.items()
        for half in ("lora_A", "lora_B")
    }
    scales = {name: linear.scale for name, linear in lora.linears.items()}
    return tensors, {"kind": ADAPTER, "scales": json.dumps(scales)}


def load(model: HookedAudioTransformer, path: str | Path) -> Lora:
    """Put on the adapter of a file that `save`, or a sweep into a folder, wrote.

    Raises:
        InputError: no such file, one that holds no adapter, one of another model, or a model that
            carries an adapter already.
    """
    check_bare(model)
    path = path_of("path", path)
    if not path.is_file():
        raise InputError(f"no saved adapter at {path}")
    try:
        with safe_open(path, "pt") as data:
            head = data.metadata() or {}
            tensors = {name: data.get_tensor(name) for name in data.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} holds no adapter: {error}") from error
    if head.get("kind") != ADAPTER:
        raise InputError(f"{path} holds no adapter: it says it is {head.get('kind')!r}")
    made = {}
    for name, scale in json.loads(head["scales"]).items():
        down, up = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
        made[name] = _fitting(model, name, LowRank(down, up, scale))
    return attach(model, made, {})


def _fitting(model: HookedAudioTransformer, name: str, low_rank: LowRank) -> LowRank:
    """The adapter of a map, on its device.

    Raises:
        InputError: a map that is not there, or of another size.
    """
    try:
        linear: Any = model.get_submodule(name)
    except AttributeError as error:
        raise InputError(f"this model has no {name}, which the adapter is of") from error
    wanted = [len(low_rank.up), low_rank.down.shape[1]]
    if list(linear.weight.shape) != wanted:
        raise InputError(f"{name} is {list(linear.weight.shape)}, the adapter is of {wanted}")
    return low_rank.to(linear.weight.device, low_rank.down.dtype)


@contextmanager
def own_connector(model: HookedAudioTransformer) -> Iterator[list[nn.Parameter]]:
    """Inside a ``with`` block the connector has copies of its weights, which may be trained.

    Raises:
        InputError: a model without a connector that has weights.
    """
    check_connector(model)
    places = [
        (module, name, parameter)
        for module in model.get_submodule("connector").modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    copies = [nn.Parameter(parameter.detach().clone()) for *_, parameter in places]
    try:
        for (module, name, _), one in zip(places, copies, strict=True):
            setattr(module, name, one)
        yield copies
    finally:
        for module, name, parameter in places:
            setattr(module, name, parameter)


def check_bare(model: HookedAudioTransformer) -> None:
    """Raise where a model carries an adapter already.

    Raises:
        InputError: saying how to load it.
    """
    if any(isinstance(one, LoraLinear) for one in model.modules()):
        raise InputError(
            "this model carries a live adapter already: load it with merge=True, or take it off "
            "(adapters.take_off)"
        )


def has_connector(model: HookedAudioTransformer) -> bool:
    """Whether there is a connector with weights between encoder and decoder."""
    connector = getattr(model, "connector", None)
    return isinstance(connector, nn.Module) and any(True for _ in connector.parameters())


def check_connector(model: HookedAudioTransformer) -> None:
    """Raise unless there is a connector to train.

    Raises:
        InputError: naming the model.
    """
    if not has_connector(model):
        raise InputError(
            f"{model.cfg.family} has no connector with weights: leave out the arm 'connector'"
        )
