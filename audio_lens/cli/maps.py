"""`audio-lens map`: two clips, every layer and moment, one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from audio_lens.cli import complete, shared
from audio_lens.cli.cases import Case, MetricName
from audio_lens.cli.shared import (
    AsJson,
    Debug,
    Device,
    Dtype,
    Language,
    MaxNewTokens,
    ModelName,
    ShowProgress,
    Verbose,
    app,
    err,
    out,
    plain_errors,
)

if TYPE_CHECKING:
    from audio_lens.patching.clip_pair import ClipPair


class Direction(StrEnum):
    """Which run is patched: the corrupted one (denoise), the clean one (noise), or each in turn."""

    denoise = "denoise"
    noise = "noise"
    both = "both"


_DIRECTIONS: dict[Direction, list[Literal["denoise", "noise"]]] = {
    Direction.denoise: ["denoise"],
    Direction.noise: ["noise"],
    Direction.both: ["denoise", "noise"],
}


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
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="What an audio LLM is asked.")
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(
            help="Answer to the clean clip: one token (mind a leading space; id:1234 is one by its "
            "id), the name of a class, or a transcript of a CTC model."
        ),
    ] = None,
    against: Annotated[str | None, typer.Option(help="Answer to the corrupted clip.")] = None,
    metric: Annotated[
        MetricName | None,
        typer.Option(
            help="What the map is read by; default: logit_diff, of CTC models ctc_diff. Those of "
            "one answer need no --against."
        ),
    ] = None,
    language: Language = None,
    textgrid: Annotated[
        Path | None,
        typer.Option(help="A Praat TextGrid of the clean clip: its words stand below the wave."),
    ] = None,
    corrupted_textgrid: Annotated[
        Path | None, typer.Option(help="The same of the corrupted clip.")
    ] = None,
    site: Annotated[
        str,
        typer.Option(
            help="What to patch: part.activation, e.g. decoder.attn.z, connector.out; or several, "
            "with commas, to switch between on the page.",
            autocompletion=complete.sites,
        ),
    ] = "resid_pre",
    axes: Annotated[
        str | None,
        typer.Option(
            help="One or two of layer, head, time, position, neuron, frequency; default: as the "
            "site has them, layer,time, of heads layer,head.",
            autocompletion=complete.axes,
        ),
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option("--layer", "-l", help="A layer to patch, may be repeated; default: all."),
    ] = None,
    window: Annotated[
        float | None, typer.Option(help="Width of the time windows in seconds; default: 0.1.")
    ] = None,
    stride: Annotated[
        float | None, typer.Option(help="Seconds between windows; default: their width.")
    ] = None,
    direction: Annotated[
        Direction,
        typer.Option(help="Put clean activations into the corrupted run, reversed, or both."),
    ] = Direction.denoise,
    verify: Annotated[
        int, typer.Option(min=0, help="Compare so many random cells with whole forwards.")
    ] = 0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Keep what is done in this file; the same command goes on from there."),
    ] = None,
    checkpoint_every: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds between two saves of the checkpoint; default: 2."),
    ] = None,
    html: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path(
        "map.html"
    ),
    save: Annotated[Path | None, typer.Option(help="Also keep the numbers, as netCDF.")] = None,
    max_new_tokens: MaxNewTokens = None,
    progress: ShowProgress = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
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

    [green]audio-lens map --site decoder.attn.z --axes head,time --checkpoint heads.ckpt --verify 3
    --save heads.nc[/]

    [green]audio-lens map --site encoder.resid_pre,decoder.resid_pre --direction both[/]
    """
    with plain_errors(debug, verbose, checkpoint):
        textgrids = textgrid, corrupted_textgrid
        shared.check_there(clean, corrupted, *textgrids)
        wanted, sites = _wanted_axes(axes), _wanted_sites(site)
        pairs = (clean, corrupted), question, (answer, against)
        case = Case.of(*pairs, language, textgrids, metric)
        outputs = {"--out": html, "--save": save, "--checkpoint": checkpoint}
        read = case.clips.clean, case.clips.corrupted, *textgrids
        shared.check_outputs(outputs, read, model)
        directions = _DIRECTIONS[direction]
        if checkpoint is None and checkpoint_every is not None:
            raise ValueError("--checkpoint-every belongs to --checkpoint: name a file to save to")
        if len(sites) * len(directions) > 1 and (save or checkpoint):
            raise ValueError("--save and --checkpoint keep one map: name one site and direction")
        shared.check_audio(case.clips.clean, case.clips.corrupted)
        listener = shared.load(model, device, dtype)
        _check_answers(listener, model)
        shared.check_limit(listener, model, max_new_tokens)
        from audio_lens import patching, report
        from audio_lens.patching.engine.checkpoint import EVERY_S

        found = [patching.Site.parse(one, listener) for one in sites]  # raises before any work
        replace(case.clips, question=question).check_options(listener)
        if not listener.takes_question:
            case = replace(case, clips=replace(case.clips, question=None))
        _tell_lengths(case.clips)
        pair = case.clips.inputs(listener)
        measure = case.measured_by(listener)
        across = {str(one): wanted or _axes_of(one) for one in found}
        is_timed = any("time" in own for own in across.values())
        plans = [
            patching.plan(
                listener,
                clean=pair[0],
                corrupted=pair[1],
                site=one,
                axes=own,
                layers=layer or None,
                windows=None if is_timed and "time" not in own else _windows(window, stride),
                metric=measure,
                direction=way,
            )
            for one, own in across.items()
            for way in directions
        ]
        before = _listen(listener, case.clips, pair, measure, max_new_tokens)
        if not as_json:
            _print_baselines(case, before, measure)
        if before["alike"]:
            raise ValueError(
                "the metric is the same for both clips, so a map would be meaningless: choose "
                "clips that differ in what is asked, or other answers"
            )
        results = [
            one.run(
                progress=progress,
                checkpoint=checkpoint,
                verify=verify,
                checkpoint_every_s=EVERY_S if checkpoint_every is None else checkpoint_every,
            )
            for one in plans
        ]
        for result in results:
            result.meta = _told(case, before) | result.meta
            result.recipe["clips"] = case.clips.record()
        writers = {} if save is None else {"netcdf": partial(results[0].save, save)}
        writers["html"] = partial(
            report.map_page,
            results,
            pair[0].need_audio[0],
            html,
            **case.said[0],
            **{f"corrupted_{tier}": spans for tier, spans in case.said[1].items()},
            corrupted_audio=pair[1].need_audio[0],
            title=case.title,
            sampling_rate=listener.cfg.sampling_rate,
        )
        written, failures = shared.write_each(writers)
        if as_json:
            maps = [_as_data(result) for result in results]
            told = maps[0] if len(maps) == 1 else {"maps": maps}
            shared.print_json(before | told | {"written": written})
        else:
            for result in results:
                _print_map(result)
            _print_written(written)
        shared.raise_first(failures)


