"""The plan of the house: which package may import which, and that no file imports in a circle.

`HOUSE` and `MODELS` are the architecture's definition, from the top down. Every import counts: at
the head of a file, inside a function, under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "audio_lens"
GROUND = (
    *("progress", "espeak", "audio", "timeline", "inputs", "hooks", "hook_points", "running"),
    *("identity", "digests", "buckets", "files", "pickles", "sound_files", "combining"),
    *("arguments", "errors", "printable"),
)
CHECKS = ("arguments", "errors", "printable")
HEARD = (*GROUND, "cache")  # what a model is made of and gives
INTERVENING = ("edits", "places", "shapes", "sites")  # what of a model is edited, and where

HOUSE: dict[str, tuple[str, ...]] = {
    "cli": (
        *(
            "studies",
            "explorer",
            "report",
            "recipes",
            "analysis",
            "items",
            "patching",
            "pairs",
            "alignment",
            "metrics",
        ),
        *("models", "results", "drawing", "synthesis", "corruptions", "sites", "catalogue"),
        *HEARD,
    ),
    "studies": (
        *("analysis", "items", "patching", "pairs", "places", "provenance", "metrics"),
        *("models", "results", *HEARD),
    ),
    "explorer": (
        *("analysis", "patching", *INTERVENING, "metrics", "models", "drawing", "corruptions"),
        *HEARD,
    ),
    "report": ("analysis", "patching", "results", "models", "drawing", *HEARD),
    "profile": ("analysis",),  # a former name
    "analysis": (
        *("items", "patching", *INTERVENING, "provenance", "metrics", "models", "results"),
        *("corruptions", *HEARD),
    ),
    "items": (
        *("patching", *INTERVENING, "pairs", "alignment", "provenance", "metrics", "models"),
        *("results", "corruptions", *HEARD),
    ),
    "patching": ("provenance", *INTERVENING, "metrics", "models", "results", *HEARD),
    "edits": ("places", "shapes", "sites", "models", *HEARD),
    "places": ("sites", "models", *HEARD),
    "shapes": ("sites", "models", *HEARD),
    "sites": ("models", *HEARD),
    "recipes": ("models", *HEARD),
    "provenance": (*INTERVENING, "metrics", "models", *HEARD),
    "pairs": ("models", "corruptions", *HEARD),
    "alignment": ("models", *HEARD),
    "metrics": ("models", *HEARD),
    "models": ("catalogue", *HEARD),
    "results": ("drawing", *GROUND),
    "drawing": GROUND,
    "cache": GROUND,
    "synthesis": GROUND,
    "corruptions": GROUND,
    "inputs": ("audio", "timeline", "hooks", "digests", "pickles", *CHECKS),
    "hooks": ("hook_points", "running", *CHECKS),
    "hook_points": CHECKS,
    "running": ("identity",),
    "identity": ("digests", *CHECKS),
    "digests": (),
    "buckets": ("files", *CHECKS),
    "files": CHECKS,
    "pickles": CHECKS,
    "audio": ("sound_files", *CHECKS),
    "sound_files": CHECKS,
    "timeline": ("combining", *CHECKS),
    "combining": CHECKS,
    "espeak": CHECKS,
    "progress": CHECKS,
    "arguments": ("errors", "printable"),
    "errors": ("printable",),
    "printable": (),
    "catalogue": (),
}

SHAPES = ("config", "layers")  # what everything in a model speaks of
MODELS: dict[str, tuple[str, ...]] = {
    "embedded": (),
    "compose": ("kinds", "base", "parts", "loading", "registry", "mixins", *SHAPES),
    "families": ("kinds", "base", "parts", "loading", "mixins", *SHAPES),
    "kinds": ("base", "parts", "mixins", "loading", *SHAPES),
    "base": ("mixins", "part", "loading", "registry", *SHAPES),
    "mixins": ("registry", *SHAPES),
    "parts": ("loading", *SHAPES),
    "part": SHAPES,
    "loading": ("registry", *SHAPES),
    "registry": SHAPES,
    "config": ("layers",),
    "layers": (),
}


def module_name(path: Path, root: Path = PACKAGE.parent) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(name: str, source: str, is_package: bool) -> Iterator[str]:
    """Everything of audio_lens that a file imports, anywhere in it, as dotted names.

    ``from a import b`` gives ``a.b``, which may be a module or something in one.
    """
    own = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("audio_lens"))
        if isinstance(node, ast.ImportFrom):
            start = own[: len(own) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            if base.split(".")[0] == "audio_lens":
                yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def graph() -> dict[str, set[str]]:
    """The modules that every module of the package imports."""
    files = {module_name(path): path for path in PACKAGE.rglob("*.py")}

    def module_of(dotted: str) -> str:
        return dotted if dotted in files else dotted.rpartition(".")[0]

    return {
        name: {
            module_of(dotted)
            for dotted in imports(name, path.read_text(), path.name == "__init__.py")
        }
        - {name}
        for name, path in files.items()
    }


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """The sets of files that reach each other (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        open_.append(name)
        for other in edges.get(name, ()):
            if other not in number:
                visit(other)
            if other in open_:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == number[name]:
            start = open_.index(name)
            found.append(open_[start:])
            del open_[start:]

    for name in edges:
        if name not in number:
            visit(name)
    return [sorted(circle) for circle in found if len(circle) > 1]


def rooms(name: str, plan: Mapping[str, tuple[str, ...]], below: str) -> str | None:
    """The room of a plan that a module lies in; None for the doorway (``__init__``) or outside."""
    inside = name.removeprefix(f"{below}.")
    return inside.split(".")[0] if name.startswith(f"{below}.") else None


def strays(plan: Mapping[str, tuple[str, ...]], below: str) -> list[str]:
    """Imports that a plan does not allow, in words."""
    return [
        f"{name} imports {other}"
        for name, others in sorted(graph().items())
        for other in sorted(others)
        for room, target in [(rooms(name, plan, below), rooms(other, plan, below))]
        if room is not None and target not in (None, room) and target not in plan[room]
    ]


def test_no_file_imports_in_a_circle() -> None:
    assert circles(graph()) == []


@pytest.mark.parametrize("plan", [HOUSE, MODELS], ids=["house", "models"])
def test_the_plan_has_no_way_up(plan: dict[str, tuple[str, ...]]) -> None:
    """Everything a room may import is itself a room, and no two may import each other."""
    assert {target for targets in plan.values() for target in targets} <= plan.keys()
    assert circles({room: set(targets) for room, targets in plan.items()}) == []


@pytest.mark.parametrize(
    "plan, below", [(HOUSE, "audio_lens"), (MODELS, "audio_lens.models")], ids=["house", "models"]
)
def test_every_import_is_in_the_plan(plan: dict[str, tuple[str, ...]], below: str) -> None:
    there = {rooms(name, plan, below) for name in graph()} - {None}
    assert there == plan.keys()
    assert strays(plan, below) == []


def test_nothing_below_imports_the_doorway() -> None:
    """``from audio_lens import X`` inside the package would reach everything there is."""
    inside = {name: others for name, others in graph().items() if ".cli" not in name}
    assert [name for name, others in inside.items() if "audio_lens" in others] == []


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import audio_lens.audio
from audio_lens.models import base
from .sites import Site
from .. import metrics
if TYPE_CHECKING:
    from audio_lens.report import page

def f():
    from audio_lens import cli
"""
    assert sorted(imports("audio_lens.patching.sweep", source, is_package=False)) == [
        "audio_lens.audio",
        "audio_lens.cli",
        "audio_lens.metrics",
        "audio_lens.models.base",
        "audio_lens.patching.sites.Site",
        "audio_lens.report.page",
    ]


def test_circles_are_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"e"}}
    assert circles(edges) == [["b", "c"]]
