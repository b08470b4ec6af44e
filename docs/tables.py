"""Tables of the documentation that are made from the code when the site is built.

A line ``<!-- table: NAME -->`` of a page stands for one of `TABLES`.
"""

from __future__ import annotations

import ast
import configparser
import functools
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PLACEHOLDER = re.compile(r"<!-- table: (\w+) -->")

# The axes of activations and the last pieces of their names: b batch, t positions, q and k query
# and key positions, h heads, e d_head, d d_model, f d_mlp, v vocabulary, labels or classes,
# x experts, m mel bins, r rank of LoRA, n anything else. Names that are not here have `RESIDUAL`.
AXES = {
    "b t h e": "q k v rot_q rot_k z normalized",
    "b h q k": "attn_scores pattern pos_bias",
    "b t h d": "result",
    "b t f": "pre post gate pre_linear glu dw",
    "b t x": "router_logits expert_weights expert_indices",
    "b t v": "logits probs patch_logits",
    "b v": "logits",
    "b t 1": "scale",
    "b t h 1": "scale",
    "b 1": "scale",
    "b t d": "normalized pooled",
    "b d": "normalized pooled",
    "b m n": "mel",
    "b d n": "conv1",
    "b n": "wav",
    "b t n": "tap_weights lora_B",
    "b t r": "lora_A",
    "n d": "audio_embed",
}
RESIDUAL = "b t d"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What mkdocs calls with every page."""
    return PLACEHOLDER.sub(lambda found: TABLES[found[1]](), markdown)


# -------------------------------------------------------------------------------- hook names


@functools.cache
def hook_tables() -> str:
    """One table per set of names, with every family that has just these."""
    families: dict[str, list[str]] = {}
    for name, _, shapes in tiny_models():
        families.setdefault(_hook_table(shapes), []).append(name)
    return "\n\n".join(f"### {', '.join(names)}\n\n{table}" for table, names in families.items())


@functools.cache
def tiny_models() -> list[tuple[str, Any, dict[str, tuple[int, ...]]]]:
    """Every family under test: its name, a tiny random model, and the shapes of all its hooks."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch

    from families import FAMILIES

    made = []
    for name, family in FAMILIES.items():
        model = family.hooked(family.build())
        shapes: dict[str, tuple[int, ...]] = {}
        note = functools.partial(_note, shapes)
        with torch.inference_mode():
            model.run_with_hooks(family.batch(), fwd_hooks=[(lambda _: True, note)])
        made.append((name, model, shapes))
    return made


def _note(shapes: dict[str, tuple[int, ...]], tensor: Any, hook: Any) -> None:
    shapes[hook.name] = tuple(tensor.shape)


