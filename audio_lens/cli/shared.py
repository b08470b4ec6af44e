"""What all commands share: the app, common options, errors and exit codes, loading, JSON."""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from rich.markup import escape

from audio_lens.cli import complete
from audio_lens.cli.terminal import Terminal
from audio_lens.errors import KindError, RangeError

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
CHECKPOINT_SUFFIXES = (".json", ".safetensors", ".model", ".txt")

app = typer.Typer(
    name="audio-lens",
    epilog="Exit codes: 0 done, 2 input that cannot be used, 1 anything else, 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out, err = Terminal(), Terminal(stderr=True)
log = logging.getLogger(__name__)


class Precision(StrEnum):
    """Floating-point dtypes, as torch calls them."""

    float64 = "float64"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help='A hub id, a Hugging Face directory, or "embedded".',
        autocompletion=complete.models,
    ),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        help='A hub id, a Hugging Face directory, or "embedded".', autocompletion=complete.models
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help='Where the model runs, like "cuda" or "cuda:1"; default: the CPU.'),
]
Dtype = Annotated[
    Precision | None,
    typer.Option(help="Of the weights and all that is computed; default: the checkpoint's."),
]
AudioFiles = Annotated[list[Path], typer.Argument(help="Sound files (wav, flac, mp3 ...).")]
Language = Annotated[
    str | None,
    typer.Option(
        help='What Whisper hears, like "en" or "french"; default: as its checkpoint says, or found.'
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="How many tokens the model may write; default: as its checkpoint says."
    ),
]
ShowProgress = Annotated[
    bool | None,
    typer.Option(
        "--progress/--no-progress",
        help="Show progress and the time left; default: in terminals.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Tell what is done on the way.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _print_version(is_asked: bool) -> bool:
    """End the command with the version, if that is asked."""
    if is_asked:
        from importlib.metadata import version

        typer.echo(f"audio-lens {version('audio_lens')}")
        raise typer.Exit
    return is_asked


@app.callback()
def main(
    is_asked: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """See which layer, head and moment of audio decide what a model answers."""


@contextmanager
def plain_errors(
    debug: bool, verbose: bool = False, checkpoint: Path | None = None
) -> Iterator[None]:
    """Errors as one red line, and the exit codes of the help.

    Args:
        debug: let errors through, with their traceback.
        verbose: show what the package logs, not only its warnings.
        checkpoint: the file from which an interrupted command goes on.
    """
    try:
        with _logging(logging.INFO if verbose else logging.WARNING):
            yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        err.print(f"[yellow]interrupted[/]: {escape(_how_to_go_on(checkpoint))}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        err.print(f"[bold red]error:[/] [red]{escape(message)}[/]", soft_wrap=True)
        is_bad_input = isinstance(error, (ValueError, OSError, KindError, RangeError))
        raise typer.Exit(BAD_INPUT if is_bad_input else FAILED) from None


def _how_to_go_on(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "nothing was kept (map with --checkpoint FILE keeps what is done)"
    if not checkpoint.is_file():
        return f"before there was anything to keep in {checkpoint}; the same command starts again"
    return f"what is done is kept in {checkpoint}; the same command goes on from there"


@contextmanager
def _logging(level: int) -> Iterator[None]:
    """What the package logs, and warnings, go to stderr."""
    package = logging.getLogger("audio_lens")
    handler = RichHandler(console=err, show_time=False, show_path=False)
    before = package.level
    package.addHandler(handler)
    package.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            yield
    finally:
        package.removeHandler(handler)
        package.setLevel(before)


def _print_warning(message: Warning | str, *_: Any, name: str = "") -> None:
    """A warning as one line of stderr, of the clip of this name."""
    of_clip = f"{name}: " if name else ""
    err.print(f"[yellow]warning:[/] {escape(of_clip + str(message))}", soft_wrap=True)


def load(name: str, device: Any = None, dtype: Precision | Any = None) -> Any:
    """The model; with --verbose, in a terminal, how its weights are read."""
    import torch
    import transformers

    from audio_lens import HookedAudioTransformer
    from audio_lens.models.loading.checkpoints import EMBEDDED

    precision = getattr(torch, dtype.value) if isinstance(dtype, Precision) else dtype
    is_told = logging.getLogger("audio_lens").isEnabledFor(logging.INFO)
    started, is_quiet = time.monotonic(), name == EMBEDDED or not (err.is_terminal and is_told)
    if is_quiet:
        transformers.utils.logging.disable_progress_bar()
    else:
        transformers.utils.logging.enable_progress_bar()
    waiting = err.status(f"loading {escape(name)}") if is_quiet else nullcontext()
    try:
        with waiting:
            model = HookedAudioTransformer.from_pretrained(name, precision, device)
    except OSError as error:
        raise OSError(
            f"{name} is no folder here, and the hub does not give it: check the name, or the way "
            f"to the hub ({str(error).split('. ')[0]})"
        ) from error
    log.info("loaded %s in %.1f s", name, time.monotonic() - started)
    return model


def said(model: Any, inputs: Any, clip: Path, max_new_tokens: int | None = None) -> str:
    """What the model says to one prompt, and on stderr whether a limit cut it.

    Args:
        clip: what the prompt is about, to be named there.
        max_new_tokens: the limit; None leaves it to the model.
    """
    options = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        text = model.generate(inputs, **options)[0]
    for warning in told:
        _print_warning(warning.message, name=str(clip))
    return text


def check_limit(model: Any, name: str, max_new_tokens: int | None) -> None:
    """Raise for a limit of what a model does not write token by token."""
    if max_new_tokens is not None and model.cfg.decoder is None:
        raise ValueError(f"{name} writes all at once: leave out --max-new-tokens")


def check_writes_text(model: Any, name: str) -> None:
    """Raise for a model whose streams this command has no words for."""
    if model.cfg.streams:
        raise ValueError(
            f"{name} writes {', '.join(dict(model.cfg.streams))} side by side: in Python, "
            "model.generate has its answer, and patching.sweep takes metrics.of_stream"
        )


def check_not_empty(options: dict[str, str | None]) -> None:
    """Raise for an option whose text is empty."""
    for option, text in options.items():
        if text == "":
            raise ValueError(f"{option} is empty: write something or leave it out")


def check_there(*paths: Path | None) -> None:
    """Raise at once, before anything is imported, if a file is missing."""
    for path in filter(None, paths):
        if not path.exists():
            raise ValueError(f"there is no file {path}: check its name and folder")


def check_audio(*paths: Path) -> None:
    """Raise before the work if a clip is missing or no sound file."""
    check_there(*paths)
    from audio_lens import audio

    for path in paths:
        audio.check(path)


def check_outputs(
    outputs: Mapping[str, Path | None], inputs: Iterable[Path | None], model: str | None = None
) -> None:
    """Raise before the work if what it gives could not be written, or over what it reads.

    Folders that do not exist are made.

    Args:
        outputs: files to write by the option that names them.
        inputs: files that the command reads.
        model: its name; the checkpoint in a folder of that name is an input too.
    """
    from audio_lens import files

    named = {option: path for option, path in outputs.items() if path is not None}
    folder = Path(model) if model else None
    there = folder.iterdir() if folder is not None and folder.is_dir() else ()
    checkpoint = [path for path in there if path.suffix in CHECKPOINT_SUFFIXES]
    files.check_apart(named, [*filter(None, inputs), *checkpoint])
    for path in named.values():
        with suppress(OSError):  # which is told of below, as every file that cannot be written
            path.parent.mkdir(parents=True, exist_ok=True)
        files.try_out(path)


def write_each(
    writers: Mapping[str, Callable[[], Path]],
) -> tuple[dict[str, str], list[Exception]]:
    """Write every output, also where another fails.

    Returns:
        The paths that were written, by kind, and what went wrong with the others.
    """
    written, failures = {}, []
    for kind, write in writers.items():
        try:
            written[kind] = str(write())
        except (OSError, ValueError) as error:
            failures.append(error)
    return written, failures


def raise_first(failures: Sequence[Exception]) -> None:
    """Raise the first of several errors; the others are told before it."""
    for error in failures[1:]:
        log.error("%s", error)
    if failures:
        raise failures[0]


def print_json(data: Any) -> None:
    """The data as it is, for programs; null for what is infinite or no number."""
    typer.echo(json.dumps(_finite(data), indent=2, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def warn(message: str) -> None:
    """A line that people should not overlook."""
    out.print(f"[yellow]{escape(message)}[/]")
