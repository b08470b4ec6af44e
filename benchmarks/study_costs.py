"""What studies of a model of 7 billion numbers would cost on 1 to 512 GPUs: computed, never run.

    python -m benchmarks.study_costs
    python -m benchmarks.study_costs --tflops 40 --dtype float32 --no-methods

A config of Qwen2-Audio's shape (32 blocks of 4096 numbers behind 32 blocks of 1280) is written down
without weights, and every row is what `audio-lens study plan` says of it: work by the engine's own
counts or, of methods, by a run on a narrow stand-in; hours by simulation at a stated rate. Clips
last 1 to 15 s, 5 s in the mean.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soundfile
import typer
from rich.console import Console
from rich.table import Table

from audio_lens import Items, studies
from audio_lens.items import demo_items
from audio_lens.models.loading.checkpoints import embedded_path
from audio_lens.studies import StudyError

WORKERS = (1, 8, 64, 512)
LENGTHS_S = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 11.0, 15.0)
SHARES = (0.06, 0.14, 0.18, 0.17, 0.13, 0.11, 0.11, 0.07, 0.03)
RATE = 16_000
SPEECH: Mapping[str, Any] = {"stream": "audio", "site": "decoder.resid_pre"}
STUDIES: Mapping[str, Mapping[str, Any]] = {
    "layer": {**SPEECH, "axes": "layer"},
    "layer x time 0.1 s": {**SPEECH, "axes": ("layer", "time"), "windows": 0.1},
    "layer x time 0.5 s": {**SPEECH, "axes": ("layer", "time"), "windows": 0.5},
    "layer x head": {"stream": "audio", "site": "decoder.attn.z", "axes": ("layer", "head")},
    "encoder layer x time 0.5 s": {
        **{"stream": "audio", "site": "encoder.resid_pre"},
        **{"axes": ("layer", "time"), "windows": 0.5},
    },
}
METHODS = ("grounding.stream_share", "knockout.mass")


def config(folder: Path) -> Path:
    """The config and the processor of such a model."""
    shutil.copytree(embedded_path(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model = json.loads((folder / "config.json").read_text())
    model["text_config"] |= {
        **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 156_032},
        **{"layer_types": ["full_attention"] * 32, "max_position_embeddings": 8192},
    }
    model["audio_config"] |= {
        **{"d_model": 1280, "encoder_ffn_dim": 5120, "encoder_layers": 32},
        **{"encoder_attention_heads": 20, "max_source_positions": 1500, "num_mel_bins": 128},
    }
    (folder / "config.json").write_text(json.dumps(model))
    said = json.loads((folder / "processor_config.json").read_text())
    said["feature_extractor"] |= {
        **{"chunk_length": 30, "n_samples": 480_000, "nb_max_frames": 3000, "feature_size": 128},
    }
    (folder / "processor_config.json").write_text(json.dumps(said))
    return folder


def many(count: int, folder: Path) -> Path:
    """A table of so many items, whose clips are noise of a few lengths."""
    drawn, asked = np.random.default_rng(0), demo_items()
    for seconds in LENGTHS_S:
        for side in ("", "other "):
            samples = 0.1 * drawn.standard_normal(round(seconds * RATE))
            soundfile.write(folder / f"{side}{seconds:g}.wav", samples, RATE)
    rows = []
    for number, seconds in enumerate(drawn.choice(LENGTHS_S, count, p=SHARES).tolist()):
        item = asked[number % len(asked)].replaced(id=f"{number}", words=(), labels={})
        sides = {"audio": f"{seconds:g}.wav", "other_audio": f"other {seconds:g}.wav"}
        rows.append(item.told() | sides)
    table = folder / "items.jsonl"
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return table


def main(
    items: Annotated[int, typer.Option(help="how many different items")] = 2_880,
    times: Annotated[int, typer.Option(help="how often each stands in the table")] = 20,
    tflops: Annotated[float, typer.Option(help="TFLOP a second that a GPU reaches")] = 400.0,
    dtype: Annotated[str, typer.Option(help="of the weights")] = "bfloat16",
    sweeps: Annotated[bool, typer.Option(help="with sweeps")] = True,
    methods: Annotated[bool, typer.Option(help="with methods, which takes minutes")] = True,
) -> None:
    """Print the plan of every study as a row: hours and busy share by GPUs."""
    console = Console(width=150)
    table = Table("study", "TFLOP/item", "GPU-h", "values", *(f"{n} GPUs" for n in WORKERS))
    chosen: dict[str, dict[str, Any]] = {n: {**given} for n, given in STUDIES.items() if sweeps}
    chosen |= {name: {"method": name} for name in METHODS if methods}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        held = Items.from_table(many(items, folder))
        model = str(config(folder / "model"))
        for number, (called, given) in enumerate(chosen.items()):
            study = studies.Study(
                held,
                model,
                out=folder / f"out{number}",
                dtype=dtype,
                device="cuda",
                memory_gb=24,
                **given,
            )
            try:
                one = study.explain(tflops=tflops)
                one = replace(one, unit_s=[unit for unit in one.unit_s for _ in range(times)])
            except StudyError as error:
                console.print(f"{called}: {error}")
                continue
            table.add_row(
                f"{called} (unit {one.unit}, batch {one.batch})",
                f"{one.tflop / items:,.3g}",
                f"{times * one.tflop / tflops / 3600:,.3g}",
                f"{times * one.storage_gb:.2g} GB",
                *(f"{plan.hours:.3g} h, {plan.busy:.2f}" for plan in map(one.at, WORKERS)),
            )
    console.print(
        f"{items * times} items, {tflops:g} TFLOP a second, {dtype}: computed, not measured"
    )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
