"""The documentation builds, hangs together, needs no network, and says what the code says."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import typer

import audio_lens
from audio_lens import items, metrics, models, patching, report
from audio_lens.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LOADED = {"script": "src", "img": "src", "iframe": "src", "audio": "src", "source": "src"}
REMOTE = re.compile(r"""url\(\s*["']?(?:https?:)?//|@import\s+["'](?:https?:)?//""")


def script(name: str) -> ModuleType:
    """A script of the documentation as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Page(HTMLParser):
    """What a page of the site links to and loads, and the anchors it has."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link":
            self.loads.append(given["href"])
        if LOADED.get(tag) in given:
            self.loads.append(given[LOADED[tag]])


# -------------------------------------------------------------------------------- sources


def nav(entries: list) -> Iterator[str]:
    """The pages that the navigation leads to."""
    for entry in entries:
        target = next(iter(entry.values())) if isinstance(entry, dict) else entry
        if isinstance(target, list):
            yield from nav(target)
        else:
            yield target


def test_nav_leads_to_every_page_once() -> None:
    yaml = pytest.importorskip("yaml")
    listed = list(nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    assert sorted(listed) == pages


def test_drawings_are_fresh() -> None:
    drawings = script("drawings")
    for name, draw in drawings.DRAWINGS.items():
        drawn = (DOCS / "img" / f"{name}.svg").read_text(encoding="utf-8")
        assert drawn == draw().svg(), f"python docs/drawings.py ({name})"


def test_unknown_axes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hook_q has shape \(2, 3\).*b t h e"):
        script("tables").axes_of("hook_q", (2, 3))


def test_every_command_and_option_is_told() -> None:
    told = script("tables").commands()
    for name, command in typer.main.get_command(app).commands.items():
        assert f"## `audio-lens {name}`" in told
        options = (option for parameter in command.params for option in parameter.opts)
        assert all(option in told for option in options), name
    assert not re.search(r"\[/?(bold|green|dim)?\]", told)


@pytest.mark.parametrize("page", ["layout.md", "adding_a_model.md"])
def test_named_files_exist(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[\w]+/)*\w+\.py)(?::|`)", text))
    folders = [ROOT, ROOT / "audio_lens", ROOT / "audio_lens" / "models"]
    assert named and not {one for one in named if not any((f / one).is_file() for f in folders)}


# -------------------------------------------------------------------------------- hook names


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return script("tables")


@pytest.fixture(scope="module")
def tiny_models(tables: ModuleType) -> list[tuple[str, Any, dict[str, tuple[int, ...]]]]:
    return tables.tiny_models()


def test_hook_tables_hold_every_name(tables: ModuleType, tiny_models: list) -> None:
    sections = re.split(r"^### ", tables.hook_tables(), flags=re.MULTILINE)[1:]
    by_family = {
        name: section for section in sections for name in section.splitlines()[0].split(", ")
    }
    assert by_family.keys() == {name for name, _, _ in tiny_models}
    for family, model, shapes in tiny_models:
        assert shapes.keys() == model.hook_dict.keys()
        told = defaultdict(set)
        for row in by_family[family].splitlines():
            places, _, names = row.strip("| ").partition(" | ")
            for place in re.findall(r"`(.*?)`", places):
                told[place.replace("(model)", "")] |= set(re.findall(r"`(hook_.*?)`", names))
        for name in model.hook_dict:
            place, leaf = tables.place_and_leaf(name)
            assert leaf in told[place], (family, name)


def test_numbers_in_hook_names_become_letters() -> None:
    place_and_leaf = script("tables").place_and_leaf
    assert place_and_leaf("hook_logits") == ("", "hook_logits")
    assert place_and_leaf("decoder.blocks.3.attn.hook_z") == ("decoder.blocks.{l}.attn", "hook_z")
    assert place_and_leaf("decoder.hook_code_embed.0") == ("decoder", "hook_code_embed.{k}")


def test_axes_of_blocks_are_what_the_letters_say(tables: ModuleType, tiny_models: list) -> None:
    for family, model, shapes in tiny_models:
        for part, cfg in model.cfg.parts.items():
            sizes = {"d": {cfg.d_model}, "e": {cfg.d_head}, "1": {1}}
            sizes["h"] = {cfg.n_heads, cfg.n_key_value_heads}
            for name, shape in shapes.items():
                if name.startswith(f"{part}.blocks.0."):
                    axes = tables.axes_of(name.rpartition(".")[2], shape).split()
                    for letter, size in zip(axes, shape, strict=True):
                        assert size in sizes.get(letter, {size}), (family, name, axes, shape)


def test_drawn_names_exist(tiny_models: list) -> None:
    drawings = script("drawings")
    known = {name.rpartition(".")[2] for _, _, shapes in tiny_models for name in shapes}
    for draw in drawings.DRAWINGS.values():
        assert set(re.findall(r"hook_\w+", draw().svg())) <= known


# -------------------------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """The pages of the site, built from scratch; warnings are errors."""
    pytest.importorskip("material", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings_handlers.python", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site").resolve()
    made = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    return {path: Page(path) for path in folder.rglob("*.html")}


@pytest.mark.slow
def test_site_loads_nothing_from_elsewhere(site: dict[Path, Page]) -> None:
    for path, page in site.items():
        for address in page.loads:
            parts = urlsplit(address)
            if parts.scheme == "data":
                continue
            assert not (parts.scheme or parts.netloc), (path.name, address)
            if path.name != "404.html":  # its addresses are absolute: it is shown anywhere
                assert (path.parent / unquote(parts.path)).is_file(), (path.name, address)
    root = min(site, key=lambda path: len(path.parts)).parent
    for sheet in root.rglob("*.css"):
        assert not REMOTE.search(sheet.read_text(encoding="utf-8")), sheet.name


@pytest.mark.slow
def test_links_and_anchors_lead_somewhere(site: dict[Path, Page]) -> None:
    n_checked = 0
    for path, page in site.items():
        for link in page.links if path.name != "404.html" else []:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), (path.name, link)
            if parts.fragment and target in site:
                assert unquote(parts.fragment) in site[target].anchors, (path.name, link)
            n_checked += 1
    assert n_checked > 500


@pytest.mark.slow
def test_no_table_is_left_out(site: dict[Path, Page]) -> None:
    for path in site:
        assert "<!-- table" not in path.read_text(encoding="utf-8"), path.name


def public_names(module: ModuleType) -> set[str]:
    """Where the classes and functions that a module offers are defined."""
    names = getattr(module, "__all__", None) or [
        name
        for name, held in vars(module).items()
        if not name.startswith("_") and getattr(held, "__module__", "") == module.__name__
    ]
    public = [getattr(module, name) for name in names]
    return {
        f"{inspect.unwrap(held).__module__}.{held.__qualname__}"
        for held in public
        if inspect.isclass(held) or inspect.isfunction(inspect.unwrap(held))
    }


@pytest.mark.slow
def test_reference_holds_every_public_name(site: dict[Path, Page]) -> None:
    reference = {
        anchor
        for path, page in site.items()
        if path.parent.name == "api"
        for anchor in page.anchors
    }
    for module in (audio_lens, models, patching, metrics, items, report):
        missing = public_names(module) - reference
        assert not missing, (module.__name__, sorted(missing))
