"""Results, figures and pages, and the files that hold them."""

from __future__ import annotations

from typing import Any

import h5py
import torch

from audio_lens import patching, report
from audio_lens.patching import SweepResult
from bad_input.world import INF, NAN, Case, clip, inputs, model, named, result, written


def _changed(name: str, change: Any) -> Any:
    """Load a saved result of which something was changed in its file."""
    path = result().save(f"{name}.nc")
    with h5py.File(path, "a") as file:
        change(file)
    return patching.load(path)


def _declare(file: h5py.File) -> None:
    """A terabyte of values of which none is written."""
    del file["value"]
    file.create_dataset("value", (2**20, 2**17), chunks=(1024, 1024))


def _attribute(name: str, value: Any) -> Any:
    return lambda file: file.attrs.__setitem__(name, value)


def _page(**options: Any) -> Any:
    given = {"results": result(), "audio": clip(), "path": "page.html"} | options
    return report.map_page(**given)


def _attention(**options: Any) -> Any:
    given = {"path": "page.html", "layers": [0], "answer": 0} | options
    return report.attention_page(model(), inputs(), **given)


def _cache(**options: Any) -> Any:
    return report.cache_page(model(), inputs(), "page.html", **options)


LOADED = {
    "a file that is not there": lambda: patching.load("nothing.nc"),
    "a number for a path": lambda: patching.load(3),
    "a name with a zero byte": lambda: patching.load("a\0b"),
    "a folder": lambda: patching.load("."),
    "a text": lambda: patching.load(written("text.nc", "no result")),
    "an empty file": lambda: patching.load(written("empty.nc", b"")),
    "half a result": lambda: patching.load(
        written("half.nc", result().save("whole.nc").read_bytes()[:4000])
    ),
    "a terabyte declared": lambda: _changed("declared", _declare),
    "values that are missing": lambda: _changed("valueless", lambda file: file.pop("value")),
    "an attribute that is missing": lambda: _changed("bare", lambda f: f.attrs.pop("site")),
    "notes that are no JSON": lambda: _changed("json", _attribute("meta", "{")),
    "notes that are another kind of JSON": lambda: _changed("kind", _attribute("meta", "[3]")),
    "notes nested 100,000 deep": lambda: _changed("nested", _attribute("report", "[" * 30_000)),
    "a direction that is none": lambda: _changed("way", _attribute("direction", "up")),
    "a site that is a number": lambda: _changed("site", _attribute("site", 3)),
    "windows that end before they start": lambda: _changed(
        "windows", lambda file: file["time_end"].write_direct(0 * file["time_end"][:])
    ),
    "a checkpoint of a sweep that is none": lambda: patching.sweep(
        model(),
        clean=inputs(),
        corrupted=inputs("corrupted"),
        metric=lambda logits: logits[:, -1, 0],
        site="connector.out",
        axes="time",
        checkpoint=written("text.ckpt", "no checkpoint"),
    ),
}

RESULTS = {
    "values of another shape": lambda: SweepResult(
        torch.zeros(2), ("layer",), {"layer": [0]}, torch.zeros(()), torch.ones(()), "a", "noise"
    ),
    "an unknown direction": lambda: SweepResult(
        torch.zeros(1), ("layer",), {"layer": [0]}, torch.zeros(()), torch.ones(()), "a", "up"
    ),
    "a dimension that is not there": lambda: result().select(head=0),
    "a coordinate that is not there": lambda: result().select(layer=99),
    "a moment outside all windows": lambda: result().select(time=NAN),
    "None for a window": lambda: result().select(time=None),
    "the strongest NaN cells": lambda: result().top(NAN),
    "the strongest -1 cells": lambda: result().top(-1),
    "the strongest 2.5 cells": lambda: result().top(2.5),
    "a metric that is not there": lambda: result().of_metric("loss"),
    "a quantity that is not there": lambda: result().plot("size"),
    "a list for a quantity": lambda: result().plot(["effect"]),
    "words without a clip": lambda: result().plot(words=[3]),
    "words that are no spans": lambda: result().plot(audio=clip(), words=["seven"]),
    "a number for words": lambda: result().plot(audio=clip(), words=3),
    "a clip of another length": lambda: result().plot(audio=clip()[:2000]),
    "a rate of NaN": lambda: result().plot(audio=clip(), sampling_rate=NAN),
    "a figure of NaN inches": lambda: result().figure(width_in=NAN),
    "a figure of 1e300 inches": lambda: result().figure(width_in=1e300),
    "a figure of -1 inches": lambda: result().figure(width_in=-1),
    "a figure of an unknown format": lambda: result().figure("figure.xyz"),
    "a folder to save in": lambda: result().save("."),
    "a folder that is not there": lambda: result().save("nowhere/map.nc"),
    "a number for a path": lambda: result().save(3),
    "None for a path": lambda: result().save(None),
}

PAGES = {
    "no results": lambda: _page(results=[]),
    "a number for results": lambda: _page(results=3),
    "results that are none": lambda: _page(results=["map.nc"]),
    "a quantity that is not there": lambda: _page(quantity="size"),
    "a metric that is not there": lambda: _page(metric="loss"),
    "a number for a title": lambda: _page(title=3),
    "a rate of infinity": lambda: _page(sampling_rate=INF),
    "a rate of True": lambda: _page(sampling_rate=True),
    "words that are no spans": lambda: _page(words=[(0.0, 1.0, "seven")]),
    "a folder for a page": lambda: _page(path="."),
    "a number for a page": lambda: _page(path=3),
    "a clip of another length": lambda: _page(audio=clip()[:2000]),
    "a layer of attention that does not exist": lambda: _attention(layers=[99]),
    "a layer of 1.5": lambda: _attention(layers=[1.5]),
    "a text for layers": lambda: _attention(layers="0"),
    "a head of NaN": lambda: _attention(heads=[NAN]),
    "a site of attention that does not exist": lambda: _attention(sites="decoder.mlp"),
    "a number for a site": lambda: _attention(sites=3),
    "an answer of -1 tokens": lambda: _attention(answer=-1),
    "an answer of 1.5 tokens": lambda: _attention(answer=1.5),
    "a prompt that does not exist": lambda: _attention(row=9),
    "a prompt of NaN": lambda: _attention(row=NAN),
    "a clip that does not exist": lambda: _cache(clip=3),
    "a layer of streams that does not exist": lambda: _cache(layers=[99]),
    "a part that does not exist": lambda: _cache(parts="head"),
    "a number for parts": lambda: _cache(parts=3),
    "a token beyond the vocabulary": lambda: _cache(tokens=[10**6]),
    "a float for a token": lambda: _cache(tokens=[3.5]),
    "a number for tokens": lambda: _cache(tokens=3),
    "tokens without a lens": lambda: _cache(tokens=[3], lens=False),
}

CASES: list[Case] = [
    *named("Files of results", LOADED),
    *named("Results and figures", RESULTS),
    *named("Pages", PAGES),
]
