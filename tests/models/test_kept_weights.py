"""The effective weight of an adapted linear map: kept while nothing changes, and never stale."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from audio_lens.models.loading import kept
from audio_lens.models.loading.lora import LoraLinear, LowRank

D_IN, D_OUT, RANK = 24, 12, 3


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    kept._kept.clear()
    yield
    kept._kept.clear()


def linear(seed: int = 0, d_in: int = D_IN) -> LoraLinear:
    draw = torch.Generator().manual_seed(seed)
    base = nn.Linear(d_in, D_OUT, dtype=torch.float64)
    down, up = (
        torch.randn(*shape, generator=draw, dtype=torch.float32).to(torch.float64)
        for shape in ((RANK, d_in), (D_OUT, RANK))
    )
    return LoraLinear(base.requires_grad_(False), LowRank(down, up, 0.5))


def plain(one: LoraLinear) -> Tensor:
    """The formula."""
    return (one.base.weight.double() + one.scale * one.lora_B @ one.lora_A).detach()


def makings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a weight is made."""
    counted: list[int] = []
    own = LowRank.added_to

    def added_to(self: LowRank, weight: Tensor) -> Tensor:
        counted.append(1)
        return own(self, weight)

    monkeypatch.setattr(LowRank, "added_to", added_to)
    return counted


def test_it_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one, made = linear(), makings(monkeypatch)
    with torch.no_grad():
        first, second = one.weight, one.weight
    assert len(made) == 1
    assert torch.equal(first, plain(one)) and torch.equal(second, first)
    assert not first.requires_grad


def step(one: LoraLinear) -> None:
    """A step of training, in place."""
    optimizer = torch.optim.Adam([one.lora_A, one.lora_B], 0.1)
    one(torch.ones(2, one.in_features, dtype=torch.float64)).square().sum().backward()
    optimizer.step()


def through_data(one: LoraLinear) -> None:
    one.base.weight.data[3, 4] += 1e-6


def swapped_rows(one: LoraLinear) -> None:
    one.base.weight.data.copy_(one.base.weight.data.flip(0))


def swapped_columns(one: LoraLinear) -> None:
    one.base.weight.data.copy_(one.base.weight.data.flip(1))


def through_numpy(one: LoraLinear) -> None:
    one.lora_A.detach().numpy()[0, 0] += 1.0


def loaded(one: LoraLinear) -> None:
    one.load_state_dict(linear(1, one.in_features).state_dict())


def new_parameter(one: LoraLinear) -> None:
    one.lora_B = nn.Parameter(2 * one.lora_B.detach())


def new_base(one: LoraLinear) -> None:
    one.base = nn.Linear(one.in_features, D_OUT, dtype=torch.float64).requires_grad_(False)


def new_scale(one: LoraLinear) -> None:
    one.scale = 0.25


def in_place(one: LoraLinear) -> None:
    with torch.no_grad():
        one.lora_B.mul_(-1)


CHANGES = (
    *(step, through_data, swapped_rows, swapped_columns, through_numpy, loaded),
    *(new_parameter, new_base, new_scale, in_place),
)


@pytest.mark.parametrize("d_in", [D_IN, 7], ids=["in words", "odd"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_change_is_missed(change: Callable[[LoraLinear], None], d_in: int) -> None:
    one = linear(d_in=d_in)
    with torch.no_grad():
        before = one.weight
    change(one)
    with torch.no_grad():
        after = one.weight
    assert torch.equal(after, plain(one)) and not torch.equal(before, after)


def test_the_switch() -> None:
    one = linear()
    with torch.no_grad():
        on = one.weight
        one.enabled = False
        assert one.weight is one.base.weight
        one.enabled = True
        assert torch.equal(one.weight, on)


def test_gradients_flow_through_a_fresh_one(monkeypatch: pytest.MonkeyPatch) -> None:
    one, made = linear(), makings(monkeypatch)
    with torch.no_grad():
        kept_one = one.weight
    one.weight.square().sum().backward()
    assert len(made) == 2
    assert torch.allclose(one.lora_B.grad, one.scale * 2 * kept_one @ one.lora_A.T)
    one.requires_grad_(False)
    x = torch.ones(D_IN, dtype=torch.float64, requires_grad=True)
    (one.weight @ x).sum().backward()  # frozen: kept, and gradients pass to what it multiplies
    assert len(made) == 2 and torch.allclose(x.grad, kept_one.sum(0))


def test_what_others_do_to_it_stays_theirs() -> None:
    one = linear()
    with torch.no_grad():
        one.weight.zero_()
        assert torch.equal(one.weight, plain(one))
        one.weight.data.zero_()
        assert torch.equal(one.weight, plain(one))
        one.weight.requires_grad_()
        assert not one.weight.requires_grad


def test_it_may_be_read_in_inference_and_differentiated_behind() -> None:
    one = linear().requires_grad_(False)
    with torch.inference_mode():
        _ = one.weight
    x = torch.ones(D_IN, dtype=torch.float64, requires_grad=True)
    (one.weight @ x).sum().backward()
    assert torch.allclose(x.grad, plain(one).sum(0))


def test_functional_calls_have_their_own() -> None:
    one = linear()
    with torch.no_grad():
        own = one.weight
        others = {"lora_B": torch.zeros_like(one.lora_B)}
        read = torch.func.functional_call(_Reading(one), {f"one.{k}": v for k, v in others.items()})
        assert torch.equal(read, one.base.weight) and torch.equal(one.weight, own)


class _Reading(nn.Module):
    def __init__(self, one: LoraLinear):
        super().__init__()
        self.one = one

    def forward(self) -> Tensor:
        return self.one.weight


def test_moves_and_copies() -> None:
    one = linear()
    with torch.no_grad():
        _ = one.weight
        for copied in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            copied.lora_A.zero_()
            assert torch.equal(copied.weight, copied.base.weight)
        assert torch.equal(one.weight, plain(one))
        one.to(torch.float32)
        assert one.weight.dtype == torch.float32
        assert one.to("meta").weight.is_meta


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    several = [linear(seed) for seed in range(4)]
    monkeypatch.setattr(kept, "MOST_BYTES", 2 * several[0].base.weight.nbytes)
    made = makings(monkeypatch)
    with torch.no_grad():
        for one in several:
            _ = one.weight
        assert len(kept._kept) == 2
        _ = several[3].weight, several[2].weight
        assert len(made) == 4
        _ = several[0].weight  # several[3] was used longest ago
        assert several[3] not in kept._kept and several[2] in kept._kept
        monkeypatch.setattr(kept, "MOST_BYTES", 1)
        assert torch.equal(several[1].weight, plain(several[1]))
    several.clear()
