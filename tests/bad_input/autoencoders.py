"""Autoencoders: what is trained on, published files, latents and their page."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from audio_lens.analysis import autoencoders
from audio_lens.analysis.autoencoders import Autoencoder
from audio_lens.items import Activations, Items, demo_items
from audio_lens.items.activations import COLUMNS
from audio_lens.items.shards import HeldShard, key_of, table_key
from bad_input.commands import run
from bad_input.world import NAN, Case, model, named, written

SITE = "encoder.resid_post"


@functools.cache
def rows() -> torch.Tensor:
    return torch.randn(300, 8, generator=torch.Generator().manual_seed(0))


def own(**changed: Any) -> Autoencoder:
    reads = rows()[:12]
    whole = {"reads": reads, "offsets": torch.zeros(12), "directions": reads, "k": 2}
    return Autoencoder(**(whole | {"centre": torch.zeros(8)} | changed))


@functools.cache
def collected() -> tuple[Items, Activations]:
    """Rows of two layers, as if of two items."""
    items = demo_items()[:2]
    index = {"sites": {SITE: {"layers": [1, 2], "positions_of": "encoder"}}, "meta": {}}
    index |= {"items": [item.told() for item in items], "pool": "none", "where": "audio"}
    at = torch.arange(300)
    columns = {"item": at // 150, "row": at * 0, "position": at % 150, "second": at % 150 / 50}
    held = {table_key("encoder", name): columns[name] for name in COLUMNS}
    held |= {key_of(SITE, layer): rows() for layer in (1, 2)}
    return items, Activations(index, [HeldShard(held)])


def trained(**changed: Any) -> Callable[[], Any]:
    asked = {"activations": rows(), "width": 12, "k": 2, "steps": 2} | changed
    return lambda: autoencoders.train(**asked)


def published(name: str, **tensors: Any) -> Callable[[], Any]:
    """A folder as AudioSAE has it, with some tensors changed."""

    def read() -> Any:
        held: dict[str, Any] = {"encoder.weight": rows()[:12], "encoder.bias": torch.zeros(12)}
        held |= {"decoder.weight": rows()[:12].mT, "b_dec": torch.zeros(8), "k": torch.tensor(2)}
        path = written("ae.pt", b"")
        torch.save({n: x for n, x in (held | tensors).items() if x is not None}, path)
        return autoencoders.read(path, name)

    return read


def sparse(**settings: Any) -> Callable[[], Any]:
    def read() -> Any:
        folder = autoencoders.write(own(), Path("sparse"), "sparsify")
        told = json.loads((folder / "cfg.json").read_text()) | settings
        (folder / "cfg.json").write_text(json.dumps(told))
        return autoencoders.read(folder)

    return read


def shown(latents: Any) -> Callable[[], Any]:
    def page() -> Any:
        items, acts = collected()
        made = autoencoders.train(acts, 12, 2, steps=2, layer=1)
        return autoencoders.features(model(), items, acts, made, latents)

    return page


TRAINING = {
    "a width of 0": trained(width=0),
    "k above the width": trained(k=13),
    "a kind that is none": trained(kind="top-k"),
    "a rate of NaN": trained(rate=NAN),
    "rows of three axes": trained(activations=rows()[None]),
    "rows of NaN": trained(activations=rows() * NAN),
    "rows that are all 0": trained(activations=rows() * 0),
    "a site of a plain tensor": trained(site=SITE),
    "several layers": lambda: autoencoders.train(collected()[1], 12, 2),
    "a layer that was not collected": lambda: autoencoders.train(collected()[1], 12, 2, layer=3),
    "a start of another width": trained(start=own(), width=16),
    "a file of another run": lambda: (
        trained(to="run.safetensors")(),
        trained(to="run.safetensors", seed=1)(),
    ),
    "a file that holds none": lambda: Autoencoder.load(written("none.safetensors", "no")),
    "a published tensor that is not known": published("audiosae", W_skip=torch.zeros(8, 8)),
    "a published tensor that is missing": published("audiosae", b_dec=None),
    "a published tensor of another shape": published("audiosae", b_dec=torch.zeros(9)),
    "a threshold that was never set": published("audiosae", threshold=torch.tensor(-1.0)),
    "a published setting that is not known": sparse(new_loss=True),
    "a transcoder": sparse(transcode=True),
    "a format that is none": published("sae-lens"),
}

LATENTS = {
    "vectors of another length": lambda: own().encode(torch.zeros(2, 9)),
    "a latent that is not there": lambda: autoencoders.steering(own(), 12, value=1.0, site=SITE),
    "a latent twice": lambda: autoencoders.steering(own(), [1, 1], value=1.0, site=SITE),
    "no site": lambda: autoencoders.steering(own(), 1, value=1.0),
    "a mode that is none": lambda: autoencoders.steering(own(), 1, "up", 1.0, site=SITE),
    "scaling by 1": lambda: autoencoders.steering(own(), 1, "scale", 1.0, site=SITE),
    "clamping to nothing": lambda: autoencoders.steering(own(), 1, site=SITE),
    "a value that no row has": lambda: autoencoders.rank(own(), rows(), ["a", "b"] * 150, "c"),
    "too few labels": lambda: autoencoders.rank(own(), rows(), ["a", "b"], "a"),
    "a metric that is none": lambda: autoencoders.splice(
        model(), demo_items()[:2], own(), site=SITE, layer=1, metric="cer"
    ),
    "streams of items without counterparts": lambda: autoencoders.modality_of(
        model(), Items(x.replaced(other_text=None) for x in demo_items()[:2]), own(), site=SITE
    ),
    "a page of a latent that is not there": shown([12]),
    "features --kind top": lambda: run("features", "--kind", "top"),
    "features of a file that is not there": lambda: run("features", "--autoencoder", "gone"),
    "features --save beside --autoencoder": lambda: run(
        "features", "--autoencoder", ".", "--save", "a.safetensors"
    ),
}

CASES: list[Case] = [
    *named("Autoencoders", TRAINING),
    *named("Latents", LATENTS),
]
