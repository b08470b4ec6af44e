"""`audio-lens features`: fit an autoencoder to what a model hears, and listen to its latents."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from audio_lens.cli import shared
from audio_lens.cli.analyse import clip_files, read_items
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
    from audio_lens.analysis.autoencoders import Autoencoder, Features
    from audio_lens.items import Activations, Items
    from audio_lens.results import Result

PUBLISHED = ("audiosae", "sparsify", "saelens")


@app.command()
def features(
    items: Annotated[
        Path | None,
        typer.Option(
            "--items", "-i", help="A table as analyse takes it; default: the shipped clips."
        ),
    ] = None,
    model: ModelName = "embedded",
    site: Annotated[
        str | None,
        typer.Option(help="Whose activations; default: encoder.resid_post, or the autoencoder's."),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="The block; default: the last of the encoder.")
    ] = None,
    width: Annotated[int, typer.Option(min=1, help="How many latents.")] = 512,
    k: Annotated[int, typer.Option(min=1, help="How many of them are active at a time.")] = 16,
    kind: Annotated[str, typer.Option(help="topk, batchtopk, relu or jumprelu.")] = "topk",
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn at random.")] = 0,
    autoencoder: Annotated[
        Path | None,
        typer.Option(
            help="One that is there already, in place of training: what --save wrote, or a folder "
            f"of {', '.join(PUBLISHED)}."
        ),
    ] = None,
    latent: Annotated[
        list[int] | None,
        typer.Option(
            help="A latent to show, may be repeated; default: twelve that many clips have."
        ),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Keep the autoencoder; a run that was stopped goes on.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--out", "-o", help="The page to listen to.")] = None,
    progress: ShowProgress = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Fit a sparse autoencoder to activations, and listen to what excites its latents.

    The page plays each clip from the moment at which a latent becomes active.

    [bold]Examples[/]

    [green]audio-lens features --out features.html[/]

    [green]audio-lens features --items speech.jsonl --model openai/whisper-small --layer 8
    --width 6144 --k 50 --kind batchtopk --steps 20000 --save ae.safetensors --out page.html[/]

    [green]audio-lens features --items speech.jsonl --model openai/whisper-small
    --autoencoder Audio-SAE-Whisper-small/layer_9 --out page.html[/]
    """
    with plain_errors(debug, verbose):
        if autoencoder is not None and save is not None:
            raise ValueError("--save keeps what is trained, and --autoencoder names what was")
        shared.check_there(items, autoencoder)
        outputs = {"--save": save, "--out": html}
        shared.check_outputs(outputs, [items, autoencoder], model)
        table = read_items(items, skip_bad=False)
        shared.check_outputs(outputs, [items, autoencoder, *clip_files(table)], model)
        from audio_lens.analysis.autoencoders.training import BATCH, RATE, setting_of

        setting_of(width, k, kind, steps, BATCH, RATE, seed, 0, None)  # raises now
        given = None if autoencoder is None else _read(autoencoder, site, layer)
        listener = shared.load(model, device, dtype)
        if items is None and not listener.takes_question:
            raise ValueError(f"{model} takes no questions, as the shipped clips have: name --items")
        usable = table.usable(listener)
        from audio_lens.analysis import autoencoders

        place, block = _place(listener, given, site, layer)
        acts = _collected(listener, usable, place, block, progress)
        made = given or autoencoders.train(
            *(acts, width, k),
            kind=kind,
            steps=steps,
            seed=seed,
            site=place,
            layer=block,
            to=save,
            progress=progress,
        )
        quality = autoencoders.evaluate(made, acts, site=place, layer=block)
        found = autoencoders.features(
            *(listener, usable, acts, made, latent or None),
            site=place,
            layer=block,
            progress=progress,
        )
        written = {} if save is None else {"autoencoder": str(save)}
        failures: list[Exception] = []
        if html is not None:
            from audio_lens.report import feature_page

            name = "the shipped clips" if items is None else items.name
            title = f"What latents of {model} listen to in {name}"
            pages, failures = shared.write_each(
                {"html": partial(feature_page, found, html, title=title)}
            )
            written |= pages
        if as_json:
            shared.print_json(_told(found, quality) | {"seed": seed, "written": written})
        else:
            _print(found, quality)
            for what, path in written.items():
                out.print(f"{what} written to [bold]{escape(path)}[/]", soft_wrap=True)
        shared.raise_first(failures)


def _read(path: Path, site: str | None, layer: int | None) -> Autoencoder:
    """An autoencoder of one's own, or as others publish them."""
    from audio_lens.analysis.autoencoders import Autoencoder, read

    is_own = path.is_file() and path.name not in ("sae.safetensors", "sae_weights.safetensors")
    if is_own and path.suffix != ".pt":
        return Autoencoder.load(path)
    return read(path, site=site, layer=layer)


def _place(
    model: Any, given: Autoencoder | None, site: str | None, layer: int | None
) -> tuple[str, int | None]:
    """Site and layer: as asked, else the autoencoder's own, else the end of the encoder."""
    if site is None and given is not None and given.site is not None:
        return given.site, given.layer if layer is None else layer
    if site is None and model.cfg.encoder is None:
        raise ValueError(f"{model.cfg.model_name} has no encoder of blocks: name --site")
    place = site or "encoder.resid_post"
    from audio_lens.sites import Site

    count = Site.parse(place, model).n_layers
    if count is None or layer is not None:
        return place, layer
    return place, count - 1


def _collected(
    model: Any, items: Items, site: str, layer: int | None, progress: bool | None
) -> Activations:
    from audio_lens.items import collect

    layers = None if layer is None else [layer]
    return collect(model, items, site, "audio", layers=layers, progress=progress)


def _told(found: Features, quality: Result) -> dict[str, Any]:
    fvu, l0 = quality.mean().values.tolist()
    told = [
        {
            "latent": one.latent,
            "share": one.share,
            "peak": one.peak,
            "said": {
                tier: {"label": label, "share": share} for tier, (label, share) in one.said.items()
            },
            "effects": {answer: list(both) for answer, both in one.effects.items()},
            "moments": [
                {"item": m.firing.item, "second": m.firing.second, "value": m.firing.value}
                for m in one.moments
            ],
        }
        for one in found.features
    ]
    dead = float(quality.meta["dead"])
    return {"fvu": fvu, "l0": l0, "dead": dead, "facts": found.facts, "features": told}


def _print(found: Features, quality: Result) -> None:
    for line in quality.report:
        out.print(escape(line), soft_wrap=True)
    table = Table("latent", "active at", "most on", "share", "turned up", box=None)
    table.header_style = "dim"
    for one in found.features:
        tier = "phones" if "phones" in one.said else "words"
        label, share = one.said.get(tier, ("", float("nan")))
        moved = max(one.effects.items(), key=lambda held: held[1][1] - held[1][0], default=None)
        change = "" if moved is None else f"{moved[0]} {moved[1][1] - moved[1][0]:+.2f}"
        known = "" if not label else f"{share:.2f}"
        table.add_row(
            *(str(one.latent), f"{100 * one.share:.2g} %", escape(label), known, escape(change))
        )
    out.print(table)
