"""`audio-lens reproduce`: make a saved map again and compare."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from audio_lens.cli import complete, shared
from audio_lens.cli.shared import AsJson, Debug, ShowProgress, Verbose, app, out, plain_errors

if TYPE_CHECKING:
    from audio_lens.patching import Rerun, SweepResult


@app.command()
def reproduce(
    saved: Annotated[Path, typer.Argument(help="What audio-lens map --save wrote.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Where the model is now; default: where it was.",
            autocompletion=complete.models,
            show_default=False,
        ),
    ] = None,
    clean: Annotated[Path | None, typer.Option(help="Where the clean clip is now.")] = None,
    corrupted: Annotated[Path | None, typer.Option(help="Where the corrupted clip is now.")] = None,
    save: Annotated[Path | None, typer.Option(help="Keep the new numbers, as netCDF.")] = None,
    progress: ShowProgress = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Make a saved map again from what it recorded, and say whether the values agree.

    Model, clips, question, site, axes, windows and metric come from the file. Weights and clips are
    compared with what was recorded of them. Exits with 1 where the values do not agree.

    [bold]Examples[/]

    [green]audio-lens map --save map.nc[/]

    [green]audio-lens reproduce map.nc[/]

    [green]audio-lens reproduce map.nc --clean clips/seven.wav --corrupted clips/two.wav[/]
    """
    with plain_errors(debug, verbose):
        shared.check_there(saved, clean, corrupted)
        shared.check_outputs({"--save": save}, [saved, clean, corrupted], model)
        from audio_lens import patching
        from audio_lens.patching.rerun import how_loaded

        result = patching.load(saved)
        name, options = how_loaded(result, model)
        shared.check_outputs({"--save": save}, _recorded_clips(result), name)
        listener = shared.load(name, **options)
        rerun = patching.rerun(
            result, listener, clean=clean, corrupted=corrupted, progress=progress
        )
        writers = {} if save is None else {"netcdf": partial(rerun.result.save, save)}
        written, failures = shared.write_each(writers)
        if as_json:
            shared.print_json(rerun.to_dict() | {"written": written})
        else:
            _print_rerun(rerun, written)
        shared.raise_first(failures)
        if not rerun.agrees:
            raise typer.Exit(shared.FAILED)


def _recorded_clips(result: SweepResult) -> list[Path]:
    """Where the clips of a saved map lay."""
    clips = result.recipe.get("clips", {})
    return [Path(clips[name]["path"]) for name in ("clean", "corrupted") if name in clips]


def _print_rerun(rerun: Rerun, written: dict[str, str]) -> None:
    colour, word = ("green", "agree") if rerun.agrees else ("red", "do not agree")
    out.print(
        f"[bold {colour}]{rerun.n_cells} values {word}[/]: off by {rerun.difference:.1e} at most, "
        f"and rounding may take {rerun.tolerance:.1e}"
    )
    if rerun.changed:
        table = Table("changed since", "then", "now", box=None, header_style="dim")
        for name, (then, now) in rerun.changed.items():
            table.add_row(name, escape(then), escape(now))
        out.print(table)
    for kind, path in written.items():
        out.print(f"{kind} written to [bold]{escape(path)}[/]", soft_wrap=True)
