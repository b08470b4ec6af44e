"""`audio-lens transcribe`, `ask` and `classify`: what models say to clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from audio_lens.cli import complete, shared
from audio_lens.cli.shared import (
    AsJson,
    AudioFiles,
    Debug,
    Device,
    Dtype,
    Language,
    MaxNewTokens,
    ModelName,
    Verbose,
    app,
    out,
    plain_errors,
)


@app.command()
def transcribe(
    audio: AudioFiles,
    model: ModelName = "openai/whisper-tiny",
    language: Language = None,
    max_new_tokens: MaxNewTokens = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write down what is said, with Whisper or a CTC model.

    [bold]Examples[/]

    [green]audio-lens transcribe talk.wav --model openai/whisper-tiny --language en[/]

    [green]audio-lens transcribe talk.wav --model facebook/wav2vec2-base-960h[/]
    """
    with plain_errors(debug, verbose):
        shared.check_audio(*audio)
        listener = shared.load(model, device, dtype)
        if listener.takes_question:
            raise ValueError(f"{model} answers questions: audio-lens ask CLIP --question ...")
        if listener.pools:
            raise ValueError(f"{model} names classes: audio-lens classify CLIP")
        shared.check_writes_text(listener, model)
        shared.check_limit(listener, model, max_new_tokens)
        from audio_lens.patching.clip_pair import language_options

        options = language_options(listener, language)
        _print_texts(_texts_of(listener, audio, max_new_tokens, **options), as_json)


@app.command()
def ask(
    audio: AudioFiles,
    question: Annotated[str, typer.Option("--question", "-q", help="What to ask.")],
    model: ModelName = "embedded",
    max_new_tokens: MaxNewTokens = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Ask an audio language model about clips.

    [bold]Example[/]

    [green]audio-lens ask clip.wav --question "which digit is first?"[/]
    """
    with plain_errors(debug, verbose):
        shared.check_not_empty({"--question": question})
        shared.check_audio(*audio)
        listener = shared.load(model, device, dtype)
        if not listener.takes_question:
            shared.check_writes_text(listener, model)
            raise ValueError(
                f"{model} takes no question: audio-lens transcribe, or audio-lens classify"
            )
        _print_texts(_texts_of(listener, audio, max_new_tokens, text=question), as_json)


@app.command()
def classify(
    audio: AudioFiles,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="A hub id or directory.", autocompletion=complete.models
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 5,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Name the likeliest classes of clips, with their probabilities.

    [bold]Example[/]

    [green]audio-lens classify dog.wav --model MIT/ast-finetuned-audioset-10-10-0.4593[/]
    """
    with plain_errors(debug, verbose):
        shared.check_audio(*audio)
        listener = shared.load(model, device, dtype)
        if not listener.pools:
            raise ValueError(f"{model} has no classes: audio-lens transcribe, or audio-lens ask")
        found = {str(path): _classes(listener, path, top) for path in audio}
        if as_json:
            shared.print_json(found)
            return
        for path, classes in found.items():
            table = Table(escape(path), "probability", box=None, header_style="dim")
            for name, probability in classes.items():
                table.add_row(escape(name), f"{probability:.3f}")
            out.print(table)


def _classes(model: Any, path: Path, top: int) -> dict[str, float]:
    """The likeliest classes of a clip and their probabilities."""
    import torch

    with torch.inference_mode():
        probabilities = model(model.prepare(path))[0].float().softmax(-1)
    best = probabilities.topk(min(top, len(probabilities)))
    named = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return {model.cfg.labels[index]: value for index, value in named}


def _texts_of(
    model: Any, audio: Sequence[Path], max_new_tokens: int | None, **options: str | None
) -> dict[str, str]:
    """What the model says to each clip; all are prepared first, so that a bad one costs no work."""
    prepared = {path: model.prepare(path, **options) for path in audio}
    return {
        str(path): shared.said(model, inputs, path, max_new_tokens)
        for path, inputs in prepared.items()
    }


def _print_texts(texts: dict[str, str], as_json: bool) -> None:
    if as_json:
        shared.print_json(texts)
        return
    for path, text in texts.items():
        name = f"[dim]{escape(path)}:[/] " if len(texts) > 1 else ""
        out.print(f"{name}{escape(text)}", soft_wrap=True, highlight=False)
