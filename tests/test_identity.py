"""What is known again and what is not: tensors, modules, functions and all that they refer to."""

from __future__ import annotations

import enum
import functools
import random
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from audio_lens import HookedAudioTransformer, Span, metrics
from audio_lens.digests import of_state, of_tensor
from audio_lens.identity import NoIdentityError, identity_of, versioned
from tiny import hf_inputs, tiny_hf

MARGIN = 10.0


# -------------------------------------------------------------------------------- weights


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 512), nn.BatchNorm1d(512), nn.Linear(512, 8))


def zeroed(weight: torch.Tensor) -> None:
    weight.data[:, 32:] = 0


def swapped(weight: torch.Tensor) -> None:
    weight.data.copy_(weight.data[:, torch.arange(64).roll(8)])


def one_changed(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight[5, 7] = torch.nextafter(weight[5, 7], torch.tensor(9.0))


def negated(weight: torch.Tensor) -> None:
    weight.data[:, 1::2] *= -1


def written_by_numpy(weight: torch.Tensor) -> None:
    weight.detach().numpy()[0, 0] += 1


def replaced(weight: torch.Tensor) -> None:
    weight.data = weight.data * 2


def changed_under_inference(weight: torch.Tensor) -> None:
    with torch.inference_mode():
        weight.mul_(1.001)


EDITS = [
    *(zeroed, swapped, one_changed, negated, written_by_numpy, replaced),
    changed_under_inference,
]


@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_of_a_weight_changes_the_hash(edit: Callable[[torch.Tensor], None]) -> None:
    """Also those that torch's versions do not count, after the hash was asked for."""
    module = network()
    before = of_state(module)
    assert of_state(module) == before
    edit(module[0].weight)
    assert of_state(module) != before
    assert of_state(module) == of_state(module)


def test_buffers_names_shapes_and_dtypes_count() -> None:
    module = network()
    before = of_state(module)
    module[1].running_mean += 1
    assert of_state(module) != before
    flat, tall = torch.zeros(2, 8), torch.zeros(8, 2)
    kinds = [flat, tall, flat.double(), flat.bfloat16(), flat[0], torch.zeros(()), flat[:0]]
    assert len({of_tensor(x) for x in kinds}) == len(kinds)
    assert of_tensor(tall.T) == of_tensor(tall.T.contiguous())


def test_the_hash_is_asked_for_again_in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from audio_lens import digests

    module, hashed = nn.Linear(256, 256), []
    honest = digests.of_tensor
    of_state(module)
    monkeypatch.setattr(digests, "of_tensor", lambda x: hashed.append(x.shape) or honest(x))
    of_state(module)
    assert module.weight.shape not in hashed
    module.weight.data[0] = 0
    of_state(module)
    assert hashed.count(module.weight.shape) == 1


def test_inputs_are_told_apart_by_shape_and_place() -> None:
    model = HookedAudioTransformer.from_hf(tiny_hf("whisper"))
    inputs = model.as_inputs(hf_inputs("whisper"))
    others = [
        {"features": inputs.features.transpose(1, 2)},
        {"features": inputs.features.double()},
        {"tokens": inputs.tokens.T},
        {"attention_mask": torch.ones_like(inputs.tokens, dtype=torch.bool)},
        {"position_ids": torch.ones_like(inputs.tokens)},
        {"further_tokens": torch.ones_like(inputs.tokens)[:, None]},
    ]
    digests = [inputs.digest()]
    for other in others:
        alike = types.SimpleNamespace(**{**vars(inputs), **other})
        alike.segments_per_row = inputs.segments_per_row
        digests.append(type(inputs).digest(alike))
    assert len(set(digests)) == len(digests)


# -------------------------------------------------------------------------------- functions


def over(margin: float) -> Callable:
    return lambda x: x > margin


def over_either(low: float, high: float, names: dict | None = None) -> Callable:
    def either(x: float, scale: float = 1.0) -> bool:
        def inner() -> float:
            return x * scale + low

        return inner() > high

    return either


class Threshold:
    """A callable of the user's own."""

    scale = 1.0

    def __init__(self, margin: float):
        self.margin = margin

    def __call__(self, x: float) -> bool:
        return x * self.scale > self.margin


@dataclass(frozen=True)
class Asked:
    words: tuple[str, ...]
    where: Span


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Scaled(nn.Module):
    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale


PAIRS: dict[str, tuple[Any, Any]] = {
    "closure": (over(0.0), over(10.0)),
    "nested closure": (over_either(0, 1), over_either(1, 1)),
    "default": (lambda x, y=1: x + y, lambda x, y=2: x + y),
    "keyword default": (lambda x, *, y=1: x + y, lambda x, *, y=2: x + y),
    "constant": (lambda x: x > 1, lambda x: x > 2),
    "type of a constant": (lambda x: x > 1, lambda x: x > 1.0),
    "nested constant": (lambda x: [y + 1 for y in x], lambda x: [y + 2 for y in x]),
    "code": (lambda x: x + 1, lambda x: x * 1),
    "attribute": (lambda x: x.min(), lambda x: x.max()),
    "global": (lambda x: np.abs(x), lambda x: torch.abs(x)),
    "partial": (functools.partial(max, 1), functools.partial(max, 2)),
    "object": (Threshold(1.0), Threshold(2.0)),
    "bound method": (Threshold(1.0).__call__, Threshold(2.0).__call__),
    "dataclass": (Asked(("a",), Span(0, 1)), Asked(("a",), Span(0, 2))),
    "list": ([1, [2]], [1, [3]]),
    "nested lists": ([[1], 2], [[1, 2]]),
    "dict": ({"a": 1}, {"a": 2}),
    "set": ({"a", "b"}, {"a", "c"}),
    "text and bytes": ("a", b"a"),
    "array": (np.arange(4), np.arange(4).reshape(2, 2)),
    "array of objects": (np.array([[1], "a"], object), np.array([[2], "a"], object)),
    "number of numpy": (np.float32(1), np.float64(1)),
    "tensor": (torch.ones(2), torch.ones(2).double()),
    "enum": (Colour.RED, Colour.BLUE),
    "built in": (max, min),
    "function of torch": (torch.sum, torch.mean),
    "method of torch": (torch.Tensor.sum, torch.Tensor.mean),
    "module": (nn.Linear(2, 2), nn.Linear(2, 2)),
    "setting of a module": (Scaled(1.0), Scaled(2.0)),
    "metric": (metrics.logit_diff(1, 2), metrics.logit_diff(1, 3)),
    "position of a metric": (metrics.log_prob(1), metrics.log_prob(1, position=-2)),
    "kind of metric": (metrics.log_prob(1), metrics.prob(1)),
    "stream": (
        metrics.of_stream("audio.0", metrics.prob(1)),
        metrics.of_stream("audio.1", metrics.prob(1)),
    ),
    "function of a metric": (
        metrics.read_at(over(0.0), name="over"),
        metrics.read_at(over(1.0), name="over"),
    ),
    "version": (versioned(over(0.0), 1), versioned(over(0.0), 2)),
    "name of a version": (versioned(over(0.0), 1, "a"), versioned(over(0.0), 1, "b")),
    "cycle": (functools.reduce(lambda inner, _: [inner], range(3), []), [[[[[]]]]]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_differs_has_another_identity(name: str) -> None:
    one, other = PAIRS[name]
    assert identity_of(one) == identity_of(one) != identity_of(other)


def test_what_is_made_anew_is_known_again() -> None:
    made: list[Callable[[], Any]] = [
        lambda: over(2.0),
        lambda: over_either(1, 2, {"a": 1}),
        lambda: Threshold(1.0),
        lambda: metrics.forced_choice("a", ["a", "b"]),
        lambda: {"b", "a", "c"},
        lambda: np.arange(3),
        lambda: network().state_dict(),
        network,
        lambda: random.Random(3),
    ]
    for make in made:
        assert identity_of(make()) == identity_of(make())
    first = identity_of(lambda x: x > 3)
    assert first == identity_of(lambda x: x > 3)  # on another line, of another number
    assert identity_of(versioned(over(0.0), 1)) == identity_of(versioned(over(9.0), 1))


def margin_metric(x: float) -> bool:
    return helper(x) > MARGIN


def helper(x: float) -> float:
    return 2 * x


def recursive(n: int) -> int:
    return n and recursive(n - 1)


def test_globals_and_what_these_call_count(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[__name__]
    before = identity_of(margin_metric)
    monkeypatch.setattr(module, "MARGIN", 11.0)
    other_margin = identity_of(margin_metric)
    monkeypatch.setattr(module, "helper", lambda x: 3 * x)
    assert len({before, other_margin, identity_of(margin_metric)}) == 3
    monkeypatch.undo()
    assert identity_of(margin_metric) == before
    assert identity_of(recursive) == identity_of(recursive)


def test_classes_count_by_their_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity_of(Threshold(1.0))
    monkeypatch.setattr(Threshold, "scale", 2.0)
    assert identity_of(Threshold(1.0)) != before
    monkeypatch.undo()
    monkeypatch.setattr(Threshold, "__call__", lambda self, x: x >= self.margin)
    assert identity_of(Threshold(1.0)) != before


def test_a_model_that_a_metric_reads_counts_by_its_weights() -> None:
    model = nn.Linear(2, 2)

    def probed(x: torch.Tensor) -> torch.Tensor:
        return model(x)

    before = identity_of(probed)
    with torch.no_grad():
        model.bias += 1
    assert identity_of(probed) != before


def unknowable() -> dict[str, Any]:
    return {
        "generator": (i for i in range(3)),
        "lock": threading.Lock(),
        "file": sys.__stdout__,
        "inside": {"a": [threading.Lock()]},
    }


@pytest.mark.parametrize("name", unknowable())
def test_what_has_no_content_is_named(name: str) -> None:
    held = unknowable()[name]

    def metric(x: Any) -> Any:
        return held

    with pytest.raises(NoIdentityError, match=r"variable 'held' is a|of variable 'held' is a"):
        identity_of(metric)
    assert identity_of(versioned(metric, 1)) == identity_of(versioned(metric, 1))


def test_things_that_hold_themselves_end() -> None:
    loop: list = [1]
    loop.append(loop)
    assert identity_of(loop) == identity_of(loop)
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(NoIdentityError, match="too much to look through"):
        identity_of(deep)


def test_versions_have_names() -> None:
    assert versioned(helper, 2)(4) == 8 and repr(versioned(helper, 2)) == "helper (version 2)"
    assert metrics.read_at(versioned(helper, 2, "twice")).name == "twice"
    assert list(metrics.named(versioned(helper, 2))) == ["helper"]


IDENTIFYING = """
import numpy as np, torch
from audio_lens.identity import identity_of
class Own:
    def __init__(self): self.words = {"one", "two", "three"}
    def __call__(self, x): return x in self.words
own, table = Own(), {"a": np.arange(3), "b": torch.ones(2)}
found = identity_of(lambda l: own(l) and table and max(l, key=own))
"""
RUNNING = (
    "import sys; there = {'__name__': 'probe'}; exec(sys.argv[1], there); print(there['found'])"
)


def test_another_process_finds_the_same() -> None:
    here: dict[str, Any] = {"__name__": "probe"}
    exec(compile(IDENTIFYING, "probe", "exec", dont_inherit=True), here)
    ran = subprocess.run(
        [sys.executable, "-c", RUNNING, IDENTIFYING],
        env={"PYTHONHASHSEED": "17", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == here["found"]
