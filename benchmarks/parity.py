"""How closely every family matches Hugging Face or what was published, and what it is made of.

    python -m benchmarks.parity
    python -m benchmarks.parity --write      # also renews the table `audio-lens models` prints

Runs tiny random models (every parameter random) of the families under test, in all their shapes
and on all their batches, in float32 and float64 with attention written out, beside transformers
(recipes beside the published computation, written anew in `tests/published`), and prints the
largest difference in any output, residual stream or pattern. Batches that the original itself does
not compute in float64 (its softmax is float32, or it is NaN) are measured apart.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers

from audio_lens import HookedAudioTransformer
from audio_lens.catalogue import FILE, Catalogue, Entry

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "models")]

from test_parity import compare  # noqa: E402

from families import FAMILIES  # noqa: E402
from families.base import Family  # noqa: E402


def entry_of(family: Family) -> Entry:
    """Everything the table says of a family, measured."""
    model = family.hooked(family.build(dtype=torch.float32))
    blocks = {
        part: sum(name.startswith(f"{part}.blocks.0.") for name in model.hook_dict)
        for part in model.cfg.parts
    }
    in_blocks = sum(bool(re.search(r"\.blocks\.\d+\.", name)) for name in model.hook_dict)
    steps = seconds_per_position(family, model)
    return Entry(
        name=family.name,
        family=file_of(model),
        parts=list(steps),
        hooks_per_block=blocks,
        hooks_elsewhere=len(model.hook_dict) - in_blocks,
        seconds_per_position={part: step for part, step in steps.items() if step},
        float32=worst(family, torch.float32),
        float64=worst(family, torch.float64),
        not_float64={name: one_batch(family, name) for name in family.no_float64},
    )


def file_of(model: HookedAudioTransformer) -> str:
    """The file that implements a model: in `audio_lens.models.families`, or ``recipes/name``."""
    *_, folder, name = type(model).__module__.split(".")
    return name if folder in ("models", "families") else f"{folder}/{name}"


def seconds_per_position(family: Family, model: HookedAudioTransformer) -> dict[str, float | None]:
    """Distance of neighbouring positions of every part; None where they have no time."""
    noise = np.random.default_rng(0).standard_normal(model.cfg.sampling_rate).astype(np.float32)
    inputs = family.batch() if family.clips is None else family.clips(model, [noise])
    timeline = model.timeline(inputs)[0]
    steps = {}
    for part in timeline.rows[0].tracks:
        seconds = timeline.seconds(part)
        moments = seconds[seconds.isfinite()].unique()
        steps[part] = round(moments.diff().median().item(), 6) if len(moments) > 1 else None
    return steps


def one_batch(family: Family, name: str) -> float | None:
    """The largest relative difference in float64 on a batch; None where the original is NaN."""
    differences = compare(family, torch.float64, {}, family.batches[name]).values()
    return max(differences) if all(map(math.isfinite, differences)) else None


def worst(family: Family, dtype: torch.dtype) -> float:
    """The largest relative difference over all shapes, and the batches that this dtype has."""
    runs = [
        (options, family.model_batches.get(name, {})) for name, options in family.models.items()
    ]
    runs += [
        ({}, options)
        for name, options in family.batches.items()
        if dtype == torch.float32 or name not in family.no_float64
    ]
    return max(max(compare(family, dtype, *run).values()) for run in runs)


def main() -> None:
    """Measure, print, and with ``--write`` keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="renew the shipped table")
    parser.add_argument("--family", action="append", help="only these (default: all)")
    arguments = parser.parse_args()
    if arguments.write and arguments.family:
        parser.error("--write needs all families")
    entries: list[Entry] = []
    for name in arguments.family or FAMILIES:
        entries.append(entry_of(FAMILIES[name]))
        print("\t".join(Catalogue(entries[-1:], {}).rows()[0].values()), flush=True)
    print(Catalogue(entries, {}).not_in_float64())
    if arguments.write:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        held = {"versions": versions, "entries": [asdict(entry) for entry in entries]}
        (ROOT / "audio_lens" / FILE).write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
