"""`audio-lens study`: a method over many items, on one machine or many."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from audio_lens.cli import shared
from audio_lens.cli.shared import (
    FAILED,
    AsJson,
    Debug,
    ShowProgress,
    Verbose,
    app,
    out,
    plain_errors,
)

if TYPE_CHECKING:
    from audio_lens.studies import Status

study = typer.Typer(
    help="Run a method over many items, on one machine or many; stopped, it goes on.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(study, name="study")

StudyFileArgument = Annotated[
    Path, typer.Argument(help="A TOML file: items, model, out, method, its arguments, [engine].")
]
Engine = Annotated[
    str | None, typer.Option(help='"here", "ray" or "slurm"; default: as the file says.')
]
Workers = Annotated[int | None, typer.Option(min=1, help="Of Ray or Slurm.")]
Out = Annotated[str, typer.Argument(help="Where the study lies: a folder, or s3://bucket/folder.")]


@study.command("run")
def run(
    file: StudyFileArgument,
    engine: Engine = None,
    workers: Workers = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many items, for a trial.")
    ] = None,
    progress: ShowProgress = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Run what is not done of a study. The same command goes on after a stop.

    Exit code 1: some items have no numbers.

    [bold]Examples[/]

    [green]audio-lens study run study.toml --limit 16[/]

    [green]audio-lens study run study.toml --engine ray --workers 8[/]
    """
    with plain_errors(debug, verbose):
        from audio_lens.studies.files import StudyFile

        held = StudyFile.read(file)
        chosen = held.engine(engine, workers)
        made = held.study()
        status = made.run(chosen, limit=limit, progress=progress)
        _tell(made.out, status, as_json)


@study.command("plan")
def plan(
    file: StudyFileArgument,
    workers: Annotated[int, typer.Option(min=1, help="How many run at a time.")] = 1,
    tflops: Annotated[float, typer.Option(help="TFLOP a second that a worker reaches.")] = 100.0,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Tell what a study would cost: work, memory, hours, storage, busy workers. It is
    computed from the model's config, without its weights, and nothing is written.

    [bold]Examples[/]

    [green]audio-lens study plan study.toml --workers 64 --tflops 400[/]
    """
    with plain_errors(debug, verbose):
        from audio_lens.studies.files import StudyFile

        told = StudyFile.read(file).plan(workers, tflops)
        if as_json:
            shared.print_json(told.to_dict() | {"warnings": told.warnings})
        else:
            out.print(escape(str(told)), soft_wrap=True)


@study.command("status")
def status(
    place: Out, as_json: AsJson = False, verbose: Verbose = False, debug: Debug = False
) -> None:
    """Tell how far a study is: items done, failures by reason, busy workers, time left.

    [bold]Examples[/]

    [green]audio-lens study status results/conflicts[/]
    """
    with plain_errors(debug, verbose):
        from audio_lens.studies import Study

        made = Study.open(place)
        _tell(made.out, made.status(), as_json)


@study.command("retry")
def retry(
    place: Out, as_json: AsJson = False, verbose: Verbose = False, debug: Debug = False
) -> None:
    """Take back units with items that failed; [green]study run[/] then computes them again.

    [bold]Examples[/]

    [green]audio-lens study retry results/conflicts[/]
    """
    with plain_errors(debug, verbose):
        from audio_lens.studies import Study

        count = Study.open(place).retry()
        if as_json:
            shared.print_json({"out": place, "units_taken_back": count})
        else:
            out.print(
                f"{count} units taken back; [green]audio-lens study run[/] computes them again"
            )


@study.command("collect")
def collect(
    place: Out,
    netcdf: Annotated[
        Path | None, typer.Option(help="Write all numbers, by item and by name.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Keep what all items give together, as netCDF.")
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="A label whose values are drawn in place of items.")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Tell what a study found so far: what all items give together, with intervals.

    [bold]Examples[/]

    [green]audio-lens study collect results/conflicts --netcdf conflicts.nc --by group[/]
    """
    with plain_errors(debug, verbose):
        shared.check_outputs({"--netcdf": netcdf, "--save": save}, [])
        from audio_lens.cli.analyse import data_of, print_result
        from audio_lens.studies import load

        held = load(place)
        result = held.result(by=by)
        writers: dict[str, Any] = {}
        if netcdf is not None:
            writers["netcdf"] = lambda: held.save(netcdf)
        if save is not None:
            writers["result"] = lambda: result.save(save)
        written, failures = shared.write_each(writers)
        if as_json:
            shared.print_json({"out": place, **data_of(result), "written": written})
        else:
            print_result(held.store.spec.method, result)
            for kind, path in written.items():
                out.print(f"{kind} written to [bold]{escape(path)}[/]", soft_wrap=True)
        shared.raise_first(failures)


@app.command()
def harvest(
    file: Annotated[
        Path, typer.Argument(help="A TOML file: items, model, out, sites, where ..., [engine].")
    ],
    engine: Engine = None,
    workers: Workers = None,
    progress: ShowProgress = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Keep activations of many items as safetensors. The same command goes on after a stop.

    Exit code 1: some items have none.

    [bold]Examples[/]

    [green]audio-lens harvest harvest.toml --engine slurm --workers 64[/]
    """
    with plain_errors(debug, verbose):
        from audio_lens.studies.files import StudyFile

        held = StudyFile.read(file)
        chosen = held.engine(engine, workers)
        made = held.harvest()
        _tell(made.out, made.run(chosen, progress=progress), as_json)


def _tell(place: str, status: Status, as_json: bool) -> None:
    """Print how far a study is; exit code 1 where items have no numbers."""
    if as_json:
        shared.print_json({"out": place, "is_done": status.is_done, **status.to_dict()})
    else:
        out.print(escape(f"{place}: {status}"), soft_wrap=True)
    if status.n_failed:
        raise typer.Exit(FAILED)
