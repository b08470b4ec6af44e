"""The checks of types that tests run with find what is wrong, and only where they are on."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jaxtyping
import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

import type_checks
from audio_lens import metrics
from type_checks import checked


@checked
def added(a: Float[Tensor, "batch d"], b: Float[Tensor, " d"]) -> Float[Tensor, "batch d"]:
    return (a + b).sum(0) if b.sum() > 100 else a + b


@checked
def counted(names: list[str], times: int = 1, *, later: Later | None = None) -> int:
    return "many" if times > 9 else len(names) * times  # type: ignore[return-value]


@checked
def unknown(a: OnlyCheckersKnow, b: int) -> OnlyCheckersKnow:  # type: ignore[name-defined] # noqa: F821
    return a


@checked
def drawn(parts: list[Float[Tensor, " d"]]) -> Iterator[Float[Tensor, " d"]]:
    yield from parts


@checked
@dataclass
class Later:
    size: int

    @property
    @checked
    def twice(self) -> int:
        return self.size * 2


WRONG: list[Callable] = [
    lambda: added(torch.zeros(2, 3), torch.zeros(4)),
    lambda: added(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)),
    lambda: added(torch.zeros(2, 3), torch.full((3,), 99.0)),  # what it gives lacks an axis
    lambda: counted("word"),  # type: ignore[arg-type]
    lambda: counted(["word"], times=10),
    lambda: counted(["word"], later=3),  # type: ignore[arg-type]
    lambda: unknown(1, "2"),  # type: ignore[arg-type]
    lambda: list(drawn([torch.zeros(3, dtype=torch.long)])),
    lambda: Later("1"),  # type: ignore[arg-type]
]


def test_what_is_wrong_is_found_where_checks_are_on() -> None:
    for wrong in WRONG:
        with pytest.raises(TypeCheckError):
            wrong()


def test_what_is_right_passes() -> None:
    assert added(torch.zeros(2, 3), torch.zeros(3)).shape == (2, 3)
    assert added(torch.zeros(1, 2), torch.zeros(2)).shape == (1, 2)  # sizes are those of a call
    assert counted(["word"], later=Later(1)) == 1 == unknown(1, 2)
    assert len(list(drawn([torch.zeros(2)]))) == 1
    assert Later(2).twice == 4


@pytest.mark.unchecked
def test_nothing_is_found_where_checks_are_off() -> None:
    assert jaxtyping.config.jaxtyping_disable
    assert counted("word") == 4  # type: ignore[arg-type]
    assert Later("1").twice == "11"  # type: ignore[arg-type]


def test_what_is_made_in_a_call_is_checked_there() -> None:
    def inner(a: int) -> int:
        return a

    with pytest.raises(TypeCheckError):
        checked(inner)("1")


def test_functions_look_as_they_are_written() -> None:
    assert list(inspect.signature(added).parameters) == ["a", "b"]
    assert added.__module__ == __name__ and "Float" in added.__annotations__["a"]


def test_every_function_and_class_of_a_module_is_decorated() -> None:
    text = '"""Doc."""\nfrom __future__ import annotations\nclass A:\n    @property\n'
    text += "    def b(self): ...\nif 1:\n    try: ...\n    except E:\n        def c(): ...\n"
    written = ast.unparse(type_checks.with_decorators(ast.parse(text)))
    assert written.count("@type_checks.checked") == 3
    assert written.index("@property") < written.index("checked\n    def b")
    assert written.index("annotations") < written.index("import type_checks")


def test_what_is_imported_already_is_told() -> None:
    with pytest.raises(RuntimeError, match="imported already"):
        type_checks.install()


def test_the_package_is_checked() -> None:
    functions: list[Any] = [one for one in vars(metrics).values() if inspect.isfunction(one)]
    assert functions and all(hasattr(one, "__wrapped__") for one in functions)
