"""An element written in place at a hook point is one element, at every point of every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from audio_lens import AudioInputs, HookedAudioTransformer, HookPoint
from audio_lens.models.compose.shrinking import ShrinkingConnector
from audio_lens.models.parts.connectors import Connector
from families import FAMILIES
from families.base import Family

BATCHES = [
    pytest.param(family, batch, id=f"{family.name}: {batch}", marks=[pytest.mark.slow] * (i > 0))
    for family in FAMILIES.values()
    for i, batch in enumerate(family.batches)
]
Edit = Callable[[Tensor, HookPoint], Tensor]


def place_of(act: Tensor) -> tuple[int, ...]:
    """The first element that is no masked score."""
    return tuple(act.isfinite().nonzero()[0].tolist())


def other_than(value: Tensor, act: Tensor) -> Tensor:
    """A number one more, or another of the codes that are there."""
    if act.is_floating_point():
        return value + 1
    return act.max() if value != act.max() else act.min()


class Writing:
    """A hook that writes one element in place, and finds whatever else changes with it."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.left: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, act: Tensor, hook: HookPoint) -> Tensor:
        place, expected = place_of(act), edited_copy(act, hook)
        act[place] = other_than(act[place].clone(), act)
        if not torch.equal(act, expected):
            self.wrong.append(f"{hook.name}: other elements changed with it")
        for name, (earlier, as_left) in self.left.items():
            if not torch.equal(earlier, as_left):
                self.wrong.append(f"{hook.name}: {name} changed with it")
        self.left[hook.name] = act, act.clone()
        return act


def edited_copy(act: Tensor, hook: HookPoint) -> Tensor:
    place, copy = place_of(act), act.clone()
    copy[place] = other_than(copy[place].clone(), copy)
    return copy


class Keeping:
    """What `edited_copy` returns, by name of the point."""

    def __init__(self) -> None:
        self.left: dict[str, Tensor] = {}

    def __call__(self, act: Tensor, hook: HookPoint) -> Tensor:
        self.left[hook.name] = edited_copy(act, hook)
        return self.left[hook.name]


def owned(model: HookedAudioTransformer, inputs: AudioInputs) -> dict[str, Tensor]:
    """Every tensor that a forward reads and must leave alone."""
    given = {n: value for n, value in {**vars(inputs), **inputs.extra}.items() if is_tensor(value)}
    return {**dict(model.named_parameters()), **dict(model.named_buffers()), **given}


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


@torch.no_grad()
def output(model: HookedAudioTransformer, inputs: AudioInputs, edit: Any) -> Tensor:
    return model.run_with_hooks(inputs, fwd_hooks=[(lambda name: True, edit)])


@pytest.mark.mostly_slow(2)  # one of the modes for each family
@pytest.mark.parametrize("mode", ["explicit", "sdpa"])
@pytest.mark.parametrize("family, batch", BATCHES)
def test_an_element_written_in_place_is_one_element(family: Family, batch: str, mode: str) -> None:
    """Nothing else moves there, at earlier points, in weights, buffers and inputs, or later on."""
    model = family.hooked(family.build())
    inputs = model.as_inputs(family.batch(**family.batches[batch]))
    before = {name: tensor.clone() for name, tensor in owned(model, inputs).items()}
    writing, keeping = Writing(), Keeping()
    with model.attention(mode):
        in_place = output(model, inputs, writing)
        of_copies = output(model, inputs, keeping)
    assert not writing.wrong
    after = owned(model, inputs)
    assert [name for name, was in before.items() if not torch.equal(after[name], was)] == []
    assert writing.left.keys() == keeping.left.keys()
    torch.testing.assert_close(in_place, of_copies)
    for name, (_, left) in writing.left.items():
        torch.testing.assert_close(left, keeping.left[name], msg=name)


class HandingOn(Connector):
    """Tokens that are the frames themselves."""

    def carry(self, x: Tensor) -> Tensor:
        return x


class Shrinking(ShrinkingConnector):
    """The same, of frames that are labelled."""

    def adapt(self, x: Tensor) -> Tensor:
        return x

    def label_logits(self, frames: Tensor) -> Tensor:
        return frames


@pytest.mark.parametrize("connector", [HandingOn(), Shrinking()], ids=["plain", "shrinking"])
def test_connectors_of_ones_own_may_hand_on_what_they_are_given(connector: Connector) -> None:
    writing, heard = Writing(), torch.arange(24.0).reshape(2, 3, 4)
    for name, point in connector.named_modules():
        if isinstance(point, HookPoint):
            point.name = name
            point.add_hook(writing)
    tokens = connector(heard)
    assert not writing.wrong and len(writing.left) >= 2
    assert torch.equal(heard, torch.arange(24.0).reshape(2, 3, 4))
    assert tokens[0, 0, 0] == len(writing.left)
