"""Methods over items: registered by name, told where their results come from, and run again."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch

from audio_lens.errors import AudioLensError, InputError
from audio_lens.items.item import Item
from audio_lens.items.items import Items
from audio_lens.items.pairs import Dropped, Pairs
from audio_lens.items.tables import item_of
from audio_lens.models import HookedAudioTransformer
from audio_lens.provenance import is_own, of_model, recalled, recorded, weights_hash
from audio_lens.results import Result

Function = TypeVar("Function", bound=Callable[..., Any])
METHODS: dict[str, Method] = {}
ANALYSES: dict[str, Method] = {}
_PACKAGE = __name__.partition(".")[0]


class MethodError(AudioLensError, ValueError):
    """A result that cannot be made again from what its file holds, or not with what was given."""


@dataclass(frozen=True)
class Method:
    """A function of a model and items that gives a `Result`.

    Attributes:
        name: what it is called in files and commands.
        function: ``function(model, items, ...)``; or pairs in place of items.
        summary: the first line of its docstring.
        whole: why its estimate is of all items at once, and cannot be joined from parts of them;
            empty where it can.
    """

    name: str
    function: Callable[..., Any]
    summary: str
    whole: str = ""


@runtime_checkable
class Made(Protocol):
    """What a method gives that can be told where it comes from."""

    meta: dict[str, str]
    recipe: dict[str, Any]


def method(name: str, whole: str = "") -> Callable[[Function], Function]:
    """Register a function of a model and items (or pairs) as a method, by a name.

    Its results then say which model, weights, versions and items they are of (``meta``), and hold
    what `rerun` makes them again from (``recipe``).

    Args:
        name: the method's.
        whole: of one that fits or chooses something on its items, or whose estimate is no mean of
            theirs: why, and what to study in its place. A study of parts is then refused.

    Raises:
        ValueError: a name that is taken.
    """

    def register(function: Function) -> Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def told(*given: Any, **options: Any) -> Any:
            bound = signature.bind(*given, **options)
            bound.apply_defaults()
            model, items, *_ = bound.args
            result = function(*given, **options)
            if isinstance(result, Made):
                over = (*bound.arguments,)[2:]
                arguments = recorded({key: bound.arguments[key] for key in over})
                result.meta = of_model(model) | _hashes(items) | {"method": name} | result.meta
                result.recipe = {
                    "method": name,
                    "module": function.__module__,
                    "arguments": arguments,
                    "items": _rows(items),
                    **result.recipe,
                }
            return result

        if name in METHODS and METHODS[name].function.__module__ != function.__module__:
            raise InputError(f"{METHODS[name].function.__module__} has a method {name!r} already")
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        METHODS[name] = Method(name, told, summary, whole)
        return cast(Function, told)

    return register


def analysis(name: str) -> Callable[[Function], Function]:
    """Register what ``audio-lens analyse NAME`` runs.

    That is ``function(model, items, *, seed=0, progress=None)``, which gives a `Result`, or several
    by name, of methods that it calls. The first line of its docstring is the question it answers.

    Raises:
        ValueError: a name that is taken.
    """

    def register(function: Function) -> Function:
        if name in ANALYSES and ANALYSES[name].function.__module__ != function.__module__:
            raise InputError(f"{ANALYSES[name].function.__module__} is called {name!r} already")
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        ANALYSES[name] = Method(name, function, summary)
        return function

    return register


def rerun(
    saved: Result | str | Path,
    model: HookedAudioTransformer | None = None,
    items: Items | Pairs | None = None,
) -> Any:
    """Make a result again from what it, or its file, recorded.

    Args:
        saved: the result, or its file.
        model: the model; None loads what was recorded. Its weights must be what they were.
        items: the items or pairs, where clips were in memory or have moved; they must be what they
            were.

    Raises:
        MethodError: a result that recorded too little, other weights or items, or arguments
            that no file holds.
        AudioError: a clip that is gone.
    """
    result = saved if isinstance(saved, Result) else Result.load(saved)
    recipe = result.recipe
    if not {"method", "module", "arguments", "items"} <= recipe.keys():
        raise MethodError("this result recorded no method that it could be made by again")
    own = [name for name, value in recipe["arguments"].items() if is_own(value)]
    if own:
        raise MethodError(f"no file holds its {', '.join(own)}: call {recipe['method']} itself")
    model = _loaded(result) if model is None else model
    if weights_hash(model) != result.meta.get("weights_hash"):
        raise MethodError(
            f"{model.cfg.model_name} has other weights (or another dtype) than the model that the "
            f"result is of, {result.meta.get('model')}"
        )
    items = _recalled(recipe["items"]) if items is None else items
    then, now = result.meta.get("items_hash"), _hashes(items)["items_hash"]
    if then != now:
        raise MethodError("the items are not what they were, by their hash")
    function = _function(recipe)  # first: what its arguments are made of comes with its module
    arguments = {name: recalled(value) for name, value in recipe["arguments"].items()}
    return function(model, items, **arguments)


def _function(recipe: Mapping[str, Any]) -> Callable[..., Any]:
    """The method that a recipe names; of modules of this package, or what is registered already."""
    if recipe["method"] not in METHODS and recipe["module"].startswith(f"{_PACKAGE}."):
        importlib.import_module(recipe["module"])
    if recipe["method"] not in METHODS:
        raise MethodError(
            f"there is no method {recipe['method']!r}: import {recipe['module']} first"
        )
    return METHODS[recipe["method"]].function


def _loaded(result: Result) -> HookedAudioTransformer:
    if "model" not in result.meta or "dtype" not in result.meta:
        raise MethodError("this result does not say which model it is of: pass the model")
    dtype = getattr(torch, result.meta["dtype"])
    return HookedAudioTransformer.from_pretrained(result.meta["model"], dtype=dtype)


# -------------------------------------------------------------------------------- items in JSON


def _hashes(items: Items | Pairs) -> dict[str, str]:
    if isinstance(items, Pairs):
        return {"items_hash": f"{items.clean.digest()} {items.corrupted.digest()}"}
    return {"items_hash": items.digest()}


def _rows(items: Items | Pairs) -> Any:
    if isinstance(items, Pairs):
        dropped = {reason: list(names) for reason, names in items.dropped.items()}
        sides = {"clean": _rows(items.clean), "corrupted": _rows(items.corrupted)}
        return sides | {"dropped": dropped}
    return [_row(item) for item in items]


def _row(item: Item) -> dict[str, Any]:
    """An item with the places of its clips; None where one is in memory."""
    clips = {"audio": item.audio, "other_audio": item.other_audio}
    places = {
        name: str(Path(clip).resolve()) if isinstance(clip, (str, Path)) else None
        for name, clip in clips.items()
        if clip is not None
    }
    return {**item.told(), **places}


def _recalled(rows: Any) -> Items | Pairs:
    if isinstance(rows, Mapping):
        dropped = Dropped({reason: tuple(names) for reason, names in rows["dropped"].items()})
        clean, corrupted = (cast(Items, _recalled(rows[x])) for x in ("clean", "corrupted"))
        return Pairs(clean, corrupted, dropped)
    lacking = [row["id"] for row in rows if None in (row["audio"], row.get("other_audio", ""))]
    if lacking:
        raise MethodError(
            f"the clips of {len(lacking)} items were in memory, such as {lacking[0]!r}: pass the "
            "items (or pairs) again"
        )
    return Items(item_of(row, Path("/"), Path("/")) for row in rows)