def _hook_table(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The names by place and axes; modules of one parent that hold the same share a row."""
    held: dict[str, dict[str, list[str]]] = {}
    for name, shape in shapes.items():
        place, leaf = place_and_leaf(name)
        by_axes = held.setdefault(place, {})
        names = by_axes.setdefault(axes_of(leaf, shape), [])
        names += [] if leaf in names else [leaf]
    rows: dict[tuple[str, str], list[str]] = {}
    for place, by_axes in held.items():
        parent, _, module = place.rpartition(".")
        cell = "<br>".join(f"{_code(names)} *{axes}*" for axes, names in by_axes.items())
        rows.setdefault((parent, cell), []).append(module)
    lines = [f"| {_place(parent, modules)} | {cell} |" for (parent, cell), modules in rows.items()]
    return "\n".join(["| place | names |", "|---|---|", *lines])


def place_and_leaf(name: str) -> tuple[str, str]:
    """The module that holds a hook and the hook's own name, with letters for numbers."""
    place, hook, leaf = f".{name}".rpartition("hook_")
    place = re.sub(r"\.\d+(?=\.)", ".{l}", place).strip(".")
    return place, hook + re.sub(r"\.\d+$", ".{k}", leaf)


def axes_of(leaf: str, shape: tuple[int, ...]) -> str:
    """The letters of an activation's axes.

    Raises:
        ValueError: if `AXES` has none that fit.
    """
    name = leaf.removeprefix("hook_")
    known = [axes for axes, names in AXES.items() if name in names.split()] or [RESIDUAL]
    for axes in known:
        if len(axes.split()) == len(shape):
            return axes
    raise ValueError(f"{leaf} has shape {shape}, and AXES knows it as {', '.join(known)}")


def _place(parent: str, modules: Sequence[str]) -> str:
    return _code([f"{parent}.{module}" if parent else module or "(model)" for module in modules])


def _code(names: Sequence[str]) -> str:
    return " ".join(f"`{name}`" for name in names)


# -------------------------------------------------------------------------------- models, commands


def model_table() -> str:
    """What `audio-lens models` prints."""
    from audio_lens.catalogue import Catalogue

    catalogue = Catalogue.load()
    rows = [
        {
            what: text.replace(", ", "<br>")
            for what, text in row.items()
            if what not in ("file", "others")
        }
        for row in catalogue.rows()
    ]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    versions = ", ".join(f"{name} {version}" for name, version in catalogue.versions.items())
    return f"{table}\n\nMeasured with {versions}. The column {catalogue.not_in_float64()}"


def commands() -> str:
    """The help of every command."""
    import typer
    from click import Context
    from typer.cli import get_docs_for_click

    from audio_lens.cli import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=Context(command), name="audio-lens")
    text = re.sub(r"\[green\](.*?)\[/\]", _as_command, text, flags=re.DOTALL)
    text = re.sub(r"\[bold\](.*?)\[/\]", r"*\1*", text)
    return text.partition("\n")[2].replace("**Usage**", "*Usage*")


def _as_command(found: re.Match[str]) -> str:
    return f"`{' '.join(found[1].split())}`"


def transformer_lens() -> str:
    """TransformerLens's patching functions, which are made when they are imported."""
    from audio_lens import patching

    functions = [getattr(patching, name) for name in patching.__all__ if "get_act_patch" in name]
    lines = ["| function | what it does |", "|---|---|"]
    for function in functions:
        anchor = f'<span id="{function.__module__}.{function.__name__}"></span>'
        summary = inspect.getdoc(function).partition("\n\n")[0]
        lines.append(f"| {anchor}`{function.__name__}` | {summary} |")
    told = inspect.getdoc(patching.get_act_patch_resid_pre)
    return "\n".join(
        [*lines, "", "`get_act_patch_resid_pre`, for all:", "", "```text", told, "```"]
    )


# -------------------------------------------------------------------------------- what is written


def extras() -> str:
    """The extras of the package and what they install."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [
        f"| `{extra}` | {_code(packages.split())} |"
        for extra, packages in setup["options.extras_require"].items()
    ]
    return "\n".join(["| extra | installs |", "|---|---|", *lines])


def notebooks() -> str:
    """The notebooks: their titles and first paragraphs."""
    lines = ["| notebook | what it shows |", "|---|---|"]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        title, summary, *_ = "".join(cells[0]["source"]).split("\n\n")
        lines.append(f"| {title.removeprefix('# ')}<br>`{path.name}` | {summary} |")
    return "\n".join(lines)


def house() -> str:
    """The packages, what they hold, and what each may import."""
    return _rooms("HOUSE", ROOT / "audio_lens")


def models_house() -> str:
    """The folders and files of `models`, likewise."""
    return _rooms("MODELS", ROOT / "audio_lens" / "models")


def _rooms(plan: str, folder: Path) -> str:
    sys.path.insert(0, str(ROOT / "tests"))
    import test_architecture

    lines = ["| | holds | may import |", "|---|---|---|"]
    for room, below in getattr(test_architecture, plan).items():
        file = folder / f"{room}.py"
        name = room + (".py" if file.is_file() else "/")
        text = (file if file.is_file() else folder / room / "__init__.py").read_text("utf-8")
        summary = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
        lines.append(f"| `{name}` | {' '.join(summary.split())} | {_code(below)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "house": house,
    "models_house": models_house,
    "hooks": hook_tables,
    "models": model_table,
    "commands": commands,
    "extras": extras,
    "notebooks": notebooks,
    "transformer_lens": transformer_lens,
}