def _check_answers(model: Any, name: str) -> None:
    """Raise for models whose answer does not stand behind the clip."""
    shared.check_writes_text(model, name)
    if "encoder" not in model.cfg.parts:
        raise ValueError(
            f"{name} writes while it listens, so that the place of the answer must be named: in "
            "Python, patching.sweep of model.continued(inputs), with position= in the metric"
        )


def _wanted_sites(names: str) -> list[str]:
    """Sites with commas between, each once; what no model has raises before one is loaded."""
    from audio_lens import sites

    wanted = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for one in wanted:
        sites.check_name(one)
    return wanted


def _as_data(result: Any) -> dict[str, Any]:
    """A map as the command prints it in JSON."""
    return {
        "site": result.site,
        "direction": result.direction,
        "meta": result.meta,
        "report": result.report,
        "top": [cell.to_dict() for cell in result.top(10)],
    }


def _tell_lengths(clips: ClipPair) -> None:
    shorter, longer = sorted(clips.seconds)
    if shorter < longer:
        err.print(f"the shorter clip is lengthened with silence to {longer:.2f} s")


def _listen(
    model: Any, clips: ClipPair, pair: Sequence[Any], metric: Any, max_new_tokens: int | None
) -> dict[str, Any]:
    """What the model answers to both clips, and the metric of both."""
    import torch

    from audio_lens import metrics
    from audio_lens.patching.result import alike

    with torch.inference_mode():
        values = [metrics.bound(metric, model, inputs)(model(inputs)).mean() for inputs in pair]
    answers = [
        shared.said(model, inputs, path, max_new_tokens)
        for path, inputs in zip((clips.clean, clips.corrupted), pair, strict=True)
    ]
    return {
        "model": model.cfg.model_name,
        "answers": dict(zip(("clean", "corrupted"), answers, strict=True)),
        "metric": dict(zip(("clean", "corrupted"), (v.item() for v in values), strict=True)),
        "alike": bool(alike(*values)),
    }


