"""`audio-lens attention` and `audio-lens lens`: what heads listen to, and what layers hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from audio_lens.cli import shared
from audio_lens.cli.shared import (
    AsJson,
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

if TYPE_CHECKING:
    from audio_lens.analysis.attention import ClipAttention
    from audio_lens.analysis.prompts import Prompt

SHARPEST = 8  # heads that are printed
SITES = ("decoder.cross_attn", "decoder.attn", "encoder.attn")

Clips = Annotated[
    list[Path] | None,
    typer.Argument(help="Sound files (wav, flac, mp3 ...); default: a shipped one."),
]
Question = Annotated[
    str | None, typer.Option("--question", "-q", help="What an audio LLM is asked.")
]
Text = Annotated[
    str | None, typer.Option(help="What Whisper has written so far; default: it writes itself.")
]
Layers = Annotated[
    list[int] | None,
    typer.Option("--layer", "-l", help="A layer to show, may be repeated; default: all."),
]
TextGrid = Annotated[
    Path | None, typer.Option(help="A Praat TextGrid that says what is said when (one clip).")
]
Page = Annotated[
    Path | None, typer.Option("--out", "-o", help="The page to write; of several clips, a folder.")
]


@dataclass(frozen=True)
class Asked:
    """Clips, and what a model is to make of them.

    Attributes:
        default_question: for models that take one, where the user asks none.
    """

    clips: Sequence[Path]
    question: str | None
    text: str | None
    language: str | None
    tiers: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    default_question: str | None = None

    @staticmethod
    def of(
        clips: Sequence[Path] | None,
        question: str | None,
        text: str | None,
        language: str | None,
        textgrid: Path | None,
    ) -> Asked:
        """The user's clips, or a shipped one with its question and words; checked."""
        shared.check_not_empty({"--question": question, "--text": text})
        if not clips:
            from audio_lens.models.embedded import default_pair

            if textgrid is not None:
                raise ValueError("--textgrid is of your own clip: name that too")
            pair = default_pair()
            words = {"words": pair.words}
            return Asked([pair.clean], question, text, language, words, pair.question)
        shared.check_audio(*clips)
        if textgrid is None:
            return Asked(clips, question, text, language)
        if len(clips) > 1:
            raise ValueError("--textgrid belongs to one clip: name one")
        from audio_lens.alignment import read_textgrid

        return Asked(clips, question, text, language, read_textgrid(textgrid))

    def prompts(self, model: Any) -> list[Prompt]:
        """The clips as the model takes them; a bad one raises before any work."""
        from audio_lens.analysis.prompts import Prompt

        options = self._options(model)
        prepared = [model.prepare(path, **options) for path in self.clips]
        return [Prompt.of(model, inputs) for inputs in prepared]

    def _options(self, model: Any) -> dict[str, str | None]:
        from audio_lens.patching.clip_pair import language_options

        name = model.cfg.model_name
        if model.takes_question:
            if self.text is not None:
                raise ValueError(f"{name} answers questions: use --question in place of --text")
            question = self.question or self.default_question
            if question is None:
                raise ValueError(f"{name} answers questions: ask it one with --question")
            return {"text": question} | language_options(model, self.language)
        if self.question is not None:
            raise ValueError(f"{name} takes no question: leave out --question")
        if self.text is not None and "decoder" not in model.cfg.parts:
            raise ValueError(f"{name} writes no text that --text could begin: leave it out")
        return {"text": self.text} | language_options(model, self.language)


# -------------------------------------------------------------------------------- attention


