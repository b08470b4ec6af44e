"""The methods that `audio-lens analyse` knows, read from the sources of `audio_lens.analysis`.

Importing them takes seconds; reading what they are called, none.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from audio_lens.items import Method

PACKAGE = "audio_lens.analysis"
REGISTER = "analysis"  # the decorator


@dataclass(frozen=True)
class Listed:
    """A method that a source registers.

    Attributes:
        name: what the command calls it.
        summary: the first line of its docstring.
        module: where it is.
    """

    name: str
    summary: str
    module: str


@functools.cache
def listed(package: str = PACKAGE) -> dict[str, Listed]:
    """Every method that a module of the package registers, by name in the order of the alphabet."""
    spec = importlib.util.find_spec(package)
    folders = [Path(one) for one in (spec.submodule_search_locations or [])] if spec else []
    found = [
        one
        for folder in folders
        for path in folder.rglob("*.py")
        for one in _registered(path, _module_of(path, folder, package))
    ]
    return {one.name: one for one in sorted(found, key=lambda one: one.name)}


def get(name: str) -> Method:
    """A method of the package, or one that is registered already.

    Raises:
        ValueError: none is called so.
    """
    if name in listed():
        importlib.import_module(listed()[name].module)
    from audio_lens.arguments import suggest
    from audio_lens.items import ANALYSES

    if name not in ANALYSES:
        known = suggest(name, sorted(listed().keys() | ANALYSES.keys()))
        raise ValueError(f"there is no method {name!r}; {known}")
    return ANALYSES[name]


def _module_of(path: Path, folder: Path, package: str) -> str:
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])


def _registered(path: Path, module: str) -> Iterator[Listed]:
    source = path.read_text(encoding="utf-8")
    if f"{REGISTER}(" not in source:
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            for name in filter(None, map(_name_given, node.decorator_list)):
                yield Listed(name, (ast.get_docstring(node) or "").partition("\n")[0], module)


def _name_given(decorator: ast.expr) -> str | None:
    """The name in ``@analysis("name")``; None for other decorators."""
    if not isinstance(decorator, ast.Call) or len(decorator.args) != 1:
        return None
    called, (given,) = decorator.func, decorator.args
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
    said = given.value if isinstance(given, ast.Constant) else None
    return said if name == REGISTER and isinstance(said, str) else None
