"""The `audio-lens` command: map, models, info, transcribe, ask, classify.

Heavy imports stay inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

BAD_INPUT = 2
ANSWER_TOKENS, TRANSCRIPT_TOKENS = 16, 200

app = typer.Typer(
    name="audio-lens",
    help="See which layer, head and moment of audio decide what a model answers.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out, err = Console(), Console(stderr=True)

ModelName = Annotated[
    str, typer.Option("--model", "-m", help='A hub id, a Hugging Face directory, or "embedded".')
]
AudioFiles = Annotated[list[Path], typer.Argument(help="Sound files (wav, flac, mp3 ...).")]
Language = Annotated[
    str | None, typer.Option(help='What Whisper hears, a code like "en"; default: found.')
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Entry point of the `audio-lens` command."""
    app()


@contextmanager
def plain_errors(debug: bool) -> Iterator[None]:
    """Errors as one red line: exit code 2 for input that cannot be used, 1 for anything else."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        err.print(f"[bold red]error:[/] [red]{escape(message)}[/]", soft_wrap=True)
        raise typer.Exit(BAD_INPUT if isinstance(error, (ValueError, OSError)) else 1) from None


class Direction(str, Enum):
    """Which run is patched: the corrupted one (denoise) or the clean one (noise)."""

    denoise = "denoise"
    noise = "noise"


@dataclass(frozen=True)
class Case:
    """Two clips, and the answer that tells them apart."""

    clean: Path
    corrupted: Path
    question: str | None
    answer: str
    against: str
    words: Sequence[Any] = ()
    corrupted_words: Sequence[Any] = ()


# -------------------------------------------------------------------------------- map


@app.command("map")
def map_command(
    model: ModelName = "embedded",
    clean: Annotated[
        Path | None,
        typer.Option(help="The clip the model answers rightly; default: a shipped one."),
    ] = None,
    corrupted: Annotated[
        Path | None, typer.Option(help="The clip that differs in what is asked.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What an audio LLM is asked.")] = None,
    answer: Annotated[
        str | None,
        typer.Option(
            help="Answer to the clean clip: one token (mind a leading space), the name of a class, "
            "or a transcript of a CTC model."
        ),
    ] = None,
    against: Annotated[str | None, typer.Option(help="Answer to the corrupted clip.")] = None,
    language: Language = None,
    site: Annotated[
        str,
        typer.Option(help="What to patch: part.activation, e.g. decoder.attn.z, connector.out."),
    ] = "resid_pre",
    axes: Annotated[
        str, typer.Option(help="One or two of layer, head, time, position, neuron.")
    ] = "layer,time",
    window: Annotated[
        float | None, typer.Option(help="Width of the time windows in seconds; default: 0.1.")
    ] = None,
    stride: Annotated[
        float | None, typer.Option(help="Seconds between windows; default: their width.")
    ] = None,
    direction: Annotated[
        Direction, typer.Option(help="Put clean activations into the corrupted run, or reversed.")
    ] = Direction.denoise,
    html: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path(
        "map.html"
    ),
    save: Annotated[Path | None, typer.Option(help="Also keep the numbers, as netCDF.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Patch every layer and moment between two clips and draw which of them decide the answer.

    Without options it maps the model and the clips that come with the package.

    [bold]Examples[/]

    [green]audio-lens map[/]

    [green]audio-lens map --clean seven.wav --corrupted two.wav --question "which digit is second?"
    --answer seven --against two --site connector.out --axes time --window 0.05[/]

    [green]audio-lens map --model openai/whisper-tiny.en --clean seven.wav --corrupted two.wav
    --answer " seven" --against " two" --site encoder.resid_pre[/]
    """
    with plain_errors(debug):
        case = _case(clean, corrupted, question, answer, against)
        wanted = _wanted_axes(axes)
        _check_audio(case.clean, case.corrupted)
        _check_outputs(html, save)
        listener = _load(model)
        from audio_lens import metrics, patching, report

        patching.Site.parse(site, listener)  # a mistyped one raises before any work
        options = _map_options(listener, question, language)
        if not listener.takes_question:
            case = replace(case, question=None)
        pair = _prepare_pair(listener, case, options)
        is_ctc = listener.cfg.head == "ctc"
        difference = metrics.ctc_diff if is_ctc else metrics.logit_diff
        metric = difference(case.answer, case.against)
        before = _listen(listener, pair, metric)
        if not as_json:
            _print_baselines(case, before)
        if before["alike"]:
            raise ValueError(
                "the metric is the same for both clips, so a map would be meaningless: choose "
                "clips that differ in what is asked, or other answers"
            )
        result = patching.sweep(
            listener,
            clean=pair[0],
            corrupted=pair[1],
            site=site,
            axes=wanted,
            windows=_windows(window, stride),
            metric=metric,
            direction=direction.value,
            progress=not as_json,
        )
        result.meta = _told(case, before) | result.meta
        written = {"html": str(html)}
        if save is not None:
            written["netcdf"] = str(result.save(save))
        report.map_page(
            result,
            pair[0].audio[0],
            html,
            words=case.words,
            corrupted_words=case.corrupted_words,
            corrupted_audio=pair[1].audio[0],
            title=f"What decides {case.answer.strip()!r} against {case.against.strip()!r}",
            sampling_rate=listener.cfg.sampling_rate,
        )
        if as_json:
            top = [cell.to_dict() for cell in result.top(10)]
            told = {"meta": result.meta, "report": result.report, "top": top}
            _print_json(before | told | {"written": written})
        else:
            _print_map(result, written)


