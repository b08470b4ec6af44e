"""Studies: arguments, files, places and engines."""

from __future__ import annotations

from typing import Any

from audio_lens import studies
from audio_lens.items import Item, Items
from audio_lens.studies.harvest import harvest_study
from bad_input.commands import run
from bad_input.world import NAN, RATE, Case, clip, named, written

CHEAP: dict[str, Any] = {
    **{"site": "decoder.resid_pre", "axes": "layer", "layers": [2], "stream": "audio"},
    **{"unit": 8, "batch": 1},
}


def _study(out: str = "study", items: Any = "demo", **options: Any) -> Any:
    return studies.Study(items, out=out, **{**CHEAP, **options})


def _method(name: str, **options: Any) -> Any:
    return studies.Study("demo", out="method", method=name, **{"unit": 2, "batch": 1, **options})


def _again(**options: Any) -> Any:
    _study("again")
    return _study("again", **options)


def _file(text: str) -> Any:
    return run("study", "run", written("study.toml", text))


def _harvest(**options: Any) -> Any:
    return studies.harvest("demo", **{"out": "acts", **options})


def _in_memory() -> Items:
    return Items([Item(clip(), "what?", answer="two", sampling_rate=RATE)])


FILE = """
items = "demo"
out = "filed"
site = "decoder.resid_pre"
axes = "layer"
unit = 2
batch = 1
"""

STUDIES = {
    "an argument that sweeps do not take": lambda: _study(axis="layer"),
    "a metric": lambda: _study(metric="logit_diff"),
    "a method that there is not": lambda: _method("knockout.knock"),
    "an argument of another method": lambda: _method("knockout.knock_out", depth=3),
    "case= of a method": lambda: _method("knockout.knock_out", case="os.path:join"),
    "stream= of a method over items": lambda: _method("knockout.knock_out", stream="audio"),
    "a case that is no path": lambda: _study(case="cases"),
    "a case that cannot be imported": lambda: _study(case="cases:mine"),
    "a source that no file holds": lambda: _study(source=object()),
    "dtype='half'-hearted": lambda: _study(dtype="half-hearted"),
    "unit=0": lambda: _study(unit=0),
    "batch=-1": lambda: _study(batch=-1),
    "items in memory": lambda: _study(items=_in_memory()),
    "a table that is not there": lambda: _study(items="none.jsonl"),
    "the place of another study": lambda: _again(layers=[3]),
    "the place of a study of another unit": lambda: _again(unit=3),
    "a file as a place": lambda: _study(written("taken", "x") / "study"),
    "a store that is not known": lambda: _study("ftp://host/study"),
    "load: no study": lambda: studies.load("nowhere"),
    "load: nothing done": lambda: studies.load(_study("fresh").out),
    "explain(workers=0)": lambda: _study().explain(workers=0),
    "explain(tflops=nan)": lambda: _study().explain(tflops=NAN),
    "explain of a harvest": lambda: harvest_study("demo", out="acts").explain(),
    "a method that is of all items at once": lambda: _method("grounding.hand_over"),
    "explain of a model that is not there": lambda: _study("p", model="./nowhere").explain(),
    "Ray(workers=0)": lambda: studies.Ray(workers=0),
    "Slurm(workers=0)": lambda: studies.Slurm(workers=0),
    "Slurm(hours=0)": lambda: studies.Slurm(hours=0),
    "Slurm without logs": lambda: studies.Slurm().run("s3://bucket/study", [0]),
}
COUNTED = {  # on a small stand-in of the model, which runs
    "explain of a method that goes by right answers": lambda: _method("fusion.trace").explain(),
}
HARVESTS = {
    "keep='half a byte'": lambda: _harvest(keep="half a byte"),
    "pool='sum'": lambda: _harvest(pool="sum"),
    "site= in place of sites=": lambda: _harvest(site="decoder.resid_post"),
    "a store that is not known": lambda: _harvest(out="ftp://host/acts"),
    "a place by a function": lambda: _harvest(where=lambda item: item.words[0]),
}
FILES = {
    "study run: no file": lambda: run("study", "run", "none.toml"),
    "study run: no TOML": lambda: _file("items = "),
    "study run: no out": lambda: _file('items = "demo"'),
    "study run: engine = 3": lambda: _file(f"{FILE}engine = 3"),
    "study run: an unknown engine": lambda: _file(f'{FILE}[engine]\nkind = "dask"'),
    "study run: an unknown option": lambda: _file(f'{FILE}[engine]\nkind = "ray"\ngpu = 1'),
    "study run --workers of one process": lambda: run(
        "study", "run", written("study.toml", FILE), "--workers", 2
    ),
    "study status: no study": lambda: run("study", "status", "nowhere"),
    "study collect: no study": lambda: run("study", "collect", "nowhere"),
    "study retry: no study": lambda: run("study", "retry", "nowhere"),
}

CASES: list[Case] = [
    *named("Studies", STUDIES),
    *named("What a study costs", COUNTED),
    *named("Activations as a study", HARVESTS),
    *named("Studies from a shell", FILES),
]
