"""`audio-lens analyse`: run a method over the items of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

import typer
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from audio_lens.cli import complete, methods, shared
from audio_lens.cli.shared import (
    AsJson,
    Debug,
    Device,
    Dtype,
    ModelName,
    ShowProgress,
    Verbose,
    app,
    out,
    plain_errors,
)

if TYPE_CHECKING:
    from audio_lens.items import Items, Method
    from audio_lens.results import Result

LEAST = 2  # items: one alone has neither an interval nor another to be compared with
SHOWN, MOST_LETTERS = 40, 1000  # cells of a result that are printed, and letters of a line
COUNTS = ("n_kept", "n_dropped")
TOLD = ("values", "axes", "coords", "interval", "controls", *COUNTS, "dropped", "report")
DEMO = "the shipped clips"


@app.command()
def analyse(
    method: Annotated[
        str | None,
        typer.Argument(
            help="What to run; without one, all are listed.", autocompletion=complete.methods
        ),
    ] = None,
    items: Annotated[
        Path | None,
        typer.Option(
            "--items",
            "-i",
            help="A table (jsonl, csv, parquet) with the columns audio, text, answer, against ...; "
            "default: shipped clips whose transcripts contradict them.",
        ),
    ] = None,
    model: ModelName = "embedded",
    seed: Annotated[int, typer.Option(min=0, help="Of whatever is drawn at random.")] = 0,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad", help="Leave out rows that cannot be used, and tell of each on stderr."
        ),
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Keep the numbers, as netCDF; of a method of several results, NAME.RESULT.nc each."
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option("--out", "-o", help="A page to write.")] = None,
    progress: ShowProgress = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Run a method over many items: what it finds, with intervals and controls.

    Without a method it lists them. Without a table a method runs on shipped clips, each with a
    transcript that contradicts it.

    [bold]Examples[/]

    [green]audio-lens analyse[/]

    [green]audio-lens analyse grounding[/]

    [green]audio-lens analyse grounding --items conflict.jsonl --out grounding.html
    --save grounding.nc[/]

    [green]audio-lens analyse knockout --items questions.csv --model Qwen/Qwen2-Audio-7B-Instruct
    --device cuda --dtype bfloat16 --json[/]
    """
    with plain_errors(debug, verbose):
        if method is None:
            _check_alone({"--items": items, "--save": save, "--out": html})
            _list_methods(as_json)
            return
        shared.check_there(items)
        outputs = {"--save": save, "--out": html}
        shared.check_outputs(outputs, [items], model)
        chosen, table = methods.get(method), read_items(items, skip_bad)
        shared.check_outputs(outputs, [items, *clip_files(table)], model)
        listener = shared.load(model, device, dtype)
        if items is None and not listener.takes_question:
            raise ValueError(f"{model} takes no questions, as the shipped clips have: name --items")
        ready = usable(table, listener, skip_bad)
        found = chosen.function(listener, ready, seed=seed, progress=progress)
        made_with = {"model": listener.cfg.model_name, "seed": seed}
        Study(chosen, items, ready, found).give(save, html, as_json, made_with)


# -------------------------------------------------------------------------------- methods


def _check_alone(options: Mapping[str, Path | None]) -> None:
    given = [name for name, path in options.items() if path is not None]
    if given:
        raise ValueError(f"{given[0]} is of a method: name one (audio-lens analyse lists them)")


def _list_methods(as_json: bool) -> None:
    known = {name: one.summary for name, one in methods.listed().items()}
    if as_json:
        shared.print_json({"methods": known})
        return
    table = Table("method", "what it asks", box=None, header_style="dim")
    for name, summary in known.items():
        table.add_row(f"[bold]{escape(name)}[/]", escape(summary))
    out.print(table)


# -------------------------------------------------------------------------------- items


def read_items(path: Path | None, skip_bad: bool) -> Items:
    """The table, or the shipped items."""
    from audio_lens.items import Items, demo_items

    if path is None:
        return demo_items()
    items = Items.from_table(path, skip_bad=skip_bad)
    _check_enough(items)
    return items


def _check_enough(items: Items) -> None:
    if len(items) < LEAST:
        raise ValueError(
            f"a study needs {LEAST} items or more, for its interval and its controls, and this is "
            f"{len(items)}: {items[0].name}"
        )


def clip_files(items: Items) -> list[Path]:
    """The sound files that are read."""
    both = (audio for item in items for audio in (item.audio, item.other_audio))
    return [Path(audio) for audio in both if isinstance(audio, (str, Path))]


def usable(items: Items, model: Any, skip_bad: bool) -> Items:
    """The items that the model can take; if some have answers, all have."""
    found = items.usable(model, skip_bad=skip_bad)
    _check_enough(found)
    if model.cfg.output_kind == "tokens" and any(item.answer is not None for item in found):
        found.check_answers(model, against=all(item.against is not None for item in found))
    return found


# -------------------------------------------------------------------------------- results


@runtime_checkable
class Whole(Protocol):
    """Several results that say something together, and lie in one file."""

    def found(self) -> dict[str, Any]: ...

    def save(self, path: str | Path) -> Path: ...