def _case(
    clean: Path | None,
    corrupted: Path | None,
    question: str | None,
    answer: str | None,
    against: str | None,
) -> Case:
    """The user's clips with their answers, or the shipped pair with what is not overridden."""
    _check_not_empty({"--question": question, "--answer": answer, "--against": against})
    if clean is None and corrupted is None:
        from audio_lens.models.embedded import default_pair

        pair = default_pair()
        return Case(
            clean=pair.clean,
            corrupted=pair.corrupted,
            question=pair.question if question is None else question,
            answer=pair.answer if answer is None else answer,
            against=pair.against if against is None else against,
            words=pair.words,
            corrupted_words=pair.corrupted_words,
        )
    needed = {"--clean": clean, "--corrupted": corrupted, "--answer": answer, "--against": against}
    missing = [option for option, value in needed.items() if value is None]
    if missing:
        raise ValueError(f"your own clips also need {', '.join(missing)}")
    return Case(clean, corrupted, question, answer, against)


def _map_options(model: Any, question: str | None, language: str | None) -> dict[str, str | None]:
    """Options of `prepare`; raises for one that the model does not take."""
    name = model.cfg.model_name
    if model.takes_question and language is not None:
        raise ValueError(f"{name} answers questions and takes no --language")
    if not model.takes_question and question is not None:
        raise ValueError(f"{name} takes no --question")
    return _language_options(model, language)


def _language_options(model: Any, language: str | None) -> dict[str, str | None]:
    """The language as an option of `prepare`, for models that take one."""
    if "language" in inspect.signature(model.prepare).parameters:
        return {"language": language}
    if language is not None:
        raise ValueError(f"{model.cfg.model_name} takes no --language")
    return {}


def _prepare_pair(model: Any, case: Case, options: dict[str, str | None]) -> list[Any]:
    """Inputs of both clips with the same text; the shorter clip is lengthened to fit the other."""
    import numpy as np

    from audio_lens import audio

    rate = model.cfg.sampling_rate
    clips = [audio.read(path, rate) for path in (case.clean, case.corrupted)]
    longest = max(map(len, clips))
    if min(map(len, clips)) < longest:
        err.print(f"the shorter clip is lengthened with silence to {longest / rate:.2f} s")
    clean, corrupted = (np.pad(clip, (0, longest - len(clip))) for clip in clips)
    inputs = model.prepare(clean, text=case.question, sampling_rate=rate, **options)
    return [inputs, inputs.with_audio(corrupted, sampling_rate=rate)]


def _listen(model: Any, pair: Sequence[Any], metric: Any) -> dict[str, Any]:
    """What the model answers to both clips, and the metric of both."""
    import torch

    from audio_lens import metrics
    from audio_lens.patching.result import alike

    with torch.inference_mode():
        values = [metrics.bound(metric, model, inputs)(model(inputs)).mean() for inputs in pair]
    answers = [_said(model, inputs, ANSWER_TOKENS) for inputs in pair]
    return {
        "model": model.cfg.model_name,
        "answers": dict(zip(("clean", "corrupted"), answers, strict=True)),
        "metric": dict(zip(("clean", "corrupted"), (v.item() for v in values), strict=True)),
        "alike": bool(alike(*values)),
    }


def _wanted_axes(axes: str) -> list[str]:
    from audio_lens.patching.result import AXES

    wanted = [axis.strip() for axis in axes.split(",")]
    if len(wanted) > 2:
        raise ValueError(f"a map has one or two axes, got {', '.join(wanted)}")
    unknown = [axis for axis in wanted if axis not in AXES]
    if unknown:
        raise ValueError(f"unknown axis {unknown[0]!r}: choose of {', '.join(AXES)}")
    return wanted


