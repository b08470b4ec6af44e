"""What hooks and caches cost: one forward of Hugging Face's Whisper against ours, side by side.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --size tiny --repeats 15 --json

The variants run in turns, in a new order every round, in one process on one thread, and what
counts is the CPU time of that thread: a busy machine slows all of them alike. Weights are random.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from audio_lens import HookedAudioTransformer
from audio_lens.hooks import is_large

# width, layers of encoder and of decoder, heads
SIZES = {
    "micro": (64, 2, 4),
    "tiny": (384, 4, 6),
    "base": (512, 6, 8),
    "small": (768, 12, 12),
}
REFERENCE = "Hugging Face, SDPA"


def hf_whisper(size: str) -> transformers.WhisperForConditionalGeneration:
    """A Whisper of this size with random weights."""
    width, layers, heads = SIZES[size]
    config = transformers.WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
    )
    config._attn_implementation = "sdpa"
    return transformers.WhisperForConditionalGeneration(config).eval()


def variants(size: str, n_tokens: int) -> dict[str, Callable[[], Any]]:
    """What is compared: a name and a forward."""
    hf_model = hf_whisper(size)
    model = HookedAudioTransformer.from_hf(hf_model)
    inputs = {
        "input_features": torch.randn(1, model.cfg.n_mels, model.cfg.n_frames),
        "decoder_input_ids": torch.randint(1000, (1, n_tokens)),
    }

    def small(name: str) -> bool:
        return not is_large(name)

    def identity(act: torch.Tensor, hook: Any) -> torch.Tensor:
        return act

    def cached(names_filter: Any = None) -> Callable[[], Any]:
        return lambda: model.run_with_cache(inputs, names_filter=names_filter)

    return {
        REFERENCE: lambda: hf_model(**inputs, use_cache=False),
        "no hooks": lambda: model(inputs),
        "identity hook on all but attention": lambda: model.run_with_hooks(
            inputs, fwd_hooks=[(small, identity)]
        ),
        "cache of residuals": cached(lambda name: "hook_resid" in name),
        "cache, default": cached(),
        "cache of all patterns": cached(lambda name: name.endswith("hook_pattern")),
    }


def measure(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of every run, ``repeats`` times each, interleaved in random order."""
    shuffler = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for run in runs.values():
            run()
        for _ in track(range(repeats), description="rounds", console=Console(stderr=True)):
            for name in shuffler.sample(list(runs), len(runs)):
                start = time.thread_time()
                runs[name]()
                seconds[name].append(time.thread_time() - start)
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median milliseconds, and the median over rounds of the ratios to two references."""

    def ratio(name: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))

    return {
        name: {
            "median_ms": 1000 * statistics.median(taken),
            "least_ms": 1000 * min(taken),
            "to_hugging_face": ratio(name, REFERENCE),
            "to_no_hooks": ratio(name, "no hooks"),
        }
        for name, taken in seconds.items()
    }


def main(
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "base",
    repeats: Annotated[int, typer.Option(help="Rounds; every variant runs once in each.")] = 9,
    tokens: Annotated[int, typer.Option(help="Decoder tokens.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, no table.")] = False,
) -> None:
    """Print what hooks and caches cost."""
    if size not in SIZES or repeats < 1:
        raise typer.BadParameter(f"size is one of {', '.join(SIZES)}, and repeats at least 1")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = summary(measure(variants(size, tokens), repeats))
    if as_json:
        print(json.dumps({"size": size, "tokens": tokens, "repeats": repeats, "variants": found}))
        return
    title = f"whisper-{size} shape, 30 s, {tokens} tokens, float32, one thread, {repeats} rounds"
    table = Table("", "median ms", "least ms", "/ Hugging Face", "/ no hooks", title=title)
    for name, row in found.items():
        times = [f"{row[key]:.0f}" for key in ("median_ms", "least_ms")]
        table.add_row(
            name, *times, *(f"{row[f'to_{x}']:.3f}" for x in ("hugging_face", "no_hooks"))
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
