"""What `import audio_lens` gives: names of one list, on first use, and exceptions of one base."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from types import ModuleType
from typing import Any, get_type_hints

import pytest

import audio_lens
from audio_lens import AudioLensError

_FOUND = (one.name for one in pkgutil.walk_packages(audio_lens.__path__, "audio_lens."))
MODULES = [name for name in _FOUND if ".training" not in name]


def test_every_public_name_is_there() -> None:
    assert set(dir(audio_lens)) == set(audio_lens.__all__)
    for name in audio_lens.__all__:
        assert getattr(audio_lens, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        audio_lens.no_such_name  # noqa: B018


def test_the_version_is_the_installed_one() -> None:
    assert audio_lens.__version__ == version("audio_lens")


def test_importing_it_imports_no_torch() -> None:
    found = "import audio_lens, sys; print({'torch', 'jax', 'transformers'} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def raised_by(module: ModuleType) -> set[type[Exception]]:
    """The exception classes of the library that a module knows."""
    classes = (one for _, one in inspect.getmembers(module, inspect.isclass))
    return {
        c for c in classes if issubclass(c, Exception) and c.__module__.startswith("audio_lens")
    }


def test_all_exceptions_share_a_base() -> None:
    modules = map(importlib.import_module, MODULES)
    raised = set[type[Exception]]().union(*map(raised_by, modules)) - {AudioLensError}
    assert len(raised) > 15
    assert [one for one in raised if not issubclass(one, AudioLensError)] == []
    assert [one for one in raised if len(one.__bases__) < 2] == []  # a built-in exception, too


def bare_raises(module: ModuleType) -> Iterator[str]:
    """Where a module raises a `ValueError` or `TypeError` that says not whose it is."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            raised = ast.unparse(node.exc.func)
            if raised in ("ValueError", "TypeError", "ImportError"):
                yield f"{module.__name__}, line {node.lineno}: {raised}"


def test_nothing_is_raised_under_a_bare_name() -> None:
    """But in commands, which show the message alone, and where no user's argument is meant."""
    within = ("audio_lens.cli", "audio_lens.models.registry", "audio_lens.provenance")
    names = [name for name in MODULES if not name.startswith(within)]
    modules = map(importlib.import_module, names)
    assert [place for module in modules for place in bare_raises(module)] == []


# -------------------------------------------------------------------------------- annotations


def for_checkers(module: ModuleType) -> dict[str, Any]:
    """What a module imports for type checkers alone, under ``if TYPE_CHECKING``."""
    tree = ast.parse(inspect.getsource(module))
    found: dict[str, Any] = {}
    for block in tree.body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            exec(compile(ast.Module(block.body, []), module.__name__, "exec"), found)
    return found


def functions_of(one: type) -> Iterator[Callable]:
    """Methods and properties as they stand in a class."""
    for member in vars(one).values():
        member = getattr(member, "fget", None) or getattr(member, "func", member)
        function = inspect.unwrap(getattr(member, "__func__", member))
        if inspect.isfunction(function):
            yield function


def annotated(module: ModuleType) -> Iterator[Callable]:
    """The classes of a module, their methods, and its functions, but for what dataclasses make."""
    for one in vars(module).values():
        if getattr(one, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(one):
            yield one
            yield from (f for f in functions_of(one) if f.__code__.co_filename == module.__file__)
        elif inspect.isfunction(one):
            yield one


def undefined_in(one: Callable, given: dict[str, Any]) -> str | None:
    """What the annotations of a class or function name that does not exist."""
    try:
        get_type_hints(one, localns=given)
    except NameError as error:
        return f"{one.__module__}.{one.__qualname__}: {error}"
    return None


def test_annotations_name_what_exists() -> None:
    modules = [importlib.import_module(name) for name in MODULES]
    given = {m: for_checkers(m) for m in modules}
    read = [undefined_in(one, given[m]) for m in modules for one in annotated(m)]
    assert [error for error in read if error] == []
    assert len(read) > 2000


def test_models_and_recipes_import_nothing_for_checkers_alone() -> None:
    packages = ("audio_lens.models", "audio_lens.recipes")
    names = [name for name in MODULES if name.startswith(packages)]
    assert [name for name in names if for_checkers(importlib.import_module(name))] == []