def _check_not_empty(options: dict[str, str | None]) -> None:
    for option, text in options.items():
        if text == "":
            raise ValueError(f"{option} is empty: write something or leave it out")


def _check_audio(*paths: Path) -> None:
    """Raise before the work if a clip is missing or no sound file."""
    from audio_lens import audio

    for path in paths:
        audio.check(path)


def _check_outputs(*paths: Path | None) -> None:
    """Raise before the work if what it gives could not be written."""
    for path in filter(None, paths):
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name the file to write")
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent} to write {path.name} to")


def _windows(window: float | None, stride: float | None) -> float | tuple[float, float] | None:
    """Width, or width and stride, of the windows; None leaves the choice to the sweep."""
    from audio_lens.patching.plan import DEFAULT_WINDOW_S

    if stride is None:
        return window
    return (DEFAULT_WINDOW_S if window is None else window, stride)


def _told(case: Case, before: dict[str, Any]) -> dict[str, str]:
    """What the result should remember of the question."""
    told = {
        "question": case.question,
        "clean": f"{case.clean.name}: {before['answers']['clean']}",
        "corrupted": f"{case.corrupted.name}: {before['answers']['corrupted']}",
    }
    return {name: text for name, text in told.items() if text is not None}


def _print_baselines(case: Case, before: dict[str, Any]) -> None:
    if case.question:
        out.print(f"question: [bold]{escape(case.question)}[/]")
    table = Table("clip", "file", "the model answers", "metric", box=None, header_style="dim")
    for name, path in (("clean", case.clean), ("corrupted", case.corrupted)):
        said, value = before["answers"][name], before["metric"][name]
        table.add_row(name, escape(path.name), f"[bold]{escape(said)}[/]", f"{value:+.3f}")
    out.print(table)
    out.print(
        f"[dim]metric: logit of {escape(case.answer)!r} minus logit of {escape(case.against)!r}[/]"
    )
    if before["answers"]["clean"] == before["answers"]["corrupted"]:
        _warn("the model answers both clips the same: a map can hardly explain that")
    elif before["metric"]["clean"] < before["metric"]["corrupted"]:
        _warn("the metric is larger for the corrupted clip: are --answer and --against swapped?")


def _warn(message: str) -> None:
    out.print(f"[yellow]{escape(message)}[/]")


def _print_map(result: Any, written: dict[str, str]) -> None:
    table = Table("strongest cells", "effect", "recovery", "metric", box=None, header_style="dim")
    for cell in result.top(10):
        numbers = f"{cell.effect:+.3f}", f"{cell.recovery:+.3f}", f"{cell.value:+.3f}"
        table.add_row(escape(cell.place), *numbers)
    out.print()
    out.print(table)
    for note in result.report:
        out.print(f"[dim]{escape(note)}[/]")
    for kind, path in written.items():
        out.print(f"{kind} written to [bold]{escape(path)}[/]", soft_wrap=True)


# -------------------------------------------------------------------------------- models, info


@app.command()
def models(as_json: AsJson = False, debug: Debug = False) -> None:
    """The families of models, their hooks and times, and how closely they match Hugging Face.

    [bold]Example[/]

    [green]audio-lens models[/]
    """
    with plain_errors(debug):
        from audio_lens.models.catalogue import Catalogue

        catalogue = Catalogue.load()
        if as_json:
            _print_json(asdict(catalogue))
            return
        rows = catalogue.rows()
        table = Table(*rows[0], box=None, header_style="bold")
        for row in rows:
            table.add_row(*row.values())
        out.print(table)
        versions = ", ".join(f"{name} {version}" for name, version in catalogue.versions.items())
        out.print(
            "[dim]float32, float64: largest difference from Hugging Face in any output, residual "
            f"stream or pattern, relative to the largest value ({escape(versions)})[/]"
        )