@app.command()
def attention(
    audio: Clips = None,
    question: Question = None,
    text: Text = None,
    model: ModelName = "embedded",
    site: Annotated[
        list[str] | None,
        typer.Option(
            help=f"One of {', '.join(SITES)}, may be repeated; default: all.",
            autocompletion=lambda: list(SITES),
        ),
    ] = None,
    layer: Layers = None,
    head: Annotated[
        list[int] | None, typer.Option(help="A head to show, may be repeated; default: all.")
    ] = None,
    language: Language = None,
    max_new_tokens: MaxNewTokens = None,
    textgrid: TextGrid = None,
    html: Page = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Show which seconds of a clip the attention heads of a model listen to.

    The page holds every head; clicking a token plays what it listened to. What the model writes is
    shown too. Without options it takes the model and a clip that come with the package.

    [bold]Examples[/]

    [green]audio-lens attention[/]

    [green]audio-lens attention clip.wav --question "which digit is first?" --layer 3[/]

    [green]audio-lens attention talk.wav --model openai/whisper-tiny --site decoder.cross_attn
    --out talk.html[/]

    [green]audio-lens attention *.wav --model facebook/wav2vec2-base-960h --out pages --json[/]
    """
    with plain_errors(debug, verbose):
        _check_attends(site or ())
        asked = Asked.of(audio, question, text, language, textgrid)
        pages = _pages(asked.clips, html, "attention", textgrid, model)
        listener = shared.load(model, device, dtype)
        from audio_lens.analysis.attention import check_heads, read_attention, sites_of
        from audio_lens.report.attention_page import prompt_shown, write_attention

        if max_new_tokens is not None and text is not None:
            raise ValueError("--text is all that is written: leave out --max-new-tokens")
        answer = 0 if text is not None else max_new_tokens
        prompts, told = asked.prompts(listener), {}
        for prompt in prompts:
            if not prompt.n_ahead:  # else steps of the clip enter while the model writes
                check_heads(listener, sites_of(prompt, site or None), layer or None, head or None)
        for path, prompt, page in zip(asked.clips, prompts, pages, strict=True):
            shown = prompt_shown(prompt, None, answer)
            found = read_attention(
                shown, sites_of(shown, site or None), layer or None, head or None
            )
            title = f"Where the heads listen in {path.name}"
            write_attention(shown, found, page, title, asked.tiers, keeps_layers=bool(layer))
            told[str(page)] = shown.facts() | {"sites": {one.site: _heads(one) for one in found}}
            if not as_json:
                _print_heads(found, page)
        if as_json:
            shared.print_json(told)


def _check_attends(sites: Sequence[str]) -> None:
    """Raise for what is attention in no model."""
    for site in sites:
        if site.rpartition(".")[2] not in ("attn", "cross_attn"):
            raise ValueError(f"{site!r} has no heads: --site is one of {', '.join(SITES)}")


def _heads(found: ClipAttention) -> dict[str, Any]:
    return {
        "queries": [query.label for query in found.queries],
        "heads": [asdict(summary) for summary in found.summary()],
    }


def _print_heads(found: Sequence[ClipAttention], page: Path) -> None:
    for one in found:
        table = Table(
            f"sharpest heads of {one.site}", one.share_head, "entropy (bits)", "peak",
            box=None, header_style="dim",
        )  # fmt: skip
        for head in sorted(one.summary(), key=lambda head: head.entropy)[:SHARPEST]:
            numbers = f"{head.on_audio:.1%}", f"{head.entropy:.2f}", f"{head.peak_s:.2f} s"
            table.add_row(f"layer {head.layer}, head {head.head}", *numbers)
        out.print(table)
        out.print()
    _print_written(page)


# -------------------------------------------------------------------------------- lens


@app.command()
def lens(
    audio: Clips = None,
    question: Question = None,
    text: Text = None,
    model: ModelName = "embedded",
    part: Annotated[
        list[str] | None,
        typer.Option(help="encoder or decoder, may be repeated; default: all there are."),
    ] = None,
    layer: Layers = None,
    token: Annotated[
        list[str] | None,
        typer.Option(help="A word that is one token, to follow its probability; may be repeated."),
    ] = None,
    norms: Annotated[bool, typer.Option("--norms", help="Norms only, no logit lens.")] = False,
    language: Language = None,
    textgrid: TextGrid = None,
    html: Page = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Show what each layer holds at each moment: norms, and what it would write (logit lens).

    Without options it takes the model and a clip that come with the package.

    [bold]Examples[/]

    [green]audio-lens lens[/]

    [green]audio-lens lens clip.wav --question "which digit is first?" --token " seven"[/]

    [green]audio-lens lens talk.wav --model facebook/wav2vec2-base-960h --out talk.html[/]

    [green]audio-lens lens talk.wav --model openai/whisper-tiny --part encoder --norms --json[/]
    """
    with plain_errors(debug, verbose):
        asked = Asked.of(audio, question, text, language, textgrid)
        pages = _pages(asked.clips, html, "lens", textgrid, model)
        listener = shared.load(model, device, dtype)
        from audio_lens.report.cache_page import layer_lines, streams_shown, write_streams

        prompts, told = asked.prompts(listener), {}
        for path, given, page in zip(asked.clips, prompts, pages, strict=True):
            prompt = given.shown()
            found = streams_shown(
                prompt, None, part or None, False if norms else None, token or (), layer or None
            )
            title = f"What the layers hold of {path.name}"
            write_streams(prompt, found, page, title, asked.tiers)
            lines = {streams.part: layer_lines(prompt, streams) for streams in found}
            told[str(page)] = prompt.facts() | {"parts": lines}
            if not as_json:
                _print_layers(lines, page)
        if as_json:
            shared.print_json(told)


def _print_layers(parts: dict[str, list[dict[str, Any]]], page: Path) -> None:
    for part, lines in parts.items():
        table = Table(f"layer of the {part}", "mean norm", box=None, header_style="dim")
        if "text" in lines[0]:
            table.add_column("would write")
        for line in lines:
            cells = (
                line["layer"],
                f"{line['norm']:.3g}",
                *([line["text"]] if "text" in line else []),
            )
            table.add_row(*map(escape, cells))
        out.print(table)
        out.print()
    _print_written(page)


# -------------------------------------------------------------------------------- both


def _pages(
    clips: Sequence[Path], html: Path | None, name: str, textgrid: Path | None, model: str
) -> list[Path]:
    """Where to write the page of each clip; checked."""
    pages = _places(clips, html, name)
    options = {"--out": pages[0]} if len(pages) == 1 else {str(page): page for page in pages}
    shared.check_outputs(options, [*clips, textgrid], model)
    return pages


def _places(clips: Sequence[Path], html: Path | None, name: str) -> list[Path]:
    if len(clips) == 1:
        return [html or Path(f"{name}.html")]
    folder = html or Path()
    if not folder.is_dir():
        raise ValueError(f"{len(clips)} clips need a folder to write to, and {folder} is none")
    pages = [folder / f"{name}-{clip.stem}.html" for clip in clips]
    if len(set(pages)) < len(pages):
        raise ValueError("clips of the same name would overwrite each other's page: run them apart")
    return pages


def _print_written(page: Path) -> None:
    out.print(f"page written to [bold]{escape(str(page))}[/]", soft_wrap=True)
