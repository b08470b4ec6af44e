"""What makes a thing this one and no other, as a hash: data by what it holds, functions by code.

Metrics and hooks are functions of the user's own. Values that one of them made belong to it alone,
so that a sweep that goes on later, or a map that is made again, must know it again.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from audio_lens.digests import of_state, of_tensor, settings_of
from audio_lens.errors import AudioLensError

LENGTH = 32  # of a hash, in hexadecimal digits
_MOST = 50_000  # values looked at before giving up
_PLAIN = (
    *(type(None), type(...), bool, int, float, complex, str, bytes, range, slice),
    *(torch.dtype, torch.device),
)
_OF_TYPES = (types.GenericAlias, types.UnionType, type(typing.List[int]), typing.TypeVar)  # noqa: UP006
_BUILT_IN = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
_BOOKKEEPING = {
    *("__module__", "__dict__", "__weakref__", "__doc__", "__firstlineno__", "_abc_impl"),
    *("__static_attributes__", "__annotations__", "__annotate_func__", "__annotations_cache__"),
    *("__dataclass_fields__", "__dataclass_params__", "__abstractmethods__"),
}


class NoIdentityError(AudioLensError, ValueError):
    """A function that nobody can know again: something it holds has no content to hash."""


class Versioned:
    """A function that is known by a name and a version, whatever it holds."""

    def __init__(self, fn: Callable[..., Any], version: str | int, name: str | None = None):
        self.fn, self.version = fn, version
        self.name = name or getattr(fn, "name", None) or getattr(fn, "__name__", "function")

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.fn(*args, **options)

    def __repr__(self) -> str:
        return f"{self.name} (version {self.version})"


def versioned(fn: Callable[..., Any], version: str | int, name: str | None = None) -> Versioned:
    """The function, known again by name and version instead of by what it is made of.

    For metrics and hooks that hold what has no content to hash (an open file, a generator of
    random numbers), or whose code changes where its meaning does not. Give a new version whenever
    the function gives other values: nobody looks into it any more.

    Args:
        version: which one this is.
        name: what it is called; None takes the function's own name.
    """
    return Versioned(fn, version, name)


def identity_of(value: Any) -> str:
    """A hash of what a value is: its data, or a function's code and all that this refers to.

    Data count by what they hold, functions by their code, defaults, closure, and the globals they
    read; objects by their class and by what pickles of them would hold; modules and classes of the
    user's own by their code, those of installed packages by their names. The hash is the same in
    another process; for functions, of the same version of Python.

    Raises:
        NoIdentityError: naming the part that has no content to hash.
    """
    walk = _Walk()
    try:
        walk.add(value)
    except NoIdentityError:
        raise
    except RecursionError as error:
        raise walk.refused("holds too much to look through") from error
    except Exception as error:  # of somebody's code, on the way
        raise walk.refused(f"cannot be looked through ({error})") from error
    return walk.digest.hexdigest()[:LENGTH]


class _Walk:
    """Goes through a value and everything it consists of, and hashes it on the way."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.above: dict[int, int] = {}  # values that hold this one: how deep each lies
        self.way: list[str] = []
        self.count = 0

    def add(self, value: Any) -> None:
        if id(value) in self.above:
            return self.mark("again", self.above[id(value)])
        self.count += 1
        if self.count > _MOST or len(self.above) > 300:
            raise self.refused("holds too much to look through")
        if type(value) in _PLAIN:
            return self.mark(type(value).__name__, repr(value))
        self.above[id(value)] = len(self.above)
        self.take_apart(value)
        del self.above[id(value)]

    def mark(self, *words: Any) -> None:
        for word in words:
            data = str(word).encode("utf-8", "surrogatepass")
            self.digest.update(f"{len(data)}:".encode() + data)

    def refused(self, why: str) -> NoIdentityError:
        place = " of ".join(reversed(self.way)) or "it"
        return NoIdentityError(f"{place} {why}")

    @contextmanager
    def inside(self, place: str) -> Iterator[None]:
        self.mark(place)
        self.way.append(place)
        yield
        self.way.pop()

    def add_named(self, what: str, values: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> None:
        for name, value in values.items() if isinstance(values, Mapping) else values:
            if type(value) in _PLAIN:
                self.mark(what, name)
                self.add(value)
            else:
                with self.inside(f"{what} {name!r}"):
                    self.add(value)

    # ---------------------------------------------------------------- kinds of values

    def take_apart(self, value: Any) -> None:
        if isinstance(value, Versioned):
            self.mark("versioned", value.name, value.version)
        elif isinstance(value, Tensor):
            self.mark("tensor", of_tensor(value))
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self.mark("array", value.dtype.str, value.shape)
            self.digest.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, nn.Module):
            self.add_class(type(value))
            self.mark("module", of_state(value), settings_of(value))
        elif isinstance(value, types.ModuleType):
            self.add_module(value)
        elif isinstance(value, type):
            self.add_class(value)
        elif isinstance(value, types.FunctionType):
            self.add_function(value)
        elif isinstance(value, types.CodeType):
            self.add_code(value)
        elif isinstance(value, types.MethodType):
            self.add(value.__func__)
            self.add_named("the object", {"self": value.__self__})
        else:
            self.take_apart_object(value)

    def take_apart_object(self, value: Any) -> None:
        if type(value) in (list, tuple, torch.Size):
            self.mark(type(value).__name__, len(value))
            self.add_named("item", ((str(i), one) for i, one in enumerate(value)))
        elif type(value) in (dict, types.MappingProxyType):
            self.mark("dict", len(value))
            for i, (key, one) in enumerate(value.items()):
                self.add_named("key", {str(i): key})
                self.add_named("entry", {str(key)[:40]: one})
        elif type(value) in (set, frozenset):
            self.mark(type(value).__name__, *sorted(map(identity_of, value)))
        elif isinstance(value, _BUILT_IN):
            self.add_built_in(value)
        elif isinstance(value, _OF_TYPES):
            self.mark("type", repr(value))
        elif isinstance(value, (property, staticmethod, classmethod, functools.cached_property)):
            inner = ("fget", "fset", "fdel", "func", "__func__")
            self.mark(type(value).__name__)
            self.add_named("part", {name: getattr(value, name, None) for name in inner})
        elif inspect.isfunction(wrapped := getattr(value, "__wrapped__", None)):
            self.mark(type(value).__name__)
            self.add(wrapped)
        else:
            self.add_pickled(value)

    def add_pickled(self, value: Any) -> None:
        """What a pickle would hold, which is what the object is."""
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        try:
            reduced = value.__reduce_ex__(4)
        except Exception as error:
            raise self.refused(f"is a {kind}, which has no content to hash ({error})") from error
        if isinstance(reduced, str):
            return self.mark("global", kind, reduced)
        self.mark("object", kind)
        make, arguments, *rest = reduced
        self.add_named("maker", {"made by": make})
        self.add_named("part", enumerated(arguments))
        state, items, entries = (*rest, None, None, None)[:3]
        if isinstance(state, dict):
            self.add_named("attribute", sorted(state.items(), key=lambda pair: str(pair[0])))
        else:
            self.add_named("part", {"state": state})
        self.add_named("part", {"items": None if items is None else list(items)})
        self.add_named("part", {"entries": None if entries is None else list(entries)})

    def add_built_in(self, value: Any) -> None:
        self.mark("built in", getattr(value, "__qualname__", value.__name__))
        owner = getattr(value, "__self__", None)
        if owner is None or isinstance(owner, (type, types.ModuleType)):
            self.mark(getattr(value, "__module__", None) or "", getattr(owner, "__name__", ""))
        else:
            self.add_named("the object", {"self": owner})

    def add_module(self, module: types.ModuleType) -> None:
        """By its name; a module of the user's own by what its file holds, too."""
        self.mark("module", module.__name__)
        file = getattr(module, "__file__", None)
        if file and not is_installed(module.__name__) and Path(file).is_file():
            self.digest.update(hashlib.sha256(Path(file).read_bytes()).digest())

    def add_class(self, kind: type) -> None:
        """By its name; a class of the user's own by its code, too."""
        self.mark("class", kind.__module__, kind.__qualname__)
        if is_installed(kind.__module__):
            return
        for base in kind.__bases__:
            with self.inside("base"):
                self.add(base)
        own = {name: x for name, x in vars(kind).items() if name not in _BOOKKEEPING}
        self.add_named("attribute", sorted(own.items()))

    # ---------------------------------------------------------------- functions

    def add_function(self, fn: types.FunctionType) -> None:
        """By its code, defaults, closure and globals; one of an installed package by its name."""
        is_named = "<" not in fn.__qualname__  # neither a lambda nor inside a function
        if is_named and is_installed(fn.__module__ or ""):
            return self.mark("function", fn.__module__, fn.__qualname__)
        self.mark("function")
        with self.inside("code"):
            self.add_code(fn.__code__)
        self.add_named("default", enumerated(fn.__defaults__ or ()))
        self.add_named("default", fn.__kwdefaults__ or {})
        kept = {name: x for name, x in vars(fn).items() if name != "__wrapped__"}
        self.add_named("attribute", sorted(kept.items()))
        cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
        self.add_named("variable", ((name, _content(cell)) for name, cell in cells))
        self.add_named("global", self.globals_of(fn))

    def globals_of(self, fn: types.FunctionType) -> Iterator[tuple[str, Any]]:
        built_in = fn.__builtins__
        for name in sorted(set(_global_names(fn.__code__))):
            if name in fn.__globals__:
                yield name, fn.__globals__[name]
            elif name not in built_in:
                yield name, _Missing

    def add_code(self, code: types.CodeType) -> None:
        self.mark(code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        self.digest.update(code.co_code + code.co_exceptiontable)
        self.mark(*code.co_names, "|", *code.co_varnames, "|", *code.co_freevars, *code.co_cellvars)
        self.add_named("constant", enumerated(code.co_consts))


class _Missing:
    """Stands for a name that is not there (yet)."""


def enumerated(values: Iterable[Any]) -> list[tuple[str, Any]]:
    return [(str(i), value) for i, value in enumerate(values)]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return _Missing


def _global_names(code: types.CodeType) -> Iterator[str]:
    """Names that code, and the code of functions in it, looks up among the globals."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield str(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


@functools.cache
def is_installed(module: str) -> bool:
    """Whether a module is of this package, of Python or of an installed one, not the user's."""
    root = module.partition(".")[0]
    if root == "__main__":  # which starts others, in notebooks
        return False
    if root == "audio_lens" or root in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