@app.command()
def info(
    model: Annotated[str, typer.Argument(help='Hub id, directory, or "embedded".')] = "embedded",
    hooks: Annotated[bool, typer.Option("--hooks", help="List every hook with its shape.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Parts, sizes, hook names and the seconds per position of a model.

    [bold]Examples[/]

    [green]audio-lens info[/]

    [green]audio-lens info openai/whisper-tiny --hooks[/]
    """
    with plain_errors(debug):
        listener = _load(model)
        from audio_lens.report.facts import describe

        facts = describe(listener)
        if as_json:
            _print_json(facts)
        else:
            _print_info(facts, hooks)


def _print_info(facts: dict[str, Any], hooks: bool) -> None:
    out.print(f"[bold]{escape(facts['model'])}[/]: {facts['family']}")
    out.print(
        f"{facts['parameters']:,} parameters, {facts['sampling_rate']} Hz, "
        f"clips up to {facts['longest_clip_s']:g} s"
    )
    parts = facts["parts"]
    table = Table("", *parts, box=None, header_style="bold")
    for what in dict.fromkeys(what for sizes in parts.values() for what in sizes):
        row = (str(sizes.get(what, "")) for sizes in parts.values())
        table.add_row(what.replace("_", " "), *row)
    out.print(table)
    out.print(f"{len(facts['hooks'])} hook points, shapes for {facts['shapes_for']}:")
    shown = facts["hooks"] if hooks else _one_block_each(facts["hooks"])
    for name, shape in shown.items():
        out.print(f"  {name} [dim]{shape}[/]", highlight=False, soft_wrap=True)
    if not hooks:
        out.print("[dim]block 0 stands for all; --hooks lists every one[/]")


def _one_block_each(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """The hooks outside the blocks, and those of each part's first block."""
    return {n: shape for n, shape in shapes.items() if ".blocks." not in n or ".blocks.0." in n}


# -------------------------------------------------------------------------------- transcribe, ask


@app.command()
def transcribe(
    audio: AudioFiles,
    model: ModelName = "openai/whisper-tiny",
    language: Language = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write down what is said, with Whisper or a CTC model.

    [bold]Examples[/]

    [green]audio-lens transcribe talk.wav --model openai/whisper-tiny --language en[/]

    [green]audio-lens transcribe talk.wav --model facebook/wav2vec2-base-960h[/]
    """
    with plain_errors(debug):
        _check_audio(*audio)
        listener = _load(model)
        if listener.takes_question:
            raise ValueError(f"{model} answers questions: audio-lens ask CLIP --question ...")
        if listener.pools:
            raise ValueError(f"{model} names classes: audio-lens classify CLIP")
        options = _language_options(listener, language)
        _print_texts(_texts_of(listener, audio, TRANSCRIPT_TOKENS, **options), as_json)


@app.command()
def classify(
    audio: AudioFiles,
    model: Annotated[str, typer.Option("--model", "-m", help="A hub id or directory.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 5,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Name the likeliest classes of clips, with their probabilities.

    [bold]Example[/]

    [green]audio-lens classify dog.wav --model MIT/ast-finetuned-audioset-10-10-0.4593[/]
    """
    with plain_errors(debug):
        _check_audio(*audio)
        listener = _load(model)
        if not listener.pools:
            raise ValueError(f"{model} has no classes: audio-lens transcribe, or audio-lens ask")
        found = {str(path): _classes(listener, path, top) for path in audio}
        if as_json:
            _print_json(found)
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


@app.command()
def ask(
    audio: AudioFiles,
    question: Annotated[str, typer.Option("--question", "-q", help="What to ask.")],
    model: ModelName = "embedded",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Ask an audio language model about clips.

    [bold]Example[/]

    [green]audio-lens ask clip.wav --question "which digit is first?"[/]
    """
    with plain_errors(debug):
        _check_not_empty({"--question": question})
        _check_audio(*audio)
        listener = _load(model)
        if not listener.takes_question:
            raise ValueError(
                f"{model} takes no question: audio-lens transcribe, or audio-lens classify"
            )
        _print_texts(_texts_of(listener, audio, ANSWER_TOKENS, text=question), as_json)


# -------------------------------------------------------------------------------- shared


def _load(name: str) -> Any:
    import transformers

    from audio_lens import HookedAudioTransformer

    transformers.utils.logging.disable_progress_bar()
    with err.status(f"loading {escape(name)}"):
        return HookedAudioTransformer.from_pretrained(name)


def _texts_of(
    model: Any, audio: Sequence[Path], max_new_tokens: int, **options: str | None
) -> dict[str, str]:
    """What the model says to each clip; all are prepared first, so that a bad one costs no work."""
    prepared = {str(path): model.prepare(path, **options) for path in audio}
    return {path: _said(model, inputs, max_new_tokens) for path, inputs in prepared.items()}


def _said(model: Any, inputs: Any, max_new_tokens: int) -> str:
    """What the model says to one prompt; models without a decoder say all they can."""
    options = {"max_new_tokens": max_new_tokens} if "decoder" in model.cfg.parts else {}
    return model.generate(inputs, **options)[0]


def _print_texts(texts: dict[str, str], as_json: bool) -> None:
    if as_json:
        _print_json(texts)
        return
    for path, text in texts.items():
        name = f"[dim]{escape(path)}:[/] " if len(texts) > 1 else ""
        out.print(f"{name}{escape(text)}", soft_wrap=True, highlight=False)


def _print_json(data: dict[str, Any]) -> None:
    out.print(json.dumps(data, indent=2), markup=False, highlight=False, soft_wrap=True)
