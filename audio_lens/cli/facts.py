"""`audio-lens models` and `audio-lens info`: what there is, and what it is made of."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from audio_lens.cli import shared
from audio_lens.cli.shared import AsJson, Debug, ModelArgument, Verbose, app, out, plain_errors

if TYPE_CHECKING:
    from audio_lens.catalogue import Catalogue, Entry

IN_COLUMNS = ("encoder", "connector", "decoder")


@app.command()
def models(as_json: AsJson = False, verbose: Verbose = False, debug: Debug = False) -> None:
    """The families of models, their hooks and times, and how closely they match Hugging Face.

    [bold]Examples[/]

    [green]audio-lens models[/]

    [green]audio-lens models --json[/]
    """
    with plain_errors(debug, verbose):
        from audio_lens.catalogue import Catalogue

        catalogue = Catalogue.load()
        if as_json:
            shared.print_json(asdict(catalogue))
            return
        out.print(_families(catalogue))
        out.print(
            "[dim]of each part: hook points in a block, seconds from one position to the next[/]"
        )
        versions = ", ".join(f"{name} {version}" for name, version in catalogue.versions.items())
        out.print(
            "[dim]float32, float64: largest difference from Hugging Face in any output, residual "
            f"stream or pattern, relative to the largest value ({escape(versions)}). "
            f"{escape(catalogue.not_in_float64())}[/]"
        )


def _families(catalogue: Catalogue) -> Table:
    """The table of families, no wider than 80 columns: further parts stand below their model."""
    shape = {"box": None, "header_style": "bold", "padding": (0, 1, 0, 0)}
    table = Table("model", *IN_COLUMNS, "float32", "float64", **shape)
    for entry in catalogue.entries:
        parts = {part: _part(entry, part) for part in entry.parts}
        cells = [parts.get(part, "") for part in IN_COLUMNS]
        table.add_row(entry.name, *cells, f"{entry.float32:.0e}", f"{entry.float64:.0e}")
        for part in entry.parts:
            if part not in IN_COLUMNS:
                table.add_row(f"  and {part}: {parts[part]}")
    return table


def _part(entry: Entry, part: str) -> str:
    """Hook points in one of a part's blocks, and the seconds between its positions."""
    seconds = entry.seconds_per_position.get(part)
    held = [str(entry.hooks_per_block.get(part, "")), "" if seconds is None else f"{seconds:g} s"]
    return ", ".join(filter(None, held))


@app.command()
def info(
    model: ModelArgument = "embedded",
    hooks: Annotated[bool, typer.Option("--hooks", help="List every hook with its shape.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Parts, sizes, hook names and the seconds per position of a model.

    [bold]Examples[/]

    [green]audio-lens info[/]

    [green]audio-lens info openai/whisper-tiny --hooks[/]
    """
    with plain_errors(debug, verbose):
        listener = shared.load(model)
        from audio_lens.report.facts import describe

        facts = describe(listener)
        if as_json:
            shared.print_json(facts)
        else:
            _print_info(facts, hooks)


def _print_info(facts: dict[str, Any], hooks: bool) -> None:
    out.print(f"[bold]{escape(facts['model'])}[/]: {facts['family']}")
    longest = facts["longest_clip_s"]
    clips = f"clips up to {longest:g} s" if math.isfinite(longest) else "clips of any length"
    out.print(f"{facts['parameters']:,} parameters, {facts['sampling_rate']} Hz, {clips}")
    parts = facts["parts"]
    table = Table("", *parts, box=None, header_style="bold")
    for what in dict.fromkeys(what for sizes in parts.values() for what in sizes):
        row = (sizes.get(what) for sizes in parts.values())
        table.add_row(what.replace("_", " "), *("" if x is None else str(x) for x in row))
    out.print(table)
    if facts["streams"]:
        widths = ", ".join(f"{name} ({width})" for name, width in facts["streams"].items())
        out.print(f"writes {escape(widths)}", soft_wrap=True)
    out.print(f"{len(facts['hooks'])} hook points, shapes for {facts['shapes_for']}:")
    shown = facts["hooks"] if hooks else _one_block_each(facts["hooks"])
    for name, shape in shown.items():
        out.print(f"  {name} [dim]{shape}[/]", highlight=False, soft_wrap=True)
    if not hooks:
        out.print("[dim]block 0 stands for all; --hooks lists every one[/]")


def _one_block_each(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """The hooks outside the blocks, and those of each part's first block."""
    return {n: shape for n, shape in shapes.items() if ".blocks." not in n or ".blocks.0." in n}
