"""The same sweeps in audio_lens and in its peers, on the same weights, side by side.

    python -m benchmarks.patching
    python -m benchmarks.patching --rows lm-resid,lm-heads --repeats 5 --json found.json
    python -m benchmarks.patching --device cuda --whisper large-v3 --llm 7b --windows 25
    python -m benchmarks.patching --quick

Weights and inputs are random. Every method is checked against audio_lens, cell by cell; slow ones
run a random sample of the cells and are scaled. The least floating-point work of each sweep over
the machine's matrix-product rate, measured between the methods, is the limit they are held against.
Beside it stands the roofline, which counts attention at its own rate and the passes over memory.
Peers that are not installed are listed as such. `--quick` runs small models, and with them the
benchmarks of several stimuli, attribution, edits and models that speak, in three minutes. Exit
code 1: some answers disagree.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import attribution, edits, several, speaking
from benchmarks import patching_measure as measuring
from benchmarks import patching_report as report
from benchmarks.peers import METHODS
from benchmarks.peers.tasks import LLMS, ROWS, WHISPERS, Task, make_task

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
DEVICES = ("cpu", "cuda")
INEXACT = ("bfloat16",)  # answers are compared, and may differ
PACKAGES = ("torch", "transformers", "transformer_lens", "nnsight", "pyvene")


@dataclass(frozen=True)
class Extent:
    """How much is measured, where the command line does not say."""

    size: str
    windows: int | None
    repeats: int
    sample: int
    memory: bool


FULL = Extent("base", windows=None, repeats=3, sample=12, memory=True)
QUICK = Extent("quick", windows=4, repeats=1, sample=2, memory=False)


@dataclass(frozen=True)
class Setting:
    """What all rows have in common, as given on the command line."""

    whisper: str
    llm: str
    windows: int | None
    device: str
    dtype: str
    threads: int
    sample: int

    def task(self, name: str) -> Task:
        """The task of a row."""
        is_whisper = ROWS[name].kind == "whisper"
        size = self.whisper if is_whisper else self.llm
        shape = (WHISPERS if is_whisper else LLMS)[size]
        return make_task(name, shape, size, self.device, DTYPES[self.dtype], self.windows)

    def peak_mib(self, method: str, name: str, task: Task) -> float:
        """Peak memory of a method on a row: on a CPU measured by a process of its own."""
        if self.device == "cuda":
            return measuring.peak_mib(task, method, self.sample)
        given = {key: value for key, value in vars(self).items() if value is not None}
        options = [f"--{key}={value}" for key, value in given.items()]
        return measuring.in_fresh_process([f"--rows={name}", *options], method)

    def header(self) -> dict[str, Any]:
        """Device and versions."""
        device = {"device": report.device_name(self.device)}
        return device | {"dtype": self.dtype, "threads": self.threads} | versions()


def main(
    rows: Annotated[str, typer.Option(help=f"Some of {', '.join(ROWS)}.")] = ",".join(ROWS),
    methods: Annotated[
        str, typer.Option(help=f"Some of {', '.join(METHODS)}; audio_lens always runs.")
    ] = ",".join(METHODS),
    whisper: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(WHISPERS)} (default: base).")
    ] = None,
    llm: Annotated[
        str | None, typer.Option(help=f"Audio LLM: one of {', '.join(LLMS)} (default: base).")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="How many windows of time, in rows that have some.")
    ] = None,
    device: Annotated[str, typer.Option(help=f"One of {', '.join(DEVICES)}.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="With 1, CPU time is measured.")] = 1,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Rounds; every method runs in each (default: 3).")
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(min=0, help="Cells that a slow method runs a round; 0: all (default: 12)."),
    ] = None,
    memory: Annotated[
        bool | None, typer.Option("--memory/--no-memory", help="Measure peak memory (default).")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small models, few cells, and all kinds of sweeps.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures.")] = None,
    probe: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare patching sweeps in audio_lens and its peers."""
    row_names = chosen(rows, ROWS, "--rows")
    others = [name for name in chosen(methods, METHODS, "--methods") if name != measuring.OWN]
    usual = QUICK if quick else FULL
    whisper, llm = whisper or usual.size, llm or usual.size
    windows = usual.windows if windows is None else windows
    repeats = repeats or usual.repeats
    sample = usual.sample if sample is None else sample
    memory = usual.memory if memory is None else memory
    known = {"whisper": WHISPERS, "llm": LLMS, "device": DEVICES, "dtype": DTYPES}
    setting = Setting(whisper, llm, windows, device, dtype, threads, sample)
    for option, choices in known.items():
        if getattr(setting, option) not in choices:
            raise typer.BadParameter(f"--{option} is one of {', '.join(choices)}")
    torch.set_num_threads(threads)
    if probe is not None:
        print(json.dumps(measuring.peak_mib(setting.task(row_names[0]), probe, sample)))
        return
    console = Console(width=None if sys.stdout.isatty() else 125)
    header = setting.header()
    console.print(report.header_line(header))

    def compared(name: str) -> measuring.Comparison:
        task = setting.task(name)
        peak_of: Callable | None = None
        if memory:
            peak_of = functools.partial(setting.peak_mib, name=name, task=task)
        wanted = [measuring.OWN, *others]
        found = measuring.compare(name, task, wanted, repeats, sample, peak_of=peak_of)
        console.print(report.table(found))
        return found

    comparisons = [compared(name) for name in row_names]
    figures = header | {"rows": [found.to_dict() for found in comparisons]}
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1))
    disagreeing = [found for found in comparisons if found.disagreeing]
    for found in disagreeing:
        console.print(f"{found.name}: disagree with audio_lens: {', '.join(found.disagreeing)}")
    if quick and not others_agree(whisper, llm, windows):
        raise typer.Exit(1)
    raise typer.Exit(1 if disagreeing and dtype not in INEXACT else 0)


def others_agree(whisper: str, llm: str, windows: int | None) -> bool:
    """Print the other benchmarks of sweeps, shortly; whether all their ways agree."""
    sizes = {"whisper": whisper, "llm": llm}
    agree = several.show(sizes, stimuli=4, rounds=1, windows=windows)
    attribution.show(sizes, items=8, rounds=1)
    agree &= edits.show(items=4, rounds=1)
    return agree & speaking.show(steps=8, sample=4)


def chosen(text: str, known: Iterable[str], option: str) -> list[str]:
    """Names out of a comma-separated list, each known."""
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"{option}: no {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def versions() -> dict[str, str]:
    """Version of every package that matters, by name."""

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return {package: installed(package) for package in PACKAGES}


if __name__ == "__main__":
    typer.run(main)