def _wanted_axes(axes: str | None) -> list[str]:
    """The axes that are named; none where each site has its own."""
    if axes is None:
        return []
    wanted = [axis.strip() for axis in axes.split(",")]
    if len(wanted) > 2:
        raise ValueError(f"a map has one or two axes, got {', '.join(wanted)}")
    unknown = [axis for axis in wanted if axis not in complete.AXES]
    if unknown:
        raise ValueError(f"unknown axis {unknown[0]!r}: choose of {', '.join(complete.AXES)}")
    return wanted


def _axes_of(site: Any) -> list[str]:
    """The axes of a site where none are named."""
    if site.n_layers is None:
        return ["time"]
    return ["layer", "head" if site.unit == "head" else "time"]


def _windows(window: float | None, stride: float | None) -> float | tuple[float, float] | None:
    """Width, or width and stride, of the windows; None leaves the choice to the sweep."""
    from audio_lens.patching.cells import DEFAULT_WINDOW_S

    if stride is None:
        return window
    return (DEFAULT_WINDOW_S if window is None else window, stride)


def _told(case: Case, before: dict[str, Any]) -> dict[str, str]:
    """What the result should remember of the question."""
    clips, answers = case.clips, before["answers"]
    told = {
        "question": clips.question,
        "clean": f"{clips.clean.name}: {answers['clean']}",
        "corrupted": f"{clips.corrupted.name}: {answers['corrupted']}",
    }
    return {name: text for name, text in told.items() if text is not None}


def _print_baselines(case: Case, before: dict[str, Any], metric: Any) -> None:
    if case.clips.question:
        out.print(f"question: [bold]{escape(case.clips.question)}[/]")
    table = Table("clip", "file", "the model answers", "metric", box=None, header_style="dim")
    for name, path in (("clean", case.clips.clean), ("corrupted", case.clips.corrupted)):
        answer, value = before["answers"][name], before["metric"][name]
        table.add_row(name, escape(path.name), f"[bold]{escape(answer)}[/]", f"{value:+.3f}")
    out.print(table)
    out.print(f"[dim]metric: {escape(metric.name)}[/]")
    doubt = case.doubts(before["answers"], before["metric"])
    if doubt is not None:
        shared.warn(doubt)


def _print_map(result: Any) -> None:
    table = Table(
        f"strongest cells, {result.site}, {result.direction}",
        "effect",
        "recovery",
        "metric",
        box=None,
        header_style="dim",
    )
    for cell in result.top(10):
        numbers = f"{cell.effect:+.3f}", f"{cell.recovery:+.3f}", f"{cell.value:+.3f}"
        table.add_row(escape(cell.place), *numbers)
    out.print()
    out.print(table)
    for note in result.report:
        out.print(f"[dim]{escape(note)}[/]")


def _print_written(written: dict[str, str]) -> None:
    for kind, path in written.items():
        out.print(f"{kind} written to [bold]{escape(path)}[/]", soft_wrap=True)
