"""Every hook point of every family is live: what is changed there is what the model computes on."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from audio_lens import AudioInputs, HookedAudioTransformer, HookPoint
from audio_lens.hooks import is_flat
from families import FAMILIES
from families.base import Family

BLOCK = re.compile(r"\bblocks\.(\d+)\.")
PER_PAIR = ("hook_attn_scores", "hook_pattern")
TURNS = 3  # in which the points are changed, one of them in every run
STEP = 3e-3  # suits norms computed in float32 in a model of float64 too

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)


def model_and_inputs(family: Family) -> tuple[HookedAudioTransformer, AudioInputs]:
    """In float64, so that what is not touched does not move."""
    model = family.hooked(family.build(dtype=torch.float64))
    return model, model.as_inputs(family.batch(dtype=torch.float64))


def block_of(name: str) -> int | None:
    """Index of the block that a hook point lies in; None outside of blocks."""
    match = BLOCK.search(name)
    return match and int(match[1])


def of_first_prompt(model: HookedAudioTransformer, name: str, inputs: AudioInputs) -> slice:
    """The entries of an activation, along its first axis, that belong to the first prompt."""
    if is_flat(name):
        return slice(0, 1)
    is_segment = name.startswith((*model.cfg.is_heard_in, "connector", "frontend"))
    return slice(0, inputs.segments_per_row[0] if is_segment else 1)


def noise_like(act: Tensor) -> Tensor:
    return torch.randn(act.shape, generator=torch.Generator().manual_seed(0)).to(act)


def gradients(
    model: HookedAudioTransformer, inputs: AudioInputs, names: Sequence[str], weights: Tensor
) -> dict[str, Tensor]:
    """Of the weighted sum of the output, with respect to what hooks at these points return."""
    returned: dict[str, Tensor] = {}

    def replaced(act: Tensor, hook: HookPoint) -> Tensor:
        if not act.is_floating_point():
            return act  # a choice (of experts), which has no gradient
        returned[hook.name] = act.clone() if act.requires_grad else act.detach().requires_grad_()
        return returned[hook.name]

    output = model.run_with_hooks(inputs, fwd_hooks=[(name, replaced) for name in names])
    found = torch.autograd.grad((output * weights).sum(), list(returned.values()))
    return dict(zip(returned, found, strict=True))


def weights_of(model: HookedAudioTransformer, inputs: AudioInputs) -> Tensor:
    """Random weights of the output where it counts, and 0 elsewhere."""
    output, counts = model(inputs), model.output_attended(inputs)
    counted = counts[..., None] if output.ndim == 3 else counts
    return noise_like(output) * counted


@pytest.mark.mostly_slow(2)  # one of the modes for each family
@pytest.mark.parametrize("mode", ["explicit", "sdpa"])
@each_family
def test_every_hook_point_is_live(family: Family, mode: str) -> None:
    """The output of the first prompt depends on every point there, and on no other prompt."""
    model, inputs = model_and_inputs(family)
    assert len(inputs) > 1
    names = [name for name in model.hook_dict if mode == "explicit" or not name.endswith(PER_PAIR)]
    with model.attention(mode):
        weights = weights_of(model, inputs)
        weights[1:] = 0
        found = gradients(model, inputs, names, weights)
    dead, leaking = [], []
    for name, gradient in found.items():
        own = of_first_prompt(model, name, inputs)
        dead += [] if gradient[own].abs().max() > 1e-6 else [name]
        leaking += [name] if gradient[own.stop :].any() and not is_flat(name) else []
    assert not dead
    assert not leaking


@pytest.mark.mostly_slow(5)
@pytest.mark.parametrize(
    "turn", [pytest.param(turn, marks=[pytest.mark.slow] * (turn > 0)) for turn in range(TURNS)]
)
@each_family
def test_changes_move_the_output_as_gradients_say(family: Family, turn: int) -> None:
    """At every point of the first blocks and outside of blocks, by small random changes."""
    model, inputs = model_and_inputs(family)
    weights = weights_of(model, inputs)
    names = [name for name in model.hook_dict if block_of(name) in (None, 0)][turn::TURNS]
    wrong = {}
    for name, gradient in gradients(model, inputs, names, weights).items():
        noise = noise_like(gradient)
        direction = noise / noise.norm() + gradient / gradient.norm()
        slope = slope_at(model, inputs, name, direction, weights)
        expected = (gradient * direction).sum().item()
        if slope != pytest.approx(expected, rel=2e-2):
            wrong[name] = (slope, expected)
    assert not wrong


@torch.no_grad()
def slope_at(
    model: HookedAudioTransformer,
    inputs: AudioInputs,
    name: str,
    direction: Tensor,
    weights: Tensor,
) -> float:
    """By how much the weighted output grows when the activation moves in the direction."""
    ends = [
        model.run_with_hooks(
            inputs, fwd_hooks=[(name, lambda act, hook, by=by: act + by * direction)]
        )
        for by in (STEP, -STEP)
    ]
    return (((ends[0] - ends[1]) * weights).sum() / (2 * STEP)).item()
