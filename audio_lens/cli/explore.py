"""`audio-lens explore`: touch a model and hear it answer, on a page of this machine."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from audio_lens.cli import complete, shared
from audio_lens.cli.shared import Debug, Device, Dtype, Language, Verbose, app, out, plain_errors

OF_EDITS = "given with --edits, whose file holds it"


@app.command()
def explore(
    audio: Annotated[
        Path | None, typer.Argument(help="A sound file; default: a shipped one.")
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(
            "--question", "-q", help="What an audio LLM is asked; of Whisper, what it wrote so far."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help='A hub id, a Hugging Face directory, or "embedded" (default).',
            autocompletion=complete.models,
        ),
    ] = None,
    other: Annotated[
        Path | None, typer.Option(help="Another clip, to take stretches from.")
    ] = None,
    edits: Annotated[
        Path | None, typer.Option(help="A file that the page's button Save wrote.")
    ] = None,
    language: Language = None,
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Where to serve; default: a free port.")
    ] = 0,
    opens: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in a browser.")
    ] = True,
    device: Device = None,
    dtype: Dtype = None,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Touch a model and hear it answer: a page on this machine, until Ctrl-C.

    Silence a stretch of the clip or take it from another one, in the sound or in any layer; turn
    heads off, scale them, make them deaf; see the answer's probabilities move, and copy the Python
    code that does the same. Without options it takes the model and clips that come with the
    package.

    [bold]Examples[/]

    [green]audio-lens explore[/]

    [green]audio-lens explore clip.wav --question "which digit is first?" --other clip2.wav[/]

    [green]audio-lens explore talk.wav --model openai/whisper-tiny --language en[/]

    [green]audio-lens explore --edits edits.json --no-open[/]
    """
    with plain_errors(debug, verbose):
        given = {"a clip": audio, "--question": question, "--other": other, "--language": language}
        beside = [name for name, value in given.items() if value is not None]
        if edits is not None and beside:
            raise ValueError(f"{beside[0]} is {OF_EDITS}: leave one of them out")
        shared.check_not_empty({"--question": question})
        shared.check_there(edits)
        shared.check_audio(*[path for path in (audio, other) if path is not None])
        from audio_lens.explorer import server
        from audio_lens.explorer.shared import read
        from audio_lens.explorer.widget import started

        server.check_installed()
        name = model or ("embedded" if edits is None else read(edits)["model"])
        listener = shared.load(name, device, dtype)
        session = started(listener, audio, question, other=other, language=language, edits=edits)
        server.serve(session, port, lambda address: _tell(address, opens))


def _tell(address: str, opens: bool) -> None:
    """Say where the page is, and open it."""
    out.print(f"explorer at [bold]{escape(address)}[/]", soft_wrap=True)
    out.print("[dim]for this machine only; Ctrl-C stops[/]")
    if opens:
        webbrowser.open(address)
