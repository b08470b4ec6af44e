"""A model split over devices, by part and by block.

Activations move where they meet weights that lie elsewhere: at the borders of parts and blocks.
Inputs go to, and the output comes from, the model's `device`: the one that holds the embeddings and
the head of the part that makes the output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from audio_lens.errors import AudioLensError
from audio_lens.inputs import AudioInputs
from audio_lens.models.layers import Context

Device = torch.device | str
Devices = Device | Sequence[Device] | Mapping[str, Device | Sequence[Device]]
Layout = dict[str, torch.device]  # by unit

_WRITING = ("decoder", "depth", "speaker")  # parts that lie where the output comes from
_BLOCK = re.compile(r"(encoder|decoder)\.blocks\.(?!0\b)\d+")


class PlacementError(AudioLensError, ValueError):
    """Devices a model cannot be placed on, or work that needs it on one device."""


def unit_of(name: str) -> str:
    """The unit a weight or module belongs to, which is never split.

    Every block is one, but the first is of one unit with the rest of its part: embeddings, norms
    and heads. What stands before, beside or behind the encoder (stem, connector) counts to it, what
    writes beside or behind the decoder counts to that.
    """
    block = _BLOCK.match(name)
    writes = name.split(".")[0] in _WRITING
    return block[0] if block else "decoder" if writes else "encoder"


def layout(tensors: Mapping[str, Tensor], devices: Devices) -> Layout:
    """The device of every unit.

    Args:
        tensors: the model's weights by name.
        devices: as `Placed.place` takes it.

    Raises:
        PlacementError: a part without a device, an unknown part, or devices that are not there.
    """
    sizes = _sizes(tensors)
    if not isinstance(devices, Mapping):
        return _balanced(sizes, _checked(devices))
    parts = [unit for unit in sizes if "." not in unit]
    if set(parts) != set(devices):
        raise PlacementError(
            f"devices are for {', '.join(map(str, devices)) or 'nothing'}; the parts are "
            f"{' and '.join(parts)} (a connector goes with its encoder)"
        )
    placed: Layout = {}
    for part in parts:
        units = {unit: size for unit, size in sizes.items() if unit.split(".")[0] == part}
        placed |= _balanced(units, _checked(devices[part]))
    return placed


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of every unit, in the order in which they run; tied weights count once."""
    sizes: dict[str, int] = {}
    seen = set()
    for name, tensor in tensors.items():
        memory = tensor.data_ptr() or id(tensor)
        own = 0 if memory in seen else tensor.nbytes
        sizes[unit_of(name)] = sizes.get(unit_of(name), 0) + own
        seen.add(memory)
    return dict(sorted(sizes.items(), key=lambda unit: _order(unit[0])))


def _order(unit: str) -> tuple[bool, int]:
    return unit.startswith("decoder"), int(unit.rpartition(".")[2]) if "." in unit else 0


def _balanced(sizes: Mapping[str, int], devices: Sequence[torch.device]) -> Layout:
    """Neighbouring units together, about as many bytes on every device."""
    placed: Layout = {}
    left, here, number = sum(sizes.values()), 0, 0
    share = left / len(devices)
    for unit, size in sizes.items():
        if here and here + size / 2 > share and number < len(devices) - 1:
            left, here, number = left - here, 0, number + 1
            share = left / (len(devices) - number)
        placed[unit] = devices[number]
        here += size
    return placed


def _device(name: Device) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise PlacementError(f"no such device: {name} (cpu, cuda, cuda:1 ... are)") from None


def _checked(devices: Device | Sequence[Device]) -> list[torch.device]:
    """Devices that exist; "auto" is every CUDA device there is."""
    if devices == "auto":
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        if not devices:
            raise PlacementError('"auto" needs a CUDA device, and none is visible: name devices')
    many = [devices] if isinstance(devices, str | torch.device) else list(devices)
    found = [_device(one) for one in many]
    absent = [str(d) for d in found if d.type == "cuda" and (d.index or 0) >= _n_cuda()]
    if absent or not found:
        raise PlacementError(
            f"no such device: {', '.join(absent)} ({_n_cuda()} CUDA devices are visible)"
            if absent
            else "devices is empty"
        )
    return found


def _n_cuda() -> int:
    return torch.cuda.device_count()


# -------------------------------------------------------------------------------- in the model


class Placed(nn.Module):
    """Where a `HookedAudioTransformer` lies; mixed into it."""

    def place(self, devices: Devices) -> Placed:
        """Move the model, split over devices by part and block.

        Args:
            devices: one device; several, over which everything is balanced by bytes; "auto" for all
                visible CUDA devices; or one of these for each part (``{"encoder": "cuda:0",
                "decoder": ["cuda:0", "cuda:1"]}``).

        Returns:
            The model. Embeddings, norms and head of a part lie with its first block, the connector
            with the encoder's.

        Raises:
            PlacementError: a part without a device, an unknown part, or devices that are not there.
        """
        placed = layout(self.state_dict(keep_vars=True), devices)
        for name, module in self.named_modules():
            if name:
                device = placed.get(unit_of(name))
                module._apply(lambda tensor, to=device: tensor.to(to), recurse=False)
        guard_borders(self)
        return self

    @property
    def is_split(self) -> bool:
        """Whether the weights lie on several devices."""
        return _is_split(self)

    def device_of(self, part: str) -> torch.device:
        """The device of a part: where its inputs go."""
        return next(getattr(self, part).parameters()).device


def guard_borders(model: nn.Module) -> None:
    """Let activations follow the weights from now on, if those lie on several devices."""
    for handle in vars(model).get("_borders", ()):
        handle.remove()
    units = _receivers(model) if _is_split(model) else []
    vars(model)["_borders"] = [
        unit.register_forward_pre_hook(_bring, with_kwargs=True) for unit in units
    ]


def _is_split(model: nn.Module) -> bool:
    return len({parameter.device for parameter in model.parameters()}) > 1


def _receivers(model: nn.Module) -> list[nn.Module]:
    """What activations are brought to: blocks, what stands beside blocks, whole connectors."""
    receivers: list[nn.Module] = []
    for part in model.children():
        blocks = getattr(part, "blocks", None)
        if blocks is None:
            receivers += [part]
        else:
            receivers += [*blocks, *(child for child in part.children() if child is not blocks)]
    return [one for one in receivers if any(True for _ in one.parameters())]


def _bring(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    device = next(module.parameters()).device
    return moved(args, device), moved(kwargs, device)


def moved(x: Any, device: torch.device) -> Any:
    """The same on a device: tensors, inputs, contexts, and what holds them."""
    if isinstance(x, Tensor | AudioInputs):
        return x if x.device == device else x.to(device)
    if isinstance(x, Context):
        return _moved_context(x, device)
    if isinstance(x, tuple | list):
        return type(x)(moved(one, device) for one in x)
    if isinstance(x, dict):
        return {key: moved(one, device) for key, one in x.items()}
    return x


def _moved_context(context: Context, device: torch.device) -> Context:
    """A context for the blocks of a device; made once for all of them. Its cache is shared."""
    known: dict[torch.device, Context] = context.__dict__.setdefault("_elsewhere", {})
    if device not in known:
        held = {field.name: getattr(context, field.name) for field in fields(context)}
        known[device] = replace(context, **{n: moved(x, device) for n, x in held.items()})
    return known[device]
