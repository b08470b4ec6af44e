"""Checks of types in tests: what the package's annotations say is held against each call.

`install` lets every function of the package, and every dataclass, be `checked`. What checks a
function is made when it is first called: by beartype, and where annotations name shapes, jaxtyping
keeps the sizes of axes. The import hook of jaxtyping makes all checks when a module is imported,
binds arguments once more and checks them twice, which makes tests take half as long again.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import util
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any, get_args, get_type_hints
from unittest import mock

import jaxtyping
from beartype import BeartypeConf, beartype

PACKAGE = "audio_lens"
AS_JAXTYPING = BeartypeConf(violation_type=jaxtyping.TypeCheckError)
SIZES = jaxtyping.jaxtyped("context")
IMPORT = ast.Import([ast.alias(__name__, lineno=1, col_offset=0)], lineno=1, col_offset=0)
BLOCKS = (ast.stmt, ast.ExceptHandler, ast.match_case)  # what statements stand in
CACHED = functools.partial(util.cache_from_source, optimization="checked1")


def is_off() -> bool:
    return jaxtyping.config.jaxtyping_disable


def checked(one: Any) -> Any:
    """A function, or the constructor of a dataclass, that checks its types where checks are on."""
    if inspect.isclass(one):
        if dataclasses.is_dataclass(one) and not hasattr(vars(one).get("__init__"), "__wrapped__"):
            one.__init__ = checked(one.__init__)
        return one
    if "<locals>" in one.__qualname__:  # made anew by each call around it
        return one if is_off() else jaxtyping.jaxtyped(one, typechecker=beartype)
    with_checks: Callable | None = None

    @functools.wraps(one)
    def run(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal with_checks
        if is_off():
            return one(*args, **kwargs)
        if with_checks is None:
            with_checks = made(one)
        return with_checks(*args, **kwargs)

    return run


def made(function: Any) -> Callable:
    """The function with checks, whatever is made of warnings at the time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hints = {name: resolved(hint, function) for name, hint in function.__annotations__.items()}
        if inspect.isgeneratorfunction(function):
            hints.pop("return", None)  # what a loop gets, others may have drawn from already
        checking = beartype(conf=AS_JAXTYPING)(annotated(function, hints))
    return among_sizes(checking) if any(map(names_shapes, hints.values())) else checking


def among_sizes(function: Callable) -> Callable:
    """The function with names of axes of its own, which have one size each while it runs."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with SIZES:
            return function(*args, **kwargs)

    return run


def resolved(hint: Any, function: Callable) -> Any:
    """An annotation as an object; anything, where it names what only type checkers import."""
    try:
        alone = types.SimpleNamespace(__annotations__={"hint": hint})
        return get_type_hints(alone, function.__globals__, include_extras=True)["hint"]
    except Exception:  # what the evaluation of any expression may raise
        return Any


def names_shapes(hint: Any) -> bool:
    if isinstance(hint, (list, tuple)):  # the arguments of a callable
        return any(map(names_shapes, hint))
    return getattr(hint, "__module__", "") == "jaxtyping" or names_shapes(get_args(hint))


def annotated(function: Any, hints: dict[str, Any]) -> Callable:
    """The same function with annotations that are objects."""
    same = types.FunctionType(
        *(function.__code__, function.__globals__, function.__name__),
        *(function.__defaults__, function.__closure__),
    )
    same.__kwdefaults__, same.__annotations__ = function.__kwdefaults__, hints
    same.__module__, same.__qualname__ = function.__module__, function.__qualname__
    return same


# -------------------------------------------------------------------------------- imports


def with_decorators(tree: ast.Module) -> ast.Module:
    """A module in whose code every function and class is decorated with `checked`.

    Functions get it innermost, as other decorators may hide annotations, and classes outermost.
    """
    for node in definitions(tree):
        at = {"lineno": node.lineno, "col_offset": node.col_offset}
        decorator = ast.Attribute(
            ast.Name(__name__, ast.Load(), **at), checked.__name__, ast.Load(), **at
        )
        innermost = len(node.decorator_list) if isinstance(node, ast.FunctionDef) else 0
        node.decorator_list.insert(innermost, decorator)
    at = first_line(tree.body)
    tree.body.insert(at, IMPORT)
    return tree


def definitions(block: ast.AST) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes of a block of statements, and those within them."""
    for node in ast.iter_child_nodes(block):
        if isinstance(node, BLOCKS):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield node
            yield from definitions(node)


def first_line(body: Sequence[ast.stmt]) -> int:
    """Where code begins, behind the docstring and imports from the future."""
    for at, node in enumerate(body):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not is_text and not (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
            return at
    return len(body)


class Loader(SourceFileLoader):
    """Reads a module of the package with checks, whose bytecode has a file of its own."""

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> types.CodeType:
        tree = with_decorators(ast.parse(data, path))
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)

    def get_code(self, fullname: str) -> types.CodeType | None:
        with mock.patch("importlib._bootstrap_external.cache_from_source", CACHED):
            return super().get_code(fullname)


class Finder:
    """Finds the package's modules, to be read by `Loader`."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Check what is imported of the package from now on.

    Raises:
        RuntimeError: some of it is imported already.
    """
    if PACKAGE in sys.modules:
        raise RuntimeError(f"{PACKAGE} is imported already, without checks of types")
    sys.meta_path.insert(0, Finder)  # type: ignore[arg-type]