@dataclass(frozen=True)
class Study:
    """What a method found over items.

    Attributes:
        table: where the items come from; None is the shipped ones.
        found: one result, or several by name.
    """

    method: Method
    table: Path | None
    items: Items
    found: Result | Mapping[str, Result]

    @property
    def results(self) -> dict[str, Result]:
        """By name; a single one is called as its method."""
        if isinstance(self.found, Mapping):
            return dict(self.found)
        return {self.method.name: self.found}

    @property
    def title(self) -> str:
        source = DEMO if self.table is None else self.table.name
        return f"{self.method.name}, {len(self.items)} items of {source}"

    def writers(self, save: Path | None, html: Path | None) -> dict[str, Callable[[], Path]]:
        """What writes the numbers of every result, and the page, by what it writes."""
        found: dict[str, Callable[[], Path]] = {}
        if isinstance(self.found, Whole):
            return self._writers_of_whole(self.found, save, html)
        if save is not None and not isinstance(self.found, Mapping):
            found["netcdf"] = partial(self.found.save, save)
        elif save is not None:
            ending = save.suffix or ".nc"
            for name, result in self.results.items():
                place = save.with_name(f"{save.stem}.{name}{ending}")
                found[f"netcdf of {name}"] = partial(self._save, result, place)
        if html is not None:
            from audio_lens.report import result_page

            told = {"title": self.title, "question": self.method.summary}
            found["html"] = partial(result_page, self.results, html, **told)
        return found

    def _writers_of_whole(
        self, whole: Any, save: Path | None, html: Path | None
    ) -> dict[str, Callable[[], Path]]:
        from audio_lens.report import tap_page

        told = {"title": self.title, "question": self.method.summary}
        writers = {} if save is None else {"report": partial(whole.save, save)}
        return (
            writers if html is None else {**writers, "html": partial(tap_page, whole, html, **told)}
        )

    def give(
        self, save: Path | None, html: Path | None, as_json: bool, made_with: Mapping[str, Any]
    ) -> None:
        """Write and print what was found."""
        written, failures = shared.write_each(self.writers(save, html))
        if as_json:
            shared.print_json({**self.as_data(), **made_with, "written": written})
        else:
            _print_study(self)
            for kind, path in written.items():
                out.print(f"{kind} written to [bold]{escape(path)}[/]", soft_wrap=True)
        shared.raise_first(failures)

    def _save(self, result: Result, place: Path) -> Path:
        """Save one of several, whose name was not known before."""
        shared.check_outputs({str(place): place}, [self.table, *clip_files(self.items)])
        return result.save(place)

    def as_data(self) -> dict[str, Any]:
        """What the command prints in JSON: of one result itself, of several by name."""
        about = {"method": self.method.name, "items": str(self.table or DEMO)}
        told = {name: data_of(result) for name, result in self.results.items()}
        if not isinstance(self.found, Mapping):
            together = told[self.method.name]
        else:
            together = {key: {name: one[key] for name, one in told.items()} for key in TOLD}
        for count in COUNTS:
            counts = {one[count] for one in told.values()}
            together |= {count: counts.pop()} if len(counts) == 1 else {}
        whole = self.found.found() if isinstance(self.found, Whole) else {}
        return about | together | whole | {"skipped": list(self.items.skipped)}


def data_of(result: Result) -> dict[str, Any]:
    missing = {"controls": {}, "n_kept": None, "n_dropped": 0, "dropped": {}}
    told = missing | result.to_dict() | {"report": result.report}
    return {key: told[key] for key in TOLD}


def _print_study(study: Study) -> None:
    title, question = escape(study.title), escape(study.method.summary)
    out.print(f"[bold]{title}[/]: {question}", soft_wrap=True)
    if isinstance(study.found, Whole):
        for line in str(study.found).splitlines():
            out.print(escape(line), soft_wrap=True)
        return
    for name, result in study.results.items():
        out.print()
        print_result(name, result)


def print_result(name: str, result: Result) -> None:
    from audio_lens.results.lines import control_lines, lines, metric_names

    columns = metric_names(result)
    table = Table(box=None, header_style="dim")
    for column in (name, *columns):
        table.add_column(escape(column), no_wrap=True)
    for line in lines(result, most=SHOWN):
        table.add_row(escape(line.place), *line.numbers)
    for line in control_lines(result):
        table.add_row(f"[dim]control {escape(line.place)}[/]", *line.numbers)
    _print_whole(table)
    n_cells = len(result.cells(columns[0] if "metric" in result.dims else None))
    if n_cells > SHOWN:
        out.print(f"[dim]the strongest {SHOWN} of {n_cells} cells; --json and --save have all[/]")
    for note in [*_counts(result), *result.report]:
        out.print(f"[dim]{escape(note)}[/]", soft_wrap=True)


def _print_whole(table: Table) -> None:
    """Print a table whose numbers are never cut, also where lines then wrap."""
    options = out.options.update(max_width=MOST_LETTERS)
    table.width = Measurement.get(out, options, table).maximum
    out.print(table, crop=False)


def _counts(result: Result) -> list[str]:
    """How many items a result is of, and why not of others."""
    kept = [] if result.n_kept is None else [f"of {result.n_kept} items"]
    return kept + [f"{count} left out: {why}" for why, count in result.dropped.items() if count]
