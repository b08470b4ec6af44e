"""`audio-lens tap`: Temporal Attribution Patching over the items of a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audio_lens.cli import methods, shared
from audio_lens.cli.analyse import Study, clip_files, read_items, usable
from audio_lens.cli.shared import (
    AsJson,
    Debug,
    Device,
    Dtype,
    ModelName,
    ShowProgress,
    Verbose,
    app,
    plain_errors,
)

if TYPE_CHECKING:
    from audio_lens.items import Items


@app.command("tap")
def tap_command(
    items: Annotated[
        Path | None,
        typer.Option(
            "--items",
            "-i",
            help="A table (jsonl, csv, parquet) with the columns audio, other_audio, text, answer, "
            "against ...; default: the shipped clips.",
        ),
    ] = None,
    model: ModelName = "embedded",
    k: Annotated[
        int | None,
        typer.Option(
            min=1, help="Nodes of each kind to confirm; default: chosen on pairs set apart."
        ),
    ] = None,
    window: Annotated[float, typer.Option(help="Width of the windows in seconds.")] = 0.2,
    stride: Annotated[
        float | None, typer.Option(help="From one window to the next in seconds; default: a width.")
    ] = None,
    rank: Annotated[
        int, typer.Option(min=1, help="Directions that the confirmed place may need.")
    ] = 16,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Keeps every stage that is done; the same command goes on from there."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of whatever is drawn at random.")] = 0,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad", help="Leave out rows that cannot be used, and tell of each on stderr."
        ),
    ] = False,
    save: Annotated[
        Path | None, typer.Option(help="Keep the report in one file, which Report.load reads.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--out", "-o", help="A page to write.")] = None,
    progress: ShowProgress = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Where, when and in which directions the answer is carried: claims beside their controls.

    Search by attribution, exact patches both ways with controls, subspace, causal scrubbing.

    [bold]Examples[/]

    [green]audio-lens tap --out tap.html[/]

    [green]audio-lens tap --items pairs.jsonl --checkpoint tap.part --save tap.zip --json[/]
    """
    with plain_errors(debug, verbose, checkpoint):
        shared.check_there(items)
        outputs = {"--save": save, "--out": html, "--checkpoint": checkpoint}
        shared.check_outputs(outputs, [items], model)
        method, table = methods.get("tap"), _read(items, skip_bad)
        shared.check_outputs(outputs, [items, *clip_files(table)], model)
        listener = shared.load(model, device, dtype)
        if items is None and not listener.takes_question:
            raise ValueError(f"{model} takes no questions, as the shipped clips have: name --items")
        ready = usable(table, listener, skip_bad)
        options: dict[str, Any] = {"k": k, "rank": rank, "checkpoint": checkpoint}
        options["windows"] = window if stride is None else (window, stride)
        found = method.function(listener, ready, seed=seed, progress=progress, **options)
        made_with = {"model": listener.cfg.model_name, "seed": seed}
        Study(method, items, ready, found).give(save, html, as_json, made_with)


def _read(path: Path | None, skip_bad: bool) -> Items:
    """The table, or the shipped clips with their questions alone."""
    from audio_lens.items import demo_items

    return demo_items(transcripts=False) if path is None else read_items(path, skip_bad)
