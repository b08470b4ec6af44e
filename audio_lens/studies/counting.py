"""How much a method computes for an item, counted on a narrow stand-in of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from audio_lens.errors import AudioLensError
from audio_lens.items import Items
from audio_lens.models import HookedAudioTransformer
from audio_lens.models.loading.on_paper import HEAD, stand_in
from audio_lens.running import evaluating
from audio_lens.studies.errors import StudyError, in_words
from audio_lens.studies.jobs import Methods
from audio_lens.studies.spec import Spec

aten = torch.ops.aten
FUSED = aten._scaled_dot_product_flash_attention_for_cpu


class Work(TorchDispatchMode):
    """Counts the operations of matrix products as those of the model that a stand-in stands for.

    Args:
        narrow: the stand-in that runs.
        whole: the model, whose weights need not be there.

    Attributes:
        flops: so far.
    """

    def __init__(self, narrow: HookedAudioTransformer, whole: HookedAudioTransformer):
        super().__init__()
        self.flops = 0.0
        its = dict(whole.named_parameters())
        self._of_weight = {
            weight.untyped_storage().data_ptr(): its[name].numel() / weight.numel()
            for name, weight in narrow.named_parameters()
        }
        self._of_head = max(part.d_head for part in whole.cfg.parts.values()) / HEAD

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        packet = func._overloadpacket
        if packet not in flop_registry and packet is not FUSED:
            with self:
                taken_apart = func.decompose(*args, **given)
            return func(*args, **given) if taken_apart is NotImplemented else taken_apart
        out = func(*args, **given)
        self.flops += self._scale(args) * _flops_of(packet, args, given, out)
        return out

    def _scale(self, args: tuple[Any, ...]) -> float:
        """How much larger the product is in the model: by its weight, or by its heads."""
        for one in args:
            if isinstance(one, Tensor) and one.ndim > 1:
                found = self._of_weight.get(one.untyped_storage().data_ptr())
                if found is not None:
                    return found
        return self._of_head


def _flops_of(packet: Any, args: tuple[Any, ...], given: Mapping[str, Any], out: Any) -> float:
    if packet is FUSED:
        return float(sdpa_flop_count(*(one.shape for one in args[:3])))
    return float(flop_registry[packet](*args, **given, out_val=out))


@dataclass(frozen=True)
class Counted:
    """What a method does for an item.

    Attributes:
        forwards: how many whole forwards of the item its work is.
        numbers: how many it gives, with those of its controls.
        arrays: in which these are kept.
    """

    forwards: float
    numbers: int
    arrays: int


def counted(spec: Spec, whole: HookedAudioTransformer, items: Items) -> Counted:
    """Run a method on a stand-in, and count.

    Args:
        spec: of the study.
        whole: the model on paper.
        items: two or more, each of which can be used.

    Raises:
        StudyError: a method that cannot run so, or whose numbers cannot be joined from units.
    """
    narrow: Any = stand_in(spec.model)
    job = Methods(spec)
    with _told_of(spec):
        with Work(narrow, whole) as method:
            found = job.run(narrow, items)
        with Work(narrow, whole) as forward, evaluating(narrow), torch.no_grad():
            for item in items:
                narrow(Items([item]).prepare(narrow))
    columns = found[0].layout.columns
    numbers = sum(torch.Size(column.shape).numel() for column in columns.values())
    return Counted(method.flops / forward.flops, numbers, len(columns))


@contextlib.contextmanager
def _told_of(spec: Spec) -> Iterator[None]:
    try:
        yield
    except StudyError:
        raise
    except (AudioLensError, ValueError, RuntimeError) as error:
        raise StudyError(
            f"what {spec.method} costs cannot be counted with random weights ({in_words(error)}): "
            "run(limit=...) computes a few items, and status() tells their pace"
        ) from error
